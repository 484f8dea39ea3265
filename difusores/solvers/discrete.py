"""Samplers that step from one training step to another: DDPM, DDIM and what is built on them.

Notation: x = alpha * x0 + sigma * noise with alpha² = alphas_cumprod and alpha² + sigma² = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from difusores.plan import Noise, Stage, make_row
from difusores.solvers.common import Prediction

VARIANCE_TYPES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
)


def ddpm(
    alphas_cumprod: Sequence[float],
    steps: Iterable[tuple[int, int]],
    prediction: Prediction,
    *,
    variance_type: str = "fixed_small",
    adjacent: Sequence[tuple[float, float]] | None = None,
    noise: bool = True,
) -> Iterator[Stage]:
    """Ancestral sampling (Ho et al. 2020, eqs. 7 and 15; learned variances: Nichol & Dhariwal 2021, eq. 15).

    Args:
        alphas_cumprod: [T].
        steps: (timestep, previous timestep), a negative one standing for the image itself.
        variance_type: "fixed_small" is the posterior's variance, "fixed_large" beta; the two "_log" forms are
            the same in exact arithmetic. "learned": v is the variance. "learned_range": v in [-1, 1]
            interpolates between the logarithms of the two.
        adjacent: (1 - beta, beta) of every training step, for steps to the one before; None takes them, as
            everywhere else, from alphas_cumprod, where float32 has left fewer digits of them.
        noise: False leaves the mean.
    """
    if variance_type not in VARIANCE_TYPES:
        raise ValueError(f"variance_type must be one of {', '.join(VARIANCE_TYPES)}, got {variance_type!r}")
    for t, before in steps:
        a, a_before = signal_share(alphas_cumprod, t), alphas_cumprod[before] if before >= 0 else 1.0
        ratio = a / a_before
        small, beta = ddpm_variances(a, a_before)
        if adjacent is not None and before == t - 1:
            ratio, beta = adjacent[t]
            small = max((1 - a_before) / (1 - a) * beta, 1e-20)
        y = {"x0": math.sqrt(a_before) * beta / (1 - a), "xh": math.sqrt(ratio) * (1 - a_before) / (1 - a)}
        mode, nu = 0, (0.0, 0.0)
        if variance_type == "learned":
            mode, deviation = 2, 1.0
        elif variance_type == "learned_range":
            low, high = math.log(small), math.log(max(beta, 1e-20))
            mode, deviation, nu = 1, 1.0, ((low + high) / 4, (high - low) / 4)
        else:
            deviation = math.sqrt(small if variance_type.startswith("fixed_small") else beta)
        drawn = noise and t > 0
        if drawn:
            y["z"] = deviation
        x0 = prediction.x0(math.sqrt(a), math.sqrt(1 - a))
        if not noise:
            mode, nu = 0, (0.0, 0.0)
        row = make_row(x0, y, clip=prediction.limits, mode=mode, nu=nu)
        yield Stage(t, row, noise=Noise() if drawn else None, threshold=prediction.threshold)


def ddim(
    alphas_cumprod: Sequence[float],
    steps: Iterable[tuple[int, int]],
    prediction: Prediction,
    *,
    final_alpha_cumprod: float = 1.0,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> Iterator[Stage]:
    """Denoising diffusion implicit models (Song et al. 2021, eqs. 12 and 16).

    Args:
        alphas_cumprod: [T].
        steps: (timestep, previous timestep).
        final_alpha_cumprod: alphas_cumprod where the previous timestep is negative.
        eta: 0 is deterministic, 1 has the variance of DDPM. Below 0, as in diffusers, the predicted noise
            shrinks as for -eta, and none is added.
        use_clipped_model_output: take the noise from the limited x0 instead of the unlimited one.

    Raises:
        ValueError: eta asks for more variance than the previous timestep has.
    """
    for t, before in steps:
        a = signal_share(alphas_cumprod, t)
        a_before = alphas_cumprod[before] if before >= 0 else final_alpha_cumprod
        y = ddim_weights(t, a, a_before, prediction, eta, use_clipped_model_output)
        row = make_row(prediction.x0(math.sqrt(a), math.sqrt(1 - a)), y, clip=prediction.limits)
        yield Stage(t, row, noise=Noise() if eta > 0 else None, threshold=prediction.threshold)


def ddim_inverse(
    alphas_cumprod: Sequence[float],
    steps: Iterable[tuple[int, int]],
    prediction: Prediction,
    *,
    initial_alpha_cumprod: float = 1.0,
) -> Iterator[Stage]:
    """DDIM from the image to the noise (Song et al. 2021, section 4.3).

    Args:
        alphas_cumprod: [T].
        steps: (timestep reached, timestep left); the model is told the one that is reached.
        initial_alpha_cumprod: alphas_cumprod where the timestep left is negative.

    Raises:
        ValueError: the image is left without noise, which predicted x0 then does not tell.
    """
    for t, left in steps:
        signal_share(alphas_cumprod, t)
        a = signal_share(alphas_cumprod, left) if left >= 0 else initial_alpha_cumprod
        if a == 1 and prediction.kind == "sample":
            raise ValueError(
                "predicted x0 does not tell the noise of an image that has none: use prediction_type "
                "'epsilon' or 'v_prediction', or set_alpha_to_one=False"
            )
        y = ddim_weights(t, a, alphas_cumprod[t], prediction)
        row = make_row(prediction.x0(math.sqrt(a), math.sqrt(1 - a)), y, clip=prediction.limits)
        yield Stage(t, row, threshold=prediction.threshold)


def repaint(
    alphas_cumprod: Sequence[float],
    steps: Iterable[tuple[int, int]],
    prediction: Prediction,
    *,
    eta: float = 0.0,
) -> Iterator[Stage]:
    """One step of inpainting (Lugmayr et al. 2022, "RePaint", eq. 8): y is what is made up, d what is known.

    DDIM makes y; d is the image that slot 0 holds, with the noise of the previous timestep. Both have the
    same z, drawn at every step.

    Args:
        alphas_cumprod: [T].
        steps: (timestep, previous timestep), a negative one standing for the image itself.
        eta: as `ddim`.
    """
    for t, before in steps:
        a = signal_share(alphas_cumprod, t)
        a_before = alphas_cumprod[before] if before >= 0 else 1.0
        y = ddim_weights(t, a, a_before, prediction, eta)
        known = {"s0": math.sqrt(a_before), "z": math.sqrt(1 - a_before)}
        row = make_row(prediction.x0(math.sqrt(a), math.sqrt(1 - a)), y, known, clip=prediction.limits)
        yield Stage(t, row, noise=Noise(), threshold=prediction.threshold)


RAISED_BY = ("z", "e", "s0", "s1", "s2", "s3", "s4")
"""The operands that hold the noises of `raised`, in the order in which they are drawn."""


def raised(t: int, betas: Sequence[float]) -> Stage:
    """Training steps from t on towards the noise (Ho et al. 2020, eq. 2), as one: no model is called.

    x = sqrt(1 - beta) * x + sqrt(beta) * z for each beta, with a noise of its own; at most seven of them.
    """
    y, left = {}, 1.0
    for name, beta in reversed([*zip(RAISED_BY, betas, strict=False)]):
        y[name] = left * math.sqrt(beta)
        left *= math.sqrt(1 - beta)
    return Stage(t, make_row((0.0, 0.0), {**y, "xh": left}), noise=Noise())


def ddim_weights(
    t: int, a: float, a_after: float, prediction: Prediction, eta: float = 0.0, clipped: bool = False
) -> dict[str, float]:
    """Weights of the sample at a_after: x0 and the noise that goes with it, or with the limited x0."""
    alpha, sigma = math.sqrt(a), math.sqrt(1 - a)
    variance = eta * eta * ddim_variance(a, a_after) if eta else 0.0
    left = 1 - a_after - variance
    if left < -1e-12:
        raise ValueError(
            f"eta = {eta} adds variance {variance:.6g} at t = {t}; at most {1 - a_after:.6g} fits"
        )
    epsilon = {"xh": 1 / sigma, "x0": -alpha / sigma} if clipped else prediction.epsilon(alpha, sigma)
    y = {name: math.sqrt(max(left, 0.0)) * weight for name, weight in epsilon.items()}
    y["x0"] = y.get("x0", 0.0) + math.sqrt(a_after)
    if eta > 0:
        y["z"] = math.sqrt(max(variance, 0.0))
    return y


def signal_share(alphas_cumprod: Sequence[float], t: int) -> float:
    if not 0 <= t < len(alphas_cumprod):
        raise IndexError(f"timestep {t} is outside the training steps 0 to {len(alphas_cumprod) - 1}")
    a = alphas_cumprod[t]
    if not 0 <= a < 1:
        raise ValueError(f"alphas_cumprod has to lie in [0, 1), and is {a} at timestep {t}")
    return a


def ddpm_variances(a: float, a_before: float) -> tuple[float, float]:
    """The posterior's variance, at least 1e-20, and beta: "fixed_small" and "fixed_large" of `ddpm`."""
    beta = 1 - a / a_before
    return max((1 - a_before) / (1 - a) * beta, 1e-20), beta


def log_variance_between(predicted: Tensor, small: float, beta: float) -> Tensor:
    """Logarithm of a variance predicted in [-1, 1] between the two (Nichol & Dhariwal 2021, eq. 15)."""
    share = (predicted + 1) / 2
    return share * math.log(max(beta, 1e-20)) + (1 - share) * math.log(small)


def ddim_variance(a: float, a_before: float) -> float:
    """The variance of eq. 16 at eta = 1, from alphas_cumprod at a timestep and at the one before it."""
    return (1 - a_before) / (1 - a) * (1 - a / a_before)
