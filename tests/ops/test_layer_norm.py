"""layer_norm against one float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from difusores import ops

OP = "layer_norm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 320), (5, 1), (1, 3, 7, 63), (0, 4)], ids=str)
def test_against_the_oracle(backend: str, shape: Any, dtype: torch.dtype, check: Any) -> None:
    x, r = (torch.randn(shape) + 3).to(dtype), torch.randn(shape).to(dtype)
    w, b = torch.randn(shape[-1]), torch.randn(shape[-1])
    h = x.double() + r.double()
    oracle = torch.nn.functional.layer_norm(h, shape[-1:], w.double(), b.double(), 1e-5)
    eager = torch.nn.functional.layer_norm(x + r, shape[-1:], w.to(dtype), b.to(dtype), 1e-5)
    with ops.use_backend(backend):
        y, total = ops.layer_norm(x, w, b, residual=r, return_sum=True)
        assert ops.layer_norm(x, w, b, return_sum=True)[1] is x
        same, more = ops.layer_norm(x, w, b, residual=r, return_sum=True, sum_bias=b.to(dtype))
        alone = ops.layer_norm(x, w, b, return_sum=True, sum_bias=b)[1]
    assert torch.equal(same, y)
    if y.numel():
        check(y, eager, oracle)
        check(total, x + r, h)
        check(more, x + r + b.to(dtype), h + b.to(dtype).double())
        check(alone, x + b.to(dtype), x.double() + b.double())


@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_mean_far_above_the_deviation(backend: str, mean: float, check: Any) -> None:
    x = torch.randn(4, 320) + mean
    oracle = torch.nn.functional.layer_norm(x.double(), (320,))
    with ops.use_backend(backend):
        got = ops.layer_norm(x, None, None)
        check(got, torch.nn.functional.layer_norm(x, (320,)), oracle)
    if backend == "cpu":  # the mean is kept in two parts
        torch.testing.assert_close(got.double(), oracle, rtol=1e-6, atol=1e-6)


def test_bitwise(backend: str) -> None:
    """The same call twice, a row alone or among others, one thread or several; a NaN stays in its row."""
    x, w, threads = torch.randn(64, 77, 320), torch.randn(320), torch.get_num_threads()
    try:
        with ops.use_backend(backend):
            torch.set_num_threads(1)
            one = ops.layer_norm(x, w, None)
            torch.set_num_threads(3)
            assert torch.equal(ops.layer_norm(x, w, None), one)
            assert torch.equal(ops.layer_norm(x[5, 7], w, None), one[5, 7])
            x[5, 7, 3] = math.nan
            got = ops.layer_norm(x, w, None)
    finally:
        torch.set_num_threads(threads)
    assert torch.isnan(got[5, 7]).all()
    got[5, 7] = one[5, 7]
    assert torch.equal(got, one)


def test_compiles_without_a_break(backend: str) -> None:
    torch.compiler.reset()  # a graph keeps the backend that was in force when it was traced
    x, r = torch.randn(2, 3, 8), torch.randn(2, 3, 8)

    def f() -> Any:
        return ops.layer_norm(x, None, None, residual=r, return_sum=True)

    with ops.use_backend(backend):
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(), f())


def test_gradients() -> None:
    shapes = [(2, 3, 5), (5,), (5,), (2, 3, 5), (5,)]
    wide = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *t: ops.layer_norm(*t[:3], residual=t[3]), wide[:4])
    narrow = [t.detach().float().requires_grad_() for t in wide]
    for leaves in (wide, narrow):  # the reference, which PyTorch differentiates; the op's formula
        y, total = ops.layer_norm(*leaves[:3], residual=leaves[3], return_sum=True, sum_bias=leaves[4])
        ((y * torch.arange(5.0)).sum() + total.square().sum()).backward()
    for got, want in zip(narrow, wide, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-5)
    op = torch.ops.difusores.layer_norm.default
    torch.library.opcheck(op, (*narrow[:3], 1e-5, narrow[3], True, narrow[4]))
    torch.library.opcheck(op, (narrow[0], None, None, 1e-5, None, False, None))


def test_bad_input_is_named() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"weight must have shape \[D\] = \[4\]"):
        ops.layer_norm(x, torch.zeros(3), None)
    with pytest.raises(ValueError, match="residual must be like x"):
        ops.layer_norm(x, None, None, residual=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="sum_bias is added to the sum"):
        ops.layer_norm(x, None, None, sum_bias=torch.zeros(4))
    with pytest.raises(ValueError, match="floating-point"):
        ops.layer_norm(torch.zeros(2, 4, dtype=torch.int64), None, None)
