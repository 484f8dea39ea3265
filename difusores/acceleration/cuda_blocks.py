"""Replacements of blocks and networks on a GPU, where launches and bytes count.

A residual block is norm, convolution, norm, convolution, sum: five launches, and one for a shortcut, whose
product is the sum too where the kernel of `linear` takes it. The time embedding's projections of all blocks
are one product, computed by the first block that needs one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difusores.acceleration.cuda_layers import leaves_its_bias
from difusores.acceleration.layers import (
    CHANNELS_LAST,
    POINTWISE,
    Surroundings,
    apply_conv,
    direct,
    normalize,
)
from difusores.acceleration.merged import Merged
from difusores.acceleration.network import NetworkForward
from difusores.acceleration.resnet import ResnetForward
from difusores.acceleration.session import Session, hooked
from difusores.acceleration.transformer import as_image, as_tokens
from difusores.ops import linear
from difusores.ops.linear import fused


class TimeProjections:
    """The time projections of all residual blocks of a network, as one product in a forward pass."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.blocks: list[CudaResnetForward] = []
        self.weights = Merged(session, "weight")
        self.biases = Merged(session, "bias")
        self.conv_biases = Merged(session, "bias")

    def begin(self) -> Any:
        """A forward pass begins in this thread; returns what `end` takes."""
        before = getattr(self.session.here, "rows", None)
        self.session.here.rows = {}
        return before

    def end(self, before: Any) -> None:
        """It is over: nothing is kept."""
        self.session.here.rows = before

    def row(self, block: CudaResnetForward, temb: Tensor) -> Tensor | None:
        """[N, width] for this block, with its first convolution's bias; None: it computes its own."""
        rows = getattr(self.session.here, "rows", None)
        if rows is None or temb.is_inference():
            return None
        key = (id(temb), temb._version)
        if key not in rows:
            rows[key] = (temb, self._project(temb))  # the embedding is kept, so that its id is not used again
        found: Tensor | None = rows[key][1].get(block)
        return found

    def _project(self, temb: Tensor) -> Mapping[CudaResnetForward, Tensor]:
        blocks = [block for block in self.blocks if block.takes_part(temb)]
        layers = [block.module.time_emb_proj for block in blocks]
        if len(blocks) < 2:
            return {}
        weight, bias = self.weights.get(layers), self.biases.get(layers)
        of_convs = self.conv_biases.get([block.module.conv1 for block in blocks])
        if weight is None or bias is None or of_convs is None:
            return {}
        out = F.linear(blocks[0].module.nonlinearity(temb), weight, bias + of_convs)
        return dict(zip(blocks, out.split([layer.out_features for layer in layers], dim=1), strict=True))

    def release(self) -> None:
        """Give the parameters memory of their own again."""
        for merged in (self.weights, self.biases, self.conv_biases):
            merged.release()


class CudaNetworkForward(NetworkForward):
    """The same as on a CPU; its residual blocks share the product of their time projections."""

    how = NetworkForward.how + "; all time projections as one GEMM"

    def release(self) -> None:
        self.session.times.release()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        before = self.session.times.begin()
        try:
            return super().run(*args, **kwargs)
        finally:
            self.session.times.end(before)


class CudaResnetForward(ResnetForward):
    """See the head of this file."""

    how = "residual block: norm, SiLU, time embedding and bias in one op; bias and residual in one op"

    def __init__(self, module: nn.Module, session: Session) -> None:
        super().__init__(module, session)
        session.times.blocks.append(self)

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
            weight, bias = m.conv_shortcut.weight.flatten(1), m.conv_shortcut.bias + m.conv2.bias
            return as_image(linear(as_tokens(x), weight, bias, residual=as_tokens(h)), h)
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
        """Whether the network may compute this block's projection of this embedding together with others."""
        m = self.module
        layer = m.time_emb_proj
        return (
            layer is not None
            and not self.scale_shift
            and not getattr(m, "skip_time_act", False)
            and direct(layer)
            and layer.in_features == temb.shape[1]
            and layer.weight.dtype is temb.dtype
            and layer.bias is not None
            and not hooked(m.nonlinearity)
            and type(m.conv1) is nn.Conv2d
            and m.conv1.bias is not None
            and not hooked(m.conv1)
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
