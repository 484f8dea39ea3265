"""Group normalisation with what surrounds it in a diffusion UNet: adds before it, scale-shift and SiLU after.

    h = x + add[n, c] + residual
    y = act((1 + scale[n, c]) * (weight[c] * (h - mean) / sqrt(var + eps) + bias[c]) + shift[n, c])

mean and var over each image's group of C / num_groups channels (Wu & He 2018, "Group Normalization"; scale
and shift as in Dhariwal & Nichol 2021, "Diffusion Models Beat GANs", section 3; act is SiLU or nothing).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores.ops.dispatch import (
    LIBRARY,
    below_autograd,
    choose,
    needs_grad,
    register,
    register_triton,
    straight_to_cpu,
    use_backend,
    wanted,
)

_SIGNATURE = (
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, "
    "Tensor? scale, Tensor? shift, Tensor? add, Tensor? residual, bool return_sum) -> (Tensor, Tensor)"
)
LIBRARY.define("group_norm_silu" + _SIGNATURE)
_TRITON_OP = register_triton("group_norm_silu", _SIGNATURE)
register("group_norm_silu", "cuda", "triton", "cpu")
_BACKWARD_SIGNATURE = (
    "(Tensor grad_y, Tensor? grad_sum, Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "bool silu, Tensor? scale, Tensor? shift, Tensor? add, Tensor? residual)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("group_norm_silu_backward" + _BACKWARD_SIGNATURE)
_TRITON_BACKWARD_OP = register_triton("group_norm_silu_backward", _BACKWARD_SIGNATURE)
register("group_norm_silu_backward", "cuda", "triton")


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(*t.shape, *([1] * (x.ndim - 2)))


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    return_sum: bool,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch. The second output is empty unless `return_sum`."""
    h = x
    if add is not None:
        h = h + _per_channel(add, x).to(x.dtype)
    if residual is not None:
        h = h + residual
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch's group norm cannot differentiate a bias alone
    params = [None if p is None else p.to(x.dtype) for p in (weight, bias)]
    y = F.group_norm(h, num_groups, params[0], params[1], eps)
    if scale is not None:
        y = y * (1 + _per_channel(scale, x).to(x.dtype))
    if shift is not None:
        y = y + _per_channel(shift, x).to(x.dtype)
    if silu:
        y = F.silu(y)
    y = y.contiguous(memory_format=memory_format(x))
    if not return_sum:
        return y, x.new_empty(0)
    return y, h.clone() if h is x else h


def memory_format(x: Tensor) -> torch.memory_format:
    if x.is_contiguous():
        return torch.contiguous_format
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


LIBRARY.impl("group_norm_silu", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::group_norm_silu", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("difusores::group_norm_silu_triton", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    return_sum: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=memory_format(x))
    return y, torch.empty_like(y) if return_sum else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.num_groups, weight, bias, ctx.eps, ctx.silu, scale, shift, add, residual, ctx.return_sum = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, add, residual)
    ctx.wanted = wanted()  # autograd goes backward in a thread of the device, where nobody has asked


def _differentiable_backward(ctx: Any, grad_y: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    """With create_graph: through the reference, for the backward kernel of torch has no derivative."""
    # Views, for one tensor given twice is two inputs here.
    inputs: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
    x, weight, bias, scale, shift, add, residual = inputs
    options = (ctx.num_groups, weight, bias, ctx.eps, ctx.silu, scale, shift, add, residual, ctx.return_sum)
    outputs = reference(x, *options)[: 1 + ctx.return_sum]
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outputs, leaves, (grad_y, grad_sum)[: len(outputs)], create_graph=True))
    dx, dw, db, dscale, dshift, dadd, dresidual = (
        next(found) if t is not None and t.requires_grad else None for t in inputs
    )
    return dx, None, dw, db, None, None, dscale, dshift, dadd, dresidual, None


def backward_reference(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of x (and residual), weight, bias, scale, shift and add; empty where those are None.

    The normalised tensor again, then the chain rule through act, scale-shift, norm; in fp32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)

    def widened(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(wide)

    def channels(t: Tensor) -> Tensor:
        return _per_channel(t.to(wide), x)

    h = x.to(wide)
    if add is not None:
        h = h + channels(add)
    if residual is not None:
        h = h + residual.to(wide)
    n, c, spatial = x.shape[0], x.shape[1], list(range(2, x.ndim))
    size = (n, c, x.shape[2:].numel(), num_groups)
    gamma = h.new_ones(c) if weight is None and bias is not None else widened(weight)  # torch wants both
    layout = memory_format(h)  # the backward kernel of torch takes it that all tensors have one layout
    h = h.contiguous(memory_format=layout)
    normed, mean, rstd = torch.ops.aten.native_group_norm(h, gamma, widened(bias), *size, eps)
    grad = grad_y.to(wide)
    if silu:
        pre = normed if scale is None else normed * (1 + channels(scale))
        if shift is not None:
            pre = pre + channels(shift)
        grad = torch.ops.aten.silu_backward(grad, pre)
    grad_shift = x.new_empty(0) if shift is None else grad.sum(spatial).to(shift.dtype)
    grad_scale = x.new_empty(0)
    if scale is not None:
        grad_scale = (grad * normed).sum(spatial).to(scale.dtype)
        grad = grad * (1 + channels(scale))
    mask = [True, weight is not None, bias is not None]
    grad_h, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        grad.contiguous(memory_format=layout), h, mean, rstd, gamma, *size, mask
    )
    if grad_sum is not None:
        grad_h = grad_h + grad_sum
    return (
        grad_h.to(x.dtype).contiguous(memory_format=memory_format(x)),
        x.new_empty(0) if weight is None else grad_weight.to(weight.dtype),
        x.new_empty(0) if bias is None else grad_bias.to(bias.dtype),
        grad_scale,
        grad_shift,
        x.new_empty(0) if add is None else grad_h.sum(spatial).to(add.dtype),
    )


LIBRARY.impl("group_norm_silu_backward", backward_reference, "CompositeExplicitAutograd")
_BACKWARD_OP = torch.ops.difusores.group_norm_silu_backward.default


@torch.library.register_fake("difusores::group_norm_silu_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("difusores::group_norm_silu_backward_triton", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _backward_fake(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, ...]:
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    params = (weight, bias, scale, shift, add)
    return (grad_x, *(x.new_empty(0) if p is None else p.new_empty(p.shape) for p in params))


def _backward(ctx: Any, grad_y: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, grad_y, grad_sum)
    x, *params, residual = ctx.saved_tensors
    weight, bias, scale, shift, add = params
    layout = memory_format(x)
    grad_y = grad_y.contiguous(memory_format=layout)
    of_sum = grad_sum.contiguous(memory_format=layout) if ctx.return_sum else None
    call = (grad_y, of_sum, x, ctx.num_groups, weight, bias, ctx.eps, ctx.silu, scale, shift, add, residual)
    with use_backend(ctx.wanted) if ctx.wanted else nullcontext():
        backend = choose("group_norm_silu_backward", x.device.type, supports, x, *params, residual)
    op = {"reference": backward_reference, "triton": _TRITON_BACKWARD_OP}.get(backend, _BACKWARD_OP)
    grad_x, *found = op(*call)
    dw, db, dscale, dshift, dadd = (None if p is None else g for p, g in zip(params, found, strict=True))
    return grad_x, None, dw, db, None, None, dscale, dshift, dadd, None if residual is None else grad_x, None


for _name in ("group_norm_silu", "group_norm_silu_triton"):
    torch.library.register_autograd(
        f"difusores::{_name}", _backward, setup_context=_setup_context, lib=LIBRARY
    )


_OP = torch.ops.difusores.group_norm_silu.default


_MOST_CHANNELS = 16384  # of one group, channels last, in the registers of the Triton kernel


def supports(
    backend: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    dtype = x.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel takes float32, bfloat16 and float16, not {dtype}"
    for p in (weight, bias, scale, shift, add):
        if p is not None and p.dtype is not dtype and p.dtype is not torch.float32:
            return f"the kernel takes parameters in float32 or {dtype}, not {p.dtype}"
    if not (x.is_contiguous() or memory_format(x) is not torch.contiguous_format):
        return "the kernel takes contiguous and channels_last tensors, not other strides"
    if backend == "cuda" and x.shape[2:].numel() > 2**30:
        return f"the kernel takes at most 2**30 positions, not {x.shape[2:].numel()}"
    if residual is not None and (residual.dtype is not dtype or residual.stride() != x.stride()):
        return "the kernel takes a residual of x's dtype and strides"
    if backend == "triton" and x.shape[1] > _MOST_CHANNELS:
        return f"the kernel takes at most {_MOST_CHANNELS} channels, not {x.shape[1]}"
    return None


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
) -> None:
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"x must be [N, C, *spatial] with 3 to 5 dimensions, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    n, c = x.shape[0], x.shape[1]
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"num_groups must divide the number of channels: got num_groups={num_groups}, C={c}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != (c,):
            raise ValueError(f"{name} must have shape [C] = [{c}], got {tuple(p.shape)}")
    for name, p in (("scale", scale), ("shift", shift), ("add", add)):
        if p is not None and p.shape != (n, c):
            raise ValueError(f"{name} must have shape [N, C] = [{n}, {c}], got {tuple(p.shape)}")
    for name, p in (
        *(("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)),
        *(("add", add), ("residual", residual)),
    ):
        if p is not None and p.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {p.device}")
    if residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype):
        raise ValueError(
            f"residual must be like x, {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )


def _row(p: Tensor | None) -> Tensor | None:
    """p with its channels side by side, as the kernels read them."""
    return p if p is None or p.stride(-1) == 1 else p.contiguous()


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = act((1 + scale) * GroupNorm(x + add + residual) + shift).

    Args:
        x: [N, C, *spatial], 3-D to 5-D; fp32, bf16, fp16 (fp64 by the reference); contiguous or
            channels_last, kept.
        num_groups: any divisor of C.
        weight, bias: [C] in x's dtype or fp32, or None.
        eps: added to the variance.
        silu: whether act is SiLU; else the identity.
        scale, shift: [N, C] in x's dtype or fp32, or None.
        add: [N, C] in x's dtype or fp32 (a time embedding), or None.
        residual: like x, or None.
        return_sum: return x + add + residual too (the next residual needs it).

    Returns:
        y like x, or (y, sum). Statistics are accumulated in fp32 or wider. Differentiable in every tensor.

    Raises:
        ValueError: shapes or devices that do not fit, named. TypeError: x is not floating point.
    """
    y: Tensor
    total: Tensor
    only_x = return_sum and add is None and residual is None
    if x.is_cpu and straight_to_cpu(x, weight, bias, scale, shift, add, residual):
        before = (x, num_groups, weight, bias, eps, silu, scale, shift, add, residual)
        try:
            with torch._C._AutoDispatchBelowAutograd():
                y, total = _OP(*before, return_sum and not only_x)
            if return_sum:
                return (y, x) if only_x else (y, total)
            return y
        except (RuntimeError, TypeError):
            pass  # the kernel refused; what follows finds another way or the words for it
    _check(x, num_groups, weight, bias, scale, shift, add, residual)
    weight, bias, scale, shift, add = map(_row, (weight, bias, scale, shift, add))
    call = (x, num_groups, weight, bias, eps, silu, scale, shift, add, residual, return_sum and not only_x)
    backend = choose("group_norm_silu", x.device.type, supports, x, weight, bias, scale, shift, add, residual)
    if backend == "reference":
        y, total = reference(*call)
    else:
        op = _TRITON_OP if backend == "triton" else _OP
        if needs_grad(x, weight, bias, scale, shift, add, residual):
            y, total = op(*call)
        else:
            y, total = below_autograd(op, *call)
    if not return_sum:
        return y
    return (y, x) if only_x else (y, total)
