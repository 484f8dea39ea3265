"""Replacements of blocks and networks on a GPU, where launches and bytes count.

A residual block is norm, convolution, norm, convolution, sum: five launches, and one for a shortcut, whose
product is the sum too where the kernel of `linear` takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from difusores.acceleration.cuda_layers import leaves_its_bias
from difusores.acceleration.layers import CHANNELS_LAST, POINTWISE, Surroundings, apply_conv, direct
from difusores.acceleration.merged import Merged
from difusores.acceleration.norms import normalize
from difusores.acceleration.resnet import ResnetForward
from difusores.acceleration.session import Session, hooked
from difusores.acceleration.times import TimeProjections
from difusores.acceleration.transformer import as_image, as_tokens
from difusores.ops import linear
from difusores.ops.linear import fused


class CudaTimeProjections(TimeProjections):
    """The same with parameters laid side by side, and with the biases of the blocks' first convolutions."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.weights = Merged(session, "weight")
        self.biases = Merged(session, "bias")
        self.conv_biases = Merged(session, "bias")

    def together(self, blocks: Sequence[Any], layers: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
        weight, bias = self.weights.get(layers), self.biases.get(layers)
        of_convs = self.conv_biases.get([block.module.conv1 for block in blocks])
        if weight is None or bias is None or of_convs is None:
            return None
        return weight, bias + of_convs

    def release(self) -> None:
        for merged in (self.weights, self.biases, self.conv_biases):
            merged.release()


class CudaResnetForward(ResnetForward):
    """See the head of this file."""

    how = "residual block: norm, SiLU, time embedding and bias in one op; bias and residual in one op"

    def run(
        self, x: Tensor, temb: Tensor | None = None, size: torch.Size | None = None, **ignored: object
    ) -> Tensor:
        m = self.module
        x = x.contiguous(memory_format=CHANNELS_LAST)
        norm = m.norm1
        h = x
        if self._resamples():
            h, norm = self._resample(normalize(m.norm1, x, silu=True), size), None
            x = self._resample(x, size).contiguous(memory_format=CHANNELS_LAST)
        without = leaves_its_bias(m.conv1, h)
        modulation = self._modulation(temb, without, len(x))
        h = apply_conv(m.conv1, h, Surroundings(norm, bias=not without))
        if self._shortcut_adds(x, h):
            h = apply_conv(m.conv2, h, Surroundings(m.norm2, modulation, bias=False))
            weight, bias = m.conv_shortcut.weight.flatten(1), m.conv_shortcut.bias
            out = linear(as_tokens(x), weight, bias, residual=as_tokens(h), residual_bias=m.conv2.bias)
            return as_image(out, h)
        skip = x if m.conv_shortcut is None else apply_conv(m.conv_shortcut, x)
        last = Surroundings(m.norm2, modulation, residual=skip, scale=1 / m.output_scale_factor)
        return apply_conv(m.conv2, h, last)

    def _shortcut_adds(self, x: Tensor, h: Tensor) -> bool:
        """Whether the shortcut's product adds the second convolution's result, of h and without its bias."""
        m = self.module
        layer = m.conv_shortcut
        if layer is None or m.output_scale_factor != 1 or not direct(layer):
            return False
        plain = getattr(layer.__dict__["forward"], "shape", None) == POINTWISE and layer.bias is not None
        if not plain or not leaves_its_bias(m.conv2, h) or m.conv2.weight.dtype is not x.dtype:
            return False
        return fused(as_tokens(x), layer.weight.flatten(1), layer.bias, h, False)

    def takes_part(self, temb: Tensor) -> bool:
        conv = self.module.conv1
        return (
            super().takes_part(temb)
            and type(conv) is nn.Conv2d
            and conv.bias is not None
            and not hooked(conv)
        )

    def _modulation(self, temb: Tensor | None, with_bias: bool, batch: int) -> dict[str, Tensor]:
        """What the second normalisation is given; with the first convolution's bias if that left it out."""
        bias = self.module.conv1.bias
        if temb is not None and with_bias:
            row = self.session.times.row(self, temb)
            if row is not None:
                return {"add": row}
        terms = self._time(temb)
        if with_bias:
            terms["add"] = terms["add"] + bias if "add" in terms else bias.expand(batch, -1)
        return terms
