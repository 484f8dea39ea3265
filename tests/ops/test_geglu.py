"""geglu against one float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from difusores import ops

OP = "geglu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(2, 9, 640), (5, 2), (1, 3, 7, 126)], ids=str)
def test_against_the_oracle(
    backend: str, shape: Any, approximate: str, dtype: torch.dtype, check: Any
) -> None:
    x = (3 * torch.randn(shape)).to(dtype)
    with ops.use_backend(backend):
        got = ops.geglu(x, approximate=approximate)
    value, gate = x.chunk(2, dim=-1)
    wide_value, wide_gate = x.double().chunk(2, dim=-1)
    eager = value * F.gelu(gate, approximate=approximate)
    check(got, eager, wide_value * F.gelu(wide_gate, approximate=approximate))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradients(approximate: str) -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    op = torch.ops.difusores.geglu.default
    assert torch.autograd.gradcheck(lambda t: op(t, approximate), [x])
    torch.library.opcheck(op, (x, approximate))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="must be even"):
        ops.geglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'none' or 'tanh'"):
        ops.geglu(torch.zeros(2, 4), approximate="erf")
