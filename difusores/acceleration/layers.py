"""Replacements of single layers: convolution, linear layer, group normalisation.

Images are computed in channels_last, where the pixels of an image are the rows of a matrix: a 1x1 convolution
is a matrix product. `apply_conv` and `apply_linear` are for the blocks around them: they go straight to a
layer's replacement, or call the layer where it has none or is watched by hooks.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difusores.acceleration.session import DTYPES, Forward, Packed, Session, hooked
from difusores.models.layers import GroupNormAct
from difusores.ops import group_norm_silu

CHANNELS_LAST = torch.channels_last
_MKLDNN = torch.ops.mkldnn
PACKING_SIDE = 32  # height and width for which oneDNN chooses the layout of packed weights


@cache
def linear_wants_packing(dtype: torch.dtype) -> bool:
    """Whether oneDNN with packed weights is faster than `F.linear`.

    In float32 that is MKL, which reaches the peak on Intel's processors and half of it on others.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    intel = cpuinfo.is_file() and "GenuineIntel" in cpuinfo.read_text(encoding="utf-8")
    return dtype is torch.bfloat16 or not intel


class LinearForward(Forward):
    """A linear layer in the session's dtype, by oneDNN with packed weights where that is faster."""

    how = "linear: one GEMM, weights packed by oneDNN where that is faster"

    def __init__(self, module: nn.Module, session: Session, keep_dtype: bool = False) -> None:
        super().__init__(module, session)
        self.dtype = None if keep_dtype else session.dtype
        self.weights = Packed(session)

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        return why_not_weight(module.weight)

    def declines(self, x: Tensor) -> str | None:
        return why_not_weight(self.module.weight)

    def run(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return matmul(input, self.module, self.dtype, self.weights)


def why_not_weight(weight: object) -> str | None:
    """Why no replacement works with this weight, or None."""
    if type(weight) is not nn.Parameter:
        return "its weight is no plain parameter"
    if not weight.is_cpu:
        return f"its weight is on {weight.device}"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}"
    return "its weight was made in inference mode" if weight.is_inference() else None


def matmul(x: Tensor, layer: Any, dtype: torch.dtype | None, packed: Packed) -> Tensor:
    """x [..., in] times the layer's weight [out, in] or [out, in, 1, 1], plus its bias.

    Args:
        dtype: to compute in; None for the weight's.
    """
    weight, bias = layer.weight, layer.bias
    dtype = dtype or weight.dtype
    x = x.to(dtype)
    matrix = weight.flatten(1)
    if linear_wants_packing(dtype):
        form = packed.get(
            (weight,),
            lambda: _MKLDNN._reorder_linear_weight(matrix.detach().to(dtype).contiguous()),
            weight.numel() * dtype.itemsize,
        )
        if form is not None:
            bias = bias if bias is None else bias.to(dtype)
            out: Tensor = _MKLDNN._linear_pointwise(x.contiguous(), form, bias, "none", [], "")
            return out
    bias = bias if bias is None else bias.to(dtype)
    return F.linear(x, matrix.to(dtype), bias)


class ConvForward(Forward):
    """A convolution in channels_last: a GEMM where it is 1x1, else oneDNN with packed weights."""

    how = "convolution: channels_last, weights packed by oneDNN; 1x1 as one GEMM"

    def __init__(self, module: nn.Module, session: Session, keep_dtype: bool = False) -> None:
        super().__init__(module, session)
        self.dtype = None if keep_dtype else session.dtype
        self.weights = Packed(session)

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"its padding is {module.padding_mode} {module.padding}"
        if module.groups != 1:
            return f"it has {module.groups} groups"
        return why_not_weight(module.weight)

    def declines(self, x: Tensor) -> str | None:
        if x.ndim != 4 or x.shape[1] != self.module.in_channels:
            return "the input's shape is not [N, C, H, W]"
        return why_not_weight(self.module.weight)

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product over the pixels."""
        m = self.module
        return (m.kernel_size, m.stride, m.padding) == ((1, 1), (1, 1), (0, 0))

    def run(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H', W'], in the layout in which it came."""
        out = self.apply(input)
        return out if input.is_contiguous(memory_format=CHANNELS_LAST) else out.contiguous()

    def tokens(self, x: Tensor) -> Tensor:
        """[N, L, C] -> [N, L, O], of a 1x1 convolution."""
        return matmul(x, self.module, self.dtype, self.weights)

    def apply(self, x: Tensor, residual: Tensor | None = None, owned: bool = False) -> Tensor:
        """The convolution plus `residual`, over whose memory it may write where `owned`; channels_last."""
        if self.pointwise:
            n, _, h, w = x.shape
            rows = x.contiguous(memory_format=CHANNELS_LAST).permute(0, 2, 3, 1).reshape(n, h * w, -1)
            out = self.tokens(rows).view(n, h, w, -1).permute(0, 3, 1, 2)
            return out if residual is None else out.add_(residual)
        return self._direct(x, residual, owned)

    def _direct(self, x: Tensor, residual: Tensor | None, owned: bool) -> Tensor:
        m = self.module
        weight, bias = m.weight, m.bias
        dtype = self.dtype or weight.dtype
        x = x.to(dtype).contiguous(memory_format=CHANNELS_LAST)
        bias = bias if bias is None else bias.to(dtype)
        options = [list(m.padding), list(m.stride), list(m.dilation), 1]
        form = None
        if torch.backends.mkldnn.is_available():
            form = self.weights.get(
                (weight,),
                lambda: _MKLDNN._reorder_convolution_weight(
                    weight.detach().to(dtype), *options, [1, m.in_channels, PACKING_SIDE, PACKING_SIDE]
                ),
                weight.numel() * dtype.itemsize,
            )
        if form is None:
            out: Tensor = F.conv2d(x, weight.to(dtype), bias, m.stride, m.padding, m.dilation)
            out = out.contiguous(memory_format=CHANNELS_LAST)
            return out if residual is None else out.add_(residual)
        if residual is None:
            out = _MKLDNN._convolution_pointwise(x, form, bias, *options, "none", [], "")
            return out
        residual = residual.to(dtype).contiguous(memory_format=CHANNELS_LAST)
        call = (x, form, bias, *options, "add", 1.0, None, [], None)
        if owned:
            out = _MKLDNN._convolution_pointwise_(residual, *call)
        else:
            out = _MKLDNN._convolution_pointwise(x, residual, *call[1:])
        return out


class GroupNormForward(Forward):
    """A group normalisation by the package's op."""

    how = "group norm: the package's op"
    invariant = True

    def run(self, input: Tensor) -> Tensor:
        """[N, C, *] -> the same."""
        return normalize(self.module, input, silu=False)


def normalize(norm: Any, x: Tensor, silu: bool, **terms: Any) -> Tensor:
    """A group normalisation, activated or not; terms: scale, shift, add of `group_norm_silu`."""
    out = group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu, **terms)
    assert isinstance(out, Tensor)
    return out


def plain_norm(norm: Any) -> bool:
    """Whether a block may compute this normalisation itself."""
    return type(norm) in (nn.GroupNorm, GroupNormAct) and not hooked(norm)


def apply_conv(layer: nn.Module, x: Tensor, residual: Tensor | None = None, owned: bool = False) -> Tensor:
    """layer(x) + residual; over residual's memory it may write where `owned`."""
    forward = layer.__dict__.get("forward")
    if type(forward) is ConvForward and not hooked(layer) and forward.declines(x) is None:
        return forward.apply(x, residual, owned)
    out: Tensor = layer(x)
    return out if residual is None else residual + out


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) of a linear layer on rows, or of a 1x1 convolution on the pixels of an image as rows."""
    forward = layer.__dict__.get("forward")
    if (
        isinstance(forward, LinearForward | ConvForward)
        and not hooked(layer)
        and not why_not_weight(layer.weight)
    ):
        return matmul(x, layer, forward.dtype, forward.weights)
    out: Tensor = layer(x)
    return out
