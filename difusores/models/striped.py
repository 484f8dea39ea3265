"""Layers of autoencoders on large images, a few rows at a time, for little memory: what tiles are made of.

The numbers are those of the layers themselves up to rounding: a group norm's mean and variance are of the
whole image, and a 3x3 convolution is given the row above and below its stripe. Held are a layer's input and
its output, each once; a residual is added within its memory. Images are [N, C, H, W], in the layout in which
they come. Without gradients only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores.models.layers import GroupNormAct, double
from difusores.ops import group_norm_affine

LARGE = 64 << 20  # bytes of a layer's input from which on it is worth it
STRIPE = 32 << 20  # bytes of the rows, in float32, that are normalised at once


def is_large(x: Tensor) -> bool:
    """Whether layers go by stripes for this input."""
    return x.numel() * x.element_size() >= LARGE


def up_block(block: Any, x: Tensor) -> Tensor:
    """The forward of an `UpBlock2D` without states; writes over x."""
    for i, resnet in enumerate(block.resnets):
        x = residual(resnet, x)
        if block.attentions is not None:
            x = block.attentions[i](x)
    for upsampler in block.upsamplers or ():
        x = convolved(upsampler.conv, x, factor=2) if is_large(x) else upsampler(x)
    return x


def down_block(block: Any, x: Tensor) -> Tensor:
    """The forward of a `DownBlock2D` without states; writes over x."""
    for i, resnet in enumerate(block.resnets):
        x = residual(resnet, x)
        if block.attentions is not None:
            x = block.attentions[i](x)
    for downsampler in block.downsamplers or ():
        x = downsampler(x)
    return x


def residual(block: Any, x: Tensor) -> Tensor:
    """The forward of a `ResnetBlock2D` without a time; writes over a large x."""
    if not is_large(x):
        out: Tensor = block(x)
        return out
    hidden = convolved(block.conv1, x, block.norm1)
    if block.conv_shortcut is not None:
        width = block.conv_shortcut.out_channels
        fits = len(x) == 1 and x.is_contiguous() and width <= x.shape[1]
        x = convolved(block.conv_shortcut, x, into=x[:, :width] if fits else None)
    total = convolved(block.conv2, hidden, block.norm2, plus=x)
    return total if block.output_scale_factor == 1.0 else total.div_(block.output_scale_factor)


def convolved(
    conv: Any,
    x: Tensor,
    norm: GroupNormAct | None = None,
    *,
    factor: int = 1,
    into: Tensor | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """conv(norm(x)), of stride 1.

    Args:
        norm: with its activation.
        factor: 2 doubles height and width before the convolution.
        into: where the result goes; it may share the rows of x for a 1x1 convolution.
        plus: what the result is added to, in its memory.
    """
    height, reach = x.shape[2], conv.kernel_size[0] // 2
    affine = None if norm is None else _affine(norm, x)
    out = into if plus is None else plus
    for top, bottom in _stripes(x, factor):
        first, last = max(top - reach, 0), min(bottom + reach, height)
        part = x[:, :, first:last]
        if norm is not None and affine is not None:
            part = _normalised(norm, part, *affine)
        rows = slice(factor * (top - first), factor * (bottom - first))
        part = conv(double(part) if factor == 2 else part)[:, :, rows]
        if out is None:
            out = _empty_like(part, x, height * factor)
        target = out[:, :, factor * top : factor * bottom]
        if plus is None:
            target.copy_(part)
        else:
            target.add_(part)
    assert out is not None
    return out


def _stripes(x: Tensor, factor: int) -> Iterator[tuple[int, int]]:
    """First and one past the last row of each."""
    n, c, height, width = x.shape
    rows = max(1, STRIPE // (4 * n * c * width * factor**2))
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def _empty_like(part: Tensor, x: Tensor, height: int) -> Tensor:
    """The whole of which `part` is a stripe, in the layout of x."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(
        (*part.shape[:2], height, part.shape[3]),
        dtype=part.dtype,
        device=part.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _affine(norm: GroupNormAct, x: Tensor) -> tuple[Tensor, Tensor]:
    """Multiplier and offset [N, C] of a group norm over the whole of x."""
    if x.is_contiguous(memory_format=torch.channels_last):
        multiplier, offset = group_norm_affine(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return multiplier, offset
    width = x.shape[1] // norm.num_groups
    # a group at a time, since what reads NCHW makes copies in float32
    parts = [
        group_norm_affine(
            x[:, c : c + width], 1, norm.weight[c : c + width], norm.bias[c : c + width], norm.eps
        )
        for c in range(0, x.shape[1], width)
    ]
    multipliers, offsets = zip(*parts, strict=True)
    return torch.cat(multipliers, dim=1), torch.cat(offsets, dim=1)


def _normalised(norm: GroupNormAct, x: Tensor, multiplier: Tensor, offset: Tensor) -> Tensor:
    wide = torch.addcmul(offset[:, :, None, None], x.to(multiplier.dtype), multiplier[:, :, None, None])
    if norm.fused_silu:
        wide = F.silu(wide, inplace=True)
    elif norm.act is not None:
        wide = norm.act(wide)
    return wide.to(x.dtype)
