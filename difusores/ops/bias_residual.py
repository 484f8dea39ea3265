"""What follows a convolution or a matrix product in a diffusion network, in one pass.

    y = scale * (x + bias[c] + add[n, c] + residual)

A convolution's bias, a time embedding, the block's residual and its output scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difusores.ops.dispatch import LIBRARY, below_autograd, choose, needs_grad, register, register_triton

_OPERANDS = "Tensor? bias, Tensor? add, Tensor? residual, float scale"
_SIGNATURE = f"(Tensor x, {_OPERANDS}) -> Tensor"
_IN_PLACE = f"(Tensor(a!) x, {_OPERANDS}) -> ()"
LIBRARY.define("bias_residual" + _SIGNATURE)
LIBRARY.define("bias_residual_" + _IN_PLACE)
_TRITON_OP = register_triton("bias_residual", _SIGNATURE)
_TRITON_OP_IN_PLACE = register_triton("bias_residual", _IN_PLACE, in_place=True)
register("bias_residual", "cuda", "triton")


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).reshape(*t.shape, *([1] * (x.ndim - 2)))


def reference(
    x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float
) -> Tensor:
    """The op in plain PyTorch."""
    y = x
    if bias is not None:
        y = y + _per_channel(bias, x)
    if add is not None:
        y = y + _per_channel(add, x)
    if residual is not None:
        y = y + residual
    if scale != 1.0:
        y = y * scale
    return torch.empty_like(x).copy_(y) if y is x or y.stride() != x.stride() else y


def _reference_in_place(
    x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float
) -> None:
    x.copy_(reference(x, bias, add, residual, scale))


LIBRARY.impl("bias_residual", reference, "CompositeExplicitAutograd")
LIBRARY.impl("bias_residual_", _reference_in_place, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::bias_residual", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("difusores::bias_residual_triton", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float
) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("difusores::bias_residual_", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("difusores::bias_residual_triton_", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_in_place(
    x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None, scale: float
) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, add, residual, ctx.scale = inputs
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (bias, add))
    ctx.residual = residual is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    scaled = grad if ctx.scale == 1.0 else grad * ctx.scale
    of_bias, of_add = ctx.dtypes
    sums = None
    if of_bias is not None or of_add is not None:
        wide = torch.promote_types(grad.dtype, torch.float32)
        spatial = list(range(2, grad.ndim))
        sums = scaled.sum(spatial, dtype=wide) if spatial else scaled.to(wide)
    return (
        scaled,
        None if of_bias is None or sums is None else sums.sum(0).to(of_bias),
        None if of_add is None or sums is None else sums.to(of_add),
        scaled if ctx.residual else None,
        None,
    )


for _name in ("bias_residual", "bias_residual_triton"):
    torch.library.register_autograd(
        f"difusores::{_name}", _backward, setup_context=_setup_context, lib=LIBRARY
    )

_OP = torch.ops.difusores.bias_residual.default
_OP_IN_PLACE = torch.ops.difusores.bias_residual_.default


def _channels_last(x: Tensor) -> bool:
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def supports(
    backend: str, x: Tensor, bias: Tensor | None, add: Tensor | None, residual: Tensor | None
) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel takes float32, bfloat16 and float16, not {x.dtype}"
    for p in (bias, add):
        if p is not None and p.dtype is not x.dtype and p.dtype is not torch.float32:
            return f"the kernel takes parameters in float32 or {x.dtype}, not {p.dtype}"
    if x.ndim > 5:
        return f"the kernel takes at most 5 dimensions, not {x.ndim}"
    if not (x.is_contiguous() or _channels_last(x)):
        return "the kernel takes contiguous and channels_last tensors, not other strides"
    if x.numel() >= 2**30 and x[0].numel() >= 2**30:
        return f"the kernel takes images below 2**30 elements, not {x[0].numel()}"
    if residual is not None and residual.stride() != x.stride():
        return "the kernel takes a residual of x's strides"
    return None


def bias_residual(
    x: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    *,
    inplace: bool = False,
) -> Tensor:
    """y = scale * (x + bias + add + residual).

    Tokens [N, L, C] are given as `x.transpose(1, 2)`, which is channels_last in three dimensions.

    Args:
        x: [N, C, *spatial], 2-D to 5-D; fp32, bf16, fp16 (fp64 by the reference); contiguous or
            channels_last, kept. A kernel computes in fp32 and rounds once.
        bias: [C] in x's dtype or fp32, or None.
        add: [N, C] in x's dtype or fp32 (a time embedding), or None.
        residual: like x, or None.
        scale: of the sum.
        inplace: overwrite x, and return it; without gradients only.

    Returns:
        y like x. Differentiable in every tensor.

    Raises:
        ValueError: shapes that do not fit, named; `inplace` where a gradient is wanted.
        TypeError: x is not floating point.
    """
    if x.ndim < 2:
        raise ValueError(f"x must be [N, C, *spatial], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    n, c = x.shape[:2]
    if bias is not None and bias.shape != (c,):
        raise ValueError(f"bias must have shape [C] = [{c}], got {tuple(bias.shape)}")
    if add is not None and add.shape != (n, c):
        raise ValueError(f"add must have shape [N, C] = [{n}, {c}], got {tuple(add.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype):
        raise ValueError(
            f"residual must be like x, {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    recorded = needs_grad(x, bias, add, residual)
    if inplace and recorded:
        raise ValueError("inplace=True overwrites x, which a gradient needs: use torch.no_grad()")
    backend = choose("bias_residual", x.device.type, supports, x, bias, add, residual)
    bias, add = (p if p is None or p.stride(-1) == 1 else p.contiguous() for p in (bias, add))
    call = (x, bias, add, residual, scale)
    if inplace:
        if backend == "reference":
            _reference_in_place(*call)
        else:
            below_autograd(_TRITON_OP_IN_PLACE if backend == "triton" else _OP_IN_PLACE, *call)
        return x
    if backend == "reference":
        return reference(*call)
    op = _TRITON_OP if backend == "triton" else _OP
    out: Tensor = op(*call) if recorded else below_autograd(op, *call)
    return out
