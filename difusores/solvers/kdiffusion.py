"""Samplers of denoisers D(x, sigma) over levels of the caller: x = x0 + sigma * noise, D predicts x0.

The names and options are those of k-diffusion. `sigmas` has one more element than there are steps; the last
one may be 0. Steps are measured in h = log(sigma / after). Noise that comes at the end of a step (an
ancestral step's, and what EDM's churn adds before the next call of the model) is part of its last row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise

from difusores.ops.scheduler_step import COLUMNS, W
from difusores.plan import Noise, Stage, make_row
from difusores.solvers.common import Prediction, churn_factor
from difusores.solvers.exponential import exponential_moments
from difusores.solvers.sigma import ancestral_levels, euler, heun, kdpm2, lms
from difusores.solvers.unipc import unipc

X0 = Prediction("sample")
IDENTITY = (0.0, 1.0)

Step = Callable[[float, float], Iterable[Stage]]
"""The stages from one level to a lower one, without noise."""


def euler_step(sigma: float, after: float) -> Iterator[Stage]:
    return euler((sigma,), (sigma, after), X0)


def heun_step(sigma: float, after: float) -> Iterator[Stage]:
    """Karras et al. 2022, algorithm 1."""
    if after == 0:
        return euler_step(sigma, after)
    return islice(heun((sigma, after), (sigma, after, 0.0), X0), 2)


def midpoint_step(sigma: float, after: float) -> Iterator[Stage]:
    """The second call of the model at the geometric mean of the levels."""
    if after == 0:
        return euler_step(sigma, after)
    middle = math.sqrt(sigma * after)
    return islice(kdpm2((sigma, after), (sigma, after, 0.0), X0, middles=[(middle, middle)]), 2)


def dpmpp_2s_step(sigma: float, after: float) -> Iterator[Stage]:
    """DPM-Solver++(2S) (Lu et al. 2022, "DPM-Solver++", algorithm 1, r = 1/2)."""
    if after == 0:
        yield from euler_step(sigma, after)
        return
    middle = math.sqrt(sigma * after)
    yield Stage(sigma, make_row(IDENTITY, _towards("xh", middle / sigma)), slots=("x",))
    yield Stage(middle, make_row(IDENTITY, _towards("s0", after / sigma)))


def dpm_step(order: int, sigma: float, after: float, *, compared: bool = False) -> Iterator[Stage]:
    """A step of DPM-Solver-1, -2 or -3 (Lu et al. 2022, "DPM-Solver", algorithms 1, 2 and 4).

    Args:
        compared: slot 0 holds the result of the order below at the end, from the same calls of the model;
            order 2 or 3.
    """
    if order == 1:
        yield from euler_step(sigma, after)
        return
    h = math.log(sigma / after)
    share = 1 / order
    first = sigma * math.exp(-share * h)
    slope = X0.slope_at(sigma)
    low = _along("xh", slope, after - sigma) if compared and order == 2 else None
    yield Stage(
        sigma,
        make_row(IDENTITY, _along("xh", slope, first - sigma), slope, low),
        slots=("x", "d", "u") if low else ("x", "d"),
    )

    def result(level: float, end: float, bend: float) -> dict[str, float]:
        """From the step's beginning to `end`, with the second difference of the slopes."""
        y = _along("s0", X0.slope_at(level), bend)
        y["s1"] = end - sigma - bend
        return y

    straight = result(first, after, (after - sigma) / (2 * share))
    if order == 2:
        yield Stage(first, make_row(IDENTITY, straight), slots=("s2",) if compared else ())
        return
    second = sigma * math.exp(-2 * share * h)
    y = result(first, second, -2 * second * _excess(2 * share * h))
    yield Stage(
        first,
        make_row(IDENTITY, y, None, straight if compared else None),
        slots=("s0", "s1", "u") if compared else ("s0", "s1"),
    )
    y = result(second, after, -after * _excess(h) / (2 * share))
    yield Stage(second, make_row(IDENTITY, y), slots=("s2",) if compared else ())


def _excess(h: float) -> float:
    """(e^h - 1) / h - 1."""
    return h * math.exp(h) * exponential_moments(-h, 2)[1]


def churned(
    step: Step,
    sigmas: Sequence[float],
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Stage]:
    """Karras et al. 2022, algorithm 2: noise raises the level before a step, which then begins up there.

    Args:
        s_churn: shared out over the steps; a level is raised by at most a factor of sqrt(2).
        s_tmin, s_tmax: the levels that are raised.
        s_noise: factor of the noise.
    """
    gamma = churn_factor(s_churn, len(sigmas) - 1)
    raised = [sigma * (1 + gamma) if s_tmin <= sigma <= s_tmax else sigma for sigma in sigmas[:-1]]
    if raised[0] > sigmas[0]:
        yield raise_level(sigmas[0], raised[0], s_noise)
    for sigma, after, next_raised in zip(raised, sigmas[1:], [*raised[1:], sigmas[-1]], strict=True):
        added = s_noise * math.sqrt(next_raised**2 - after**2)
        yield from then_noise(step(sigma, after), added, (after, next_raised))


def ancestral(
    step: Step, sigmas: Sequence[float], *, eta: float = 1.0, s_noise: float = 1.0
) -> Iterator[Stage]:
    """To a lower level, then fresh noise up to the next one.

    With Euler's step this is, seen from x0, the posterior of DDPM (Ho et al. 2020, eq. 6) for eta = 1 and
    DDIM (Song et al. 2021, eq. 12) for every eta.

    Args:
        eta: 0 adds no noise, 1 as much as the process of training lost.
        s_noise: factor of the noise.
    """
    for sigma, after in pairwise(sigmas):
        up, down = ancestral_levels(sigma, after, eta)
        yield from then_noise(step(sigma, down), s_noise * up, (sigma, after))


def raise_level(sigma: float, after: float, s_noise: float = 1.0) -> Stage:
    """Noise alone, without a call of the model."""
    weight = s_noise * math.sqrt(after**2 - sigma**2)
    row = make_row((0.0, 0.0), {"xh": 1.0, "z": weight})
    return Stage(sigma, row, noise=Noise(span=(sigma, after)), calls_model=False)


def then_noise(stages: Iterable[Stage], weight: float, span: tuple[float, float]) -> Iterator[Stage]:
    """The stages of a step, the last one with noise of this weight; none is drawn for a weight of 0."""
    *before, last = stages
    yield from before
    if weight:
        row = list(last.row)
        row[W + COLUMNS.index("z")] = weight
        last = replace(last, row=tuple(row), noise=Noise(span=span))
    yield last


def dpmpp_sde(
    sigmas: Sequence[float],
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    whole_spans: bool = False,
) -> Iterator[Stage]:
    """DPM-Solver++ as a stochastic solver of two calls a step (Lu et al. 2022, "DPM-Solver++", appendix).

    A step and its middle see the same Brownian path.

    Args:
        r: where the middle is, as a share of h.
        whole_spans: z of the second call belongs to the whole step, not to the part behind the middle.
    """
    if not 0 < r <= 1:
        raise ValueError(f"r must lie above 0 and up to 1, got {r}")
    for sigma, after in pairwise(sigmas):
        if after == 0:
            yield from euler_step(sigma, after)
            return
        middle = sigma * (after / sigma) ** r
        up, down = ancestral_levels(sigma, middle, eta)
        y = {**_towards("xh", down / sigma), "z": s_noise * up}
        noise = Noise(span=(sigma, middle)) if up else None
        slots = ("x", "x0", "z") if up else ("x", "x0")
        yield Stage(sigma, make_row(IDENTITY, y), noise=noise, slots=slots)
        up, down = ancestral_levels(sigma, after, eta)
        factor = (1 - down / sigma) / (2 * r)
        y = {"s0": down / sigma, "x0": factor, "s1": 1 - down / sigma - factor, "z": s_noise * up}
        if up and not whole_spans:
            known = (sigma - middle) / (sigma - after)
            y["s2"] = s_noise * up * math.sqrt(known)
            y["z"] = s_noise * up * math.sqrt(1 - known)
        span = (sigma if whole_spans else middle, after)
        yield Stage(middle, make_row(IDENTITY, y), noise=Noise(span=span) if up else None)


MULTISTEP_TYPES = ("midpoint", "heun")


def dpmpp_multistep(
    sigmas: Sequence[float],
    *,
    order: int,
    eta: float = 0.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
) -> Iterator[Stage]:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2); with noise for eta > 0.

    With three x0, the second difference counts half of what the polynomial through them says, as it does in
    the authors' code and in k-diffusion: the name is `3m`, the order stays 2.

    Args:
        order: how many x0, 2 or 3; the first steps have fewer, and a last one to 0 has one.
        eta: 1 is the stochastic differential equation backwards in time.
        s_noise: factor of the noise.
        solver_type: "midpoint" or "heun", with two x0.
    """
    if solver_type not in MULTISTEP_TYPES:
        raise ValueError(f"solver_type must be 'midpoint' or 'heun', got {solver_type!r}")
    lengths: list[float] = []  # of the steps before, the newest first
    for sigma, after in pairwise(sigmas):
        if after == 0:
            yield Stage(sigma, make_row(IDENTITY, {"x0": 1.0}))
            return
        h = math.log(sigma / after)
        rate = h * (1 + eta)
        y = _towards("xh", math.exp(-rate))
        first, second = (math.exp(-rate) * moment for moment in exponential_moments(rate, 3)[1:])
        phi2, phi3 = rate * first, rate * second / 2
        if lengths:
            r0 = lengths[0] / h
            slope = {"x0": 1 / r0, "s0": -1 / r0}
            factor = -math.expm1(-rate) / 2 if order == 2 and solver_type == "midpoint" else phi2
            if order == 3 and len(lengths) > 1:
                r1 = lengths[1] / h
                before = {"s0": 1 / r1, "s1": -1 / r1}
                bend = _sum((1 / (r0 + r1), slope), (-1 / (r0 + r1), before))
                slope = _sum((1.0, slope), (r0, bend))
                y = _sum((1.0, y), (phi3, bend))
            y = _sum((1.0, y), (factor, slope))
        y["z"] = s_noise * after * math.sqrt(-math.expm1(-2 * eta * h))
        lengths = [h, *lengths][: order - 1]
        noise = Noise(span=(sigma, after)) if y["z"] else None
        yield Stage(sigma, make_row(IDENTITY, y), noise=noise, slots=("x0", "s0")[: len(lengths)])


def dpm_fast(sigmas: Sequence[float], *, eta: float = 0.0, s_noise: float = 1.0) -> Iterator[Stage]:
    """DPM-Solver-fast (Lu et al. 2022, "DPM-Solver", section 3.4): as many calls as `sigmas` has steps.

    Of the levels it takes the first, the last and, if the last is 0, the one before, from which the last call
    leads to 0. Those between are its own, in equal steps of log(sigma).
    """
    *levels, end = sigmas
    if end > 0:
        levels.append(end)
    calls = len(levels) - 1
    if calls:
        orders = [3] * (calls // 3 - 1) + [2, 1] if calls % 3 == 0 else [3] * (calls // 3) + [calls % 3]
        top, bottom = levels[0], levels[-1]
        grid = [top * (bottom / top) ** (k / len(orders)) for k in range(len(orders))] + [bottom]
        for order, sigma, after in zip(orders, grid, grid[1:], strict=False):
            down = max(ancestral_levels(sigma, after, eta)[1], bottom) if eta else after
            up = math.sqrt(max(after**2 - down**2, 0.0))
            yield from then_noise(dpm_step(order, sigma, down), s_noise * up, (sigma, after))
    if end == 0:
        yield from euler_step(levels[-1], end)


def _lms(sigmas: Sequence[float], *, order: int = 4) -> Iterator[Stage]:
    return lms(sigmas[:-1], sigmas, X0, order=order)


def _dpmpp_2m(sigmas: Sequence[float]) -> Iterator[Stage]:
    return dpmpp_multistep(sigmas, order=2)


def _dpmpp_2m_sde(
    sigmas: Sequence[float], *, eta: float = 1.0, s_noise: float = 1.0, solver_type: str = "midpoint"
) -> Iterator[Stage]:
    return dpmpp_multistep(sigmas, order=2, eta=eta, s_noise=s_noise, solver_type=solver_type)


def _dpmpp_3m_sde(sigmas: Sequence[float], *, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Stage]:
    return dpmpp_multistep(sigmas, order=3, eta=eta, s_noise=s_noise)


def _unipc(sigmas: Sequence[float], *, order: int = 3, solver_type: str = "bh2") -> Iterator[Stage]:
    if solver_type not in ("bh1", "bh2"):
        raise ValueError(f"solver_type must be 'bh1' or 'bh2', got {solver_type!r}")
    levels = [(1.0, sigma) for sigma in sigmas]
    return unipc(sigmas[:-1], levels, X0, order=order, solver_type=solver_type)


def _ddpm(sigmas: Sequence[float], *, s_noise: float = 1.0) -> Iterator[Stage]:
    return ancestral(euler_step, sigmas, s_noise=s_noise)


DENOISER_SOLVERS: Mapping[str, Callable[..., Iterator[Stage]]] = {
    "euler": partial(churned, euler_step),
    "euler_ancestral": partial(ancestral, euler_step),
    "heun": partial(churned, heun_step),
    "dpm_2": partial(churned, midpoint_step),
    "dpm_2_ancestral": partial(ancestral, midpoint_step),
    "lms": _lms,
    "dpmpp_2s_ancestral": partial(ancestral, dpmpp_2s_step),
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m": _dpmpp_2m,
    "dpmpp_2m_sde": _dpmpp_2m_sde,
    "dpmpp_3m_sde": _dpmpp_3m_sde,
    "dpm_fast": dpm_fast,
    "unipc": _unipc,
    "ddpm": _ddpm,
    "ddim": partial(ancestral, euler_step, eta=0.0),
}
"""Solvers by name: solver(sigmas, **options) -> stages."""


def _towards(name: str, share: float) -> dict[str, float]:
    """Weights of what is left of a sample on its way to x0."""
    return {name: share, "x0": 1 - share}


def _along(name: str, slope: Mapping[str, float], distance: float) -> dict[str, float]:
    """Weights of a sample + distance * slope."""
    return _sum((1.0, {name: 1.0}), (distance, slope))


def _sum(*terms: tuple[float, Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for factor, weights in terms:
        for name, weight in weights.items():
            found[name] = found.get(name, 0.0) + factor * weight
    return found
