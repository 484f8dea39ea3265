"""winograd_conv on every backend against one float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import ops
from difusores.ops import dispatch
from difusores.ops.winograd_conv import (
    IN_CALL,
    NEEDS_INT16,
    PAIRS,
    Norm,
    multiplies_int16,
    pack_int16_reference,
    pack_reference,
    pack_weight,
    plan,
    plan_int16,
)

OP = "winograd_conv"
LIMIT = 1e-5  # relative L2; the named exception to the tolerance rule (docs/design.md, section 5)
INT16_LIMIT = 1e-3  # the same of products in 16-bit fixed point
int16 = pytest.mark.skipif(not multiplies_int16(), reason=NEEDS_INT16)

# (N, C, O, H, W): single elements and tiles, tails in every dimension, several blocks of channels and tiles
CASES = [
    (1, 2, 1, 2, 1),
    (2, 3, 5, 4, 4),
    (1, 16, 16, 8, 8),
    (3, 20, 33, 7, 5),
    (2, 65, 70, 3, 9),
    (1, 130, 48, 13, 6),
    (2, 8, 17, 37, 34),
    (1, 4, 130, 1, 41),
    (5, 32, 16, 12, 20),
    (1, 64, 80, 33, 2),
]
# In tiles of 6x6 where a level has them: tails as above
LARGE = [(1, 20, 33, 49, 47), (2, 67, 70, 48, 50), (1, 3, 130, 43, 60)]

OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "first": ("bias", "multiplier", "offset", "silu", "add"),
    "second": ("bias", "multiplier", "offset", "silu", "residual", "output_scale"),
    "offset": ("offset", "residual"),
    "act": ("silu", "add", "output_scale"),
}


def make(case: tuple[int, ...], options: tuple[str, ...], layout: str = "channels_last") -> dict[str, Any]:
    n, c, o, h, w = case

    def image(channels: int) -> Tensor:
        t = torch.randn(n, channels, h, w)
        return t.to(memory_format=torch.channels_last) if layout == "channels_last" else t

    parts: dict[str, Any] = {
        "bias": torch.randn(o),
        "multiplier": torch.randn(n, 2 * c)[:, c:],  # rows with a stride
        "offset": torch.randn(n, c) / 2,
        "silu": True,
        "add": torch.randn(n, o),
        "residual": image(o),
        "output_scale": 0.7,
    }
    return {
        "x": image(c),
        "weight": torch.randn(o, c, 3, 3) / (3 * c**0.5),
        **{k: parts[k] for k in options},
    }


def run(backend: str | None, call: dict[str, Any]) -> Tensor:
    if backend is None:
        return ops.winograd_conv(**call)
    with ops.use_backend(backend):
        return ops.winograd_conv(**call)


def wide(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in call.items() if k != "packed"}


def distance(y: Tensor, oracle: Tensor) -> float:
    return float((y.double() - oracle).norm() / oracle.norm())


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_against_the_oracle(backend: str, case: tuple[int, ...]) -> None:
    for options in OPTIONS.values():
        call = make(case, options)
        oracle = run("reference", wide(call))
        for weights in ("contiguous", "channels_last", "packed", "gathered"):
            if weights in ("packed", "gathered"):
                call["packed"] = pack_weight(call["weight"], transformed=weights == "packed")
            elif weights == "channels_last":
                call["weight"] = call["weight"].to(memory_format=torch.channels_last)
            y = run(backend, call)
            assert y.shape == oracle.shape and y.dtype is torch.float32
            assert y.is_contiguous(memory_format=torch.channels_last), "the layout comes out as it went in"
            assert distance(y, oracle) <= LIMIT, (options, weights)


def same_bits(call: dict[str, Any]) -> Tensor:
    """The result: the same twice, on one thread or several, and of an image alone or in the batch."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run("cpu", call)
        torch.set_num_threads(3)
        several, again = run("cpu", call), run("cpu", call)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, several) and torch.equal(several, again)
    for image in range(len(one)):
        per_image = ("x", "multiplier", "offset", "add", "residual")
        alone = {k: v[image : image + 1] if k in per_image else v for k, v in call.items()}
        assert torch.equal(run("cpu", alone), one[image : image + 1])
    return one


@pytest.mark.parametrize(
    "case", [(3, 70, 130, 13, 22), (5, 96, 48, 8, 8), (2, 24, 32, 70, 61), (2, 96, 70, 48, 50)], ids=str
)
def test_bitwise(case: tuple[int, ...]) -> None:
    """The same call twice, an image alone or in a batch, one thread or several, weights packed or not."""
    reason = dispatch.status("cpu")
    if reason is not None:
        pytest.skip(reason)
    call = make(case, ("bias", "multiplier", "offset", "silu", "add", "residual", "output_scale"))
    one = same_bits(call)
    for transformed in (True, False):
        assert torch.equal(run("cpu", {**call, "packed": pack_weight(call["weight"], transformed)}), one)
    last = call["weight"].to(memory_format=torch.channels_last)
    assert torch.equal(run("cpu", {**call, "weight": last}), one)


def with_int16(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, "packed": pack_weight(call["weight"], dtype=torch.int16)}


@int16
@pytest.mark.parametrize("case", CASES, ids=str)
def test_int16_against_the_oracle(case: tuple[int, ...]) -> None:
    for options in OPTIONS.values():
        call = make(case, options)
        y = run("cpu", with_int16(call))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert distance(y, run("reference", wide(call))) <= INT16_LIMIT, options


@int16
@pytest.mark.parametrize("case", [(3, 70, 130, 13, 22), (5, 96, 48, 8, 8), (2, 24, 32, 70, 61)], ids=str)
def test_int16_bitwise(case: tuple[int, ...]) -> None:
    """The same call twice, an image alone or beside one that is 1e6 times as large, one thread or several."""
    call = with_int16(make(case, ("bias", "multiplier", "offset", "add", "residual")))
    call["x"][0] *= 1e6
    one = same_bits(call)
    assert torch.equal(run("cpu", {**call, "packed": IN_CALL}), one)


@int16
def test_int16_sums_do_not_overflow() -> None:
    """Where all products of a block of channels are the largest there can be and have one sign."""
    x, weight = torch.randn(1, 1, 8, 8).expand(1, 128, 8, 8), torch.randn(5, 1, 3, 3).expand(5, 128, 3, 3)
    for scale in (1.0, 1e-25, 1e25):
        call = {
            "x": (x * scale).contiguous(memory_format=torch.channels_last),
            "weight": weight.contiguous(),
        }
        assert distance(run("cpu", with_int16(call)), run("reference", wide(call))) <= INT16_LIMIT


@int16
@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize(("name", "place"), [("x", (0, 7, 2, 3)), ("weight", (3, 70, 1, 1))])
def test_int16_keeps_its_error_beside_a_number_far_beyond_the_others(
    size: float, name: str, place: tuple[int, ...]
) -> None:
    call = make((1, 128, 5, 8, 8), ())
    call[name][place] = size * call[name].std()
    assert distance(run("cpu", with_int16(call)), run("reference", wide(call))) <= 2 * INT16_LIMIT


@int16
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_int16_nan_and_inf(value: float) -> None:
    """No output of the tiles that read one is finite, and none of an output whose weight is one."""
    call = make((2, 70, 17, 13, 14), ("bias", "residual"))
    clean = run("cpu", with_int16(call))
    spoiled = {**call, "x": call["x"].clone(memory_format=torch.preserve_format)}
    spoiled["x"][1, 3, 5, 8] = value  # read by the tiles of rows 4 to 7 and of columns 4 to 11
    y = run("cpu", with_int16(spoiled))
    touched = y[1, :, 4:8, 4:12]
    assert not torch.isfinite(touched).any()
    touched.copy_(clean[1, :, 4:8, 4:12])
    assert torch.equal(y, clean)
    call["weight"][4, 69, 1, 2] = value
    y = run("cpu", with_int16(call))
    assert not torch.isfinite(y[:, 4]).any()
    y[:, 4] = clean[:, 4]
    assert torch.equal(y, clean)


@int16
@pytest.mark.parametrize(("c", "o"), [(3, 5), (70, 130)])
def test_int16_weights_are_the_transform(c: int, o: int) -> None:
    weight = torch.randn(o, c, 3, 3)
    packed = pack_weight(weight, dtype=torch.int16)
    assert torch.equal(pack_weight(weight.to(memory_format=torch.channels_last), dtype=torch.int16), packed)
    got, expected = packed.view(-1, PAIRS), pack_int16_reference(weight).view(-1, PAIRS)
    scales = [part[:, -128:].contiguous().view(torch.float32) for part in (got, expected)]
    torch.testing.assert_close(*scales, rtol=1e-5, atol=0)
    assert (got[:, :-128].int() - expected[:, :-128]).abs().max() <= 1, "rounded the other way"
    torch.library.opcheck(torch.ops.difusores.winograd_conv_pack_int16.default, (weight,))


@pytest.mark.skipif(multiplies_int16(), reason="for kernels of which none needs AVX-512")
@pytest.mark.skipif(dispatch.status("cpu") is not None, reason=dispatch.status("cpu") or "")
def test_int16_is_refused_in_words() -> None:
    call = make((1, 8, 8, 8, 8), ())
    with pytest.raises(RuntimeError, match="needs AVX-512"):
        pack_weight(call["weight"], dtype=torch.int16)
    with pytest.raises(ops.BackendUnavailable, match="needs AVX-512"):
        run("cpu", {**call, "packed": pack_int16_reference(call["weight"])})


def test_plan_int16() -> None:
    """Where the kernel is there, for images of 16 tiles and more, of many channels for 4 and more."""
    layer = plan_int16(128, 256, 32, 32)
    assert layer.int16 == multiplies_int16()
    if layer.int16:
        assert layer.packed_bytes == 2 * pack_int16_reference(torch.zeros(256, 128, 3, 3)).numel()
        assert plan_int16(256, 256, 16, 16).gain > layer.gain > plan_int16(128, 256, 128, 128).gain > 1
    assert plan_int16(256, 256, 12, 16) == plan(256, 256, 12, 16)
    assert plan_int16(512, 512, 8, 8).int16 == multiplies_int16()
    assert plan_int16(1280, 1280, 4, 8) == plan(1280, 1280, 4, 8)
    assert plan_int16(4, 320, 64, 64) == plan(4, 320, 64, 64)


@pytest.mark.parametrize("case", CASES[2:5], ids=str)
def test_norm_is_its_multiplier_and_offset(backend: str, case: tuple[int, ...]) -> None:
    """In one call or two: the same bits, and near the oracle."""
    call = make(case, ("bias", "silu", "residual"))
    c = case[1]
    norm = Norm(c // 5 if c % 5 == 0 else 4, torch.randn(c), torch.randn(c), 1e-3)
    for given in (norm, norm._replace(weight=None, bias=None)):
        y = run(backend, {**call, "norm": given})
        with ops.use_backend(backend):
            multiplier, offset = ops.group_norm_affine(call["x"], *given)
        assert torch.equal(y, run(backend, {**call, "multiplier": multiplier, "offset": offset}))
        exact = Norm(*(p.double() if isinstance(p, Tensor) else p for p in given))
        assert distance(y, run("reference", {**wide(call), "norm": exact})) <= LIMIT


def fits_moments(moments: Tensor, y: Tensor, limit: float = 1e-5) -> None:
    """Means within `limit` standard deviations, variances within `limit`."""
    variance, mean = torch.var_mean(y.double(), dim=(2, 3), correction=0)
    assert ((moments[:, 0] - mean).abs() <= limit * variance.sqrt()).all()
    assert ((moments[:, 1] - variance).abs() <= limit * variance).all()


def with_moments(backend: str | None, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    moments = torch.full((call["x"].shape[0], 2, call["weight"].shape[0]), 7.0, dtype=torch.float64)
    return run(backend, {**call, "moments": moments}), moments


@pytest.mark.parametrize("case", [*CASES[1:], *LARGE, (2, 8, 33, 70, 61)], ids=str)
def test_moments_are_those_of_the_result(backend: str, case: tuple[int, ...]) -> None:
    """The result keeps its bits, in every form of the product."""
    call = make(case, OPTIONS["second"])
    call["bias"] = 1000 * call["bias"]  # means far from zero
    calls = [call, {**make(case, OPTIONS["first"]), "doubled": True, "add": None}]
    if backend == "cpu" and multiplies_int16():
        calls.append(with_int16(call))
    for each in calls:
        y, moments = with_moments(backend, each)
        assert torch.equal(y, run(backend, each))
        fits_moments(moments, y)


@pytest.mark.parametrize("size", [(16, 16), (61, 70)])
def test_moments_beside_outliers(backend: str, size: tuple[int, int]) -> None:
    """In the first pixel, the first tile, the last pixel, and with almost no variance at all."""
    x = 1e-3 * torch.randn(4, 8, *size) + 3
    x[0, :, 0, 0], x[1, :, :5, :5], x[2, :, -1, -1] = 1e4, -1e4, 1e4
    weight = torch.zeros(20, 8, 3, 3)
    weight[:, :, 1, 1] = torch.randn(20, 8)
    y, moments = with_moments(backend, {"x": x.to(memory_format=torch.channels_last), "weight": weight})
    fits_moments(moments, y, 1e-4)


def test_moments_bitwise() -> None:
    """On one thread or several, of an image alone or in a batch."""
    reason = dispatch.status("cpu")
    if reason is not None:
        pytest.skip(reason)
    for case in ((5, 96, 48, 8, 8), (2, 24, 40, 70, 61), (3, 20, 130, 21, 90)):
        call = make(case, ("bias",))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = with_moments("cpu", call)[1]
            torch.set_num_threads(3)
            several = with_moments("cpu", call)[1]
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(one, several)
        for image in range(case[0]):
            alone = with_moments("cpu", {**call, "x": call["x"][image : image + 1]})[1]
            assert torch.equal(alone, one[image : image + 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_make_their_images_moments_nan(backend: str, value: float) -> None:
    call = make((3, 20, 17, 13, 14), ("bias",))
    clean = with_moments(backend, call)[1]
    call["x"][1, 3, 12, 13] = value
    moments = with_moments(backend, call)[1]
    assert moments[1].isnan().all()
    moments[1] = clean[1]
    assert torch.equal(moments, clean)


@pytest.mark.parametrize("case", [(2, 64, 96, 24, 30), (1, 32, 64, 61, 70)], ids=str)
def test_norm_by_moments_of_the_call_before(backend: str, case: tuple[int, ...]) -> None:
    """Near the norm by x itself; by the kernel it is the moments that are read, in one call or two."""
    n, c, o, h, w = case
    y, moments = with_moments(backend, make(case, ("bias", "silu")))
    call = {**make((n, o, c, h, w), ("bias", "silu")), "x": y}
    norm = Norm(o // 4, torch.randn(o), torch.randn(o), 1e-5)
    z = run(backend, {**call, "norm": norm, "norm_moments": moments})
    exact = Norm(*(p.double() if isinstance(p, Tensor) else p for p in norm))
    assert distance(z, run("reference", {**wide(call), "norm": exact})) <= LIMIT
    if backend == "cpu":
        for given in (moments, moments * 4):
            z = run("cpu", {**call, "norm": norm, "norm_moments": given})
            with ops.use_backend("cpu"):
                multiplier, offset = ops.group_norm_affine(y, *norm, moments=given)
            assert torch.equal(z, run("cpu", {**call, "multiplier": multiplier, "offset": offset}))


def test_moments_of_no_pixels_are_nan() -> None:
    if dispatch.status("cpu") is not None:
        pytest.skip(dispatch.status("cpu") or "")
    _, moments = with_moments("cpu", make((2, 16, 16, 0, 4), ()))
    assert moments.isnan().all()


@pytest.mark.parametrize("case", [*CASES, (1, 20, 33, 25, 24), (2, 67, 70, 24, 25)], ids=str)
@pytest.mark.parametrize("options", ["first", "second", "norm"])
def test_doubled_is_a_copy_of_twice_the_size(backend: str, case: tuple[int, ...], options: str) -> None:
    """Near the oracle; of the kernel the same bits, without and with weights in int16."""
    n, c, o, h, w = case
    call = {**make((n, c, o, 2 * h, 2 * w), OPTIONS.get(options, ("bias", "silu"))), "x": make(case, ())["x"]}
    if options == "norm":
        with ops.use_backend(backend):
            multiplier, offset = ops.group_norm_affine(call["x"], 1, None, None, 1e-3)
        y = run(backend, {**call, "doubled": True, "norm": Norm(1, None, None, 1e-3)})
        call.update(multiplier=multiplier, offset=offset)
    else:
        y = run(backend, {**call, "doubled": True})
    copy = {**call, "x": F.interpolate(call["x"], scale_factor=2.0)}
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert distance(y, run("reference", wide(copy))) <= LIMIT
    if backend == "cpu":
        assert torch.equal(y, run("cpu", copy))
    if backend == "cpu" and multiplies_int16():
        assert torch.equal(run("cpu", {**with_int16(call), "doubled": True}), run("cpu", with_int16(copy)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_the_tiles_that_read_them(backend: str, value: float) -> None:
    call = make((2, 20, 17, 13, 14), ("bias", "residual"))
    clean = run(backend, call)
    call["x"] = call["x"].clone(memory_format=torch.preserve_format)
    call["x"][1, 3, 5, 8] = value  # read by the tiles of rows 4 to 7 and of columns 4 to 11
    y = run(backend, call)
    touched = y[1, :, 4:8, 4:12]
    assert not torch.isfinite(y[1, :, 4:7, 7:10]).any(), "what the convolution itself makes of it"
    touched.copy_(clean[1, :, 4:8, 4:12])
    assert torch.equal(y, clean)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_nan_and_inf_stay_in_large_tiles(backend: str, value: float) -> None:
    call = make((2, 20, 17, 49, 51), ("bias", "residual"))
    clean = run(backend, call)
    call["x"] = call["x"].clone(memory_format=torch.preserve_format)
    call["x"][1, 3, 5, 8] = (
        value  # rows 0 to 11 and columns 6 to 11 in tiles of 6x6, 4 to 7 and 4 to 11 of 4x4
    )
    y = run(backend, call)
    assert not torch.isfinite(y[1, :, 4:7, 7:10]).any(), "what the convolution itself makes of it"
    y[1, :, :12, 4:12] = clean[1, :, :12, 4:12]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_error_of_large_tiles(mean: float) -> None:
    """On activations as in a network, with channels of outliers: half the limit."""
    if dispatch.status("cpu") is not None:
        pytest.skip(dispatch.status("cpu") or "")
    call = make((1, 256, 64, 48, 48), ("silu", "bias"))
    call["x"] = call["x"] + mean
    call["x"][:, ::50] *= 40
    assert distance(run("cpu", call), run("reference", wide(call))) <= LIMIT / 2


def test_error_is_that_of_the_direct_sum() -> None:
    """Well-conditioned points: at most twice PyTorch's own error where activations are as in a network."""
    if dispatch.status("cpu") is not None:
        pytest.skip(dispatch.status("cpu") or "")
    call = make((1, 256, 64, 16, 16), ("silu", "bias"))
    oracle = run("reference", wide(call))
    assert distance(run("cpu", call), oracle) <= 2 * distance(run("reference", call), oracle)


def test_reference_is_the_convolution_with_its_parts() -> None:
    call = make((2, 6, 4, 5, 7), OPTIONS["second"], "contiguous")
    h = F.silu(call["x"] * call["multiplier"][:, :, None, None] + call["offset"][:, :, None, None])
    y = F.conv2d(h, call["weight"], call["bias"], padding=1)
    torch.testing.assert_close(run("reference", call), 0.7 * (y + call["residual"]))
    y = F.conv2d(call["x"], call["weight"], padding=1) + (add := torch.randn(2, 4))[:, :, None, None]
    torch.testing.assert_close(run(None, {"x": call["x"], "weight": call["weight"], "add": add}), y)


@pytest.mark.parametrize(("c", "o"), [(3, 5), (70, 130)])
def test_packed_weights_are_the_transform(c: int, o: int) -> None:
    """Of the reference: multiplied with the transform of a tile they give its convolution."""
    weight = torch.randn(o, c, 3, 3)
    layer = plan(c, o, 8, 8)
    assert pack_reference(weight, layer.transformed).numel() * 4 == layer.packed_bytes
    channels_last = weight.to(memory_format=torch.channels_last)
    for transformed in (True, False):
        packed = pack_weight(weight, transformed)
        torch.testing.assert_close(packed, pack_reference(weight, transformed), rtol=1e-6, atol=1e-6)
        assert torch.equal(pack_weight(channels_last, transformed), packed)


def test_plan() -> None:
    """It depends on the layer alone, and says in words what goes to PyTorch's convolution."""
    wide_layer = plan(128, 256, 32, 32)
    assert wide_layer.packed_bytes == pack_reference(torch.zeros(256, 128, 3, 3), False).numel() * 4
    for shape in ((4, 320, 64, 64), (320, 4, 64, 64), (8, 8, 64, 64), (32, 32, 2, 2), (256, 256, 1, 64)):
        refused = plan(*shape)
        assert not refused.winograd and refused.reason
    assert plan(64, 64, 8, 8).gain > plan(64, 64, 64, 64).gain > 1
    assert plan(64, 64, 8, 8).transformed
    assert not plan(1280, 1280, 8, 8).transformed, "they are read from memory"
    fast = dispatch.status("cpu") is None and ops.dispatch.native.build_info()["isa_used"] != "base"
    assert wide_layer.winograd == fast and (wide_layer.reason is None) == fast


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 8, 4)}, r"x must be \[N, C, H, W\]"),
        ({"weight": torch.randn(4, 7, 3, 3)}, r"weight must have shape \[O, C, 3, 3\] with C = 8"),
        ({"weight": torch.randn(4, 8, 1, 1)}, "weight must have shape"),
        ({"bias": torch.randn(8)}, r"bias must have shape \[O\] = \[4\]"),
        ({"multiplier": torch.randn(8)}, r"multiplier must have shape \[2, 8\]"),
        ({"offset": torch.randn(1, 8)}, r"offset must have shape \[2, 8\]"),
        ({"add": torch.randn(2, 8)}, r"add must have shape \[2, 4\]"),
        ({"residual": torch.randn(2, 8, 5, 5)}, "residual must be like the output"),
        ({"residual": torch.randn(2, 4, 5, 5).half()}, "residual must be like the output"),
        ({"residual": torch.randn(2, 4, 5, 5), "doubled": True}, r"like the output, \(2, 4, 10, 10\)"),
        ({"norm": Norm(4, None, None, 0.0), "offset": torch.randn(2, 8)}, "and both were given"),
        ({"norm": Norm(3, None, None, 0.0)}, "num_groups must divide the number of channels"),
        ({"norm": Norm(4, torch.randn(4), None, 0.0)}, r"weight must have shape \[C\] = \[8\]"),
        ({"moments": torch.empty(2, 2, 8)}, r"moments must have shape \[2, 2, 4\]"),
        ({"moments": torch.empty(2, 2, 4, device="meta")}, "moments must be on the device of x"),
        ({"norm_moments": torch.zeros(2, 2, 8)}, "norm_moments were given, and no norm"),
        (
            {"norm": Norm(4, None, None, 0.0), "norm_moments": torch.zeros(2, 2, 4)},
            r"moments must have shape \[2, 2, 8\]",
        ),
        ({"packed": torch.randn(10)}, "packed must be what pack_weight made"),
        ({"add": torch.randn(2, 4, device="meta")}, "add must be on the device of x"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"x": torch.randn(2, 8, 5, 5), "weight": torch.randn(4, 8, 3, 3), **change}
    with pytest.raises(ValueError, match=message):
        ops.winograd_conv(**call)


def test_other_types_and_strides() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        ops.winograd_conv(torch.ones(1, 2, 4, 4, dtype=torch.int64), torch.ones(2, 2, 3, 3))
    with pytest.raises(ValueError, match="packed as float32 or int16"):
        pack_weight(torch.ones(2, 2, 3, 3), dtype=torch.float64)
    with pytest.raises(ValueError, match="float32 on the CPU"):
        pack_weight(torch.ones(2, 2, 3, 3).half())
    with pytest.raises(ValueError, match=r"\[O, C, 3, 3\]"):
        pack_weight(torch.ones(2, 2, 1, 1))
    call = make((2, 16, 32, 8, 8), (), "contiguous")
    y = run(None, call)
    assert y.is_contiguous() and distance(y, run("reference", wide(call))) <= LIMIT
    half = {k: v.bfloat16() for k, v in call.items()}
    assert run(None, half).dtype is torch.bfloat16
    if dispatch.status("cpu") is None:
        with pytest.raises(ops.BackendUnavailable, match="channels_last"):
            run("cpu", call)
        with pytest.raises(ops.BackendUnavailable, match=r"not torch\.bfloat16"):
            run("cpu", half)


def test_gradients_come_from_the_reference() -> None:
    call = make((2, 16, 32, 8, 8), OPTIONS["second"])
    leaves = {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in call.items()}
    run(None, leaves).square().sum().backward()
    twins = {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in call.items()}
    run("reference", twins).square().sum().backward()
    for name, leaf in leaves.items():
        if isinstance(leaf, Tensor):
            torch.testing.assert_close(leaf.grad, twins[name].grad)


def test_empty_batch() -> None:
    call = make((0, 16, 16, 8, 8), OPTIONS["second"])
    assert run(None, call).shape == (0, 16, 8, 8)


@pytest.mark.parametrize("options", ["plain", "second"])
def test_opcheck(options: str) -> None:
    call = make((2, 16, 24, 5, 6), OPTIONS[options])
    get = call.get
    torch.library.opcheck(
        torch.ops.difusores.winograd_conv.default,
        (
            *(call["x"], call["weight"], get("bias"), get("multiplier"), get("offset"), get("silu", False)),
            *(get("add"), get("residual"), get("output_scale", 1.0), None),
        ),
    )
    norm = (4, torch.randn(16), torch.randn(16), 1e-5)
    torch.library.opcheck(
        torch.ops.difusores.winograd_conv.default,
        (call["x"], call["weight"], None, None, None, True, None, None, 1.0, None, *norm, True),
    )
    torch.library.opcheck(
        torch.ops.difusores.winograd_conv.default,
        (
            *(call["x"], call["weight"], None, None, None, True, None, None, 1.0, None, *norm, False),
            *(torch.zeros(2, 2, 24, dtype=torch.float64), torch.ones(2, 2, 16, dtype=torch.float64)),
        ),
    )
    torch.library.opcheck(torch.ops.difusores.winograd_conv_pack.default, (call["weight"], False))


def test_compiles_without_a_break(backend: str) -> None:
    torch.compiler.reset()  # a graph keeps the backend that was in force when it was traced
    call = make((2, 16, 16, 8, 8), OPTIONS["first"])
    compiled = torch.compile(lambda: run(None, call), fullgraph=True, backend="aot_eager")
    with ops.use_backend(backend):
        torch.testing.assert_close(compiled(), run(None, call), rtol=1e-5, atol=1e-5)
