"""UniPC: predictor and corrector of one step as one row.

Notation: x = alpha * x0 + sigma * noise, lambda = log(alpha / sigma), m is what the model says about x0 (or
about the noise, where `predict_x0` is False).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from difusores.plan import Stage, make_row
from difusores.solvers.common import Prediction
from difusores.solvers.exponential import distinct, exponential_moments

Weights = Mapping[str, float]
MOST_SLOTS = 5


def unipc(
    times: Sequence[float],
    levels: Sequence[tuple[float, float]],
    prediction: Prediction,
    *,
    begin: int = 0,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
) -> Iterator[Stage]:
    """Unified predictor-corrector (Zhao et al. 2023, "UniPC", algorithms 5 to 8).

    A stage corrects the sample that the model saw with what the model said about it, and predicts the next
    one from that; the corrector has the order of the predictor before it.

    Args:
        times: what the model is told.
        levels: (alpha, sigma) of each step and of the end; sigma may be 0 there.
        begin: the first step.
        order: 1, 2, ...; the first steps have fewer.
        solver_type: "bh1" has B(h) = h, "bh2" e^h - 1; they differ where the paper sets a weight to 1/2.
        lower_order_final: the last steps have orders ..., 2, 1.
        disable_corrector: steps whose prediction is not corrected.

    Raises:
        ValueError: an order below 1, one that needs more than the five slots, or one above 1 at sigma = 0.
    """
    if order < 1:
        raise ValueError(f"solver_order must be at least 1, got {order}")
    last = len(times) - 1
    lambdas = [math.log(alpha) - math.log(sigma) if sigma > 0 else math.inf for alpha, sigma in levels]
    orders = [
        min(order, i - begin + 1, last + 1 - i if lower_order_final else order) for i in range(last + 1)
    ]
    if levels[-1][1] == 0 and orders[-1] > 1:
        raise ValueError(
            f"order {orders[-1]} has no finite step to sigma = 0: use lower_order_final=True or "
            "final_sigmas_type='sigma_min'"
        )

    def update(i: int, x: Weights, history: Sequence[Weights], after: Weights | None) -> dict[str, float]:
        """The sample at step i + 1 from x at step i, from what is known there too if `after` is given."""
        (a, s), (a_next, s_next) = levels[i : i + 2]
        here = history[0]
        if s_next == 0:
            return _sum((a_next, here)) if predict_x0 else _sum((a_next / a, x), (-a_next * s / a, here))
        h = lambdas[i + 1] - lambdas[i]
        if h == 0:
            return dict(x)
        rate, scale, ratio = (-h, a_next, s_next / s) if predict_x0 else (h, s_next, a_next / a)
        terms = [(ratio, x), (-scale * math.expm1(rate), here)]
        past = [lambdas[i - k] for k in range(orders[i])]
        count = distinct(past)
        nodes = [(place - lambdas[i]) / h for place in past[1:count]]
        others = list(history[1:count])
        if after is not None:
            nodes.append(1.0)
            others.append(after)
        b = rate if solver_type == "bh1" else math.expm1(rate)
        rhos = [b / 2] if len(nodes) == 1 else _rhos(nodes, rate)
        for node, rho, other in zip(nodes, rhos, others, strict=True):
            terms += [(-scale * rho / node, other), (scale * rho / node, here)]
        return _sum(*terms)

    before: list[str] = []
    for i in range(begin, last + 1):
        alpha, sigma = levels[i]
        m = {"x0": 1.0} if predict_x0 else prediction.epsilon(alpha, sigma)
        x: dict[str, float] = {"xh": 1.0}
        corrected = i > begin and i - 1 not in disable_corrector
        if corrected:
            x = update(i - 1, {"s0": 1.0}, [{name: 1.0} for name in before], m)
        y = update(i, x, [m, *({name: 1.0} for name in before)], None)
        corrects = i < last and i not in disable_corrector
        held = orders[i] if corrects else orders[i + 1] - 1 if i < last else 0
        slots = ["x0" if predict_x0 else "d", *before][:held]
        if corrects:
            slots.insert(0, "u" if corrected else "x")
        if len(slots) > MOST_SLOTS:
            raise ValueError(
                f"solver_order {order} keeps {len(slots)} tensors from one step to the next, and there is "
                f"room for {MOST_SLOTS}: use an order of at most 4, or of 6 without the corrector"
            )
        before = [f"s{k}" for k in range(len(slots))][1 if corrects else 0 :]
        row = make_row(
            prediction.x0(alpha, sigma),
            y,
            m if "d" in slots else None,
            x if "u" in slots else None,
            clip=prediction.limits,
        )
        yield Stage(times[i], row, threshold=prediction.threshold, slots=tuple(slots))


def _rhos(nodes: Sequence[float], rate: float) -> list[float]:
    """B(h) times the weights of eqs. 9 and 10: exact for polynomials in lambda."""
    if not nodes:
        return []
    # the integrals over [0, 1] of e^(rate (1 - θ)) θ^k
    moments = exponential_moments(-rate, len(nodes) + 1)[1:]
    right = [rate * math.exp(rate) * moment for moment in moments]
    matrix = np.vander(np.asarray(nodes), increasing=True).T
    found: list[float] = np.linalg.solve(matrix, np.asarray(right)).tolist()
    return found


def _sum(*terms: tuple[float, Weights]) -> dict[str, float]:
    found: dict[str, float] = {}
    for factor, weights in terms:
        for name, weight in weights.items():
            found[name] = found.get(name, 0.0) + factor * weight
    return found
