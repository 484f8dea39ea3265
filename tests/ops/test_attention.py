"""attention on every backend against one float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from difusores import ops

OP = "attention"
CASES = [(2, 3, 16, 16, 8), (1, 8, 33, 77, 40), (2, 1, 1, 5, 64), (1, 2, 64, 64, 160), (0, 2, 4, 4, 8)]


def heads(b: int, h: int, length: int, d: int, dtype: torch.dtype) -> Tensor:
    return (
        torch.randn(b, length, h * d).to(dtype).reshape(b, length, h, d).transpose(1, 2)
    )  # as a projection leaves it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(backend: str, case: Any, mask: str, dtype: torch.dtype, check: Any) -> None:
    b, h, length, keys, d = case
    q, k, v = heads(b, h, length, d, dtype), heads(b, h, keys, d, dtype), heads(b, h, keys, d, dtype)
    m = None
    if mask == "bool":
        m = torch.rand(b, 1, 1, keys) > 0.3
        m[..., 0] = True
    elif mask == "additive":
        m = torch.randn(b, 1, length, keys).to(dtype)
    with ops.use_backend(backend):
        got = ops.attention(q, k, v, mask=m)
    with ops.use_backend("reference"):
        wide = m.double() if m is not None and m.is_floating_point() else m
        oracle = ops.attention(q.double(), k.double(), v.double(), mask=wide)
    eager = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=m)
    if got.numel():
        check(got, eager, oracle)
    assert got.shape == (b, h, length, d)


def test_nan_and_infinity_stay_in_their_image(backend: str) -> None:
    q, k, v = (torch.randn(3, 2, 9, 16) for _ in range(3))
    with ops.use_backend(backend):
        clean = ops.attention(q, k, v)
        v[0, 0, 4, 2], k[1, 1, 0, 0] = math.nan, math.inf
        got = ops.attention(q, k, v)
        assert torch.equal(ops.attention(q, k, v).nan_to_num(7), got.nan_to_num(7))  # the same bits twice
    assert torch.isnan(got[0, 0, :, 2]).all()
    assert torch.equal(got[2], clean[2])


def test_scale(backend: str, check: Any) -> None:
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    with ops.use_backend(backend):
        got = ops.attention(q, k, v, scale=0.7)
    exact = torch.softmax(0.7 * q.double() @ k.double().transpose(-1, -2), dim=-1) @ v.double()
    check(got, exact.float(), exact)


def test_gradients(backend: str) -> None:
    tensors = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(lambda q, k, v: ops.attention(q, k, v, scale=0.5), tensors)


def test_registered_formula() -> None:
    """The registered op's own backward, mask included."""
    tensors = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    op = torch.ops.difusores.attention.default
    assert torch.autograd.gradcheck(lambda *t: op(*t, 0.5), [*tensors, mask])
    torch.library.opcheck(op, (*tensors, mask, 0.5))
    torch.library.opcheck(op, (*tensors, None, 0.5))


def test_compiles_without_a_break(backend: str) -> None:
    torch.compiler.reset()  # a graph keeps the backend that was in force when it was traced
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    with ops.use_backend(backend):
        compiled = torch.compile(lambda: ops.attention(q, k, v), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), ops.attention(q, k, v))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), r"must be \[B, H, L, D\]"),
        (((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 4)), "do not fit"),
        (((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 3, 4)), "do not fit"),
        (((2, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), "do not fit"),
    ],
)
def test_bad_shapes_are_named(shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.attention(*(torch.zeros(s) for s in shapes))


def test_bad_dtypes_are_named() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="one dtype"):
        ops.attention(q, q.half(), q)
    with pytest.raises(ValueError, match="bool or floating point"):
        ops.attention(q, q, q, mask=torch.zeros(2, 2, dtype=torch.int64))
