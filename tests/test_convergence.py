"""Solvers in noise levels on Gaussian data, whose denoiser and probability flow are known exactly.

Data N(MEAN, DEVIATION²): D(x, sigma) = (DEVIATION² x + sigma² MEAN) / (DEVIATION² + sigma²), and on the flow
(x - MEAN) / √(DEVIATION² + sigma²) stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.plan import Plan, Stage

MEAN, DEVIATION = 0.3, 0.5
HIGH, LOW = 8.0, 0.05


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
