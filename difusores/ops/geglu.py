"""GEGLU: the first half of the last dimension times GELU of the second.

Shazeer 2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores.ops.dispatch import LIBRARY, below_autograd, choose, needs_grad, register, register_triton

_SIGNATURE = "(Tensor x, str approximate) -> Tensor"
LIBRARY.define("geglu" + _SIGNATURE)
_TRITON_OP = register_triton("geglu", _SIGNATURE)
register("geglu", "cuda", "cpu", "triton")


def reference(x: Tensor, approximate: str) -> Tensor:
    """The op in plain PyTorch."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate, approximate=approximate)


LIBRARY.impl("geglu", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::geglu", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("difusores::geglu_triton", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(x: Tensor, approximate: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    value, gate = x.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.gelu_backward(grad * value, gate, approximate=ctx.approximate)
    return torch.cat((grad * F.gelu(gate, approximate=ctx.approximate), grad_gate), dim=-1), None


for _name in ("geglu", "geglu_triton"):
    torch.library.register_autograd(
        f"difusores::{_name}", _backward, setup_context=_setup_context, lib=LIBRARY
    )

_OP = torch.ops.difusores.geglu.default


def supports(backend: str, x: Tensor) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel takes float32, bfloat16 and float16, not {x.dtype}"
    return None


def geglu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x[..., :D] * GELU(x[..., D:]).

    Args:
        x: [..., 2 * D]; fp32, bf16, fp16, fp64.
        approximate: "none" (by erf) or "tanh".

    Returns:
        [..., D] in x's dtype. Differentiable.

    Raises:
        ValueError: an odd last dimension, or another `approximate`.
    """
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ValueError(f"the last dimension must be even (value and gate), got shape {tuple(x.shape)}")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    backend = choose("geglu", x.device.type, supports, x)
    if backend == "reference":
        return reference(x, approximate)  # plain Python, which PyTorch differentiates
    call = (x, approximate) if backend == "triton" else (x.contiguous(), approximate)
    op = _TRITON_OP if backend == "triton" else _OP
    out: Tensor = op(*call) if needs_grad(x) else below_autograd(op, *call)
    return out
