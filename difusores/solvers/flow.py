"""Samplers of flow models: x = (1 - sigma) * x0 + sigma * noise, the model predicts dx/dsigma = noise - x0.

`sigmas` has one more element than `times`; the last one is where the run ends. (Lipman et al. 2022, "Flow
matching for generative modeling"; Liu et al. 2022, "Rectified flow".)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from difusores.plan import Noise, Stage, make_row
from difusores.solvers.common import Prediction, churn_factor

FLOW = Prediction("flow_prediction")


def flow_euler(times: Sequence[float], sigmas: Sequence[float], *, begin: int = 0) -> Iterator[Stage]:
    """Euler's method; the levels may also rise, from an image to its noise."""
    for i in range(begin, len(times)):
        y = {"xh": 1.0, "e": sigmas[i + 1] - sigmas[i]}
        yield Stage(times[i], make_row(FLOW.x0(1 - sigmas[i], sigmas[i]), y))


def flow_renoised(times: Sequence[float], sigmas: Sequence[float], *, begin: int = 0) -> Iterator[Stage]:
    """The predicted x0 under fresh noise at every step, as consistency models sample (Song et al. 2023)."""
    for i in range(begin, len(times)):
        after = sigmas[i + 1]
        row = make_row(FLOW.x0(1 - sigmas[i], sigmas[i]), {"x0": 1 - after, "z": after})
        yield Stage(times[i], row, noise=Noise(dtype="float32"))


def flow_heun(
    times: Sequence[float],
    sigmas: Sequence[float],
    *,
    begin: int = 0,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Stage]:
    """Heun's method, two model calls a step and one in the last.

    Churn is that of diffusers: noise is added *after* the model was called, and the slope shrinks by the
    ratio of the levels. s_churn is shared out over all 2n - 1 calls of n steps. A churned step draws twice,
    and the second draw is not read.

    Args:
        times, sigmas: of the steps, not repeated.
    """
    last = len(times) - 1
    for i in range(begin, len(times)):
        sigma, after = sigmas[i], sigmas[i + 1]
        gamma = churn_factor(s_churn, 2 * last + 1) if s_tmin <= sigma <= s_tmax else 0.0
        hat = sigma * (gamma + 1)
        churn = s_noise * math.sqrt(hat * hat - sigma * sigma) if gamma > 0 else 0.0
        noise = Noise() if gamma > 0 else None
        slope = 1 / (gamma + 1)
        row = make_row(
            FLOW.x0(1 - sigma, sigma),
            {"xh": 1.0, "e": (after - hat) * slope},
            {"e": slope},
            {"xh": 1.0} if churn else None,
            churn=churn,
        )
        yield Stage(times[i], row, noise=noise, slots=() if i == last else ("u" if churn else "x", "d"))
        if i == last:
            return
        half = (after - hat) / 2
        row = make_row(FLOW.x0(1 - after, after), {"s0": 1.0, "s1": half, "e": half})
        yield Stage(times[i + 1], row, noise=noise)
