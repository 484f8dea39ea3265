"""Samplers in noise levels: x = x0 + sigma * noise, dx/dsigma = (x - x0) / sigma (Karras et al. 2022).

`sigmas` has one more element than there are steps; the last one, often 0, is where the run ends. `times` are
what the model is told. A run may begin at any step: `begin`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from difusores.plan import Noise, Stage, make_row
from difusores.solvers.common import Preconditioned, Prediction, churn_factor


def euler(
    times: Sequence[float],
    sigmas: Sequence[float],
    prediction: Prediction,
    *,
    begin: int = 0,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise: Noise = Noise(),  # noqa: B008 (a tuple)
) -> Iterator[Stage]:
    """Euler's method (Karras et al. 2022, algorithm 2 without its correction).

    With churn, noise raises the level to sigma_hat *after* the model was called, as in diffusers.
    """
    follows = prediction.kind == "epsilon" or isinstance(prediction, Preconditioned)
    for i in range(begin, len(times)):
        sigma, after = sigmas[i], sigmas[i + 1]
        gamma = churn_factor(s_churn, len(sigmas) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        hat = sigma * (gamma + 1)
        at = hat if follows else sigma
        slope = prediction.slope_at(hat) if at == hat else {"xh": 1 / hat, "x0": -1 / hat}
        row = make_row(
            prediction.x0_at(at),
            _along(slope, after - hat),
            clip=prediction.limits,
            churn=s_noise * math.sqrt(hat * hat - sigma * sigma) if gamma > 0 else 0.0,
        )
        yield Stage(times[i], row, c_in=prediction.c_in(sigma), noise=noise if gamma > 0 else None)


def euler_ancestral(
    times: Sequence[float], sigmas: Sequence[float], prediction: Prediction, *, begin: int = 0
) -> Iterator[Stage]:
    """Euler's method to a lower level, then fresh noise (k-diffusion's ancestral sampling), at every step."""
    for i in range(begin, len(times)):
        sigma, after = sigmas[i], sigmas[i + 1]
        up, down = ancestral_levels(sigma, after)
        y = {**_along(prediction.slope_at(sigma), down - sigma), "z": up}
        row = make_row(prediction.x0_at(sigma), y, clip=prediction.limits)
        yield _stage(times[i], sigma, row, Noise())


def ancestral_levels(sigma: float, after: float, eta: float = 1.0) -> tuple[float, float]:
    """(up, down): noise of deviation `up` on a sample at `down` gives one at `after`.

    eta: share of the noise that comes with down = after² / sigma, and no more than all of `after`.
    """
    ratio = min(after / sigma, 1.0)  # some grids rise at their first step, where no noise can be added
    lost = 1 - ratio * ratio
    left = (1 - eta) * (1 + eta) + (eta * ratio) ** 2  # 1 - eta² * lost, without cancellation
    return after * min(eta * math.sqrt(lost), 1.0), after * math.sqrt(max(left, 0.0)) if eta else after


def lms(
    times: Sequence[float],
    sigmas: Sequence[float],
    prediction: Prediction,
    *,
    begin: int = 0,
    order: int = 4,
) -> Iterator[Stage]:
    """Linear multistep: the polynomial through the last slopes, integrated exactly (k-diffusion's LMS).

    Begun late, it takes the coefficients of its place in the run and the slopes that there are, as in
    diffusers.

    Raises:
        ValueError: order is not from 1 to 6.
    """
    if not 1 <= order <= 6:
        raise ValueError(f"order must be from 1 to 6, got {order}")
    for i in range(begin, len(times)):
        nodes = sigmas[i::-1][: min(i + 1, order)]
        weights = lagrange_integrals(nodes, sigmas[i], sigmas[i + 1])
        slope = prediction.slope_at(sigmas[i])
        y = _along(slope, weights[0])
        y |= {f"s{k}": w for k, w in enumerate(weights[1 : i - begin + 1])}
        row = make_row(prediction.x0_at(sigmas[i]), y, slope, clip=prediction.limits)
        held = min(i - begin, order - 1)
        slots = ("d", *(f"s{k}" for k in range(held)))[: order - 1]
        yield _stage(times[i], sigmas[i], row, slots=slots)


def lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """The integrals from start to end of the polynomials that are 1 at one node and 0 at the others."""
    found = []
    for k, node in enumerate(nodes):
        # shifted to `start`: far from it the powers would cancel
        others = [other - start for j, other in enumerate(nodes) if j != k]
        scale = math.prod((node - start) - other for other in others)
        antiderivative = np.polynomial.Polynomial.fromroots(others).integ() if others else None
        area = end - start if antiderivative is None else float(antiderivative(end - start))
        found.append(area / scale)
    return found


def heun(
    times: Sequence[float], sigmas: Sequence[float], prediction: Prediction, *, begin: int = 0
) -> Iterator[Stage]:
    """Heun's method, two model calls a step and one in the last (Karras et al. 2022, algorithm 1).

    Args:
        times, sigmas: of the steps, not repeated; 2n - 1 stages follow for n steps.
        begin: the step.
    """
    for i in range(begin, len(times)):
        sigma, after = sigmas[i], sigmas[i + 1]
        slope = prediction.slope_at(sigma)
        row = make_row(prediction.x0_at(sigma), _along(slope, after - sigma), slope, clip=prediction.limits)
        last = i + 1 == len(times)
        yield _stage(times[i], sigma, row, slots=() if last else ("d", "x"))
        if last:
            return
        half = (after - sigma) / 2
        y = {"s0": half, "s1": 1.0, **_scaled(prediction.slope_at(after), half)}
        yield _stage(times[i + 1], after, make_row(prediction.x0_at(after), y, clip=prediction.limits))


def kdpm2(
    times: Sequence[float],
    sigmas: Sequence[float],
    prediction: Prediction,
    *,
    middles: Sequence[tuple[float, float]],
    begin: int = 0,
) -> Iterator[Stage]:
    """The midpoint method (Karras et al. 2022's reading of DPM-Solver-2), one call in the last step.

    Args:
        middles: (time, sigma) between a step and the next, for all steps but the last.
    """
    return _midpoint(times, sigmas, prediction, middles, begin, ancestral=False)


def kdpm2_ancestral(
    times: Sequence[float],
    sigmas: Sequence[float],
    prediction: Prediction,
    *,
    middles: Sequence[tuple[float, float]],
    begin: int = 0,
) -> Iterator[Stage]:
    """`kdpm2` to a lower level, then fresh noise; `middles` lie between a step and that level."""
    return _midpoint(times, sigmas, prediction, middles, begin, ancestral=True)


def _midpoint(
    times: Sequence[float],
    sigmas: Sequence[float],
    prediction: Prediction,
    middles: Sequence[tuple[float, float]],
    begin: int,
    ancestral: bool,
) -> Iterator[Stage]:
    for i in range(begin, len(times)):
        sigma, after = sigmas[i], sigmas[i + 1]
        last = i + 1 == len(times)
        time, middle = (math.nan, after) if last else middles[i]
        y = _along(prediction.slope_at(sigma), middle - sigma)
        row = make_row(prediction.x0_at(sigma), y, clip=prediction.limits)
        yield _stage(times[i], sigma, row, slots=() if last else ("x",))
        if last:
            return
        up, down = ancestral_levels(sigma, after) if ancestral else (0.0, after)
        y = {"s0": 1.0, **_scaled(prediction.slope_at(middle), down - sigma), "z": up}
        row = make_row(prediction.x0_at(middle), y, clip=prediction.limits)
        yield _stage(time, middle, row, Noise() if ancestral else None)


def _scaled(weights: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: factor * weight for name, weight in weights.items()}


def _along(slope: Mapping[str, float], distance: float) -> dict[str, float]:
    """Weights of x + distance * slope."""
    y = _scaled(slope, distance)
    y["xh"] = y.get("xh", 0.0) + 1.0
    return y


def _stage(
    time: float,
    sigma: float,
    row: tuple[float, ...],
    noise: Noise | None = None,
    slots: tuple[str, ...] = (),
) -> Stage:
    return Stage(time, row, c_in=1 / math.sqrt(sigma * sigma + 1), noise=noise, slots=slots)
