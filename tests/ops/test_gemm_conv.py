"""gemm_conv on every backend against one float64 oracle."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import native, ops
from difusores.ops.gemm_conv import (
    NEEDS_PAIRS,
    NEEDS_SPLIT,
    gemm_rows,
    multiplies_pairs,
    pack_reference,
    pack_rows,
    pack_weight,
    packed_numbers,
    splits,
)

OP = "gemm_conv"
PACK = torch.ops.difusores.gemm_conv_pack.default
DTYPES = (torch.float32, torch.bfloat16)

# (N, C, O, H, W), kernel, stride, padding: tails of every dimension, one and several panels, blocks and runs
CASES = [
    ((1, 1, 1, 1, 1), (1, 1), (1, 1), (0, 0)),
    ((2, 7, 17, 5, 1), (1, 1), (1, 1), (0, 0)),
    ((1, 255, 129, 401, 1), (1, 1), (1, 1), (0, 0)),
    ((3, 3, 20, 6, 7), (3, 3), (1, 1), (1, 1)),
    ((2, 33, 70, 9, 8), (3, 3), (2, 2), (1, 1)),
    ((1, 130, 16, 4, 5), (3, 3), (2, 1), (0, 1)),
    ((2, 4, 65, 7, 5), (2, 3), (1, 2), (1, 0)),
    ((1, 20, 33, 3, 3), (1, 1), (2, 2), (0, 0)),
    ((1, 1290, 80, 9, 2), (1, 1), (1, 1), (0, 0)),
    ((2, 70, 33, 5, 16), (3, 3), (1, 1), (1, 1)),  # from here on rows of the output are whole tiles
    ((1, 32, 32, 3, 64), (3, 3), (2, 2), (1, 1)),
    ((1, 64, 40, 8, 4), (1, 1), (1, 1), (0, 0)),  # x is read as it is
    ((2, 64, 70, 37, 1), (1, 1), (1, 1), (0, 0)),  # and its last tile begins earlier
    ((1, 672, 64, 530, 1), (1, 1), (1, 1), (0, 0)),  # two runs of tiles, two chunks of the depth
]


def make(
    case: Any, layout: str = "channels_last", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
    (n, c, o, h, w), kernel, stride, padding = case

    def image(*shape: int) -> Tensor:
        t = torch.randn(shape).to(dtype)
        return t.to(memory_format=torch.channels_last) if layout == "channels_last" else t

    weight = (torch.randn(o, c, *kernel) / (c * math.prod(kernel)) ** 0.5).to(dtype)
    bias = torch.randn(o).to(dtype)
    sizes = [(s + 2 * padding[d] - kernel[d]) // stride[d] + 1 for d, s in enumerate((h, w))]
    return image(n, c, h, w), weight, bias, image(n, o, *sizes), {"stride": stride, "padding": padding}


def needs(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype is torch.bfloat16 and not multiplies_pairs():
        pytest.skip(NEEDS_PAIRS)


FORMS = {  # name -> pairs, geglu, split
    "float32": (False, False, False),
    "float32 geglu": (False, True, False),
    "pairs": (True, False, False),
    "pairs geglu": (True, True, False),
    "split": (True, False, True),
    "split geglu": (True, True, True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_packing(layout: str, dtype: torch.dtype, form: str) -> None:
    """Bit by bit what the reference packs, subnormal and infinite numbers too; NaN stays NaN."""
    pairs, geglu, split = FORMS[form]
    shapes = [(96, 7, 1, 1), (64, 320, 1, 1), (160, 70, 3, 3), (1, 1, 1, 1), (17, 33, 2, 3), (129, 255, 1, 1)]
    for shape in shapes:
        if (geglu and shape[0] % 32) or (split and shape[2:] != (1, 1)):
            continue
        weight = torch.randn(shape).to(dtype)
        odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-39, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8])
        weight.view(-1)[: len(odd)] = odd[: weight.numel()].to(dtype)
        if layout == "channels_last":
            weight = weight.to(memory_format=torch.channels_last)
        elif layout == "transposed":
            weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
        packed, expected = PACK([weight], pairs, geglu, split), pack_reference([weight], pairs, geglu, split)
        assert packed.dtype is expected.dtype and packed.shape == expected.shape
        assert torch.equal(packed.isnan(), expected.isnan())
        assert torch.equal(packed.nan_to_num(7).view(torch.int16), expected.nan_to_num(7).view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_rows_of_several_layers(dtype: torch.dtype) -> None:
    weights = [torch.randn(o, 70).to(dtype) for o in (5, 33, 64)]
    weights.append(torch.randn(70, 20).to(dtype).t())
    assert torch.equal(pack_rows(weights), pack_weight(torch.cat(weights)[:, :, None, None], dtype))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(backend: str, case: Any, dtype: torch.dtype, layout: str, check: Any) -> None:
    needs(backend, dtype)
    x, weight, bias, residual, geometry = make(case, layout, dtype)
    eager = F.conv2d(x, weight, **geometry)
    oracle = F.conv2d(x.double(), weight.double(), **geometry)
    packed = pack_weight(weight, dtype)
    assert packed.shape == (packed_numbers(weight, dtype),) and packed.dtype is dtype
    with ops.use_backend(backend):
        plain = ops.gemm_conv(x, weight, **geometry)
        y = ops.gemm_conv(x, weight, bias, residual=residual, packed=packed, **geometry)
        assert torch.equal(ops.gemm_conv(x, weight, bias, residual=residual, **geometry), y)
    assert y.is_contiguous(memory_format=torch.channels_last)
    check(plain, eager, oracle)
    eager = F.conv2d(x, weight, bias, **geometry) + residual
    check(y, eager, oracle + bias.double()[:, None, None] + residual.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 64), (2, 37, 64), (2, 3, 5, 70), (70,), (0, 3, 64)], ids=str)
def test_rows(backend: str, dtype: torch.dtype, shape: tuple[int, ...], check: Any) -> None:
    """A linear layer on rows as they lie: the bits of the same rows as an image of one column."""
    needs(backend, dtype)
    x, weight = torch.randn(shape).to(dtype), (torch.randn(96, shape[-1]) / shape[-1] ** 0.5).to(dtype)
    bias, residual, half = (
        torch.randn(*n, 96)[..., :m].to(dtype) for n, m in (((), 96), (shape[:-1], 96), (shape[:-1], 48))
    )
    kernel = weight[:, :, None, None]
    packed, of_gates = pack_weight(kernel, dtype), pack_weight(kernel, dtype, geglu=True)
    with ops.use_backend(backend):
        y = gemm_rows(x, weight, bias, residual=residual, packed=packed)
        z = gemm_rows(x, weight, bias, residual=half, packed=of_gates, geglu=True)
        assert torch.equal(gemm_rows(x, kernel, bias, residual=residual, packed=packed), y)
        if x.numel():
            columns = [t.reshape(-1, t.shape[-1]).contiguous().t()[None, :, :, None] for t in (x, residual)]
            image = ops.gemm_conv(columns[0], kernel, bias, residual=columns[1], packed=packed)
            assert torch.equal(image[0, :, :, 0].t().reshape(y.shape), y)
            assert torch.equal(gemm_rows(x, weight, bias, residual=half, geglu=True), z)
    assert y.is_contiguous() and z.is_contiguous()
    assert y.shape == (*shape[:-1], 96) and z.shape == (*shape[:-1], 48)
    if x.numel():
        eager, wide = F.linear(x, weight, bias), F.linear(*(t.double() for t in (x, weight, bias)))
        check(y, eager + residual, wide + residual.double())
        gates, exact = (t[..., :48] * F.gelu(t[..., 48:]) for t in (eager, wide))
        check(z, gates + half, exact + half.double())


def gated(conv: Tensor, residual: Tensor) -> Tensor:
    value, gate = conv.chunk(2, dim=1)
    return value * F.gelu(gate) + residual


# panels of two vectors and of four, several chunks of the depth, tails of rows
GATED = [
    ((2, 7, 32, 5, 1), (1, 1)),
    ((1, 1300, 160, 13, 1), (1, 1)),
    ((1, 5, 64, 4, 3), (3, 3)),
    ((2, 64, 64, 37, 1), (1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATED, ids=str)
def test_geglu(backend: str, case: Any, dtype: torch.dtype, check: Any) -> None:
    """Against the oracle; in float32 the bits of a product and of GEGLU after it."""
    needs(backend, dtype)
    sizes, kernel = case
    padding = (kernel[0] // 2, kernel[1] // 2)
    x, weight, bias, residual, geometry = make((sizes, kernel, (1, 1), padding), dtype=dtype)
    residual = residual[:, : sizes[2] // 2].contiguous(memory_format=torch.channels_last)
    packed = pack_weight(weight, dtype, geglu=True)
    with ops.use_backend(backend):
        y = ops.gemm_conv(x, weight, bias, residual=residual, packed=packed, geglu=True, **geometry)
        product = ops.gemm_conv(x, weight, bias, **geometry).permute(0, 2, 3, 1)
        apart = ops.geglu(product).permute(0, 3, 1, 2) + residual
        assert torch.equal(ops.gemm_conv(x, weight, bias, residual=residual, geglu=True, **geometry), y)
        few, some = x[:1, :, : kernel[0] // 2 + 1], residual[:1, :, : kernel[0] // 2 + 1]
        alone = ops.gemm_conv(few, weight, bias, residual=some, packed=packed, geglu=True, **geometry)
    if dtype is torch.float32 or backend == "reference":
        assert torch.equal(y, apart)
    if backend == "cpu":  # a row of pixels by itself, summed over several chunks of the depth
        assert torch.equal(alone[:, :, :1], y[:1, :, :1])
    eager = gated(F.conv2d(x, weight, bias, **geometry), residual)
    wide = F.conv2d(x.double(), weight.double(), bias.double(), **geometry)
    check(y, eager, gated(wide, residual.double()))


def test_geglu_that_the_kernel_refuses(backend: str, check: Any) -> None:
    """Channels that do not fill vectors go to the reference; a kernel by name says why not."""
    for dtype in DTYPES:
        x, weight, bias, _, geometry = make(((1, 4, 12, 3, 1), (1, 1), (1, 1), (0, 0)), dtype=dtype)
        y = ops.gemm_conv(x, weight, bias, geglu=True, **geometry)
        wide = F.conv2d(x.double(), weight.double(), bias.double(), **geometry)
        check(y, gated(F.conv2d(x, weight, bias, **geometry), x[:, :1] * 0), gated(wide, torch.zeros(1)))
        if backend == "cpu":
            with (
                ops.use_backend(backend),
                pytest.raises(ops.BackendUnavailable, match=f"of 32 channels|{NEEDS_PAIRS}"),
            ):
                ops.gemm_conv(x, weight, bias, geglu=True, **geometry)


needs_split = pytest.mark.skipif(not splits(), reason=NEEDS_SPLIT)

# (rows, C, O): one row, tails of everything, several runs, chunks and blocks of the depth
SPLIT = [(1, 1, 1), (77, 40, 70), (49, 350, 33), (331, 1300, 96), (700, 64, 416), (1500, 320, 64)]


def split_call(x: Tensor, weight: Tensor, bias: Tensor | None = None, **terms: Any) -> Tensor:
    """By pairs of bfloat16, [rows, C] to [rows, O]."""
    kernel = weight[:, :, None, None]
    packed = pack_weight(kernel, geglu=terms.get("geglu", False), split=True)
    assert packed.shape == (packed_numbers(kernel, split=True),) and packed.dtype is torch.bfloat16
    if "residual" in terms:
        terms["residual"] = terms["residual"].t()[None, :, :, None]
    with ops.use_backend("cpu"):
        return ops.gemm_conv(x.t()[None, :, :, None], kernel, bias, packed=packed, **terms)[0, :, :, 0].t()


def distance(y: Tensor, oracle: Tensor) -> float:
    return float((y.double() - oracle).norm() / oracle.norm())


@needs_split
@pytest.mark.parametrize("rows,c,o", SPLIT)
def test_split(rows: int, c: int, o: int) -> None:
    """Within 1e-5 of float64 in relative L2, and each output within 3 * 2^-16 of its products' sizes."""
    x, weight, bias = torch.randn(rows, c), torch.randn(o, c) / c**0.5, torch.randn(o)
    activations = F.silu(x + 1) + 0.3 * torch.randn(c)  # not centred, of one sign in a channel, outliers
    activations[:, :: max(c // 3, 1)] *= 100
    for given in (x, activations):
        oracle = given.double() @ weight.double().t()
        y = split_call(given, weight)
        sizes = given.double().abs() @ weight.double().abs().t()
        assert ((y - oracle).abs() <= 3 * 2**-16 * sizes).all()
        assert rows * o < 100 or distance(y, oracle) <= 1e-5
        residual = torch.randn(rows, o)
        y = split_call(given, weight, bias, residual=residual)
        assert ((y - (oracle + bias + residual)).abs() <= 3 * 2**-16 * (sizes + 3)).all()
        assert torch.equal(split_call(given, weight, bias) + residual, y)
        if o % 32 == 0:
            y = split_call(given, weight, bias, residual=residual[:, : o // 2], geglu=True)
            together = split_call(given, weight, bias)
            assert torch.equal(y, ops.geglu(together) + residual[:, : o // 2])


@needs_split
def test_split_extremes() -> None:
    x, weight = torch.randn(40, 96), torch.randn(64, 96)
    for scale in (1e33, 1e-30):
        assert distance(split_call(x * scale, weight), (x * scale).double() @ weight.double().t()) <= 1e-5
    x[3] = 0
    x[3, 50] = 3.38e38
    oracle = x.double() @ weight.double().t()
    fits = oracle[3].abs() < 3.4e38
    assert 0 < fits.sum() < 64
    assert distance(split_call(x, weight)[3, fits] / 1e38, oracle[3, fits] / 1e38) <= 1e-5
    x[3], x[7, 2], x[9, 0], x[30, 95] = 0, math.inf, math.nan, -math.inf
    y = split_call(x, weight)
    broken = torch.tensor([7, 9, 30])
    assert not torch.isfinite(y[broken]).any()
    y[broken] = 0
    assert torch.isfinite(y).all() and (y[3] == 0).all()


@needs_split
@pytest.mark.parametrize("rows,c,o", SPLIT[2:])
def test_split_bits(rows: int, c: int, o: int) -> None:
    """Twice; a row alone or among others; one thread or several."""
    x, weight, bias = torch.randn(rows, c), torch.randn(o, c), torch.randn(o)
    y = split_call(x, weight, bias)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(split_call(x, weight, bias), y)
        for begin, end in ((0, 1), (17, 40), (rows - 3, rows)):
            assert torch.equal(split_call(x[begin:end], weight, bias), y[begin:end])
    finally:
        torch.set_num_threads(threads)


def test_split_where_it_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference answers, a kernel asked for by name says why not; only 1x1 convolutions in float32."""
    x, weight, _, _, _ = make(CASES[1])
    packed = pack_weight(weight, split=True)
    for wrong in (torch.bfloat16, torch.float32):
        with pytest.raises(ValueError, match="split is for a weight"):
            pack_weight(weight.repeat(1, 1, 1, 1 + (wrong is torch.float32)), wrong, split=True)
    with pytest.raises(ValueError, match="packed must be"):
        ops.gemm_conv(x, weight, packed=packed, padding=(1, 1))
    module = importlib.import_module("difusores.ops.gemm_conv")
    monkeypatch.setattr(module, "splits", lambda: False)
    monkeypatch.setattr(module, "straight_to_cpu", lambda *tensors: False)
    assert torch.equal(ops.gemm_conv(x, weight, packed=packed), F.conv2d(x, weight))
    with pytest.raises(ops.BackendUnavailable, match=f"{NEEDS_SPLIT}|DIFUSORES"), ops.use_backend("cpu"):
        ops.gemm_conv(x, weight, packed=packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_with_a_norm_before_it(backend: str, case: Any, dtype: torch.dtype, check: Any) -> None:
    needs(backend, dtype)
    x, weight, bias, residual, geometry = make(case, dtype=dtype)
    (n, c), o = x.shape[:2], weight.shape[0]
    multiplier, offset, add = torch.randn(n, c), torch.randn(n, c), torch.randn(n, o).to(dtype)

    def plain(dtype: torch.dtype, silu: bool) -> Tensor:
        h = multiplier.to(dtype)[:, :, None, None] * x.to(dtype) + offset.to(dtype)[:, :, None, None]
        y = F.conv2d(F.silu(h) if silu else h, weight.to(dtype), bias.to(dtype), **geometry)
        return y + add.to(dtype)[:, :, None, None] + residual.to(dtype)

    for silu in (False, True):
        terms = {"multiplier": multiplier, "offset": offset, "silu": silu, "add": add, "residual": residual}
        with ops.use_backend(backend):
            y = ops.gemm_conv(x, weight, bias, **terms, **geometry)
            assert torch.equal(
                ops.gemm_conv(x, weight, bias, packed=pack_weight(weight, dtype), **terms, **geometry), y
            )
        check(y, plain(dtype, silu), plain(torch.float64, silu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES[2:6], CASES[9], CASES[12]], ids=str)
def test_bitwise(backend: str, case: Any, dtype: torch.dtype) -> None:
    """Twice; an image alone or among others; one thread or several; a NaN stays where it is read."""
    needs(backend, dtype)
    x, weight, bias, _, geometry = make(case, dtype=dtype)
    x = torch.cat([x, *(torch.randn_like(x) for _ in range(2))]).contiguous(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    try:
        with ops.use_backend(backend):
            torch.set_num_threads(1)
            y = ops.gemm_conv(x, weight, bias, **geometry)
            assert torch.equal(ops.gemm_conv(x, weight, bias, **geometry), y)
            if backend == "cpu":  # what libraries do not promise
                torch.set_num_threads(3)
                assert torch.equal(ops.gemm_conv(x, weight, bias, **geometry), y)
                alone = [ops.gemm_conv(x[i : i + 1], weight, bias, **geometry) for i in range(len(x))]
                assert torch.equal(torch.cat(alone), y)
            x[1, :, 0, 0] = math.nan
            broken = ops.gemm_conv(x, weight, bias, **geometry)
    finally:
        torch.set_num_threads(threads)
    assert torch.isnan(broken[1, :, 0, 0]).all()
    assert torch.equal(broken[[0, 2]], y[[0, 2]]) and torch.equal(broken[1, :, -1, -1], y[1, :, -1, -1])


# Large enough that a task takes a band of rows: rows that are whole tiles and that are not, a stride, kernels
BANDS = [
    ((2, 1290, 33, 21, 23), (3, 3), (1, 1), (1, 1)),
    ((1, 1290, 33, 30, 16), (3, 3), (1, 1), (1, 1)),
    ((1, 1290, 20, 31, 33), (3, 3), (2, 2), (1, 1)),
    ((1, 1290, 8, 29, 32), (5, 5), (1, 2), (2, 2)),
    ((2, 1290, 20, 19, 31), (1, 1), (1, 1), (0, 0)),
]


@pytest.mark.parametrize("case", BANDS, ids=str)
def test_bands(backend: str, case: Any, check: Any) -> None:
    """bf16: bands as tall as few threads want them, down to one row; an image alone; what is not finite."""
    needs(backend, torch.bfloat16)
    x, weight, bias, residual, geometry = make(case, dtype=torch.bfloat16)
    multiplier, offset = torch.randn(2, *x.shape[:2])
    h = F.silu(multiplier[:, :, None, None] * x + offset[:, :, None, None])
    terms = {"multiplier": multiplier, "offset": offset, "silu": True, "residual": residual}
    packed = pack_weight(weight, torch.bfloat16)
    threads = torch.get_num_threads()

    def run(x: Tensor, **terms: Any) -> Tensor:
        return ops.gemm_conv(x, weight, bias, packed=packed, **terms, **geometry)

    with ops.use_backend(backend):
        y = run(x, **terms)
        try:
            for count in (1, 2, 5, 40) if backend == "cpu" else ():
                torch.set_num_threads(count)
                assert torch.equal(run(x, **terms), y)
        finally:
            torch.set_num_threads(threads)
        last = {name: t if name == "silu" else t[-1:] for name, t in terms.items()}
        if backend == "cpu":
            assert torch.equal(run(x[-1:], **last), y[-1:])
            plain = run(x)
            x[-1, 3, 9, 11] = math.nan
            x[-1, 5, 12, 2] = math.inf
            broken = run(x)
            finite = F.conv2d(x.float(), weight.float(), **geometry).isfinite()
            assert not finite.all() and torch.equal(broken.isfinite(), finite)
            assert torch.equal(broken[finite], plain[finite])
    eager = F.conv2d(h.bfloat16(), weight, bias, **geometry) + residual
    check(y, eager, F.conv2d(h.double(), weight.double(), bias.double(), **geometry) + residual.double())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rounded(backend: str, case: Any, check: Any) -> None:
    """An image in float32 by a weight packed for bfloat16: of numbers that rounding leaves, as in float32."""
    needs(backend, torch.bfloat16)
    x, weight, bias, residual, geometry = make(case)
    weight, add = weight.bfloat16().float(), torch.randn(x.shape[0], weight.shape[0])
    packed, even = pack_weight(weight, torch.bfloat16), x.bfloat16().float()
    multiplier, offset = torch.randn(2, *x.shape[:2])
    norm = {"multiplier": multiplier, "offset": offset, "silu": True}
    terms = {"add": add, "residual": residual}
    with ops.use_backend(backend):
        y = ops.gemm_conv(even, weight, bias, **terms, packed=packed, **geometry)
        z = ops.gemm_conv(x, weight, bias, **norm, **terms, packed=packed, **geometry)
        last = {name: t if name == "silu" else t[-1:] for name, t in {**norm, **terms}.items()}
        alone = ops.gemm_conv(x[-1:], weight, bias, **last, packed=packed, **geometry)
    assert y.dtype is z.dtype is torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
    if backend == "cpu":
        assert torch.equal(alone, z[-1:])
    exact = F.conv2d(even.double(), weight.double(), bias.double(), **geometry)
    after = add.double()[:, :, None, None] + residual.double()
    check(y, F.conv2d(even, weight, bias, **geometry) + after.float(), exact + after)
    h = F.silu(multiplier[:, :, None, None].double() * x + offset[:, :, None, None])
    eager = F.conv2d(h.bfloat16(), weight.bfloat16(), bias.bfloat16(), **geometry)
    exact = F.conv2d(h, weight.double(), bias.double(), **geometry)
    check(z, eager + after.float(), exact + after)


def test_rounded_geglu(backend: str, check: Any) -> None:
    needs(backend, torch.bfloat16)
    x, weight, bias, residual, geometry = make(((2, 70, 96, 5, 4), (3, 3), (1, 1), (1, 1)))
    x, weight = x.bfloat16().float(), weight.bfloat16().float()
    residual, packed = residual[:, :48], pack_weight(weight, torch.bfloat16, geglu=True)
    with ops.use_backend(backend):
        y = ops.gemm_conv(x, weight, bias, residual=residual, packed=packed, geglu=True, **geometry)
    wide = gated(F.conv2d(x.double(), weight.double(), bias.double(), **geometry), residual.double())
    halves = (t.bfloat16() for t in (x, weight, bias))  # the kernel's GELU is right to what bfloat16 keeps
    check(y, gated(F.conv2d(*halves, **geometry), residual), wide)


def test_registration(backend: str) -> None:
    x, weight, bias, residual, geometry = make(CASES[4])
    op = torch.ops.difusores.gemm_conv.default
    torch.library.opcheck(
        op, (x, weight, bias, None, None, False, None, residual, 2, 2, 1, 1, pack_weight(weight))
    )
    for pairs, geglu, split in FORMS.values():
        torch.library.opcheck(PACK, ([torch.randn(32, 33, 1, 1)] * 2, pairs, geglu, split))
    if splits():
        kernel = torch.randn(33, 40, 1, 1)
        given = torch.randn(2, 40, 3, 3).contiguous(memory_format=torch.channels_last)
        call = (
            given,
            kernel,
            None,
            None,
            None,
            False,
            None,
            None,
            1,
            1,
            0,
            0,
            pack_weight(kernel, split=True),
        )
        torch.library.opcheck(op, call)
    rows, linear = torch.randn(2, 5, 33), weight[:, :, 0, 0]
    packed = pack_weight(linear[:, :, None, None])
    torch.library.opcheck(
        op,
        (rows, linear, bias, None, None, False, None, None, 1, 1, 0, 0, packed),
        test_utils=("test_faketensor",),
    )
    torch.compiler.reset()  # a graph keeps the backend that was in force when it was traced

    def f(x: Tensor) -> Tensor:
        return ops.gemm_conv(x, weight, bias, residual=residual, **geometry)

    with ops.use_backend(backend):
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_gradients() -> None:
    *tensors, geometry = make(CASES[6])
    terms = [torch.randn(2, channels) for channels in (4, 4, 65)]
    leaves = [t.double().requires_grad_() for t in (*tensors, *terms)]

    def f(
        x: Tensor, w: Tensor, b: Tensor, r: Tensor, multiplier: Tensor, offset: Tensor, add: Tensor
    ) -> Tensor:
        norm = {"multiplier": multiplier, "offset": offset, "silu": True, "add": add}
        return ops.gemm_conv(x, w, b, residual=r, **norm, **geometry)

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    x, weight, bias = (t.double().requires_grad_() for t in (tensors[0], tensors[1][:6], tensors[2][:6]))
    assert torch.autograd.gradcheck(lambda *t: ops.gemm_conv(*t, geglu=True, **geometry), (x, weight, bias))


def test_bad_input_is_named() -> None:
    x, weight, bias, residual, geometry = make(CASES[3])
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\]"):
        ops.gemm_conv(x[:, :2], weight)
    with pytest.raises(ValueError, match=r"bias must have shape \[O\] = \[20\]"):
        ops.gemm_conv(x, weight, bias[:3])
    with pytest.raises(ValueError, match="residual must have y's shape"):
        ops.gemm_conv(x, weight, residual=residual)
    with pytest.raises(ValueError, match="multiplier and offset go together"):
        ops.gemm_conv(x, weight, multiplier=torch.ones(3, 3), **geometry)
    with pytest.raises(ValueError, match=r"add must have shape \[3, 20\]"):
        ops.gemm_conv(x, weight, add=torch.ones(3, 3), **geometry)
    with pytest.raises(ValueError, match="leave nothing of an image"):
        ops.gemm_conv(x[:, :, :2, :2], weight)
    with pytest.raises(ValueError, match="packed must be"):
        ops.gemm_conv(x, weight, packed=torch.zeros(3), **geometry)
    with pytest.raises(ValueError, match="packed must be"):
        ops.gemm_conv(x.bfloat16(), weight, packed=pack_weight(weight), **geometry)
    with pytest.raises(ValueError, match="with geglu O is even"):
        ops.gemm_conv(x, weight[:19], geglu=True)
    with pytest.raises(ValueError, match="weight must be float32 or bfloat16"):
        pack_weight(weight.double())
    with pytest.raises(ValueError, match="O is a multiple of 32"):
        pack_weight(weight, geglu=True)
    if native.status("cpu") is None:
        for wrong in ([weight, weight.bfloat16()], [weight, weight[:, :2]], [weight[:, :, 0]]):
            with pytest.raises(RuntimeError, match="gemm_conv_pack: weights must be"):
                PACK(wrong, False, False, False)
