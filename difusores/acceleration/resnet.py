"""Replacement of a residual block, ours and diffusers' `ResnetBlock2D`, and of upsampling between blocks.

    h = conv1(act(norm1(x)))
    h = conv2(act(norm2(h + time)))      or  act(norm2(h) * (1 + scale) + shift)
    y = (shortcut(x) + h) / divisor

Each normalisation is one op with its activation and the time embedding; the sum rides in the last
convolution. By Winograd's algorithm the first one sums large images for norm2 as it writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from difusores.acceleration.layers import (
    CHANNELS_LAST,
    ConvForward,
    Surroundings,
    adds_for_free,
    apply_conv,
    apply_linear,
    direct,
    double_size,
    new_moments,
    why_not_weight,
)
from difusores.acceleration.norms import normalize, plain_norm
from difusores.acceleration.products import cast
from difusores.acceleration.session import Forward, Session, hooked
from difusores.acceleration.standing import Prepared
from difusores.models.layers import double
from difusores.ops.winograd_conv import Prepared as PreparedConv


class Steady(NamedTuple):
    """A block of two convolutions by Winograd's algorithm, for images of one size.

    Attributes:
        summed: channels between them, if the first is to sum their moments; else 0.
        takes_time: whether a time embedding is added to what the first convolution gives.
        shortcut: or None.
        scale: factor of the sum.
    """

    first: PreparedConv
    second: PreparedConv
    summed: int
    takes_time: bool
    shortcut: Callable[[Tensor], Tensor] | None
    scale: float


class ResnetForward(Forward):
    """See the head of this file."""

    how = "residual block: norm, SiLU and time embedding in one op, residual in the convolution"

    def __init__(self, module: nn.Module, session: Session) -> None:
        super().__init__(module, session)
        scale_shift = getattr(module, "scale_shift", None)  # ours; diffusers has a word for it
        self.scale_shift = (
            self.module.time_embedding_norm == "scale_shift" if scale_shift is None else bool(scale_shift)
        )
        session.times.blocks.append(self)
        self._steady: Prepared[Steady | None] = Prepared()

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        if type(module.nonlinearity) is not nn.SiLU:
            return f"its activation is {type(module.nonlinearity).__name__}"
        for norm in (module.norm1, module.norm2):
            if not plain_norm(norm) or not getattr(norm, "fused_silu", True):
                return "its normalisation is no plain group norm with SiLU"
        return None

    def declines(self, x: Tensor, temb: Tensor | None = None, *args: object, **kwargs: object) -> str | None:
        parts = self.module._modules  # whose own lookup takes a microsecond each
        if x.ndim != 4:
            return "the input's shape is not [N, C, H, W]"
        if not (plain_norm(parts["norm1"]) and plain_norm(parts["norm2"])):
            return "a hook or another module stands at a normalisation"
        if hooked(parts["nonlinearity"]) or hooked(parts["dropout"]):
            return "a hook stands at the activation or the dropout"
        if parts.get("time_emb_proj") is None:
            return "a time embedding is given to a block without one" if temb is not None else None
        if temb is None or temb.ndim != 2:
            return "the time embedding is not [N, width]"
        return None

    def steady(
        self, standing: object, x: Tensor, temb: Tensor | None = None, *args: object, **kwargs: object
    ) -> Tensor | None:
        if type(x) is not Tensor or not x.is_cpu:
            return None
        known = self._steady.get(standing, x.shape, lambda: self._prepare(x, temb))
        if known is None or (temb is not None) is not known.takes_time:
            return None
        row = None if temb is None else self.session.times.row(self, temb)
        if row is None and temb is not None:
            return None
        try:
            skip = x if known.shortcut is None else known.shortcut(x)
            with torch._C._AutoDispatchBelowAutograd():
                moments = None
                if known.summed:
                    moments = x.new_empty((x.shape[0], 2, known.summed), dtype=torch.float64)
                h = known.first(x, row, None, 1.0, moments, None)
                return known.second(h, None, skip, known.scale, None, moments)
        except (RuntimeError, TypeError):  # the kernel refuses what it did not when this was prepared
            return None

    def _prepare(self, x: Tensor, temb: Tensor | None) -> Steady | None:
        m, parts = self.module, self.module._modules
        convs = [parts["conv1"], parts["conv2"], *filter(None, [parts.get("conv_shortcut")])]
        forwards = [conv.__dict__.get("forward") for conv in convs]
        if self._why_plain((x,), {}) or self.declines(x, temb) or self._resamples() or self.scale_shift:
            return None
        if not all(
            isinstance(f, ConvForward) and f.declines(x) is None for f in (forwards[0], *forwards[2:])
        ):
            return None
        if not isinstance(forwards[1], ConvForward) or why_not_weight(parts["conv2"].weight, self.session):
            return None
        if x.dtype is not torch.float32 or self.session.image_dtype not in (None, torch.float32):
            return None
        first, second = forwards[0].prepare(x, parts["norm1"]), forwards[1].prepare(x, parts["norm2"])
        if first is None or second is None:
            return None
        shortcut = forwards[2].prepare_pixels(x) if len(forwards) > 2 else None
        takes_time = parts.get("time_emb_proj") is not None
        summed = 0 if new_moments(parts["conv1"], x) is None else parts["conv1"].out_channels
        return Steady(first, second, summed, takes_time, shortcut, 1 / m.output_scale_factor)

    def run(
        self, x: Tensor, temb: Tensor | None = None, size: torch.Size | None = None, **ignored: object
    ) -> Tensor:
        m, parts = self.module, self.module._modules
        x = cast(x, self.session.image_dtype or x.dtype).contiguous(memory_format=CHANNELS_LAST)
        scale = 1 / m.output_scale_factor
        norm1, conv1, shortcut = parts["norm1"], parts["conv1"], parts.get("conv_shortcut")
        row = None if temb is None else self.session.times.row(self, temb)
        embedding = self._time(temb) if row is None else {"add": row}
        add, modulation = None, embedding
        doubled = getattr(m, "resample", None) == "up" and (size is None or tuple(size) == double_size(x))
        if "add" in embedding and adds_for_free(conv1, x, doubled):
            add, modulation = embedding["add"], {}
        h = x
        if self._resamples() and not doubled:
            h = self._resample(normalize(norm1, x, silu=True), size)
            x, norm1 = self._resample(x, size), None
        moments = new_moments(conv1, h, doubled)
        h = apply_conv(conv1, h, Surroundings(norm=norm1, doubled=doubled, add=add, moments=moments))
        if doubled:
            x = double(x)
        owned = shortcut is not None
        skip = x if shortcut is None else apply_conv(shortcut, x)
        last = Surroundings(
            *(parts["norm2"], modulation), norm_moments=moments, residual=skip, owned=owned, scale=scale
        )
        return apply_conv(parts["conv2"], h, last)

    def _resamples(self) -> bool:
        m = self.module
        how = m.resample if hasattr(m, "_resample") else m.upsample or m.downsample
        return how is not None

    def _resample(self, x: Tensor, size: torch.Size | None) -> Tensor:
        m = self.module
        out: Tensor
        if hasattr(m, "_resample"):
            out = m._resample(x, size)
            return out
        out = (m.upsample or m.downsample)(x)
        return out

    def takes_part(self, temb: Tensor) -> bool:
        """Whether the network may compute this block's projection of this embedding together with others."""
        m, parts = self.module, self.module._modules
        layer = parts.get("time_emb_proj")
        return (
            layer is not None
            and not self.scale_shift
            and not self.session.invariant
            and not m.__dict__.get("skip_time_act", False)
            and direct(layer)
            and layer.in_features == temb.shape[1]
            and layer._parameters["weight"].dtype is temb.dtype
            and layer._parameters["bias"] is not None
            and not hooked(parts["nonlinearity"])
        )

    def _time(self, temb: Tensor | None) -> dict[str, Tensor]:
        m = self.module
        if m.time_emb_proj is None or temb is None:
            return {}
        if not getattr(m, "skip_time_act", False):
            temb = m.nonlinearity(temb)
        embedding = apply_linear(m.time_emb_proj, temb)
        if self.scale_shift:
            scale, shift = embedding.chunk(2, dim=1)
            return {"scale": scale, "shift": shift}
        return {"add": embedding}


class UpsampleForward(Forward):
    """An image doubled by repetition and convolved, ours and diffusers' `Upsample2D`; it is not copied."""

    how = "upsampling: the convolution reads each pixel four times"

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        if getattr(module, "name", "conv") != "conv" or type(getattr(module, "conv", None)) is not nn.Conv2d:
            return "it has no convolution, or one of another kind"
        if getattr(module, "norm", None) is not None or not getattr(module, "interpolate", True):
            return "it does more than to repeat pixels and to convolve"
        return None

    def declines(self, x: Tensor, *args: object, **kwargs: object) -> str | None:
        if x.ndim != 4:
            return "the input's shape is not [N, C, H, W]"
        sizes = all(isinstance(given, Sequence) for given in _beside_tensors(args, kwargs))
        return None if sizes else "it is given something that is no size"

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        conv = self.module._modules["conv"]
        size = next(_beside_tensors(args, kwargs), None)  # our third argument, after a time; their second
        if size is None or tuple(size) == double_size(x):
            return apply_conv(conv, x, Surroundings(doubled=True))
        return apply_conv(conv, double(x, size))


def _beside_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    return (x for x in (*args, *kwargs.values()) if x is not None and not isinstance(x, Tensor))
