"""DPM-Solver: exponential integrators in lambda = log(alpha / sigma).

Notation: x = alpha * x0 + sigma * noise. m is what is integrated: x0 for "dpmsolver++" and "sde-dpmsolver++",
the noise for "dpmsolver" and "sde-dpmsolver". A step leads from lambda_s over h to lambda_t.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from difusores.plan import Noise, Stage, make_row
from difusores.solvers.common import Preconditioned, Prediction
from difusores.solvers.exponential import distinct
from difusores.solvers.sigma import ancestral_levels

DPM_ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
DPM_TYPES = ("midpoint", "heun")

Levels = Sequence[tuple[float, float]]


def dpm_multistep(
    times: Sequence[float],
    levels: Levels,
    prediction: Prediction,
    *,
    begin: int = 0,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    noise_dtype: str | None = "float32",
) -> Iterator[Stage]:
    """Multistep DPM-Solver (Lu et al. 2022, "DPM-Solver++", algorithm 2 and, with noise, appendix).

    Args:
        times: what the model is told.
        levels: (alpha, sigma) of each step and of the end; sigma may be 0 there.
        begin: the first step.
        order: 1, 2 or 3; the first steps have fewer.
        algorithm: one of DPM_ALGORITHMS.
        solver_type: one of DPM_TYPES, of order 2.
        lower_order_final: the last two steps have orders 2 and 1, if there are fewer than 15 `times`.
        euler_at_final: the last step has order 1.
        noise_dtype: see `Noise`; of the "sde-" algorithms.

    Raises:
        ValueError: an option that is not one of the above, or noise on the way to more of it.
    """
    _check(order, algorithm, solver_type)
    count = len(times)
    logarithms = [_log_snr(level) for level in levels]
    few = lower_order_final and count < 15
    for i in range(begin, count):
        left = count - i
        this = min(order, i - begin + 1)
        if left == 1 and (euler_at_final or few or levels[-1][1] == 0):
            this = 1
        elif left == 2 and few:
            this = min(this, 2)
        past = [logarithms[i - k] for k in range(this)]
        past = past[: distinct(past)]
        names = ["m", "s0", "s1"][: len(past)]
        h = logarithms[i + 1] - past[0]
        slopes = _backward_differences(past, h, names)
        model, held, d = _model_term(algorithm, prediction, *levels[i])
        y = _update(algorithm, solver_type, levels[i], levels[i + 1], h, slopes)
        kept = () if left == 1 else (held, "s0", "s1")[: min(order - 1, i - begin + 1)]
        row = make_row(
            _x0_term(algorithm, prediction, *levels[i]),
            _put(y, model),
            d if held in kept else None,
            clip=prediction.limits,
        )
        drawn = Noise(dtype=noise_dtype) if algorithm.startswith("sde") else None
        c_in = prediction.c_in(levels[i][1]) if isinstance(prediction, Preconditioned) else 1.0
        yield Stage(times[i], row, c_in, drawn, prediction.threshold, kept)


def singlestep_orders(steps: int, order: int, lower_order_final: bool, ends_at_zero: bool) -> list[int]:
    """The order of each step: runs of 1, 2, ..., `order`, of which the last one is cut to fit.

    Args:
        lower_order_final: the last run is shorter; else it is cut, if `order` does not divide `steps`.
        ends_at_zero: the last step has order 1.

    Raises:
        ValueError: another order than 1, 2 or 3.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"solver_order must be 1, 2 or 3, got {order}")
    orders = [i % order + 1 for i in range(steps)]
    if (lower_order_final and order > 1 and orders[-1] == order) or ends_at_zero:
        orders[-1] = 1
    return orders


def dpm_singlestep(
    times: Sequence[float],
    levels: Levels,
    prediction: Prediction,
    orders: Sequence[int],
    *,
    begin: int = 0,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    noise_dtype: str | None = "promoted",
) -> Iterator[Stage]:
    """Singlestep DPM-Solver (Lu et al. 2022, "DPM-Solver", algorithms 4 and 5, "DPM-Solver++", algorithm 1).

    Each step of order k begins anew where the step of order 1 before it began.

    Args:
        orders: of the steps, see `singlestep_orders`. A run that begins in between has lower ones first.

    The other arguments and Raises: as `dpm_multistep`.
    """
    _check(max(orders, default=1), algorithm, solver_type)
    logarithms = [_log_snr(level) for level in levels]
    for i in range(begin, len(times)):
        order = min(orders[i], i - begin + 1)
        base = i - order + 1
        h = logarithms[i + 1] - logarithms[base]
        model, held, d = _model_term(algorithm, prediction, *levels[i])
        names = ["m", "s0", "s1"][:order]
        distances = [logarithms[i - k] - logarithms[base] for k in range(order - 1)]
        slopes = _forward_differences(distances, h, names, solver_type)
        rule = "heun" if order == 3 else solver_type
        x = "xh" if order == 1 else f"s{order - 1}"
        y = _update(algorithm, rule, levels[base], levels[i + 1], h, slopes, x)
        kept: tuple[str, ...] = ()
        if i + 1 < len(times) and orders[i + 1] > 1:
            kept = (held, "x") if order == 1 else (held, "s0", "s1")
        row = make_row(
            _x0_term(algorithm, prediction, *levels[i]),
            _put(y, model),
            d if held in kept else None,
            clip=prediction.limits,
        )
        drawn = Noise(dtype=noise_dtype) if algorithm.startswith("sde") else None
        yield Stage(times[i], row, noise=drawn, threshold=prediction.threshold, slots=kept)


def dpm_sde(
    times: Sequence[float],
    sigmas: Sequence[float],
    prediction: Prediction,
    *,
    middles: Sequence[tuple[float, float]],
    begin: int = 0,
    s_noise: float = 1.0,
) -> Iterator[Stage]:
    """DPM-Solver++ with noise in two calls a step, the first one halfway in lambda (k-diffusion's DPM++ SDE).

    Here x = x0 + sigma * noise. Each call leads to a lower level, from where noise brings the sample back up.

    Args:
        times: what the model is told at the first call of a step.
        sigmas: one more; the last one is 0.
        middles: (time, sigma) of the second call, in all steps but the last, which has none.
        begin: the first step.
        s_noise: factor of the noise.
    """
    for i in range(begin, len(times)):
        sigma, after = sigmas[i], sigmas[i + 1]
        if after == 0:
            row = make_row(prediction.x0_at(sigma), {"x0": 1.0}, clip=prediction.limits)
            yield Stage(times[i], row, prediction.c_in(sigma))
            return
        time, middle = middles[i]
        calls = ((times[i], sigma, middle, "xh", ("x",)), (time, middle, after, "s0", ()))
        for told, level, target, x, kept in calls:
            up, down = ancestral_levels(sigma, target)
            ratio = down / sigma
            y = {x: ratio, "x0": 1 - ratio, "z": s_noise * up}
            row = make_row(prediction.x0_at(level), y, clip=prediction.limits)
            yield Stage(told, row, prediction.c_in(level), Noise(), slots=kept)


def _check(order: int, algorithm: str, solver_type: str) -> None:
    if order not in (1, 2, 3):
        raise ValueError(f"solver_order must be 1, 2 or 3, got {order}")
    if algorithm not in DPM_ALGORITHMS:
        raise ValueError(f"algorithm_type must be one of {', '.join(DPM_ALGORITHMS)}, got {algorithm!r}")
    if solver_type not in DPM_TYPES:
        raise ValueError(f"solver_type must be 'midpoint' or 'heun', got {solver_type!r}")


def _log_snr(level: tuple[float, float]) -> float:
    alpha, sigma = level
    if alpha == 0:
        raise ValueError("DPM-Solver cannot begin at a zero signal-to-noise ratio: lambda is infinite there")
    return math.inf if sigma == 0 else math.log(alpha) - math.log(sigma)


def _model_term(
    algorithm: str, prediction: Prediction, alpha: float, sigma: float
) -> tuple[Mapping[str, float], str, Mapping[str, float] | None]:
    """m as weights of the op's operands, the output that a slot keeps of it, and the weights of `d`."""
    if algorithm.endswith("++"):
        return {"x0": 1.0}, "x0", None
    epsilon = prediction.limited_epsilon(alpha, sigma)
    return epsilon, "d", epsilon


def _x0_term(algorithm: str, prediction: Prediction, alpha: float, sigma: float) -> tuple[float, float]:
    """(p_x, p_e); where the noise is integrated, of the x0 that goes with it.

    The two differ for velocities at flow levels alone, where alpha² + sigma² is not 1.
    """
    if algorithm.endswith("++") or prediction.kind != "v_prediction":
        return prediction.x0(alpha, sigma)
    epsilon = prediction.epsilon(alpha, sigma)
    return (1 - sigma * epsilon["xh"]) / alpha, -sigma * epsilon["e"] / alpha


def _put(weights: Mapping[str, float], model: Mapping[str, float]) -> dict[str, float]:
    """`weights` with "m" written out."""
    y = {name: weight for name, weight in weights.items() if name != "m"}
    for name, weight in model.items():
        y[name] = y.get(name, 0.0) + weights.get("m", 0.0) * weight
    return y


def _backward_differences(past: Sequence[float], h: float, names: Sequence[str]) -> list[dict[str, float]]:
    """m and its differences of first and second order over h, from m at the lambdas of `past`."""
    first = dict(zip(names, (1.0, 0.0, 0.0), strict=False))
    if len(past) == 1:
        return [first]
    near = h / (past[0] - past[1])
    if len(past) == 2:
        return [first, _weights(names, near, -near)]
    far = h / (past[1] - past[2])
    share = (past[0] - past[1]) / (past[0] - past[2])
    whole = h / (past[0] - past[2])
    bent = _weights(names, near, -near - far, far)
    slope = _weights(names, near, -near)
    return [
        first,
        {name: slope[name] + share * bent[name] for name in names},
        {name: whole * bent[name] for name in names},
    ]


def _forward_differences(
    distances: Sequence[float], h: float, names: Sequence[str], solver_type: str
) -> list[dict[str, float]]:
    """m where a step begins and its derivatives over h, from m at `distances` from there, newest first."""
    first = {name: float(name == names[-1]) for name in names}
    used = distances[:1] if solver_type == "midpoint" else distances
    if not used or 0.0 in used or distinct(used) < len(used):
        return [first]
    if len(used) == 1:
        far = h / distances[0]
        return [first, {names[0]: far, names[-1]: -far}]
    r0, r1 = (distance / h for distance in distances)
    near = {names[0]: 0.0, names[1]: 1 / r1, names[2]: -1 / r1}
    far_slope = {names[0]: 1 / r0, names[1]: 0.0, names[2]: -1 / r0}
    return [
        first,
        {name: (r0 * near[name] - r1 * far_slope[name]) / (r0 - r1) for name in names},
        {name: 2 * (far_slope[name] - near[name]) / (r0 - r1) for name in names},
    ]


def _weights(names: Sequence[str], *values: float) -> dict[str, float]:
    return dict(zip(names, (*values, 0.0, 0.0), strict=False))


def _integrals(z: float) -> tuple[float, float, float]:
    """z phi_k(z), k = 1, 2, 3: e^z - 1, then (e^z - 1) / z - 1, then that over z, less 1/2."""
    if abs(z) < 0.1:  # where the quotients cancel
        terms = [z**n / math.factorial(n) for n in range(12)]
        return (
            sum(terms[1:]),
            sum(term / (n + 1) for n, term in enumerate(terms) if n),
            sum(term / ((n + 1) * (n + 2)) for n, term in enumerate(terms) if n),
        )
    first = math.expm1(z)
    second = first / z - 1
    return first, second, second / z - 0.5


def _update(
    algorithm: str,
    solver_type: str,
    here: tuple[float, float],
    after: tuple[float, float],
    h: float,
    slopes: Sequence[Mapping[str, float]],
    x: str = "xh",
) -> dict[str, float]:
    """Weights of the next sample: of x, of the noise and of m, whose differences `slopes` are."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = here, after
    stochastic = algorithm.startswith("sde")
    if stochastic and h < -1e-3:  # less is what float32 leaves of a step of length 0
        raise ValueError(f"{algorithm!r} removes noise, and this step leads from less to more of it")
    if algorithm.endswith("++"):
        z, ratio, front = -h, sigma_t / sigma_s, -alpha_t
        added = max(-math.expm1(-2 * h), 0.0)
        if stochastic:
            z, ratio = -2 * h, ratio * math.exp(-h)
    else:
        z, ratio, front = h, alpha_t / alpha_s, -sigma_t
        added = max(math.expm1(2 * h), 0.0)
        if stochastic:
            front *= 2
    integrals = _integrals(z)
    if len(slopes) == 2 and solver_type == "midpoint":
        integrals = (integrals[0], integrals[0] / 2, 0.0)
    if len(slopes) == 3 and algorithm == "sde-dpmsolver++":
        # The derivation gives 1/2 - phi_2; diffusers has -1/2 - phi_2, and its numbers are what counts here.
        integrals = (*integrals[:2], _integrals(z)[1] / z + 0.5) if z != 0 else integrals
    y: dict[str, float] = {x: ratio, "z": sigma_t * math.sqrt(added) if stochastic else 0.0}
    for integral, slope in zip(integrals, slopes, strict=False):
        for name, weight in slope.items():
            y[name] = y.get(name, 0.0) + front * integral * weight
    return y
