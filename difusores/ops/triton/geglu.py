"""GEGLU: y = x[..., :D] * GELU(x[..., D:]).

Bytes: 2 D elements in and D out for every row, each once. A program takes a tile of rows x columns of y;
arithmetic is fp32. Layout: rows of any stride, each contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from difusores.ops.triton import power_of_2, run

TILE = 1024  # elements of y in a program of 4 warps: 16 bytes a thread in 16 bits


@triton.jit
def geglu(
    x,
    y,
    rows,
    columns,
    x_stride,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(x + row * x_stride + column, inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * x_stride + columns + column, inside, other=0.0).to(tl.float32)
    if TANH:  # (1 + tanh(a)) / 2 = sigmoid(2 a)
        a = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gelu = gate * tl.sigmoid(2.0 * a)
    else:
        gelu = gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * columns + column, (value * gelu).to(y.dtype.element_ty), inside)


def launch(x: Tensor, approximate: str) -> Tensor:
    columns = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], columns))
    if y.numel() == 0:
        return y
    flat = x.reshape(-1, 2 * columns)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    width = min(256, power_of_2(columns))
    height = TILE // width
    rows = flat.shape[0]
    programs = -(-rows // height) * -(-columns // width)
    run(
        geglu,
        programs,
        x,
        flat,
        y,
        rows,
        columns,
        flat.stride(0),
        TANH=approximate == "tanh",
        ROWS=height,
        COLUMNS=width,
        num_warps=4,
    )
    return y
