"""Samplers for models that predict the score, the gradient of the log density (Song et al. 2021).

e is the model's output. y is the next sample, d what the caller of one step is told besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from difusores.ops.scheduler_step import COLUMNS, W
from difusores.plan import Noise, Stage, make_row


def ended(stages: Iterable[Stage]) -> Iterator[Stage]:
    """A run of predictors: the last one's noise is drawn and left out, so that its mean is the image."""
    *before, last = stages
    yield from before
    row = list(last.row)
    row[W + COLUMNS.index("z")] = 0.0
    yield replace(last, row=tuple(row))


def ve_predictor(sigma: float, after: float) -> Stage:
    """Reverse diffusion of the variance-exploding process ("Score-based generative modeling", eq. 46).

    e is the score at noise level sigma; d is the next sample before noise is added.
    """
    variance = max(sigma * sigma - after * after, 0.0)
    mean = {"xh": 1.0, "e": variance}
    row = make_row((0.0, 0.0), {**mean, "z": math.sqrt(variance)}, mean)
    return Stage(sigma, row, noise=Noise(dtype="sample"))


def vp_predictor(t: float, steps: int, beta_min: float, beta_max: float) -> Stage:
    """Euler-Maruyama on the reverse of the variance-preserving process ("Score-based ...", eqs. 6 and 32).

    The score is -e / std at time t; d is the next sample before noise is added.

    Args:
        t: in (0, 1].
        steps: of the run, each 1 / steps long.
        beta_min, beta_max: the process' rate at times 0 and 1.

    Raises:
        ValueError: t is not above 0, where the score is infinite.
    """
    if not t > 0:
        raise ValueError(f"t must be above 0, got {t}")
    std = math.sqrt(-math.expm1(-0.5 * t * t * (beta_max - beta_min) - t * beta_min))
    share = (beta_min + t * (beta_max - beta_min)) / steps
    mean = {"xh": 1 + 0.5 * share, "e": -share / std}
    row = make_row((0.0, 0.0), {**mean, "z": math.sqrt(share)}, mean)
    return Stage(t, row, noise=Noise(dtype="sample"))


def karras_ve(levels: Sequence[float], hats: Sequence[float], s_noise: float) -> Iterator[Stage]:
    """Karras et al. 2022, algorithm 2: noise at every step, and two calls of the model, in the last step one.

    Args:
        levels: of the steps.
        hats: to what noise raises each of them.
        s_noise: factor of the noise, which is part of the row that leads to a level, but for the first one.
    """
    yield replace(karras_ve_churn(levels[0], hats[0], s_noise), calls_model=False)
    for (hat, next_hat), after in zip(pairwise(hats), levels[1:], strict=True):
        yield replace(karras_ve_step(hat, after), slots=("x", "d"))
        corrected = karras_ve_correct(hat, after)
        row = list(corrected.row)
        row[W + COLUMNS.index("z")] = _raised(after, next_hat, s_noise)
        yield replace(corrected, row=tuple(row), noise=CHURN)
    yield karras_ve_step(hats[-1], 0.0)


CHURN = Noise(dtype="float32")


def _raised(sigma: float, hat: float, s_noise: float) -> float:
    return s_noise * math.sqrt(max(hat * hat - sigma * sigma, 0.0))


def karras_ve_churn(sigma: float, hat: float, s_noise: float) -> Stage:
    """Noise from level sigma up to hat (the same algorithm, lines 5 and 6)."""
    return Stage(hat, make_row((0.0, 0.0), {"xh": 1.0, "z": _raised(sigma, hat, s_noise)}), noise=CHURN)


def karras_ve_step(hat: float, after: float) -> Stage:
    """Euler's step along -e, d (the same algorithm, lines 7 and 8); x0 = x + hat * e."""
    return Stage(hat, make_row((1.0, hat), {"xh": 1.0, "e": hat - after}, {"e": -1.0}))


def karras_ve_correct(hat: float, after: float) -> Stage:
    """Heun's correction (lines 10 and 11) of the sample x at `after`: s0 and s1 are those of the step."""
    half = 0.5 * (after - hat)
    return Stage(after, make_row((1.0, after), {"s0": 1.0, "s1": half, "e": -half}))
