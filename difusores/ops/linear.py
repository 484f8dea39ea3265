"""A linear layer with what follows it: GEGLU, and a residual.

    y = x Wᵀ + b                          or  (x W₁ᵀ + b₁) * GELU(x W₂ᵀ + b₂),  W = [W₁; W₂]
    y = y + residual + residual_bias

Shazeer 2020, "GLU Variants Improve Transformer". A matrix library adds a bias at best; what else follows
reads and writes its result once more. `residual_bias` is what a layer before left out of the residual.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores.ops.descriptors import DESCRIBED, refused
from difusores.ops.dispatch import (
    LIBRARY,
    BackendUnavailable,
    below_autograd,
    choose,
    needs_grad,
    register,
    register_triton,
)
from difusores.ops.geglu import geglu as geglu_op
from difusores.ops.geglu import reference as geglu_reference

_SIGNATURE = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool geglu, Tensor? residual_bias=None)"
    " -> Tensor"
)
LIBRARY.define("linear" + _SIGNATURE)
_TRITON_OP = register_triton("linear", _SIGNATURE.replace(")", f"{DESCRIBED})", 1))
register("linear", "triton", "triton_tma")


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    residual_bias: Tensor | None = None,
) -> Tensor:
    """The op in plain PyTorch."""
    out = F.linear(x, weight, bias)
    if geglu:
        out = geglu_reference(out, "none")
    if residual is not None:
        out = out + residual
    return out if residual_bias is None else out + residual_bias


LIBRARY.impl("linear", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::linear", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("difusores::linear_triton", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    residual_bias: Tensor | None = None,
    described: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if geglu else 1)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, ctx.geglu, residual_bias, *_ = inputs
    ctx.has_residual, ctx.has_residual_bias = residual is not None, residual_bias is not None
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    inner = grad
    if ctx.geglu:
        value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
        grad_gate = torch.ops.aten.gelu_backward(grad * value, gate)
        inner = torch.cat((grad * F.gelu(gate), grad_gate), dim=-1)
    rows = inner.flatten(0, -2)
    grad_bias = None if bias is None else rows.sum(0)
    grad_weight = rows.t() @ x.flatten(0, -2)
    grad_residual = grad if ctx.has_residual else None
    grad_residual_bias = grad.flatten(0, -2).sum(0) if ctx.has_residual_bias else None
    return inner @ weight, grad_weight, grad_bias, grad_residual, None, grad_residual_bias


def _backward_triton(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(ctx, grad), None)


for _name, _formula in (("linear", _backward), ("linear_triton", _backward_triton)):
    torch.library.register_autograd(
        f"difusores::{_name}", _formula, setup_context=_setup_context, lib=LIBRARY
    )


class Tile(NamedTuple):
    """Of the result: what one program of a kernel computes."""

    rows: int
    columns: int
    warps: int
    stages: int


TILES = (Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 4))
GEGLU_TILES = (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3))  # there are two sums
ENOUGH = 128  # programs that fill a large GPU
LEAST = 96  # below, a library that divides the sum among programs is faster
# Numbers of a weight, of one half with GEGLU; above, cuBLAS and a pass of its own are faster (H200).
MOST = 640 * 640


def tile(rows: int, columns: int, geglu: bool) -> tuple[Tile, int]:
    """The largest tile with enough programs and no idle columns, else the smallest; and its programs."""
    for cut in GEGLU_TILES if geglu else TILES:
        programs = -(-rows // cut.rows) * -(-columns // cut.columns)
        if programs >= ENOUGH and columns % cut.columns == 0:
            break
    return cut, programs


def supports(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    residual_bias: Tensor | None = None,
) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel takes bfloat16 and float16, not {x.dtype}"
    if residual is None and not geglu:
        return "nothing follows the product, which PyTorch computes in one launch"
    if weight.dtype is not x.dtype or any(
        p is not None and p.dtype not in (x.dtype, torch.float32) for p in (bias, residual_bias)
    ):
        return f"the kernel takes a weight in {x.dtype} and a bias in that or float32"
    out, depth = weight.shape[0] // (2 if geglu else 1), weight.shape[1]
    if depth % 16 or out % 16 or weight.stride(1) != 1:
        return f"the kernel takes widths that are multiples of 16, not {depth} and {out}, and rows of weights"
    if depth * (min(depth, out) if geglu else out) > MOST:
        return f"with weights of {depth} by {out} PyTorch's product and a pass after it are faster"
    rows = x.shape[:-1].numel()
    if tile(rows, out, geglu)[1] < LEAST:
        return f"{rows} rows of {out} are too few for the kernel: PyTorch's product is faster"
    return refused(x=x, weight=weight) if backend == "triton_tma" else None


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geglu: bool) -> bool:
    """Whether `linear` of these is one launch; else what follows the product is a pass of its own."""
    try:
        return choose("linear", x.device.type, supports, x, weight, bias, residual, geglu) != "reference"
    except BackendUnavailable:  # asked for by name, and does not take this call: nobody has to make it
        return False


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    geglu: bool = False,
) -> Tensor:
    """x Wᵀ + bias, or GEGLU of it, plus the residual and its bias.

    Args:
        x: [..., K]; fp32, bf16, fp16, fp64.
        weight: [D, K], or [2 D, K] with `geglu`: value above gate.
        bias: as long as the weight's rows, or None.
        residual: [..., D] in x's dtype, or None.
        residual_bias: [D] in x's dtype or fp32, what the residual still lacks, or None.
        geglu: whether the first half of the product is multiplied by GELU (by erf) of the second.

    Returns:
        [..., D] in x's dtype. Differentiable in every tensor.

    Raises:
        ValueError: shapes or dtypes that do not fit, named.
    """
    _check(x, weight, bias, residual, geglu, residual_bias)
    call = (x, weight, bias, residual, geglu, residual_bias)
    records = needs_grad(x, weight, bias, residual, residual_bias)
    backend = choose("linear", x.device.type, supports, *call)
    if backend != "reference":
        more = (backend == "triton_tma",)
        out: Tensor = _TRITON_OP(*call, *more) if records else below_autograd(_TRITON_OP, *call, *more)
        return out
    if records:
        return reference(*call)
    out = F.linear(x, weight, bias)
    if geglu:
        out = geglu_op(out)
    if residual is not None:
        out = out.add_(residual)
    return out if residual_bias is None else out.add_(residual_bias)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool,
    residual_bias: Tensor | None,
) -> None:
    if x.ndim < 2 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x [..., K] and weight [D, K] do not fit: got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if geglu and weight.shape[0] % 2:
        raise ValueError(
            f"with geglu the weight has value and gate, so an even number of rows, not {len(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {tuple(bias.shape)}")
    shape = (*x.shape[:-1], weight.shape[0] // (2 if geglu else 1))
    if residual is not None and (residual.shape != shape or residual.dtype is not x.dtype):
        raise ValueError(
            f"residual must be {shape} in {x.dtype}, got {tuple(residual.shape)} in {residual.dtype}"
        )
    if residual_bias is not None and residual_bias.shape != shape[-1:]:
        raise ValueError(f"residual_bias must have shape [{shape[-1]}], got {tuple(residual_bias.shape)}")
