"""Convolution as one matrix product, with what surrounds it: what Winograd's algorithm does not take.

    h = act(multiplier[n, c] * x[n, c, p] + offset[n, c])
    y[n, o, p] = sum over taps t and channels c of weight[o, c, t] * h[n, c, p * stride + t - padding]
                 + bias[o] + add[n, o] + residual[n, o, p]

or GEGLU of the product and bias (half of it times GELU of the other half), plus residual, in fp32 or bf16,
the latter with sums in fp32 and on processors with products of bf16 pairs. The kernel in fp32 has no
multiplier, offset and add, for which there are passes of their own.

An image in fp32 may be multiplied in bf16 too: by a weight that was packed for bf16 x is rounded where it
is read, after what comes before it, and bias, add, residual and y are fp32.

With AMX a 1x1 convolution in fp32 can be multiplied as pairs of bf16, x = h + l with h = bf16(x) and
l = bf16(x - h), as h_x h_w + h_x l_w + l_x h_w with sums in fp32. |l| is at most 2^-8 |x|, and so l_x l_w,
which is left out, and what rounding l_x and l_w changes are each at most 2^-16 of a product: together
4.6e-5 at most, 4e-6 in the root mean square, of whichever sign. A weight that was packed with `split`
asks for it.

A linear layer is a 1x1 convolution of rows. An output's bits depend on its inputs alone: not on the batch and
not on the number of threads, neither of which libraries promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import native
from difusores.ops.dispatch import LIBRARY, below_autograd, choose, needs_grad, register, straight_to_cpu

LIBRARY.define(
    "gemm_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? multiplier, Tensor? offset, bool silu, "
    "Tensor? add, Tensor? residual, int stride_h, int stride_w, int padding_h, int padding_w, "
    "Tensor packed, bool geglu=False) -> Tensor"
)
LIBRARY.define("gemm_conv_pack(Tensor[] weights, bool pairs, bool geglu, bool split) -> Tensor")
register("gemm_conv", "cpu")

LANES = 16  # output channels are computed in multiples of it
COLUMNS = 64  # output channels of a panel
DTYPES = (torch.float32, torch.bfloat16)
PAIRS = 32  # of a panel in bf16, and input channels that lie together in it


NEEDS_PAIRS = "the kernel in bfloat16 needs AVX-512 with products of bf16 pairs"


NEEDS_SPLIT = "float32 as pairs of bfloat16 is for 1x1 convolutions and needs AVX-512 with AMX"


@cache
def splits() -> bool:
    """Whether this process has a kernel for fp32 as pairs of bf16."""
    return native.build_info().get("isa_used") == "amx"


@cache
def multiplies_pairs() -> bool:
    """Whether this process has a kernel for bf16."""
    return native.build_info().get("isa_used") in ("avx512_bf16", "amx")


def vector() -> int:
    """Floats in a vector of this process's kernel."""
    return {"base": 4, "avx2": 8}.get(native.build_info().get("isa_used", ""), LANES)


def pack_weight(
    weight: Tensor, dtype: torch.dtype = torch.float32, geglu: bool = False, split: bool = False
) -> Tensor:
    """The weight as the kernel reads it: panels of output channels, each [taps, channels in, channels out].

    For bf16 [channels in / 32, taps, 16, channels out, 2], channels rounded up to 32. For GEGLU a vector of
    gates follows each vector of values.

    Split, for a product in fp32 of pairs of bf16: [channels out / 32, channels in / 32, high and low parts,
    16, 32, 2]. A call that gets it uses that product, whose error is 4e-6 (relative L2, of outputs in which
    products do not cancel) and not 1e-7. Numbers beyond 3.38e38 or infinite make an output NaN, and those
    below 1e-33 lose their low part.

    The tensor is read as it is: make it anew when `weight` changes, and do not save it: its layout is that
    of this version.

    Args:
        weight: [O, C, kh, kw] fp32 or bf16.
        dtype: of the images; fp32 or bf16.
        geglu: of a product that ends in GEGLU: O a multiple of 32.
        split: of a 1x1 convolution in fp32.

    Returns:
        [kh * kw * C * O] of that dtype, O rounded up to a multiple of 16; bf16: C and O to one of 32;
        split: [2 * C * O] of bf16, rounded up likewise.

    Raises:
        ValueError: another shape or dtype.
    """
    if weight.ndim != 4 or weight.dtype not in DTYPES or dtype not in DTYPES:
        raise ValueError(
            "weight must be float32 or bfloat16 [O, C, kh, kw], and packed for one of them, "
            f"got {weight.dtype} {tuple(weight.shape)} for {dtype}"
        )
    if split and (dtype is not torch.float32 or weight.shape[2:] != (1, 1)):
        raise ValueError(
            "split is for a weight [O, C, 1, 1] and products in float32, "
            f"got {tuple(weight.shape)} for {dtype}"
        )
    if geglu and weight.shape[0] % (2 * LANES):
        raise ValueError(f"packed for GEGLU O is a multiple of {2 * LANES}, got {tuple(weight.shape)}")
    with torch.no_grad():
        return _PACK([weight], split or dtype is torch.bfloat16, geglu, split)


def pack_rows(weights: Sequence[Tensor]) -> Tensor:
    """`pack_weight` of the weights of several linear layers, one below the other, for x in their dtype.

    Args:
        weights: each [O, C], of the same C; fp32 or bf16.

    Returns:
        As of one weight [sum of O, C, 1, 1].
    """
    with torch.no_grad():
        return _PACK(
            [w.contiguous()[:, :, None, None] for w in weights],
            weights[0].dtype is torch.bfloat16,
            False,
            False,
        )


def pack_reference(weights: Sequence[Tensor], pairs: bool, geglu: bool, split: bool) -> Tensor:
    """The packing in plain PyTorch, of weights [O, C, kh, kw] one below the other."""
    weight = torch.cat(list(weights))
    if split:
        exact = weight.float().flatten(1)
        if geglu:
            exact = exact.view(2, -1, LANES, exact.shape[1]).transpose(0, 1).reshape(exact.shape)
        high = exact.to(torch.bfloat16)
        halves = [
            pack_reference([half[:, :, None, None]], True, False, False) for half in (high, exact - high)
        ]
        return torch.stack([half.view(-1, PAIRS * PAIRS) for half in halves], dim=1).flatten()
    if pairs:
        taps = weight.flatten(2).to(torch.bfloat16)
        if geglu:
            taps = taps.view(2, -1, LANES, *taps.shape[1:]).transpose(0, 1).reshape(taps.shape)
        taps = F.pad(taps, (0, 0, 0, -weight.shape[1] % PAIRS))
        words = taps.unflatten(1, (-1, PAIRS)).transpose(2, 3).flatten(1).view(torch.int32)  # of channels
        rows = F.pad(words, (0, 0, 0, -words.shape[0] % PAIRS))
        words = rows.view(-1, PAIRS, rows.shape[1]).transpose(1, 2).contiguous()
        return words.flatten().view(torch.bfloat16)
    rows = weight.float().permute(0, 2, 3, 1).flatten(1)
    if geglu:
        rows = rows.view(2, -1, vector(), rows.shape[1]).transpose(0, 1).reshape(rows.shape)
    rows = F.pad(rows, (0, 0, 0, -rows.shape[0] % LANES))
    return torch.cat([panel.t().flatten() for panel in rows.split(COLUMNS)])


LIBRARY.impl("gemm_conv_pack", pack_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::gemm_conv_pack", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _pack_fake(weights: Sequence[Tensor], pairs: bool, geglu: bool, split: bool) -> Tensor:
    shape = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])
    dtype = torch.bfloat16 if pairs else torch.float32
    count = packed_numbers(weights[0].new_empty(shape), torch.float32 if split else dtype, split)
    return weights[0].new_empty(count, dtype=dtype)


_PACK: Callable[..., Tensor] = torch.ops.difusores.gemm_conv_pack.default


def packed_numbers(weight: Tensor, dtype: torch.dtype = torch.float32, split: bool = False) -> int:
    """Elements of `pack_weight(weight, dtype, split=split)`."""
    o, c, *taps = weight.shape
    if split:
        return 2 * packed_numbers(weight, torch.bfloat16)
    if dtype is torch.bfloat16:
        return math.prod(taps) * -(-c // PAIRS) * PAIRS * -(-o // PAIRS) * PAIRS
    return math.prod(taps) * c * -(-o // LANES) * LANES


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    offset: Tensor | None,
    silu: bool,
    add: Tensor | None,
    residual: Tensor | None,
    stride_h: int,
    stride_w: int,
    padding_h: int,
    padding_w: int,
    packed: Tensor,
    geglu: bool = False,
) -> Tensor:
    """The op in plain PyTorch; `packed` is not read."""
    weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
    if _is_rows(x, weight):
        y = F.linear(x, weight.flatten(1), bias)
        if geglu:
            value, gate = y.chunk(2, dim=-1)
            y = value * F.gelu(gate)
        return y if residual is None else y + residual
    x = _before(x, multiplier, offset, silu)
    y = F.conv2d(x, weight, bias, (stride_h, stride_w), (padding_h, padding_w))
    y = y if add is None else y + add.to(y.dtype)[:, :, None, None]
    if geglu:
        value, gate = y.chunk(2, dim=1)
        y = value * F.gelu(gate)
    y = y if residual is None else y + residual
    return y.contiguous(memory_format=torch.channels_last)


def _is_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the op takes x as rows [..., C]: of other than four dimensions, or for a weight [O, C]."""
    return x.ndim != 4 or weight.ndim == 2


def _before(x: Tensor, multiplier: Tensor | None, offset: Tensor | None, silu: bool) -> Tensor:
    """act(multiplier * x + offset), in fp32 or wider before it is rounded to x's dtype."""
    if multiplier is None or offset is None:
        return x
    h = multiplier[:, :, None, None] * x + offset[:, :, None, None]
    return (F.silu(h) if silu else h).to(x.dtype)


LIBRARY.impl("gemm_conv", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::gemm_conv", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    offset: Tensor | None,
    silu: bool,
    add: Tensor | None,
    residual: Tensor | None,
    stride_h: int,
    stride_w: int,
    padding_h: int,
    padding_w: int,
    packed: Tensor,
    geglu: bool = False,
) -> Tensor:
    channels = weight.shape[0] // (2 if geglu else 1)
    if _is_rows(x, weight):
        return x.new_empty((*x.shape[:-1], channels))
    height = (x.shape[2] + 2 * padding_h - weight.shape[2]) // stride_h + 1
    width = (x.shape[3] + 2 * padding_w - weight.shape[3]) // stride_w + 1
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_OP = torch.ops.difusores.gemm_conv.default


def supports(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    offset: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    geglu: bool = False,
    split: bool = False,
    rounded: bool = False,
) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    if x.dtype not in DTYPES:
        return f"the kernel takes float32 and bfloat16, not {x.dtype}"
    if (rounded or x.dtype is torch.bfloat16) and not multiplies_pairs():
        return NEEDS_PAIRS
    if split and not splits():
        return NEEDS_SPLIT
    if geglu and (weight.shape[0] % (2 * LANES) or add is not None):
        return "the kernel takes GEGLU of a multiple of 32 channels, to which nothing was added"
    if residual is not None and residual.dtype is not x.dtype:
        return f"the kernel takes a residual in {x.dtype}, not {residual.dtype}"
    for name, t in (("weight", weight), ("bias", bias), ("add", add)):
        if t is not None and t.dtype not in DTYPES:
            return f"the kernel takes a {name} in float32 or bfloat16, not {t.dtype}"
    for name, t in (("multiplier", multiplier), ("offset", offset)):
        if t is not None and t.dtype is not torch.float32:
            return f"the kernel takes a {name} in float32, not {t.dtype}"
    return None


Prepared = Callable[[Tensor, "Tensor | None"], Tensor]


def prepared(weight: Tensor, bias: Tensor | None, packed: Tensor) -> Prepared:
    """The product of rows or pixels with a weight [O, C] or [O, C, 1, 1], as a function of x and residual.

    For callers who have made sure that the kernel is to answer: it raises RuntimeError where it refuses.
    """

    def multiply(x: Tensor, residual: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = _OP(x, weight, bias, None, None, False, None, residual, 1, 1, 0, 0, packed, False)
        return y

    return multiply


def gemm_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    multiplier: Tensor | None = None,
    offset: Tensor | None = None,
    silu: bool = False,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    packed: Tensor | None = None,
    geglu: bool = False,
) -> Tensor:
    """y = conv(act(multiplier * x + offset), weight) + bias + add + residual, channels_last.

    x and residual are copied to channels_last if need be.

    Args:
        x: [N, C, H, W]; the kernel takes fp32 and bf16 on the CPU, all else goes to `F.conv2d`.
        weight: [O, C, kh, kw], rounded to x's dtype.
        bias: [O] or None; the kernel adds it in fp32.
        multiplier, offset: [N, C] fp32, both or neither, applied to x before the convolution and rounded
            to its dtype (`group_norm_affine` makes them of a group norm); padding is zero after them.
        silu: whether act is SiLU, where there is a multiplier; else the identity.
        add: [N, O] (a time embedding) or None.
        residual: like y, or None.
        stride, padding: down and across; what is outside the image is zero.
        packed: `pack_weight(weight, x.dtype, geglu)`, made anew in the call if None; of x in fp32 also
            `pack_weight(weight, torch.bfloat16, geglu)`, with which x and weight are rounded to bf16 before
            they are multiplied; or the first with `split`, for a 1x1 convolution in fp32, stride 1 and
            without padding.
        geglu: y = GEGLU(conv(…) + bias + add) + residual: the first half of the channels times GELU (by
            erf) of the second. The kernel takes it without add, of O a multiple of 32.

    Returns:
        y [N, O, H', W'] in x's dtype, with geglu O / 2 channels. Where a gradient is needed the reference
        runs, and the call is differentiable in every tensor but `packed`.

    Raises:
        ValueError: shapes that do not fit, named.
    """
    terms = (multiplier, offset, add)
    halves = packed is not None and packed.dtype is torch.bfloat16 and x.dtype is torch.float32
    rounded = halves and packed is not None and packed.numel() == packed_numbers(weight, torch.bfloat16)
    of_pairs, split = rounded or x.dtype is torch.bfloat16, halves and not rounded
    if packed is not None and straight_to_cpu(x, weight, bias, *terms, residual, packed):
        try:
            with torch._C._AutoDispatchBelowAutograd():
                y: Tensor = _OP(
                    x, weight, bias, multiplier, offset, silu, add, residual, *stride, *padding, packed, geglu
                )
            return y
        except (RuntimeError, TypeError):
            pass  # the kernel refused; what follows finds another way or the words for it
    _check(x, weight, bias, *terms, residual, stride, padding, packed, geglu, split, rounded)
    geometry = (*stride, *padding)
    tensors = (x, weight, bias, *terms, residual)
    nothing = x.new_empty(0)
    if needs_grad(*tensors):
        return reference(x, weight, bias, multiplier, offset, silu, add, residual, *geometry, nothing, geglu)
    backend = choose("gemm_conv", x.device.type, supports, *tensors, geglu, split, rounded)
    if backend == "reference":
        return reference(x, weight, bias, multiplier, offset, silu, add, residual, *geometry, nothing, geglu)
    if packed is None:
        packed = pack_weight(weight, x.dtype, geglu)
    bias, multiplier, offset, add = map(_row, (bias, *terms))
    x = x.contiguous(memory_format=torch.channels_last)
    residual = residual if residual is None else residual.contiguous(memory_format=torch.channels_last)
    if of_pairs:
        call = (x, weight, bias, multiplier, offset, silu, add, residual, *geometry, packed, geglu)
        y = below_autograd(_OP, *call)
        return y
    x = _before(x, multiplier, offset, silu)
    y = below_autograd(_OP, x, weight, bias, None, None, False, None, residual, *geometry, packed, geglu)
    return y if add is None else y.add_(add[:, :, None, None])


def gemm_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
    geglu: bool = False,
) -> Tensor:
    """A linear layer by `gemm_conv`: x weight^T + bias + residual, or GEGLU of the first two plus residual.

    The same bits; with `packed` rows go to the kernel as they are, without views of them as an image.

    Args:
        x: [..., C].
        weight: [O, C] or [O, C, 1, 1].
        bias, packed, geglu: see `gemm_conv`; packed of the weight as [O, C, 1, 1].
        residual: [..., O], with geglu [..., O / 2], or None.

    Returns:
        [..., O] in x's dtype, contiguous; with geglu [..., O / 2].

    Raises:
        ValueError: shapes that do not fit, named.
    """
    if packed is not None and _is_rows(x, weight) and straight_to_cpu(x, weight, bias, residual, packed):
        x, residual = x.contiguous(), residual if residual is None else residual.contiguous()
        call = (x, weight, bias, None, None, False, None, residual, 1, 1, 0, 0, packed, geglu)
        try:
            with torch._C._AutoDispatchBelowAutograd():
                y: Tensor = _OP(*call)
            return y
        except (RuntimeError, TypeError):
            pass  # as in `gemm_conv`
    if x.numel() == 0:  # no image
        return reference(x, weight, bias, None, None, False, None, residual, 1, 1, 0, 0, x, geglu)
    kernel = weight if weight.ndim == 4 else weight[:, :, None, None]
    columns = residual if residual is None else _as_columns(residual)
    out = gemm_conv(_as_columns(x), kernel, bias, residual=columns, packed=packed, geglu=geglu)
    return out[0, :, :, 0].t().reshape(*x.shape[:-1], -1)


def _as_columns(x: Tensor) -> Tensor:
    """[..., C] as an image of one column, [1, C, rows, 1], channels_last."""
    return x.reshape(-1, x.shape[-1]).contiguous().t()[None, :, :, None]


def _row(p: Tensor | None) -> Tensor | None:
    """p with its channels side by side, as the kernel reads them."""
    return p if p is None or p.stride(-1) == 1 else p.contiguous()


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    offset: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    packed: Tensor | None,
    geglu: bool,
    split: bool,
    rounded: bool,
) -> None:
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            "x must be [N, C, H, W] and weight [O, C, kh, kw], "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    sizes = [(x.shape[2 + d] + 2 * padding[d] - weight.shape[2 + d]) // max(stride[d], 1) + 1 for d in (0, 1)]
    if min(*stride, *sizes) < 1 or min(padding) < 0:
        raise ValueError(
            f"stride {stride}, padding {padding} and a kernel of {tuple(weight.shape[2:])} "
            f"leave nothing of an image of {tuple(x.shape[2:])}"
        )
    (n, c), o = x.shape[:2], weight.shape[0]
    if geglu and o % 2:
        raise ValueError(f"with geglu O is even, for value and gate; weight has {o}")
    shape = (n, o // (2 if geglu else 1), *sizes)
    if bias is not None and bias.shape != (o,):
        raise ValueError(f"bias must have shape [O] = [{o}], got {tuple(bias.shape)}")
    if (multiplier is None) != (offset is None):
        raise ValueError("multiplier and offset go together: one of them is None")
    for name, p, channels in (("multiplier", multiplier, c), ("offset", offset, c), ("add", add, o)):
        if p is not None and p.shape != (n, channels):
            raise ValueError(f"{name} must have shape {[n, channels]}, got {tuple(p.shape)}")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must have y's shape {shape}, got {tuple(residual.shape)}")
    split = split and weight.shape[2:] == stride == (1, 1) and padding == (0, 0)
    dtype = torch.bfloat16 if split or rounded else x.dtype
    numbers = packed_numbers(weight, x.dtype if split else dtype, split)
    if packed is not None and (packed.shape != (numbers,) or packed.dtype is not dtype):
        raise ValueError(
            f"packed must be pack_weight(weight, {x.dtype}, {geglu}), [{numbers}], "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
