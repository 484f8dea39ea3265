"""Faults put into the kernels on purpose: the emulation notices each, and nothing in their absence."""

from __future__ import annotations

import math
import mmap

import emulated
import pytest
import torch
from torch import Tensor

from difusores.ops.attention import reference as attention_reference

pytestmark = [
    pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or ""),
    pytest.mark.slow,
]
Change = tuple[str, str] | None

ROW = torch.zeros(40, dtype=torch.float64)
ROW[0], ROW[4], ROW[6], ROW[7], ROW[12], ROW[14] = 1, 1, -9, 9, 0.5, 0.25  # y = x / 2 + e / 4


def step(sample: Tensor, e: Tensor, y: Tensor, change: Change) -> None:
    none = [None] * 10
    emulated.scheduler_step(ROW, None, sample, e, *none[:2], *none[:10], y, *none[:4], change=change)


def norm(x: Tensor, groups: int, change: Change) -> Tensor:
    shared = {"shared_limit": 227 << 10, "change": change}
    return emulated.group_norm_silu(x, groups, *[None] * 2, 1e-5, False, *[None] * 4, False, **shared)[0]


def caught(found: bool, change: Change) -> None:
    """The fault is noticed if there is one."""
    assert found is (change is not None)


def attend(
    length: int, keys: int, width: int, change: Change, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """The kernel's result for numbers that differ in every element, and what it should be.

    The memory behind the last key and value of each head is NaN.
    """
    memory = (torch.full((1, 2, n + 1, width), math.nan, dtype=dtype) for n in (length, keys, keys))
    q, k, v = (t[:, :, :-1].normal_() for t in memory)
    out = emulated.attention(q, k, v, None, 0.3, change=change)
    return out.double(), attention_reference(q.double(), k.double(), v.double(), None, 0.3)


BARRIERS = {
    "scheduler_step": ("__syncthreads();\n    const unsigned reads", "const unsigned reads"),
    "group_norm_silu": (
        "shared.sums[g] = total;\n    }\n    __syncthreads();",
        "shared.sums[g] = total;\n    }",
    ),
}


@pytest.mark.parametrize("op", BARRIERS)
def test_a_missing_barrier(op: str) -> None:
    """Another order of the threads gives other bits."""
    x = torch.randn(2, 8, 8, 8)  # for every warp of a block

    def run(change: Change) -> None:
        if op == "scheduler_step":
            step(x, x, torch.empty_like(x), change)
        else:
            norm(x.to(memory_format=torch.channels_last), 4, change)

    run(None)
    with pytest.raises(AssertionError, match="a barrier is missing"):
        run(BARRIERS[op])


EARLY = "cluster_barrier();  // every block's moments are there\n        "
LEAVING = "cluster_barrier();  // nobody reads them any more, and of_group is there\n"
CLUSTERS: dict[str, tuple[str, Change]] = {
    "last: nothing": ("channels_last", None),
    "last: moments too early": ("channels_last", (EARLY + "for", "for")),
    "last: a block that leaves": ("channels_last", (LEAVING, "__syncthreads();\n")),
    "first: nothing": ("contiguous", None),
    "first: moments too early": ("contiguous", (EARLY + "moments", "moments")),
}


@pytest.mark.parametrize("fault", CLUSTERS)
def test_faults_of_clusters(fault: str) -> None:
    """Moments that are read before they are there, or from a block that has ended."""
    layout, change = CLUSTERS[fault]
    x = torch.randn(1, 16, 32, 32)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    plan = emulated.GroupNormPlan()
    try:
        got, _ = emulated.group_norm_silu(
            *(x, 2, *[None] * 2, 1e-5, False, *[None] * 4, False),
            shared_limit=30 << 10,
            change=change,
            plan=plan,
        )
    except AssertionError as error:
        assert "a barrier is missing" in str(error) and "too early" in fault
        return
    except emulated.EmulationError as error:
        assert "of a block that has ended" in str(error) and "leaves" in fault
        return
    assert plan.cluster > 1
    want = torch.nn.functional.group_norm(x.double(), 2)
    caught(not torch.allclose(got.double(), want, atol=1e-5), change)


ATTENTION: dict[str, Change] = {
    "none": None,
    "an off-by-one mask": ("if (key >= keys) s", "if (key > keys) s"),
    "a key that is not there": ("row < there && (piece", "row <= there && (piece"),
    "swapped words of a fragment": (
        "a[0], a[1], b[0], b[1], k[0], k[1])",
        "a[0], a[1], b[0], b[1], k[1], k[0])",
    ),
    "a missing barrier": (
        "__syncthreads();  // this tile is there for all, and nobody reads the last one any more, whose",
        "//",
    ),
    "another tile's copies": ("copies_done<kTileStages - 2>", "copies_done<kTileStages - 1>"),
    "a rise that is not carried over": ("        total[m][half] *= factor;\n#pragma", "#pragma"),
    "wide: nothing": None,
    "wide: highest scores too early": ("__syncthreads();  // the highest scores are there", "//"),
    "wide: weights too early": ("__syncthreads();  // v and the weights are there", ""),
    "wide: the next keys too late": ("key0 + kWideKeys < keys)", "key0 + kWideKeys < keys - 16)"),
    "fp32: nothing": None,
    "fp32: weights too early": ("__syncthreads();  // v and weights are there, and nobody", "//"),
    "one group's sums": ("fmaf(at[threads], factor, total[m][half])", "total[m][half]"),
}


@pytest.mark.parametrize("fault", ATTENTION)
def test_faults_of_attention(fault: str) -> None:
    """77 keys: the last chunk is not full, and the second group of warps has the fewer keys."""
    change = ATTENTION[fault]
    try:
        dtype = torch.float32 if fault.startswith("fp32") else torch.float16
        got, right = attend(40, 77, 256 if fault.startswith("wide") else 40, change, dtype)
    except AssertionError:
        return caught(True, change)
    caught(not torch.allclose(got, right, atol=3e-3 if dtype is torch.float16 else 1e-6), change)


GRADIENTS: dict[str, Change] = {
    "nothing": None,
    "a missing barrier": (
        "__syncthreads();  // this tile is there for all, and nobody reads the last one any more\n"
        "        copy_tile(tile + 1);",
        "copy_tile(tile + 1);",
    ),
    "keys that are not there": ("s[0][n][e] = dp[0][n][e] = 0.0f", "s[0][n][e] += 0.0f"),
    "another row's delta": ("minus = of[kGradTile]", "minus = of[kGradTile + 1]"),
    "a tile's neighbour": ("shared + tile % kGradStages * kStage;\n        for", "shared;\n        for"),
    "fp32: nothing": None,
    "fp32: weights too early": ("__syncthreads();  // ds and p are there", ""),
    "fp32: the next rows too early": ("__syncthreads();  // nobody reads their1 any more", ""),
    "fp32: keys that are not there": ("column < columns ? exp2_fast", "column <= columns ? exp2_fast"),
    "fp32: a query's sum": ("row_log2[i] = log2_sums[row]", "row_log2[i] = log2_sums[row - row % 2]"),
}


@pytest.mark.parametrize("fault", GRADIENTS)
def test_faults_of_the_gradients_of_attention(fault: str) -> None:
    change = GRADIENTS[fault]
    dtype = torch.float32 if fault.startswith("fp32") else torch.float16
    q, k, v, grad = (torch.randn(1, 1, n, 40, dtype=dtype) for n in (70, 77, 77, 70))
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    right = torch.autograd.grad(attention_reference(*wide, None, 0.3), wide, grad.double())
    try:
        out, sums = emulated.attention_with_sums(q, k, v, None, 0.3, change)
        got = emulated.attention_gradients(grad, q, k, v, None, out, sums, 0.3, change=change)
    except AssertionError:
        return caught(True, change)
    atol = 1e-5 if dtype is torch.float32 else 1e-2
    near = (torch.allclose(a.double(), b, atol=atol) for a, b in zip(got, right, strict=True))
    caught(not all(near), change)


@pytest.mark.parametrize(
    "change",
    [
        None,
        (
            "__syncthreads();\n#pragma unroll\n    for (int k = 0; k < kCount; ++k) v[k] =",
            "for (int k = 0; k < kCount; ++k) v[k] =",
        ),
        ("parts + 2 * kWarp)", "parts)"),
        ("fmaf(n * d, d, of.m2[k])", "of.m2[k]"),
        ("fmaf(d * d, count * weight, squares)", "squares"),
        ("left < kRescaleTile ? left : kRescaleTile)", "left < 0 ? left : kRescaleTile)"),
        ("v[j] -= first[k];", "v[j] -= 0.0f * first[k];"),
        ("blockIdx.x % tiles * kRescaleTile", "int64_t{0}"),
    ],
    ids=str,
)
def test_of_guidance_rescale(change: Change) -> None:
    """A missing barrier, one scratch for two sums, wrong combinations, tiles of another size or place."""
    row, factor = torch.zeros(40, dtype=torch.float64), torch.empty(1)
    row[:2] = torch.tensor([-6.5, 7.5])
    e = [torch.randn(1, 65540) * torch.linspace(1, k, 65540) for k in (3, 9)]
    e = [t.cumsum(1) / 100 + 3e6 for t in e]  # tiles whose means differ; a mean far above the deviation
    try:
        emulated.guidance_rescale(row, None, *e, None, 1, 1.0, factor, change=change)
    except AssertionError:
        return caught(True, change)
    none, some = (t.double() for t in e)
    want = some.std() / (7.5 * some - 6.5 * none).std()
    caught(not bool((factor / want - 1).abs() < 1e-6), change)


@pytest.mark.parametrize("shape", [(7, 5), (4, 8)], ids=["elements", "vectors"])
@pytest.mark.parametrize("change", [None, ("k < vectors;", "k <= vectors;")], ids=str)
def test_an_off_by_one_mask(change: Change, shape: tuple[int, int]) -> None:
    """An element is written that is not the image's: of its neighbour, or beyond the last."""
    x, memory = torch.randn(2, 3, *shape), torch.zeros(3, 3, *shape)
    try:
        step(x, x, memory[:2], change)
    except AssertionError:
        return caught(True, change)
    caught(bool(memory[2].any()), change)


def two_images_far_apart(*shape: int) -> Tensor:
    """fp16 [2, *shape], 2^31 elements between them, in memory of which hardly a page is ever touched."""
    far, private = 1 << 31, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    image = torch.empty(shape, device="meta")
    memory = mmap.mmap(-1, (2 * far + image.numel()) * 2, flags=private)
    whole = torch.frombuffer(memory, dtype=torch.float16)
    return whole.as_strided((2, *shape), (far, *image.stride()), far)  # an offset gone negative meets zeros


@pytest.mark.parametrize(
    "change",
    [
        None,
        ("b * o.batch_stride + i", "static_cast<int>(b * o.batch_stride) + i"),
        ("b * args.e[0].batch_stride + i", "static_cast<int>(b * args.e[0].batch_stride) + i"),
    ],
    ids=str,
)
def test_an_overflow_of_32_bits(change: Change) -> None:
    """Of the sample, whose images then are no vectors side by side, and of what a model gave."""
    far, near = two_images_far_apart(1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.float16)
    far.fill_(2.0)
    wrong = []
    for x, e, right in ((far, near, 1.0), (near, far, 0.5)):
        y = torch.empty_like(near)
        step(x, e, y, change)
        wrong.append(bool((y != right).any()))
    caught(any(wrong), change)
    assert not all(wrong)


@pytest.mark.parametrize(
    "change",
    [
        None,
        (
            "b * args.e[k].batch_stride + begin + i",
            "static_cast<int>(b * args.e[k].batch_stride) + begin + i",
        ),
        (
            "dtype_of(k), b * args.e[k].batch_stride)",
            "dtype_of(k), static_cast<int>(b * args.e[k].batch_stride))",
        ),
    ],
    ids=str,
)
def test_an_overflow_of_32_bits_in_guidance_rescale(change: Change) -> None:
    """Of the elements, and of the first one."""
    far = two_images_far_apart(1, 4, 4).copy_(torch.randn(2, 1, 4, 4))
    far.as_strided((1,), (1,), 0).fill_(math.nan)  # where an offset gone negative leads
    row, factor = torch.zeros(40, dtype=torch.float64), torch.empty(2)
    row[0] = 2.0
    emulated.guidance_rescale(row, None, far, None, None, 0, 1.0, factor, change=change)
    caught(not torch.equal(factor, torch.full((2,), 0.5)), change)


def test_more_images_than_a_grid_is_high() -> None:
    """Each block has one where they have factors; in a grid as low as two."""
    x, none = torch.randn(5, 1, 4, 4), [None] * 10
    factor, y = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0]), torch.empty(5, 1, 4, 4)
    call = (ROW, None, x, x, *none[:5], factor, *none[:6], y, *none[:4])
    emulated.scheduler_step(*call, change=("kGridHeight = 65535", "kGridHeight = 2"))
    assert torch.equal(y, x / 2 + factor[:, None, None, None] * x / 4)


ROWS_OF = (
    "rows_of(const Heads& t) const {\n"
    "        return static_cast<const unsigned short*>(t.ptr) + batch * t.stride[0] +"
)


@pytest.mark.parametrize(
    "change",
    [None, (ROWS_OF, ROWS_OF.replace("batch * t.stride[0]", "static_cast<int>(batch * t.stride[0])"))],
)
def test_an_overflow_of_32_bits_in_attention(change: Change) -> None:
    q, k, v = (two_images_far_apart(1, 16, 40).copy_(torch.randn(2, 1, 16, 40)) for _ in range(3))
    out = emulated.attention(q, k, v, None, 0.3, change=change).double()
    right = attention_reference(q.double(), k.double(), v.double(), None, 0.3)
    caught(not torch.allclose(out, right, atol=3e-3), change)


@pytest.mark.parametrize(
    "change",
    [
        None,
        ("(row + 1) * args.columns, args.dtype", "(row + 1) * args.columns + 1, args.dtype"),
        ("const int64_t row = row0 + rows", "const int64_t row = row0"),
    ],
    ids=str,
)
def test_of_geglu(change: Change) -> None:
    """A gate beside its own, a block that stays in its first row."""
    x = torch.randn(41, 2 * 63)[:40]
    mutant = emulated.geglu(x, "none", change=change)
    caught(not torch.equal(mutant, emulated.geglu(x, "none")), change)


@pytest.mark.parametrize(
    "change",
    [
        None,
        ("other >= lanes", "other > lanes"),
        ("fmaf(-both.x, delta, both.y)", "both.y"),
        ("lanes, parts + most_lanes(kVec) / kWarp)", "lanes, parts)"),
    ],
    ids=str,
)
def test_of_layer_norm(change: Change) -> None:
    """Sums over a neighbour's row, a mean not corrected, one scratch for two sums."""
    x = torch.cat((torch.randn(6, 96) + 1e5, torch.zeros(1, 96)))[:6]  # several rows in a warp
    wide = torch.randn(3, 1280) * torch.arange(1.0, 4.0)[:, None]
    try:
        narrow = emulated.layer_norm(x, None, None, 1e-5, None, False, change=change)[0]
        got = emulated.layer_norm(wide, None, None, 1e-5, None, False, change=change)[0]
    except AssertionError:
        return caught(True, change)
    exact = [torch.nn.functional.layer_norm(t.double(), t.shape[1:]) for t in (x, wide)]
    errors = [(a - b).abs().max() for a, b in zip((narrow, got), exact, strict=True)]
    caught(bool(errors[0] > 2e-5 or errors[1] > 1e-5), change)


@pytest.mark.parametrize(
    "change",
    [
        None,
        ("params<kVec>(args.bias, 0, c,", "params<kVec>(args.bias, 0, c ^ 8,"),
        ("params<kVec>(args.add, n, c,", "params<kVec>(args.add, 0, c,"),
    ],
    ids=str,
)
def test_of_bias_residual(change: Change) -> None:
    """A neighbour's channels, the first image's time embedding."""
    x = torch.randn(2, 16, 5, 3).to(memory_format=torch.channels_last)
    bias, add = torch.randn(16), torch.randn(2, 16)
    got = emulated.bias_residual(x, bias, add, None, 1.0, change=change)
    want = x + bias[:, None, None] + add[:, :, None, None]
    caught(not torch.allclose(got, want, atol=1e-6), change)


@pytest.mark.parametrize(
    "change",
    [
        None,
        ("fmaf(-rest, total.x, total.y)", "fmaf(0.0f * rest, total.x, total.y)"),
        (
            "        __syncthreads();\n        for (int c = threadIdx.x; c < tile.width",
            "        for (int c = threadIdx.x; c < tile.width",
        ),
        ("        __syncthreads();\n    };\n    join(first", "    };\n    join(first"),
        ("n < args.n; ++n", "n < args.n - 1; ++n"),
        ("k < chunks; k += kWarp", "k < chunks - 1; k += kWarp"),
    ],
    ids=str,
)
def test_of_the_gradients_of_group_norm(change: Change) -> None:
    """A mean that fp32 cannot hold, missing barriers, an image or a tile that is left out."""
    x = (torch.randn(2, 8, 16, 16) / 64 + 1e3).to(memory_format=torch.channels_last)
    weight, grad = torch.randn(8), torch.randn_like(x)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    y = torch.nn.functional.group_norm(leaves[0], 2, leaves[1])
    exact = torch.autograd.grad(y, leaves, grad.double())
    try:
        got = emulated.group_norm_silu_backward(
            *(grad, None, x, 2, weight, None, 1e-5, False, None, None, None, None), change=change
        )
    except AssertionError:
        return caught(True, change)
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got[:2], exact, strict=True)]
    caught(not max(errors) < 1e-3, change)  # PyTorch's in fp32 are off by several times their size
