"""Group normalisation with adds before it, scale-shift and SiLU after it (formula: ops/group_norm_silu.py).

Bytes: x and residual in, y and h = x + add + residual out; then x once more for y, from L2 where one program
has a whole group. Where h is kept, h is what is read again. Layout: [N, C, S] or [N, S, C] (channels last).

Statistics: every lane of a tile of registers has a running mean and sum of squared deviations (Welford), of
values about the group's first element, so that a mean far above the deviation costs no digits. Lanes, and the
chunks of a group too large for one program, are joined by Chan's formula in a fixed order, without atomics.

A program takes a group (channels last: some, side by side in memory) of up to FUSED elements. Larger ones are
cut into chunks of positions, whose statistics come from a launch of their own. The cut depends on the image's
shape and dtype alone, so an image has the same bits alone and in a batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from difusores.ops.group_norm_silu import memory_format
from difusores.ops.triton import alignment, power_of_2, run

TILE = 4096  # elements that a program holds at once: 16 in a thread of 8 warps
CHUNK = 32768  # elements that a program takes of what is cut into chunks
FUSED = 131072  # elements up to which one program takes a whole group
SIDE = 128  # channels of a program that takes several groups, channels last
MOST = 128  # chunks of an image, channels last: each program reads the statistics of all for all its channels
JOINED = 16  # of those at a time


@triton.jit
def _read(p, at, inside):
    """As float32; 0 where not `inside`, which is None for a tile without an edge."""
    if inside is None:
        return tl.load(p + at).to(tl.float32)
    else:
        return tl.load(p + at, inside, other=0.0).to(tl.float32)


@triton.jit
def _sum(x, residual, total, added, at, inside):
    """x + add + residual as float32, rounded as `total` holds it where that is asked for."""
    h = _read(x, at, inside)
    if added is not None:
        h += added
    if residual is not None:
        h += _read(residual, at, inside)
    if total is not None:
        h = h.to(total.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _again(x, residual, total, added, at, inside):
    """What `_sum` gave, after `total` was written."""
    if total is not None:
        return _read(total, at, inside)
    else:
        return _sum(x, residual, None, added, at, inside)


@triton.jit
def _welford(h, inside, count, mean, square):
    """One more value in each lane, `count` with this one."""
    delta = h - mean
    step = delta * (1.0 / tl.maximum(count, 1.0))
    if inside is not None:
        step = tl.where(inside, step, 0.0)
        delta = tl.where(inside, delta, 0.0)
    mean += step
    return mean, square + delta * (h - mean)


@triton.jit
def _rstd(square, count, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(square / count + eps))


@triton.jit
def _affine(rstd, weight, bias, scale, shift, channel, scale_row, shift_row, inside):
    """a and b of act(a * (h - mean) + b) for some channels of one image."""
    a = rstd
    b = 0.0
    if weight is not None:
        a *= _read(weight, channel, inside)
    if bias is not None:
        b += _read(bias, channel, inside)
    if scale is not None:
        factor = 1.0 + _read(scale, scale_row + channel, inside)
        a *= factor
        b *= factor
    if shift is not None:
        b += _read(shift, shift_row + channel, inside)
    return a, b


@triton.jit
def _act(h, a, b, SILU: tl.constexpr):
    h = h * a + b
    return h * tl.sigmoid(h) if SILU else h


@triton.jit
def nchw(
    x,
    residual,
    add,
    weight,
    bias,
    scale,
    shift,
    y,
    total,
    partial,
    channels,
    groups,
    positions,
    chunk,
    chunks,
    eps,
    add_stride,
    scale_stride,
    shift_stride,
    STATISTICS: tl.constexpr,
    APPLY: tl.constexpr,
    SILU: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One group of one image, or a chunk of its positions; tiles are channels x positions.

    `positions` are counted in units of ALIGN.
    """
    positions *= ALIGN
    group = tl.program_id(0) // chunks
    piece = tl.program_id(0) % chunks
    depth = channels // groups
    channel0 = group % groups * depth
    first = piece * chunk
    last = tl.minimum(first + chunk, positions)
    base = group.to(tl.int64) * depth * positions
    image = (group // groups).to(tl.int64)
    c_tile = tl.arange(0, CHANNELS)[:, None]
    p_tile = tl.arange(0, POSITIONS)[None, :]
    of_first = None if add is None else _read(add, image * add_stride + channel0, None)
    pivot = _sum(x, residual, total, of_first, base, None)
    if STATISTICS:
        mean = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        square = tl.zeros([CHANNELS, POSITIONS], tl.float32)
        count = 0.0 if EVEN else tl.zeros([CHANNELS, POSITIONS], tl.float32)
        for c0 in range(0, depth, CHANNELS):
            c = c0 + c_tile
            row = base + c.to(tl.int64) * positions
            valid = None if EVEN else c < depth
            added = None if add is None else _read(add, image * add_stride + channel0 + c, valid)
            for p0 in range(first, last, POSITIONS):
                p = p0 + p_tile
                inside = None if EVEN else (c < depth) & (p < last)
                h = _sum(x, residual, total, added, row + p, inside)
                if total is not None:
                    tl.store(total + row + p, h.to(total.dtype.element_ty), inside)
                count += 1.0 if EVEN else tl.where(inside, 1.0, 0.0)
                mean, square = _welford(h - pivot, inside, count, mean, square)
        number = (depth * (last - first)).to(tl.float32)
        middle = tl.sum(count * mean) / number
        square = tl.sum(square + count * (mean - middle) * (mean - middle))
        if not APPLY:
            tl.store(partial + tl.program_id(0) * 2, middle)
            tl.store(partial + tl.program_id(0) * 2 + 1, square)
        elif total is not None:
            tl.debug_barrier()  # what other threads have written of `total` is read below
    else:
        k = tl.arange(0, CHUNKS)
        means = _read(partial, (group * chunks + k) * 2, k < chunks)
        squares = _read(partial, (group * chunks + k) * 2 + 1, k < chunks)
        counts = depth * tl.maximum(tl.minimum(positions - k * chunk, chunk), 0).to(tl.float32)
        number = (depth * positions).to(tl.float32)
        middle = tl.sum(counts * means) / number
        square = tl.sum(squares + counts * (means - middle) * (means - middle))
    if APPLY:
        rstd = _rstd(square, number, eps)
        for c0 in range(0, depth, CHANNELS):
            c = c0 + c_tile
            row = base + c.to(tl.int64) * positions
            valid = None if EVEN else c < depth
            added = None if add is None else _read(add, image * add_stride + channel0 + c, valid)
            at = channel0 + c
            a, b = _affine(
                rstd, weight, bias, scale, shift, at, image * scale_stride, image * shift_stride, valid
            )
            for p0 in range(first, last, POSITIONS):
                p = p0 + p_tile
                inside = None if EVEN else (c < depth) & (p < last)
                h = _again(x, residual, total, added, row + p, inside)
                h = _act((h - pivot) - middle, a, b, SILU)
                tl.store(y + row + p, h.to(y.dtype.element_ty), inside)


@triton.jit
def _of_group(values, same, ONE: tl.constexpr):
    """Sum over the channels of each channel's own group, [1, CHANNELS]."""
    if ONE:
        return tl.sum(values, axis=1)[:, None]
    else:
        return tl.sum(tl.where(same, tl.trans(values), 0.0), axis=0)[None, :]


@triton.jit
def nhwc(
    x,
    residual,
    add,
    weight,
    bias,
    scale,
    shift,
    y,
    total,
    partial,
    channels,
    groups,
    positions,
    chunk,
    chunks,
    eps,
    add_stride,
    scale_stride,
    shift_stride,
    width,
    STATISTICS: tl.constexpr,
    APPLY: tl.constexpr,
    SILU: tl.constexpr,
    ONE: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """`width` channels, which are whole groups, of one image, or of a chunk of its positions.

    Tiles are positions x channels. ONE: `width` is one group. `channels` and `width` are counted in units of
    ALIGN.
    """
    channels *= ALIGN
    width *= ALIGN
    blocks = tl.cdiv(channels, width)
    image = (tl.program_id(0) // (chunks * blocks)).to(tl.int64)
    block = tl.program_id(0) // chunks % blocks
    piece = tl.program_id(0) % chunks
    depth = channels // groups
    first = piece * chunk
    last = tl.minimum(first + chunk, positions)
    channel0 = block * width
    c_tile = tl.arange(0, CHANNELS)[None, :]
    p_tile = tl.arange(0, POSITIONS)[:, None]
    side = tl.minimum(width, channels - channel0)
    valid = c_tile < side
    c = channel0 + c_tile
    base = image * positions * channels
    leader = tl.minimum(c // depth * depth, channels - 1)  # the first channel of each channel's group
    of_leader = None if add is None else _read(add, image * add_stride + leader, None)
    pivot = _sum(x, residual, total, of_leader, base + leader, None)
    added = None if add is None else _read(add, image * add_stride + c, valid)
    same = None
    if STATISTICS:
        mean = tl.zeros([POSITIONS, CHANNELS], tl.float32)
        square = tl.zeros([POSITIONS, CHANNELS], tl.float32)
        count = tl.zeros([POSITIONS, 1], tl.float32)
        for p0 in range(first, last, POSITIONS):
            p = p0 + p_tile
            at = base + p.to(tl.int64) * channels + c
            inside = (p < last) & valid
            h = _sum(x, residual, total, added, at, inside)
            if total is not None:
                tl.store(total + at, h.to(total.dtype.element_ty), inside)
            count += (p < last).to(tl.float32)
            mean, square = _welford(h - pivot, inside, count, mean, square)
        # First the positions of a channel, then the channels of a group.
        number = (last - first).to(tl.float32)
        middle = tl.sum(count * mean, axis=0)[None, :] / number
        square = tl.sum(square + count * (mean - middle) * (mean - middle), axis=0)[None, :]
        if not ONE:
            of = tl.arange(0, CHANNELS) // depth
            same = (of[:, None] == of[None, :]) & (tl.arange(0, CHANNELS) < side)[:, None]
        mean = middle
        middle = _of_group(tl.where(valid, mean, 0.0), same, ONE) / depth
        square = tl.where(valid, square + number * (mean - middle) * (mean - middle), 0.0)
        square = _of_group(square, same, ONE)
        number *= depth
        if not APPLY:
            place = partial + ((image * groups + c // depth) * chunks + piece) * 2
            leads = valid & (c == leader)
            tl.store(place, tl.broadcast_to(middle, [1, CHANNELS]), leads)
            tl.store(place + 1, tl.broadcast_to(square, [1, CHANNELS]), leads)
        elif total is not None:
            tl.debug_barrier()  # what other threads have written of `total` is read below
    else:
        means = tl.zeros([CHUNKS, CHANNELS], tl.float32)
        squares = tl.zeros([CHUNKS, CHANNELS], tl.float32)
        counts = tl.zeros([CHUNKS, 1], tl.float32)
        of = partial + (image * groups + leader // depth) * chunks * 2
        for k0 in range(0, chunks, CHUNKS):
            k = k0 + tl.arange(0, CHUNKS)[:, None]
            more = depth * tl.maximum(tl.minimum(positions - k * chunk, chunk), 0).to(tl.float32)
            delta = _read(of, k * 2, k < chunks) - means
            share = more / tl.maximum(counts + more, 1.0)
            squares += _read(of, k * 2 + 1, k < chunks) + delta * delta * counts * share
            means += delta * share
            counts += more
        number = (depth * positions).to(tl.float32)
        middle = tl.sum(counts * means, axis=0)[None, :] / number
        square = tl.sum(squares + counts * (means - middle) * (means - middle), axis=0)[None, :]
    if APPLY:
        rstd = _rstd(square, number, eps)
        a, b = _affine(rstd, weight, bias, scale, shift, c, image * scale_stride, image * shift_stride, valid)
        for p0 in range(first, last, POSITIONS):
            p = p0 + p_tile
            at = base + p.to(tl.int64) * channels + c
            inside = (p < last) & valid
            h = _again(x, residual, total, added, at, inside)
            h = _act((h - pivot) - middle, a, b, SILU)
            tl.store(y + at, h.to(y.dtype.element_ty), inside)


class Cut(NamedTuple):
    """How an image is cut: program by program, and within one."""

    channels: int  # of a tile
    positions: int  # of a tile
    chunk: int  # positions of a program
    chunks: int  # of an image
    width: int  # channels of a program, channels last; else those of a group


def cut_nchw(channels: int, groups: int, positions: int) -> Cut:
    depth = channels // groups
    wide = min(TILE, positions & -positions)  # the largest power of two that leaves no edge
    if wide < 256:
        wide = min(TILE, power_of_2(positions))
    high = min(TILE // wide, depth & -depth)
    if high * wide < 1024:
        high = min(TILE // wide, power_of_2(depth))
    if depth * positions <= FUSED or positions <= wide:
        return Cut(high, wide, positions, 1, depth)
    chunk = max(1, CHUNK // (depth * wide)) * wide
    return Cut(high, wide, chunk, -(-positions // chunk), depth)


def cut_nhwc(channels: int, groups: int, positions: int, itemsize: int) -> Cut:
    depth = channels // groups
    # As few groups as fill 16 bytes, where that makes a program for each; else as many as fill SIDE.
    few = min(groups, max(1, 16 // itemsize // alignment(depth)))
    if depth * few * positions <= FUSED:
        side = power_of_2(depth * few)
        return Cut(side, max(1, min(TILE // side, power_of_2(positions))), positions, 1, depth * few)
    many = min(groups, max(1, SIDE // (depth * few)) * few)
    side = power_of_2(depth * many)
    high = max(1, min(TILE // side, power_of_2(positions)))
    chunk = max(1, CHUNK // (depth * many * high), -(-positions // (MOST * high))) * high
    return Cut(side, high, chunk, -(-positions // chunk), depth * many)


def launch(
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
    return_sum: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=memory_format(x))
    total = torch.empty_like(y) if return_sum else x.new_empty(0)
    if x.numel() == 0:
        return y, total
    n, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
    last = not x.is_contiguous()
    cut = (
        cut_nhwc(channels, num_groups, positions, x.element_size())
        if last
        else cut_nchw(channels, num_groups, positions)
    )
    partial: Tensor | None = None
    if cut.chunks > 1:
        partial = x.new_empty((n * num_groups, cut.chunks, 2), dtype=torch.float32)
    align = alignment(cut.width, channels) if last else alignment(positions)
    options: dict[str, Any] = {
        "SILU": silu,
        "ALIGN": align,
        "CHANNELS": cut.channels,
        "POSITIONS": cut.positions,
        "CHUNKS": power_of_2(cut.chunks),
        "num_warps": max(1, min(8, cut.channels * cut.positions // 512)),
    }
    sizes: list[Any] = [channels // align if last else channels, num_groups]
    sizes += [positions if last else positions // align, cut.chunk, cut.chunks, eps]
    sizes += [0 if p is None else p.stride(0) for p in (add, scale, shift)]
    if last:
        options |= {"ONE": cut.width * num_groups == channels, "CHUNKS": JOINED}
        sizes.append(cut.width // align)
        programs = n * -(-channels // cut.width) * cut.chunks
    else:
        depth = channels // num_groups
        options["EVEN"] = positions % cut.positions == 0 and depth % cut.channels == 0
        programs = n * num_groups * cut.chunks
    tensors = [x, residual, add, weight, bias, scale, shift, y, total if return_sum else None, partial]
    kernel = nhwc if last else nchw
    for statistics, apply in ((True, True),) if partial is None else ((True, False), (False, True)):
        run(kernel, programs, x, *tensors, *sizes, STATISTICS=statistics, APPLY=apply, **options)
    return y, total
