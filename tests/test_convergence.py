"""Solvers and schedulers on data whose denoiser and probability flow are known exactly.

First solvers in noise levels, on N(MEAN, DEVIATION²): D(x, sigma) = (DEVIATION² x + sigma² MEAN) /
(DEVIATION² + sigma²), and on the flow (x - MEAN) / √(DEVIATION² + sigma²) stays what it is. Then the classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import difusores
from difusores import schedules, solvers
from difusores.plan import Plan, Stage
from difusores.schedulers.logsnr import LogSnrScheduler
from difusores.schedulers.sigma import SigmaScheduler

MEAN, DEVIATION = 0.3, 0.5
HIGH, LOW = 8.0, 0.05


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small operations: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def output(x: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """What a perfect model returns for its input x / √(sigma² + 1)."""
    x = x * (sigma**2 + 1).sqrt()
    x0 = (DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)
    if kind == "sample":
        return x0
    if kind == "epsilon":
        return (x - x0) / sigma
    return ((x - x0) / sigma - sigma * x0) / (sigma**2 + 1).sqrt()


def run(stages: Iterable[Stage], x: Tensor, kind: str, generator: torch.Generator | None = None) -> Tensor:
    plan = Plan("test", tuple(stages), kind, (), continuous=True)
    return plan.run(lambda given, sigma: output(given, sigma.double(), kind), x, generator=generator)


def levels(steps: int) -> list[float]:
    return [float(sigma) for sigma in schedules.karras_sigmas(LOW, HIGH, steps + 1)]


def with_middles(solver: Callable[..., Any], ancestral: bool) -> Callable[..., Any]:
    def stages(times: Sequence[float], sigmas: Sequence[float], prediction: Any) -> Any:
        middles = [(middle, middle) for middle in schedules.middle_sigmas(sigmas, ancestral=ancestral)]
        return solver(times, sigmas, prediction, middles=middles)

    return stages


ODES: dict[str, tuple[Callable[..., Any], float]] = {
    "euler": (solvers.euler, 1),
    "heun": (solvers.heun, 2),
    "kdpm2": (with_middles(solvers.kdpm2, False), 2),
    "lms": (solvers.lms, 2),  # its first step is Euler's
}
SDES: dict[str, Callable[..., Any]] = {
    "euler_ancestral": solvers.euler_ancestral,
    "kdpm2_ancestral": with_middles(solvers.kdpm2_ancestral, True),
    "euler with churn": lambda *grid: solvers.euler(*grid, s_churn=20.0),
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ODES)
def test_an_ode_solver_has_its_order(name: str, kind: str) -> None:
    solver, order = ODES[name]
    x = torch.linspace(-20, 20, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    exact = MEAN + (x - MEAN) * math.sqrt((DEVIATION**2 + LOW**2) / (DEVIATION**2 + HIGH**2))
    counts = [40, 80, 160, 320]
    errors = []
    for steps in counts:
        sigmas = levels(steps)
        # the model is told the level itself; float32 times would not be exact
        stages = list(solver(sigmas[:-1], sigmas, solvers.Prediction(kind)))
        errors.append((exactly(stages, x, kind) - exact).abs().max().item())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope > order - 0.15, (slope, errors)
    assert errors[-1] < 0.05


def exactly(stages: list[Stage], x: Tensor, kind: str) -> Tensor:
    """`run`, with the level taken from c_in in float64: a plan tells the model float32."""
    index = iter(stages)

    def model(given: Tensor, _: Tensor) -> Tensor:
        stage = next(index)
        return output(given, torch.tensor(math.sqrt(1 / stage.c_in**2 - 1), dtype=torch.float64), kind)

    return Plan("test", tuple(stages), kind, (), continuous=True).run(model, x)


@pytest.mark.parametrize("name", SDES)
def test_an_sde_solver_has_the_right_marginals(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sigmas = levels(300)
    start = math.sqrt(DEVIATION**2 + HIGH**2)
    x = MEAN + start * torch.randn((1, 1, 200, 500), generator=generator, dtype=torch.float64)
    stages = SDES[name](sigmas[:-1], sigmas, solvers.Prediction("epsilon"))
    y = run(stages, x, "epsilon", generator)
    assert float(y.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(y.std()) == pytest.approx(math.sqrt(DEVIATION**2 + LOW**2), rel=0.02)


def test_a_run_may_begin_anywhere() -> None:
    """From the exact flow at a later level, a later beginning comes out at the same place."""
    sigmas = levels(200)
    x = torch.full((1, 1, 2, 2), 5.0, dtype=torch.float64)
    exact = MEAN + (x - MEAN) * math.sqrt((DEVIATION**2 + LOW**2) / (DEVIATION**2 + HIGH**2))
    middle = MEAN + (x - MEAN) * math.sqrt((DEVIATION**2 + sigmas[120] ** 2) / (DEVIATION**2 + HIGH**2))
    for solver in (solvers.euler, solvers.heun, solvers.lms):
        stages = list(solver(sigmas[:-1], sigmas, solvers.Prediction("epsilon"), begin=120))
        torch.testing.assert_close(exactly(stages, middle, "epsilon"), exact, rtol=0.02, atol=0)


def test_orders_that_lms_has_not_are_refused() -> None:
    sigmas = levels(5)
    with pytest.raises(ValueError, match="order must be from 1 to 6, got 7"):
        list(solvers.lms(sigmas[:-1], sigmas, solvers.Prediction(), order=7))


# The classes, on data that are not Gaussian: two Gaussians in one dimension, of these weights, means and
# deviations. Their denoiser is known, and the probability flow keeps the quantile of a sample.
WEIGHTS, MEANS, DEVIATIONS = (
    torch.tensor(v, dtype=torch.float64) for v in ([0.4, 0.6], [-0.8, 0.9], [0.5, 0.4])
)
QUANTILES = torch.linspace(0.03, 0.97, 32, dtype=torch.float64)
MIXED_MEAN = float(WEIGHTS @ MEANS)
MIXED_VARIANCE = float(WEIGHTS @ (MEANS**2 + DEVIATIONS**2)) - MIXED_MEAN**2


def denoised(x: Tensor, level: float) -> Tensor:
    variance = DEVIATIONS**2 + level**2
    away = x[..., None] - MEANS
    share = torch.softmax(torch.log(WEIGHTS) - torch.log(variance) / 2 - away**2 / (2 * variance), dim=-1)
    return (share * (MEANS + DEVIATIONS**2 / variance * away)).sum(-1)


def at_quantiles(level: float) -> Tensor:
    """Where x0 + level * noise has its QUANTILES, by bisection."""
    deviation = (DEVIATIONS**2 + level**2).sqrt()
    high = torch.full_like(QUANTILES, 10 * (1 + level))
    low = -high
    for _ in range(80):
        middle = (low + high) / 2
        below = (WEIGHTS * torch.erfc((MEANS - middle[:, None]) / deviation / math.sqrt(2)) / 2).sum(
            -1
        ) < QUANTILES
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def place(scheduler: Any, i: int) -> tuple[float, float]:
    """(alpha, sigma / alpha) of the sample at timestep i, or where the run ends."""
    if isinstance(scheduler, difusores.IPNDMScheduler):
        sigma = float(scheduler.betas[i])
        return math.sqrt(1 - sigma**2), sigma / math.sqrt(1 - sigma**2)
    if isinstance(scheduler, LogSnrScheduler):
        level = float(scheduler.sigmas[i])
        return 1 / math.sqrt(1 + level**2), level
    if isinstance(scheduler, SigmaScheduler):
        return 1.0, float(scheduler.sigmas[i])
    share = float(scheduler.alphas_cumprod[scheduler.timesteps[i]])
    return math.sqrt(share), math.sqrt((1 - share) / share)


def perfect(scheduler: Any, i: int, x: Tensor) -> Tensor:
    """What a perfect model returns at call i."""
    kind = (
        "v_prediction"
        if isinstance(scheduler, difusores.IPNDMScheduler)
        else scheduler.config.prediction_type
    )
    if isinstance(scheduler, SigmaScheduler):
        # the second call of a step may be at a level of its own, which the scaling of the input tells
        c_in = float(
            scheduler.scale_model_input(torch.ones(1, 1, dtype=torch.float64), scheduler.timesteps[i])
        )
        data = scheduler.config.get("sigma_data", 1.0)
        level = math.sqrt(1 / c_in**2 - data**2)
        x0 = denoised(x, level)
        if "sigma_data" in scheduler.config:
            wide = level**2 + data**2
            e = (x0 - data**2 / wide * x) / (level * data / math.sqrt(wide))
            return -e if kind == "v_prediction" else e
        x, alpha, sigma = x * c_in, c_in, level * c_in
    else:
        alpha, level = place(scheduler, i)
        sigma = alpha * level
        x0 = denoised(x / alpha, level)
    noise = (x - alpha * x0) / sigma
    return {"sample": x0, "epsilon": noise, "v_prediction": alpha * noise - sigma * x0}[kind]


def carry(
    scheduler: Any, calls: int, start: Callable[[float], Tensor], **options: Any
) -> tuple[Tensor, float]:
    """From x0 + level * noise at the run's first level to (the same at another level, that level)."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    alpha, level = place(scheduler, 0)
    x = alpha * start(level)
    for i, t in enumerate(scheduler.timesteps[:calls]):
        x = scheduler.step(perfect(scheduler, i, x), t, x, **options, return_dict=False)[0]
    alpha, level = place(scheduler, calls)
    return x / alpha, level


ALONG_LAMBDA = {"use_exponential_sigmas": True}  # even steps of log(alpha / sigma)
TO_THE_LOWEST = {"final_sigmas_type": "sigma_min", **ALONG_LAMBDA}  # the last step then has no length
FINE = {"num_train_timesteps": 9600, "beta_start": 0.1 / 9600, "beta_end": 20 / 9600}  # many steps of DDPM


def unchanged(_: float) -> float:
    return 0.0


def half(_: float) -> float:
    return 0.5


def whole(_: float) -> float:
    return 1.0


# class, options, the order that it reaches
CLASSES: list[tuple[str, dict[str, Any], float]] = [
    *(
        (
            f"DPMSolver{kind}Scheduler",
            {"algorithm_type": algorithm, "solver_order": order, **grid, **options},
            reached,
        )
        for kind, grid, third in (
            # The third-order update of Lu et al.'s code and of diffusers takes half of the second difference:
            # a local error of h³.
            ("Multistep", TO_THE_LOWEST, 2),
            ("MultistepInverse", ALONG_LAMBDA, 2),
            ("Singlestep", TO_THE_LOWEST, 3),
        )
        for algorithm in ("dpmsolver", "dpmsolver++")
        for order, options, reached in (
            (1, {"prediction_type": "v_prediction"}, 1),
            (2, {"solver_type": "midpoint"}, 2),
            (2, {"solver_type": "heun", "prediction_type": "sample"}, 2),
            (3, {}, third),
        )
    ),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "final_sigmas_type": "sigma_min"}, 2),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 2),
    *(("DEISMultistepScheduler", {"solver_order": order, **ALONG_LAMBDA}, order) for order in (1, 2, 3)),
    # the corrector adds one
    *(
        (
            "UniPCMultistepScheduler",
            {"solver_order": order, "solver_type": kind, "predict_x0": x0, **TO_THE_LOWEST},
            order + 1,
        )
        for kind in ("bh1", "bh2")
        for x0 in (True, False)
        for order in (1, 2, 3)
    ),
    *(
        (
            "UniPCMultistepScheduler",
            {"solver_order": order, "disable_corrector": list(range(400)), **TO_THE_LOWEST},
            order,
        )
        for order in (1, 2, 3)
    ),
    # The orders of SA-Solver count models: a corrector has its own, from a prediction of one less or more.
    *(
        (
            "SASolverScheduler",
            {
                "predictor_order": predictor,
                "corrector_order": corrector,
                "algorithm_type": kind,
                "tau_func": unchanged,
                **ALONG_LAMBDA,
            },
            corrector,
        )
        for kind in ("data_prediction", "noise_prediction")
        for predictor, corrector in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 4))
    ),
    ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}, 1),
    *(
        (
            "EDMDPMSolverMultistepScheduler",
            {"sigma_schedule": "exponential", "sigma_min": 0.01, **options},
            reached,
        )
        for options, reached in (
            ({"solver_order": 1}, 1),
            ({"solver_order": 2}, 2),
            ({"solver_order": 2, "solver_type": "heun", "prediction_type": "v_prediction"}, 2),
            ({"solver_order": 3}, 2),  # see DPMSolverMultistep
        )
    ),
    ("EulerDiscreteScheduler", TO_THE_LOWEST, 1),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}, 1),
    ("HeunDiscreteScheduler", ALONG_LAMBDA, 2),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}, 2),
    ("KDPM2DiscreteScheduler", ALONG_LAMBDA, 2),
    ("LMSDiscreteScheduler", ALONG_LAMBDA, 4),
    ("DDIMScheduler", {"clip_sample": False, **FINE}, 1),
    # Adams and Bashforth weigh slopes for a mean in which every moment counts the same, to order 4; the step
    # from level to level is not such a mean: a local error of h³, and order 2, as Liu et al. 2022 say.
    ("PNDMScheduler", {"skip_prk_steps": True, **FINE}, 2),
    ("PNDMScheduler", {"skip_prk_steps": False, **FINE}, 2),
    ("IPNDMScheduler", {}, 2),
]


def made(name: str, options: dict[str, Any], steps: int) -> tuple[Any, int]:
    """A scheduler with so many steps, and the calls from its first level to one that is above 0."""
    if name == "IPNDMScheduler":
        # even steps of the angle whose sine is the noise
        options = {"trained_betas": np.sin(np.linspace(1.5, 0.1, steps + 1)).tolist()}
    scheduler = getattr(difusores, name)(**options)
    scheduler.set_timesteps(steps)
    calls = len(scheduler.timesteps)
    if not hasattr(scheduler, "sigmas"):
        if name != "IPNDMScheduler":  # to a sixteenth of the training steps, which all grids hold
            calls = scheduler.timesteps.tolist().index(len(scheduler) // 16)
    elif scheduler.sigmas[calls] == 0:
        calls -= 1
    return scheduler, calls


@pytest.mark.parametrize(("name", "options", "order"), CLASSES)
def test_a_class_of_an_ode_solver_has_its_order(name: str, options: dict[str, Any], order: float) -> None:
    counts, errors = [96, 192, 384], []
    for steps in counts:
        x, level = carry(*made(name, options, steps), lambda level: at_quantiles(level)[None])
        errors.append(float((x[0] - at_quantiles(level)).abs().max()) / (1 + level))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.25, (slope, errors)
    assert errors[-1] < 0.03


# class, options, arguments of step, the largest error of 96 steps, relative
STOCHASTIC: list[tuple[str, dict[str, Any], dict[str, Any], float]] = [
    *(
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind, **TO_THE_LOWEST},
            {},
            limit,
        )
        for algorithm in ("sde-dpmsolver", "sde-dpmsolver++")
        for order, kind, limit in ((1, "midpoint", 0.1), (2, "midpoint", 0.01), (2, "heun", 0.01))
    ),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, **TO_THE_LOWEST},
        {},
        0.1,
    ),
    *(
        (
            "DPMSolverSinglestepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": order, **TO_THE_LOWEST},
            {},
            limit,
        )
        # The model's calls within a step see noise of their own, not that of the step: of order 1, and a
        # step of k calls is k times as long.
        for order, limit in ((1, 0.1), (2, 0.1), (3, 0.15))
    ),
    *(
        (
            "SASolverScheduler",
            {"algorithm_type": kind, "tau_func": tau, "predictor_order": 3, **ALONG_LAMBDA},
            {},
            0.02,
        )
        for kind in ("data_prediction", "noise_prediction")
        for tau in (half, whole)
    ),
    (
        "EDMDPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "sigma_schedule": "exponential", "sigma_min": 0.01},
        {},
        0.01,
    ),
    ("CosineDPMSolverMultistepScheduler", {"sigma_min": 0.01, "sigma_max": 80.0}, {}, 0.01),
    ("DPMSolverSDEScheduler", {"noise_sampler_seed": 1, **ALONG_LAMBDA}, {}, 0.05),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"s_churn": 10.0}, 0.1),
    ("EDMEulerScheduler", {"sigma_min": 0.02, "rho": 5.0}, {"s_churn": 10.0}, 0.1),
    ("EulerAncestralDiscreteScheduler", {}, {}, 0.1),
    ("KDPM2AncestralDiscreteScheduler", ALONG_LAMBDA, {}, 0.1),
    ("DDPMScheduler", {"clip_sample": False, **FINE}, {}, 0.1),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large", **FINE}, {}, 0.1),
    ("DDIMScheduler", {"clip_sample": False, **FINE}, {"eta": 1.0}, 0.1),
    ("DDIMScheduler", {"clip_sample": False, **FINE}, {"eta": 0.5}, 0.1),
]


@pytest.mark.parametrize(("name", "options", "arguments", "limit"), STOCHASTIC)
def test_a_class_of_an_sde_solver_has_the_right_marginals(
    name: str, options: dict[str, Any], arguments: dict[str, Any], limit: float
) -> None:
    """40,000 samples (10,000 on a Brownian path) have standard errors of 0.5 % (1 %); five are allowed."""
    brownian = name in ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")
    count, generator = 10_000 if brownian else 40_000, torch.Generator().manual_seed(0)

    def start(level: float) -> Tensor:
        which = torch.bernoulli(
            torch.full((1, count), float(WEIGHTS[1]), dtype=torch.float64), generator=generator
        )
        near, noise = torch.randn(2, 1, count, dtype=torch.float64, generator=generator)
        which = which.long()
        return MEANS[which] + DEVIATIONS[which] * near + level * noise

    if brownian:
        pytest.importorskip("torchsde", reason="Brownian noise is torchsde's")
    if name != "DPMSolverSDEScheduler":
        arguments = {**arguments, "generator": generator}
    x, level = carry(*made(name, options, 96), start, **arguments)
    right = MIXED_VARIANCE + level**2
    fourth = float(((x - x.mean()) ** 4).mean())
    error = abs(float(x.mean()) - MIXED_MEAN), abs(float(x.var()) - right)
    assert error[0] < limit * math.sqrt(right) + 5 * math.sqrt(right / count)
    assert error[1] < limit * right + 5 * math.sqrt((fourth - right**2) / count)
