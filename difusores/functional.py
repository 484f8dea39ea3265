"""Sampling with a denoiser and noise levels, for people who think like k-diffusion.

    sigmas = difusores.functional.get_sigmas_karras(20, 0.03, 80)
    x = torch.randn(4, 3, 64, 64) * sigmas[0]
    images = difusores.sample(denoiser, x, sigmas, "dpmpp_2m")

x = x0 + sigma * noise, and denoiser(x, sigma) predicts x0; sigma: [B]. `denoiser_from` makes one from a model
that predicts noise, v, x0 or a flow.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difusores import sampling, schedules
from difusores.plan import Noise, Plan, Stage
from difusores.sampling import Generators
from difusores.schedulers.base import advance, cached_stage
from difusores.solvers.common import Prediction
from difusores.solvers.kdiffusion import DENOISER_SOLVERS, dpm_step, euler_step, raise_level
from difusores.solvers.sigma import ancestral_levels

Denoiser = Callable[[Tensor, Tensor], Tensor]
NoiseSampler = Callable[[float, float], Tensor]
Callback = Callable[[dict[str, Any]], None]

SOLVERS = (*DENOISER_SOLVERS, "dpm_adaptive")
"""The names that `sample` takes."""

SHORTEST_STEP = 1e-5
"""In log(sigma), of "dpm_adaptive": where even this is too long, the denoiser is not smooth."""


def sample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    solver: str = "dpmpp_2m",
    *,
    generator: Generators = None,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
    **options: Any,
) -> Tensor:
    """Solve from sigmas[0] to sigmas[-1], without gradients.

    Args:
        denoiser: denoiser(x, sigma) -> x0, like x. sigma: [B], in x's dtype (fp32 for fp16 and bf16).
        x: [B, C, ...] of deviation sigmas[0]; fp32, fp64, fp16 or bf16. Not changed.
        sigmas: [n + 1] levels of n steps, strictly descending; the last one may be 0. Solvers that add no
            noise also take ascending ones, from an image to its noise.
        solver: one of SOLVERS; see `difusores.solvers.kdiffusion`, and `adaptive` for "dpm_adaptive".
        generator: source of the noise: one, one per image, or None for the global one.
        callback: called after the first call of the denoiser in each step with "i" (the step), "x", "sigma"
            (sigmas[i]), "sigma_hat" (what the denoiser was told, above it where s_churn raised the level) and
            "denoised", as in k-diffusion; of "dpm_fast" and "dpm_adaptive", whose steps are not those of
            sigmas, after each call, which "i" counts, with both levels the one that it was told. x is
            overwritten later: clone it to keep it.
        noise_sampler: noise_sampler(sigma, next sigma) -> standard normal noise like x, in place of the
            generator. "dpmpp_sde" asks it for spans that overlap, as a Brownian path gives them.
        options: of the solver: s_churn, s_tmin, s_tmax and s_noise; eta and s_noise; order, r, solver_type.

    Returns:
        The sample at sigmas[-1], a new tensor like x.

    Raises:
        ValueError: an unknown solver or option, or levels that it cannot take.
    """
    if x.ndim < 2:
        raise ValueError(f"x must have shape [B, C, ...], got {tuple(x.shape)}")
    if generator is not None and noise_sampler is not None:
        raise ValueError("the noise comes from a generator or from a noise_sampler, not from both")
    levels = _levels(sigmas)
    if solver == "dpm_adaptive":
        _check_options(solver, adaptive, options)
        common: dict[str, Any] = {
            "generator": generator,
            "callback": callback,
            "noise_sampler": noise_sampler,
        }
        return adaptive(denoiser, x, levels, **common, **options)
    _check_solver(solver)
    _check_options(solver, DENOISER_SOLVERS[solver], options)
    if noise_sampler is not None and solver == "dpmpp_sde":
        options["whole_spans"] = True
    steps = _plan(levels, solver, tuple(options.items()))
    times = [stage.time for stage in steps.stages if stage.calls_model]
    told = torch.tensor(times, dtype=_wide(x), device="cpu").to(x.device)
    calls = zip(times, told.unbind(), strict=True)
    call = _called(denoiser, callback, None if solver == "dpm_fast" else levels[:-1], len(times))

    def model(given: Tensor, _: Tensor) -> Tensor:
        return call(given, *next(calls))

    return sampling.sample(
        steps,
        model,
        x,
        generator=generator,
        callback=None,
        keys=None,
        weights=(1.0,),
        model_dtype=x.dtype,
        noise_sampler=None if noise_sampler is None else partial(_drawn, noise_sampler),
    )


def plan(sigmas: Tensor | Sequence[float], solver: str = "dpmpp_2m", **options: Any) -> Plan:
    """What `sample` carries out with these arguments; not of "dpm_adaptive", which chooses its steps.

    Raises:
        ValueError: as `sample`.
    """
    _check_solver(solver)
    _check_options(solver, DENOISER_SOLVERS[solver], options)
    return _plan(_levels(sigmas), solver, tuple(options.items()))


@lru_cache(maxsize=64)
def _plan(levels: tuple[float, ...], solver: str, options: tuple[tuple[str, Any], ...]) -> Plan:
    method = DENOISER_SOLVERS[solver]
    bound = inspect.signature(method).bind(levels, **dict(options))
    bound.apply_defaults()
    for name in ("eta", "s_churn", "s_noise"):
        value = bound.arguments.get(name, 0.0)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not below 0, got {value}")
    ascending = levels[1] > levels[0]
    if ascending and (solver == "ddpm" or bound.arguments.get("eta") or bound.arguments.get("s_churn")):
        raise ValueError(f"solver {solver!r} adds noise, on levels that ascend: use eta=0 and s_churn=0")
    stages = tuple(replace(stage, c_in=1.0) for stage in method(*bound.args, **bound.kwargs))
    return Plan(solver, stages, "sample", (), continuous=True, init_noise_sigma=levels[0])


def adaptive(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    generator: Generators = None,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Tensor:
    """Solver "dpm_adaptive": DPM-Solver with steps as long as two orders agree on (Lu et al. 2022).

    Of the levels it takes the first, the last and, if the last is 0, the one before, from which a last call
    leads to 0. After every attempt the norm of the error is *read from the device*, which waits for it: the
    one solver that does so.

    Args:
        order: 2 or 3, compared to the order below.
        rtol, atol: the error allowed, in proportion to the sample and absolute.
        h_init: length of the first step, in log(sigma).
        pcoeff, icoeff, dcoeff: of the PID controller of the length.
        accept_safety: an attempt is taken if the next one may be at least this much longer.
        eta, s_noise: noise after each step, as in `difusores.solvers.kdiffusion.dpm_fast`.

    The others as in `sample`.

    Raises:
        ValueError: an option or level that is not allowed; an error that is not finite, or that stays too
            large however short the step.
    """
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order}")
    levels = _levels(sigmas)
    if levels[1] > levels[0]:
        raise ValueError("dpm_adaptive takes levels that descend")
    end = levels[-1] or levels[-2]
    call = _called(denoiser, callback)

    def carry(stages: Iterable[Stage], x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        slots: tuple[Tensor, ...] = ()
        for stage in stages:
            told = torch.tensor(stage.time, dtype=_wide(x), device=x.device)
            e = call(x, stage.time, told) if stage.calls_model else x
            noise = None
            if stage.noise is not None and noise_sampler is not None:
                noise = _drawn(noise_sampler, stage.noise)
            (x, *_), slots = advance(cached_stage(stage, ("y",)), e, x, generator, noise, slots)
        return x, slots

    with torch.no_grad():
        sigma, previous = levels[0], x
        rate = 1 / (1.5 if eta else order)
        powers = (rate * (pcoeff + icoeff + dcoeff), -rate * (pcoeff + 2 * dcoeff), rate * dcoeff)
        controller = _StepSize(h_init, powers, accept_safety)
        while sigma > end * (1 + 1e-5):
            after = max(sigma * math.exp(-controller.h), end)
            if controller.h < SHORTEST_STEP:
                raise ValueError(f"no step at sigma = {sigma:g} is short enough for rtol={rtol}, atol={atol}")
            down = max(ancestral_levels(sigma, after, eta)[1], end) if eta else after
            high, (low,) = carry(dpm_step(order, sigma, down, compared=True), x)
            error = _relative_error(high, low, previous, rtol, atol)
            if not math.isfinite(error):
                raise ValueError(
                    f"the sample at sigma = {after:g} is not finite: what did the denoiser return?"
                )
            if controller.accepts(error):
                x, previous = high, low
                if after > down:
                    raised = raise_level(down, after, s_noise)
                    x, _ = carry([replace(raised, noise=Noise(span=(sigma, after)))], x)
                sigma = after
        if levels[-1] == 0:
            x, _ = carry(euler_step(end, 0.0), x)
    return x


class _StepSize:
    """PID control of the length of a step from the errors of the last ones."""

    def __init__(self, h: float, powers: tuple[float, float, float], safety: float) -> None:
        self.h, self.powers, self.safety = h, powers, safety
        self.inverse: list[float] = []

    def accepts(self, error: float) -> bool:
        """Whether the attempt is taken; `h` is the length of the next one."""
        inverse = 1 / (error + 1e-8)
        last = [inverse, *(self.inverse or [inverse, inverse])]
        factor = math.prod(value**power for value, power in zip(last, self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        accepted = factor >= self.safety
        self.inverse = last[:2] if accepted else last[1:]
        self.h *= factor
        return accepted


def _relative_error(high: Tensor, low: Tensor, previous: Tensor, rtol: float, atol: float) -> float:
    allowed = torch.maximum(low.abs(), previous.abs()).mul_(rtol).clamp_(min=atol)
    return float(torch.linalg.vector_norm((low - high) / allowed) / math.sqrt(high.numel()))


def _drawn(noise_sampler: NoiseSampler, noise: Noise, _: torch.dtype | None = None) -> Tensor:
    if noise.span is None:
        raise ValueError("this solver's noise is not of a Brownian path: use a generator")
    return noise_sampler(*noise.span)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _called(
    denoiser: Denoiser, callback: Callback | None, levels: Sequence[float] | None = None, total: int = 0
) -> Callable[[Tensor, float, Tensor], Tensor]:
    """The denoiser, which tells the callback of every call, or of `total` calls the first at each level."""
    calls = count()
    each = 2 if levels is not None and total > len(levels) else 1  # a step to 0 at the end takes one

    def call(x: Tensor, sigma: float, told: Tensor) -> Tensor:
        denoised = denoiser(x, told.expand(len(x)))
        step, within = divmod(next(calls), each)
        if callback is not None and within == 0:
            level = sigma if levels is None else levels[step]
            callback({"i": step, "x": x, "sigma": level, "sigma_hat": sigma, "denoised": denoised})
        return denoised

    return call


def _levels(sigmas: Tensor | Sequence[float]) -> tuple[float, ...]:
    """The levels as numbers.

    Raises:
        ValueError: fewer than two, not monotonic, not finite, below 0, or 0 before the end.
    """
    levels = tuple(map(float, sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas))
    if len(levels) < 2:
        raise ValueError(f"sigmas must hold at least two levels, got {len(levels)}")
    if not all(map(math.isfinite, levels)) or min(levels) < 0 or levels[0] == 0:
        raise ValueError(f"sigmas must be finite, above 0, and at the end not below, got {levels}")
    steps = [after - before for before, after in pairwise(levels)]
    if max(steps) >= 0 and min(steps) <= 0:
        raise ValueError(f"sigmas must descend, or ascend, from each to the next, got {levels}")
    return levels


def _check_solver(solver: str) -> None:
    if solver == "dpm_adaptive":
        raise ValueError("solver 'dpm_adaptive' has no plan: it chooses its steps while it runs")
    if solver not in DENOISER_SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")


def _check_options(solver: str, method: Callable[..., Any], options: dict[str, Any]) -> None:
    hidden = {"generator", "callback", "noise_sampler", "whole_spans"}
    parameters = inspect.signature(method).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in hidden]
    for name, value in options.items():
        if name not in allowed:
            known = f"its options are {', '.join(allowed)}" if allowed else "it has no options"
            raise ValueError(f"solver {solver!r} takes no {name}; {known}")
        if not isinstance(value, int | float | str):
            raise ValueError(f"{name} must be a number or a name, got {value!r}")


def denoiser_from(
    model: Callable[[Tensor, Tensor], Any],
    prediction_type: str = "epsilon",
    *,
    alphas_cumprod: Tensor | Sequence[float] | None = None,
    quantize: bool = False,
    num_train_timesteps: int = 1000,
) -> Denoiser:
    """A denoiser for `sample` from a model with other inputs and outputs.

    Args:
        model: model(input, time) -> output, or an output object or tuple that begins with it. input: x0 and
            noise in the proportions of training, like x. time: [B].
        prediction_type: "epsilon", "v_prediction" or "sample", for an input x / sqrt(sigma² + 1); or
            "flow_prediction", for an input x / (sigma + 1), the time then being T * sigma / (sigma + 1).
        alphas_cumprod: [T] of training: the time is a training step, interpolated in log(sigma). None: it is
            sigma itself. A 0 at the end, of zero terminal SNR, is left out.
        quantize: the training step is rounded to an integer (int64).
        num_train_timesteps: T of "flow_prediction".

    Raises:
        ValueError: an unknown prediction_type, or options that it leaves no room for.
    """
    Prediction(prediction_type)
    flow = prediction_type == "flow_prediction"
    if flow and alphas_cumprod is not None:
        raise ValueError("'flow_prediction' takes no alphas_cumprod: its time is T * sigma / (sigma + 1)")
    if quantize and alphas_cumprod is None:
        raise ValueError("quantize=True needs alphas_cumprod, whose steps are integers")
    table = None
    if alphas_cumprod is not None:
        a = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu()
        if a.ndim == 1 and len(a) > 2 and a[-1] == 0:
            a = a[:-1]  # of zero terminal SNR: the last level is infinite, and no sigma belongs to it
        if a.ndim != 1 or len(a) < 2 or not ((a > 0) & (a < 1)).all() or not (a.diff() < 0).all():
            raise ValueError("alphas_cumprod must hold at least two numbers that descend within 0 and 1")
        table = ((1 - a) / a).log() / 2

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, *([1] * (x.ndim - 1)))
        size = level + 1 if flow else (level * level + 1).sqrt()
        time = sigma
        if flow:
            time = num_train_timesteps * sigma / (sigma + 1)
        elif table is not None:
            time = _training_step(sigma, table.to(sigma))
            time = time.round().long() if quantize else time
        given = (x / size).to(x.dtype)
        output = model(given, time)
        output = output if isinstance(output, Tensor) else output[0]
        if prediction_type == "sample":
            return output
        if prediction_type == "epsilon":
            return (x - level * output).to(x.dtype)
        share = level / size
        return ((given if flow else x / (size * size)) - share * output).to(x.dtype)

    return denoiser


def _training_step(sigma: Tensor, table: Tensor) -> Tensor:
    """[B] places of sigma in a table of ascending log(sigma), between its entries too."""
    logarithm = sigma.log()
    low = (torch.searchsorted(table, logarithm.contiguous(), right=True) - 1).clamp(0, len(table) - 2)
    share = (logarithm - table[low]) / (table[low + 1] - table[low])
    return low + share.clamp(0, 1)


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1] float64: n levels from sigma_max to sigma_min (Karras et al. 2022, eq. 5), and 0."""
    return _with_zero(schedules.karras_sigmas(sigma_min, sigma_max, n, rho), device)


def get_sigmas_exponential(
    n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1] float64: n levels in equal steps of log(sigma), and 0."""
    return _with_zero(schedules.exponential_sigmas(sigma_min, sigma_max, n), device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """[n + 1] float64: n levels polynomial in log(sigma), of power rho, and 0."""
    ramp = np.linspace(1, 0, n) ** rho
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _with_zero(np.exp(low + ramp * (high - low)), device)


def get_sigmas_vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[n + 1] float64: n levels of the VP process (Song et al. 2021) at equal steps of time, and 0."""
    t = np.linspace(1, eps_s, n)
    return _with_zero(np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t)), device)


def _with_zero(levels: schedules.Array, device: torch.device | str) -> Tensor:
    return torch.tensor([*map(float, levels), 0.0], dtype=torch.float64, device=device)
