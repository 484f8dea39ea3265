"""y = scale * (x + bias[c] + add[n, c] + residual).

Bytes: x and the residual once in, y once out; y may be x. An image is a matrix of rows x columns: channels x
positions (contiguous) or positions x channels (channels last), of which a program takes a tile; a channel's
parameters are read once a tile. Arithmetic is fp32, rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from difusores.ops.triton import power_of_2, run

TILE = 2048  # elements in a program of 4 warps: two accesses of 16 bytes a thread in 16 bits


@triton.jit
def bias_residual(
    x,
    bias,
    add,
    residual,
    y,
    rows,
    columns,
    add_stride,
    scale,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * across
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    at = image * rows * columns + row.to(tl.int64) * columns + column
    h = tl.load(x + at, inside, other=0.0).to(tl.float32)
    c = column if LAST else row
    channel = c < (columns if LAST else rows)
    if bias is not None:
        h += tl.load(bias + c, channel, other=0.0).to(tl.float32)
    if add is not None:
        h += tl.load(add + image * add_stride + c, channel, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + at, inside, other=0.0).to(tl.float32)
    tl.store(y + at, (h * scale).to(y.dtype.element_ty), inside)


def _launch(
    x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float, y: Tensor
) -> None:
    if x.numel() == 0:
        return
    last = not x.is_contiguous()
    channels, positions = x.shape[1], x.shape[2:].numel()
    rows, columns = (positions, channels) if last else (channels, positions)
    width = min(256, power_of_2(columns))
    height = min(TILE // width, power_of_2(rows))
    run(
        bias_residual,
        x.shape[0] * -(-rows // height) * -(-columns // width),
        x,
        x,
        bias,
        add,
        residual,
        y,
        rows,
        columns,
        0 if add is None else add.stride(0),
        scale,
        LAST=last,
        ROWS=height,
        COLUMNS=width,
        num_warps=max(1, min(4, height * width // 256)),
    )


def launch(
    x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float
) -> Tensor:
    y = x.new_empty_strided(x.shape, x.stride())
    _launch(x, bias, add, residual, scale, y)
    return y


def launch_in_place(
    x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float
) -> None:
    _launch(x, bias, add, residual, scale, x)
