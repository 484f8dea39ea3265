"""Embeddings of the timestep: sinusoids (Vaswani et al. 2017), Fourier features (Song et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import nn

from difusores.models.layers import activation
from difusores.ops import attention


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
    """Two linear layers with an activation between: [N, in_channels] -> [N, time_embed_dim].

    Args:
        act_fn: name of the activation.
        post_act_fn: name of one more at the end, or None.
        cond_proj_dim: width of a condition that is projected and added to the input, or None.
    """

    def __init__(
        self,
        in_channels: int,
        time_embed_dim: int,
        act_fn: str = "silu",
        post_act_fn: str | None = None,
        cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.cond_proj = nn.Linear(cond_proj_dim, in_channels, bias=False) if cond_proj_dim else None
        self.act = activation(act_fn)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)
        self.post_act = activation(post_act_fn) if post_act_fn else None

    def forward(self, sample: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """condition: [N, cond_proj_dim].

        Raises:
            ValueError: a condition for an embedding that takes none.
        """
        if condition is not None:
            if self.cond_proj is None:
                raise ValueError("timestep_cond is given, and this model has no time_cond_proj_dim")
            sample = sample + self.cond_proj(condition)
        out: torch.Tensor = self.linear_2(self.act(self.linear_1(sample)))
        return out if self.post_act is None else self.post_act(out)


class TextTimeEmbedding(nn.Module):
    """A text as one vector beside the time embedding: [N, L, encoder_dim] -> [N, time_embed_dim]."""

    def __init__(self, encoder_dim: int, time_embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(encoder_dim)
        self.pool = AttentionPooling(num_heads, encoder_dim)
        self.proj = nn.Linear(encoder_dim, time_embed_dim)
        self.norm2 = nn.LayerNorm(time_embed_dim)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm2(self.proj(self.pool(self.norm1(states))))
        return out


class AttentionPooling(nn.Module):
    """Attention from the mean of the tokens to the mean and the tokens: [N, L, width] -> [N, width]."""

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        token = x.mean(dim=1, keepdim=True) + self.positional_embedding.to(x.dtype)
        x = torch.cat((token, x), dim=1)
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.q_proj(token), self.k_proj(x), self.v_proj(x))
        )
        return attention(q, k, v).transpose(1, 2).flatten(2)[:, 0]
