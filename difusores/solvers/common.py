"""What all solvers share: what the model predicts, and the training side of the process.

Notation: x = alpha * x0 + sigma * noise. Samplers in training steps keep alpha² + sigma² = 1, samplers in
noise levels alpha = 1; e is the model's output, v its second half where the variance is learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from difusores.plan import Threshold

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class Prediction:
    """What the model predicts and how the x0 that follows is limited.

    Attributes:
        kind: "epsilon" (the noise), "sample" (x0) or "v_prediction" (Salimans & Ho 2022, appendix D).
        clip: x0 is clamped to [-clip, clip]; None leaves it.
        threshold: dynamic thresholding, in place of the clamp.
    """

    kind: str = "epsilon"
    clip: float | None = None
    threshold: Threshold | None = None

    def __post_init__(self) -> None:
        if self.kind not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {self.kind!r}"
            )

    @property
    def limits(self) -> tuple[float, float]:
        """lo and hi of a row."""
        limit = math.inf if self.clip is None or self.threshold is not None else self.clip
        return -limit, limit

    def x0(self, alpha: float, sigma: float) -> tuple[float, float]:
        """(p_x, p_e): the unlimited x0 = p_x * x + p_e * e.

        Raises:
            ValueError: alpha = 0 and the model predicts noise, which then says nothing about x0.
        """
        if self.kind == "sample":
            return 0.0, 1.0
        if self.kind == "v_prediction":
            return alpha, -sigma
        if alpha == 0:
            raise ValueError(
                "at a zero signal-to-noise ratio (rescale_betas_zero_snr, last step) predicted noise "
                "does not tell x0: use 'v_prediction' or 'sample', or timestep_spacing 'leading'"
            )
        return 1 / alpha, -sigma / alpha

    def x0_at(self, sigma: float) -> tuple[float, float]:
        """(p_x, p_e) for a sample x0 + sigma * noise, which the model is given divided by √(sigma² + 1)."""
        if self.kind == "sample":
            return 0.0, 1.0
        if self.kind == "v_prediction":
            return 1 / (sigma * sigma + 1), -sigma / math.sqrt(sigma * sigma + 1)
        return 1.0, -sigma

    def slope_at(self, sigma: float) -> dict[str, float]:
        """Weights of dx/dsigma = (x - x0) / sigma there, x0 limited."""
        if self.kind == "epsilon" and self.clip is None and self.threshold is None:
            return {"e": 1.0}
        return {"xh": 1 / sigma, "x0": -1 / sigma}

    def epsilon(self, alpha: float, sigma: float) -> dict[str, float]:
        """Weights of the noise that goes with the unlimited x0."""
        if self.kind == "epsilon":
            return {"e": 1.0}
        if self.kind == "v_prediction":
            return {"e": alpha, "xh": sigma}
        return {"xh": 1 / sigma, "e": -alpha / sigma}


def forward_process(
    alphas_cumprod: Tensor, samples: Tensor, noise: Tensor, timesteps: Tensor, *, velocity: bool = False
) -> Tensor:
    """The training side: alpha * samples + sigma * noise, or the velocity alpha * noise - sigma * samples.

    Args:
        alphas_cumprod: [T] float64, on samples' device.
        samples, noise: [B, ...], any floating dtype; fp16 and bf16 are computed in fp32.
        timesteps: [B], [1] or 0-dim integers.
    """
    dtype = torch.promote_types(samples.dtype, noise.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    a = alphas_cumprod[timesteps.to(alphas_cumprod.device)].reshape(-1, *([1] * (samples.ndim - 1)))
    alpha, sigma = a.sqrt().to(wide), (1 - a).sqrt().to(wide)
    samples, noise = samples.to(wide), noise.to(wide)
    mixed = alpha * noise - sigma * samples if velocity else alpha * samples + sigma * noise
    return mixed.to(dtype)


def raise_noise(sigmas: Tensor, samples: Tensor, noise: Tensor) -> Tensor:
    """The training side in noise levels, samples + sigma * noise.

    Args:
        sigmas: [B] or [1] float32.
        samples, noise: [B, ...], any floating dtype; fp16 and bf16 are computed in fp32.
    """
    dtype = torch.promote_types(samples.dtype, noise.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    levels = sigmas.to(samples.device, wide).reshape(-1, *([1] * (samples.ndim - 1)))
    return (samples.to(wide) + levels * noise.to(wide)).to(dtype)
