"""linear against one float64 oracle; its kernels' own tests stand in triton_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import ops
from difusores.ops import dispatch
from difusores.ops.linear import fused


def case(dtype: torch.dtype, geglu: bool) -> dict[str, Any]:
    return {
        "x": torch.randn(2, 5, 12).to(dtype),
        "weight": torch.randn(16 if geglu else 8, 12).to(dtype),
        "bias": torch.randn(16 if geglu else 8).to(dtype),
        "residual": torch.randn(2, 5, 8).to(dtype),
        "residual_bias": torch.randn(8).to(dtype),
        "geglu": geglu,
    }


def formula(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, residual_bias: Tensor, geglu: bool
) -> Tensor:
    out = F.linear(x, weight, bias)
    if geglu:
        value, gate = out.chunk(2, dim=-1)
        out = value * F.gelu(gate)
    return out + residual + residual_bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("geglu", [False, True])
def test_against_the_oracle(geglu: bool, dtype: torch.dtype, check: Any) -> None:
    call = case(dtype, geglu)
    before = call["residual"].clone()
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()}
    check(ops.linear(**call), formula(**call), formula(**wide))
    assert torch.equal(call["residual"], before)
    with ops.use_backend("reference"):
        check(ops.linear(**call), formula(**call), formula(**wide))


@pytest.mark.parametrize("geglu", [False, True])
def test_gradients(geglu: bool) -> None:
    call = case(torch.float64, geglu)
    tensors = tuple(v.requires_grad_() for v in call.values() if isinstance(v, Tensor))
    op = torch.ops.difusores.linear.default
    assert torch.autograd.gradcheck(lambda *t: op(*t[:4], geglu, t[4]), tensors)

    def public(*t: Tensor) -> Tensor:
        return ops.linear(*t[:3], residual=t[3], residual_bias=t[4], geglu=geglu)

    assert torch.autograd.gradcheck(public, tensors)
    torch.library.opcheck(op, (*tensors[:4], geglu, tensors[4]))


def test_a_call_that_the_named_backend_does_not_take_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking is no call: an accelerated network then makes its product and what follows one by one."""
    status = dispatch.status
    monkeypatch.setattr(dispatch, "status", lambda name: None if name == "triton" else status(name))
    x, weight = torch.randn(2, 5, 12), torch.randn(8, 12)
    with ops.use_backend("triton"):
        assert not fused(x, weight, None, None, False)
        with pytest.raises(ops.BackendUnavailable, match="linear: backend 'triton' was asked for, but"):
            ops.linear(x, weight)


def test_bad_input_is_named() -> None:
    x, weight = torch.zeros(2, 4), torch.zeros(6, 4)
    for call, words in (
        (lambda: ops.linear(x, weight[:, :3]), r"x \[..., K\] and weight \[D, K\] do not fit"),
        (lambda: ops.linear(x, weight[:5], geglu=True), "an even number of rows, not 5"),
        (lambda: ops.linear(x, weight, torch.zeros(5)), r"bias must have shape \[6\], got \(5,\)"),
        (lambda: ops.linear(x, weight, residual=torch.zeros(2, 3)), r"residual must be \(2, 6\)"),
        (lambda: ops.linear(x, weight, residual=torch.zeros(2, 6).half()), "got .* in torch.float16"),
        (lambda: ops.linear(x, weight, residual_bias=torch.zeros(2)), r"residual_bias must have shape \[6\]"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
