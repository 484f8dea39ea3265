"""The factor of guidance's rescale for each image; formula: ops/guidance_rescale.py.

Bytes: every model output once in; 16 of each tile out and in again. Layout: [B, inner], each image one run of
memory, any batch stride. An image of up to WHOLE elements is one program's, which writes its factor: a second
launch would take longer. A larger one is cut into tiles, which a second kernel joins; tiles depend on an
image's size alone, so its bits do not depend on the batch.

Statistics: of what is left of each output without its first element, so that a mean far above the deviation
costs no digits. A lane has the mean and the squared deviations of its elements by Welford's formula; lanes
and tiles are joined in a fixed order, first the mean, then the deviations of their means from it.

The kernel reads the row from device memory, by a counter there where `step` is given; where the counter is
not the number of a row the factor is NaN. What a weight of 0 switches off is not loaded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difusores.ops.scheduler_step import G1, ROW
from difusores.ops.triton import power_of_2, run

BLOCK = 4096  # elements at a time of a program of 16 warps: 8 a thread, with 4 moments of each in registers
WHOLE, TILE = 65536, 8192  # of an image: what one program takes alone, and what each of several takes

_G1, _ROW = tl.constexpr(G1), tl.constexpr(ROW)


@triton.jit
def _weight(row, k, poison):
    return tl.load(row + k).to(tl.float32) + poison


@triton.jit
def _first(p, start):
    return tl.load(p + start).to(tl.float32)


@triton.jit
def _part(p, at, first, g, inside, told, mixed, CONDITIONAL: tl.constexpr):
    """An output without its first element: what is conditional, and what is mixed, with it."""
    counts = inside & (True & (g != 0.0))  # a comparison alone is no boolean in the interpreter
    if CONDITIONAL:
        told = tl.where(inside, tl.load(p + at, inside, other=0.0).to(tl.float32) - first, 0.0)
        mixed += tl.where(counts, g * told, 0.0)
    else:
        v = tl.load(p + at, counts, other=0.0).to(tl.float32) - first
        mixed += tl.where(counts, g * v, 0.0)
    return told, mixed


@triton.jit
def _welford(x, inside, weight, mean, m2):
    d = x - mean
    mean += d * weight
    return mean, m2 + tl.where(inside, d * (x - mean), 0.0)


@triton.jit
def _joined(count, mean, m2, total):
    """Mean and squared deviations of `total` elements from those of parts, of `count` each."""
    whole = tl.sum(count * mean, axis=0) / total
    d = mean - whole
    rest = tl.sum(count * d, axis=0)
    squares = tl.sum(m2 + count * d * d, axis=0)
    delta = rest / total
    squares -= rest * delta
    return whole + delta, tl.where(squares < 0.0, 0.0, squares)  # NaN stays


@triton.jit
def _factor(told, mixed, share):
    return share * (tl.div_rn(tl.sqrt_rn(told), tl.sqrt_rn(mixed)) - 1.0) + 1.0


@triton.jit
def tiles_of(
    row,
    step,
    e1,
    e2,
    e3,
    factor,
    partial,
    rows,
    inner,
    tile,
    share,
    e1_stride,
    e2_stride,
    e3_stride,
    CONDITIONAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(inner, tile)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    begin = (tl.program_id(0) % tiles).to(tl.int64) * tile
    count = tl.minimum(inner - begin, tile).to(tl.int32)
    poison = 0.0
    if step is not None:
        index = tl.load(step)
        valid = (index >= 0) & (index < rows)
        row += tl.where(valid, index, 0) * _ROW
        poison = tl.where(valid, 0.0, float("nan"))
    g1, first1 = _weight(row, _G1, poison), _first(e1, image * e1_stride)
    if e2 is not None:
        g2, first2 = _weight(row, _G1 + 1, poison), _first(e2, image * e2_stride)
    if e3 is not None:
        g3, first3 = _weight(row, _G1 + 2, poison), _first(e3, image * e3_stride)
    lane = tl.arange(0, BLOCK)
    mean1, m21 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    mean2, m22 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for k in range(tl.cdiv(count, BLOCK)):
        at = k * BLOCK + lane
        inside = at < count
        told, mixed = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        told, mixed = _part(
            e1 + image * e1_stride + begin, at, first1, g1, inside, told, mixed, CONDITIONAL == 0
        )
        if e2 is not None:
            told, mixed = _part(
                e2 + image * e2_stride + begin, at, first2, g2, inside, told, mixed, CONDITIONAL == 1
            )
        if e3 is not None:
            told, mixed = _part(
                e3 + image * e3_stride + begin, at, first3, g3, inside, told, mixed, CONDITIONAL == 2
            )
        weight = tl.where(inside, 1.0 / (k + 1), 0.0)
        mean1, m21 = _welford(told, inside, weight, mean1, m21)
        mean2, m22 = _welford(mixed, inside, weight, mean2, m22)
    # a lane has an element of every whole block, and one more if it is within the last
    of_lane = (count // BLOCK + (lane < count % BLOCK).to(tl.int32)).to(tl.float32)
    total = count.to(tl.float32)
    told_mean, told_m2 = _joined(of_lane, mean1, m21, total)
    mixed_mean, mixed_m2 = _joined(of_lane, mean2, m22, total)
    if partial is None:
        tl.store(factor + image, _factor(told_m2, mixed_m2, share))
    else:
        partial += tl.program_id(0).to(tl.int64) * 4
        tl.store(partial, told_mean)
        tl.store(partial + 1, told_m2)
        tl.store(partial + 2, mixed_mean)
        tl.store(partial + 3, mixed_m2)


@triton.jit
def join(factor, partial, inner, tile, share, TILES: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(inner, tile)
    k = tl.arange(0, TILES).to(tl.int64)
    inside = k < tiles
    count = tl.where(inside, tl.minimum(inner - k * tile, tile), 0).to(tl.float32)
    at = (image * tiles + k)[:, None] * 4 + tl.arange(0, 4)[None, :]
    four = tl.load(partial + at, inside[:, None], other=0.0)
    means, squares = tl.split(tl.reshape(four, [TILES, 2, 2]))
    mean1, mean2 = tl.split(means)
    m21, m22 = tl.split(squares)
    total = inner.to(tl.float32)
    _, told = _joined(count, mean1, m21, total)
    _, mixed = _joined(count, mean2, m22, total)
    tl.store(factor + image, _factor(told, mixed, share))


def launch(
    row: Tensor,
    step: Tensor | None,
    e1: Tensor,
    e2: Tensor | None,
    e3: Tensor | None,
    conditional: int,
    share: float,
    factor: Tensor,
) -> None:
    if row.device != e1.device:
        # 320 bytes or a table, which the driver copies before it returns: nothing waits for the device.
        row = row.to(e1.device, non_blocking=True)
        step = None if step is None else step.to(e1.device, non_blocking=True)
    batch, inner = e1.shape[0], e1.shape[1:].numel()
    tile = WHOLE if inner <= WHOLE else TILE
    tiles = -(-inner // tile)
    partial = None if tiles == 1 else torch.empty(batch * tiles, 4, device=e1.device)
    run(
        tiles_of,
        batch * tiles,
        e1,
        *(row.contiguous(), step, e1, e2, e3, factor, partial, row.shape[0], inner, tile, share),
        *(0 if t is None else t.stride(0) for t in (e1, e2, e3)),
        CONDITIONAL=conditional,
        BLOCK=BLOCK,
        num_warps=16,
    )
    if partial is not None:
        run(join, batch, e1, factor, partial, inner, tile, share, TILES=power_of_2(tiles), num_warps=4)
