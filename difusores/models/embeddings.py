"""Embeddings of the timestep: sinusoids (Vaswani et al. 2017), Fourier features (Song et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import nn


class Timesteps(nn.Module):
    """Sinusoids of the timestep at geometrically spaced frequencies, from 1 down to about 1/10000.

    Args:
        num_channels: width of the output; an odd one ends in a column of zeros.
        flip_sin_to_cos: cosines first.
        downscale_freq_shift: taken from half the width before the spacing is computed.
    """

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, downscale_freq_shift: float) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.downscale_freq_shift = downscale_freq_shift

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """[N] of any dtype -> [N, num_channels], float32."""
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        exponents = exponents * -math.log(10000) / (half - self.downscale_freq_shift)
        angles = timesteps[:, None].float() * exponents.exp()
        waves = (angles.cos(), angles.sin()) if self.flip_sin_to_cos else (angles.sin(), angles.cos())
        return nn.functional.pad(torch.cat(waves, dim=1), (0, self.num_channels % 2))


class GaussianFourierProjection(nn.Module):
    """Sine and cosine of the logarithm of the noise level at fixed random frequencies.

    Args:
        num_channels: number of frequencies, half the width of the output.
        scale: standard deviation of the frequencies.
    """

    def __init__(self, num_channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_channels) * scale, requires_grad=False)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """[N], positive -> [N, 2 * num_channels]."""
        angles = timesteps.log()[:, None] * self.weight * 2 * math.pi
        return torch.cat((angles.sin(), angles.cos()), dim=1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between: [N, in_channels] -> [N, time_embed_dim]."""

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_2(self.act(self.linear_1(sample)))
        return out
