"""Convolution as one matrix product, with a bias and a residual: what Winograd's algorithm does not take.

    y[n, o, p] = sum over taps t and channels c of weight[o, c, t] * x[n, c, p * stride + t - padding]
                 + bias[o] + residual[n, o, p]

in fp32 or bf16, the latter with sums in fp32 and on processors with products of bf16 pairs; in fp32 also
GEGLU of the product and bias (half of it times GELU of the other half), to which the residual is added.

A linear layer is a 1x1 convolution of rows. An output's bits depend on its inputs alone: not on the batch and
not on the number of threads, neither of which libraries promise.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import native
from difusores.ops.dispatch import LIBRARY, below_autograd, choose, needs_grad, register, straight_to_cpu

LIBRARY.define(
    "gemm_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int stride_h, int stride_w, "
    "int padding_h, int padding_w, Tensor packed, bool geglu=False) -> Tensor"
)
register("gemm_conv", "cpu")

LANES = 16  # output channels are computed in multiples of it
COLUMNS = 64  # output channels of a panel
DTYPES = (torch.float32, torch.bfloat16)
PAIRS = 32  # of a panel in bf16, and input channels that lie together in it


NEEDS_PAIRS = "the kernel in bfloat16 needs AVX-512 with products of bf16 pairs"


@cache
def multiplies_pairs() -> bool:
    """Whether this process has a kernel for bf16."""
    return native.build_info().get("isa_used") in ("avx512_bf16", "amx")


def vector() -> int:
    """Floats in a vector of this process's kernel."""
    return {"base": 4, "avx2": 8}.get(native.build_info().get("isa_used", ""), LANES)


def pack_weight(weight: Tensor, dtype: torch.dtype = torch.float32, geglu: bool = False) -> Tensor:
    """The weight as the kernel reads it: panels of output channels, each [taps, channels in, channels out].

    For bf16 [taps, channels in / 2, channels out, 2], channels rounded up to 32. For GEGLU a vector of gates
    follows each vector of values.

    The tensor is read as it is: make it anew when `weight` changes, and do not save it: its layout is that
    of this version.

    Args:
        weight: [O, C, kh, kw] fp32 or bf16.
        dtype: of the images; fp32 or bf16.
        geglu: of a product that ends in GEGLU: fp32, O a multiple of 32.

    Returns:
        [kh * kw * C * O] of that dtype, O rounded up to a multiple of 16; bf16: C and O to one of 32.

    Raises:
        ValueError: another shape or dtype.
    """
    if weight.ndim != 4 or weight.dtype not in DTYPES or dtype not in DTYPES:
        raise ValueError(
            "weight must be float32 or bfloat16 [O, C, kh, kw], and packed for one of them, "
            f"got {weight.dtype} {tuple(weight.shape)} for {dtype}"
        )
    if dtype is torch.bfloat16:
        rows = weight.detach().permute(0, 2, 3, 1).to(dtype).contiguous()
        rows = F.pad(rows, (0, -rows.shape[3] % PAIRS)).flatten(1).view(torch.int32)  # of two channels each
        rows = F.pad(rows, (0, 0, 0, -rows.shape[0] % PAIRS))
        pairs = rows.view(-1, PAIRS, rows.shape[1]).transpose(1, 2).contiguous()
        return pairs.flatten().view(dtype)
    rows = weight.detach().to(dtype).permute(0, 2, 3, 1).flatten(1)
    if geglu:
        rows = rows.view(2, -1, vector(), rows.shape[1]).transpose(0, 1).reshape(rows.shape)
    rows = F.pad(rows, (0, 0, 0, -rows.shape[0] % LANES))
    packed = rows.new_empty(rows.numel())
    whole = rows.shape[0] // COLUMNS * COLUMNS
    for part, at, columns in ((rows[:whole], 0, COLUMNS), (rows[whole:], whole, rows.shape[0] - whole)):
        if len(part):
            panels = packed[at * rows.shape[1] :][: part.numel()].view(-1, rows.shape[1], columns)
            panels.copy_(part.view(-1, columns, rows.shape[1]).transpose(1, 2))
    return packed


def packed_numbers(weight: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Elements of `pack_weight(weight, dtype)`."""
    o, c, *taps = weight.shape
    if dtype is torch.bfloat16:
        return math.prod(taps) * -(-c // PAIRS) * PAIRS * -(-o // PAIRS) * PAIRS
    return math.prod(taps) * c * -(-o // LANES) * LANES


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    y = F.conv2d(x, weight, bias, (stride_h, stride_w), (padding_h, padding_w))
    if geglu:
        value, gate = y.chunk(2, dim=1)
        y = value * F.gelu(gate)
    y = y if residual is None else y + residual
    return y.contiguous(memory_format=torch.channels_last)


LIBRARY.impl("gemm_conv", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::gemm_conv", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride_h: int,
    stride_w: int,
    padding_h: int,
    padding_w: int,
    packed: Tensor,
    geglu: bool = False,
) -> Tensor:
    height = (x.shape[2] + 2 * padding_h - weight.shape[2]) // stride_h + 1
    width = (x.shape[3] + 2 * padding_w - weight.shape[3]) // stride_w + 1
    shape = (x.shape[0], weight.shape[0] // (2 if geglu else 1), height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_OP = torch.ops.difusores.gemm_conv.default


def supports(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geglu: bool = False,
) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    if x.dtype not in DTYPES:
        return f"the kernel takes float32 and bfloat16, not {x.dtype}"
    if x.dtype is torch.bfloat16 and not multiplies_pairs():
        return NEEDS_PAIRS
    if geglu and (x.dtype is not torch.float32 or weight.shape[0] % (2 * LANES)):
        return "the kernel takes GEGLU in float32 and of a multiple of 32 channels"
    if residual is not None and residual.dtype is not x.dtype:
        return f"the kernel takes a residual in {x.dtype}, not {residual.dtype}"
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype not in DTYPES:
            return f"the kernel takes a {name} in float32 or bfloat16, not {t.dtype}"
    return None


def gemm_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    packed: Tensor | None = None,
    geglu: bool = False,
) -> Tensor:
    """y = conv(x, weight) + bias + residual, channels_last, to which x and residual are copied if need be.

    Args:
        x: [N, C, H, W]; the kernel takes fp32 and bf16 on the CPU, all else goes to `F.conv2d`.
        weight: [O, C, kh, kw], rounded to x's dtype.
        bias: [O] or None; the kernel adds it in fp32.
        residual: like y, or None.
        stride, padding: down and across; what is outside the image is zero.
        packed: `pack_weight(weight, x.dtype, geglu)`; made anew in the call if None.
        geglu: y = GEGLU(conv(x, weight) + bias) + residual: the first half of the channels times GELU (by
            erf) of the second. The kernel takes it in fp32.

    Returns:
        y [N, O, H', W'] in x's dtype, with geglu O / 2 channels. Where a gradient is needed the reference
        runs, and the call is differentiable in every tensor but `packed`.

    Raises:
        ValueError: shapes that do not fit, named.
    """
    if packed is not None and straight_to_cpu(x, weight, bias, residual, packed):
        try:
            with torch._C._AutoDispatchBelowAutograd():
                y: Tensor = _OP(x, weight, bias, residual, *stride, *padding, packed, geglu)
            return y
        except (RuntimeError, TypeError):
            pass  # the kernel refused; what follows finds another way or the words for it
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
    if geglu and weight.shape[0] % 2:
        raise ValueError(f"with geglu O is even, for value and gate; weight has {weight.shape[0]}")
    shape = (x.shape[0], weight.shape[0] // (2 if geglu else 1), *sizes)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [O] = [{weight.shape[0]}], got {tuple(bias.shape)}")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must have y's shape {shape}, got {tuple(residual.shape)}")
    numbers = packed_numbers(weight, x.dtype)
    if packed is not None and (packed.shape != (numbers,) or packed.dtype is not x.dtype):
        raise ValueError(
            f"packed must be pack_weight(weight, {x.dtype}, {geglu}), [{numbers}], "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    geometry = (*stride, *padding)
    tensors = (x, weight, bias, residual)
    nothing = x.new_empty(0)
    if needs_grad(*tensors):
        return reference(*tensors, *geometry, nothing, geglu)
    backend = choose("gemm_conv", x.device.type, supports, *tensors, geglu)
    if backend == "reference":
        return reference(*tensors, *geometry, nothing, geglu)
    if packed is None:
        packed = pack_weight(weight, x.dtype, geglu)
    bias = bias if bias is None else bias.contiguous()
    x = x.contiguous(memory_format=torch.channels_last)
    residual = residual if residual is None else residual.contiguous(memory_format=torch.channels_last)
    y = below_autograd(_OP, x, weight, bias, residual, *geometry, packed, geglu)
    return y
