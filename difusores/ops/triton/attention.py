"""Scaled dot-product attention, softmax(scale * q kᵀ + mask) v, without the scores in memory.

A program takes BLOCK_Q queries of a head and goes over the keys BLOCK_K at a time, with a running maximum
and sum of each query's softmax (Milakov & Gimelshein 2018; Dao et al. 2022). Bytes: q and the result once; k
and v once from memory and then from L2 for every block of queries. Layout: any strides, elements of a head
side by side; the result is [B, L, H, D] in memory, as the projection that follows reads it.

A head is cut into two parts (heads.py). The second is 8 wide in p v but 16 in q kᵀ, the least that `tl.dot`
sums over: at 40 a tenth more products than needed, at the other widths none (with a tile of 64: 0.6 more at
40). Products of 16-bit tensors run on matrix units with fp32 sums. Those of fp32 tensors do not: three
products of TF32 in the place of one are further from the exact result, on an H200, than the tolerance rule
allows. With descriptors the kernel reads q, k, v and writes the result through them; the sums are the same.
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
    FEWEST,
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
def attention(
    q,
    k,
    v,
    mask,
    out,
    q1_box,
    q2_box,
    k1_box,
    k2_box,
    v1_box,
    v2_box,
    out1_box,
    out2_box,
    sums,
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
    of = tl.program_id(0) // blocks
    batch, head = (of // heads).to(tl.int64), (of % heads).to(tl.int64)
    row0 = tl.program_id(0) % blocks * BLOCK_Q
    row = row0 + tl.arange(0, BLOCK_Q)
    q += (batch * q_batch + head * q_head) * ALIGN
    k += (batch * k_batch + head * k_head) * ALIGN
    v += (batch * v_batch + head * v_head) * ALIGN
    real = (row < queries)[:, None]
    q1 = rows_of(q, q1_box, batch, head, row0, queries, q_row, ALIGN, BLOCK_Q, 0, D1, D)
    if D > D1:
        q2 = rows_of(q, q2_box, batch, head, row0, queries, q_row, ALIGN, BLOCK_Q, D1, D2, D)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sum1 = tl.zeros([BLOCK_Q, V1], tl.float32)
    sum2 = tl.zeros([BLOCK_Q, V2], tl.float32)
    for key0 in range(0, keys, BLOCK_K):
        key = key0 + tl.arange(0, BLOCK_K)
        s = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        k1 = rows_of(k, k1_box, batch, head, key0, keys, k_row, ALIGN, BLOCK_K, 0, D1, D)
        s = dot(q1, tl.trans(k1), s, WIDEN)
        if D > D1:
            k2 = rows_of(k, k2_box, batch, head, key0, keys, k_row, ALIGN, BLOCK_K, D1, D2, D)
            s = dot(q2, tl.trans(k2), s, WIDEN)
        s *= scale * LOG2E
        inside = real & (key < keys)[None, :]
        if mask is not None:
            place = mask + batch * mask_batch + head * mask_head
            place += row.to(tl.int64)[:, None] * mask_row + key.to(tl.int64)[None, :] * mask_key
            if BOOL:
                inside &= tl.load(place, inside, other=0) != 0
            else:
                s += tl.load(place, inside, other=0.0).to(tl.float32) * LOG2E
        s = tl.where(inside, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - finite[:, None])
        fade = tl.exp2(top - finite)
        total = total * fade + tl.sum(p, axis=1)
        top = higher
        v1 = rows_of(v, v1_box, batch, head, key0, keys, v_row, ALIGN, BLOCK_K, 0, V1, DV)
        p = p.to(v1.dtype)
        sum1 = dot(p, v1, sum1 * fade[:, None], WIDEN)
        if DV > V1:
            v2 = rows_of(v, v2_box, batch, head, key0, keys, v_row, ALIGN, BLOCK_K, V1, V2, DV)
            sum2 = dot(p, v2, sum2 * fade[:, None], WIDEN)
    if sums is not None:
        tl.store(sums + of.to(tl.int64) * padded + row, top + tl.log2(total), row < queries)
    total = tl.where(total == 0.0, 1.0, total)[:, None]  # all keys are masked: the result is zero
    out += (batch * queries * heads + head) * DV
    put_rows(out, out1_box, batch, head, row0, queries, heads, DV, sum1 / total, BLOCK_Q, 0, V1, DV)
    if DV > V1:
        put_rows(out, out2_box, batch, head, row0, queries, heads, DV, sum2 / total, BLOCK_Q, V1, V2, DV)


def blocks(queries: int, keys: int, width: int, itemsize: int) -> Blocks:
    """Tiles that fit the registers of every architecture and the smaller GPUs' 99 KB of shared memory."""
    if width <= 64:
        most = Blocks(128, 64, 8, 3)
    elif width <= 128:
        most = Blocks(128, 64, 8, 2)
    elif width <= 256:
        most = Blocks(128, 32, 8, 2)
    else:
        most = Blocks(32, 32, 8, 1)
    if itemsize == 4:
        most = Blocks(most.queries // 2, max(16, most.keys // 2), most.warps, most.stages - most.stages // 2)
    # The largest step over the keys that wastes less than a twentieth, so 16 for 77 keys; else the smallest.
    step = most.keys
    while step > 16 and -(-keys // step) * step > 1.05 * keys:
        step //= 2
    return most._replace(queries=max(16, min(most.queries, power_of_2(queries))), keys=step)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    described: bool = False,
    sums: Tensor | None = None,
) -> Tensor:
    batch, heads, queries, width = q.shape
    keys, out_width = k.shape[2], v.shape[3]
    out = q.new_empty(batch, queries, heads, out_width)
    if out.numel() == 0 or keys == 0:
        return out.zero_().transpose(1, 2)
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    strides = [t.stride(dim) for t in (q, k, v) for dim in range(3)]
    mask, grid = mask_arguments(mask, (batch, heads, queries, keys))
    align = min(16 // q.element_size(), alignment(*strides))
    d1, d2 = split(width, 16)
    v1, v2 = split(out_width, FEWEST)
    cut = blocks(queries, keys, max(width, out_width), q.element_size())
    heads_inside = out.transpose(1, 2)
    boxes: list[Any] = [None] * 8
    if described and fit(q, k, v, heads_inside):
        sides = (
            *((q, cut.queries, (d1, d2)), (k, cut.keys, (d1, d2))),
            *((v, cut.keys, (v1, v2)), (heads_inside, cut.queries, (v1, v2))),
        )
        boxes = [box for side in sides for box in boxes_of(*side)]
    padded = 0 if sums is None else sums.shape[2]
    run(
        attention,
        batch * heads * -(-queries // cut.queries),
        q,
        *(
            q,
            k,
            v,
            mask,
            out,
            *boxes,
            sums,
            heads,
            queries,
            keys,
            padded,
            scale,
            *(s // align for s in strides),
            *grid,
        ),
        D=width,
        D1=d1,
        D2=d2,
        DV=out_width,
        V1=v1,
        V2=v2,
        BOOL=mask is not None and mask.dtype is torch.uint8,
        ALIGN=align,
        WIDEN=INTERPRETED and q.dtype is torch.bfloat16,
        BLOCK_Q=cut.queries,
        BLOCK_K=cut.keys,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return heads_inside


def launch_with_sums(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, described: bool = False
) -> tuple[Tensor, Tensor]:
    """What the gradients need beside the result: [B, H, L rounded up to 64], log2 of the sums of weights."""
    sums = q.new_empty((*q.shape[:2], -(-q.shape[2] // 64) * 64), dtype=torch.float32)
    return launch(q, k, v, mask, scale, described, sums), sums
