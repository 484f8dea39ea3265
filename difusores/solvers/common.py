"""What all solvers share: what the model predicts, and the training side of the process.

Notation: x = alpha * x0 + sigma * noise. Samplers in training steps keep alpha² + sigma² = 1, samplers in
noise levels alpha = 1; e is the model's output, v its second half where the variance is learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difusores.plan import Threshold

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def churn_factor(s_churn: float, calls: int) -> float:
    """By what part of itself a noise level is raised (Karras et al. 2022, algorithm 2).

    Args:
        s_churn: shared out over the calls.
        calls: of the model, in the run.

    Raises:
        ValueError: s_churn is negative, or no number.
    """
    if not s_churn >= 0:
        raise ValueError(f"s_churn must not be below 0, got {s_churn}")
    return min(s_churn / calls, math.sqrt(2) - 1)


@dataclass(frozen=True)
class Prediction:
    """What the model predicts and how the x0 that follows is limited.

    Attributes:
        kind: "epsilon" (the noise), "sample" (x0), "v_prediction" (Salimans & Ho 2022, appendix D), or where
            alpha = 1 - sigma "flow_prediction", noise - x0 (Lipman et al. 2022).
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
            ValueError: alpha = 0 and the model predicts noise, which then says nothing about x0; or a flow
                where alpha + sigma is not 1.
        """
        if self.kind == "sample":
            return 0.0, 1.0
        if self.kind == "flow_prediction":
            if not math.isclose(alpha + sigma, 1.0, rel_tol=1e-6):
                raise ValueError(
                    "'flow_prediction' is for samples (1 - sigma) * x0 + sigma * noise, and here they are "
                    f"{alpha:.6g} * x0 + {sigma:.6g} * noise: set use_flow_sigmas where there is one"
                )
            return 1.0, -sigma
        if self.kind == "v_prediction":
            return alpha, -sigma
        if alpha == 0:
            raise ValueError(
                "at a zero signal-to-noise ratio (rescale_betas_zero_snr, last step) predicted noise "
                "does not tell x0: use 'v_prediction' or 'sample', or timestep_spacing 'leading'"
            )
        return 1 / alpha, -sigma / alpha

    def c_in(self, sigma: float) -> float:
        """Factor of a sample x0 + sigma * noise that makes the model's input."""
        return 1 / math.sqrt(sigma * sigma + 1)

    def x0_at(self, sigma: float) -> tuple[float, float]:
        """(p_x, p_e) for a sample x0 + sigma * noise, which the model is given divided by √(sigma² + 1)."""
        if self.kind == "flow_prediction":
            return self.x0(1.0, sigma)
        if self.kind == "sample":
            return 0.0, 1.0
        if self.kind == "v_prediction":
            return 1 / (sigma * sigma + 1), -sigma / math.sqrt(sigma * sigma + 1)
        return 1.0, -sigma

    def slope_at(self, sigma: float) -> dict[str, float]:
        """Weights of dx/dsigma = (x - x0) / sigma there, x0 limited."""
        if self.clip is None and self.threshold is None:
            if self.kind == "epsilon":
                return {"e": 1.0}
            if self.kind == "v_prediction":  # at a low level x and x0 would cancel
                return {"xh": sigma / (sigma * sigma + 1), "e": 1 / math.sqrt(sigma * sigma + 1)}
        return {"xh": 1 / sigma, "x0": -1 / sigma}

    def epsilon(self, alpha: float, sigma: float) -> dict[str, float]:
        """Weights of the noise that goes with the unlimited x0."""
        if self.kind == "epsilon":
            return {"e": 1.0}
        if self.kind == "v_prediction":
            return {"e": alpha, "xh": sigma}
        if self.kind == "flow_prediction":
            return {"e": alpha, "xh": 1.0}
        return {"xh": 1 / sigma, "e": -alpha / sigma}

    def limited_epsilon(self, alpha: float, sigma: float) -> dict[str, float]:
        """Weights of the noise that goes with the limited x0."""
        if self.clip is None and self.threshold is None:
            return self.epsilon(alpha, sigma)
        return {"xh": 1 / sigma, "x0": -alpha / sigma}


@dataclass(frozen=True)
class Preconditioned(Prediction):
    """A network F of which x0 = c_skip * x + c_out * F(c_in * x) (Karras et al. 2022, table 1).

    Attributes:
        kind: "epsilon", or "v_prediction" for the other sign of c_out.
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type must be 'epsilon' or 'v_prediction', got {self.kind!r}")

    def c_in(self, sigma: float) -> float:
        return 1 / math.sqrt(sigma * sigma + self.sigma_data**2)

    def x0(self, alpha: float, sigma: float) -> tuple[float, float]:
        return self.x0_at(sigma / alpha)

    def x0_at(self, sigma: float) -> tuple[float, float]:
        total = sigma * sigma + self.sigma_data**2
        c_out = sigma * self.sigma_data / math.sqrt(total)
        return self.sigma_data**2 / total, c_out if self.kind == "epsilon" else -c_out

    def scalings(self, sigma: Any) -> tuple[Any, Any]:
        """(c_skip, c_out) at a noise level, a number or tensor."""
        variance = self.sigma_data**2
        c_out = sigma * self.sigma_data / (sigma**2 + variance) ** 0.5
        return variance / (sigma**2 + variance), c_out if self.kind == "epsilon" else -c_out

    def slope_at(self, sigma: float) -> dict[str, float]:
        return {"xh": 1 / sigma, "x0": -1 / sigma}


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


def mix(levels: Sequence[tuple[float, float]], samples: Tensor, noise: Tensor) -> Tensor:
    """The training side at given (alpha, sigma), alpha * samples + sigma * noise.

    levels: one per image, or one for all.
    samples, noise: [B, ...], any floating dtype; fp16 and bf16 are computed in fp32.
    """
    dtype = torch.promote_types(samples.dtype, noise.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    table = torch.tensor(levels, dtype=torch.float64, device="cpu").to(samples.device, wide)
    alpha, sigma = table.reshape(-1, 2, *([1] * (samples.ndim - 1))).unbind(1)
    return (alpha * samples.to(wide) + sigma * noise.to(wide)).to(dtype)


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
