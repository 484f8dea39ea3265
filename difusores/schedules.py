"""Noise schedules and timestep grids: plain numbers, on no device and for no model.

Tables are built with the float32 operations of diffusers, so that both libraries hold the same values, and
come out as float64, from which everything else is derived. Notation of Ho et al. 2020 ("Denoising diffusion
probabilistic models"): beta_t is the variance added at step t, alpha_t = 1 - beta_t, alphas_cumprod their
running product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
SPACINGS = ("leading", "linspace", "trailing")


def betas(
    schedule: str,
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    trained_betas: Sequence[float] | Tensor | None = None,
    rescale_zero_snr: bool = False,
) -> Tensor:
    """The variance added at each training step.

    Args:
        schedule: "linear" (Ho et al. 2020), "scaled_linear" (linear in the standard deviation; latent
            diffusion), "squaredcos_cap_v2" (Nichol & Dhariwal 2021, eq. 17), "sigmoid" (GeoDiff) or "laplace"
            (Hang & Gu 2024).
        num_train_timesteps: T.
        beta_start, beta_end: the first and last beta of the first two and of "sigmoid", in (0, 1).
        trained_betas: T values that replace the schedule.
        rescale_zero_snr: apply `zero_terminal_snr`.

    Returns:
        [T] float64, rounded to float32.

    Raises:
        NotImplementedError: unknown schedule.
        ValueError: not T trained_betas.
    """
    if trained_betas is not None:
        # as_tensor may share memory with the caller's array
        table = torch.as_tensor(trained_betas, dtype=torch.float32, device="cpu").detach().clone()
        if table.shape != (num_train_timesteps,):
            raise ValueError(
                f"trained_betas has {table.numel()} values, and num_train_timesteps is {num_train_timesteps}"
            )
    elif schedule == "linear":
        table = _linspace(beta_start, beta_end, num_train_timesteps)
    elif schedule == "scaled_linear":
        table = _linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    elif schedule == "squaredcos_cap_v2":
        table = _from_alpha_bar(_cosine_alpha_bar, num_train_timesteps)
    elif schedule == "laplace":
        table = _from_alpha_bar(_laplace_alpha_bar, num_train_timesteps)
    elif schedule == "sigmoid":
        logits = _linspace(-6, 6, num_train_timesteps)
        table = torch.sigmoid(logits) * (beta_end - beta_start) + beta_start
    else:
        names = ", ".join(BETA_SCHEDULES)
        raise NotImplementedError(f"beta_schedule {schedule!r} is not implemented; the schedules are {names}")
    return zero_terminal_snr(table.double()) if rescale_zero_snr else table.double()


def alphas(betas: Tensor) -> Tensor:
    """[T] 1 - betas, the share of the signal's variance that each training step leaves; in betas' dtype."""
    return 1.0 - betas


def alphas_cumprod(betas: Tensor) -> Tensor:
    """[T] float64, rounded to float32: the share of the signal's variance left at each training step."""
    return torch.cumprod(1.0 - betas.float(), dim=0).double()


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Rescale betas so that the last step holds no signal (Lin et al. 2023, algorithm 1).

    Args:
        betas: [T], values of float32.

    Returns:
        [T] float64, rounded to float32; the last one is 1.
    """
    root = torch.cumprod(1.0 - betas.float(), dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bar = ((root - last) * (first / (first - last))) ** 2
    return (1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])).double()


def _linspace(start: float, end: float, steps: int) -> Tensor:
    # the device is named, here and below: `with torch.device(...)` around the call would choose another
    return torch.linspace(start, end, steps, dtype=torch.float32, device="cpu")


def _from_alpha_bar(alpha_bar: Callable[[float], float], steps: int, largest: float = 0.999) -> Tensor:
    """Betas whose alphas_cumprod follow a function of time in [0, 1]; float32."""
    values = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), largest) for i in range(steps)]
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _cosine_alpha_bar(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(t: float) -> float:
    distance = 0.5 - t
    snr = math.exp(-0.5 * math.copysign(1, distance) * math.log(1 - 2 * math.fabs(distance) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def timesteps(spacing: str, steps: int, num_train_timesteps: int, offset: int = 0) -> list[int]:
    """The training steps at which the model is called, in descending order (Lin et al. 2023, table 2).

    Args:
        spacing: "leading" (from 0 upwards in strides of T // steps), "linspace" (0 and T - 1 included) or
            "trailing" (from T - 1 downwards).
        steps: how many, from 1 to T.
        num_train_timesteps: T.
        offset: added to each timestep of "leading".

    Raises:
        ValueError: unknown spacing, or a count outside 1 to T.
    """
    total = num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"num_inference_steps must be from 1 to {total} (num_train_timesteps), got {steps}")
    # Rounding errors break ties such as 937.5: these are the float operations of numpy's linspace and arange.
    if spacing == "leading":
        return [i * (total // steps) + offset for i in reversed(range(steps))]
    if spacing == "linspace":
        stride = (total - 1) / max(steps - 1, 1)
        return [round(i * stride) for i in reversed(range(steps))]
    if spacing == "trailing":
        stride = (total - total / steps) - total
        return [round(total + i * stride) - 1 for i in range(steps)]
    raise ValueError(f"timestep_spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")


def repaint_timesteps(
    steps: int, num_train_timesteps: int, jump_length: int = 10, jump_n_sample: int = 10
) -> list[int]:
    """Down to 0 with jumps back up (Lugmayr et al. 2022, "RePaint", figure 8); a step up undoes one.

    Args:
        steps: without jumps, from 1 on; more than T are taken for T.
        jump_length: steps of a jump.
        jump_n_sample: how often every stretch between jumps is gone down.

    Raises:
        ValueError: a number below 1.
    """
    for name, value in {"num_inference_steps": steps, "jump_length": jump_length}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    steps = min(steps, num_train_timesteps)
    jumps = dict.fromkeys(range(0, steps - jump_length, jump_length), jump_n_sample - 1)
    place, places = steps, []
    while place > 0:
        place -= 1
        places.append(place)
        if jumps.get(place, 0) > 0:
            jumps[place] -= 1
            places += range(place + 1, place + jump_length + 1)
            place += jump_length
    return [place * (num_train_timesteps // steps) for place in places]


def custom_timesteps(timesteps: Sequence[int] | Tensor, num_train_timesteps: int) -> list[int]:
    """Check timesteps given by the caller: strictly descending, from num_train_timesteps - 1 down to 0.

    Raises:
        ValueError: none given, not descending, or out of range.
    """
    given = [int(t) for t in timesteps]
    if not given:
        raise ValueError("timesteps must hold at least one timestep, and is empty")
    for before, after in pairwise(given):
        if after >= before:
            raise ValueError(f"timesteps must be in descending order, got {before} before {after}")
    if given[0] >= num_train_timesteps or given[-1] < 0:
        allowed = f"0 to {num_train_timesteps - 1} (num_train_timesteps - 1)"
        raise ValueError(f"timesteps must lie within {allowed}, got {given[0]} to {given[-1]}")
    return given


def pndm_timesteps(timesteps: Sequence[int], num_train_timesteps: int) -> tuple[list[int], list[int]]:
    """(Runge-Kutta calls, multistep calls) of PNDM: three steps of four calls, then one call a step.

    Args:
        timesteps: of the steps, descending.
        num_train_timesteps: T.

    Raises:
        ValueError: fewer than four steps.
    """
    if len(timesteps) < 4:
        raise ValueError(
            f"PNDM's Runge-Kutta steps need num_inference_steps from 4 on, got {len(timesteps)}; "
            "skip_prk_steps=True takes fewer"
        )
    half = num_train_timesteps // len(timesteps) // 2
    calls: list[int] = []
    for here, after in pairwise(timesteps[:4]):
        calls += [here, after + half, after + half, after]
    return calls, list(timesteps[3:])


def sine_levels(steps: int) -> Tensor:
    """[steps + 1] float32, from 1 to 0: the noise of IPNDM, sin²(pi/2 · t)."""
    return torch.sin(_linspace(1, 0, steps + 1) * math.pi / 2) ** 2


def signal_beside(noise: Tensor) -> Tensor:
    """√(1 - noise²), in float32."""
    return (1.0 - noise.float() ** 2) ** 0.5


def angles(noise: Tensor, signal: Tensor) -> Tensor:
    """The times of IPNDM, in quarter turns from the signal to the noise."""
    return torch.atan2(noise, signal) / math.pi * 2


class SigmaGrid(NamedTuple):
    """Noise levels sigma = sqrt(1 - a) / sqrt(a) of a run and the times that the model is told.

    Attributes:
        timesteps: one per step, real numbers in units of training steps.
        sigmas: one more, the last one is where the run ends; values of float32.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]


def training_sigmas(alphas_cumprod: Tensor) -> Array:
    """[T] sqrt((1 - a) / a) of alphas_cumprod [T] in float32, ascending."""
    a = alphas_cumprod.float().cpu()
    levels: Array = (((1 - a) / a) ** 0.5).numpy()
    return levels


def real_timesteps(
    spacing: str, steps: int, num_train_timesteps: int, offset: int = 0, *, rounded: bool = True
) -> list[float]:
    """`timesteps` for models that are told real numbers: "linspace" is not rounded, or to float32."""
    if spacing == "linspace" and 1 <= steps <= num_train_timesteps:
        dtype = np.float32 if rounded else np.float64
        grid = np.linspace(0, num_train_timesteps - 1, steps, dtype=dtype)[::-1]
        return [float(t) for t in grid]
    return [float(t) for t in timesteps(spacing, steps, num_train_timesteps, offset)]


def with_data(sigma: Tensor, data: float = 1.0) -> Tensor:
    """√(sigma² + data²), the deviation of x0 + sigma * noise where that of x0 is data; in sigma's dtype."""
    deviation: Tensor = (sigma**2 + data**2) ** 0.5
    return deviation


def first_deviation(sigmas: Tensor, with_image: bool) -> Tensor:
    """0-dim, of the first sample: the highest level, or with the image's deviation of 1 beside it."""
    top = sigmas.max()
    return with_data(top) if with_image else top


def churned(sigma: Any, gamma: float) -> Any:
    """A noise level (number or tensor) raised by gamma of itself (Karras et al. 2022, algorithm 2)."""
    return sigma + gamma * sigma


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> Array:
    """[steps], descending (Karras et al. 2022, eq. 5)."""
    levels: Array = karras_levels(sigma_min, sigma_max, np.linspace(0, 1, steps), rho)
    return levels


def karras_levels(sigma_min: float, sigma_max: float, places: Any, rho: float = 7.0) -> Any:
    """The noise levels at places between sigma_max, at 0, and sigma_min, at 1 (Karras et al. 2022, eq. 5).

    places: an array or a tensor, in whose dtype it is computed.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + places * (low - high)) ** rho


def exponential_sigmas(sigma_min: float, sigma_max: float, steps: int) -> Array:
    """[steps], descending, evenly spaced in the logarithm."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))


def real_times(steps: int, last: float) -> Tensor:
    """[steps] float32 from 1 to last."""
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
    return _linspace(1, last, steps)


def sigmas_at(times: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Noise levels at times from 0 to 1, even in the logarithm (Song et al. 2021, eq. 30); in their dtype."""
    levels: Tensor = sigma_min * (sigma_max / sigma_min) ** times
    return levels


def geometric_sigmas(sigma_min: float, sigma_max: float, steps: int) -> Tensor:
    """[steps] float32 from sigma_min to sigma_max, even in the logarithm."""
    return torch.exp(_linspace(math.log(sigma_min), math.log(sigma_max), steps))


def geometric_variances(first: float, last: float, steps: int) -> Tensor:
    """[steps] float32 from last to first, even in the logarithm; of one step the first."""
    places = torch.arange(steps - 1, -1, -1, device="cpu") / max(steps - 1, 1)
    variances: Tensor = first * (last / first) ** places
    return variances


def place_of(time: float, steps: int) -> int:
    """Where a time from 0 to 1 lies among `steps` levels; in float32 as in diffusers, rounded down."""
    return int(np.float32(time) * np.float32(steps - 1))


def levels_below(levels: Tensor, places: Tensor) -> Tensor:
    """Like places, on their device: the level before each, 0 before the first."""
    below = levels[(places - 1).to(levels.device)].to(places.device)
    return torch.where(places == 0, torch.zeros_like(below), below)


def training_places(steps: int) -> Tensor:
    """[steps + 1] float64, from 0 to 1 in equal steps."""
    return torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps


def even_places(steps: int) -> Tensor:
    """[steps] float64 from 0 to 1."""
    return torch.linspace(0, 1, steps, dtype=torch.float64, device="cpu")


def edm_sigmas(kind: str, places: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """[steps] float32 at [steps] places between sigma_max, at 0, and sigma_min, at 1.

    kind: "karras", computed in the dtype of places, or "exponential", which takes float64 ones.
    """
    if kind == "karras":
        levels: Tensor = karras_levels(sigma_min, sigma_max, places, rho)
        return levels.float()
    low, high = math.log(sigma_min), math.log(sigma_max)
    if torch.allclose(places, even_places(len(places)), rtol=0, atol=1e-12):
        # diffusers' own float32 numbers; of one level it takes the lowest
        return _linspace(low, high, len(places)).exp().flip(0)
    return (high + places * (low - high)).exp().float()


def edm_times(sigmas: Tensor) -> Tensor:
    """c_noise, what the model is told at noise levels (Karras et al. 2022, table 1)."""
    return 0.25 * torch.log(sigmas)


def cosine_times(sigmas: Tensor) -> Tensor:
    """Noise levels as angles, in quarter turns from the signal to the noise."""
    return sigmas.atan() / math.pi * 2


def beta_sigmas(
    sigma_min: float, sigma_max: float, steps: int, alpha: float = 0.6, beta: float = 0.6
) -> Array:
    """[steps], descending, at quantiles of a beta distribution (Lee et al. 2024, "Beta sampling").

    Raises:
        ImportError: SciPy is missing.
    """
    try:
        from scipy.stats import beta as distribution
    except ImportError as error:
        raise ImportError("use_beta_sigmas needs SciPy, which is not installed: pip install scipy") from error
    quantiles = np.array([distribution.ppf(q, alpha, beta) for q in 1 - np.linspace(0, 1, steps)])
    return sigma_min + quantiles * (sigma_max - sigma_min)


def sigma_to_timestep(sigmas: Array | Sequence[float], table: Array) -> list[float]:
    """Times at which a model was trained at these noise levels, interpolated in the logarithm.

    Args:
        sigmas: noise levels; those outside the table get its ends.
        table: [T] of `training_sigmas`.
    """
    levels = np.log(np.maximum(np.asarray(sigmas), 1e-10))
    logarithms = np.log(table)
    # the last entry that is not above the level, also where a table with zero terminal SNR is not ascending
    reached = (levels[None] >= logarithms[:, None])[::-1]
    low = np.where(reached.any(0), len(table) - 1 - reached.argmax(0), 0).clip(max=len(table) - 2)
    below, above = logarithms[low], logarithms[low + 1]
    with np.errstate(
        invalid="ignore"
    ):  # of an infinite level; a stage at a time that is no number is refused
        share = np.clip((below - levels) / (below - above), 0, 1)
    return [float(t) for t in (1 - share) * low + share * (low + 1)]


SIGMA_KINDS = ("karras", "exponential", "beta")


def sigma_grid(
    table: Array,
    timesteps: Sequence[float],
    *,
    kind: str | None = None,
    log_linear: bool = False,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    last: float = 0.0,
) -> SigmaGrid:
    """The noise levels at given training steps, or another spacing of noise levels over the same range.

    Args:
        table: [T] of `training_sigmas`.
        timesteps: descending.
        kind: one of SIGMA_KINDS: then the timesteps count, and their levels are the range.
        log_linear: evenly spaced in the logarithm over the whole table, whatever the timesteps; one level
            more than timesteps, so that the run ends at the lowest one and `last` is never met.
        sigma_min, sigma_max: the range for `kind`.
        last: where the run ends.
    """
    steps = len(timesteps)
    levels: Array = np.interp(timesteps, np.arange(len(table)), table)
    if log_linear:
        ends = (np.log(table[-1]), np.log(table[0]), steps + 1)
        levels = torch.linspace(*ends, dtype=torch.float32, device="cpu").exp().double().numpy()
    if kind is not None:
        low = float(levels[-1]) if sigma_min is None else sigma_min
        high = float(levels[0]) if sigma_max is None else sigma_max
        spacing = {"karras": karras_sigmas, "exponential": exponential_sigmas, "beta": beta_sigmas}[kind]
        levels = spacing(low, high, steps)
        timesteps = sigma_to_timestep(levels, table)
    return SigmaGrid(tuple(timesteps), as_float32([*levels, last]))


def as_float32(values: Sequence[float] | Array) -> tuple[float, ...]:
    """The same numbers rounded to float32: what `sigmas` of a scheduler holds."""
    return tuple(float(v) for v in np.asarray(values, dtype=np.float32))


def middle_sigmas(sigmas: Sequence[float], *, ancestral: bool) -> list[float]:
    """Geometric means of each level and the next one above 0, for all steps but the last.

    Args:
        sigmas: descending, one more than there are steps.
        ancestral: the next level is the lower one that ancestral noise leaves room for, after² / here: the
            mean of that and `here` is `after`. (In float32, from the noise's variance, it can be NaN.)
    """
    if ancestral:
        return list(sigmas[1:-1])
    return [math.sqrt(here * after) for here, after in pairwise(sigmas[:-1])]


def distilled_timesteps(
    steps: int, num_train_timesteps: int, teacher_steps: int | None, strength: float
) -> list[int]:
    """The timesteps of a model distilled from a teacher's steps (Luo et al. 2023, "LCM", section 4.3).

    Args:
        steps: how many.
        num_train_timesteps: T.
        teacher_steps: of the teacher, at T // teacher_steps - 1 and so on; None: at every training step.
        strength: the share of them that is taken, from the lowest on.

    Raises:
        ValueError: fewer of them than `steps`.
    """
    origin = teacher_timesteps(num_train_timesteps, teacher_steps, strength)
    if not 1 <= steps <= len(origin):
        every = num_train_timesteps if teacher_steps is None else teacher_steps
        raise ValueError(
            f"num_inference_steps must be from 1 to {len(origin)}, the {every} steps of distillation times "
            f"the strength {strength}; got {steps}"
        )
    places = np.floor(np.linspace(0, len(origin), num=steps, endpoint=False)).astype(int)
    return [origin[-1 - place] for place in places]


def teacher_timesteps(num_train_timesteps: int, teacher_steps: int | None, strength: float) -> list[int]:
    """The ascending timesteps out of which `distilled_timesteps` chooses.

    Raises:
        ValueError: the teacher has more steps than the model was trained with.
    """
    if teacher_steps is None:
        return list(range(int(num_train_timesteps * strength)))
    if not 1 <= teacher_steps <= num_train_timesteps:
        raise ValueError(
            f"original_inference_steps must be from 1 to {num_train_timesteps} (num_train_timesteps), "
            f"got {teacher_steps}"
        )
    stride = num_train_timesteps // teacher_steps
    return [i * stride - 1 for i in range(1, int(teacher_steps * strength) + 1)]


def inner_timesteps(
    spacing: str, steps: int, num_train_timesteps: int, offset: int = 0, last: int | None = None
) -> list[int]:
    """The training steps of solvers that end between training step 0 and the image, descending.

    "linspace" and "leading" are `timesteps` of one step more, without the lowest.

    Args:
        spacing, num_train_timesteps, offset: as `timesteps`.
        steps: how many, from 1 to T.
        last: T, or a smaller number to stay below.

    Raises:
        ValueError: unknown spacing, or a count that it has no room for.
    """
    total = num_train_timesteps if last is None else last
    most = total - 1 if spacing == "leading" else num_train_timesteps
    if not 1 <= steps <= most:
        raise ValueError(
            f"num_inference_steps must be from 1 to {most} with {spacing!r} spacing, got {steps}"
        )
    if spacing == "linspace":
        return [int(t) for t in np.linspace(0, total - 1, steps + 1).round()[:0:-1]]
    if spacing == "leading":
        return [i * (total // (steps + 1)) + offset for i in range(steps, 0, -1)]
    if spacing == "trailing":
        # rounding may leave room for one more, which would be -1
        return [int(t) - 1 for t in np.arange(total, 0, -num_train_timesteps / steps).round()[:steps]]
    raise ValueError(f"timestep_spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")


def inversion_timesteps(
    spacing: str, steps: int, num_train_timesteps: int, offset: int = 0, last: int | None = None
) -> list[int]:
    """The training steps of solvers that lead from the image to the noise, ascending; as `inner_timesteps`.

    "linspace" and "leading" begin at 0 and leave out the highest one.
    """
    inner = inner_timesteps(spacing, steps, num_train_timesteps, offset, last)[::-1]
    total = num_train_timesteps if last is None else last
    if spacing == "linspace":
        return [int(t) for t in np.linspace(0, total - 1, steps + 1).round()[:-1]]
    if spacing == "leading":
        return [t - total // (steps + 1) for t in inner]
    return inner


def signal_noise_lambda(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma and lambda = log(alpha / sigma) of every training step, [T] float32."""
    alpha, sigma = torch.sqrt(alphas_cumprod), torch.sqrt(1 - alphas_cumprod)
    return alpha, sigma, torch.log(alpha) - torch.log(sigma)


def lu_sigmas(sigma_min: float, sigma_max: float, steps: int) -> Array:
    """[steps], descending: lambda in equal steps (Lu et al. 2022, "DPM-Solver", section 3.4).

    Args:
        sigma_min, sigma_max: logarithms are taken in float32.
    """
    low, high = (float(np.log(np.float32(level))) for level in (sigma_min, sigma_max))
    return np.exp(high + np.linspace(0, 1, steps) * (low - high))


def flow_sigmas(steps: int, num_train_timesteps: int, shift: float = 1.0) -> Array:
    """[steps], descending, of x = (1 - sigma) * x0 + sigma * noise, below 1 (Esser et al. 2024, eq. 23)."""
    levels = 1.0 - np.linspace(1, 1 / num_train_timesteps, steps + 1)
    shifted: Array = (shift * levels / (1 + (shift - 1) * levels))[:0:-1]
    return shifted


def whole_flow_sigmas(steps: int, num_train_timesteps: int) -> Array:
    """[steps], descending from 1 itself; one more would be 1 / num_train_timesteps."""
    return np.linspace(1, 1 / num_train_timesteps, steps + 1)[:-1]


def lambda_flow_grid(
    levels: Array | Sequence[float],
    num_train_timesteps: int,
    *,
    shift: float = 1.0,
    mu: float | None = None,
    kind: str = "exponential",
    terminal: float | None = None,
    last: float | None = 0.0,
) -> SigmaGrid:
    """A grid of `lambda_grid` at levels of x = (1 - sigma) * x0 + sigma * noise.

    Args:
        levels: descending, above 0 and up to 1; a first level of 1 becomes 1 - 1e-6.
        num_train_timesteps: T; the model is told sigma * T, cut off.
        shift: see `shifted`. mu, kind: of `time_shifted`, in place of shift. terminal: of `stretched`.
        last: where the run ends; None is the lowest level once more.

    Raises:
        ValueError: levels out of range.
    """
    given = np.array(levels, dtype=np.float64)
    if not (given.size and np.all(np.diff(given) < 0) and given[-1] > 0 and given[0] <= 1):
        raise ValueError(f"sigmas of a flow must descend within (0, 1], got {given.tolist()}")
    moved = shifted(given, shift) if mu is None else time_shifted(given, mu, kind)
    if terminal:
        moved = stretched(moved, terminal)
    if abs(moved[0] - 1) < 1e-6:  # lambda would be infinite
        moved[0] -= 1e-6
    times = tuple(int(level * num_train_timesteps) for level in moved)
    return SigmaGrid(times, as_float32([*moved, moved[-1] if last is None else last]))


LAMBDA_KINDS = (*SIGMA_KINDS, "lu", "flow")


def lambda_grid(
    table: Array,
    timesteps: Sequence[int],
    steps: int,
    *,
    kind: str | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shift: float = 1.0,
    rounded: Sequence[str] = ("karras", "lu"),
    last: float | None = 0.0,
    ascending: bool = False,
) -> SigmaGrid:
    """The noise levels of solvers in lambda = log(alpha / sigma), whose model is told whole training steps.

    Args:
        table: [T] of `training_sigmas`.
        timesteps: descending; their levels are the grid if kind is None.
        steps: how many, otherwise.
        kind: one of LAMBDA_KINDS. All but "flow" cover the table, whatever the timesteps.
        sigma_min, sigma_max: the range instead of the table's.
        shift: of "flow".
        rounded: the kinds whose times are rounded; the others are cut off, as in diffusers.
        last: where the run ends; None is the last level once more.
        ascending: from the table's lowest level to its highest; not for "flow", as in diffusers.
    """
    low, high = float(table[-1 if ascending else 0]), float(table[0 if ascending else -1])
    low = low if sigma_min is None else sigma_min
    high = high if sigma_max is None else sigma_max
    times: Array | Sequence[float] = timesteps
    if kind is None:
        levels: Array = np.interp(timesteps, np.arange(len(table)), table)
    elif kind == "flow":
        levels = flow_sigmas(steps, len(table), shift)
        times = levels * len(table)
    else:
        spacings = {
            "karras": karras_sigmas,
            "exponential": exponential_sigmas,
            "beta": beta_sigmas,
            "lu": lu_sigmas,
        }
        levels = spacings[kind](low, high, steps)
        times = sigma_to_timestep(levels, table)
    if kind in rounded:
        times = np.round(times)
    return SigmaGrid(
        tuple(int(t) for t in times), as_float32([*levels, levels[-1] if last is None else last])
    )


TIME_SHIFTS = ("exponential", "linear")


def training_flow_levels(num_train_timesteps: int, shift: float | None) -> tuple[Tensor, Tensor]:
    """([T] noise levels, [T] what the model is told at each), float32, descending; a shift of None: none."""
    table = training_flow_sigmas(num_train_timesteps)
    table = table if shift is None else shifted(table, shift)
    return table, table * num_train_timesteps


def training_flow_sigmas(num_train_timesteps: int) -> Tensor:
    """[T] float32, descending from 1 to 1 / T."""
    steps = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32)[::-1].copy()
    return torch.from_numpy(steps) / num_train_timesteps


def shifted(levels: Any, shift: float) -> Any:
    """More steps at high noise (Esser et al. 2024, "Scaling rectified flow transformers", eq. 23).

    levels: array or tensor, in [0, 1]; in its dtype.

    Raises:
        ValueError: shift is not above 0.
    """
    if not shift > 0:
        raise ValueError(f"shift must be above 0, got {shift}")
    return shift * levels / (1 + (shift - 1) * levels)


def time_shifted(levels: Any, mu: float, kind: str = "exponential", power: float = 1.0) -> Any:
    """`shifted` by e^mu ("exponential") or by mu ("linear"), of (1 / levels - 1)^power."""
    factor = math.exp(mu) if kind == "exponential" else mu
    if not factor > 0:
        raise ValueError(f"mu must be above 0 for a linear time shift, got {mu}")
    with np.errstate(divide="ignore"):  # at 0, whose place is 0
        return factor / (factor + (1 / levels - 1) ** power)


def stretched(levels: Any, last: float) -> Any:
    """1 - levels in proportion, so that the run's last level is `last`; a last level of 1 stays as it is.

    Raises:
        ValueError: last is not within 0 and 1.
    """
    if not 0 <= last < 1:
        raise ValueError(f"shift_terminal must lie from 0 to below 1, got {last}")
    room = 1 - levels
    return levels if room[-1] == 0 else 1 - room / (room[-1] / (1 - last))


def flow_grid(
    levels: Array,
    num_train_timesteps: int,
    *,
    kind: str | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    timesteps: Array | None = None,
    inverted: bool = False,
) -> SigmaGrid:
    """The noise levels of a flow model, which is told sigma * T.

    Args:
        levels: of the steps, shifted.
        num_train_timesteps: T.
        kind: one of SIGMA_KINDS, over the range of the levels.
        sigma_min, sigma_max: the range instead of theirs.
        timesteps: what the model is told instead; not where inverted.
        inverted: 1 - sigma in place of sigma, from the image to the noise.

    Raises:
        ValueError: "exponential" down to 0.
    """
    if kind is not None:
        low = float(levels[-1]) if sigma_min is None else sigma_min
        high = float(levels[0]) if sigma_max is None else sigma_max
        if kind == "exponential" and not low > 0:
            raise ValueError(f"use_exponential_sigmas needs a lowest level above 0, got {low}")
        spacing = {"karras": karras_sigmas, "exponential": exponential_sigmas, "beta": beta_sigmas}[kind]
        levels = spacing(low, high, len(levels))
    levels = levels.astype(np.float32)
    if inverted:
        levels, timesteps = np.float32(1) - levels, None
    times = levels * np.float32(num_train_timesteps) if timesteps is None else timesteps
    return SigmaGrid(as_float32(times), as_float32([*levels, 1.0 if inverted else 0.0]))


def twice(grid: SigmaGrid) -> SigmaGrid:
    """For two model calls a step: every timestep but the first stands twice, and so does its level."""
    times, sigmas = grid
    return SigmaGrid(
        (*times[:1], *(t for t in times[1:] for _ in range(2))),
        (*sigmas[:1], *(sigma for sigma in sigmas[1:-1] for _ in range(2)), sigmas[-1]),
    )


def once(grid: SigmaGrid, begin: int) -> tuple[SigmaGrid, int]:
    """The grid of which `grid` is `twice`, and the step at its index `begin`.

    Raises:
        ValueError: begin lies within a step.
    """
    if begin % 2:
        raise ValueError(f"a run cannot begin at index {begin}, within a step of two model calls")
    times = (*grid.timesteps[:1], *grid.timesteps[2::2])
    return SigmaGrid(times, (*grid.sigmas[:1], *grid.sigmas[1::2])[: len(times) + 1]), begin // 2
