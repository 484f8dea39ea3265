"""Samplers for models that jump to the image, or close to it, in one call: consistency models, LCM, TCD."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from difusores.plan import Noise, Stage, make_row
from difusores.solvers.common import Prediction
from difusores.solvers.discrete import ddim_weights, signal_share

Number = TypeVar("Number", float, Tensor)


def boundary_scalings(level: Number, sigma_data: float, end: float = 0.0) -> tuple[Number, Number]:
    """(c_skip, c_out) of c_skip * x + c_out * F(x), which is x at the end (Song et al. 2023, eq. 5).

    Args:
        level: the noise level, in the units of sigma_data.
        end: that at which the trajectory ends (there, appendix C).
    """
    variance, distance = sigma_data**2, level - end
    return (
        variance / (distance**2 + variance),
        distance * sigma_data / (level**2 + variance) ** 0.5,
    )


def lcm_scalings(timestep: Number, scaling: float, sigma_data: float = 0.5) -> tuple[Number, Number]:
    """(c_skip, c_out) of an image predicted at a training step (Luo et al. 2023, "LCM", section 4.1)."""
    distance, variance = timestep * scaling, sigma_data**2
    return variance / (distance**2 + variance), distance / (distance**2 + variance) ** 0.5


def consistency(
    times: Sequence[float],
    sigmas: Sequence[float],
    *,
    begin: int = 0,
    sigma_min: float,
    sigma_max: float,
    sigma_data: float = 0.5,
    s_noise: float = 1.0,
    clip: float | None = 1.0,
) -> Iterator[Stage]:
    """Multistep consistency sampling: to the image, then noise again (Song et al. 2023, algorithm 1).

    Noise is drawn at every step, the last one included, of a run that has more than one.

    Args:
        times: what the model is told.
        sigmas: noise levels, one more than times.
        sigma_min, sigma_max: the trajectory's ends, to which levels are limited before noise is added.
        sigma_data: standard deviation of the data.
        s_noise: factor of the noise.
        clip: limit of the image; None leaves it.
    """
    several = len(times) > 1
    limits = (-math.inf, math.inf) if clip is None else (-clip, clip)
    for i in range(begin, len(times)):
        sigma, after = sigmas[i], min(max(sigmas[i + 1], sigma_min), sigma_max)
        y = {"x0": 1.0}
        if several:
            y["z"] = s_noise * math.sqrt(max(after * after - sigma_min * sigma_min, 0.0))
        row = make_row(boundary_scalings(sigma, sigma_data, sigma_min), y, clip=limits)
        c_in = 1 / math.sqrt(sigma * sigma + sigma_data * sigma_data)
        yield Stage(times[i], row, c_in=c_in, noise=Noise() if several else None)


def lcm(
    times: Sequence[int],
    alphas_cumprod: Sequence[float],
    prediction: Prediction,
    *,
    begin: int = 0,
    last: int | None = None,
    timestep_scaling: float = 10.0,
) -> Iterator[Stage]:
    """Multistep sampling of latent consistency models (Luo et al. 2023, algorithm 3); d is the image.

    Args:
        times: timesteps, descending.
        last: index of the step that adds no noise; None is that of the last time. A run that ends before it
            ends with noise, as in diffusers.
        timestep_scaling: of `lcm_scalings`.
    """
    last = len(times) - 1 if last is None else last
    for i in range(begin, len(times)):
        a = signal_share(alphas_cumprod, times[i])
        c_skip, c_out = lcm_scalings(float(times[i]), timestep_scaling)
        image = {"x0": c_out, "xh": c_skip}
        x0 = prediction.x0(math.sqrt(a), math.sqrt(1 - a))
        after = times[min(i + 1, len(times) - 1)]
        share = None if i == last else alphas_cumprod[after]
        yield _stage(times[i], x0, image, share, prediction)


def tcd(
    times: Sequence[int],
    alphas_cumprod: Sequence[float],
    prediction: Prediction,
    *,
    begin: int = 0,
    last: int | None = None,
    eta: float = 0.3,
) -> Iterator[Stage]:
    """Strategic stochastic sampling of trajectory consistency distillation (Zheng et al. 2024, algorithm 4).

    DDIM below the next timestep, to (1 - eta) of it, then noise up to it; d is the sample before that noise.

    Args:
        times, last: as `lcm`.
        eta: the paper's gamma, in [0, 1]; 0 is deterministic.

    Raises:
        ValueError: eta is outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")
    last = len(times) - 1 if last is None else last
    for i in range(begin, len(times)):
        after = times[i + 1] if i + 1 < len(times) else 0
        # in float32 as in diffusers, where 0.7 * 990 may be less than 693
        low = math.floor(np.float32(1 - eta) * np.float32(after))
        a, a_low = signal_share(alphas_cumprod, times[i]), alphas_cumprod[low]
        x0 = prediction.x0(math.sqrt(a), math.sqrt(1 - a))
        lower = ddim_weights(times[i], a, a_low, prediction)
        share = None if eta == 0 or i == last else alphas_cumprod[after] / a_low
        yield _stage(times[i], x0, lower, share, prediction)


def _stage(
    t: int, x0: tuple[float, float], low: dict[str, float], share: float | None, prediction: Prediction
) -> Stage:
    """The stage that makes the sample `low`; noise then takes all of its variance but `share` (None: all)."""
    y, noise = low, None
    if share is not None:
        y = {name: math.sqrt(share) * weight for name, weight in low.items()}
        y["z"] = math.sqrt(1 - share)
        noise = Noise(dtype="promoted")
    row = make_row(x0, y, low, clip=prediction.limits)
    return Stage(t, row, noise=noise, threshold=prediction.threshold)
