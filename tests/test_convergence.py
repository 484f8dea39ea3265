"""Solvers and schedulers on data whose denoiser and probability flow are known exactly.

First solvers in noise levels, on N(MEAN, DEVIATION²): D(x, sigma) = (DEVIATION² x + sigma² MEAN) /
(DEVIATION² + sigma²), and on the flow (x - MEAN) / √(DEVIATION² + sigma²) stays what it is. Then the classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import difusores
from difusores import schedules, solvers
from difusores.plan import Plan, Stage
from difusores.schedulers.flow import FlowScheduler
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


def denoised(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The mean of x0, given x = alpha * x0 + sigma * noise."""
    variances = (alpha * DEVIATIONS) ** 2 + sigma**2
    pulls = (alpha * DEVIATIONS**2 / variances).tolist()
    (one, other), ends = variances.tolist(), (alpha * MEANS).tolist()
    away = [x - end for end in ends]
    odds = float(torch.log(WEIGHTS[1] / WEIGHTS[0])) + math.log(one / other) / 2
    share = torch.sigmoid(away[0] ** 2 / (2 * one) - away[1] ** 2 / (2 * other) + odds)
    means = [float(mean) + pull * part for mean, pull, part in zip(MEANS, pulls, away, strict=True)]
    return torch.lerp(*means, share)


def at_quantiles(alpha: float, sigma: float, quantiles: Tensor = QUANTILES) -> Tensor:
    """Where alpha * x0 + sigma * noise has its quantiles, by bisection."""
    deviation = ((alpha * DEVIATIONS) ** 2 + sigma**2).sqrt()
    high = torch.full_like(quantiles, 10 * (alpha + sigma))
    low = -high
    for _ in range(80):
        middle = (low + high) / 2
        shares = torch.erfc((alpha * MEANS - middle[:, None]) / deviation / math.sqrt(2)) / 2
        below = (WEIGHTS * shares).sum(-1) < quantiles
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


Place = tuple[float, float]
"""(alpha, sigma) of a sample alpha * x0 + sigma * noise."""


def place(scheduler: Any, i: int) -> Place:
    """Where the sample is at timestep i, or where the run ends."""
    if isinstance(scheduler, difusores.IPNDMScheduler):
        sigma = float(scheduler.betas[i])
        return math.sqrt(1 - sigma**2), sigma
    if isinstance(scheduler, FlowScheduler):
        return 1 - float(scheduler.sigmas[i]), float(scheduler.sigmas[i])
    if isinstance(scheduler, LogSnrScheduler):
        level = float(scheduler.sigmas[i])
        return 1 / math.sqrt(1 + level**2), level / math.sqrt(1 + level**2)
    if isinstance(scheduler, SigmaScheduler):
        return 1.0, float(scheduler.sigmas[i])
    if i == len(scheduler.timesteps):
        return 1.0, 0.0
    share = float(scheduler.alphas_cumprod[scheduler.timesteps[i]])
    return math.sqrt(share), math.sqrt(1 - share)


def prediction_of(scheduler: Any) -> str:
    if isinstance(scheduler, difusores.IPNDMScheduler):
        return "v_prediction"
    if isinstance(scheduler, FlowScheduler):
        return "flow_prediction"
    return str(scheduler.config.get("prediction_type", "epsilon"))


def told(kind: str, x: Tensor, x0: Tensor, alpha: float, sigma: float) -> Tensor:
    """What a model returns that predicts this x0 from x."""
    noise = (x - alpha * x0) / sigma
    of_flow = noise - x0
    return {
        "sample": x0,
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": of_flow,
    }[kind]


def perfect(scheduler: Any, i: int, x: Tensor) -> Tensor:
    """What a perfect model returns at call i."""
    kind = prediction_of(scheduler)
    alpha, sigma = place(scheduler, i)
    if isinstance(scheduler, SigmaScheduler):
        # the second call of a step may be at a level of its own, which the scaling of the input tells
        c_in = float(
            scheduler.scale_model_input(torch.ones(1, 1, dtype=torch.float64), scheduler.timesteps[i])
        )
        data = scheduler.config.get("sigma_data", 1.0)
        level = math.sqrt(1 / c_in**2 - data**2)
        x0 = denoised(x, 1.0, level)
        if "sigma_data" in scheduler.config:
            wide = level**2 + data**2
            e = (x0 - data**2 / wide * x) / (level * data / math.sqrt(wide))
            return -e if kind == "v_prediction" else e
        return told(kind, x * c_in, x0, c_in, level * c_in)
    return told(kind, x, denoised(x, alpha, sigma), alpha, sigma)


def carry(
    scheduler: Any, calls: range, start: Callable[[float, float], Tensor], **options: Any
) -> tuple[Tensor, Place]:
    """From a sample at the run's first place to (the one at another place, that place)."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    # the inverse of DDIM is told the timestep that it leads to
    behind = isinstance(scheduler, difusores.DDIMInverseScheduler)
    x, times = start(*place(scheduler, calls.start - behind)), scheduler.timesteps
    for i in calls:
        e, t = perfect(scheduler, i, x), times[i]
        if isinstance(scheduler, difusores.DDIMParallelScheduler):
            x = scheduler.batch_step_no_noise(e, t.reshape(1), x)
        elif isinstance(scheduler, difusores.DDPMParallelScheduler):
            # what pipelines of diffusers do with it
            noise = torch.randn(x.shape, dtype=x.dtype, **options)
            x = scheduler.batch_step_no_noise(e, t.reshape(1), x) + noise * scheduler._get_variance(t) ** 0.5
        elif isinstance(scheduler, difusores.UnCLIPScheduler):
            x = scheduler.step(e, t, x, prev_timestep=times[i + 1], **options, return_dict=False)[0]
        else:
            x = scheduler.step(e, t, x, **options, return_dict=False)[0]
    return x, place(scheduler, calls.stop - behind)


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
    ("DDIMParallelScheduler", {"clip_sample": False, **FINE}, 1),
    ("DDIMInverseScheduler", {"clip_sample": False, **FINE}, 1),
    ("FlowMatchEulerDiscreteScheduler", {}, 1),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}, 1),
    ("FlowMatchHeunDiscreteScheduler", {}, 2),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, 2),
]


def made(name: str, options: dict[str, Any], steps: int) -> tuple[Any, range]:
    """A scheduler with so many steps, and the calls from its first level to one that is above 0."""
    if name == "IPNDMScheduler":
        # even steps of the angle whose sine is the noise
        options = {"trained_betas": np.sin(np.linspace(1.5, 0.1, steps + 1)).tolist()}
    scheduler = getattr(difusores, name)(**options)
    scheduler.set_timesteps(steps)
    calls = len(scheduler.timesteps)
    if name == "UnCLIPScheduler":
        return scheduler, range(calls - 1)
    if hasattr(scheduler, "sigmas"):
        return scheduler, range(calls - int(scheduler.sigmas[calls] == 0))
    if name == "IPNDMScheduler":
        return scheduler, range(calls)
    # to a sixteenth of the training steps, which all grids hold, or from there
    low = scheduler.timesteps.tolist().index(len(scheduler) // 16)
    return scheduler, range(low + 1, calls) if name == "DDIMInverseScheduler" else range(low)


def slope_of(counts: list[int], errors: list[float]) -> float:
    return float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])


@pytest.mark.parametrize(("name", "options", "order"), CLASSES)
def test_a_class_of_an_ode_solver_has_its_order(name: str, options: dict[str, Any], order: float) -> None:
    counts, errors = [96, 192, 384], []
    for steps in counts:
        x, at = carry(*made(name, options, steps), lambda *at: at_quantiles(*at)[None])
        errors.append(float((x[0] - at_quantiles(*at)).abs().max()) / sum(at))
    assert abs(slope_of(counts, errors) - order) < 0.25, errors
    assert errors[-1] < 0.03


def by_level(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A perfect model of a class with a loop of its own, told the noise level, or of "vp" the time."""

    def model(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = 1.0, float(time.double())
        if kind == "vp":
            alpha = math.exp(-0.25 * sigma**2 * (20 - 0.1) - 0.5 * sigma * 0.1)
            sigma = math.sqrt(1 - alpha**2)
        noise = (x - alpha * denoised(x, alpha, sigma)) / sigma
        return {"ve": -noise / sigma, "vp": noise, "karras": -noise}[kind]

    return model


# Its `schedule` holds squares, which diffusers' pipeline takes for levels: these lie between 20 and 0.0225.
KARRAS = {"sigma_min": 0.15, "sigma_max": math.sqrt(20.0), "s_noise": 1.0}


def test_karras_ve_without_churn_has_order_2() -> None:
    counts, errors = [96, 192, 384], []
    for steps in counts:
        plan = difusores.KarrasVeScheduler(**KARRAS, s_churn=0.0).plan(steps)
        x = at_quantiles(1.0, 20.0)[None, :, None]
        # but for the last step, which leads to the level 0
        x = replace(plan, stages=plan.stages[:-1]).run(by_level("karras"), x)
        errors.append(float((x[0, :, 0] - at_quantiles(1.0, 0.15**2)).abs().max()))
    assert abs(slope_of(counts, errors) - 2) < 0.25, errors


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
    ("DDPMParallelScheduler", {"clip_sample": False, **FINE}, {}, 0.1),
    ("UnCLIPScheduler", {"clip_sample": False, "prediction_type": "sample"}, {}, 0.1),
]


def drawn(count: int, alpha: float, sigma: float, generator: torch.Generator) -> Tensor:
    """[1, count] samples alpha * x0 + sigma * noise."""
    which = torch.bernoulli(
        torch.full((1, count), float(WEIGHTS[1]), dtype=torch.float64), generator=generator
    )
    near, noise = torch.randn(2, 1, count, dtype=torch.float64, generator=generator)
    x0 = MEANS[which.long()] + DEVIATIONS[which.long()] * near
    return alpha * x0 + sigma * noise


def check_moments(x: Tensor, alpha: float, sigma: float, limit: float) -> None:
    """Mean and variance are those of alpha * x0 + sigma * noise, to `limit` and 5 standard errors."""
    mean, variance, count = alpha * MIXED_MEAN, alpha**2 * MIXED_VARIANCE + sigma**2, x.numel()
    fourth = float(((x - x.mean()) ** 4).mean())
    error = abs(float(x.mean()) - mean), abs(float(x.var()) - variance)
    assert error[0] < limit * math.sqrt(variance) + 5 * math.sqrt(variance / count), error
    assert error[1] < limit * variance + 5 * math.sqrt(abs(fourth - variance**2) / count), (error, variance)


@pytest.mark.parametrize(("name", "options", "arguments", "limit"), STOCHASTIC)
def test_a_class_of_an_sde_solver_has_the_right_marginals(
    name: str, options: dict[str, Any], arguments: dict[str, Any], limit: float
) -> None:
    """40,000 samples (10,000 on a Brownian path) have standard errors of 0.5 % (1 %); five are allowed."""
    brownian = name in ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")
    count, generator = 10_000 if brownian else 40_000, torch.Generator().manual_seed(0)
    if brownian:
        pytest.importorskip("torchsde", reason="Brownian noise is torchsde's")
    if name != "DPMSolverSDEScheduler":
        arguments = {**arguments, "generator": generator}
    x, at = carry(*made(name, options, 96), lambda *at: drawn(count, *at, generator), **arguments)
    check_moments(x, *at, limit)


# class, options, what its model is told, the first place, the largest error of 96 steps, relative
WITH_LOOPS_OF_THEIR_OWN: list[tuple[str, dict[str, Any], str, Place, float]] = [
    ("ScoreSdeVeScheduler", {"sigma_max": 20.0, "correct_steps": 0}, "ve", (1.0, 20.0), 0.1),
    ("ScoreSdeVpScheduler", {}, "vp", (math.exp(-0.25 * 19.9 - 0.05), 1.0), 0.1),
    ("KarrasVeScheduler", {**KARRAS, "s_churn": 80.0}, "karras", (1.0, 20.0), 0.03),
    (
        "KarrasVeScheduler",
        {**KARRAS, "s_churn": 10.0, "s_min": 0.3, "s_max": 5.0},
        "karras",
        (1.0, 20.0),
        0.03,
    ),
]


@pytest.mark.parametrize(("name", "options", "kind", "first", "limit"), WITH_LOOPS_OF_THEIR_OWN)
def test_processes_of_score_models_have_the_right_marginals(
    name: str, options: dict[str, Any], kind: str, first: Place, limit: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = drawn(40_000, *first, generator)
    y = getattr(difusores, name)(**options).plan(96).run(by_level(kind), x, generator=generator)
    check_moments(y, 1.0, 0.0, limit)


def test_the_langevin_corrector_leaves_the_marginals_right() -> None:
    """Predictor and corrector by turns, each told a level of its own; the last step has no noise."""
    generator = torch.Generator().manual_seed(0)
    scheduler = difusores.ScoreSdeVeScheduler(sigma_max=20.0)
    scheduler.set_timesteps(96)
    scheduler.set_sigmas(96)
    x, score = drawn(40_000, 1.0, 20.0, generator), by_level("ve")
    before: list[float] = []
    for t, sigma in zip(scheduler.timesteps, scheduler.discrete_sigmas.flip(0), strict=True):
        before.append(float(x.var()))
        x = scheduler.step_correct(score(x, sigma), x, generator).prev_sample
        x, mean = scheduler.step_pred(score(x, sigma), t, x, generator).values()
    check_moments(mean, 1.0, 0.0, 0.1)
    assert before[0] == pytest.approx(MIXED_VARIANCE + 400, rel=0.03)


# Models that jump: they know by heart where the probability flow leads (`moved`), and steps between jumps add
# noise. Whatever the steps, the marginals are right at every one of them, to the samples' own errors alone.
SPREAD = torch.special.ndtr(torch.linspace(-6, 6, 2001, dtype=torch.float64))


def moved(x: Tensor, here: Place, there: Place) -> Tensor:
    """Along the probability flow, which keeps the quantile of a sample."""
    table = at_quantiles(*here, SPREAD).numpy(), at_quantiles(*there, SPREAD).numpy()
    return torch.from_numpy(np.interp(x.numpy(), *table))


def jump(scheduler: Any, i: int, x: Tensor, eta: float) -> Tensor:
    """What a model that is perfectly distilled returns at step i."""
    kind, here = prediction_of(scheduler), place(scheduler, i)
    alpha, sigma = here
    if isinstance(scheduler, difusores.CMStochasticIterativeScheduler):
        lowest = scheduler.config.sigma_min
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
        return (moved(x, here, (1.0, lowest)) - c_skip * x) / c_out
    if isinstance(scheduler, difusores.TCDScheduler):
        # a step of DDIM has to lead to where the flow is at the lower timestep
        after = int(scheduler.timesteps[i + 1]) if i + 1 < len(scheduler.timesteps) else 0
        share = float(scheduler.alphas_cumprod[math.floor(np.float32(1 - eta) * np.float32(after))])
        low = math.sqrt(share), math.sqrt(1 - share)
        x0 = (moved(x, here, low) - low[1] / sigma * x) / (low[0] - alpha * low[1] / sigma)
        return told(kind, x, x0, alpha, sigma)
    x0 = moved(x, here, (1.0, 0.0))
    if isinstance(scheduler, difusores.LCMScheduler):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(int(scheduler.timesteps[i]))
        x0 = (x0 - c_skip * x) / c_out
    return told(kind, x, x0, alpha, sigma)


JUMPING: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(("LCMScheduler", {"prediction_type": kind}, {}) for kind in ("epsilon", "sample", "v_prediction")),
    *(("TCDScheduler", {}, {"eta": eta}) for eta in (0.0, 0.3, 1.0)),
    ("CMStochasticIterativeScheduler", {"clip_denoised": False}, {}),
    # x0 under fresh noise at every step: right for such models alone, since the mean that others predict has
    # less variance than x0
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True, "shift": 3.0}, {}),
]


@pytest.mark.parametrize(("name", "options", "arguments"), JUMPING)
def test_a_class_for_models_that_jump_has_the_right_marginals(
    name: str, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    scheduler = getattr(difusores, name)(**options)
    scheduler.set_timesteps(4)
    x, eta = drawn(40_000, *place(scheduler, 0), generator), arguments.get("eta", 0.0)
    followed = at_quantiles(*place(scheduler, 0))[None]
    for i, t in enumerate(scheduler.timesteps):
        if name.startswith("CM"):
            scheduler.scale_model_input(x, t)
        e = jump(scheduler, i, x, eta)
        x = scheduler.step(e, t, x, generator=generator, **arguments, return_dict=False)[0]
        at = place(scheduler, i + 1)
        if name == "TCDScheduler" and i == 3:
            share = float(scheduler.alphas_cumprod[0])
            at = math.sqrt(share), math.sqrt(1 - share)
        check_moments(x, *at, limit=1e-3)
    if name == "TCDScheduler" and eta == 0:  # without noise it is the flow itself
        scheduler.set_timesteps(4)
        for i, t in enumerate(scheduler.timesteps):
            followed = scheduler.step(jump(scheduler, i, followed, 0.0), t, followed, eta=0.0)[0]
        assert (followed[0] - at_quantiles(*at)).abs().max() < 1e-3


HUNDRED = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2}


def repainted(
    scheduler: Any,
    model: Callable[[int, Tensor], Tensor],
    x: Tensor,
    image: Tensor,
    mask: Tensor,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, int, bool]]:
    """The loop of diffusers' pipeline: the sample, its timestep, and whether noise was just added."""
    stride, last = len(scheduler) // scheduler.num_inference_steps, len(scheduler)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        if t < last:
            x = scheduler.step(model(i, x), t, x, image, mask, generator).prev_sample
        else:
            x = scheduler.undo_step(x, last, generator)
        yield x, t - stride, t > last
        last = t


def test_repaint_with_nothing_known_samples_as_ddim_with_eta_1() -> None:
    """Through jumps back up, which are of the forward process."""
    generator = torch.Generator().manual_seed(0)
    scheduler = difusores.RePaintScheduler(clip_sample=False, eta=1.0, **HUNDRED)
    scheduler.set_timesteps(100, jump_length=10, jump_n_sample=2)
    x = drawn(20_000, *place(scheduler, 0), generator)
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    jumps = 0
    for y, t, raised in repainted(
        scheduler, lambda i, x: perfect(scheduler, i, x), x, torch.zeros_like(x), nothing, generator
    ):
        jumps += raised
        share = float(scheduler.alphas_cumprod[t]) if t >= 0 else 1.0
        if raised or t < 0:
            check_moments(y, math.sqrt(share), math.sqrt(1 - share), limit=0.1)
    assert jumps > 50


def test_repaint_puts_the_known_part_under_the_noise_of_its_timestep() -> None:
    generator = torch.Generator().manual_seed(0)
    scheduler = difusores.RePaintScheduler(eta=0.5)
    scheduler.set_timesteps(20)
    x, image, whole = (torch.full((1, 40_000), value, dtype=torch.float64) for value in (0.2, 0.7, 1.0))
    for t in (950, 500, 50):
        y = scheduler.step(x, t, x, image, whole, generator).prev_sample
        share = float(scheduler.alphas_cumprod[t - 50])
        deviation = math.sqrt(1 - share)
        assert float(y.mean()) == pytest.approx(0.7 * math.sqrt(share), abs=5 * deviation / 200)
        assert float(y.std()) == pytest.approx(deviation, rel=5 / math.sqrt(2 * 40_000))


def test_repaint_comes_closer_to_the_conditional_distribution_by_resampling() -> None:
    """Pairs of correlation 0.8, of which the first is known to be 1: the second has mean 0.8, variance 0.36.

    A step alone is not told the first one's value but through noise, and forgets half of what that says.
    """
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    errors = []
    for times in (1, 10):
        generator = torch.Generator().manual_seed(0)
        scheduler = difusores.RePaintScheduler(clip_sample=False, eta=1.0, **HUNDRED)
        scheduler.set_timesteps(50, jump_length=10, jump_n_sample=times)

        def model(i: int, x: Tensor, scheduler: Any = scheduler) -> Tensor:
            alpha, sigma = place(scheduler, i)
            inverse = torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64))
            return told("epsilon", x, x @ (alpha * covariance @ inverse).T, alpha, sigma)

        x = torch.randn(4000, 2, dtype=torch.float64, generator=generator)
        known, mask = torch.ones_like(x), torch.tensor([1.0, 0.0], dtype=torch.float64)
        *_, (x, _, _) = repainted(scheduler, model, x, known, mask, generator)
        assert torch.equal(x[:, 0], known[:, 0])
        errors.append((abs(float(x[:, 1].mean()) - 0.8), abs(float(x[:, 1].var()) - 0.36)))
    assert errors[0][0] > 0.3 and errors[1][0] < 0.5 * errors[0][0] and errors[1][1] < 0.02, errors


def test_every_class_stands_in_a_table() -> None:
    tables = (CLASSES, STOCHASTIC, WITH_LOOPS_OF_THEIR_OWN, JUMPING)
    named = {row[0] for table in tables for row in table} | {"RePaintScheduler"}
    assert named == {name for name in difusores.schedulers.__all__ if name.endswith("Scheduler")}
