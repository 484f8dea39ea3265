"""Layer normalisation with an optional residual.

    h = x + residual
    y = weight * (h - mean) / sqrt(var + eps) + bias
    sum = h + sum_bias

mean and var over the last dimension (Ba et al. 2016, "Layer Normalization").
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores.ops.dispatch import LIBRARY, below_autograd, choose, needs_grad, register, register_triton

_SIGNATURE = (
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual, bool return_sum, Tensor? sum_bias)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define("layer_norm" + _SIGNATURE)
_TRITON_OP = register_triton("layer_norm", _SIGNATURE)
register("layer_norm", "cuda", "cpu", "triton")


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    return_sum: bool,
    sum_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch. The second output is empty unless `return_sum`."""
    h = x if residual is None else x + residual
    params = [None if p is None else p.to(x.dtype) for p in (weight, bias)]
    y = F.layer_norm(h, (x.shape[-1],), params[0], params[1], eps).contiguous()
    if not return_sum:
        return y, x.new_empty(0)
    if sum_bias is not None:
        return y, (h + sum_bias.to(x.dtype)).contiguous()
    return y, h.clone() if h is x else h.contiguous()


LIBRARY.impl("layer_norm", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::layer_norm", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("difusores::layer_norm_triton", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    return_sum: bool,
    sum_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    return y, torch.empty_like(y) if return_sum else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps, residual, ctx.return_sum, sum_bias = inputs
    ctx.of_sum_bias = None if sum_bias is None else sum_bias.dtype
    ctx.save_for_backward(x, weight, bias, residual)


def _backward(ctx: Any, grad_y: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual = ctx.saved_tensors
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    var, mean = torch.var_mean(h, dim=-1, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + ctx.eps)
    hat = (h - mean) * rstd
    grad = grad_y.to(wide)
    rows = list(range(x.ndim - 1))
    grad_bias = grad.sum(rows).to(bias.dtype) if bias is not None else None
    grad_weight = None
    if weight is not None:
        grad_weight = (grad * hat).sum(rows).to(weight.dtype)
        grad = grad * weight.to(wide)
    grad_h = rstd * (grad - grad.mean(-1, keepdim=True) - hat * (grad * hat).mean(-1, keepdim=True))
    if ctx.return_sum:
        grad_h = grad_h + grad_sum
    grad_x = grad_h.to(x.dtype)
    grad_sum_bias = None if ctx.of_sum_bias is None else grad_sum.to(wide).sum(rows).to(ctx.of_sum_bias)
    grad_residual = grad_x if residual is not None else None
    return grad_x, grad_weight, grad_bias, None, grad_residual, None, grad_sum_bias


for _name in ("layer_norm", "layer_norm_triton"):
    torch.library.register_autograd(
        f"difusores::{_name}", _backward, setup_context=_setup_context, lib=LIBRARY
    )

_OP = torch.ops.difusores.layer_norm.default
_LONGEST = 16384  # elements of a row that a kernel on a GPU holds in registers


def supports(
    backend: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, sum_bias: Tensor | None
) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel takes float32, bfloat16 and float16, not {x.dtype}"
    for p in (weight, bias, sum_bias):
        if p is not None and p.dtype is not x.dtype and p.dtype is not torch.float32:
            return f"the kernel takes parameters in float32 or {x.dtype}, not {p.dtype}"
    if backend != "cpu" and x.shape[-1] > _LONGEST:
        return f"the kernel takes rows of at most {_LONGEST} elements, not {x.shape[-1]}"
    return None


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    return_sum: bool = False,
    sum_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = LayerNorm(x + residual) over the last dimension.

    Args:
        x: [..., D]; fp32, bf16, fp16, fp64.
        weight, bias: [D] in x's dtype or fp32, or None.
        eps: added to the variance.
        residual: like x, or None.
        return_sum: return x + residual too, for what is added to it later.
        sum_bias: [D] in x's dtype or fp32, added to that sum and not to what is normalised; with return_sum
            alone.

    Returns:
        y like x, or (y, sum). Differentiable in every tensor.

    Raises:
        ValueError: shapes that do not fit, named.
    """
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor [..., D], got shape {tuple(x.shape)}, {x.dtype}")
    for name, p in (("weight", weight), ("bias", bias), ("sum_bias", sum_bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape [D] = [{x.shape[-1]}], got {tuple(p.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype):
        raise ValueError(
            f"residual must be like x, {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    if sum_bias is not None and not return_sum:
        raise ValueError("sum_bias is added to the sum, which return_sum=True asks for")
    only_x = return_sum and residual is None and sum_bias is None
    backend = choose("layer_norm", x.device.type, supports, x, weight, bias, sum_bias)
    if backend in ("cpu", "cuda"):
        more = (weight, bias, residual, sum_bias)
        x = x.contiguous()
        weight, bias, residual, sum_bias = (None if t is None else t.contiguous() for t in more)
    call = (x, weight, bias, eps, residual, return_sum and not only_x, sum_bias)
    if backend == "reference":
        y, total = reference(*call)  # plain Python, which PyTorch differentiates
    else:
        op = _TRITON_OP if backend == "triton" else _OP
        y, total = op(*call) if needs_grad(x, weight, bias, residual, sum_bias) else below_autograd(op, *call)
    if not return_sum:
        return y
    return (y, x) if only_x else (y, total)
