"""group_norm_affine on every backend: applied to x, its numbers are the group norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from difusores import ops
from difusores.ops import dispatch

OP = "group_norm_affine"


def make(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 3.0, std: float = 2.0) -> dict[str, Any]:
    n, c = shape[:2]
    x = (torch.randn(shape) * std + mean).to(dtype)
    return {
        "x": x.to(memory_format=torch.channels_last) if x.ndim == 4 else x,
        "weight": torch.randn(c),
        "bias": torch.randn(c).to(dtype),
        "scale": torch.randn(n, 2 * c)[:, :c],
        "shift": torch.randn(n, c).to(dtype),
    }


def run(backend: str | None, call: dict[str, Any], groups: int) -> tuple[Tensor, Tensor]:
    if backend is None:
        return ops.group_norm_affine(num_groups=groups, **call)
    with ops.use_backend(backend):
        return ops.group_norm_affine(num_groups=groups, **call)


def wide(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() for k, v in call.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 32, 8, 8), 32), ((3, 12, 5, 7), 3), ((1, 1, 1, 3), 1), ((2, 40, 33, 31), 2), ((2, 7, 1, 1), 1)],
    ids=str,
)
def test_against_the_oracle(backend: str, shape: Any, groups: int, dtype: torch.dtype, check: Any) -> None:
    for names in (("x", "weight", "bias", "scale", "shift"), ("x", "weight", "bias"), ("x",)):
        call = {"weight": None, "bias": None, **{k: v for k, v in make(shape, dtype).items() if k in names}}
        exact = {k: None if v is None else v.double() for k, v in call.items()}
        for ours, eager, oracle in zip(
            run(backend, call, groups),
            run("reference", call, groups),
            run("reference", exact, groups),
            strict=True,
        ):
            assert ours.dtype is torch.float32 and ours.is_contiguous()
            check(ours, eager, oracle)


@pytest.mark.parametrize(("mean", "std"), [(-2300.0, 1.0), (0.0, 1e15), (0.0, 1e-18), (3.0, 0.0)])
def test_applied_it_is_the_group_norm(backend: str, mean: float, std: float, check: Any) -> None:
    call = make((2, 64, 24, 24), torch.float32, mean, std)
    multiplier, offset = (t[:, :, None, None] for t in run(backend, call, 8))
    options = {k: call[k] for k in ("scale", "shift")}
    with ops.use_backend("reference"):
        eager = ops.group_norm_silu(call["x"], 8, call["weight"], call["bias"], silu=False, **options)
        exact = wide(call)
        options = {k: exact[k] for k in ("scale", "shift")}
        oracle = ops.group_norm_silu(exact["x"], 8, exact["weight"], exact["bias"], silu=False, **options)
    check(torch.addcmul(offset, call["x"], multiplier), eager, oracle)


def test_bitwise() -> None:
    """The kernel: the same call twice, an image alone or in a batch, one thread or several: the same bits."""
    reason = dispatch.status("cpu")
    if reason is not None:
        pytest.skip(reason)
    call = make((3, 96, 33, 31), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run("cpu", call, 32)
        torch.set_num_threads(3)
        several = run("cpu", call, 32)
    finally:
        torch.set_num_threads(threads)
    last = {k: v[2:] if k in ("x", "scale", "shift") else v for k, v in call.items()}
    for a, b, alone in zip(one, several, run("cpu", last, 32), strict=True):
        assert torch.equal(a, b) and torch.equal(a[2:], alone)


@pytest.mark.parametrize("mean", [0.0, -2300.0])
@pytest.mark.parametrize(("shape", "groups"), [((2, 32, 8, 8), 32), ((3, 12, 5, 7), 3), ((2, 40, 33, 31), 2)])
def test_moments_take_the_place_of_x(
    backend: str, shape: tuple[int, ...], groups: int, mean: float, check: Any
) -> None:
    call = make(shape, torch.float32, mean)
    variance, means = torch.var_mean(call["x"].double(), dim=(2, 3), correction=0)
    moments = torch.stack([means, variance], dim=1)
    exact, eager = run("reference", wide(call), groups), run("reference", call, groups)
    for ours, theirs, oracle in zip(
        run(backend, {**call, "moments": moments}, groups), eager, exact, strict=True
    ):
        check(ours, theirs, oracle)
    if backend == "cpu":
        nothing = {**call, "x": torch.full_like(call["x"], torch.nan)}
        for a, b in zip(
            run("cpu", {**nothing, "moments": moments}, groups),
            run("cpu", {**call, "moments": moments}, groups),
            strict=True,
        ):
            assert torch.equal(a, b)
        with pytest.raises(ops.BackendUnavailable, match="contiguous moments in float64"):
            run("cpu", {**call, "moments": moments.float()}, groups)
    with pytest.raises(ValueError, match="moments must have shape"):
        run(backend, {**call, "moments": moments[:1]}, groups)


def test_other_calls_and_gradients() -> None:
    x = torch.randn(2, 8, 6)
    multiplier, offset = ops.group_norm_affine(x, 2, None, None)
    normed = torch.nn.functional.group_norm(x, 2)
    torch.testing.assert_close(x * multiplier[:, :, None] + offset[:, :, None], normed)
    weight = torch.randn(8, requires_grad=True)
    assert sum(t.sum() for t in ops.group_norm_affine(x, 2, weight, None)).requires_grad
    assert ops.group_norm_affine(torch.empty(0, 8, 4, 4), 2, None, None)[0].shape == (0, 8)
    with pytest.raises(ValueError, match="num_groups must divide"):
        ops.group_norm_affine(x, 3, None, None)
    if dispatch.status("cpu") is None:
        with pytest.raises(ops.BackendUnavailable, match="channels_last"):
            run("cpu", {"x": torch.randn(2, 8, 6, 6), "weight": None, "bias": None}, 2)


def test_opcheck() -> None:
    call = make((2, 8, 4, 4), torch.float32)
    arguments = (call["x"], 4, call["weight"], call["bias"], 1e-5, call["scale"], None)
    torch.library.opcheck(torch.ops.difusores.group_norm_affine.default, arguments)
    moments = torch.ones(2, 2, 8, dtype=torch.float64)
    torch.library.opcheck(torch.ops.difusores.group_norm_affine.default, (*arguments, moments))


def test_compiles_without_a_break(backend: str) -> None:
    torch.compiler.reset()  # a graph keeps the backend that was in force when it was traced
    call = make((2, 8, 4, 4), torch.float32)
    compiled = torch.compile(lambda: run(None, call, 4), fullgraph=True, backend="aot_eager")
    with ops.use_backend(backend):
        torch.testing.assert_close(compiled(), run(None, call, 4))
