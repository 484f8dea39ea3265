"""Products of rows by a layer's weight on a CPU: whose is the fastest, and what forms of weights it reads.

The package's own product or a library's, MKL's or oneDNN's, chosen by the dtype and the processor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import native
from difusores.acceleration.session import Packed
from difusores.ops.gemm_conv import LANES, gemm_rows, multiplies_pairs, packed_numbers, splits
from difusores.ops.gemm_conv import pack_weight as pack_for_gemm

MKLDNN = torch.ops.mkldnn
PACKED_GAIN = 4.0  # of weights packed for the own product: a byte of Winograd's saves a third of the time
SPLIT_CHANNELS = 32  # in and out, from which on float32 as pairs of bfloat16 is faster: AMX's tiles


@cache
def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def fast_bfloat16_convolution() -> bool:
    """Whether direct convolutions in bfloat16 beat Winograd's in float32: with AMX's tiles.

    The dot products of AVX512_BF16 are twice as fast as float32's, and Winograd's algorithm saves more.
    """
    return "amx_bf16" in _cpuinfo()


def _mkl_is_fast() -> bool:
    """Whether MKL reaches the peak in float32: on Intel's processors; on others half of it with AVX-512."""
    return "GenuineIntel" in _cpuinfo()


@cache
def linear_wants_packing(dtype: torch.dtype) -> bool:
    """Whether oneDNN with packed weights is faster than `F.linear`, which is MKL in float32."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.bfloat16 or not _mkl_is_fast()


@cache
def own_product_is_faster(dtype: torch.dtype) -> bool:
    """Whether the package's own product is taken: with AVX-512, in bfloat16 with its pairs, it is faster.

    With AVX2 it is as fast as oneDNN's, and its bits are the same in any batch.
    """
    if native.status("cpu") is not None:
        return False
    if dtype is torch.bfloat16:
        return multiplies_pairs()
    level: str = native.build_info().get("isa_used", "")
    return level.startswith(("avx512", "amx")) or (level == "avx2" and not _mkl_is_fast())


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which takes a microsecond for nothing too."""
    return t if t.dtype is dtype else t.to(dtype)


def plus(out: Tensor, residual: Tensor | None) -> Tensor:
    """out + residual, in the memory of `out` where the dtype allows it."""
    if residual is None:
        return out
    return out.add_(residual) if out.dtype is residual.dtype else out + residual


def sources(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """What a form of a layer's weight and bias is made of."""
    return (weight,) if bias is None else (weight, bias)


def kept(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bias in a kernel's dtype, for all calls."""
    return bias if bias is None else cast(bias.detach(), dtype)


def library_product(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:
    """x [..., in] times weight [out, in] or [out, in, 1, 1] plus bias, by MKL or oneDNN in x's dtype.

    A session without a budget takes `F.linear`, since oneDNN would pack in every call. In one that has a
    budget the bits do not depend on what else it holds: without room, the call packs.
    """
    dtype = x.dtype
    matrix = weight if weight.ndim == 2 else weight.flatten(1)
    if not linear_wants_packing(dtype) or packed.session.budget == 0:
        bias = bias if bias is None else cast(bias, dtype)
        return F.linear(x, cast(matrix, dtype), bias)

    def pack() -> tuple[Tensor, Tensor | None]:
        return MKLDNN._reorder_linear_weight(matrix.detach().to(dtype).contiguous()), kept(bias, dtype)

    size = weight.numel() * dtype.itemsize
    form = packed.get(sources(weight, bias), pack, size, math.inf)  # to pack takes longer than to multiply
    out: Tensor = MKLDNN._linear_pointwise(x.contiguous(), *(form or pack()), "none", [], "")
    return out


def packed_together(x: Tensor, layers: Sequence[Any], packed: Packed) -> Tensor | None:
    """x [..., in] times the weights of linear layers, one beside the other, plus their biases.

    None where `library_product` would not have oneDNN pack them, the package's own product is faster, of
    which three are as fast, or they do not fit together; never for want of room, which changes no bits.
    """
    forwards = [layer.__dict__["forward"] for layer in layers]
    dtypes = {forward.dtype or layer.weight.dtype for forward, layer in zip(forwards, layers, strict=True)}
    biases = [layer.bias for layer in layers]
    weights = tuple(layer.weight for layer in layers)
    dtype = dtypes.pop()
    if dtypes or packed.session.invariant or packed.session.budget == 0:
        return None
    if not linear_wants_packing(dtype) or own_product_is_faster(dtype):
        return None
    if any(forward.quantized is not None for forward in forwards) or len({w.shape[1] for w in weights}) > 1:
        return None
    if any(b is None for b in biases) and any(b is not None for b in biases):
        return None

    def pack() -> tuple[Tensor, Tensor | None]:
        rows = torch.cat([w.detach().flatten(1) for w in weights]).to(dtype)
        bias = None if biases[0] is None else torch.cat([b.detach() for b in biases]).to(dtype)
        return MKLDNN._reorder_linear_weight(rows), bias

    size = sum(w.numel() for w in weights) * dtype.itemsize
    given = weights if biases[0] is None else (*weights, *biases)
    form = packed.get(given, pack, size, math.inf)  # as in `library_product`
    out: Tensor = MKLDNN._linear_pointwise(cast(x, dtype).contiguous(), *(form or pack()), "none", [], "")
    return out


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Packed,
    residual: Tensor | None = None,
    geglu: bool = False,
) -> Tensor | None:
    """x [..., in] times weight [out, in] or [out, in, 1, 1] plus bias, or GEGLU of that, plus a residual.

    By the package's own product, in which a row's bits are its own: in an `invariant` session, and where it
    is faster. In float32 with AMX tokens and pixels are multiplied as pairs of bfloat16, embeddings are not.
    Else None, and where it cannot end in GEGLU.
    """
    invariant = packed.session.invariant
    if not invariant and not own_product_is_faster(x.dtype):
        return None
    if geglu and weight.shape[0] % (2 * LANES):
        return None
    split = x.dtype is torch.float32 and x.ndim > 2 and multiplies_split(weight)
    form = form_for_gemm(weight, packed, x.dtype, PACKED_GAIN if invariant else math.inf, geglu, split)
    if form is None and not invariant and not packed.session.budget:  # it would be packed in every call
        return None
    if form is None:
        form = pack_for_gemm(as_kernel(weight), x.dtype, geglu, split)  # the same bits, slower
    return gemm_rows(x, weight, bias, residual=residual, packed=form, geglu=geglu)


def multiplies_split(weight: Tensor) -> bool:
    """Whether products of this weight in float32 are of pairs of bfloat16; told by its sizes, not by rows."""
    return splits() and min(weight.shape[:2]) >= SPLIT_CHANNELS


def form_for_gemm(
    weight: Tensor,
    packed: Packed,
    dtype: torch.dtype,
    gain: float = PACKED_GAIN,
    geglu: bool = False,
    split: bool = False,
) -> Tensor | None:
    """The packed weight, made at first use; None where memory is short, and the call makes it."""
    of = torch.bfloat16 if split else dtype

    def pack() -> Tensor:
        return pack_for_gemm(as_kernel(weight), dtype, geglu, split)

    def size() -> int:
        return of.itemsize * packed_numbers(weight, dtype, split)

    return packed.get((weight,), pack, size, gain, "split" if split else None)


def as_kernel(weight: Tensor) -> Tensor:
    """The weight of a linear layer as that of a 1x1 convolution; a convolution's as it is."""
    return weight if weight.ndim == 4 else weight[:, :, None, None]
