"""`difusores.sample`: exact solutions of Gaussian data, solvers written out by hand, and the interface.

Data N(mu, s²) has the denoiser D(x, sigma) = (s² x + sigma² mu) / (s² + sigma²), and the probability flow
leads from x at sigma0 to mu + (x - mu) sqrt((s² + sigma²) / (s² + sigma0²)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import difusores
from difusores import functional, solvers
from difusores.brownian import BrownianNoise
from difusores.plan import Plan
from difusores.solvers.kdiffusion import DENOISER_SOLVERS

MU, S = 0.3, 0.7
TOP, BOTTOM = 20.0, 0.05


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    v = (sigma**2).reshape(-1, *([1] * (x.ndim - 1)))
    return (S**2 * x + v * MU) / (S**2 + v)


def nonlinear(x: Tensor, sigma: Tensor) -> Tensor:
    sigma = sigma.reshape(-1, *([1] * (x.ndim - 1)))
    return torch.tanh(x / (1 + sigma**2)) * (1 + sigma) / (2 + sigma)


def flow(x: Tensor, start: float, end: float) -> Tensor:
    return MU + (x - MU) * math.sqrt((S**2 + end**2) / (S**2 + start**2))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(n: int, top: float = TOP, bottom: float = BOTTOM) -> Tensor:
    return functional.get_sigmas_exponential(n + 1, bottom, top)[:-1]


def slope(steps: list[int], errors: list[float]) -> float:
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


ORDERS: dict[str, tuple[dict[str, Any], float]] = {
    "euler": ({}, 1),
    "ddim": ({}, 1),
    "euler_ancestral": ({"eta": 0.0}, 1),
    "heun": ({}, 2),
    "dpm_2": ({}, 2),
    "dpm_2_ancestral": ({"eta": 0.0}, 2),
    "dpmpp_2s_ancestral": ({"eta": 0.0}, 2),
    "dpmpp_sde": ({"eta": 0.0, "r": 0.4}, 2),
    "dpmpp_2m": ({}, 2),
    "dpmpp_2m_sde": ({"eta": 0.0, "solver_type": "heun"}, 2),
    "dpmpp_3m_sde": ({"eta": 0.0}, 2),
    "lms": ({"order": 3}, 3),
    "dpm_fast": ({}, 3),
    "unipc": ({"order": 1}, 2),  # the corrector adds one
}


def test_every_solver_shows_its_order() -> None:
    """The slope of the error over the steps, in float64; 3 divides none of the steps + 1 (dpm_fast)."""
    x = TOP * randn(2, 50)
    for name, (options, order) in ORDERS.items():
        steps, errors = [80, 161, 320], []
        top = 2000.0 if order == 3 else TOP  # the first steps, of lower orders, then are exact enough
        for n in steps:
            result = difusores.sample(gaussian, x, grid(n, top), name, **options)
            errors.append(float((result - flow(x, top, BOTTOM)).abs().max()))
        assert abs(slope(steps, errors) - order) < 0.3, (name, slope(steps, errors), errors)


def test_all_solvers_are_tested() -> None:
    stochastic = {name for name, _, _, _ in MARGINALS}
    assert {*ORDERS, *stochastic, "dpm_adaptive"} == set(functional.SOLVERS)


# solver, options, weak order, the largest error of 160 steps relative to the variance
MARGINALS: list[tuple[str, dict[str, Any], float, float]] = [
    ("ddpm", {}, 1, 0.1),
    ("ddim", {"eta": 0.5}, 1, 0.1),
    ("euler_ancestral", {}, 1, 0.1),
    ("dpm_2_ancestral", {}, 1, 0.1),
    ("dpmpp_2s_ancestral", {}, 1, 0.1),
    ("dpmpp_sde", {}, 1, 0.1),
    ("dpmpp_sde", {"eta": 0.4, "r": 0.7}, 1, 0.1),
    ("dpmpp_2m_sde", {}, 2, 0.01),
    ("dpmpp_2m_sde", {"eta": 0.4, "solver_type": "heun"}, 2, 0.01),
    ("dpmpp_3m_sde", {}, 2, 0.01),
    ("dpm_fast", {"eta": 1.0}, 1, 0.1),
    ("euler", {"s_churn": 8.0}, 1, 0.1),
    ("heun", {"s_churn": 8.0, "s_tmax": 5.0}, 1, 0.1),
    ("dpm_2", {"s_churn": 8.0}, 1, 0.1),
]


def marginal(name: str, options: dict[str, Any], n: int) -> tuple[float, float]:
    """Mean and variance at the end, exactly: the denoiser is affine, and so is the sample in the noise.

    Image 0 begins at 0 and gets no noise, image 1 begins at 1, image k + 2 gets 1 in its k-th draw.
    """
    spans: list[tuple[float, float]] = []
    draws = sum(stage.noise is not None for stage in functional.plan(grid(n), name, **options).stages)

    def noise(start: float, end: float) -> Tensor:
        spans.append((start, end))
        z = torch.zeros(draws + 2, 1, dtype=torch.float64)
        z[len(spans) + 1] = 1
        return z

    x = torch.zeros(draws + 2, 1, dtype=torch.float64)
    x[1] = 1
    result = difusores.sample(gaussian, x, grid(n), name, noise_sampler=noise, **options)[:, 0]
    assert len(spans) == draws
    constant, weights = result[0], result[1:] - result[0]
    covariance = torch.eye(draws, dtype=torch.float64)
    if name == "dpmpp_sde":  # two increments of one Brownian path, one within the other
        for k, ((a, b), (c, d)) in enumerate(pairwise(spans)):
            overlap = max(0.0, min(a, c) - max(b, d))
            covariance[k, k + 1] = covariance[k + 1, k] = overlap / math.sqrt((a - b) * (c - d))
    variance = weights[0] ** 2 * (S**2 + TOP**2) + weights[1:] @ covariance @ weights[1:]
    return float(constant + weights[0] * MU), float(variance)


@pytest.mark.parametrize(("name", "options", "order", "limit"), MARGINALS)
def test_every_stochastic_solver_has_the_right_marginals(
    name: str, options: dict[str, Any], order: float, limit: float
) -> None:
    right, steps, errors = S**2 + BOTTOM**2, [40, 80, 160], []
    for n in steps:
        mean, variance = marginal(name, options, n)
        assert abs(mean - MU) < 1e-9
        errors.append(abs(variance - right) / right)
    assert errors[-1] < limit and slope(steps, errors) > order - 0.3, (slope(steps, errors), errors)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "dpmpp_3m_sde"])
def test_drawn_noise_has_the_right_marginals(name: str) -> None:
    x = MU + math.sqrt(S**2 + TOP**2) * randn(400, 1000)
    result = difusores.sample(gaussian, x, grid(40), name, generator=torch.Generator().manual_seed(1))
    mean, variance = marginal(name, {}, 40)
    error = math.sqrt(variance / x.numel())
    assert abs(result.mean() - mean) < 5 * error
    assert abs(result.var() / variance - 1) < 5 * math.sqrt(2 / x.numel())


# The solvers as tensor code. D: denoiser at a float level, z: a list of noise, used up from the front.
D = Callable[[Tensor, float], Tensor]


def edm(d: D, x: Tensor, sigmas: list[float], z: list[Tensor], correct: bool = True, **o: float) -> Tensor:
    """Karras et al. 2022, algorithm 2; Euler without the correction."""
    n = len(sigmas) - 1
    for t, after in pairwise(sigmas):
        gamma = min(o["s_churn"] / n, math.sqrt(2) - 1) if o["s_tmin"] <= t <= o["s_tmax"] else 0.0
        hat = t + gamma * t
        if gamma > 0:
            x = x + math.sqrt(hat**2 - t**2) * o["s_noise"] * z.pop(0)
        slope = (x - d(x, hat)) / hat
        euler = x + (after - hat) * slope
        if after != 0 and correct:
            euler = x + (after - hat) * (slope / 2 + (euler - d(euler, after)) / (2 * after))
        x = euler
    return x


def euler_churn(d: D, x: Tensor, sigmas: list[float], z: list[Tensor], **o: float) -> Tensor:
    return edm(d, x, sigmas, z, correct=False, **o)


def dpm_2_churn(d: D, x: Tensor, sigmas: list[float], z: list[Tensor], **o: float) -> Tensor:
    """DPM-Solver-2 of Lu et al. 2022 in Karras et al.'s variables: the midpoint rule."""
    for i, (t, after) in enumerate(pairwise(sigmas)):
        hat = t * (1 + min(o["s_churn"] / (len(sigmas) - 1), math.sqrt(2) - 1))
        if not o["s_tmin"] <= t <= o["s_tmax"]:
            hat = t
        if hat > t:
            x = x + math.sqrt(hat**2 - t**2) * o["s_noise"] * z.pop(0)
        slope = (x - d(x, hat)) / hat
        if i < len(sigmas) - 2:
            middle = math.exp((math.log(hat) + math.log(after)) / 2)
            between = x + (middle - hat) * slope
            slope = (between - d(between, middle)) / middle
        x = x + (after - hat) * slope
    return x


def levels_of(t: float, after: float, eta: float) -> tuple[float, float]:
    up = min(after, eta * math.sqrt(after**2 * (t**2 - after**2) / t**2))
    return up, math.sqrt(max(after**2 - up**2, 0.0))


def euler_ancestral(d: D, x: Tensor, sigmas: list[float], z: list[Tensor], **o: float) -> Tensor:
    for t, after in pairwise(sigmas):
        up, down = levels_of(t, after, o["eta"])
        x = x + (down - t) * (x - d(x, t)) / t
        if up > 0:
            x = x + o["s_noise"] * up * z.pop(0)
    return x


def dpm_2_ancestral(d: D, x: Tensor, sigmas: list[float], z: list[Tensor], **o: float) -> Tensor:
    for t, after in pairwise(sigmas):
        up, down = levels_of(t, after, o["eta"])
        slope = (x - d(x, t)) / t
        if down > 0:
            middle = math.sqrt(t * down)
            between = x + (middle - t) * slope
            slope = (between - d(between, middle)) / middle
        x = x + (down - t) * slope
        if up > 0:
            x = x + o["s_noise"] * up * z.pop(0)
    return x


def dpmpp_2s(d: D, x: Tensor, sigmas: list[float], z: list[Tensor], **o: float) -> Tensor:
    """Lu et al. 2022, "DPM-Solver++", algorithm 1 with alpha = 1, r = 1/2."""
    for t, after in pairwise(sigmas):
        up, down = levels_of(t, after, o["eta"])
        if down == 0:
            x = d(x, t)
            continue
        h = -math.log(down) + math.log(t)
        s = math.exp(math.log(t) - h / 2)
        u = s / t * x - math.expm1(-h / 2) * d(x, t)
        x = down / t * x - math.expm1(-h) * d(u, s)
        if up > 0:
            x = x + o["s_noise"] * up * z.pop(0)
    return x


def dpmpp_sde(d: D, x: Tensor, sigmas: list[float], z: list[Tensor], **o: float) -> Tensor:
    for t, after in pairwise(sigmas):
        if after == 0:
            x = d(x, t)
            continue
        r, first = o["r"], d(x, t)
        s = math.exp((1 - r) * math.log(t) + r * math.log(after))
        up, down = levels_of(t, s, o["eta"])
        here = z.pop(0)
        u = down / t * x + (1 - down / t) * first + o["s_noise"] * up * here
        second = (1 - 1 / (2 * r)) * first + 1 / (2 * r) * d(u, s)
        up, down = levels_of(t, after, o["eta"])
        # a Brownian path from t to `after` by way of s
        whole = (math.sqrt(t - s) * here + math.sqrt(s - after) * z.pop(0)) / math.sqrt(t - after)
        x = down / t * x + (1 - down / t) * second + o["s_noise"] * up * whole
    return x


def dpmpp_2m(d: D, x: Tensor, sigmas: list[float], z: list[Tensor], **o: Any) -> Tensor:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2; with eta the integral of the SDE."""
    old, last, eta = None, 0.0, o.get("eta", 0.0)
    for t, after in pairwise(sigmas):
        m = d(x, t)
        if after == 0:
            x = m
            continue
        h = math.log(t / after)
        factor = 1 - math.exp(-(1 + eta) * h)
        new = after / t * math.exp(-eta * h) * x + factor * m
        if old is not None:
            r = last / h
            heun = 1 - factor / ((1 + eta) * h)
            new = new + (heun if o.get("solver_type") == "heun" else factor / 2) * (m - old) / r
        if eta > 0:
            new = new + o["s_noise"] * after * math.sqrt(1 - math.exp(-2 * eta * h)) * z.pop(0)
        x, old, last = new, m, h
    return x


def dpmpp_3m(d: D, x: Tensor, sigmas: list[float], z: list[Tensor], **o: float) -> Tensor:
    """Exponential integrator: e^(-a (h - w)) integrated numerically against x0 as a polynomial in w.

    Its quadratic term is half that of the polynomial through the last three x0, as in the authors' code.
    """
    history: list[tuple[float, Tensor]] = []
    places, weights = np.polynomial.legendre.leggauss(40)
    for t, after in pairwise(sigmas):
        m = d(x, t)
        if after == 0:
            x = m
            continue
        h, a = math.log(t / after), 1 + o["eta"]
        history = [(-math.log(t), m), *history][:3]
        w = h / 2 * (places + 1)
        zeroth, first, second = (
            float(h / 2 * weights @ (a * np.exp(-a * (h - w)) * w**power)) for power in range(3)
        )
        new = math.exp(-a * h) * x + zeroth * m
        slopes = [(p - q) / (lp - lq) for (lp, p), (lq, q) in pairwise(history)]
        bend = torch.zeros_like(x)
        if len(slopes) == 2:
            bend = (slopes[0] - slopes[1]) / (history[0][0] - history[2][0])
        if slopes:
            slope = slopes[0] + bend * (history[0][0] - history[1][0])
            new = new + first * slope + second * bend / 2
        if o["eta"] > 0:
            new = new + o["s_noise"] * after * math.sqrt(1 - math.exp(-2 * o["eta"] * h)) * z.pop(0)
        x = new
    return x


def lms(d: D, x: Tensor, sigmas: list[float], z: list[Tensor], **o: Any) -> Tensor:
    slopes: list[Tensor] = []
    places, weights = np.polynomial.legendre.leggauss(10)
    for i, (t, after) in enumerate(pairwise(sigmas)):
        slopes = [(x - d(x, t)) / t, *slopes][: o["order"]]
        w = (after + t) / 2 + (after - t) / 2 * places
        nodes = sigmas[i::-1][: len(slopes)]
        for k, slope in enumerate(slopes):
            others = [(w - n) / (nodes[k] - n) for j, n in enumerate(nodes) if j != k]
            x = x + float((after - t) / 2 * weights @ np.prod(others or [w * 0 + 1], axis=0)) * slope
    return x


def dpm_fast(d: D, x: Tensor, sigmas: list[float], z: list[Tensor], **o: float) -> Tensor:
    """Lu et al. 2022, "DPM-Solver", algorithms 1 and 2 with alpha = 1, then section 3.4."""
    end = sigmas[-1] or sigmas[-2]
    calls = len(sigmas) - 1 - (sigmas[-1] == 0)
    left = calls % 3
    orders = [3] * (calls // 3 - 1) + [2, 1] if left == 0 else [3] * (calls // 3) + [left]
    lambdas = np.linspace(-math.log(sigmas[0]), -math.log(end), len(orders) + 1).tolist()

    def eps(x: Tensor, la: float) -> Tensor:
        return (x - d(x, math.exp(-la))) * math.exp(la)

    for order, (la, goal) in zip(orders, pairwise(lambdas), strict=True):
        up, down = levels_of(math.exp(-la), math.exp(-goal), o["eta"])
        down = max(down, end)
        up = math.sqrt(max(math.exp(-goal) ** 2 - down**2, 0.0))
        h = -math.log(down) - la
        e = eps(x, la)
        if order == 1:
            new = x - down * math.expm1(h) * e
        elif order == 2:
            u = x - math.exp(-la - h / 2) * math.expm1(h / 2) * e
            new = x - down * math.expm1(h) * eps(u, la + h / 2)
        else:
            s1, s2 = la + h / 3, la + 2 * h / 3
            u = x - math.exp(-s1) * math.expm1(h / 3) * e
            d1 = eps(u, s1) - e
            curved = math.expm1(2 * h / 3) / (2 * h / 3) - 1
            u = x - math.exp(-s2) * (math.expm1(2 * h / 3) * e + 2 * curved * d1)
            d2 = eps(u, s2) - e
            new = x - down * (math.expm1(h) * e + 1.5 * (math.expm1(h) / h - 1) * d2)
        x = new
        if up > 1e-9:
            x = x + o["s_noise"] * up * z.pop(0)
    return d(x, end) if sigmas[-1] == 0 else x


CHURN = {"s_churn": 3.0, "s_tmin": 0.3, "s_tmax": 12.0, "s_noise": 1.1}
STILL = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
WILD = {"s_churn": 100.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
SOME, ALL = {"eta": 0.7, "s_noise": 1.1}, {"eta": 1.0, "s_noise": 1.0}
BY_HAND: list[tuple[str, Any, dict[str, Any]]] = [
    *(("euler", euler_churn, options) for options in (STILL, CHURN, WILD)),
    *(("heun", edm, options) for options in (STILL, CHURN, WILD)),
    *(("dpm_2", dpm_2_churn, options) for options in (STILL, CHURN, WILD)),
    *(("euler_ancestral", euler_ancestral, options) for options in (SOME, ALL)),
    *(("ddim", euler_ancestral, options) for options in (SOME, ALL)),
    *(("dpm_2_ancestral", dpm_2_ancestral, options) for options in (SOME, ALL)),
    *(("dpmpp_2s_ancestral", dpmpp_2s, options) for options in (SOME, ALL)),
    *(("dpmpp_sde", dpmpp_sde, {**options, "r": r}) for options in (SOME, ALL) for r in (0.5, 0.3)),
    ("dpmpp_2m", dpmpp_2m, {}),
    *(("dpmpp_2m_sde", dpmpp_2m, options) for options in (SOME, ALL)),
    ("dpmpp_2m_sde", dpmpp_2m, {**SOME, "solver_type": "heun"}),
    *(("dpmpp_3m_sde", dpmpp_3m, options) for options in (SOME, ALL)),
    *(("lms", lms, {"order": order}) for order in (1, 2, 4, 6)),
    *(("dpm_fast", dpm_fast, options) for options in (SOME, {"eta": 0.0, "s_noise": 1.0})),
]


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize(("name", "by_hand", "options"), BY_HAND)
def test_agrees_with_the_solver_written_out(
    name: str, by_hand: Any, options: dict[str, Any], to_zero: bool, steps: int
) -> None:
    sigmas = functional.get_sigmas_karras(steps + (not to_zero), BOTTOM, TOP)
    sigmas = sigmas if to_zero else sigmas[:-1]
    if name == "dpm_fast" and to_zero and steps == 1:
        by_hand = euler_ancestral
    if name in ("dpm_2", "dpm_2_ancestral") and not to_zero and name == "dpm_2":
        sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    x, seed = TOP * randn(2, 3, 4), 7
    generator = torch.Generator().manual_seed(seed)
    result = difusores.sample(nonlinear, x, sigmas, name, generator=generator, **options)
    source = torch.Generator().manual_seed(seed)
    z = [torch.randn(x.shape, generator=source, dtype=x.dtype) for _ in range(2 * len(sigmas))]

    def d(x: Tensor, sigma: float) -> Tensor:
        return nonlinear(x, torch.full((len(x),), sigma, dtype=x.dtype))

    torch.testing.assert_close(result, by_hand(d, x, sigmas.tolist(), z, **options), rtol=1e-9, atol=1e-9)


def test_dpmpp_2m_is_the_multistep_solver_in_noise_levels() -> None:
    sigmas = functional.get_sigmas_karras(6, BOTTOM, TOP).tolist()
    rows = [stage.row for stage in functional.plan(sigmas, "dpmpp_2m").stages]
    levels = [(1.0, sigma) for sigma in sigmas]
    other = solvers.dpm_multistep(sigmas[:-1], levels, solvers.Prediction("sample"), lower_order_final=False)
    for row, stage in zip(rows, other, strict=True):
        assert row[12:39] == pytest.approx(stage.row[12:39], rel=1e-12, abs=1e-14)


def test_unipc_of_order_one_corrects_with_the_trapezoidal_rule() -> None:
    """Zhao et al. 2023: B(h) = e^h - 1, weights 1/2."""
    a, b, c = 5.0, 2.0, 0.7
    x = 5 * randn(2, 3)
    m = nonlinear(x, torch.full((2,), a, dtype=x.dtype))
    predicted = b / a * x + (1 - b / a) * m
    after = nonlinear(predicted, torch.full((2,), b, dtype=x.dtype))
    corrected = b / a * x + (1 - b / a) * (m + after) / 2
    expected = c / b * corrected + (1 - c / b) * after
    result = difusores.sample(nonlinear, x, [a, b, c], "unipc", order=1)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_steps_reach_the_tolerance(order: int) -> None:
    x, errors, counts = TOP * randn(2, 50), [], []
    for rtol in (1e-2, 1e-4, 1e-6):
        calls: list[dict[str, Any]] = []
        result = difusores.sample(
            gaussian,
            x,
            [TOP, BOTTOM],
            "dpm_adaptive",
            order=order,
            rtol=rtol,
            atol=rtol / 10,
            callback=calls.append,
        )
        errors.append(float((result - flow(x, TOP, BOTTOM)).abs().max()))
        counts.append(len(calls))
        assert errors[-1] < 10 * rtol and {call["i"] for call in calls} == set(range(len(calls)))
    assert counts[0] < counts[1] < counts[2] and errors[0] > errors[1] > errors[2]
    end = difusores.sample(gaussian, x, [TOP, 1.0, BOTTOM, 0.0], "dpm_adaptive", rtol=1e-6, atol=1e-7)
    reached = flow(x, TOP, BOTTOM)
    torch.testing.assert_close(end, gaussian(reached, torch.full((2,), BOTTOM)), atol=1e-4, rtol=0)


def test_adaptive_steps_with_noise_have_the_right_marginals() -> None:
    x = MU + math.sqrt(S**2 + TOP**2) * randn(400, 500)
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"eta": 1.0, "rtol": 1e-3, "atol": 1e-3, "h_init": 0.01}
    result = difusores.sample(gaussian, x, [TOP, BOTTOM], "dpm_adaptive", generator=generator, **options)
    assert abs(result.mean() - MU) < 0.02 and abs(result.var() / (S**2 + BOTTOM**2) - 1) < 0.05
    spans: list[tuple[float, float]] = []

    def noise(start: float, end: float) -> Tensor:
        spans.append((start, end))
        return torch.zeros_like(x)

    difusores.sample(gaussian, x, [TOP, BOTTOM], "dpm_adaptive", noise_sampler=noise, **options)
    assert spans[0][0] == TOP and all(a[1] == b[0] for a, b in pairwise(spans))


def test_adaptive_steps_that_cannot_go_on_say_so() -> None:
    x = randn(1, 4)
    with pytest.raises(ValueError, match="not finite"):
        difusores.sample(lambda x, s: x * math.nan, x, [2.0, 0.1], "dpm_adaptive")
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="short enough for rtol=1e-14"):
        difusores.sample(
            lambda x, s: torch.randn(x.shape, generator=generator, dtype=x.dtype),
            x,
            [2.0, 0.1],
            "dpm_adaptive",
            rtol=1e-14,
            atol=1e-14,
        )


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "ddim"])
def test_ascending_levels_lead_back_to_the_noise(name: str) -> None:
    options, order = ORDERS[name]
    x = flow(TOP * randn(2, 20), TOP, BOTTOM)
    expected, steps, errors = flow(x, BOTTOM, TOP), [161, 320], []
    for n in steps:
        result = difusores.sample(gaussian, x, grid(n).flip(0), name, **options)
        errors.append(float(((result - expected) / expected).abs().max()))
    assert errors[1] < (1e-2 if order == 1 else 2e-4)
    assert slope(steps, errors) > order - 0.15


@pytest.mark.parametrize("name", functional.SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_layouts_and_levels(name: str, dtype: torch.dtype) -> None:
    seen: list[Tensor] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype is dtype and sigma.shape == (2,)
        assert sigma.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert not torch.is_grad_enabled()
        seen.append(sigma)
        return gaussian(x, sigma).to(dtype)

    wide = TOP * randn(2, 3, 4, 5)
    options: dict[str, Any] = {"rtol": 0.1} if name == "dpm_adaptive" else {}
    for x in (wide.to(dtype), wide.to(dtype).transpose(1, 3)):
        before = x.clone()
        sigmas = functional.get_sigmas_karras(6, BOTTOM, TOP)
        result = difusores.sample(
            denoiser, x, sigmas, name, generator=torch.Generator().manual_seed(2), **options
        )
        assert result.dtype is dtype and result.shape == x.shape and result.isfinite().all()
        assert torch.equal(x, before)
        again = difusores.sample(
            denoiser, x, sigmas.tolist(), name, generator=torch.Generator().manual_seed(2), **options
        )
        assert torch.equal(result, again)
    assert seen[0].tolist() == [pytest.approx(TOP)] * 2


def test_each_image_may_have_a_generator() -> None:
    x, sigmas = TOP * randn(3, 2, 4), functional.get_sigmas_karras(5, BOTTOM, TOP)

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    for name in ("euler_ancestral", "dpmpp_sde", "dpm_fast"):
        options = {"eta": 1.0}
        together = difusores.sample(nonlinear, x, sigmas, name, generator=generators(1, 2, 3), **options)
        alone = difusores.sample(nonlinear, x[1:2], sigmas, name, generator=generators(2), **options)
        torch.testing.assert_close(together[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["euler", "heun", "dpm_2", "lms", "dpmpp_2s_ancestral", "dpmpp_sde", "unipc"]
)
def test_the_callback_sees_every_step(name: str) -> None:
    """As in k-diffusion: step, level, the level that the denoiser was told, and what it answered."""
    seen: list[dict[str, Any]] = []
    x, sigmas = TOP * randn(2, 3), [20.0, 5.0, 1.0, 0.0]
    options = {"s_churn": 1.0} if name in ("euler", "heun", "dpm_2") else {}
    for end in (sigmas, sigmas[:-1]):
        seen.clear()
        result = difusores.sample(
            nonlinear,
            x,
            end,
            name,
            callback=lambda call: seen.append({**call, "x": call["x"].clone()}),
            **options,
        )
        assert [call["i"] for call in seen] == list(range(len(end) - 1))
        assert [call["sigma"] for call in seen] == end[:-1]
        raised = [call["sigma_hat"] / call["sigma"] for call in seen]
        churn = 1 + min(1 / (len(end) - 1), math.sqrt(2) - 1) if options else 1.0
        assert raised == pytest.approx([churn] * len(seen))
        for call in seen:
            expected = nonlinear(call["x"], torch.full((2,), call["sigma_hat"], dtype=x.dtype))
            assert torch.equal(call["denoised"], expected)
        if end[-1] == 0 and name != "lms":  # whose last step still looks back
            assert torch.equal(seen[-1]["denoised"], result)


def test_the_callback_of_chosen_steps_sees_every_call() -> None:
    seen: list[dict[str, Any]] = []
    difusores.sample(nonlinear, TOP * randn(2, 3), [20.0, 5.0, 1.0, 0.1], "dpm_fast", callback=seen.append)
    assert [call["i"] for call in seen] == list(range(len(seen)))
    assert all(call["sigma"] == call["sigma_hat"] for call in seen)


def test_the_noise_sampler_is_asked_for_spans() -> None:
    spans: list[tuple[float, float]] = []
    x = TOP * randn(2, 3)

    def noise(start: float, end: float) -> Tensor:
        spans.append((start, end))
        return torch.zeros_like(x)

    expected = {
        "euler_ancestral": [(20.0, 5.0), (5.0, 1.0)],
        "dpmpp_2m_sde": [(20.0, 5.0), (5.0, 1.0)],
        "dpmpp_sde": [(20.0, 10.0), (20.0, 5.0), (5.0, math.sqrt(5)), (5.0, 1.0)],
    }
    for name, wanted in expected.items():
        spans.clear()
        difusores.sample(nonlinear, x, [20.0, 5.0, 1.0, 0.0], name, noise_sampler=noise)
        assert spans == [pytest.approx(span) for span in wanted]
    spans.clear()
    difusores.sample(nonlinear, x, [20.0, 5.0, 1.0, 0.0], "euler", noise_sampler=noise, s_churn=0.3)
    assert spans == [pytest.approx(span) for span in [(20, 22), (5, 5.5), (1, 1.1)]]


def test_noise_of_one_brownian_path() -> None:
    """The path that the schedulers take: two grids then end close to each other."""
    pytest.importorskip("torchsde", reason="Brownian noise is torchsde's")
    x = TOP * randn(2, 3)
    results = []
    for n, seed in ((200, 1), (400, 1), (400, 2)):
        noise = BrownianNoise(x, BOTTOM, TOP, seed)
        results.append(difusores.sample(gaussian, x, grid(n), "dpmpp_sde", noise_sampler=noise))
    same, other = ((result - results[1]).abs().max() for result in (results[0], results[2]))
    assert same < other / 5, (same, other)


def test_churn_is_one_stage_in_front_and_a_column_of_the_rows() -> None:
    plan = functional.plan([20.0, 5.0, 0.0], "euler", s_churn=0.2)
    assert [stage.calls_model for stage in plan.stages] == [False, True, True]
    assert [stage.noise is not None for stage in plan.stages] == [True, True, False]
    assert [stage.time for stage in plan.stages[1:]] == pytest.approx([22.0, 5.5])
    assert Plan.from_json(plan.to_json()) == plan
    assert functional.plan([20.0, 5.0, 0.0], "euler", s_churn=0.2) is plan


ALPHAS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_of_every_kind_are_denoisers(kind: str, steps: bool, dtype: torch.dtype) -> None:
    if kind == "flow_prediction" and steps:
        return

    def model(given: Tensor, time: Tensor) -> tuple[Tensor]:
        """What the best model would say of Gaussian data, from its own input and time."""
        assert given.dtype is dtype
        given = given.double()
        if kind == "flow_prediction":
            t = (time.double() / 1000).reshape(-1, 1)
            alpha, sigma = 1 - t, t
        else:
            if steps:
                low = time.long().clamp(max=998)
                logs = ((1 - ALPHAS) / ALPHAS).log() / 2
                level = torch.lerp(logs[low], logs[low + 1], time.double() - low).exp().reshape(-1, 1)
            else:
                level = time.double().reshape(-1, 1)
            alpha, sigma = 1 / (level**2 + 1).sqrt(), level / (level**2 + 1).sqrt()
        x0 = gaussian(given / alpha, (sigma / alpha).reshape(-1))
        noise = (given - alpha * x0) / sigma
        outputs = {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * x0,
            "sample": x0,
            "flow_prediction": noise - x0,
        }
        return (outputs[kind].to(dtype),)

    denoiser = functional.denoiser_from(model, kind, alphas_cumprod=ALPHAS if steps else None)
    sigma = torch.tensor([0.05, 0.8, 6.0], dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    x = ((1 + sigma.double()).reshape(-1, 1) * randn(3, 5)).to(dtype)
    result = denoiser(x, sigma)
    assert result.dtype is dtype
    tolerance = 1e-9 if dtype is torch.float64 else 2e-2
    expected = gaussian(x.double(), sigma.double())
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    # and through a whole run
    sigmas = functional.get_sigmas_karras(40, 0.05, 6.0)
    start = (6 * randn(3, 5)).to(dtype)
    run = difusores.sample(denoiser, start, sigmas[:-1], "dpmpp_2m")
    torch.testing.assert_close(run.double(), flow(start.double(), 6.0, 0.05), rtol=0.05, atol=0.02)


def test_training_steps_may_be_integers() -> None:
    told: list[Tensor] = []

    def model(given: Tensor, time: Tensor) -> Tensor:
        told.append(time)
        return given

    level = ((1 - ALPHAS) / ALPHAS).sqrt()
    denoiser = functional.denoiser_from(model, alphas_cumprod=ALPHAS.tolist(), quantize=True)
    x = randn(4, 2)
    denoiser(x, torch.stack([level[0] / 2, level[17] * 1.0001, level[500], level[999] * 3]))
    assert told[0].dtype is torch.int64 and told[0].tolist() == [0, 17, 500, 999]


def test_a_table_of_zero_terminal_snr_is_taken() -> None:
    """Data of one value: the image is exact from the last finite level on; that behind it is left out."""
    table = difusores.DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    assert table[-1] == 0
    told: list[float] = []

    def model(given: Tensor, time: Tensor) -> Tensor:
        told.append(float(time[0]))
        place = time.round().long()
        alpha, sigma = (a.sqrt()[place, None] for a in (table.double(), 1 - table.double()))
        return alpha * (given - alpha * 0.5) / sigma - sigma * 0.5

    denoiser = functional.denoiser_from(model, "v_prediction", alphas_cumprod=table)
    levels = ((1 - table.double()) / table.double()).sqrt()[[998, 500, 0]]
    top = 2 * float(levels[0])
    x = difusores.sample(denoiser, 0.5 + top * randn(2, 3), [top, *levels.tolist(), 0.0], "euler")
    assert told == pytest.approx([998, 998, 500, 0], abs=1e-3)
    torch.testing.assert_close(x, torch.full_like(x, 0.5), rtol=0, atol=2e-3)


def test_grids_of_noise_levels() -> None:
    karras = functional.get_sigmas_karras(3, 1.0, 3.0**7)
    assert karras.tolist() == pytest.approx([3.0**7, 2.0**7, 1.0, 0.0])
    exponential = functional.get_sigmas_exponential(3, 0.1, 10.0)
    assert exponential.tolist() == pytest.approx([10.0, 1.0, 0.1, 0.0])
    poly = functional.get_sigmas_polyexponential(3, 0.1, 10.0, rho=2.0)
    assert poly.tolist() == pytest.approx([10.0, 10**-0.5, 0.1, 0.0])
    assert torch.equal(functional.get_sigmas_polyexponential(5, 0.1, 10.0)[-1:], torch.zeros(1).double())
    vp = functional.get_sigmas_vp(2, beta_d=2.0, beta_min=0.5, eps_s=0.5)
    assert vp.tolist() == pytest.approx([math.sqrt(math.exp(1.5) - 1), math.sqrt(math.exp(0.5) - 1), 0.0])
    for get in (functional.get_sigmas_karras, functional.get_sigmas_exponential):
        assert get(1, 0.1, 10.0).tolist() == pytest.approx([10.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "plms"}, "solver must be one of euler, .*got 'plms'"),
        ({"solver": "dpmpp_2m", "eta": 1.0}, "'dpmpp_2m' takes no eta; it has no options"),
        ({"solver": "euler", "churn": 1.0}, "takes no churn; its options are s_churn, s_tmin"),
        ({"solver": "dpmpp_sde", "whole_spans": True}, "takes no whole_spans"),
        ({"solver": "dpm_adaptive", "generators": 1}, "takes no generators; its options are order"),
        ({"solver": "ddim", "eta": -1.0}, "eta must be finite and not below 0, got -1"),
        ({"solver": "ddim", "eta": torch.ones(1)}, "eta must be a number or a name"),
        ({"solver": "dpmpp_2m_sde", "solver_type": "rk4"}, "'midpoint' or 'heun', got 'rk4'"),
        ({"solver": "unipc", "solver_type": "bh3"}, "'bh1' or 'bh2', got 'bh3'"),
        ({"solver": "dpmpp_sde", "r": 0.0}, "r must lie above 0"),
        ({"solver": "dpm_adaptive", "order": 1}, "order must be 2 or 3, got 1"),
        ({"solver": "lms", "order": 9}, "order must be from 1 to 6"),
        ({"sigmas": [1.0]}, "at least two levels, got 1"),
        ({"sigmas": [2.0, 2.0, 1.0]}, "descend, or ascend"),
        ({"sigmas": [2.0, 3.0, 1.0]}, "descend, or ascend"),
        ({"sigmas": [2.0, 0.0, -1.0]}, "finite, above 0"),
        ({"sigmas": [0.0, 1.0]}, "finite, above 0"),
        ({"sigmas": [math.inf, 1.0]}, "finite, above 0"),
        ({"sigmas": [1.0, 2.0], "solver": "euler_ancestral"}, "levels that ascend: use eta=0"),
        ({"sigmas": [1.0, 2.0], "solver": "euler", "s_churn": 1.0}, "levels that ascend"),
        ({"sigmas": [1.0, 2.0], "solver": "ddpm"}, "levels that ascend"),
        ({"sigmas": [1.0, 2.0], "solver": "dpm_adaptive"}, "levels that descend"),
        ({"x": torch.ones(3)}, r"x must have shape \[B, C, \.\.\.\]"),
        ({"generator": torch.Generator(), "noise_sampler": lambda a, b: None}, "not from both"),
        ({"denoiser": lambda x, s: x[:, :1]}, "the model returned"),
    ],
)
def test_bad_requests_are_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"denoiser": nonlinear, "x": torch.ones(2, 3), "sigmas": [2.0, 1.0, 0.0]}
    with pytest.raises(ValueError, match=message):
        difusores.sample(**(good | arguments))


def test_bad_requests_for_denoisers_and_plans() -> None:
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        functional.denoiser_from(nonlinear, "score")
    with pytest.raises(ValueError, match="takes no alphas_cumprod"):
        functional.denoiser_from(nonlinear, "flow_prediction", alphas_cumprod=ALPHAS)
    with pytest.raises(ValueError, match="quantize=True needs alphas_cumprod"):
        functional.denoiser_from(nonlinear, quantize=True)
    with pytest.raises(ValueError, match="two numbers that descend"):
        functional.denoiser_from(nonlinear, alphas_cumprod=[0.1, 0.9])
    with pytest.raises(ValueError, match="'dpm_adaptive' has no plan"):
        functional.plan([2.0, 1.0], "dpm_adaptive")
    assert set(DENOISER_SOLVERS) | {"dpm_adaptive"} == set(functional.SOLVERS)
