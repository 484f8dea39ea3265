"""Scaled dot-product attention: softmax(scale * q kᵀ + mask) v (Vaswani et al. 2017, equation 1)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores.ops.dispatch import LIBRARY, below_autograd, choose, needs_grad, register, register_triton

_SIGNATURE = "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor"
LIBRARY.define("attention" + _SIGNATURE)
_TRITON_OP = register_triton("attention", _SIGNATURE)
register("attention", "torch", "triton")


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide), k.to(wide).transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.to(wide)
    return torch.softmax(scores, dim=-1)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The op in plain PyTorch: scores and softmax in fp32 or wider."""
    p = _weights(q, k, mask, scale)
    return torch.matmul(p, v.to(p.dtype)).to(q.dtype).contiguous()


LIBRARY.impl("attention", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.register_fake("difusores::attention_triton", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_triton(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask = ctx.saved_tensors
    p = _weights(q, k, mask, ctx.scale)
    wide = p.dtype
    grad = grad.to(wide)
    grad_v = torch.matmul(p.transpose(-1, -2), grad).to(v.dtype)
    grad_p = torch.matmul(grad, v.to(wide).transpose(-1, -2))
    grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
    grad_q = (torch.matmul(grad_scores, k.to(wide)) * ctx.scale).to(q.dtype)
    grad_k = (torch.matmul(grad_scores.transpose(-1, -2), q.to(wide)) * ctx.scale).to(k.dtype)
    grad_mask = None
    if mask is not None and ctx.needs_input_grad[3]:
        grad_mask = grad_scores.sum_to_size(mask.shape).to(mask.dtype)
    return grad_q, grad_k, grad_v, grad_mask, None


for _name in ("attention", "attention_triton"):
    torch.library.register_autograd(
        f"difusores::{_name}", _backward, setup_context=_setup_context, lib=LIBRARY
    )


_WIDEST = 512  # head that fits the registers of a kernel


def supports(backend: str, q: Tensor, v: Tensor) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    if backend == "torch":
        return None
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel takes float32, bfloat16 and float16, not {q.dtype}"
    if max(q.shape[3], v.shape[3]) > _WIDEST:
        return f"the kernel takes heads of at most {_WIDEST} elements, not {max(q.shape[3], v.shape[3])}"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale * q kᵀ + mask) v, per batch and head.

    Args:
        q: [B, H, L, D], any strides; fp32, bf16, fp16, fp64.
        k: [B, H, S, D], v: [B, H, S, Dv], any strides, same dtype as q.
        mask: broadcastable to [B, H, L, S]; bool (True takes part) or floating point (added to the scores).
        scale: factor on the scores; 1 / sqrt(D) if None.

    Returns:
        [B, H, L, Dv] in q's dtype. Differentiable. What a query gets whose keys are all masked is the
        implementation's choice (NaN in the reference).

    Raises:
        ValueError: shapes or dtypes that do not fit, named.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v must be [B, H, L, D], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q [B, H, L, D], k [B, H, S, D], v [B, H, S, Dv] do not fit: got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.dtype is not q.dtype or v.dtype is not q.dtype:
        raise ValueError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if mask is not None and not (mask.dtype is torch.bool or mask.is_floating_point()):
        raise ValueError(f"mask must be bool or floating point, got {mask.dtype}")
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    backend = choose("attention", q.device.type, supports, q, v)
    if backend == "triton":
        call = (q, k, v, mask, scale)
        out: Tensor = _TRITON_OP(*call) if needs_grad(q, k, v, mask) else below_autograd(_TRITON_OP, *call)
        return out
    if backend == "torch":
        additive = mask if mask is None or mask.dtype is torch.bool else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=additive, scale=scale)
    return reference(q, k, v, mask, scale)
