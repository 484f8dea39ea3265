"""Layers in 8 bits by oneDNN's quantised operations, on VNNI or AMX tiles (approximate).

    y = s_x s_w (q_x - z) . q_w + b
    q_x = round(x / s_x) + z in [0, 255],  q_w = round(w / s_w) in [-127, 127]

Without VNNI, processors add two products in 16 bits, which 255 overflows: there q_x goes to 127 alone.
Each output channel of the weights has a scale of its own; all of a layer's input has one, and one zero point,
from the least and greatest value that `calibrate` saw. Inputs beyond them are cut off, and NaN is not carried
on. Sums are integers, so the bits depend on nothing but the input. A quarter of float32's weights is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from difusores.acceleration.session import Packed, Session

_ONEDNN = torch.ops.onednn
WEIGHT_LEVELS = 127
PACKING_SIDE = 32  # height and width for which oneDNN chooses the layout of a convolution's weights
AS_IT_IS: tuple[Any, ...] = ("none", [], "")  # no operation after the sum


@cache
def input_levels() -> int:
    """The largest input that is multiplied right, by trial."""
    rows, weights = torch.full((16, 64), 255, dtype=torch.uint8), torch.full((32, 64), 127, dtype=torch.int8)
    grid = torch.ones(32), torch.zeros(32, dtype=torch.int32), None
    packed = _ONEDNN.qlinear_prepack(weights, None)
    sums = _ONEDNN.qlinear_pointwise(rows, 1.0, 0, packed, *grid, 1.0, 0, torch.float32, *AS_IT_IS)
    return 255 if bool((sums == 255 * 127 * 64).all()) else 127


class Quantized:
    """One linear layer or convolution in 8 bits.

    Attributes:
        low, high: the least and greatest input seen, and zero.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.low = self.high = 0.0
        self.weights = Packed(session)
        self._scales: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether it computes, or watches inputs."""
        return self.session.calibrating or self.ready

    @property
    def ready(self) -> bool:
        """Whether inputs have been seen, all of them finite."""
        return 0 < self.high - self.low < math.inf

    def linear(self, x: Tensor, layer: Any) -> Tensor | None:
        """x [..., in] by a linear layer or 1x1 convolution; None while inputs are watched."""
        if self._watches(x):
            return None
        packed = self._packed(layer, lambda q: _ONEDNN.qlinear_prepack(q.flatten(1), None))
        if packed is None:
            return None
        rows = self._quantize(x.reshape(-1, x.shape[-1]))
        out: Tensor = _ONEDNN.qlinear_pointwise(
            *rows, packed, *self._of_weights(layer), 1.0, 0, x.dtype, *AS_IT_IS
        )
        return out.view(*x.shape[:-1], -1)

    def convolution(self, x: Tensor, layer: Any) -> Tensor | None:
        """x [N, C, H, W], channels_last, by a convolution; None while inputs are watched."""
        if self._watches(x):
            return None
        scale, zero = self._grid()
        options = (list(layer.stride), list(layer.padding), list(layer.dilation), 1)
        shape = [1, layer.in_channels, PACKING_SIDE, PACKING_SIDE]
        packed = self._packed(
            layer, lambda q: _ONEDNN.qconv_prepack(q, self._scales, scale, zero, *options, shape)
        )
        if packed is None:
            return None
        out: Tensor = _ONEDNN.qconv_pointwise(
            *self._quantize(x), packed, *self._of_weights(layer), *options, 1.0, 0, x.dtype, *AS_IT_IS
        )
        return out

    def _watches(self, x: Tensor) -> bool:
        """Whether this input is to be seen, and not computed in 8 bits."""
        if self.session.calibrating:
            low, high = x.aminmax()
            self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
            return True
        return not self.ready

    def _grid(self) -> tuple[float, int]:
        scale = (self.high - self.low) / input_levels()
        return scale, round(-self.low / scale)

    def _quantize(self, x: Tensor) -> tuple[Tensor, float, int]:
        scale, zero = self._grid()
        # one half more, because the conversion cuts off
        levels = torch.add(torch.tensor(zero + 0.5), x.float(), alpha=1 / scale)
        return levels.clamp_(0, input_levels()).to(torch.uint8), scale, zero

    def _packed(self, layer: Any, pack: Callable[[Tensor], Tensor]) -> Tensor | None:
        weight = layer.weight

        def make() -> Tensor:
            wide = weight.detach().float()
            scales = wide.flatten(1).abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny) / WEIGHT_LEVELS
            self._scales = scales
            levels = (wide / scales.view(-1, *[1] * (wide.ndim - 1))).round_()
            return pack(levels.clamp_(-WEIGHT_LEVELS, WEIGHT_LEVELS).to(torch.int8))

        return self.weights.get((weight,), make, weight.numel(), math.inf)

    def _of_weights(self, layer: Any) -> tuple[Tensor | None, ...]:
        """Scales, zero points and bias."""
        scales, bias = self._scales, layer.bias
        assert scales is not None
        zeros = torch.zeros(len(scales), dtype=torch.int32)
        return scales, zeros, None if bias is None else bias.detach().float()
