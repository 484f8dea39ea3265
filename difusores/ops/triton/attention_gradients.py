"""The gradients of attention, softmax(scale * q kᵀ + mask) v (Dao et al. 2022, algorithm 4).

With p the weights, grad the gradient of the result, delta = Σ grad out over a row:

    ds = p (grad vᵀ - delta)     dq = scale ds k     dk = scale dsᵀ q     dv = pᵀ grad

p is computed again from the forward pass's log2 of the sums of weights. Two launches and no atomics, so the
same bits twice: programs of BLOCK_Q queries for dq and delta, then programs of BLOCK_K keys for dk and dv,
with everything transposed. Seven products where one pass with atomics has five. Bytes: all tensors once; keys
and values again for every block of queries, and the reverse, from L2. Layouts and the cutting of heads in two
are those of attention.py, and so are descriptors: all [B, H, rows, columns] go through them, or none.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from difusores.ops.descriptors import fit
from difusores.ops.triton import INTERPRETED, alignment, power_of_2, run
from difusores.ops.triton.heads import (
    LOG2E,
    Blocks,
    boxes_of,
    dot,
    mask_arguments,
    put_rows,
    rows_of,
    split,
)


@triton.jit
def _product(a1, a2, b1, b2, SPLIT: tl.constexpr, WIDEN: tl.constexpr):
    """a bᵀ of rows that are cut in two."""
    total = tl.zeros([a1.shape[0], b1.shape[0]], tl.float32)
    total = dot(a1, tl.trans(b1), total, WIDEN)
    if SPLIT:
        total = dot(a2, tl.trans(b2), total, WIDEN)
    return total


@triton.jit
def _weights(scores, inside, mask, place, sums, BOOL: tl.constexpr):
    """2^(scores - sums), with the mask, and zeros for what is not inside or whose keys are all masked."""
    if mask is not None:
        if BOOL:
            inside &= tl.load(mask + place, inside, other=0) != 0
        else:
            scores += tl.load(mask + place, inside, other=0.0).to(tl.float32) * LOG2E
    scores = tl.where(inside, scores, float("-inf"))
    return tl.exp2(scores - tl.where(sums == float("-inf"), 0.0, sums))


@triton.jit
def of_queries(
    q,
    k,
    v,
    mask,
    grad,
    out,
    sums,
    delta,
    grad_q,
    q1_box,
    q2_box,
    k1_box,
    k2_box,
    v1_box,
    v2_box,
    grad1_box,
    grad2_box,
    out1_box,
    out2_box,
    to1_box,
    to2_box,
    heads,
    queries,
    keys,
    padded,
    scale,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    g_batch,
    g_head,
    g_row,
    out_batch,
    out_head,
    out_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_key,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    BOOL: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_Q)
    of = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = of // heads, of % heads
    row0 = tl.program_id(0) % blocks * BLOCK_Q
    row = row0 + tl.arange(0, BLOCK_Q)
    real = (row < queries)[:, None]
    q += (batch * q_batch + head * q_head) * ALIGN
    k += (batch * k_batch + head * k_head) * ALIGN
    v += (batch * v_batch + head * v_head) * ALIGN
    grad += (batch * g_batch + head * g_head) * ALIGN
    out += (batch * out_batch + head * out_head) * ALIGN
    q1 = rows_of(q, q1_box, batch, head, row0, queries, q_row, ALIGN, BLOCK_Q, 0, D1, D)
    g1 = rows_of(grad, grad1_box, batch, head, row0, queries, g_row, ALIGN, BLOCK_Q, 0, V1, DV)
    o1 = rows_of(out, out1_box, batch, head, row0, queries, out_row, ALIGN, BLOCK_Q, 0, V1, DV)
    minus = tl.sum(g1.to(tl.float32) * o1.to(tl.float32), axis=1)
    q2 = q1
    g2 = g1
    if D > D1:
        q2 = rows_of(q, q2_box, batch, head, row0, queries, q_row, ALIGN, BLOCK_Q, D1, D2, D)
    if DV > V1:
        g2 = rows_of(grad, grad2_box, batch, head, row0, queries, g_row, ALIGN, BLOCK_Q, V1, V2, DV)
        o2 = rows_of(out, out2_box, batch, head, row0, queries, out_row, ALIGN, BLOCK_Q, V1, V2, DV)
        minus += tl.sum(g2.to(tl.float32) * o2.to(tl.float32), axis=1)
    tl.store(delta + of * padded + row, minus, row < queries)
    total = tl.load(sums + of * padded + row, row < queries, other=0.0)[:, None]
    sum1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    sum2 = tl.zeros([BLOCK_Q, D2], tl.float32)
    for key0 in range(0, keys, BLOCK_K):
        key = key0 + tl.arange(0, BLOCK_K)
        k1 = rows_of(k, k1_box, batch, head, key0, keys, k_row, ALIGN, BLOCK_K, 0, D1, D)
        v1 = rows_of(v, v1_box, batch, head, key0, keys, v_row, ALIGN, BLOCK_K, 0, V1, DV)
        k2 = k1
        v2 = v1
        if D > D1:
            k2 = rows_of(k, k2_box, batch, head, key0, keys, k_row, ALIGN, BLOCK_K, D1, D2, D)
        if DV > V1:
            v2 = rows_of(v, v2_box, batch, head, key0, keys, v_row, ALIGN, BLOCK_K, V1, V2, DV)
        inside = real & (key < keys)[None, :]
        place = batch * mask_batch + head * mask_head + row.to(tl.int64)[:, None] * mask_row
        place += key.to(tl.int64)[None, :] * mask_key
        s = _product(q1, q2, k1, k2, D > D1, WIDEN) * (scale * LOG2E)
        p = _weights(s, inside, mask, place, total, BOOL)
        ds = p * (_product(g1, g2, v1, v2, DV > V1, WIDEN) - minus[:, None])
        ds = ds.to(k1.dtype)
        sum1 = dot(ds, k1, sum1, WIDEN)
        if D > D1:
            sum2 = dot(ds, k2, sum2, WIDEN)
    grad_q += (batch * queries * heads + head) * D
    put_rows(grad_q, to1_box, batch, head, row0, queries, heads, D, sum1 * scale, BLOCK_Q, 0, D1, D)
    if D > D1:
        put_rows(grad_q, to2_box, batch, head, row0, queries, heads, D, sum2 * scale, BLOCK_Q, D1, D2, D)


@triton.jit
def of_keys(
    q,
    k,
    v,
    mask,
    grad,
    sums,
    delta,
    grad_k,
    grad_v,
    q1_box,
    q2_box,
    k1_box,
    k2_box,
    v1_box,
    v2_box,
    grad1_box,
    grad2_box,
    of_k1_box,
    of_k2_box,
    of_v1_box,
    of_v2_box,
    heads,
    queries,
    keys,
    padded,
    scale,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    g_batch,
    g_head,
    g_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_key,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    BOOL: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(keys, BLOCK_K)
    of = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = of // heads, of % heads
    key0 = tl.program_id(0) % blocks * BLOCK_K
    key = key0 + tl.arange(0, BLOCK_K)
    q += (batch * q_batch + head * q_head) * ALIGN
    k += (batch * k_batch + head * k_head) * ALIGN
    v += (batch * v_batch + head * v_head) * ALIGN
    grad += (batch * g_batch + head * g_head) * ALIGN
    k1 = rows_of(k, k1_box, batch, head, key0, keys, k_row, ALIGN, BLOCK_K, 0, D1, D)
    v1 = rows_of(v, v1_box, batch, head, key0, keys, v_row, ALIGN, BLOCK_K, 0, V1, DV)
    k2 = k1
    v2 = v1
    if D > D1:
        k2 = rows_of(k, k2_box, batch, head, key0, keys, k_row, ALIGN, BLOCK_K, D1, D2, D)
    if DV > V1:
        v2 = rows_of(v, v2_box, batch, head, key0, keys, v_row, ALIGN, BLOCK_K, V1, V2, DV)
    of_k1 = tl.zeros([BLOCK_K, D1], tl.float32)
    of_k2 = tl.zeros([BLOCK_K, D2], tl.float32)
    of_v1 = tl.zeros([BLOCK_K, V1], tl.float32)
    of_v2 = tl.zeros([BLOCK_K, V2], tl.float32)
    for row0 in range(0, queries, BLOCK_Q):
        row = row0 + tl.arange(0, BLOCK_Q)
        q1 = rows_of(q, q1_box, batch, head, row0, queries, q_row, ALIGN, BLOCK_Q, 0, D1, D)
        g1 = rows_of(grad, grad1_box, batch, head, row0, queries, g_row, ALIGN, BLOCK_Q, 0, V1, DV)
        q2 = q1
        g2 = g1
        if D > D1:
            q2 = rows_of(q, q2_box, batch, head, row0, queries, q_row, ALIGN, BLOCK_Q, D1, D2, D)
        if DV > V1:
            g2 = rows_of(grad, grad2_box, batch, head, row0, queries, g_row, ALIGN, BLOCK_Q, V1, V2, DV)
        total = tl.load(sums + of * padded + row, row < queries, other=0.0)[None, :]
        minus = tl.load(delta + of * padded + row, row < queries, other=0.0)[None, :]
        inside = (key < keys)[:, None] & (row < queries)[None, :]
        place = batch * mask_batch + head * mask_head + key.to(tl.int64)[:, None] * mask_key
        place += row.to(tl.int64)[None, :] * mask_row
        s = _product(k1, k2, q1, q2, D > D1, WIDEN) * (scale * LOG2E)
        p = _weights(s, inside, mask, place, total, BOOL)
        ds = (p * (_product(v1, v2, g1, g2, DV > V1, WIDEN) - minus)).to(q1.dtype)
        p = p.to(g1.dtype)
        of_v1 = dot(p, g1, of_v1, WIDEN)
        of_k1 = dot(ds, q1, of_k1, WIDEN)
        if DV > V1:
            of_v2 = dot(p, g2, of_v2, WIDEN)
        if D > D1:
            of_k2 = dot(ds, q2, of_k2, WIDEN)
    grad_k += (batch * keys * heads + head) * D
    grad_v += (batch * keys * heads + head) * DV
    put_rows(grad_k, of_k1_box, batch, head, key0, keys, heads, D, of_k1 * scale, BLOCK_K, 0, D1, D)
    put_rows(grad_v, of_v1_box, batch, head, key0, keys, heads, DV, of_v1, BLOCK_K, 0, V1, DV)
    if D > D1:
        put_rows(grad_k, of_k2_box, batch, head, key0, keys, heads, D, of_k2 * scale, BLOCK_K, D1, D2, D)
    if DV > V1:
        put_rows(grad_v, of_v2_box, batch, head, key0, keys, heads, DV, of_v2, BLOCK_K, V1, V2, DV)


def blocks(queries: int, keys: int, width: int, itemsize: int) -> tuple[Blocks, Blocks]:
    """Tiles of the two launches: the longer side is what a program keeps, the shorter its step."""
    if width > 128:
        kept, step, warps, stages = 16, 16, 4, 1  # larger ones spill
    elif itemsize == 4:
        kept, step, warps, stages = 32, 32 if width <= 64 else 16, 4, 1
    else:
        kept, step, warps, stages = 64, 64 if width <= 64 else 32, 8, 2
    rows, columns = power_of_2(queries), power_of_2(keys)
    return (
        Blocks(max(16, min(kept, rows)), max(16, min(step, columns)), warps, stages),
        Blocks(max(16, min(step, rows)), max(16, min(kept, columns)), warps, stages),
    )


def launch(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    sums: Tensor,
    scale: float,
    described: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    keys, out_width = k.shape[2], v.shape[3]
    memory = [t.new_empty(batch, t.shape[2], heads, t.shape[3]) for t in (q, k, v)]
    grads = [t.transpose(1, 2) for t in memory]
    if 0 in (*q.shape, *v.shape):
        return tuple(t.zero_() for t in grads)  # type: ignore[return-value]
    q, k, v, grad, out = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v, grad, out))
    strides = [t.stride(dim) for t in (q, k, v, grad, out) for dim in range(3)]
    align = min(16 // q.element_size(), alignment(*strides))
    steps = [stride // align for stride in strides]
    mask, grid = mask_arguments(mask, (batch, heads, queries, keys))
    delta = torch.empty_like(sums)
    described = described and fit(q, k, v, grad, out, *grads)
    d1, d2 = split(width, 16)
    v1, v2 = split(out_width, 16)
    constants = dict(
        zip(("D", "D1", "D2", "DV", "V1", "V2"), (width, d1, d2, out_width, v1, v2), strict=True),
        BOOL=mask is not None and mask.dtype is torch.uint8,
        ALIGN=align,
        WIDEN=INTERPRETED and q.dtype is torch.bfloat16,
    )
    sizes = (heads, queries, keys, sums.shape[2], scale)
    of_q, of_k = blocks(queries, keys, max(width, out_width), q.element_size())
    for kernel, cut, rows, block, tensors, counts, more in (
        (of_queries, of_q, queries, of_q.queries, (out, sums, delta, memory[0]), steps, (out, grads[0])),
        (of_keys, of_k, keys, of_k.keys, (sums, delta, *memory[1:]), steps[:12], grads[1:]),
    ):
        boxes: list[Any] = [None] * 12
        if described:
            sides = zip(
                (q, k, v, grad, *more),
                (*(cut.queries, cut.keys, cut.keys, cut.queries), block, block),
                strict=True,
            )
            boxes = [box for t, n in sides for box in boxes_of(t, n, split(t.shape[3], 16))]
        run(
            kernel,
            batch * heads * -(-rows // block),
            q,
            *(q, k, v, mask, grad, *tensors, *boxes, *sizes, *counts, *grid),
            **constants,
            BLOCK_Q=cut.queries,
            BLOCK_K=cut.keys,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return grads[0], grads[1], grads[2]
