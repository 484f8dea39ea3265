"""DEIS, UniPC and SA-Solver where `test_indexed` does not go: grids of flows, limits, slots, refusals."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import difusores
from difusores import DEISMultistepScheduler, SASolverScheduler, UniPCMultistepScheduler
from difusores.solvers.exponential import exponential_moments

diffusers = pytest.importorskip("diffusers")

NAMES = ["DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    ours, theirs = (getattr(package, name)(**options) for package in (difusores, diffusers))
    return ours, theirs


def tensors(seed: int = 0) -> tuple[Tensor, Tensor]:
    values = torch.Generator().manual_seed(seed)
    x, e = (torch.randn(2, 3, 4, 5, generator=values, dtype=torch.float64) for _ in range(2))
    return x, e


def agree(ours: Any, theirs: Any, **options: Any) -> None:
    """Grids and a whole run, in float64; the levels of diffusers are lifted to it."""
    assert torch.equal(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-7, atol=0)
    ours.sigmas = theirs.sigmas.clone()
    theirs = copy.deepcopy(theirs)
    theirs.sigmas = theirs.sigmas.double()
    for i, t in enumerate(ours.timesteps):
        x, e = tensors(i)
        mine, right = (
            s.step(e, t, x, **{k: v() for k, v in options.items()}, return_dict=False)[0]
            for s in (ours, theirs)
        )
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"flow_shift": 3.0}, {"num_inference_steps": 7}),
        ({"flow_shift": 3.0, "shift_terminal": 0.05}, {"num_inference_steps": 7}),
        ({}, {"sigmas": [1.0, 0.8, 0.3]}),
        ({"flow_shift": 0.5, "final_sigmas_type": "sigma_min"}, {"sigmas": [0.9, 0.8, 0.3]}),
        ({"use_dynamic_shifting": True}, {"num_inference_steps": 5, "mu": 1.2}),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.1}, {"sigmas": [1.0, 0.6, 0.2], "mu": 0.4}),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"num_inference_steps": 5, "mu": 1.2}),
        ({"use_karras_sigmas": True}, {"num_inference_steps": 6}),
        ({"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 20.0}, {"num_inference_steps": 6}),
        ({"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, {"num_inference_steps": 6}),
    ],
)
def test_unipc_for_flow_models(options: dict[str, Any], arguments: dict[str, Any]) -> None:
    ours, theirs = pair("UniPCMultistepScheduler", **FLOW, **options)
    ours.set_timesteps(**arguments)
    if "sigmas" in arguments:  # diffusers takes arrays alone
        arguments = {**arguments, "sigmas": np.array(arguments["sigmas"])}
    theirs.set_timesteps(**arguments)
    agree(ours, theirs)
    assert ours.plan(**arguments).stages[-1].time == ours.timesteps[-1]


def test_unipc_shifts_and_stretches_levels_on_demand() -> None:
    levels = torch.tensor([1.0, 0.6, 0.2])
    for kind in ("exponential", "linear"):
        options = {**FLOW, "time_shift_type": kind, "shift_terminal": 0.1}
        ours, theirs = pair("UniPCMultistepScheduler", **options)
        torch.testing.assert_close(ours.time_shift(0.7, 2.0, levels), theirs.time_shift(0.7, 2.0, levels))
        torch.testing.assert_close(
            ours.stretch_shift_to_terminal(levels), theirs.stretch_shift_to_terminal(levels)
        )


def test_deis_takes_the_shift_of_a_run() -> None:
    ours, theirs = pair("DEISMultistepScheduler", **FLOW, use_dynamic_shifting=True, solver_order=3)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6, mu=0.7)
    agree(ours, theirs)
    assert ours.config.flow_shift == 1.0
    with pytest.raises(ValueError, match="mu needs"):
        DEISMultistepScheduler(**FLOW).set_timesteps(6, mu=0.7)


@pytest.mark.parametrize("steps", [14, 15])
def test_deis_ends_in_lower_orders_below_fifteen_steps(steps: int) -> None:
    ours, theirs = pair("DEISMultistepScheduler", solver_order=3)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    agree(ours, theirs)


@pytest.mark.parametrize("rate", [-30.0, -2.0, -1.999, -1e-6, 0.0, 1e-3, 1.999, 2.0, 12.0])
def test_exponential_moments(rate: float) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(60)
    places, weights = (nodes + 1) / 2, weights / 2
    for k, moment in enumerate(exponential_moments(rate, 7)):
        assert moment == pytest.approx(float(weights @ (places**k * np.exp(rate * places))), rel=1e-12)


def test_attributes_that_are_assigned_count() -> None:
    x, e = tensors()
    pairs = [pair("UniPCMultistepScheduler") for _ in range(2)]
    for scheduler in (*pairs[0], *pairs[1]):
        scheduler.set_timesteps(5)
    for scheduler in pairs[0]:
        scheduler.disable_corrector = [0, 1, 2]
    results = [[s.step(e, t, x).prev_sample for t in s.timesteps] for s in (*pairs[0], pairs[1][0])]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(results[0][1], results[2][1])


def test_unipc_of_high_order_without_the_corrector() -> None:
    ours, theirs = pair("UniPCMultistepScheduler", solver_order=6, disable_corrector=list(range(12)))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(12)
    agree(ours, theirs)
    with pytest.raises(ValueError, match=r"solver_order 5 keeps 6 tensors .* room for 5"):
        UniPCMultistepScheduler(solver_order=5).plan(12)
    assert len(UniPCMultistepScheduler(solver_order=5).plan(8)) == 8  # never comes to the fifth order


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver_p": object()}, "solver_p must be None"),
        ({"shift_terminal": 0.1}, "shift_terminal needs use_flow_sigmas"),
        ({"thresholding": True, "predict_x0": False}, "thresholding needs predict_x0"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of"),
        ({"use_exponential_sigmas": True, "use_flow_sigmas": True}, "only one of"),
    ],
)
def test_options_that_unipc_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UniPCMultistepScheduler(**options)


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({"lower_order_final": False}, {"num_inference_steps": 5}, "order 2 has no finite step to sigma = 0"),
        ({"prediction_type": "flow_prediction"}, {"num_inference_steps": 5}, "set use_flow_sigmas"),
        ({"final_sigmas_type": "one"}, {"num_inference_steps": 5}, "must be 'zero' or 'sigma_min'"),
        ({}, {"sigmas": [1.0, 0.5]}, "sigmas need use_flow_sigmas=True"),
        ({**FLOW, "use_karras_sigmas": True}, {"sigmas": [1.0, 0.5]}, "without use_karras_sigmas"),
        (FLOW, {"sigmas": [0.5, 1.0]}, "descend within"),
        (FLOW, {"sigmas": [0.5, 0.0]}, "descend within"),
        (FLOW, {}, "must be at least 1, got None"),
        ({**FLOW, "use_dynamic_shifting": True}, {"num_inference_steps": 5}, "needs mu"),
    ],
)
def test_runs_that_unipc_refuses(options: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UniPCMultistepScheduler(**options).plan(**arguments)


def test_orders_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="solver_order must be 1, 2 or 3, got 4"):
        DEISMultistepScheduler(solver_order=4).plan(5)
    for name in ("predictor_order", "corrector_order"):
        for order in (0, 5):
            with pytest.raises(ValueError, match=f"{name} must be 1, 2, 3 or 4, got {order}"):
                SASolverScheduler(**{name: order}).plan(5)
    for cls in (DEISMultistepScheduler, SASolverScheduler):
        with pytest.raises(NotImplementedError, match="algorithm_type must be one of"):
            cls(algorithm_type="ode")


@pytest.mark.parametrize("name", NAMES)
def test_noise_on_images(name: str) -> None:
    ours, theirs = pair(name)
    x, z = (tensor.float() for tensor in tensors())
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    for times in (ours.timesteps[[2, 7]], ours.timesteps[:1].repeat(2)):
        for begin in (None, 4):
            if begin is not None:
                ours.set_begin_index(begin)
                theirs.set_begin_index(begin)
            results = [scheduler.add_noise(x, z, times) for scheduler in (ours, theirs)]
            torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*NAMES, "PNDMScheduler", "IPNDMScheduler"])
@pytest.mark.parametrize("method", ["__init__", "set_timesteps", "step", "index_for_timestep"])
def test_signatures_are_those_of_diffusers(name: str, method: str) -> None:
    def read(package: Any) -> list[tuple[str, Any]]:
        function = getattr(getattr(package, name), method)
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    if hasattr(getattr(diffusers, name), method):
        assert read(difusores) == read(diffusers)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_scheduler_has_the_state_of_diffusers(name: str) -> None:
    ours, theirs = pair(name)
    for key in ("betas", "alphas", "alphas_cumprod", "timesteps", "sigmas", "alpha_t", "sigma_t", "lambda_t"):
        mine, their = getattr(ours, key), getattr(theirs, key)
        assert mine.dtype is their.dtype, key
        torch.testing.assert_close(mine, their, rtol=1e-6, atol=0)
    assert set(ours._compatibles) == set(theirs._compatibles)
    assert ours.order == theirs.order and ours.init_noise_sigma == theirs.init_noise_sigma
    x, e = tensors()
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.step(e, 999, x)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_samples_like_the_steps(name: str) -> None:
    scheduler = getattr(difusores, name)()
    scheduler.set_timesteps(8)
    x, _ = start, _ = tensors()
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = {"generator": generators[0]} if name == "SASolverScheduler" else {}
    for t in scheduler.timesteps:
        x = scheduler.step(x * 0.3 + float(t) / 1000, t, x, **drawn).prev_sample
    result = scheduler.plan(8).run(lambda x, t: x * 0.3 + float(t) / 1000, start, generator=generators[1])
    torch.testing.assert_close(result, x, rtol=1e-12, atol=1e-12)
