"""Layers of UNets and autoencoders: residual block, attention, resampling, group norm with activation.

Tensors are [N, C, H, W], NCHW or channels_last, and leave in the layout in which they came. `temb` is the
time embedding, [N, temb_channels]. Module names are those of diffusers, so that checkpoints fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from difusores.models.attention_processor import AttentionLayer, is_standard
from difusores.ops import attention, group_norm_silu

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


def activation(name: str) -> nn.Module:
    """The activation of that name, in any case.

    Raises:
        ValueError: there is none of that name.
    """
    if name.lower() not in ACTIVATIONS:
        raise ValueError(f"act_fn is {name!r}; allowed are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]()


class GroupNormAct(nn.GroupNorm):
    """Group normalisation of x + add, an optional per-image scale and shift, and an activation, in one op.

    Args:
        act_fn: name of the activation; None for none.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float, act_fn: str | None = "silu") -> None:
        super().__init__(num_groups, num_channels, eps=eps)
        self.act = None if act_fn is None else activation(act_fn)
        self.fused_silu = isinstance(self.act, nn.SiLU)

    def forward(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x: [N, C, *]; add, scale, shift: [N, C]."""
        norm = (self.num_groups, self.weight, self.bias, self.eps)
        fused = group_norm_silu(x, *norm, silu=self.fused_silu, add=add, scale=scale, shift=shift)
        out = cast(torch.Tensor, fused)
        return out if self.act is None or self.fused_silu else self.act(out)


@dataclass(frozen=True)
class BlockOptions:
    """What all residual and attention blocks of one network share.

    Attributes:
        temb_channels: width of the time embedding; None for networks without time.
        groups, eps, act_fn: of the group normalisations.
        dropout: probability, in training only.
        scale_shift: the time embedding scales and shifts after the second normalisation; else it is added
            before.
    """

    temb_channels: int | None
    groups: int = 32
    eps: float = 1e-6
    act_fn: str = "silu"
    dropout: float = 0.0
    scale_shift: bool = False


class Downsample2D(nn.Module):
    """Halve height and width by a convolution of stride 2; padding 0 adds a row below and a column right."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)
        return out


def double(x: torch.Tensor, size: torch.Size | None = None) -> torch.Tensor:
    """Height and width doubled by repetition, or brought to `size`."""
    if size is None:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.interpolate(x, size=tuple(size), mode="nearest")


class Upsample2D(nn.Module):
    """Double height and width by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor | None = None, size: torch.Size | None = None
    ) -> torch.Tensor:
        """size: height and width, where they are not twice those of x (odd ones on the way down)."""
        out: torch.Tensor = self.conv(double(x, size))
        return out


class ResnetBlock2D(nn.Module):
    """Two normalised convolutions beside a shortcut, which is a 1x1 convolution where the width changes.

    Args:
        resample: "up" doubles, "down" halves height and width of both branches, between norm and convolution.
        output_scale_factor: the sum of the branches is divided by it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        options: BlockOptions,
        resample: str | None = None,
        output_scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.scale_shift = options.scale_shift
        self.output_scale_factor = output_scale_factor
        self.norm1 = GroupNormAct(options.groups, in_channels, options.eps, options.act_fn)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj: nn.Linear | None = None
        if options.temb_channels is not None:
            width = 2 * out_channels if options.scale_shift else out_channels
            self.time_emb_proj = nn.Linear(options.temb_channels, width)
        self.norm2 = GroupNormAct(options.groups, out_channels, options.eps, options.act_fn)
        self.dropout = nn.Dropout(options.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = activation(options.act_fn)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def _resample(self, x: torch.Tensor, size: torch.Size | None) -> torch.Tensor:
        if self.resample == "up":
            return double(x, size)
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def _second_norm(self, hidden: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor
        if self.time_emb_proj is None:
            out = self.norm2(hidden)
            return out
        if temb is None:
            raise ValueError("this block has temb_channels and needs a time embedding; temb is None")
        embedding = self.time_emb_proj(self.nonlinearity(temb))
        if self.scale_shift:
            scale, shift = embedding.chunk(2, dim=1)
            out = self.norm2(hidden, scale=scale, shift=shift)
        else:
            out = self.norm2(hidden, add=embedding)
        return out

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor | None = None, size: torch.Size | None = None
    ) -> torch.Tensor:
        """size: see `Upsample2D`."""
        hidden = self.conv1(self._resample(self.norm1(x), size))
        hidden = self.conv2(self.dropout(self._second_norm(hidden, temb)))
        shortcut = self._resample(x, size)
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        return _add(shortcut, hidden, self.output_scale_factor)


class Attention(AttentionLayer):
    """Self-attention over the pixels of a normalised image, added to the image.

    Args:
        channels: width of the image.
        head_dim: width of a head; there are `channels // head_dim` of them.
        groups: of the normalisation; None for none.
        output_scale_factor: the sum is divided by it.
    """

    upcast_softmax = True
    residual_connection = True

    def __init__(
        self, channels: int, head_dim: int, groups: int | None, eps: float, output_scale_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.heads = channels // head_dim
        if self.heads < 1:
            raise ValueError(
                f"attention_head_dim is {head_dim}; at most the {channels} channels of its block are allowed"
            )
        self.output_scale_factor = self.rescale_output_factor = output_scale_factor
        inner = self.heads * head_dim
        self.group_norm = GroupNormAct(groups, channels, eps, act_fn=None) if groups is not None else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels), nn.Dropout(0.0)])

    def forward(self, x: torch.Tensor, context: object = None) -> torch.Tensor:
        """x: [N, C, H, W]; `context` is not looked at: transformers stand in the same place."""
        return self.attend(x) if is_standard(self.processor) else self.processed(x)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """x: [N, C, H, W]."""
        hidden = x if self.group_norm is None else self.group_norm(x)
        # [N, HW, C]; of NCHW one copy here saves three in the projections
        tokens = hidden.flatten(2).transpose(1, 2).contiguous()
        q, k, v = (
            projection(tokens).view(*tokens.shape[:2], self.heads, -1).transpose(1, 2)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        out = attention(q, k, v).transpose(1, 2).flatten(2)
        for layer in self.to_out:
            out = layer(out)
        return _add(x, out.transpose(1, 2).reshape(x.shape), self.output_scale_factor)


def _add(x: torch.Tensor, branch: torch.Tensor, divisor: float) -> torch.Tensor:
    # x first: of two layouts, the sum takes that of the first operand
    total = x + branch
    return total if divisor == 1.0 else total / divisor
