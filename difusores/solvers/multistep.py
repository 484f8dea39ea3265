"""Linear multistep methods of the Adams kind: PNDM, IPNDM and DEIS.

Notation: x = alpha * x0 + sigma * noise, e the model's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from difusores.plan import Stage, make_row
from difusores.solvers.common import Prediction
from difusores.solvers.discrete import signal_share
from difusores.solvers.exponential import distinct, lagrange_exponentials

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the last slopes, the newest first, by how many there are (equal steps)."""

RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
"""Weights of the four slopes of the classical Runge-Kutta method."""


def pndm(
    alphas_cumprod: Sequence[float],
    times: Iterable[int],
    prediction: Prediction,
    *,
    stride: int,
    final_alpha_cumprod: float = 1.0,
    bases: Sequence[int] = (),
    first: int = 0,
) -> Iterator[Stage]:
    """Pseudo numerical methods (Liu et al. 2022, "PNDM", eqs. 11 to 13).

    Four calls of the model make a Runge-Kutta step. The linear multistep after them takes one call a step;
    without Runge-Kutta its first step is Heun's, whose second call repeats a time. How often the model was
    called decides which formula comes, as in diffusers, wherever the run begins.

    Args:
        alphas_cumprod: [T].
        times: what the model is told at each call.
        prediction: "epsilon" or "v_prediction".
        stride: from one step to the next, in training steps.
        final_alpha_cumprod: alphas_cumprod where the previous timestep is negative.
        bases: times of the Runge-Kutta calls, of which every fourth is where its step begins; none of them:
            no Runge-Kutta.
        first: how often the model was called before.

    Raises:
        ValueError: the model predicts x0.
    """
    if prediction.kind == "sample":
        raise ValueError("PNDM takes prediction_type 'epsilon' or 'v_prediction', got 'sample'")

    def step(t: int, before: int, x: str, slopes: Mapping[str, float]) -> dict[str, float]:
        """Weights of the sample at `before`: of the sample x at t and of the model's outputs."""
        a = signal_share(alphas_cumprod, t)
        a_before = signal_share(alphas_cumprod, before) if before >= 0 else final_alpha_cumprod
        noise = (a - a_before) / (a * math.sqrt(1 - a_before) + math.sqrt(a * (1 - a) * a_before))
        scale = math.sqrt(a_before / a)
        if prediction.kind == "v_prediction":
            # the outputs are combined first, and the combination is taken for a v at t
            scale, noise = scale + noise * math.sqrt(1 - a), noise * math.sqrt(a)
        return {x: scale, **{name: noise * weight for name, weight in slopes.items()}}

    for calls, t in enumerate(times, first):
        e, u = {"e": 1.0}, {}
        if calls < len(bases):
            turn, earlier = calls % 4, range(calls // 4)
            half = 0 if calls % 2 else stride // 2
            weight = {"e": RUNGE_KUTTA[turn]}
            kept = ("s0", "u", *(f"s{k + 2}" for k in range(len(earlier) + 1)))
            if turn == 0:
                x, slopes, u = "xh", e, weight
                kept = ("x", "u", "d", *(f"s{k}" for k in earlier))
            elif turn < 3:
                x, slopes, u = "s0", e, {"s1": 1.0, **weight}
            else:
                x, slopes, kept = "s0", {"s1": 1.0, **weight}, kept[2:]
            y = step(bases[calls - turn], t - half, x, slopes)
        elif calls == 1:
            y, kept = step(t + stride, t, "s1", {"s0": 0.5, "e": 0.5}), ("s0",)
        else:
            held = min(3, len(bases) // 4 + calls - len(bases) - (not bases and calls > 0))
            names = ("e", *(f"s{k}" for k in range(held)))
            slopes = dict(zip(names, ADAMS_BASHFORTH[held], strict=True))
            y = step(t, t - stride, "xh", slopes)
            kept = ("d", "x") if calls == 0 else ("d", *names[1:3])
        a = signal_share(alphas_cumprod, t)
        x0 = prediction.x0(math.sqrt(a), math.sqrt(1 - a))
        yield Stage(t, make_row(x0, y, e if "d" in kept else None, u), slots=kept)


def ipndm(
    times: Sequence[float], sigmas: Sequence[float], alphas: Sequence[float], *, begin: int = 0
) -> Iterator[Stage]:
    """Adams-Bashforth in the noise sigma * x + alpha * e (crowsonkb's improved PNDM of v-diffusion).

    Args:
        times: in [0, 1].
        sigmas, alphas: one more than times, alpha² + sigma² = 1; the last ones are where the run ends.
        begin: the first step.
    """
    for i in range(begin, len(times)):
        alpha, sigma = alphas[i], sigmas[i]
        slope = {"xh": sigma, "e": alpha}
        weights = ADAMS_BASHFORTH[min(i - begin, 3)]
        # at pure noise alpha is 0, and so is x - sigma * slope
        ratio = alphas[i + 1] / max(alpha, 1e-8)
        new = weights[0]
        y = {
            "xh": ratio * (1 - sigma * new * sigma) + sigmas[i + 1] * new * sigma,
            "e": new * alpha * (sigmas[i + 1] - sigma * ratio),
        }
        names = [f"s{k}" for k in range(len(weights) - 1)]
        for name, weight in zip(names, weights[1:], strict=True):
            y[name] = weight * (sigmas[i + 1] - sigma * ratio)
        yield Stage(times[i], make_row((alpha, -sigma), y, slope), slots=("d", *names[:2]))


def deis(
    times: Sequence[float],
    levels: Sequence[tuple[float, float]],
    prediction: Prediction,
    *,
    begin: int = 0,
    order: int = 2,
    lower_order_final: bool = True,
) -> Iterator[Stage]:
    """The noise as a polynomial in log(rho), rho = sigma / alpha, integrated over rho (Zhang & Chen 2023,
    "DEIS", eq. 15 in the form log-rho AB).

    Args:
        times: what the model is told.
        levels: (alpha, sigma) of each step and of the end.
        begin: the first step.
        order: 1, 2 or 3; the first steps have fewer.
        lower_order_final: of fewer than 15 steps, the last two have orders 2 and 1.

    Raises:
        ValueError: another order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"solver_order must be 1, 2 or 3, got {order}")
    logarithms = [math.log(sigma / alpha) for alpha, sigma in levels]
    for i in range(begin, len(times)):
        left = len(times) - i if lower_order_final and len(times) < 15 else order
        count = min(order, i - begin + 1, left)
        (alpha, sigma), (after, _) = levels[i : i + 2]
        nodes = [logarithms[i - k] - logarithms[i] for k in range(count)]
        nodes = nodes[: distinct(nodes)]
        length = logarithms[i + 1] - logarithms[i]
        weights = [after * sigma / alpha * w for w in lagrange_exponentials(nodes, length, 1.0)]
        slope = {"e": 1.0}
        if prediction.kind != "epsilon" or prediction.threshold is not None:
            slope = {"xh": 1 / sigma, "x0": -alpha / sigma}
        y = {"xh": after / alpha, **{f"s{k}": w for k, w in enumerate(weights[1:])}}
        for name, weight in slope.items():
            y[name] = y.get(name, 0.0) + weights[0] * weight
        held = min(i - begin + 1, order - 1) if i + 1 < len(times) else 0
        row = make_row(prediction.x0(alpha, sigma), y, slope, clip=prediction.limits)
        slots = ("d", "s0")[:held]
        yield Stage(times[i], row, threshold=prediction.threshold, slots=slots)
