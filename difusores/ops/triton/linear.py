"""A matrix product with its bias, GEGLU, residual and the residual's bias (formula: ops/linear.py).

A program computes a tile of the result over the whole depth, BLOCK_K at a time, with fp32 sums on matrix
units; for GEGLU two sums over the same rows of x, so that the pair of a value and its gate never leaves the
registers. Bytes: x, W and residual in, y out, once each where L2 holds what neighbouring programs share: they
are numbered along GROUP rows of tiles. The depth is summed in the same order whatever the tile. Layout: rows
of any stride.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difusores.ops.descriptors import fit
from difusores.ops.linear import tile
from difusores.ops.triton import INTERPRETED, descriptor, run

BLOCK_K = 64
GROUP = 8


@triton.jit
def _dot(a, b, total, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies the bits of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _tile_of(p, box, first, row, stride, start, depth, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K] from `start` on, zeros beyond the depth: by the descriptor `box`, or from p."""
    if box is not None:
        return box.load([first, start])
    else:
        k = start + tl.arange(0, BLOCK_K)
        at = p + row[:, None] * stride + k[None, :]
        if EVEN:
            return tl.load(at)
        else:
            return tl.load(at, (k < depth)[None, :], other=0.0)


@triton.jit
def linear(
    x,
    weight,
    bias,
    residual,
    residual_bias,
    y,
    x_box,
    weight_box,
    y_box,
    rows,
    columns,
    depth,
    x_stride,
    weight_stride,
    residual_stride,
    GEGLU: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    program, in_group = tl.program_id(0), GROUP * blocks_n
    first = program // in_group * GROUP
    high = tl.minimum(blocks_m - first, GROUP)
    m = first + program % in_group % high
    n = program % in_group // high
    row, column = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the edge any row serves: what is computed from it is not stored.
    of_x, of_weight = (row % rows).to(tl.int64), (column % columns).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    of_gate = of_weight + columns
    row0, value0, gate0 = m * BLOCK_M, n * BLOCK_N, columns + n * BLOCK_N
    for start in range(0, depth, BLOCK_K):
        a = _tile_of(x, x_box, row0, of_x, x_stride, start, depth, EVEN, BLOCK_K)
        b = _tile_of(weight, weight_box, value0, of_weight, weight_stride, start, depth, EVEN, BLOCK_K)
        total = _dot(a, tl.trans(b), total, WIDEN)
        if GEGLU:
            c = _tile_of(weight, weight_box, gate0, of_gate, weight_stride, start, depth, EVEN, BLOCK_K)
            gate = _dot(a, tl.trans(c), gate, WIDEN)
    inside = column < columns
    if bias is not None:
        total += tl.load(bias + column, inside, other=0.0).to(tl.float32)[None, :]
    if GEGLU:
        if bias is not None:
            gate += tl.load(bias + columns + column, inside, other=0.0).to(tl.float32)[None, :]
        total *= gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))
    if residual_bias is not None:
        total += tl.load(residual_bias + column, inside, other=0.0).to(tl.float32)[None, :]
    real = (row < rows)[:, None] & inside[None, :]
    wide = row.to(tl.int64)[:, None]
    if residual is not None:
        at = residual + wide * residual_stride + column[None, :]
        total += tl.load(at, real, other=0.0).to(tl.float32)
    total = total.to(y.dtype.element_ty)
    if y_box is not None:
        y_box.store([row0, value0], total)
    else:
        tl.store(y + wide * columns + column[None, :], total, real)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    residual_bias: Tensor | None = None,
    described: bool = False,
) -> Tensor:
    columns, depth = weight.shape[0] // (2 if geglu else 1), weight.shape[1]
    y = x.new_empty((*x.shape[:-1], columns))
    if y.numel() == 0:
        return y
    flat = x.reshape(-1, depth)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    added = None if residual is None else residual.reshape(-1, columns)
    if added is not None and added.stride(1) != 1:
        added = added.contiguous()
    rows = len(flat)
    cut, programs = tile(rows, columns, geglu)
    boxes = [None] * 3
    if described and fit(flat, weight, y):
        sizes = ((cut.rows, BLOCK_K), (cut.columns, BLOCK_K), (cut.rows, cut.columns))
        boxes = [
            descriptor(t, *box) for t, box in zip((flat, weight, y.view(rows, columns)), sizes, strict=True)
        ]
    run(
        linear,
        programs,
        x,
        *(flat, weight, bias, added, residual_bias, y, *boxes, rows, columns, depth),
        *(flat.stride(0), weight.stride(0), 0 if added is None else added.stride(0)),
        GEGLU=geglu,
        EVEN=depth % BLOCK_K == 0,
        WIDEN=INTERPRETED and x.dtype is torch.bfloat16,
        BLOCK_M=cut.rows,
        BLOCK_N=cut.columns,
        BLOCK_K=BLOCK_K,
        GROUP=GROUP,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return y
