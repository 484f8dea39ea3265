"""geglu against one float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from difusores import ops

OP = "geglu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(2, 9, 640), (5, 2), (1, 3, 7, 126), (0, 4)], ids=str)
def test_against_the_oracle(
    backend: str, shape: Any, approximate: str, dtype: torch.dtype, check: Any
) -> None:
    x = (3 * torch.randn(shape)).to(dtype)
    with ops.use_backend(backend):
        got = ops.geglu(x, approximate=approximate)
    value, gate = x.chunk(2, dim=-1)
    wide_value, wide_gate = x.double().chunk(2, dim=-1)
    eager = value * F.gelu(gate, approximate=approximate)
    if got.numel():
        check(got, eager, wide_value * F.gelu(wide_gate, approximate=approximate))
    strided = torch.stack((x, x), dim=-1)[..., 0]
    with ops.use_backend(backend):
        assert torch.equal(ops.geglu(x, approximate=approximate), got)  # the same bits twice
        torch.testing.assert_close(ops.geglu(strided, approximate=approximate), got)


def test_hostile_values(backend: str) -> None:
    """value, gate: NaN stays where it is, a gate of -inf closes like any very negative one."""
    x = torch.tensor(
        [[1.0, math.nan], [math.nan, 1.0], [2.0, math.inf], [2.0, -1e30], [3e38, 1e-30], [1.0, 1.0]]
    )
    with ops.use_backend(backend):
        got = ops.geglu(x)[:, 0]
    assert torch.isnan(got[:2]).all() and got[2] == math.inf and got[3] == 0
    assert torch.isfinite(got[3:]).all()
    torch.testing.assert_close(got[5], F.gelu(torch.tensor(1.0)))


def test_compiles_without_a_break(backend: str) -> None:
    torch.compiler.reset()  # a graph keeps the backend that was in force when it was traced
    x = torch.randn(2, 3, 8)
    with ops.use_backend(backend):
        compiled = torch.compile(lambda: ops.geglu(x), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), ops.geglu(x))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradients(approximate: str) -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.geglu(t, approximate=approximate), [x])
    leaf, wide = (x.detach().to(d).requires_grad_() for d in (torch.float32, torch.float64))
    for t in (leaf, wide):  # the formula of the op, and the reference, which PyTorch differentiates
        (ops.geglu(t, approximate=approximate) * torch.arange(4.0)).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.difusores.geglu.default, (leaf, approximate))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="must be even"):
        ops.geglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'none' or 'tanh'"):
        ops.geglu(torch.zeros(2, 4), approximate="erf")
