"""guidance_rescale on every backend against one float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from difusores import ops
from difusores.ops.scheduler_step import ROW

OP = "guidance_rescale"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = ((7.5,), (-6.5, 7.5), (7.5, -5.0, -1.5))
SHAPES = (
    *((2, 3, 7, 5), (1, 4, 64, 64), (3, 2, 33), (2, 5, 41, 25), (4, 2), (1, 1, 1, 1, 3)),
    *((2, 1, elements) for elements in (1023, 1024, 1025)),
)


def row(*weights: float) -> Tensor:
    made = torch.zeros(ROW, dtype=torch.float64)
    made[: len(weights)] = torch.tensor(weights, dtype=torch.float64)
    return made


def images(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Model outputs: one model's halves of a batch, and of its channels, which a learned variance follows."""
    both = torch.randn(count * shape[0], 2 * shape[1], *shape[2:]) * 3 + 1
    return [part[:, : shape[1]] for part in both.to(dtype).chunk(count)]


def wide(outputs: list[Tensor]) -> list[Tensor]:
    return [e.double() for e in outputs]


def by_hand(weights: tuple[float, ...], outputs: list[Tensor], conditional: int, share: float) -> Tensor:
    """PyTorch's default deviation, and what diffusers does with it: [B]."""
    mixed = sum((w * e for w, e in zip(weights, outputs, strict=True)), torch.zeros(()))
    ratio = outputs[conditional].flatten(1).std(dim=1) / mixed.flatten(1).std(dim=1)
    return share * ratio + (1 - share)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_against_the_oracle(backend: str, weights: Any, dtype: torch.dtype, check: Any) -> None:
    for shape in SHAPES:
        outputs = images(len(weights), shape, dtype)
        for conditional, share in ((-1, 0.7), (0, 1.0)):
            call = (row(*weights), outputs, share)
            with ops.use_backend(backend):
                got = ops.guidance_rescale(*call, conditional=conditional)
            with ops.use_backend("reference"):
                eager = ops.guidance_rescale(*call, conditional=conditional)
            oracle = by_hand(weights, wide(outputs), conditional, share)
            assert got.shape == (shape[0],) and got.dtype is torch.float32
            check(got, eager, oracle)
            torch.testing.assert_close(eager.double(), oracle, rtol=1e-4, atol=0, equal_nan=True)


def test_a_large_mean(backend: str) -> None:
    """A mean of 1e4 deviations: E[x²] - E[x]² in float32 would have no digit left."""
    none, some = (torch.randn(2, 4, 40, 40) * 0.5 + 5000 for _ in range(2))
    with ops.use_backend(backend):
        got = ops.guidance_rescale(row(-1.0, 2.0), [none, some], 1.0)
    oracle = by_hand((-1.0, 2.0), [none.double(), some.double()], -1, 1.0)
    torch.testing.assert_close(got.double(), oracle, rtol=1e-3, atol=0)  # the mixture is rounded to 5e-4


def test_equal_parts_give_one(backend: str) -> None:
    """Weights whose sum is 1 and one output: there is nothing to scale."""
    (e,) = images(1, (2, 4, 33, 31))
    with ops.use_backend(backend):
        got = ops.guidance_rescale(row(-6.5, 7.5), [e, e], 0.7)
        ones = ops.guidance_rescale(row(1.0), [e], 0.7)
    torch.testing.assert_close(got, torch.ones(2), rtol=1e-6, atol=0)
    assert torch.equal(ones, torch.ones(2)) and torch.equal(
        ops.guidance_rescale(row(3.0), [e], 0.0), torch.ones(2)
    )


def test_what_has_no_deviation(backend: str) -> None:
    """PyTorch's quotients: NaN stays in its image, x / 0 is infinite, 0 / 0 is NaN; so is one element."""
    none, some = images(2, (5, 2, 30, 30))
    none[1, 0, 0, 0] = math.nan
    some[2, 1, 3, 5] = math.inf
    none[3], some[3] = (0.5, -0.75) if backend == "reference" else (0.3, -0.7)  # exact sums, or any
    none[4] = 2 * some[4]  # with these weights the mixture is 0
    with ops.use_backend(backend):
        got = ops.guidance_rescale(row(-1.0, 2.0), [none, some], 0.5)
        alone = ops.guidance_rescale(row(-1.0, 2.0), [none[:1], some[:1]], 0.5)
        one = ops.guidance_rescale(row(-1.0, 2.0), [none[:, :1, 0, 0], some[:, :1, 0, 0]], 0.5)
        no_images = ops.guidance_rescale(row(1.0), [none[:0]], 0.5)
        no_elements = ops.guidance_rescale(row(1.0), [none[:, :, :0]], 0.5)
    assert torch.equal(got[:1], alone) and torch.isfinite(alone).all()
    assert got[1].isnan() and got[2].isnan() and got[3].isnan() and got[4] == math.inf
    assert one.isnan().all() and one.shape == (5,)
    assert no_images.shape == (0,) and no_elements.isnan().all() and no_elements.shape == (5,)


def test_a_table_and_a_counter(backend: str) -> None:
    outputs = images(2, (2, 3, 20, 20), torch.float16)
    table = torch.stack([row(-1.0, 2.0), row(-6.5, 7.5), row(0.0, 1.0)])
    out = torch.full((2,), math.nan)
    with ops.use_backend(backend):
        for k in range(3):
            got = ops.guidance_rescale(table, outputs, 0.7, step=torch.tensor([k]), out=out)
            assert got is out and torch.equal(got, ops.guidance_rescale(table[k].clone(), outputs, 0.7))


def test_layouts_and_mixtures_of_dtypes(backend: str) -> None:
    none, some = images(2, (3, 4, 20, 18))
    with ops.use_backend(backend):
        want = ops.guidance_rescale(row(-1.0, 2.0), [none, some], 0.7)
        last = [e.to(memory_format=torch.channels_last) for e in (none, some)]
        for outputs in (last, [last[0], some], [none.mT.contiguous().mT, some], [none.half(), some]):
            tolerance = 1e-3 if outputs[0].dtype is torch.float16 else 1e-6
            got = ops.guidance_rescale(row(-1.0, 2.0), outputs, 0.7)
            torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
        gaps = [torch.cat([e, e], dim=3)[..., ::2] for e in (none, some)]
        dense = [e.contiguous() for e in gaps]
        got = ops.guidance_rescale(row(-1.0, 2.0), gaps, 0.7)
        assert torch.equal(got, ops.guidance_rescale(row(-1.0, 2.0), dense, 0.7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise(backend: str, dtype: torch.dtype) -> None:
    """The same twice, in a batch and alone, on one thread and on three."""
    outputs = images(2, (5, 3, 67, 61), dtype)
    threads = torch.get_num_threads()

    def run(outputs: list[Tensor]) -> Tensor:
        return ops.guidance_rescale(row(-6.5, 7.5), outputs, 0.7)

    with ops.use_backend(backend):
        try:
            torch.set_num_threads(1)
            one = run(outputs)
            torch.set_num_threads(3)
            several = run(outputs)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(one, run(outputs))
        if backend != "reference":  # PyTorch promises the same call twice, and no more
            assert torch.equal(one, several)
            for k in range(5):
                assert torch.equal(run([e[k : k + 1] for e in outputs]), one[k : k + 1])


def test_gradients_go_through_the_reference() -> None:
    leaves = [torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_() for _ in range(2)]

    def f(*outputs: Tensor) -> Tensor:
        return ops.guidance_rescale(row(-1.0, 2.0), outputs, 0.7)

    assert torch.autograd.gradcheck(f, leaves)
    single = [e.detach().float().requires_grad_() for e in leaves]
    f(*single).sum().backward()
    assert single[0].grad is not None and not f(*(e.detach() for e in single)).requires_grad
    tangent = torch.func.jvp(f, tuple(e.detach() for e in leaves), tuple(e.detach() for e in leaves))[1]
    assert tangent.abs().max() < 1e-12  # of degree 0


def test_opcheck() -> None:
    none, some = images(2, (2, 3, 4, 4))
    call = (row(-1.0, 2.0), None, none, some, None, 1, 0.7, torch.empty(2))
    torch.library.opcheck(torch.ops.difusores.guidance_rescale.default, call)


def test_compiles_without_a_break(backend: str) -> None:
    outputs = images(2, (2, 3, 8, 8))

    def f() -> Tensor:
        return ops.guidance_rescale(row(-1.0, 2.0), outputs, 0.7)

    torch.compiler.reset()  # a graph keeps the backend that was in force when it was traced
    with ops.use_backend(backend):
        assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(), f())


E2 = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": torch.zeros(40)}, "row must be float64"),
        ({"row": row(1.0)[None]}, r"row must be float64 \[40\]"),
        ({"row": row(1.0).to("meta")}, "row must be on the CPU"),
        ({"model_outputs": []}, "one to three model outputs, got 0"),
        ({"model_outputs": [E2] * 4}, "one to three model outputs, got 4"),
        ({"model_outputs": [E2, E2[:1]]}, r"must be \(2, 3, 8, 8\) on cpu, got \(1, 3, 8, 8\)"),
        ({"model_outputs": [E2, E2.to("meta")]}, "got .* on meta"),
        ({"conditional": 2}, "conditional is 2; there are 2 model outputs"),
        ({"share": 1.5}, r"share is 1\.5; needed is a number from 0 to 1"),
        ({"share": math.nan}, "share is nan"),
        ({"conditional": -3}, "conditional is -3"),
        ({"out": torch.zeros(3)}, r"out must have shape \[B\] = \[2\]"),
        ({"out": torch.zeros(2, dtype=torch.float64)}, "be torch.float32 on cpu, got .* torch.float64"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"row": row(-1.0, 2.0), "model_outputs": [E2, E2], "share": 0.7, **change}
    with pytest.raises(ValueError, match=message):
        ops.guidance_rescale(**call)
