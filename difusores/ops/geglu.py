"""GEGLU: the first half of the last dimension times GELU of the second.

Shazeer 2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores.ops.dispatch import LIBRARY, register

LIBRARY.define("geglu(Tensor x, str approximate) -> Tensor")
register("geglu")


def reference(x: Tensor, approximate: str) -> Tensor:
    """The op in plain PyTorch."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate, approximate=approximate)


LIBRARY.impl("geglu", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::geglu", lib=LIBRARY)  # type: ignore[untyped-decorator]
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


torch.library.register_autograd("difusores::geglu", _backward, setup_context=_setup_context, lib=LIBRARY)


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
    # Plain Python, not the registered op: only the reference exists, and PyTorch differentiates it.
    return reference(x, approximate)
