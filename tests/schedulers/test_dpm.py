"""The DPM-Solver schedulers: what the crossed options of test_indexed do not hold."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import difusores
from difusores import solvers
from difusores.brownian import BrownianNoise

diffusers = pytest.importorskip("diffusers")

NAMES = [
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
]
BROWNIAN = ["CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"]
SHAPE = (2, 3, 4, 4)


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    ours, theirs = (getattr(package, name)(**options) for package in (difusores, diffusers))
    return ours, theirs


def tensors(seed: int, dtype: torch.dtype = torch.float32, channels: int = 3) -> tuple[Tensor, Tensor]:
    values = torch.Generator().manual_seed(seed)
    x, e = torch.randn(SHAPE, generator=values), torch.randn((2, channels, 4, 4), generator=values)
    return x.to(dtype), e.to(dtype)


@pytest.mark.parametrize("name", [*NAMES, *BROWNIAN])
@pytest.mark.parametrize("method", ["__init__", "step", "set_timesteps", "add_noise"])
def test_signatures_are_those_of_diffusers(name: str, method: str) -> None:
    if name in BROWNIAN:
        pytest.importorskip("torchsde", reason="diffusers has the class only where torchsde is installed")

    def read(package: Any) -> list[tuple[str, Any]]:
        function = getattr(getattr(package, name), method)
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert read(difusores) == read(diffusers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_noise_is_drawn_as_diffusers_draws_it(name: str, kind: str, dtype: torch.dtype) -> None:
    flow = {"use_flow_sigmas": True} if "Inverse" in name else {}
    if kind == "sample" and name.startswith("EDM"):
        kind = "v_prediction"
    ours, theirs = pair(name, algorithm_type="sde-dpmsolver++", prediction_type=kind, **flow)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
    # The noise of some classes has the dtype that both promote to. Products with 0 are not rounded.
    x, e = tensors(1)[0], torch.zeros(SHAPE, dtype=dtype)
    results = []
    for scheduler in (ours, theirs):
        generator = torch.Generator().manual_seed(3)
        results.append(scheduler.step(e, scheduler.timesteps[0], x, generator=generator).prev_sample)
        results.append(torch.randn(1, generator=generator))
    assert results[0].dtype is results[2].dtype
    # diffusers multiplies noise of the output's dtype in that dtype
    narrow = kind == "sample" and dtype is not torch.float64
    rounding = torch.finfo(dtype if narrow else torch.float32).eps
    atol = 8 * rounding * float(results[2].abs().max())
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=atol)
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("steps", [14, 15, 16])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"])
def test_it_ends_in_lower_orders_below_fifteen_steps(name: str, steps: int) -> None:
    ours, theirs = pair(name, solver_order=3, final_sigmas_type="sigma_min")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    ours.sigmas, theirs.sigmas = theirs.sigmas.clone(), theirs.sigmas.double()
    for i, (t, told) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        x, e = tensors(i, torch.float64)
        mine, right = (s.step(e, at, x).prev_sample for s, at in ((ours, t), (theirs, told)))
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-6 * float(right.abs().max()))


@pytest.mark.parametrize("begin", [0, 10])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver"])
def test_third_order_over_more_than_fifteen_steps(algorithm: str, begin: int) -> None:
    options = {"algorithm_type": algorithm, "solver_order": 3, "final_sigmas_type": "sigma_min"}
    ours, theirs = pair("DPMSolverMultistepScheduler", **options)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
    for t in ours.timesteps[begin:]:
        x, e = tensors(int(t), torch.float64)
        results = []
        for scheduler in (ours, theirs):
            generator = torch.Generator().manual_seed(int(t))
            results.append(scheduler.step(e, t, x, generator=generator).prev_sample)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_given_noise_takes_the_place_of_the_generator() -> None:
    ours, theirs = pair("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    x, e = tensors(2)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
        results.append(scheduler.step(e, 999, x, variance_noise=z).prev_sample)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_second_half_of_the_channels_is_dropped(kind: str) -> None:
    x, e = tensors(4, channels=6)
    learned = difusores.DPMSolverMultistepScheduler(variance_type="learned_range", prediction_type=kind)
    plain = difusores.DPMSolverMultistepScheduler(prediction_type=kind)
    for scheduler in (learned, plain):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="shape"):
        plain.step(e, 999, x)
    plain.set_timesteps(4)
    expected = plain.step(e[:, :3], 999, x).prev_sample
    assert torch.equal(learned.step(e, 999, x).prev_sample, expected)


ALGORITHMS = ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("order", "kind"), [(2, "heun"), (3, "midpoint"), (3, "heun")])
@pytest.mark.parametrize("solver", ["multistep", "singlestep"])
def test_a_step_is_exact_where_the_model_is_linear_in_lambda(
    solver: str, order: int, kind: str, algorithm: str
) -> None:
    """Against the integral from lambda to lambda that the solver approximates."""
    lambdas = [-2.0, -1.1, -0.5, 0.4]
    levels = [(1 / math.sqrt(1 + math.exp(-2 * v)), 1 / math.sqrt(1 + math.exp(2 * v))) for v in lambdas]
    data = algorithm.endswith("++")
    model = "sample" if data else "epsilon"
    i = order - 1
    if solver == "multistep":
        options = {"order": order, "algorithm": algorithm, "solver_type": kind, "lower_order_final": False}
        stages = [*solvers.dpm_multistep([3, 2, 1], levels, solvers.Prediction(model), **options)]
        base, x = i, "xh"
    else:
        orders = [1, 2, 3]
        options = {"algorithm": algorithm, "solver_type": kind}
        stages = [*solvers.dpm_singlestep([3, 2, 1], levels, solvers.Prediction(model), orders, **options)]
        base, x = 0, f"s{order - 1}"
    weights = dict(zip(("x0", "xh", "e", "z", "s0", "s1", "s2"), stages[i].row[12:19], strict=True))

    def value(lam: float) -> float:
        return 0.3 + 0.7 * lam

    newest = "x0" if data else "e"
    held = {newest: value(lambdas[i])} | {f"s{k}": value(lambdas[i - 1 - k]) for k in range(order - 1)}
    made = sum(weights[name] * m for name, m in held.items())
    start, end = lambdas[base], lambdas[i + 1]
    points = np.linspace(start, end, 200001)
    alpha, sigma = levels[i + 1]
    rate = 2.0 if algorithm.startswith("sde") else 1.0
    if data:
        integrand = alpha * rate * np.exp(rate * (points - end)) * value(points)
    else:
        integrand = -sigma * rate * np.exp(end - points) * value(points)
    expected = float(np.sum((integrand[1:] + integrand[:-1]) / 2) * (points[1] - points[0]))
    assert made == pytest.approx(expected, abs=1e-8)
    h = end - start
    ratio = sigma / levels[base][1] * math.exp(-h if rate == 2 else 0) if data else alpha / levels[base][0]
    assert weights[x] == pytest.approx(ratio, rel=1e-12)


@pytest.mark.parametrize("algorithm", ["dpmsolver", "sde-dpmsolver", "dpmsolver++"])
def test_limited_velocities_at_flow_levels(algorithm: str) -> None:
    options = {"algorithm_type": algorithm, "prediction_type": "v_prediction", "use_flow_sigmas": True}
    limits = {"thresholding": True, "sample_max_value": 1.5, "final_sigmas_type": "sigma_min"}
    ours, theirs = pair("DPMSolverMultistepScheduler", **options, **limits)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    for t in ours.timesteps:
        x, e = tensors(int(t), torch.float64)
        results = [
            scheduler.step(e, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
            for scheduler in (ours, theirs)
        ]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_the_middle_of_equal_timesteps_is_not_looked_at() -> None:
    ours, theirs = pair("DPMSolverSinglestepScheduler", solver_order=3, lower_order_final=True)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[900, 900, 500, 300, 100])
        scheduler.set_begin_index(0)
    for i, t in enumerate(ours.timesteps):
        x, e = tensors(i, torch.float64)
        results = [scheduler.step(e, t, x).prev_sample for scheduler in (ours, theirs)]
        if i != 1:  # where diffusers divides by the distance of equal timesteps
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        assert results[0].isfinite().all()


def test_given_timesteps_and_shifts_are_those_of_diffusers() -> None:
    flow = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
    for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
        ours, theirs = pair(name)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(timesteps=[999, 600, 599, 200, 10])
        assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.sigmas, theirs.sigmas)
        ours, theirs = pair(name, **flow)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(7, mu=0.8)
        assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.sigmas, theirs.sigmas)


@pytest.mark.parametrize("name", NAMES)
def test_add_noise_and_absent_timesteps(name: str) -> None:
    ours, theirs = pair(name)
    x, z = tensors(6)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    if hasattr(theirs, "index_for_timestep"):
        assert ours.index_for_timestep(-7) == theirs.index_for_timestep(-7) == 5
    times = ours.timesteps[[1, 4]]
    torch.testing.assert_close(ours.add_noise(x, z, times), theirs.add_noise(x, z, times))
    if hasattr(theirs, "set_begin_index"):
        for scheduler in (ours, theirs):
            scheduler.set_begin_index(3)
        torch.testing.assert_close(ours.add_noise(x, z, times), theirs.add_noise(x, z, times))


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_makes_the_steps_of_the_scheduler(name: str) -> None:
    scheduler = getattr(difusores, name)(solver_order=3, algorithm_type="dpmsolver++")
    x, _ = tensors(8)
    plan = scheduler.plan(6, begin=1)
    result = plan.run(lambda given, t: 0.1 * given + 0.01 * t, x)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps[1:]:
        e = 0.1 * scheduler.scale_model_input(x, t) + 0.01 * t
        x = scheduler.step(e, t, x).prev_sample
    torch.testing.assert_close(result, x)


def test_the_names_of_other_solvers_are_adopted() -> None:
    scheduler = difusores.DPMSolverMultistepScheduler(algorithm_type="deis", solver_type="bh2")
    assert scheduler.config.algorithm_type == "dpmsolver++" and scheduler.config.solver_type == "midpoint"
    with pytest.raises(NotImplementedError, match="solver_type must be one of midpoint, heun, got 'rk4'"):
        difusores.EDMDPMSolverMultistepScheduler(solver_type="rk4")
    with pytest.raises(NotImplementedError, match="algorithm_type"):
        difusores.DPMSolverSinglestepScheduler(algorithm_type="sde-dpmsolver")


def test_singlestep_changes_lower_order_final_as_diffusers_does() -> None:
    ours, theirs = pair(
        "DPMSolverSinglestepScheduler", solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min"
    )
    for steps in (6, 7):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert ours.order_list == theirs.order_list
        assert ours.config.lower_order_final is theirs.config.lower_order_final is (steps == 7)


REFUSED: list[tuple[str, Callable[[], Any]]] = [
    ("use_flow_sigmas", lambda: multistep(prediction_type="flow_prediction").plan(4)),
    ("only one of", lambda: multistep(use_karras_sigmas=True, use_lu_lambdas=True)),
    ("mu needs use_flow_sigmas", lambda: multistep().plan(4, mu=1.0)),
    ("use_karras_sigmas, which chooses", lambda: multistep(use_karras_sigmas=True).plan(timesteps=[9, 3])),
    ("exactly one of", lambda: multistep().set_timesteps()),
    ("exactly one of", lambda: multistep().set_timesteps(4, timesteps=[9, 3])),
    ("cannot reach sigma = 0", lambda: multistep(algorithm_type="dpmsolver")),
    ("solver_order must be 1, 2 or 3, got 4", lambda: multistep(solver_order=4).plan(4)),
    ("final_sigmas_type must be", lambda: multistep(final_sigmas_type="none").plan(4)),
    ("from 1 to 1000", lambda: multistep().plan(0)),
    ("timestep_spacing", lambda: multistep(timestep_spacing="even").plan(4)),
    ("training steps from 0 to 999", lambda: multistep().plan(timesteps=[1000, 3])),
    ("set_timesteps", lambda: multistep().step(*tensors(1)[::-1], 0)),
    (
        "leads from less to more",
        lambda: difusores.DPMSolverMultistepInverseScheduler(algorithm_type="sde-dpmsolver++").plan(4),
    ),
    (
        "solver_order must be 1 or 2 with 'sde-dpmsolver\\+\\+', got 3",
        lambda: difusores.EDMDPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", solver_order=3
        ).plan(4),
    ),
    (
        "prediction_type must be",
        lambda: difusores.CosineDPMSolverMultistepScheduler(prediction_type="sample").plan(4),
    ),
]


def multistep(**options: Any) -> Any:
    return difusores.DPMSolverMultistepScheduler(**options)


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_refused_in_words(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_without_torchsde_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    scheduler = difusores.DPMSolverSDEScheduler()
    scheduler.set_timesteps(3)
    x, e = tensors(1)
    with pytest.raises(ImportError, match="pip install torchsde"):
        scheduler.step(e, scheduler.timesteps[0], x)


@pytest.mark.filterwarnings("ignore:Should have t")  # of levels that diffusers asks for
@pytest.mark.parametrize("seed", [7, [7, 8]])
def test_brownian_noise_is_that_of_diffusers(seed: Any) -> None:
    pytest.importorskip("torchsde", reason="Brownian noise is torchsde's")
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    x, _ = tensors(1)
    ours, theirs = BrownianNoise(x, 0.1, 10.0, seed), BrownianTreeNoiseSampler(x, 0.1, 10.0, seed)
    levels = torch.tensor([10.0, 7.0, 3.0, 0.5, 0.1])
    for start, end in ((0, 1), (1, 3), (0, 3), (3, 4), (4, 2)):
        assert torch.equal(ours(levels[start], levels[end]), theirs(levels[start], levels[end]))
    # ends that torchsde rounds inwards, and levels beyond them
    ends = 0.0291675366461277, 25.1461181640625
    ours, theirs = BrownianNoise(x, *ends, seed), BrownianTreeNoiseSampler(x, *ends, seed)
    for start, end in pairwise(torch.tensor([30.0, ends[1], 7.0, ends[0], 0.0])):
        assert torch.equal(ours(float(start), float(end)), theirs(start, end))
    if isinstance(seed, list):
        with pytest.raises(ValueError, match="one seed per image: 2 images, 3 seeds"):
            BrownianNoise(x, 0.1, 10.0, [1, 2, 3])


@pytest.mark.filterwarnings("ignore:Should have t")  # of levels that diffusers asks for
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BROWNIAN)
def test_whole_runs_with_brownian_noise(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("torchsde", reason="diffusers has the class only where torchsde is installed")
    options = {"noise_sampler_seed": 5} if name == "DPMSolverSDEScheduler" else {}
    ours, theirs = pair(name, **options)
    for generator in (
        None,
        torch.Generator().manual_seed(4),
        [torch.Generator().manual_seed(k) for k in (1, 2)],
    ):
        finals = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(6)
            known = inspect.signature(scheduler.step).parameters
            given = {"generator": generator} if "generator" in known else {}
            torch.manual_seed(0)
            x = tensors(1, dtype)[0] * float(scheduler.init_noise_sigma)
            for t in scheduler.timesteps:
                e = torch.tanh(scheduler.scale_model_input(x, t)).to(dtype)
                x = scheduler.step(e, t, x, **given).prev_sample
            finals.append(x)
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
        torch.testing.assert_close(*finals, **tolerance)
