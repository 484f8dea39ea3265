"""SA-Solver: a stochastic Adams predictor and corrector, both of one step as one row.

Notation: x = alpha * x0 + sigma * noise, lambda = log(alpha / sigma), m is what the model says about x0 (or
about the noise, where `predict_x0` is False).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from difusores.plan import Noise, Stage, make_row
from difusores.solvers.common import Prediction
from difusores.solvers.exponential import distinct, lagrange_exponentials


def sasolver(
    times: Sequence[float],
    levels: Sequence[tuple[float, float]],
    prediction: Prediction,
    tau: Callable[[float], float],
    *,
    begin: int = 0,
    predictor_order: int = 2,
    corrector_order: int = 2,
    predict_x0: bool = True,
    lower_order_final: bool = True,
) -> Iterator[Stage]:
    """Stochastic Adams-Bashforth and Adams-Moulton steps (Xue et al. 2023, "SA-Solver", eqs. 14 and 17).

    The corrector starts from the same sample and noise as the predictor before it, so that part is kept. Of
    order 2 it has the weights of UniPC, as in diffusers.

    Args:
        times: what the model is told.
        levels: (alpha, sigma) of each step and of the end.
        tau: how much noise is added, by time; 0 is deterministic, 1 the reverse diffusion.
        begin: the first step.
        predictor_order, corrector_order: 1 to 4; the first steps have fewer.
        lower_order_final: the last steps have lower orders.

    Raises:
        ValueError: another order.
    """
    for name, order in (("predictor_order", predictor_order), ("corrector_order", corrector_order)):
        if order not in (1, 2, 3, 4):
            raise ValueError(f"{name} must be 1, 2, 3 or 4, got {order}")
    count, kept = len(times), max(predictor_order, corrector_order) - 1
    lambdas = [math.log(alpha) - math.log(sigma) for alpha, sigma in levels]

    def weights(i: int, places: Sequence[int], excess: float) -> list[float]:
        """Of what the model said at `places`, in the sample at step i + 1; excess: tau²."""
        alpha, sigma = levels[i + 1]
        rate = 1 + excess
        h = lambdas[i + 1] - lambdas[i]
        nodes = [lambdas[i + 1] - lambdas[place] for place in places]
        nodes = nodes[: distinct(nodes)]
        if not predict_x0:
            return [-rate * sigma * w for w in lagrange_exponentials(nodes, h, 1.0)]
        found = [rate * alpha * w for w in lagrange_exponentials(nodes, h, -rate)]
        if len(nodes) == 2 and h != 0:
            change = h * h / 2 - (h * rate + math.expm1(-rate * h)) / rate**2
            change *= rate * alpha / (lambdas[places[0]] - lambdas[places[1]])
            found = [found[0] + change, found[1] - change]
        return found

    for i in range(begin, count):
        (alpha, sigma), (alpha_next, sigma_next) = levels[i : i + 2]
        m = {"x0": 1.0} if predict_x0 else prediction.limited_epsilon(alpha, sigma)
        done, left = i - begin, count - i if lower_order_final else 4
        x: dict[str, float] = {"xh": 1.0}
        before = [f"s{k + 1}" for k in range(min(done, kept))]
        if done:
            order = min(corrector_order, done + 1, left + 2)
            x = {"s0": 1.0}
            excess = tau(times[i - 1]) ** 2
            found = weights(i - 1, range(i, i - order, -1), excess)
            x |= dict(zip(before, found[1:], strict=False))
            for name, weight in m.items():
                x[name] = found[0] * weight
        excess = tau(times[i]) ** 2
        h = lambdas[i + 1] - lambdas[i]
        if predict_x0:
            ratio = math.exp(-excess * h) * sigma_next / sigma
            deviation = sigma_next * math.sqrt(-math.expm1(-2 * excess * h))
        else:
            ratio = alpha_next / alpha
            deviation = math.sqrt(excess) * sigma_next * math.sqrt(math.expm1(2 * h))
        u = {name: ratio * weight for name, weight in x.items()}
        u["z"] = deviation
        found = weights(i, range(i, i - min(predictor_order, done + 1, left), -1), excess)
        y = dict(u)
        for name, weight in m.items():
            y[name] = y.get(name, 0.0) + found[0] * weight
        for name, weight in zip(before, found[1:], strict=False):
            y[name] = y.get(name, 0.0) + weight
        slots = () if i == count - 1 else ("u", *["x0" if predict_x0 else "d", *before][:kept])
        row = make_row(prediction.x0(alpha, sigma), y, m if "d" in slots else None, u, clip=prediction.limits)
        yield Stage(times[i], row, noise=Noise(), threshold=prediction.threshold, slots=slots)
