"""The gradients of group_norm_silu: grad_h = a g + p (h - center) + q + grad_sum, a .. q of a channel.

g = grad_y * act'((h - center) * a + b); the rest of it: csrc/cuda/group_norm_silu_backward.cuh.

Bytes: x (and the residual) three times, grad_y and grad_sum twice, grad_x once, in three launches: moments
of each channel, its sums, the map. What is between them is [N, C] numbers, joined by PyTorch in float64. A
program takes some channels and a chunk of positions, tiles of channels x positions in either layout; sums
have a fixed order, which depends on the image alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from difusores.ops.group_norm_silu import memory_format
from difusores.ops.triton import power_of_2, run
from difusores.ops.triton.group_norm_silu import _read, _welford

TILE = 2048  # elements that a program of 4 warps holds at once
LOOPS = 8  # tiles of a program
SIDE = 64  # channels of a tile, channels last


@triton.jit
def _place(channels, positions, chunks, chunk, LAST: tl.constexpr, CHANNELS: tl.constexpr):
    """Of this program: image, chunk, channels, the first position and the end, where the channels begin."""
    blocks = tl.cdiv(channels, CHANNELS)
    image = (tl.program_id(0) // (blocks * chunks)).to(tl.int64)
    piece = tl.program_id(0) % chunks
    c = (tl.program_id(0) // chunks % blocks) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    first = piece * chunk
    last = tl.minimum(first + chunk, positions)
    start = image * channels * positions
    if LAST:
        start += c.to(tl.int64)
    else:
        start += c.to(tl.int64) * positions
    return image, piece, c, first, last, start


@triton.jit
def moments(
    x,
    residual,
    out,
    channels,
    positions,
    chunks,
    chunk,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Of each channel's chunk, about the channel's first element: that element, mean, squared deviations."""
    image, piece, c, first, last, start = _place(channels, positions, chunks, chunk, LAST, CHANNELS)
    of_p = channels if LAST else 1
    pivot = _read(x, start, c < channels)
    if residual is not None:
        pivot += _read(residual, start, c < channels)
    mean = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    square = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    count = tl.zeros([1, POSITIONS], tl.float32)
    for p0 in range(first, last, POSITIONS):
        p = p0 + tl.arange(0, POSITIONS)[None, :]
        inside = (c < channels) & (p < last)
        h = _read(x, start + p.to(tl.int64) * of_p, inside)
        if residual is not None:
            h += _read(residual, start + p.to(tl.int64) * of_p, inside)
        count += (p < last).to(tl.float32)
        mean, square = _welford(h - pivot, inside, count, mean, square)
    middle = tl.sum(count * mean, axis=1)[:, None] / (last - first).to(tl.float32)
    square = tl.sum(square + count * (mean - middle) * (mean - middle), axis=1)[:, None]
    place = out + ((image * channels + c) * chunks + piece) * 3
    tl.store(place, pivot, c < channels)
    tl.store(place + 1, middle, c < channels)
    tl.store(place + 2, square, c < channels)


@triton.jit
def grads(
    x,
    residual,
    grad_y,
    grad_sum,
    coefficients,
    out,
    channels,
    positions,
    chunks,
    chunk,
    MAP: tl.constexpr,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """MAP: grad_x; else of each channel's chunk the sums of g, g (h - center), h - center, grad_sum."""
    image, piece, c, first, last, start = _place(channels, positions, chunks, chunk, LAST, CHANNELS)
    of_p = channels if LAST else 1
    own = coefficients + (image * channels + c) * 5
    center = _read(own, 0, c < channels)
    a = _read(own, 1, c < channels)
    b = _read(own, 2, c < channels)
    p_slope = _read(own, 3, c < channels)
    q = _read(own, 4, c < channels)
    of_g = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    of_product = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    of_away = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    of_sum = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    for p0 in range(first, last, POSITIONS):
        p = p0 + tl.arange(0, POSITIONS)[None, :]
        inside = (c < channels) & (p < last)
        at = start + p.to(tl.int64) * of_p
        h = _read(x, at, inside)
        if residual is not None:
            h += _read(residual, at, inside)
        away = tl.where(inside, h - center, 0.0)
        g = _read(grad_y, at, inside)
        if SILU:
            t = away * a + b
            s = tl.sigmoid(t)
            g *= s * (1.0 + t * (1.0 - s))
        if MAP:
            grad = a * g + (p_slope * away + q)
            if grad_sum is not None:
                grad += _read(grad_sum, at, inside)
            tl.store(out + at, grad.to(out.dtype.element_ty), inside)
        else:
            of_g += g
            of_product += g * away
            of_away += away
            if grad_sum is not None:
                of_sum += _read(grad_sum, at, inside)
    if not MAP:
        place = out + ((image * channels + c) * chunks + piece) * 4
        tl.store(place, tl.sum(of_g, axis=1)[:, None], c < channels)
        tl.store(place + 1, tl.sum(of_product, axis=1)[:, None], c < channels)
        tl.store(place + 2, tl.sum(of_away, axis=1)[:, None], c < channels)
        tl.store(place + 3, tl.sum(of_sum, axis=1)[:, None], c < channels)


def launch(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, ...]:
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    params = (weight, bias, scale, shift, add)
    if x.numel() == 0:
        return (grad_x, *(x.new_empty(0) if p is None else p.new_zeros(p.shape) for p in params))
    n, c, s, last = x.shape[0], x.shape[1], x.shape[2:].numel(), not x.is_contiguous()
    side = min(SIDE, power_of_2(c)) if last else min(power_of_2(c), max(1, TILE // power_of_2(s)))
    wide = min(max(1, TILE // side), power_of_2(s))
    chunk = wide * LOOPS
    chunks = -(-s // chunk)
    programs = n * -(-c // side) * chunks
    options: dict[str, Any] = {"LAST": last, "CHANNELS": side, "POSITIONS": wide, "num_warps": 4}
    sizes = (c, s, chunks, chunk)

    # In float64, for mean and deviation may differ by many digits; [N, G, channels, chunks].
    found = x.new_empty((n, num_groups, c // num_groups, chunks, 3), dtype=torch.float32)
    run(moments, programs, x, x, residual, found, *sizes, **options)
    pivot, middle, square = found.double().unbind(-1)
    of_chunk = torch.full((chunks,), chunk, dtype=torch.float64, device=x.device)
    of_chunk[-1] = s - (chunks - 1) * chunk
    later = 0.0 if add is None else add.double().reshape(n, num_groups, -1)
    means = pivot + middle + (0.0 if add is None else add.double().reshape(n, num_groups, -1, 1))
    size = s * (c // num_groups)
    mean = (means * of_chunk).sum((2, 3), keepdim=True) / size
    variance = (square + of_chunk * (means - mean).square()).sum((2, 3)) / size
    rstd = torch.rsqrt(variance + eps)[..., None]  # [N, G, 1]

    def grouped(p: Tensor | None, otherwise: float) -> Tensor | float:
        if p is None:
            return otherwise
        return p.double().reshape(-1, num_groups, c // num_groups)

    gamma, factor = grouped(weight, 1.0), 1.0 + grouped(scale, 0.0)
    a = (rstd * gamma * factor).expand(n, num_groups, c // num_groups)
    exact = mean[..., 0] - later  # of x + residual; what a kernel subtracts is its fp32 value
    center = exact.float().double().expand_as(a)
    rest = exact - center
    b = grouped(bias, 0.0) * factor + grouped(shift, 0.0) - rest * a
    zero = torch.zeros_like(a)

    def table(p: Tensor, q: Tensor) -> Tensor:
        return torch.stack((center, a, b, p, q), -1).float()

    sums = x.new_empty((n, num_groups, c // num_groups, chunks, 4), dtype=torch.float32)
    operands = (x, residual, grad_y, grad_sum)
    run(grads, programs, x, *operands, table(zero, zero), sums, *sizes, MAP=False, SILU=silu, **options)
    of_g, product, away, of_sum = sums.double().sum(3).unbind(-1)
    of_hat = rstd * (product - rest * of_g)
    mean_g = (gamma * factor * of_g).sum(-1, keepdim=True) / size
    mean_hat = (gamma * factor * of_hat).sum(-1, keepdim=True) / size
    p = (-rstd * rstd * mean_hat).expand_as(a)
    q = -rstd * (mean_g - rstd * rest * mean_hat)
    run(grads, programs, x, *operands, table(p, q), grad_x, *sizes, MAP=True, SILU=silu, **options)

    def of(param: Tensor | None, value: Tensor | float) -> Tensor:
        if param is None:
            return x.new_empty(0)
        assert isinstance(value, Tensor)
        return value.reshape(-1, *param.shape[-1:]).to(param.dtype).reshape(param.shape)

    return (
        grad_x,
        of(weight, (factor * of_hat).sum(0)),
        of(bias, (factor * of_g).sum(0)),
        of(scale, gamma * of_hat + grouped(bias, 0.0) * of_g),
        of(shift, of_g),
        of(add, a * of_g + p * away + q * s + of_sum),
    )
