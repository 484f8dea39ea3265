"""The training objective of a discrete diffusion model: noising, targets, and the weight of each timestep."""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def add_noise(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(ā) x0 + sqrt(1 - ā) noise (Ho et al. 2020, eq. 4), in fp32.

    Args:
        x0, noise: [B, C, H, W] fp32; x0 in [-1, 1].
        alphas_cumprod: [B] fp32, ā of each image's timestep.
    """
    a = _per_image(alphas_cumprod, x0)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def target(prediction_type: str, x0: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """What the network is to predict: the noise, the image, or v = sqrt(ā) noise - sqrt(1 - ā) x0.

    Shapes as in `add_noise`; v as in Salimans & Ho 2022, appendix D.

    Raises:
        ValueError: `prediction_type` is not one of `PREDICTION_TYPES`.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        a = _per_image(alphas_cumprod, x0)
        return a.sqrt() * noise - (1 - a).sqrt() * x0
    raise ValueError(f"prediction_type is {prediction_type!r}; allowed are {', '.join(PREDICTION_TYPES)}")


def min_snr_weight(prediction_type: str, alphas_cumprod: Tensor, gamma: float | None) -> Tensor:
    """[B] weights of the squared error, min-SNR-γ (Hang et al. 2023, section 3.4); ones without gamma.

    With SNR = ā / (1 - ā), the weight min(SNR, γ) of the error in x0 becomes min(SNR, γ) / SNR of the error
    in the noise, and min(SNR, γ) / (SNR + 1) of the error in v. Finite at ā = 0 (zero terminal SNR) too.

    Raises:
        ValueError: `prediction_type` is not one of `PREDICTION_TYPES`.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; allowed are {', '.join(PREDICTION_TYPES)}")
    if gamma is None:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    return snr.clamp(max=gamma) / (snr + 1)


def diffusion_loss(
    prediction: Tensor,
    prediction_type: str,
    x0: Tensor,
    noise: Tensor,
    alphas_cumprod: Tensor,
    gamma: float | None = None,
) -> Tensor:
    """Scalar fp32: the weighted squared error, mean over pixels and batch.

    Args:
        prediction: the network's output, [B, C, H, W], any floating-point dtype.
        gamma: of the min-SNR weight, or None for equal weights.
        Others as in `add_noise`.
    """
    error = prediction.float() - target(prediction_type, x0, noise, alphas_cumprod)
    per_image = error.square().flatten(1).mean(1)
    return (min_snr_weight(prediction_type, alphas_cumprod, gamma) * per_image).mean()
