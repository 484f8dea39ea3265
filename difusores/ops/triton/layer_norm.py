"""Layer normalisation: h = x + residual; y = weight * (h - mean) / sqrt(var + eps) + bias.

Bytes: x and residual once in, y and total, which is h + sum_bias, once out. A program takes whole rows, as
many as fill its tile, and keeps them in registers; mean and variance are two passes over those, about the
row's first element, so that a mean far above the deviation costs no digits. Layout: rows of any stride, each
contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from difusores.ops.triton import power_of_2, run

TILE = 2048  # elements in a program of 4 warps


@triton.jit
def layer_norm(
    x,
    residual,
    weight,
    bias,
    sum_bias,
    y,
    total,
    rows,
    columns,
    x_stride,
    residual_stride,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    h = tl.load(x + row[:, None] * x_stride + column, inside, other=0.0).to(tl.float32)
    pivot = tl.load(x + row * x_stride, row < rows, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + row[:, None] * residual_stride + column, inside, other=0.0).to(tl.float32)
        pivot += tl.load(residual + row * residual_stride, row < rows, other=0.0).to(tl.float32)
    if total is not None:
        written = h
        if sum_bias is not None:
            written += tl.load(sum_bias + column, column < columns, other=0.0).to(tl.float32)
        tl.store(total + row[:, None] * columns + column, written.to(total.dtype.element_ty), inside)
    h = tl.where(inside, h - pivot[:, None], 0.0)
    mean = tl.sum(h, axis=1) / columns
    h = tl.where(inside, h - mean[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, axis=1) / columns + eps))
    h *= rstd[:, None]
    if weight is not None:
        h *= tl.load(weight + column, column < columns, other=0.0).to(tl.float32)
    if bias is not None:
        h += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * columns + column, h.to(y.dtype.element_ty), inside)


def _rows(t: Tensor | None, columns: int) -> Tensor | None:
    if t is None:
        return None
    flat = t.reshape(-1, columns)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    return_sum: bool,
    sum_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    total = x.new_empty(x.shape if return_sum else 0)
    if x.numel() == 0:
        return y, total
    columns = x.shape[-1]
    flat, more = _rows(x, columns), _rows(residual, columns)
    assert flat is not None
    weight, bias, sum_bias = (None if p is None else p.contiguous() for p in (weight, bias, sum_bias))
    width = power_of_2(columns)
    height = max(1, TILE // width)
    rows = flat.shape[0]
    run(
        layer_norm,
        -(-rows // height),
        x,
        flat,
        more,
        weight,
        bias,
        sum_bias,
        y,
        total if return_sum else None,
        rows,
        columns,
        flat.stride(0),
        0 if more is None else more.stride(0),
        eps,
        ROWS=height,
        COLUMNS=width,
        num_warps=max(4, min(16, width // 1024)),
    )
    return y, total
