"""attention on every backend against one float64 oracle."""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import ops
from difusores.ops import descriptors, dispatch
from difusores.ops.attention import _backward, reference, supports

OP = "attention"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, H, L, S, D, Dv: sizes of 1, odd ones, around the kernel's blocks of queries (64) and keys (96, 128, 256);
# k and v of more than a megabyte, which blocks of queries share
CASES = [
    (2, 3, 16, 16, 8, 8),
    (1, 8, 33, 77, 40, 40),
    (2, 1, 1, 5, 64, 64),
    (1, 2, 64, 64, 160, 160),
    (0, 2, 4, 4, 8, 8),
    (1, 1, 1, 1, 1, 1),
    (2, 3, 65, 97, 33, 7),
    (1, 2, 130, 300, 40, 24),
    (1, 1, 79, 129, 5, 130),
    (1, 1, 9, 40, 512, 512),
    (1, 2, 100, 4096, 40, 40),
    (1, 1, 130, 97, 80, 80),
    (1, 2, 40, 200, 96, 128),
    (1, 1, 70, 520, 512, 512),
]


def heads(b: int, h: int, length: int, d: int, dtype: torch.dtype) -> Tensor:
    return (
        torch.randn(b, length, h * d).to(dtype).reshape(b, length, h, d).transpose(1, 2)
    )  # as a projection leaves it


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    return reference(q.double(), k.double(), v.double(), wide, scale or q.shape[3] ** -0.5)


def skip_if_refused(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """What a kernel does not take, it says, and says it again when it is asked by name."""
    reason = None if backend == "reference" else supports(backend, q, k, v, mask)
    if reason is not None:
        with ops.use_backend(backend), pytest.raises(ops.BackendUnavailable, match=re.escape(reason)):
            ops.attention(q, k, v, mask=mask)
        pytest.skip(reason)


def some_dtype(backend: str) -> torch.dtype:
    """For what does not depend on the dtype: on CUDA one that its matrix units multiply."""
    return torch.float16 if backend == "cuda" else torch.float32


def compare(backend: str, check: Any, *call: Any, scale: float | None = None) -> Tensor:
    q, k, v, mask = call
    skip_if_refused(backend, *call)
    with ops.use_backend(backend):
        got = ops.attention(q, k, v, mask=mask, scale=scale)
    wide = mask if mask is None else torch.atleast_2d(mask)  # PyTorch's takes none with fewer
    eager = F.scaled_dot_product_attention(q, k, v, attn_mask=wide, scale=scale)
    assert got.shape == eager.shape
    if got.numel():
        check(got, eager, exact(q, k, v, mask, scale))
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(backend: str, case: Any, mask: str, dtype: torch.dtype, check: Any) -> None:
    b, h, length, keys, d, dv = case
    q, k, v = heads(b, h, length, d, dtype), heads(b, h, keys, d, dtype), heads(b, h, keys, dv, dtype)
    m = None
    if mask == "bool":
        m = torch.rand(b, 1, 1, keys) > 0.3
        m[..., 0] = True
    elif mask == "additive":
        m = torch.randn(b, 1, length, keys).to(dtype)
    compare(backend, check, q, k, v, m)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [0, 77], ids=["self", "77 keys"])
@pytest.mark.parametrize(
    "size",
    [
        *((2, 8, 4096, 40), (2, 8, 1024, 80), (2, 8, 256, 160), (2, 8, 64, 160), (2, 10, 4096, 64)),
        *((2, 20, 1024, 64), (1, 1, 4096, 512), (8, 1, 256, 256), (16, 5, 9216, 64)),
    ],
    ids=str,
)
def test_at_the_sizes_of_models(backend: str, size: Any, keys: int, dtype: torch.dtype, check: Any) -> None:
    b, h, length, d = size
    with torch.device("cuda"):
        q, k, v = (heads(b, h, n, d, dtype) for n in (length, keys or length, keys or length))
    skip_if_refused(backend, q, k, v, None)
    with ops.use_backend(backend):
        got, again = ops.attention(q, k, v), ops.attention(q, k, v)
    assert torch.equal(got, again) or backend == "torch"
    if backend in ("cuda", "triton"):
        with ops.use_backend(backend):
            assert torch.equal(got[-1:], ops.attention(q[-1:], k[-1:], v[-1:]))
    got, q, k, v = (t[-1:, -1:] for t in (got, q, k, v))  # in fp64 there is room for one head
    check(got, F.scaled_dot_product_attention(q, k, v), exact(q, k, v, None))


MASKS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.tensor(0.5),
    "keys": lambda: torch.randn(77),
    "queries": lambda: torch.randn(2, 3, 70, 1),
    "bool of every head": lambda: torch.rand(2, 3, 70, 77) > 0.5,
    "bool, causal": lambda: torch.ones(70, 77, dtype=torch.bool).tril(),
    "transposed": lambda: torch.randn(2, 3, 77, 70).transpose(2, 3),
    "every other key": lambda: torch.randn(2, 1, 70, 154)[..., ::2],
    "expanded": lambda: torch.randn(1, 1, 1, 77).expand(2, 3, 70, 77),
    "minus infinity": lambda: torch.zeros(70, 77).masked_fill(torch.ones(70, 77).triu(1) > 0, -math.inf),
    "beyond fp16": lambda: torch.where(torch.rand(70, 77) > 0.5, 0.0, -3e38),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_any_shape_and_strides(backend: str, mask: str, dtype: torch.dtype, check: Any) -> None:
    q, k, v = heads(2, 3, 70, 20, dtype), heads(2, 3, 77, 20, dtype), heads(2, 3, 77, 20, dtype)
    made = MASKS[mask]()
    compare(backend, check, q, k, v, made if made.dtype is torch.bool else made.to(dtype))


def test_a_query_whose_keys_are_all_masked_gets_zeros(backend: str) -> None:
    q, k, v = (torch.randn(2, 2, 70, 16).to(some_dtype(backend)) for _ in range(3))
    mask = torch.rand(2, 1, 70, 70) > 0.5
    mask[0, :, 3], mask[1, :, 69] = False, False
    for m in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        with ops.use_backend(backend):
            out = ops.attention(q, k, v, mask=m)
        assert (out[0, :, 3] == 0).all() and (out[1, :, 69] == 0).all()
        assert torch.isfinite(out).all() and (out[0, :, 4] != 0).all()


def test_no_keys_give_zeros(backend: str) -> None:
    q = torch.randn(2, 2, 5, 8).to(some_dtype(backend))
    nothing = q[:, :, :0]
    with ops.use_backend(backend):
        assert torch.equal(ops.attention(q, nothing, nothing), torch.zeros_like(q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 300.0, 1e15])
def test_huge_and_tiny_values(backend: str, size: float, dtype: torch.dtype, check: Any) -> None:
    if dtype is torch.float16:
        size = min(max(size, 1e-4), 30.0)
    q, k, v = ((torch.randn(1, 2, 40, 24) * size).to(dtype) for _ in range(3))
    compare(backend, check, q, k, v, None)
    compare(backend, check, q, (k / size).to(dtype), v, None, scale=1.0)


@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0, 50.0])
def test_scale(backend: str, scale: float, check: Any) -> None:
    for dtype in (some_dtype(backend), torch.bfloat16):
        # enough queries that the largest error of eager's is no matter of luck
        q, k, v = (torch.randn(2, 4, 17, 16).to(dtype) for _ in range(3))
        mask = torch.randn(17, 17).to(dtype)
        for m in (None, mask, mask > 0.5):
            with ops.use_backend(backend):
                got = ops.attention(q, k, v, scale=scale, mask=m)
            wide = m.double() if m is mask else m
            oracle = reference(q.double(), k.double(), v.double(), wide, scale)
            check(got, reference(q, k, v, m, scale), oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rise", [0.1, 2.0], ids=["within reach", "beyond"])
def test_scores_that_rise_from_block_to_block(
    backend: str, rise: float, dtype: torch.dtype, check: Any
) -> None:
    """What is summed is brought to a new maximum only where that is far away; in half of the queries here."""
    q, k, v = heads(1, 2, 70, 24, dtype), heads(1, 2, 600, 24, dtype), heads(1, 2, 600, 24, dtype)
    q[..., 0], k[..., 0] = 4.0, rise * torch.linspace(-40, 40, 600)
    q[:, :, ::2, 0] = 0.0
    got = compare(backend, check, q, k, v, None)
    if backend == "cpu":
        with ops.use_backend("cpu"):
            assert torch.equal(ops.attention(q[:, :, 5:8], k, v), got[:, :, 5:8])


def strided(x: Tensor, how: str) -> Tensor:
    """x's numbers with other strides."""
    b, h, length, d = x.shape
    if how == "columns first":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "gaps":
        return torch.full((b, h, length, 2 * d), math.nan, dtype=x.dtype)[..., ::2].copy_(x)
    if how == "of one projection":
        return torch.stack([x.transpose(1, 2)] * 3, dim=2)[:, :, 1].transpose(1, 2)
    return x.new_zeros(h, b, length, d).transpose(0, 1).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["columns first", "gaps", "of one projection", "heads first"])
def test_strides_do_not_matter(backend: str, how: str, dtype: torch.dtype, check: Any) -> None:
    q, k, v = heads(2, 3, 70, 33, dtype), heads(2, 3, 77, 33, dtype), heads(2, 3, 77, 17, dtype)
    others = [strided(x, how) for x in (q, k, v)]
    assert others[0].stride() != q.stride()
    got = compare(backend, check, *others, None)
    if backend == "cpu":
        with ops.use_backend("cpu"):
            assert torch.equal(got, ops.attention(q, k, v))
            joined = got.transpose(1, 2).flatten(2)
        assert joined.data_ptr() == got.data_ptr()  # the heads are joined without a copy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_by_threads_batch_and_repetition(dtype: torch.dtype) -> None:
    """Of the kernel: PyTorch's own attention makes no such promise."""
    if dispatch.status("cpu") is not None:
        pytest.skip(dispatch.status("cpu") or "")
    q, k, v = heads(3, 2, 200, 40, dtype), heads(3, 2, 300, 40, dtype), heads(3, 2, 300, 40, dtype)
    mask = torch.randn(3, 1, 200, 300).to(dtype)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            outputs.append(ops.attention(q, k, v, mask=mask))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])
    for b in range(3):
        alone = ops.attention(*(x[b : b + 1] for x in (q, k, v)), mask=mask[b : b + 1])
        assert torch.equal(alone, outputs[0][b : b + 1])
    for rows in (slice(70, 90), slice(64, 65), slice(199, 200)):  # nor by the other queries
        part = ops.attention(q[:, 1:, rows], k[:, 1:], v[:, 1:], mask=mask[:, :, rows])
        assert torch.equal(part, outputs[0][:, 1:, rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_where_they_belong(backend: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(4, 2, 70, 16).to(dtype) for _ in range(3))
    skip_if_refused(backend, q, k, v, None)
    with ops.use_backend(backend):
        clean = ops.attention(q, k, v)
        v[0, 0, 4, 2], k[1, 1, 0, 0], q[2, 0, 5, 1] = math.nan, math.inf, math.nan
        got = ops.attention(q, k, v)
        assert torch.equal(ops.attention(q, k, v).nan_to_num(7), got.nan_to_num(7))  # the same bits twice
    assert torch.isnan(got[0, 0, :, 2]).all() and torch.isnan(got[2, 0, 5]).all()
    if backend != "torch":  # whose bf16 products spread an infinite key further
        assert torch.equal(torch.isnan(got), torch.isnan(exact(q, k, v, None)))
    assert torch.equal(got[3], clean[3]) and torch.equal(got[2, 0, 6:], clean[2, 0, 6:])


MEMORY = """
import torch
from difusores import ops
torch.set_num_threads(2)

def peak(name):
    return int(next(x for x in open("/proc/self/status") if x.startswith(name)).split()[1]) / 1024

for dtype, passes in ((torch.float32, 2), (torch.bfloat16, 1), (torch.float16, 1)):
    for grad in (False, True)[:passes]:
        small = [torch.randn(1, 1, 64, 40).to(dtype).requires_grad_(grad) for _ in range(3)]
        x = [torch.randn(1, 2, 4096, 40).to(dtype).requires_grad_(grad) for _ in range(3)]
        for tensors in (small, x):
            open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
            before = peak("VmRSS")
            with ops.use_backend("cpu"):
                out = ops.attention(*tensors)
            if grad:
                out.backward(torch.ones_like(out))
            after = peak("VmHWM") - before
        print(grad, after)
"""


@pytest.mark.skipif(dispatch.status("cpu") is not None, reason=dispatch.status("cpu") or "")
def test_peak_memory() -> None:
    """At L = 4096 all weights of 2 heads are 128 MiB; neither pass has them at once."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 4
    for grad, mebibytes in lines:
        assert float(mebibytes) < (128 if grad == "True" else 16), result.stdout


def test_gradients(backend: str) -> None:
    tensors = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with ops.use_backend("torch" if backend == "torch" else "reference"):  # the kernels take no float64
        assert torch.autograd.gradcheck(lambda q, k, v: ops.attention(q, k, v, scale=0.5), tensors)


@pytest.mark.parametrize("mask", ["none", "keys", "whole", "dead", "bool"])
def test_registered_formula(mask: str, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's backward: exactly in fp64, by the tolerance rule in fp32; in one block and in several."""
    shapes = [(2, 2, 7, 4), (2, 2, 5, 4), (2, 2, 5, 3)]
    values = [torch.randn(s, dtype=torch.float64) for s in shapes]
    of_mask = {"keys": (2, 1, 1, 5), "whole": (1, 2, 7, 5), "dead": (7, 5)}
    m = torch.randn(of_mask[mask], dtype=torch.float64) if mask in of_mask else None
    if mask == "dead":
        m = torch.randn(7, 5, dtype=torch.float64).index_fill(0, torch.tensor([3]), -math.inf)
    elif mask == "bool":
        m = torch.rand(2, 1, 7, 5) > 0.3
    grad = torch.randn(2, 2, 7, 3, dtype=torch.float64)

    def differentiate(call: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).clone().requires_grad_() for x in values]
        mask = m.to(dtype).clone().requires_grad_() if m is not None and m.is_floating_point() else m
        wanted = [*leaves, mask] if mask is not m else leaves
        out = call(*leaves, mask, 0.5)
        return list(torch.autograd.grad(out, wanted, grad.to(dtype)))

    oracle = differentiate(reference, torch.float64)
    for block in (1 << 21, 40, 1):
        monkeypatch.setattr(sys.modules[_backward.__module__], "BACKWARD_WEIGHTS", block)
        needs = (True, True, True, m is not None and m.is_floating_point())
        context = SimpleNamespace(saved_tensors=(*values, m), scale=0.5, needs_input_grad=needs)
        for formula, true in zip(_backward(context, grad), oracle, strict=False):
            torch.testing.assert_close(formula, true, rtol=1e-10, atol=1e-12)
        if dispatch.status("cpu") is None:
            ours = differentiate(torch.ops.difusores.attention.default, torch.float32)
            for got, eager, true in zip(ours, differentiate(reference, torch.float32), oracle, strict=True):
                check(got, eager, true)


def gradients(call: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Of q, k, v, for a gradient of the result that comes last."""
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    return torch.autograd.grad(call(*leaves), leaves, tensors[3])


# B, H, L, S, D, Dv: around the 32 and 64 rows of the CUDA kernels' steps; heads that they take, and not
GRADIENT_CASES = [
    (1, 2, 33, 77, 40, 40),
    (2, 1, 16, 16, 8, 8),
    (1, 2, 130, 65, 64, 64),
    (1, 1, 65, 100, 80, 72),
    (1, 1, 20, 20, 96, 96),
    (1, 1, 33, 70, 128, 120),
    (1, 1, 40, 20, 160, 160),
    (1, 1, 9, 8, 168, 168),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_against_the_oracle(backend: str, case: Any, dtype: torch.dtype, check: Any) -> None:
    b, h, length, keys, d, dv = case
    sizes = ((length, d), (keys, d), (keys, dv), (length, dv))
    tensors = [heads(b, h, n, width, dtype) for n, width in sizes]
    mask = torch.rand(b, 1, length, keys) > 0.3 if d in (40, 160) else None
    ours, eagerly = partial(ops.attention, mask=mask), partial(F.scaled_dot_product_attention, attn_mask=mask)
    with ops.use_backend(backend):
        got = gradients(ours, *tensors)
        if backend != "torch":
            assert all(map(torch.equal, got, gradients(ours, *tensors)))
    eager = gradients(eagerly, *tensors)
    oracle = gradients(eagerly, *(t.double() for t in tensors))
    for result, theirs, true in zip(got, eager, oracle, strict=True):
        check(result, theirs, true)


def test_sums_and_gradients_are_ops() -> None:
    """Their references, fakes and the gradient between them."""
    q, k, v = (heads(1, 2, n, 8, torch.float32) for n in (5, 7, 7))
    mask = torch.randn(1, 1, 5, 7)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.difusores.attention_with_sums.default, (*leaves, None, 0.3))
    out, sums = torch.ops.difusores.attention_with_sums.default(*leaves, mask, 0.3)
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    torch.testing.assert_close(sums[..., :5], scores.exp().sum(-1).log2())
    grad, *kept = (t.detach() for t in (torch.randn_like(out), q, k, v, mask, out, sums))
    torch.library.opcheck(torch.ops.difusores.attention_gradients.default, (grad, *kept, 0.3))
    got = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(reference(q, k, v, mask, 0.3), leaves, grad)
    for ours, right in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, right)


def test_a_gradient_goes_through_pytorch_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_environment", [None])
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
    assert "ScaledDotProduct" in str(ops.attention(q, k, v).grad_fn)
    if dispatch.status("cpu") is None:
        with ops.use_backend("cpu"):
            assert "difusores" in str(ops.attention(q, k, v).grad_fn)


def test_which_gradients_have_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("difusores.ops.attention")
    found = module._has_gradients
    monkeypatch.setattr(module, "_device", lambda device: (7, 65536))
    for dtype in DTYPES:
        q, wide = (torch.empty(1, 1, 8, width, dtype=dtype) for width in (128, 168))
        whole = dtype is torch.float32  # whose kernels make do with less shared memory
        assert found("cuda", q, q, None) is whole and found("triton", q, q, None) is not whole
        assert found("cuda", q[..., :96], q[..., :96], None)
        assert not found("cuda", wide, q, None) and not found("cpu", q, q, None)
        assert not found("cuda", q, q, torch.zeros(8, 8, requires_grad=True))


@pytest.mark.skipif(dispatch.status("cpu") is not None, reason=dispatch.status("cpu") or "")
def test_opcheck() -> None:
    tensors = [torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3)]
    op = torch.ops.difusores.attention.default
    torch.library.opcheck(op, (*tensors, torch.randn(1, 1, 3, 3, requires_grad=True), 0.5))
    with_bool = (*tensors, torch.ones(3, 3, dtype=torch.bool), 0.5)
    torch.library.opcheck(op, with_bool, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_a_break(backend: str) -> None:
    torch.compiler.reset()  # a graph keeps the backend that was in force when it was traced
    q, k, v = (torch.randn(1, 2, 9, 16).to(some_dtype(backend)) for _ in range(3))
    with ops.use_backend(backend):
        compiled = torch.compile(lambda: ops.attention(q, k, v), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(), ops.attention(q, k, v))


def test_the_kernel_says_what_it_does_not_take() -> None:
    q = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    if dispatch.status("cpu") is None:
        with ops.use_backend("cpu"):
            with pytest.raises(
                ops.BackendUnavailable, match=r"takes float32, bfloat16 and float16, not torch\.f"
            ):
                ops.attention(q, q, q)
            with pytest.raises(ops.BackendUnavailable, match="takes a mask of bool, float32"):
                ops.attention(q.float(), q.float(), q.float(), mask=torch.zeros(2, 2, dtype=torch.float64))
    assert ops.attention(q, q, q).dtype is torch.float64  # unasked, another backend takes it


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


def test_bad_dtypes_and_masks_are_named() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="one dtype"):
        ops.attention(q, q.half(), q)
    with pytest.raises(ValueError, match="bool or floating point"):
        ops.attention(q, q, q, mask=torch.zeros(2, 2, dtype=torch.int64))
    for shape in ((3, 2), (1, 1, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"mask must broadcast to \[B, H, L, S\] = \(1, 1, 2, 2\), got"):
            ops.attention(q, q, q, mask=torch.zeros(shape))


@pytest.mark.parametrize(
    ("generation", "keys", "width", "ours"),
    [(9, 77, 40, True), (9, 4096, 40, False), (9, 77, 64, False), (9, 77, 160, True), (8, 4096, 40, True)],
)
def test_who_is_faster(generation: int, keys: int, width: int, ours: bool, monkeypatch: Any) -> None:
    """Where nobody asks for a backend, the faster of our CUDA kernel and PyTorch's answers."""
    module = importlib.import_module("difusores.ops.attention")
    monkeypatch.setattr(module, "_device", lambda device: (generation, 232448))
    monkeypatch.setattr(module, "wanted", lambda: None)
    monkeypatch.setattr(module, "choose", lambda *call: "cuda")
    monkeypatch.setattr(module, "below_autograd", lambda op, *call: "the CUDA kernel's")
    for dtype in (torch.float16, torch.float32):
        q, k = torch.empty(1, 1, 8, width, dtype=dtype), torch.empty(1, 1, keys, width, dtype=dtype)
        got = ops.attention(q, k, k)
        assert isinstance(got, str) is (ours and dtype is torch.float16)


@pytest.mark.parametrize(
    ("generation", "sizes", "dtype", "ours"),  # sizes: queries, keys, width
    [
        *((8, (4096, 4096, 40), torch.float16, True), (8, (4096, 4096, 160), torch.bfloat16, True)),
        *((9, (4096, 4096, 40), torch.float16, False), (8, (4096, 4096, 64), torch.float16, False)),
        *((8, (512, 512, 40), torch.float16, False), (8, (4096, 4096, 40), torch.float32, False)),
        *((8, (1 << 16, 77, 160), torch.float16, True), (9, (1 << 16, 77, 160), torch.float16, False)),
    ],
)
def test_triton_where_the_compiled_module_is_absent(
    generation: int, sizes: tuple[int, int, int], dtype: torch.dtype, ours: bool, monkeypatch: Any
) -> None:
    length, keys, width = sizes
    module = importlib.import_module("difusores.ops.attention")
    monkeypatch.setattr(module, "_device", lambda device: (generation, 166912))
    monkeypatch.setattr(module, "wanted", lambda: None)
    monkeypatch.setattr(module, "choose", lambda *call: "torch")
    monkeypatch.setattr(module, "_refusal", lambda backend, device: None)
    monkeypatch.setattr(module, "below_autograd", lambda op, *call: op)
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda *call, **more: "PyTorch's")
    q, k = (torch.empty(1, 1, rows, width, dtype=dtype).expand(2, 8, -1, -1) for rows in (length, keys))
    got: Any = ops.attention(q, k, k)
    assert got is (module._TRITON_OP if ours else "PyTorch's")
    monkeypatch.setattr(module, "_refusal", lambda backend, device: "triton is not installed")
    assert ops.attention(q, k, k) == "PyTorch's"


def test_wgmma_says_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("difusores.ops.attention")
    q = torch.empty(1, 2, 8, 64, dtype=torch.float16)
    narrow = q[..., :40]
    mask = torch.zeros(8, 8)
    cases: dict[str, tuple[Any, ...]] = {
        "float16 and bfloat16, not torch.float32": (q.float(), q.float(), q.float(), None),
        "no mask": (q, q, q, mask),
        "no gradients": (q.clone().requires_grad_(), q, q, None),
        "not 40 and 40": (narrow, narrow, narrow, None),
        "not 64 and 40": (q, q, narrow, None),
        "expanded in no dimension, not k": (q, q[:, :1].expand(-1, 2, -1, -1), q, None),
        "multiples of 16 bytes": (q, q.transpose(2, 3).contiguous().transpose(2, 3), q, None),
    }
    monkeypatch.setattr(module, "_device", lambda device: (9, 232448))
    assert supports("wgmma", q, q, q, None) is None
    for words, call in cases.items():
        assert words in str(supports("wgmma", *call))
    monkeypatch.setattr(module, "_device", lambda device: (10, 232448))
    assert "a GPU of sm_90" in str(supports("wgmma", q, q, q, None))


def test_descriptors_say_what_they_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "interpreted", lambda: False)
    q = torch.empty(1, 2, 8, 40, dtype=torch.float16)
    cases: dict[str, tuple[Any, ...]] = {
        "rows of v of a multiple of 16 bytes, not 12 elements": (q, q, q[..., :12], None),
        "expanded in no dimension, not k": (q, q[:, :1].expand(-1, 2, -1, -1), q, None),
        "side by side, expanded in no dimension, not q": (q.transpose(2, 3)[..., :8], q, q, None),
        "at most 512 elements": (q, q, torch.empty(1, 2, 8, 520, dtype=q.dtype), None),
        "D of at least 1": (q[..., :0], q[..., :0], q, None),
    }
    monkeypatch.setattr(descriptors, "_generation", lambda device: 9)
    assert supports("triton_tma", q, q, q, torch.zeros(8, 8)) is None
    for words, call in cases.items():
        assert words in str(supports("triton_tma", *call))
    monkeypatch.setattr(descriptors, "_generation", lambda device: 8)
    refused = "tensor descriptors need a GPU of sm_90 or newer, this is of sm_8x"
    assert supports("triton_tma", q, q, q, None) == refused
    assert supports("triton", q, q, q, None) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
def test_wgmma_on_a_gpu() -> None:
    """In a process of its own, for a time that is limited: a wrong barrier there waits for ever."""
    if (reason := dispatch.status("wgmma")) is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(reason or "no CUDA device was found whose instructions these are")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    file = Path(__file__).with_name("wgmma_kernel.py")
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
