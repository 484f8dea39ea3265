"""3x3 convolution by Winograd's minimal filtering, with what surrounds it in a diffusion UNet.

    h = act(multiplier[n, c] * x + offset[n, c])               a group norm with SiLU, its statistics known,
                                                               or the norm itself; height and width doubled by
                                                               repetition, if that is asked for
    y = output_scale * (conv3x3(h, weight) + bias[o] + add[n, o] + residual)

stride 1, one row of zeros around h (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks").
A 4x4 tile of outputs takes 36 multiplications per pair of channels instead of 144, and of large images a 6x6
tile 64 instead of 324; what that saves, it pays with rounding errors that depend on the points of
interpolation (docs/kernels/winograd_conv.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import native
from difusores.ops.dispatch import (
    LIBRARY,
    below_autograd,
    choose,
    needs_grad,
    register,
    straight_to_cpu,
    wanted,
)
from difusores.ops.group_norm_affine import check_moments, group_norm_affine
from difusores.ops.group_norm_affine import reference as affine_reference

LIBRARY.define(
    "winograd_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? multiplier, Tensor? offset, bool silu, "
    "Tensor? add, Tensor? residual, float output_scale, Tensor? packed, int norm_groups=0, "
    "Tensor? norm_weight=None, Tensor? norm_bias=None, float norm_eps=0.0, bool doubled=False, "
    "Tensor(a!)? moments=None, Tensor? norm_moments=None) -> Tensor"
)
LIBRARY.define("winograd_conv_pack(Tensor weight, bool transformed) -> Tensor")
LIBRARY.define("winograd_conv_pack_int16(Tensor weight) -> Tensor")
register("winograd_conv", "cpu")

LANES = 16  # output channels are computed in multiples of it
BLOCK = 64  # channels, in and out, of a block of a packed weight
POINT = BLOCK * BLOCK + LANES  # floats of one of the 36 points of a block

# The points at which the polynomials of 4x4 tiles are evaluated: 0, +-A, +-B and infinity. With (5/8, 3/2)
# the images' transforms have coefficients that are exact in fp32, and errors are half those of (1, 2).
A, B = 5 / 8, 3 / 2


# Cost of a call with IMAGES images, in vector multiply-adds for each pair of an input channel and a vector
# of output channels; measured on AVX-512 (docs/kernels/winograd_conv.md), of use as ratios.
IMAGES = 8
DIRECT = 9 / 0.9  # of an output pixel, at what oneDNN reaches of the peak
PRODUCT = 36 / 0.8  # of a tile
TRANSFORM = 600.0  # of a tile's inputs for all output channels, and of its outputs for all input channels
WEIGHTS = 800.0  # gathering them and transforming them, once a call
GATHERED, TRANSFORMED = 500.0, 100.0  # what is left of that with packed weights
CACHED = 4 << 20  # bytes; transformed weights that are larger are slower to read than to make

# The same of products in 16-bit fixed point, measured on Zen 5; csrc/cpu/winograd_int16.cpp has the layout.
PAIRS = BLOCK * BLOCK + 2 * BLOCK  # int16 of a point of a block, and of the 64 scales of its outputs
PRODUCT_INT16, TRANSFORM_INT16, WEIGHTS_INT16 = 20.0, 1000.0, 1000.0
# Tiles of an image below which the weights decide, of which those of int16 are twice as large as the layer's;
# the second with this many channels in times channels out.
FEW_TILES, FEWEST_TILES, MANY_CHANNELS = 16, 4, 512 * 512
LARGEST, LARGEST_WEIGHT, WEIGHT_SUM = 16383.0, 32767.0, 131000.0
# In place of packed weights: int16, of weights packed in the call. Imported under torch.device("meta"), too.
IN_CALL = torch.empty(0, dtype=torch.int16, device="cpu")
NEEDS_INT16 = "the product of int16 needs AVX-512 with VNNI and BF16"


class Norm(NamedTuple):
    """A group norm before the convolution: what `group_norm_affine` takes beside x."""

    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class LayerPlan:
    """How a stride-1 3x3 convolution of one shape is best computed; see `plan`.

    Attributes:
        winograd: whether this op's kernel is expected to be faster than oneDNN's direct convolution.
        reason: why not, in words; None where it is.
        transformed: which form of packed weights is better, see `pack_weight`.
        packed_bytes: size of that form.
        gain: expected time of a call with one image without packed weights over one with them.
        int16: whether the form is that of products in 16-bit fixed point.
    """

    winograd: bool
    reason: str | None
    transformed: bool
    packed_bytes: int
    gain: float
    int16: bool = False


@cache
def plan(in_channels: int, out_channels: int, height: int, width: int) -> LayerPlan:
    """Which algorithm a fp32 layer takes: from its shape and this process's ISA level, never from a batch
    size, a number of threads or a timing, so that bits do not move.

    Args:
        in_channels, out_channels: C and O.
        height, width: of the image.
    """
    tiles = IMAGES * -(-height // 4) * -(-width // 4)
    lanes = -(-out_channels // LANES) * LANES / max(out_channels, 1)
    cost = tiles * (PRODUCT * lanes + TRANSFORM / max(out_channels, 1) + TRANSFORM / max(in_channels, 1))
    direct = IMAGES * height * width * DIRECT
    reason = native.status("cpu")
    if reason is None and native.build_info()["isa_used"] == "base":
        reason = "without AVX2 and FMA oneDNN is faster"
    if reason is None and direct <= cost + WEIGHTS:
        reason = (
            f"{in_channels} to {out_channels} channels at {height}x{width}: what the transforms cost is more "
            "than the multiplications saved, F.conv2d is faster"
        )
    transformed = 4 * _packed_size(out_channels, in_channels, True) <= CACHED
    alone = cost / IMAGES + (TRANSFORMED if transformed else GATHERED)
    gain = (cost / IMAGES + WEIGHTS) / alone
    return LayerPlan(
        reason is None, reason, transformed, 4 * _packed_size(out_channels, in_channels, transformed), gain
    )


def multiplies_int16() -> bool:
    """Whether this process has a kernel for products in 16-bit fixed point."""
    return native.status("cpu") is None and native.build_info()["isa_used"] in ("avx512_bf16", "amx")


@cache
def plan_int16(in_channels: int, out_channels: int, height: int, width: int) -> LayerPlan:
    """`plan` where an error of 1e-3 is allowed: products in 16-bit fixed point, where those are faster."""
    layer = plan(in_channels, out_channels, height, width)
    tiles = -(-height // 4) * -(-width // 4)
    few = FEW_TILES if in_channels * out_channels < MANY_CHANNELS else FEWEST_TILES
    if not layer.winograd or not multiplies_int16() or tiles < few:
        return layer
    lanes = -(-out_channels // BLOCK) * BLOCK / out_channels
    alone = tiles * (PRODUCT_INT16 * lanes + TRANSFORM_INT16 / out_channels + TRANSFORM_INT16 / in_channels)
    return replace(
        layer,
        transformed=True,
        packed_bytes=2 * _packed_int16(out_channels, in_channels),
        gain=(alone + WEIGHTS_INT16) / alone,
        int16=True,
    )


def pack_weight(weight: Tensor, transformed: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights as `winograd_conv` works on them, which it then need not make in each call.

    Worth its memory where a call has few tiles (small images, small batches). The tensor is read as it is:
    make it anew when `weight` changes, and do not save it, for its layout belongs to this version.

    Args:
        weight: [O, C, 3, 3] fp32 on the CPU, contiguous or channels_last.
        transformed: the 36 points of the transform, four times as large as the weights; else the nine
            weights, block by block, which are read without a detour and transformed in each call. Tiles of
            6x6, which large images are computed in, read the second form alone.
        dtype: int16 for products in 16-bit fixed point: a call that gets these weights, always transformed,
            has tiles of 4x4 and an error (relative L2) of 4 to 7e-4, up to 2e-3 where a number of a tile is a
            hundred times the others, and is up to twice as fast. To be asked for where `multiplies_int16`.

    Returns:
        [ceil(O / 64) * ceil(C / 64) * (36 or 9) * 4112] fp32, or [ceil(O / 64) * ceil(C / 64) * 36 * 4224]
        int16.

    Raises:
        ValueError: another shape, dtype or device. RuntimeError: int16, of which the kernels in use have no
        product.
    """
    if dtype not in (torch.float32, torch.int16):
        raise ValueError(f"weights are packed as float32 or int16, not {dtype}")
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight must have shape [O, C, 3, 3], got {tuple(weight.shape)}")
    if weight.dtype is not torch.float32 or not weight.is_cpu:
        raise ValueError(f"weight must be float32 on the CPU, got {weight.dtype} on {weight.device}")
    packed: Tensor
    with torch.no_grad():
        if dtype is torch.int16:
            packed = torch.ops.difusores.winograd_conv_pack_int16(weight)
        else:
            packed = torch.ops.difusores.winograd_conv_pack(weight, transformed)
    return packed


def _packed_size(out_channels: int, in_channels: int, transformed: bool) -> int:
    return -(-out_channels // BLOCK) * -(-in_channels // BLOCK) * (36 if transformed else 9) * POINT


def _packed_int16(out_channels: int, in_channels: int) -> int:
    return -(-out_channels // BLOCK) * -(-in_channels // BLOCK) * 36 * PAIRS


def pack_reference(weight: Tensor, transformed: bool) -> Tensor:
    """[blocks of O, blocks of C, 36, POINT]: of each point [channels in, channels out] and zeros.

    Not transformed: of each block [channels out / 16, channels in, 9, 16] and zeros.
    """
    o, c = weight.shape[:2]
    if transformed:
        u = transform_weight(weight).to(weight.dtype)
    else:
        u = weight.permute(2, 3, 1, 0).reshape(9, c, o)
    u = F.pad(u, (0, -o % LANES))
    blocks = [part for wide in u.split(BLOCK, dim=2) for part in wide.split(BLOCK, dim=1)]
    if transformed:
        parts = [F.pad(block.flatten(1), (0, POINT - block[0].numel())).flatten() for block in blocks]
    else:
        parts = [block.unflatten(2, (-1, LANES)).permute(2, 1, 0, 3).flatten() for block in blocks]
        parts = [F.pad(part, (0, 9 * POINT - len(part))) for part in parts]
    return torch.cat(parts)


LIBRARY.impl("winograd_conv_pack", pack_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::winograd_conv_pack", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _pack_fake(weight: Tensor, transformed: bool) -> Tensor:
    return weight.new_empty(_packed_size(weight.shape[0], weight.shape[1], transformed))


def transform_weight(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] to its 36 points [36, C, O], in float64."""
    o, c = weight.shape[:2]
    near, far = 1 / (2 * A * A * (A * A - B * B)), 1 / (2 * B * B * (B * B - A * A))
    g = weight.new_tensor(
        [
            [1 / (A * A * B * B), 0, 0],
            *([near, sign * A * near, A * A * near] for sign in (1, -1)),
            *([far, sign * B * far, B * B * far] for sign in (1, -1)),
            [0, 0, 1],
        ],
        dtype=torch.float64,
    )
    return torch.einsum("iy,ocyx,jx->ijco", g, weight.double(), g).reshape(36, c, o)


def pack_int16_reference(weight: Tensor) -> Tensor:
    """[blocks of O, 36, blocks of C, PAIRS]: [32 pairs of channels, 64 outputs, 2] and 64 scales in float32.

    The channels of a block lie as AVX-512 packs two vectors of 32-bit numbers.
    """
    o, c = weight.shape[:2]
    u = F.pad(transform_weight(weight).float(), (0, -o % BLOCK, 0, -c % BLOCK))
    u = u.view(36, -1, BLOCK, u.shape[2] // BLOCK, BLOCK).permute(3, 0, 1, 2, 4)
    unit = torch.maximum(
        u.abs().amax(3, keepdim=True).clamp_min(1e-30) / LARGEST_WEIGHT,
        u.abs().sum(3, keepdim=True) / WEIGHT_SUM,
    )
    numbers = (u / unit).round().to(torch.int16)
    lanes = numbers.unflatten(3, (2, 2, 4, 4)).transpose(4, 5).flatten(3, 6)  # of two vectors, four in turn
    pairs = lanes.unflatten(3, (-1, 2)).transpose(4, 5).flatten(3)
    return torch.cat([pairs, unit.flatten(3).contiguous().view(torch.int16)], dim=3).flatten()


LIBRARY.impl("winograd_conv_pack_int16", pack_int16_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::winograd_conv_pack_int16", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _pack_int16_fake(weight: Tensor) -> Tensor:
    return weight.new_empty(_packed_int16(weight.shape[0], weight.shape[1]), dtype=torch.int16)


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype)[:, :, None, None]


def _memory_format(x: Tensor) -> torch.memory_format:
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    offset: Tensor | None,
    silu: bool,
    add: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    packed: Tensor | None,
    norm_groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    doubled: bool = False,
    moments: Tensor | None = None,
    norm_moments: Tensor | None = None,
) -> Tensor:
    """The op in plain PyTorch; `packed` and `norm_moments` are not read."""
    if norm_groups:
        multiplier, offset = affine_reference(x, norm_groups, norm_weight, norm_bias, norm_eps, None, None)
    h = x
    if multiplier is not None:
        h = h * _per_channel(multiplier, x)
    if offset is not None:
        h = h + _per_channel(offset, x)
    if silu:
        h = F.silu(h)
    if doubled:
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
    y = F.conv2d(h, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=1)
    if add is not None:
        y = y + _per_channel(add, x)
    if residual is not None:
        y = y + residual
    if output_scale != 1.0:
        y = y * output_scale
    if moments is not None:
        variance, mean = torch.var_mean(y.detach().double(), dim=(2, 3), correction=0)
        moments.copy_(torch.stack([mean, variance], dim=1))
    return y.contiguous(memory_format=_memory_format(x))


LIBRARY.impl("winograd_conv", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::winograd_conv", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    offset: Tensor | None,
    silu: bool,
    add: Tensor | None,
    residual: Tensor | None,
    output_scale: float,
    packed: Tensor | None,
    norm_groups: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    doubled: bool = False,
    moments: Tensor | None = None,
    norm_moments: Tensor | None = None,
) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *_size_of_output(x, doubled))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def _size_of_output(x: Tensor, doubled: bool) -> tuple[int, int]:
    factor = 2 if doubled else 1
    return factor * x.shape[2], factor * x.shape[3]


_OP = torch.ops.difusores.winograd_conv.default


def supports(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    offset: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    moments: Tensor | None,
) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    for t in (x, weight, bias, multiplier, offset, add, residual):
        if t is not None and t.dtype is not torch.float32:
            return f"the kernel takes float32, not {t.dtype}"
    if _memory_format(x) is not torch.channels_last:
        return "the kernel takes channels_last images, not other strides"
    if residual is not None and not residual.is_contiguous(memory_format=torch.channels_last):
        return "the kernel takes a channels_last residual"
    if moments is not None and (moments.dtype is not torch.float64 or not moments.is_contiguous()):
        return f"the kernel writes contiguous moments in float64, not {moments.dtype}, {moments.stride()}"
    if packed is not None and packed.dtype is torch.int16 and not multiplies_int16():
        return NEEDS_INT16
    return None


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    offset: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    moments: Tensor | None,
    doubled: bool,
) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be [N, C, H, W], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    n, c = x.shape[:2]
    height, width = _size_of_output(x, doubled)
    if weight.ndim != 4 or weight.shape[1:] != (c, 3, 3):
        raise ValueError(f"weight must have shape [O, C, 3, 3] with C = {c}, got {tuple(weight.shape)}")
    o = weight.shape[0]
    if bias is not None and bias.shape != (o,):
        raise ValueError(f"bias must have shape [O] = [{o}], got {tuple(bias.shape)}")
    for name, p, channels in (("multiplier", multiplier, c), ("offset", offset, c), ("add", add, o)):
        if p is not None and p.shape != (n, channels):
            raise ValueError(f"{name} must have shape {[n, channels]}, got {tuple(p.shape)}")
    if residual is not None and (residual.shape != (n, o, height, width) or residual.dtype is not x.dtype):
        raise ValueError(
            f"residual must be like the output, {(n, o, height, width)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    check_moments("moments", moments, n, o, x.device)
    sizes = {
        torch.float32: [_packed_size(o, c, transformed) for transformed in (True, False)],
        torch.int16: [_packed_int16(o, c), 0],
    }
    if packed is not None and (packed.ndim != 1 or packed.shape[0] not in sizes.get(packed.dtype, ())):
        raise ValueError(
            f"packed must be what pack_weight made of this weight, of one of {sizes} numbers, "
            f"got {tuple(packed.shape)} {packed.dtype}"
        )
    named = {"weight": weight, "bias": bias, "multiplier": multiplier, "offset": offset, "add": add}
    for name, t in {**named, "residual": residual, "packed": packed}.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")


def _row(p: Tensor | None) -> Tensor | None:
    """p with its channels side by side, as the kernel reads them."""
    return p if p is None or p.stride(-1) == 1 else p.contiguous()


NO_NORM = Norm(0, None, None, 0.0)


Prepared = Callable[
    [Tensor, "Tensor | None", "Tensor | None", float, "Tensor | None", "Tensor | None"], Tensor
]


def prepared(weight: Tensor, bias: Tensor | None, packed: Tensor | None, norm: Norm) -> Prepared:
    """silu(norm(x)) convolved, as a function of x, add, residual, output_scale, moments and norm_moments.

    See `winograd_conv`. For callers who have made sure that the kernel is to answer: it raises RuntimeError
    where it refuses.
    """
    groups, scale, shift, eps = norm

    def convolve(
        x: Tensor,
        add: Tensor | None,
        residual: Tensor | None,
        output_scale: float,
        moments: Tensor | None,
        norm_moments: Tensor | None,
    ) -> Tensor:
        y: Tensor = _OP(
            *(x, weight, bias, None, None, True, add, residual, output_scale, packed),
            *(groups, scale, shift, eps, False, moments, norm_moments),
        )
        return y

    return convolve


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    multiplier: Tensor | None = None,
    offset: Tensor | None = None,
    silu: bool = False,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: float = 1.0,
    packed: Tensor | None = None,
    norm: Norm | None = None,
    doubled: bool = False,
    moments: Tensor | None = None,
    norm_moments: Tensor | None = None,
) -> Tensor:
    """y = output_scale * (conv3x3(act(multiplier * x + offset), weight) + bias + add + residual).

    Stride 1, zero padding 1. The kernel takes channels_last fp32 on the CPU; everything else, and layers for
    which `plan` expects it to be slower, runs as `F.conv2d` with the other parts around it.

    Args:
        x: [N, C, H, W]; its layout is kept.
        weight: [O, C, 3, 3], contiguous or channels_last.
        bias: [O] or None.
        multiplier, offset: [N, C] or None, applied to x before the convolution (`group_norm_affine` makes
            them of a group norm).
        silu: whether act is SiLU; else the identity.
        add: [N, O] (a time embedding) or None.
        residual: like y, or None.
        output_scale: the factor of the whole.
        packed: `pack_weight(weight)`, or None. In int16 the products are of 16-bit fixed-point numbers: a
            tile's inputs have a scale for 64 channels, weights one for a point, an output and 64 channels.
            `IN_CALL`: int16 too, packed within the call, the same bits.
        norm: of x, in place of a multiplier and an offset, whose bits are those of `group_norm_affine`.
        doubled: height and width of act(...) are doubled by repeating pixels before it is convolved; the bits
            are those of a copy that is twice as large, which is not made.
        moments: [N, 2, O] in fp64, written: the mean and the biased variance of each channel of y, which is
            not read for that; or None.
        norm_moments: [N, 2, C], the same of x, by which the kernel knows the norm without reading x before;
            or None. They are what another call wrote as `moments`.

    Returns:
        y [N, O, H, W], or [N, O, 2 H, 2 W] if doubled, in x's dtype and layout. Relative L2 error at most
        1e-5; with weights in int16 see `pack_weight`. A NaN or Inf in x makes NaN of the tiles of outputs
        which read it, 4x4 or 6x6, not only of the outputs next to it. Where a gradient is needed the
        reference runs, in whose every tensor but `packed` the call is differentiable.

    Raises:
        ValueError: shapes or devices that do not fit, named; norm beside a multiplier or offset, or
            norm_moments without it.
        TypeError: x is not floating point.
    """
    tensors = (x, weight, bias, multiplier, offset, add, residual, packed, moments)
    groups, norm_weight, norm_bias, eps = norm or NO_NORM
    if norm is None and norm_moments is not None:
        raise ValueError("norm_moments were given, and no norm")
    if (
        straight_to_cpu(*tensors, norm_weight, norm_bias, norm_moments)
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and (wanted() == "cpu" or _plan(x, weight, doubled).winograd)
    ):
        y: Tensor
        try:
            with torch._C._AutoDispatchBelowAutograd():
                y = _OP(
                    *(x, weight, bias, multiplier, offset, silu, add, residual, output_scale, packed),
                    *(groups, norm_weight, norm_bias, eps, doubled, moments, norm_moments),
                )
            return y
        except (RuntimeError, TypeError):
            pass  # the kernel refused; what follows finds another way or the words for it
    if norm is not None:
        if multiplier is not None or offset is not None:
            raise ValueError("norm takes the place of multiplier and offset, and both were given")
        multiplier, offset = group_norm_affine(x, *norm, moments=norm_moments)
        tensors = (x, weight, bias, multiplier, offset, add, residual, packed, moments)
    _check(*tensors, doubled)
    multiplier, offset, add, bias = map(_row, (multiplier, offset, add, bias))
    if not weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.contiguous()
    call = (x, weight, bias, multiplier, offset, silu, add, residual, output_scale, packed)
    if wanted() is None and not _plan(x, weight, doubled).winograd:
        return reference(*call, doubled=doubled, moments=moments)
    backend = choose("winograd_conv", x.device.type, supports, *tensors)
    if backend == "reference" or needs_grad(*tensors):
        return reference(*call, doubled=doubled, moments=moments)
    y = below_autograd(_OP, *call, *NO_NORM, doubled, moments)
    return y


def _plan(x: Tensor, weight: Tensor, doubled: bool) -> LayerPlan:
    return plan(x.shape[1], weight.shape[0], *_size_of_output(x, doubled))
