"""How the attention kernels cut heads into tiles, and read and write them: by pointers or tensor descriptors.

Tiles are powers of two, so a head is cut into two: 40 = 32 + 8, 80 = 64 + 16, 96 = 64 + 32, 160 = 128 + 32.

Each part has a descriptor of its own, of [B, H, rows, columns] as they lie in memory, because the size of its
boxes is part of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from difusores.ops.triton import descriptor, power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
# The fewest columns of a product that `tl.dot` takes: 16 before triton 3.5.
FEWEST = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5) else 16


@triton.jit
def dot(a, b, total, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies the bits of bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rows_of(
    base,
    box,
    batch,
    head,
    first,
    count,
    step,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    FROM: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """[N, WIDTH]: rows from `first` on, columns from FROM on; zeros beyond `count` rows and D columns.

    Through the descriptor `box`, or from the head's first element, `base`, with rows `step` UNITs apart.
    """
    if box is not None:
        part = box.load([batch.to(tl.int32), head.to(tl.int32), first, FROM])
        return tl.reshape(part, (N, WIDTH))
    else:
        row, column = first + tl.arange(0, N), FROM + tl.arange(0, WIDTH)[None, :]
        at = base + row.to(tl.int64)[:, None] * step * UNIT + column
        return tl.load(at, (row < count)[:, None] & (column < D), other=0.0)


@triton.jit
def put_rows(
    base,
    box,
    batch,
    head,
    first,
    count,
    step,
    UNIT: tl.constexpr,
    part,
    N: tl.constexpr,
    FROM: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """Writes [N, WIDTH] where `rows_of` would read it, without what is beyond `count` rows and D columns."""
    part = part.to(base.dtype.element_ty)
    if box is not None:
        whole = tl.reshape(part, (1, 1, N, WIDTH))
        box.store([batch.to(tl.int32), head.to(tl.int32), first, FROM], whole)
    else:
        row, column = first + tl.arange(0, N), FROM + tl.arange(0, WIDTH)[None, :]
        at = base + row.to(tl.int64)[:, None] * step * UNIT + column
        tl.store(at, part, (row < count)[:, None] & (column < D))


def split(width: int, least: int) -> tuple[int, int]:
    """Two powers of two that cover a head's width: (32, 16) for 40 and 16; the second may be idle."""
    first = 1 << (width.bit_length() - 1)
    if first < 16 or width == first:
        return max(16, power_of_2(width)), least
    return first, max(least, power_of_2(width - first))


class Blocks(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


def mask_arguments(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, list[int]]:
    """A mask as kernels take it, bools as bytes, and its strides as if it had this shape."""
    if mask is None:
        return None, [0, 0, 0, 0]
    mask = mask.expand(shape)
    return mask.view(torch.uint8) if mask.dtype is torch.bool else mask, list(mask.stride())


def boxes_of(t: Tensor, rows: int, parts: tuple[int, int]) -> list[Any]:
    """Descriptors of t, [B, H, L, D], with boxes of `rows` rows of each part; None for an idle part."""
    boxes = [descriptor(t, 1, 1, rows, columns) for columns in parts[: 1 + (t.shape[3] > parts[0])]]
    return boxes if len(boxes) == 2 else [*boxes, None]
