"""bias_residual against one float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from difusores import ops
from difusores.ops import dispatch
from difusores.ops.bias_residual import reference

OP = "bias_residual"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# positions or channels that fill no access, one channel, one position, more than a block, tokens, 3-D images
SHAPES = [
    (2, 16, 8, 8),
    (2, 7, 5, 3),
    (1, 1, 9),
    (3, 40),
    (1, 24, 33, 31),
    (2, 8, 2, 3, 4),
    (2, 40, 77),
    (0, 4, 2),
]
OPTIONS = [("bias", "add", "residual", "scale"), ("bias",), ("residual",), ("add", "residual"), ()]


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str, options: tuple[str, ...]) -> dict[str, Any]:
    n, c = shape[:2]

    def image() -> Tensor:
        t = torch.randn(shape).to(dtype)
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else t

    given: dict[str, Any] = {
        "bias": torch.randn(c),
        "add": torch.randn(n, 2 * c).to(dtype)[:, c:],  # a slice of all of a network's projections
        "residual": image(),
        "scale": 0.7,
    }
    return {"x": image(), **{name: given[name] for name in options}}


def call(of: dict[str, Any], wide: bool = False) -> tuple[Any, ...]:
    tensors = [of.get(name) for name in ("x", "bias", "add", "residual")]
    return (*(t.double() if wide and t is not None else t for t in tensors), of.get("scale", 1.0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(backend: str, shape: Any, layout: str, check: Any) -> None:
    for number, dtype in enumerate(DTYPES):
        # In Triton's interpreter, where a launch takes long: each of the options with one dtype, by turns.
        turn = (SHAPES.index(shape) + number) % len(DTYPES)
        for options in OPTIONS[turn :: len(DTYPES)] if dispatch.interpreted() else OPTIONS:
            given = make(shape, dtype, layout, options)
            before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}
            with ops.use_backend(backend):
                got = ops.bias_residual(**given)
                again = ops.bias_residual(**given)
                alone = {k: v[-1:] if k in ("x", "add", "residual") else v for k, v in given.items()}
                last = ops.bias_residual(**alone)
            assert got.shape == given["x"].shape and got.stride() == given["x"].stride()
            assert all(torch.equal(given[k], v) for k, v in before.items() if isinstance(v, Tensor))
            assert torch.equal(got, again) and torch.equal(got[-1:], last), "other bits"
            if got.numel():
                check(got, reference(*call(given)), reference(*call(given, wide=True)))
            with ops.use_backend(backend):
                assert ops.bias_residual(**given, inplace=True) is given["x"]
            assert torch.equal(given["x"], got)


def test_hostile_values(backend: str) -> None:
    """NaN and Inf stay where they are; operands whose address allows no wide access."""
    x, bias = torch.randn(1, 8, 4, 5), torch.zeros(8)
    x[0, 3, 1, 2], x[0, 5, 0, 0], bias[7] = math.nan, math.inf, -math.inf
    memory = torch.randn(2 * x.numel() + 1)
    shifted, residual = memory[1 : 1 + x.numel()].view_as(x).copy_(x), memory[: x.numel()].view_as(x).clone()
    with ops.use_backend(backend):
        y, same = ops.bias_residual(x, bias), ops.bias_residual(shifted, bias)
        assert torch.equal(y.nan_to_num(7.0), same.nan_to_num(7.0))
        twice = ops.bias_residual(residual, residual=residual)
    assert torch.equal(twice.nan_to_num(7.0), (residual + residual).nan_to_num(7.0))
    assert torch.isnan(y).sum() == 1 and torch.isnan(y[0, 3, 1, 2]) and y[0, 5, 0, 0] == math.inf
    assert (y[0, 7] == -math.inf).all() and torch.isfinite(y).sum() == x.numel() - 22


def test_other_strides_go_to_the_reference(backend: str) -> None:
    x = torch.randn(2, 8, 6, 12)[..., ::2]
    got = ops.bias_residual(x, torch.ones(8), residual=x.contiguous())
    torch.testing.assert_close(got, x + 1 + x)
    if backend != "reference":
        with (
            ops.use_backend(backend),
            pytest.raises(ops.BackendUnavailable, match="contiguous and channels_last"),
        ):
            ops.bias_residual(x)
        with ops.use_backend(backend), pytest.raises(ops.BackendUnavailable, match=r"not torch\.float64"):
            ops.bias_residual(x.contiguous().double())
        with ops.use_backend(backend), pytest.raises(ops.BackendUnavailable, match="residual of x's strides"):
            ops.bias_residual(x.contiguous(), residual=x)


def test_compiles_without_a_break(backend: str) -> None:
    torch.compiler.reset()  # a graph keeps the backend that was in force when it was traced
    given = make((2, 8, 4, 4), torch.float32, "contiguous", OPTIONS[0])
    with ops.use_backend(backend):
        compiled = torch.compile(lambda: ops.bias_residual(**given), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), ops.bias_residual(**given))


def test_gradients() -> None:
    given = make((2, 4, 3, 2), torch.float64, "channels_last", OPTIONS[0])
    leaves = [t.double().detach().requires_grad_() for t in call(given)[:4]]
    op = torch.ops.difusores.bias_residual.default
    assert torch.autograd.gradcheck(lambda *t: op(*t, 0.7), leaves)
    assert torch.autograd.gradcheck(lambda *t: ops.bias_residual(*t, 0.7), leaves)
    torch.library.opcheck(op, (*leaves, 0.7))
    torch.library.opcheck(op, (leaves[0], None, None, None, 1.0))
    rows = [t.detach().flatten(1)[:, :4] for t in leaves[::2]]
    torch.library.opcheck(op, (rows[0].requires_grad_(), None, rows[1].requires_grad_(), None, 2.0))
    in_place = torch.ops.difusores.bias_residual_.default
    torch.library.opcheck(in_place, (*(t.detach().clone() for t in leaves), 0.7))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"\[N, C, \*spatial\]"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \[C\] = \[8\]"),
        ({"add": torch.zeros(8)}, ValueError, r"add must have shape \[N, C\] = \[2, 8\]"),
        ({"residual": torch.zeros(2, 8, 4)}, ValueError, "residual must be like x"),
        (
            {"bias": torch.zeros(8, requires_grad=True), "inplace": True},
            ValueError,
            "inplace=True overwrites",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.bias_residual(**{"x": torch.zeros(2, 8, 4, 4), **change})
