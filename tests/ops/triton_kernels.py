"""Every Triton kernel against one float64 oracle. `test_triton.py` runs this file in processes of its own.

With TRITON_INTERPRET=1 on CPU tensors, else on a GPU. In the interpreter time goes by programs and loop
iterations (about 10 ms each), so problems are small; it truncates where a GPU rounds to bf16.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import ops
from difusores.ops import dispatch
from difusores.ops.group_norm_silu import reference as group_norm_silu_reference
from difusores.ops.layer_norm import reference as layer_norm_reference
from difusores.ops.scheduler_step import DRAW, HI, LO, PX, ROW, W, philox_normal
from difusores.ops.triton import group_norm_silu as norm_kernels

linear_op: Any = importlib.import_module("difusores.ops.linear")  # the package has a function of that name
rescale_op: Any = importlib.import_module("difusores.ops.guidance_rescale")  # the same

DEVICE = "cpu" if dispatch.interpreted() else "cuda"
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "adm": ("scale", "shift"),
    "block": ("add", "residual", "return_sum"),
    "all": ("add", "residual", "return_sum", "scale", "shift"),
}


@pytest.fixture(autouse=True)
def _on_the_device() -> Any:
    with torch.device(DEVICE), ops.use_backend("triton"):
        yield


def wide(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()}


def images(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, options: tuple[str, ...], mean: float = 5.0
) -> dict[str, Any]:
    """Arguments of group_norm_silu but for the number of groups."""
    n, c = shape[:2]

    def image() -> Tensor:
        t = (torch.randn(shape) * 2 + mean).to(dtype)
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return t.to(memory_format=formats[t.ndim]) if layout == "channels_last" else t

    rows = torch.randn(n, 2 * c)  # scale and shift are the halves of one projection
    parts: dict[str, Any] = {
        "scale": rows[:, :c],
        "shift": rows[:, c:].to(dtype),
        "add": torch.randn(n, c).to(dtype),
        "residual": image(),
        "return_sum": True,
    }
    given = {"x": image(), "weight": torch.randn(c).to(dtype), "bias": torch.randn(c)}
    return given | {k: parts[k] for k in options}


def normalise(call: dict[str, Any], groups: int, silu: bool = True) -> tuple[Tensor, ...]:
    rest = {k: v for k, v in call.items() if k not in ("x", "weight", "bias")}
    out = ops.group_norm_silu(call["x"], groups, call["weight"], call["bias"], 1e-5, silu=silu, **rest)
    return out if isinstance(out, tuple) else (out,)


def by_reference(call: dict[str, Any], groups: int, silu: bool = True) -> tuple[Tensor, ...]:
    get = call.get
    both = group_norm_silu_reference(
        *(call["x"], groups, call["weight"], call["bias"], 1e-5, silu, get("scale"), get("shift")),
        *(get("add"), get("residual"), "return_sum" in call),
    )
    return both if "return_sum" in call else both[:1]


def check_norm(check: Any, call: dict[str, Any], groups: int, silu: bool = True) -> None:
    got = normalise(call, groups, silu)
    eager, oracle = by_reference(call, groups, silu), by_reference(wide(call), groups, silu)
    for ours, theirs, exact in zip(got, eager, oracle, strict=True):
        check(ours, theirs, exact)
        assert ours.stride() == theirs.stride(), "the layout comes out as it went in"


# (shape, groups, options): sizes of 1, odd ones, one group, as many as channels, tiles with and without edges
NORMS = [
    ((1, 1, 3), 1, "all"),
    ((1, 6, 17), 2, "plain"),
    ((1, 4, 1, 1), 2, "adm"),
    ((1, 7, 9, 9), 7, "block"),
    ((2, 7, 9, 9), 1, "all"),
    ((1, 8, 3, 4, 5), 4, "all"),
    ((2, 32, 8, 8), 2, "all"),
    ((1, 12, 33, 31), 2, "adm"),
    ((1, 96, 16, 16), 3, "block"),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups", "options"), NORMS, ids=str)
def test_group_norm_silu(shape: Any, groups: int, options: str, layout: str, check: Any) -> None:
    if layout == "channels_last" and len(shape) == 3:
        layout = "contiguous"  # PyTorch has no channels_last for three dimensions
    for dtype in DTYPES:
        check_norm(check, images(shape, dtype, layout, OPTIONS[options]), groups, dtype is not torch.float16)


@pytest.fixture
def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and tiles so small that a small image has many of them."""
    for name, value in {"FUSED": 256, "CHUNK": 1024, "TILE": 512, "JOINED": 4}.items():
        monkeypatch.setattr(norm_kernels, name, value)


@pytest.mark.usefixtures("cut_small")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups", "options", "dtype"),
    [
        ((1, 6, 40, 40), 1, "block", torch.float16),
        ((1, 10, 33, 31), 2, "all", torch.float32),
        ((1, 8, 32, 24), 2, "plain", torch.float32),
    ],
    ids=str,
)
def test_group_norm_silu_in_chunks(
    shape: Any, groups: int, options: str, dtype: torch.dtype, layout: str, check: Any
) -> None:
    call = images(shape, dtype, layout, OPTIONS[options])
    sizes = (shape[1], groups, math.prod(shape[2:]))
    cut = norm_kernels.cut_nchw(*sizes) if layout == "contiguous" else norm_kernels.cut_nhwc(*sizes, 2)
    assert cut.chunks > 1
    check_norm(check, call, groups)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("mean", "std"),
    [(-2300.0, 1.0), (0.0, 1e15), (0.0, 1e-18), (3.0, 0.0)],
    ids=["mean", "huge", "tiny", "constant"],
)
def test_group_norm_silu_of_hostile_values(mean: float, std: float, layout: str, check: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = images((1, 16, 16, 16), dtype, layout, ())
        call["x"] = ((call["x"].float() - 5) / 2 * std + mean).to(dtype)
        check_norm(check, call, 2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_norm_silu_bits(layout: str) -> None:
    """The same call twice, an image alone or in a batch; NaN and Inf stay in their group."""
    call = images((3, 8, 5, 5), torch.float16, layout, OPTIONS["all"])
    y, total = normalise(call, 4)
    assert all(torch.equal(a, b) for a, b in zip(normalise(call, 4), (y, total), strict=True))
    per_image = ("x", "scale", "shift", "add", "residual")
    alone = {k: v[1:2] if k in per_image else v for k, v in call.items()}
    assert all(torch.equal(a, b[1:2]) for a, b in zip(normalise(alone, 4), (y, total), strict=True))
    for value in (math.nan, math.inf, -math.inf):
        call["x"] = call["x"].clone(memory_format=torch.preserve_format)
        call["x"][1, 2, 0, 0] = value  # first in group 1 of image 1
        broken = normalise(call, 4)[0]
        assert torch.isnan(broken[1, 2:4]).all()
        broken[1, 2:4] = y[1, 2:4]
        assert torch.equal(broken, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 320), (5, 1), (1, 3, 7, 63), (0, 4), (2, 2049)], ids=str)
def test_layer_norm(shape: Any, dtype: torch.dtype, check: Any) -> None:
    x, r = (torch.randn(shape) + 3).to(dtype), torch.randn(shape).to(dtype)
    w, b = torch.randn(shape[-1]), torch.randn(shape[-1]).to(dtype)
    y, total = ops.layer_norm(x, w, b, residual=r, return_sum=True, sum_bias=w)
    if y.numel():
        eager = layer_norm_reference(x, w, b, 1e-5, r, True, w)
        oracle = layer_norm_reference(x.double(), w.double(), b.double(), 1e-5, r.double(), True, w.double())
        check(y, eager[0], oracle[0])
        check(total, eager[1], oracle[1])
    columns = torch.stack((x, x), dim=-1)[..., 0]
    assert torch.equal(ops.layer_norm(columns, w, b), ops.layer_norm(x, w, b))


@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_layer_norm_of_hostile_values(mean: float, check: Any) -> None:
    x = torch.randn(4, 320) + mean
    check(ops.layer_norm(x, None, None), F.layer_norm(x, (320,)), F.layer_norm(x.double(), (320,)))
    clean = ops.layer_norm(x, None, None)
    for value in (math.nan, math.inf):
        x[1, 7] = value
        got = ops.layer_norm(x, None, None)
        assert torch.isnan(got[1]).all()
        assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])
        assert torch.equal(ops.layer_norm(x[2], None, None), clean[2])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(2, 9, 640), (5, 2), (1, 3, 7, 126), (0, 4)], ids=str)
def test_geglu(shape: Any, approximate: str, check: Any) -> None:
    for dtype in DTYPES:
        x = (3 * torch.randn(shape)).to(dtype)
        value, gate = x.chunk(2, dim=-1)
        exact_value, exact_gate = x.double().chunk(2, dim=-1)
        got = ops.geglu(x, approximate=approximate)
        if got.numel():
            oracle = exact_value * F.gelu(exact_gate, approximate=approximate)
            check(got, value * F.gelu(gate, approximate=approximate), oracle)
        columns = torch.stack((x, x), dim=-1)[..., 0]
        assert torch.equal(ops.geglu(columns, approximate=approximate), got)


def test_geglu_of_hostile_values() -> None:
    pairs = [[1.0, math.nan], [math.nan, 1.0], [2.0, math.inf], [2.0, -1e30], [3e38, 1e-30], [1.0, 1.0]]
    got = ops.geglu(torch.tensor(pairs))[:, 0]
    assert torch.isnan(got[:2]).all() and got[2] == math.inf and got[3] == 0
    assert torch.isfinite(got[3:]).all()


# (rows, depth, width): edges of tiles in all three, a depth that no step divides, tiles in groups
LINEARS = [((3, 70), 80, 144), ((600,), 64, 64), ((1, 2, 5), 16, 16)]


@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize(("rows", "depth", "width"), LINEARS, ids=str)
def test_linear(
    rows: Any, depth: int, width: int, geglu: bool, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_op, "LEAST", 1)
    for dtype in HALF[: 2 if math.prod(rows) < 300 else 1]:
        x, weight = torch.randn(*rows, depth).to(dtype), torch.randn(width * (1 + geglu), depth).to(dtype)
        bias, residual = torch.randn(len(weight)).to(dtype), torch.randn(*rows, width).to(dtype)
        calls: list[tuple[Any, ...]] = [(x, weight, bias, residual, geglu, None)]
        calls += [(x, weight, None, None, True, None)] if geglu else []
        calls += [] if geglu else [(x, weight, bias.float(), residual, False, torch.randn(width).to(dtype))]
        results = []
        for call in calls:
            more = {"residual": call[3], "residual_bias": call[5], "geglu": geglu}
            got = ops.linear(*call[:3], **more)
            eager = linear_op.reference(*(t.to(dtype) if isinstance(t, Tensor) else t for t in call))
            exact = linear_op.reference(*(t.double() if isinstance(t, Tensor) else t for t in call))
            check(got, eager, exact)
            if not dispatch.interpreted():  # numpy gives the same bits twice
                assert torch.equal(ops.linear(*call[:3], **more), got)
            results.append(got)
        strided = torch.cat((x, x), dim=-1)[..., :depth]
        wide_residual = torch.cat((residual, residual), dim=-1)[..., width:]
        got = ops.linear(strided, weight, bias, residual=wide_residual, geglu=geglu)
        assert torch.equal(got, results[0])


@pytest.mark.parametrize("tile", [*linear_op.TILES, *linear_op.GEGLU_TILES], ids=str)
def test_linear_has_the_same_bits_in_every_tile(tile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_op, "LEAST", 1)
    geglu = tile in linear_op.GEGLU_TILES
    shapes = ((140, 96), (128 * (1 + geglu), 96), (140, 128))
    x, weight, residual = (torch.randn(s).half() for s in shapes)
    if dispatch.interpreted():  # NumPy's products sum in an order of their own: sums that are exact in any
        x, weight = (torch.randint(-4, 5, s).half() / 4 for s in shapes[:2])
    want = ops.linear(x, weight, residual=residual, geglu=geglu)
    monkeypatch.setattr(linear_op, "GEGLU_TILES" if geglu else "TILES", (tile,))
    assert torch.equal(ops.linear(x, weight, residual=residual, geglu=geglu), want)
    x[3, 5] = math.nan
    broken = ops.linear(x, weight, residual=residual, geglu=geglu)
    assert torch.isnan(broken[3]).all()
    broken[3] = want[3]
    assert torch.equal(broken, want)


def heads(b: int, h: int, length: int, d: int, dtype: torch.dtype) -> Tensor:
    """As a projection leaves them."""
    return torch.randn(b, length, h * d).to(dtype).reshape(b, length, h, d).transpose(1, 2)


# (batch, heads, queries, keys, width): every way to cut a head, keys that no block fills
ATTENTIONS = [
    ((1, 2, 33, 77, 40), torch.float16),
    ((1, 1, 16, 16, 80), torch.bfloat16),
    ((2, 1, 1, 5, 64), torch.float32),
    ((1, 1, 9, 130, 160), torch.float16),
    ((1, 1, 20, 24, 512), torch.float32),
    ((1, 2, 5, 1, 1), torch.float32),
    ((1, 1, 17, 17, 96), torch.bfloat16),
    ((0, 2, 4, 4, 8), torch.float32),
]


@pytest.mark.parametrize(("shape", "dtype"), ATTENTIONS, ids=str)
def test_attention(shape: Any, dtype: torch.dtype, check: Any) -> None:
    b, h, length, keys, d = shape
    q, k, v = heads(b, h, length, d, dtype), heads(b, h, keys, d, dtype), heads(b, h, keys, d, dtype)
    known = torch.rand(b, 1, 1, keys) > 0.3
    known[..., 0] = True
    for mask in (None, known, torch.randn(b, 1, length, keys).to(dtype)):
        got = ops.attention(q, k, v, mask=mask)
        assert got.shape == (b, h, length, d) and got.transpose(1, 2).is_contiguous()
        wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
        with ops.use_backend("reference"):
            oracle = ops.attention(q.double(), k.double(), v.double(), mask=wide_mask)
        if got.numel():
            check(got, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), oracle)


# (batch, heads, queries, keys, width of q and k, of v): heads cut in two and not, several blocks of both
GRADIENTS = [
    ((1, 2, 33, 77, 40, 40), torch.float16),
    ((1, 1, 70, 20, 64, 24), torch.bfloat16),
    ((1, 1, 9, 70, 80, 80), torch.float32),
    ((1, 1, 20, 17, 160, 160), torch.float16),
]


@pytest.mark.parametrize(("shape", "dtype"), GRADIENTS, ids=str)
def test_gradients_of_attention(shape: Any, dtype: torch.dtype, check: Any) -> None:
    b, h, length, keys, d, dv = shape
    sizes = ((length, d), (keys, d), (keys, dv), (length, dv))
    tensors = [heads(b, h, n, width, dtype) for n, width in sizes]
    known = torch.rand(b, 1, length, keys) > 0.3
    known[:, :, 3] = False  # a query without keys
    masks = {40: (None, known), 64: (torch.randn(b, 1, 1, keys).to(dtype),)}.get(d, (None,))

    def gradients(tensors: list[Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
        *leaves, grad = (t.detach().requires_grad_() for t in tensors)
        return torch.autograd.grad(ops.attention(*leaves, mask=mask), leaves, grad.detach())

    for mask in masks:
        got = gradients(tensors, mask)
        assert all(map(torch.equal, got, gradients(tensors, mask)))
        assert all(t.transpose(1, 2).is_contiguous() for t in got)
        wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
        with ops.use_backend("reference"):
            oracle = gradients([t.double() for t in tensors], wide_mask)
        with ops.use_backend("torch"):
            eager = gradients(tensors, mask)
        for ours, theirs, exact in zip(got, eager, oracle, strict=True):
            check(ours, theirs, exact)


def test_attention_of_hostile_values() -> None:
    """Scores far above what exp can take; NaN and Inf in their head alone; a width of v that is not q's."""
    q, k, v = 30 * torch.randn(1, 3, 9, 16), 30 * torch.randn(1, 3, 40, 16), torch.randn(1, 3, 40, 24)
    got = ops.attention(q, k, v)
    with ops.use_backend("reference"):
        torch.testing.assert_close(got, ops.attention(q, k, v))
    assert torch.equal(ops.attention(q[:, 1:2], k[:, 1:2], v[:, 1:2]), got[:, 1:2])
    columns = torch.stack((k, k), dim=-1)[..., 0]
    assert torch.equal(ops.attention(q, columns, v), got)
    v[0, 0, 4, 2], k[0, 1, 0, 0] = math.nan, math.inf
    broken = ops.attention(q, k, v)
    assert torch.isnan(broken[0, 0, :, 2]).all() and torch.equal(broken[0, 2], got[0, 2])
    with ops.use_backend("reference"):
        assert torch.equal(torch.isnan(broken), torch.isnan(ops.attention(q, k, v)))
    q, k, v = (torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(3))
    ours = torch.autograd.grad(ops.attention(q, k, v, scale=0.5).square().sum(), (q, k, v))
    with ops.use_backend("reference"):
        eager = torch.autograd.grad(ops.attention(q, k, v, scale=0.5).square().sum(), (q, k, v))
    torch.testing.assert_close(ours, eager)
    op = torch.ops.difusores.attention_triton.default
    torch.library.opcheck(
        op, (q.detach(), k.detach(), v.detach(), None, 0.5), test_utils=("test_schema", "test_faketensor")
    )


def row(**values: float) -> Tensor:
    """A table of two rows, of zeros but for x0 = x and the numbers given as c0 … c39."""
    table = torch.zeros(2, ROW, dtype=torch.float64)
    table[:, [PX, HI]], table[:, LO] = torch.tensor([1.0, math.inf], dtype=torch.float64), -math.inf
    for name, value in values.items():
        table[:, int(name[1:])] = value
    return table


def test_scheduler_step_says_by_nan_what_a_kernel_cannot_raise() -> None:
    """An operand that a row in device memory reads and that was not given; a counter outside the table."""
    x = torch.randn(1, 1030)
    for column, missing in ((3, True), (4, True), (8, True), (0, False), (1, False)):
        table = row(**{f"c{W + column}": 1.0})
        (y,) = ops.scheduler_step(table, x, [x], step=torch.tensor([1]))
        assert torch.isnan(y).all() if missing else torch.equal(y, x)
    for step in (-1, 2):
        y, x0 = ops.scheduler_step(row(c12=1.0), x, [x], outputs=("y", "x0"), step=torch.tensor([step]))
        assert torch.isnan(y).all() and torch.isnan(x0).all()


def test_scheduler_step_makes_the_noise_of_every_backend() -> None:
    """Every element to 1e-6 of the reference in float64, so the integers are the same."""
    shape, seeds = (3, 3, 11, 37), torch.tensor([0, 2**40 + 3, -1])
    x = torch.zeros(shape)
    table = row(**{f"c{W + 3}": 1.0, f"c{DRAW}": 4.0})
    (z,) = ops.scheduler_step(table, x, [x], seeds=seeds, step=torch.tensor([0]))
    want = philox_normal(seeds, shape, 4, torch.float64)
    assert (z.double() - want).abs().max() <= 1e-6
    (alone,) = ops.scheduler_step(table, x[1:], [x[1:]], seeds=seeds[1:], step=torch.tensor([0]))
    assert torch.equal(alone, z[1:])


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 4100), (2, 65541), (2, 1)], ids=str)
def test_guidance_rescale(shape: tuple[int, ...], check: Any) -> None:
    """A part of a block, two blocks, tiles that a second kernel joins; slices; an image alone."""
    table = row(c0=-6.5, c1=7.0, c2=0.5)
    calls = ((2, torch.float16, 1), (1, torch.float32, 0), (3, torch.bfloat16, 1))
    for count, dtype, told in calls[: 1 if shape == (2, 65541) else 3]:
        both = torch.randn(2, shape[0] * count, *shape[1:]) * 3 + 1
        outputs = list(both.to(dtype).transpose(0, 1).chunk(count))
        outputs = [e[:, k % 2] for k, e in enumerate(outputs)]
        got = ops.guidance_rescale(table, outputs, 0.7, conditional=told, step=torch.tensor([1]))
        eager = rescale_op.reference(table[1], None, outputs, told, 0.7)
        check(got, eager, rescale_op.reference(table[1], None, [e.double() for e in outputs], told, 0.7))
        if shape == (2, 3, 7, 5):
            alone = ops.guidance_rescale(table[1].cpu(), [e[-1:] for e in outputs], 0.7, conditional=told)
            assert torch.equal(alone, got[-1:])


def test_guidance_rescale_of_what_the_host_cannot_see() -> None:
    """A counter outside the table gives NaN; an output of weight 0 is not loaded."""
    told, broken = torch.randn(1, 5000) + 3e3, torch.full((1, 5000), math.nan)
    table = row(c1=2.0)
    for index, want in ((1, 0.65), (-1, math.nan), (2, math.nan)):
        got = ops.guidance_rescale(table, [broken, told], 0.7, step=torch.tensor([index]))
        torch.testing.assert_close(got, torch.tensor([want]), equal_nan=True)
    constant = ops.guidance_rescale(table[1].cpu(), [told, told * 0 + 0.3], 0.7)
    assert constant.isnan().all(), "0 / 0"


def test_what_a_kernel_does_not_take_is_refused_in_words() -> None:
    x = torch.randn(2, 8, 4, 4)
    table, rows = torch.zeros(2, ROW, dtype=torch.float64), torch.randn(16, 16).half()
    for call, words in (
        (lambda: ops.scheduler_step(table[0].cpu(), x.double(), [x]), r"not torch\.float64"),
        (lambda: ops.group_norm_silu(x.double(), 4, None, None), r"not torch\.float64"),
        (lambda: ops.group_norm_silu(x[..., ::2], 4, None, None), "contiguous and channels_last"),
        (lambda: ops.group_norm_silu(torch.randn(1, 16385, 1), 1, None, None), "at most 16384 channels"),
        (lambda: ops.layer_norm(torch.randn(1, 16385), None, None), "at most 16384 elements"),
        (lambda: ops.attention(*[torch.randn(1, 1, 2, 513)] * 3), "at most 512 elements"),
        (lambda: ops.geglu(x.double()), r"not torch\.float64"),
        (lambda: ops.guidance_rescale(table[0].cpu(), [x.double()], 0.5), r"not torch\.float64"),
        (lambda: ops.linear(x, x[0, 0], geglu=True), "takes bfloat16 and float16"),
        (lambda: ops.linear(x.half(), x[0, 0].half()), "nothing follows the product"),
        (lambda: ops.linear(x.half(), x[0, 0].half(), geglu=True), "multiples of 16, not 4 and 2"),
        (lambda: ops.linear(rows, rows, residual=rows), "16 rows of 16 are too few"),
    ):
        with pytest.raises(ops.BackendUnavailable, match=f"backend 'triton' was asked for, but .*{words}"):
            call()


def test_gradients_and_graphs() -> None:
    """A kernel's call is differentiated by the op's formula, and stays one op in a graph."""
    x, weight = torch.randn(2, 4, 3, requires_grad=True), torch.randn(4, requires_grad=True)

    def total(t: Tensor) -> Tensor:
        y = ops.group_norm_silu(t, 2, weight, None)
        assert isinstance(y, Tensor)
        z = ops.layer_norm(torch.cat([y, y], -1), None, None, residual=torch.cat([t, t], -1))
        assert isinstance(z, Tensor)
        return ops.geglu(z).square().sum()

    ours = torch.autograd.grad(total(x), (x, weight))
    with ops.use_backend("reference"):
        eager = torch.autograd.grad(total(x), (x, weight))
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), total(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_schemas(layout: str) -> None:
    call = images((1, 4, 3, 3), torch.float32, layout, OPTIONS["all"])
    kinds = ("test_schema", "test_faketensor")
    norm = (*(call["x"], 2, call["weight"], call["bias"], 1e-5, True, call["scale"], call["shift"]),)
    norm = (*norm, call["add"], call["residual"], True)
    torch.library.opcheck(torch.ops.difusores.group_norm_silu_triton.default, norm, test_utils=kinds)
    rows = torch.randn(2, 6)
    torch.library.opcheck(
        torch.ops.difusores.layer_norm_triton.default,
        (rows, None, None, 1e-5, rows + 1, True, None),
        test_utils=kinds,
    )
    torch.library.opcheck(torch.ops.difusores.geglu_triton.default, (rows, "none"), test_utils=kinds)
    halves = torch.randn(16, 16).half()
    call_of_linear = (halves, torch.randn(32, 16).half(), None, halves, True)
    torch.library.opcheck(torch.ops.difusores.linear_triton.default, call_of_linear, test_utils=kinds)
