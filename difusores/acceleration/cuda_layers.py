"""Replacements of single layers on a GPU.

Convolutions are cuDNN's, in channels_last: the weight itself takes that memory format, so that nothing is
kept twice and nothing can be stale. PyTorch adds a bias after cuDNN in a pass of its own; here it goes with
the time embedding into the next normalisation, or with the residual into one pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difusores.acceleration.layers import (
    BY_LIBRARY,
    CHANNELS_LAST,
    POINTWISE,
    ConvForward,
    LinearForward,
    Surroundings,
    Way,
    why_not_weight,
)
from difusores.acceleration.norms import normalize
from difusores.acceleration.session import Forward, Session, hooked
from difusores.graphs import capturing
from difusores.ops import bias_residual
from difusores.ops import linear as linear_op
from difusores.ops.dispatch import transformed


class CudaLinearForward(LinearForward):
    """A linear layer; blocks around it call `rows`."""

    how = "linear: one GEMM with its bias"

    def declines(self, x: Tensor) -> str | None:
        return why_not(self.module.weight, x, self.session)

    def rows(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return linear(x, self.module, residual)


def why_not(weight: Tensor, x: Tensor, session: Session) -> str | None:
    """Why a layer of this weight goes to its class's forward, or None."""
    if weight.dtype is not x.dtype:
        return f"the input is {x.dtype} and its weight {weight.dtype}"
    return why_not_weight(weight, session)


def linear(x: Tensor, layer: Any, residual: Tensor | None = None) -> Tensor:
    """x [..., in] times the layer's weight [out, in] or [out, in, 1, 1], plus its bias and the residual."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    weight = weight if weight.ndim == 2 else weight.flatten(1)
    if residual is None:
        return F.linear(x, weight, bias)
    return linear_op(x, weight, bias, residual=residual)


class CudaConvForward(ConvForward):
    """A convolution in channels_last by cuDNN, or a GEMM; bias, time embedding and residual in one pass."""

    how = "convolution: channels_last, 1x1 as a GEMM; its bias with the residual or in the next norm"

    def __init__(self, module: nn.Module, session: Session, keep_dtype: bool = False) -> None:
        super().__init__(module, session, keep_dtype)
        self.changed = False

    def declines(self, x: Tensor) -> str | None:
        return super().declines(x) or why_not(self.module.weight, x, self.session)

    def release(self) -> None:
        weight = self.module.weight
        if (
            self.changed
            and type(weight) is nn.Parameter
            and weight.is_contiguous(memory_format=CHANNELS_LAST)
        ):
            weight.data = weight.detach().contiguous()
        self.changed = False

    def rows(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return linear(x, self.module, residual)

    def way(self, x: Tensor, doubled: bool = False) -> Way:
        return BY_LIBRARY

    def apply(self, x: Tensor, around: Surroundings) -> Tensor:
        m = self.module
        x = x.contiguous(memory_format=CHANNELS_LAST)
        if around.norm is not None:
            x = normalize(around.norm, x, silu=True, **around.modulation)
        if self.shape == POINTWISE:
            n, _, height, width = x.shape
            rows = x.permute(0, 2, 3, 1).reshape(n * height * width, -1)
            out = F.linear(rows, m.weight.flatten(1), m.bias if around.bias else None)
            out, bias = out.view(n, height, width, -1).permute(0, 3, 1, 2), None
        else:
            out = F.conv2d(x, self._weight(), None, m.stride, m.padding, m.dilation)
            out, bias = out.contiguous(memory_format=CHANNELS_LAST), m.bias if around.bias else None
        residual = around.residual
        if bias is None and around.add is None and residual is None and around.scale == 1:
            return out
        if residual is not None:
            residual = residual.to(out.dtype).contiguous(memory_format=CHANNELS_LAST)
        return bias_residual(out, bias, around.add, residual, around.scale, inplace=True)

    def _weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        if weight.is_contiguous() and not weight.is_contiguous(memory_format=CHANNELS_LAST):
            if capturing() is not None:
                return weight
            # A tensor made in inference mode would make the parameter such a tensor, for ever.
            with self.session.lock, torch.inference_mode(False), torch.no_grad():
                weight.data = weight.detach().contiguous(memory_format=CHANNELS_LAST)
            self.changed = True
        return weight


def leaves_its_bias(layer: nn.Module, x: Tensor) -> bool:
    """Whether a convolution can leave its bias to the next normalisation."""
    forward = layer.__dict__.get("forward")
    return (
        isinstance(forward, CudaConvForward)
        and not hooked(layer)
        and layer.bias is not None
        and forward.declines(x) is None
    )


class TimestepsForward(Forward):
    """Sinusoids of the timestep: frequencies computed once, sine and cosine written where they belong."""

    how = "sinusoids: frequencies computed once"

    def __init__(self, module: nn.Module, session: Session) -> None:
        super().__init__(module, session)
        self.frequencies: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "frequencies": None}

    def _why_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        t = args[0] if args else next(iter(kwargs.values()), None)
        watched = torch.compiler.is_compiling() or transformed() or torch._C._is_tracing()
        if not watched and type(t) is Tensor and t.device.type == self.session.device:
            return None  # the base asks for floating point
        return super()._why_plain(args, kwargs)

    def declines(self, timesteps: Tensor) -> str | None:
        return None if timesteps.ndim == 1 else "the times' shape is not [N]"

    def run(self, timesteps: Tensor) -> Tensor:
        m, half = self.module, self.module.num_channels // 2
        if timesteps.dtype is torch.float64:
            timesteps = timesteps.float()
        angles = timesteps[:, None] * self._frequencies(timesteps.device, half)
        if getattr(m, "scale", 1) != 1:
            angles = m.scale * angles
        shape = (timesteps.shape[0], m.num_channels)
        odd = m.num_channels % 2
        out = angles.new_zeros(shape) if odd else angles.new_empty(shape)
        first, second = out[:, :half], out[:, half : 2 * half]
        if m.flip_sin_to_cos:
            first, second = second, first
        torch.sin(angles, out=first)
        torch.cos(angles, out=second)
        return out

    def _frequencies(self, device: torch.device, half: int) -> Tensor:
        known = self.frequencies
        if known is not None and known.device == device:
            return known
        exponents = torch.arange(half, dtype=torch.float32, device=device) * -math.log(10000)
        found: Tensor = (exponents / (half - self.module.downscale_freq_shift)).exp()
        if capturing() is None:
            self.frequencies = found
        return found
