"""Attention through tensor descriptors, against the same kernels by pointers and one float64 oracle.

`test_triton.py` runs this file in processes of its own: in Triton's interpreter, on CPU tensors, the bits are
those of the kernels by pointers; on a GPU of sm_90 or newer it runs apart from all else, because none has run
it yet and a fault there ends a process.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from difusores import ops
from difusores.ops import dispatch
from difusores.ops.triton import attention as forward
from difusores.ops.triton import attention_gradients as backward
from difusores.ops.triton import heads as cutting
from difusores.ops.triton import linear

linear_op: Any = importlib.import_module("difusores.ops.linear")  # the package has a function of that name

DEVICE = "cpu" if dispatch.interpreted() else "cuda"
if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("no CUDA device was found that has tensor descriptors", allow_module_level=True)


@pytest.fixture(autouse=True)
def _on_the_device() -> Any:
    with torch.device(DEVICE), ops.use_backend("triton_tma"):
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Called for every tensor that a kernel sees through descriptors."""
    spy = mock.Mock()
    for kernels, name in ((forward, "boxes_of"), (backward, "boxes_of"), (linear, "descriptor")):
        maker = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *call, maker=maker: (spy(), maker(*call))[1])
    return spy


def heads(b: int, h: int, length: int, d: int, dtype: torch.dtype) -> Tensor:
    """As a projection leaves them."""
    return torch.randn(b, length, h * d).to(dtype).reshape(b, length, h, d).transpose(1, 2)


def same(got: Tensor, twin: Tensor) -> bool:
    """As the kernel by pointers: to the bit where both are run one operation after another."""
    if dispatch.interpreted():
        return torch.equal(got, twin)
    return torch.allclose(got, twin, rtol=1e-2, atol=1e-2)


# (batch, heads, queries, keys, width of q and k, of v): every way to cut a head; boxes that are not filled
ATTENTIONS = [
    ((1, 2, 33, 77, 40, 40), torch.float16),
    ((1, 1, 130, 16, 80, 80), torch.bfloat16),
    ((2, 1, 1, 5, 64, 24), torch.float32),
    ((1, 1, 9, 70, 160, 96), torch.float16),
    ((1, 1, 20, 24, 512, 512), torch.float16),
    ((1, 2, 5, 1, 8, 8), torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "dtype"), ATTENTIONS, ids=str)
def test_attention(shape: Any, dtype: torch.dtype, check: Any, made: mock.Mock) -> None:
    b, h, length, keys, d, dv = shape
    q, k, v = heads(b, h, length, d, dtype), heads(b, h, keys, d, dtype), heads(b, h, keys, dv, dtype)
    known = torch.rand(b, 1, length, keys) > 0.3
    for mask in (None, known):
        with ops.use_backend("triton"):
            twin = ops.attention(q, k, v, mask=mask)
        assert not made.called
        got = ops.attention(q, k, v, mask=mask)
        assert made.call_count == 4
        made.reset_mock()
        assert same(got, twin) and got.stride() == twin.stride()
        with ops.use_backend("reference"):
            eager = ops.attention(q, k, v, mask=mask)
            check(got, eager, ops.attention(q.double(), k.double(), v.double(), mask=mask))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 2, 33, 20, 40, 40), torch.float16),
        ((2, 1, 20, 70, 64, 24), torch.bfloat16),
        ((1, 1, 9, 33, 80, 80), torch.float32),
        ((1, 1, 17, 20, 160, 160), torch.float16),
    ],
    ids=str,
)
def test_gradients(shape: Any, dtype: torch.dtype, check: Any, made: mock.Mock) -> None:
    b, h, length, keys, d, dv = shape
    sizes = ((length, d), (keys, d), (keys, dv), (length, dv))
    tensors = [heads(b, h, n, width, dtype) for n, width in sizes]
    mask = torch.rand(b, 1, length, keys) > 0.3
    mask[:, :, 3] = False  # a query without keys

    def gradients(backend: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        *leaves, grad = (t.detach().requires_grad_() for t in tensors)
        with ops.use_backend(backend):
            return torch.autograd.grad(ops.attention(*leaves, mask=mask), leaves, grad.detach())

    twins = gradients("triton", tensors)
    assert not made.called
    got = gradients("triton_tma", tensors)
    assert made.call_count == 4 + 6 + 6
    eager = gradients("reference", tensors)
    oracle = gradients("reference", [t.double() for t in tensors])
    for ours, twin, theirs, exact in zip(got, twins, eager, oracle, strict=True):
        assert same(ours, twin) and ours.stride() == twin.stride()
        check(ours, theirs, exact)


def test_what_fits_no_descriptor_goes_by_pointers(made: mock.Mock) -> None:
    """Of what an op may be given that its public function would have refused: by a graph, by autograd."""
    q, k, v = (heads(1, 2, n, 16, torch.float16) for n in (5, 7, 7))
    room = torch.empty(q.numel() + 1, dtype=q.dtype)
    unfit = {
        "an address": (room[1:].view(1, 5, 2, 16).transpose(1, 2).copy_(q), k, v),
        "a distance of rows": (q, torch.cat((k, k[..., :4]), -1)[..., :16], v),
        "a head there twice": (q, k[:, :1].expand_as(k), v),
        "rows of the result": (q, k, v[..., :12]),
    }
    for what, call in unfit.items():
        got = forward.launch(*call, None, 0.25, described=True)
        assert not made.called, what
        assert torch.equal(got, forward.launch(*call, None, 0.25)), what
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = ops.attention(*leaves)
    assert made.call_count == 4
    grad = torch.randn(1, 1, 5, 16).half().expand(1, 2, 5, 16)
    got = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    assert made.call_count == 4
    for ours, twin in zip(got, torch.autograd.grad(out, leaves, grad.contiguous()), strict=True):
        assert same(ours, twin)


@pytest.mark.parametrize("geglu", [False, True])
def test_linear(geglu: bool, check: Any, made: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges of tiles in rows, columns and depth, with what follows the product; rows that do not fit."""
    monkeypatch.setattr(linear_op, "LEAST", 1)
    dtype = torch.float16 if geglu else torch.bfloat16
    x, weight = torch.randn(3, 30, 80).to(dtype), torch.randn(80 * (1 + geglu), 80).to(dtype)
    bias, residual = torch.randn(len(weight)), torch.randn(3, 30, 80).to(dtype)
    with ops.use_backend("triton"):
        twin = ops.linear(x, weight, bias, residual=residual, geglu=geglu)
    assert not made.called
    got = ops.linear(x, weight, bias, residual=residual, geglu=geglu)
    assert made.call_count == 3 and same(got, twin)
    made.reset_mock()
    call = (x, weight, bias.to(dtype), residual, geglu)
    exact = linear_op.reference(*(t.double() if isinstance(t, Tensor) else t for t in call))
    check(got, linear_op.reference(*call), exact)
    odd = torch.cat((x, x[..., :1]), dim=-1)[..., :80]  # rows an odd number of elements apart
    apart = linear.launch(odd, weight, bias, residual, geglu, described=True)
    assert not made.called and same(apart, got)
    with pytest.raises(ops.BackendUnavailable, match=r"multiples of 16 bytes .* not x with strides"):
        ops.linear(odd, weight, bias, residual=residual, geglu=geglu)


def test_descriptors_of_a_call_are_the_same_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a graph, which keeps those of the first call, reads what later calls would."""
    monkeypatch.setattr(forward, "run", run := mock.Mock())
    q, k, v = (heads(1, 2, n, 40, torch.float16) for n in (5, 7, 7))
    found = []
    for _ in "12":
        out = forward.launch(q, k, v, None, 0.1, described=True)
        boxes = [a for a in run.call_args.args if hasattr(a, "block_shape")]
        assert [box.base.data_ptr() for box in boxes] == [t.data_ptr() for t in (q, k, v, out) for _ in "12"]
        found.append([(box.base.data_ptr(), box.shape, box.strides, box.block_shape) for box in boxes[:6]])
    assert found[0] == found[1]
    assert found[0][3] == (k.data_ptr(), [1, 2, 7, 40], [16, 40, 80, 1], [1, 1, 16, 16])


def test_a_graph_keeps_them(made: mock.Mock) -> None:
    torch.compiler.reset()
    q = heads(1, 1, 3, 16, torch.float16)
    compiled = torch.compile(lambda: ops.attention(q, q, q), fullgraph=True, backend="aot_eager")
    want = compiled()
    assert made.call_count == 4
    with ops.use_backend("reference"):
        torch.library.opcheck(
            torch.ops.difusores.attention_triton.default,
            (q, q, q, None, 0.25, True),
            test_utils=("test_schema", "test_faketensor"),
        )
    assert torch.equal(ops.attention(q, q, q), want)


LOADS = "part = box.load([batch.to(tl.int32), head.to(tl.int32), first, FROM])"
STORES = "box.store([batch.to(tl.int32), head.to(tl.int32), first, FROM], whole)"
# The next row; the first part in the place of the second; one head of every image; a tensor without a row.
FAULTS = [
    *((LOADS, "first", "first + 1"), (LOADS, "FROM", "0"), (LOADS, "batch", "head")),
    *((STORES, "first", "first + 1"), (STORES, "FROM", "0")),
    ("descriptor(t, 1, 1, rows, columns)", "t,", "t[:, :, 1:],"),
]


@pytest.mark.parametrize(("line", "right", "wrong"), FAULTS, ids=[f"{r} {w}" for _, r, w in FAULTS])
def test_a_fault_is_seen(
    line: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(cutting.__file__).read_text(encoding="utf-8")
    assert source.count(line) == 1
    file = tmp_path / "heads.py"
    file.write_text(source.replace(line, line.replace(right, wrong)), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("faulty_heads", file)
    assert spec is not None and spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    q, k, v = (heads(2, 2, n, 40, torch.float16) for n in (3, 5, 5))
    want = forward.launch(q, k, v, None, 0.1)
    assert same(forward.launch(q, k, v, None, 0.1, described=True), want)
    for name in ("rows_of", "put_rows", "boxes_of"):
        monkeypatch.setattr(forward, name, getattr(faulty, name))
    assert torch.equal(forward.launch(q, k, v, None, 0.1), want)  # by pointers nothing changed
    assert not same(forward.launch(q, k, v, None, 0.1, described=True), want)
