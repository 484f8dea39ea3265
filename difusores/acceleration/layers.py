"""Replacements of single layers: convolution and linear layer.

Images are computed in channels_last, where the pixels of an image are the rows of a matrix: a 1x1 convolution
is a matrix product. In a session that is `invariant`, the package's own product takes what Winograd's
algorithm does not. `apply_conv` and `apply_linear` are for the blocks around them: they go straight to a
layer's replacement, or call the layer where it has none or is watched by hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difusores.acceleration import products
from difusores.acceleration.norms import normalize
from difusores.acceleration.products import (
    MKLDNN,
    PACKED_GAIN,
    cast,
    form_for_gemm,
    kept,
    library_product,
    multiplies_split,
    plus,
    product,
    sources,
)
from difusores.acceleration.quantized import Quantized
from difusores.acceleration.session import DTYPES, GPU_DTYPES, Forward, Packed, Session, hooked
from difusores.models.layers import double
from difusores.ops import gemm_conv, group_norm_affine, winograd_conv
from difusores.ops.gemm_conv import Prepared as PreparedProduct
from difusores.ops.gemm_conv import multiplies_pairs
from difusores.ops.gemm_conv import pack_weight as pack_for_gemm
from difusores.ops.gemm_conv import prepared as prepared_product
from difusores.ops.winograd_conv import (
    IN_CALL,
    LayerPlan,
    Norm,
    Prepared,
    multiplies_int16,
    pack_weight,
    plan,
    plan_int16,
    prepared,
)

CHANNELS_LAST = torch.channels_last
OWN_PRODUCT = 1024  # pixels up to which strides and few channels out are the own product's in bfloat16 too
ROUNDED = 32  # pixels out up to which images in float32 are multiplied in bfloat16, of 3x3 without strides
FEW_PIXELS = 64  # up to which convolutions with strides are the own product's in float32
FEW_CHANNELS = 16  # less of them fill less than half a tile of the own product in bfloat16
SUMMED = 4096  # pixels from which on images are summed as they are written: smaller ones are read out of L2
WORTH_PACKING = 1.1  # of weights transformed for Winograd, from which on they take their memory
SPLIT = "in float32, tokens and pixels as pairs of bfloat16 on AMX, error 5e-6"
INT16 = "3x3 by Winograd in 16-bit fixed point, error 5e-4, where that pays"
POINTWISE = ((1, 1), (1, 1), (0, 0), (1, 1))  # kernel, stride, padding, dilation
WINOGRAD = ((3, 3), (1, 1), (1, 1), (1, 1))


class LayerForward(Forward):
    """Base of linear layers and convolutions, which may be in 8 bits.

    Attributes:
        quantized: how, where that is allowed.
    """

    quantized: Quantized | None = None

    def allow_int8(self) -> None:
        """From calibration on, compute in 8 bits."""
        self.quantized = Quantized(self.session)
        self.levels = self.quantized.weights
        self.how = f"int8 once calibrated; {type(self).how}"


class LinearForward(LayerForward):
    """A linear layer in the session's dtype, by the package's own product or oneDNN where that is faster."""

    # `invariant` tells about the last call
    how = "linear: one GEMM: the package's own where that is faster, else MKL's or oneDNN's, packed"

    def __init__(self, module: nn.Module, session: Session, keep_dtype: bool = False) -> None:
        super().__init__(module, session)
        self.dtype = None if keep_dtype else session.dtype
        self.weights = Packed(session)
        self.invariant = session.invariant
        if multiplies_split(self.module.weight):
            self.how = f"{type(self).how}; {SPLIT}"

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        return why_not_weight(module.weight)

    def declines(self, x: Tensor) -> str | None:
        return why_not_weight(self.module.weight, self.session)

    def run(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.rows(input)

    def rows(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer on rows, plus the residual."""
        return rows(self, x, residual)


def rows(forward: LinearForward | ConvForward, x: Tensor, residual: Tensor | None) -> Tensor:
    """x [..., in] times the layer's weight [out, in] or [out, in, 1, 1], plus its bias and the residual."""
    parameters = forward.module._parameters  # a module's own lookup takes a microsecond
    weight, bias, quantized = parameters["weight"], parameters["bias"], forward.quantized
    x = cast(x, forward.dtype or weight.dtype)
    forward.invariant = False
    if quantized is not None and (result := quantized.linear(x, forward.module)) is not None:
        return plus(result, residual)
    later = None
    if residual is not None and residual.dtype is not x.dtype:
        residual, later = None, residual
    out = product(x, weight, bias, forward.weights, residual)
    if out is not None:
        forward.invariant = True
        return plus(out, later)
    return plus(library_product(x, weight, bias, forward.weights), residual if later is None else later)


def why_not_weight(weight: object, session: Session | None = None) -> str | None:
    """Why no replacement works with this weight, or None."""
    if type(weight) is not nn.Parameter:
        return "its weight is no plain parameter"
    if session is not None and not on_device(weight, session):
        return f"its weight is on {weight.device}"
    on_gpu = session.cuda if session is not None else not weight.is_cpu
    if weight.dtype not in (GPU_DTYPES if on_gpu else DTYPES):
        return f"its weight is {weight.dtype}"
    return "its weight was made in inference mode" if weight.is_inference() else None


def on_device(t: Tensor, session: Session) -> bool:
    """Whether it is on the session's kind of device; a tensor's `device` takes longer to ask for."""
    return t.is_cpu if session.device == "cpu" else t.device.type == session.device


def prepare_product(forward: LinearForward | ConvForward, dtype: torch.dtype) -> PreparedProduct | None:
    """The own product in this dtype with a layer's weight as it is now; None where another one is taken.

    Of rows, or of the pixels of a channels_last image with a 1x1 convolution; the bits of `rows` and `apply`.
    """
    parameters, invariant = forward.module._parameters, forward.session.invariant
    weight, bias = parameters["weight"], parameters["bias"]
    if forward.quantized is not None or not (invariant or products.own_product_is_faster(dtype)):
        return None
    packed, gain = forward.weights, PACKED_GAIN if invariant else math.inf
    if dtype is torch.bfloat16 and isinstance(forward, ConvForward):  # as `ConvForward.apply` keeps it
        packed, gain = forward.products, PACKED_GAIN
    split = dtype is torch.float32 and multiplies_split(weight)
    form = form_for_gemm(weight, packed, dtype, gain, False, split)
    if form is None:
        return None
    forward.invariant = True
    return prepared_product(weight, bias, form)


class Surroundings(NamedTuple):
    """What is computed together with a convolution: scale * (conv(double(act(norm(x)))) + add + residual).

    Attributes:
        norm: a group norm with SiLU before it; modulation: its scale, shift or add, see `group_norm_silu`.
        doubled: whether height and width are doubled by repetition before it.
        norm_moments: the mean and variance of each channel of x, [N, 2, C], where they are known.
        add: [N, O].
        bias: whether the convolution's own bias is added; `CudaConvForward` alone can leave it out.
        residual: like the result.
        owned: whether the residual's memory may be written over.
        scale: factor of the whole.
        moments: those of the result, to be written; of `new_moments`.
    """

    norm: Any = None
    modulation: Mapping[str, Any] = {}
    doubled: bool = False
    norm_moments: Tensor | None = None
    add: Tensor | None = None
    bias: bool = True
    residual: Tensor | None = None
    owned: bool = False
    scale: float = 1.0
    moments: Tensor | None = None


NOTHING = Surroundings()


class Way(NamedTuple):
    """How a convolution computes images of one size.

    Attributes:
        winograd: by Winograd's algorithm, as this says; or None.
        own: by the package's own product where not.
        fuses: that in bfloat16, with what surrounds it; an image in float32 is rounded within it.
        invariant: whether an image's bits are its own.
    """

    winograd: LayerPlan | None
    own: bool
    fuses: bool
    invariant: bool


BY_LIBRARY = Way(None, own=False, fuses=False, invariant=False)


class ConvForward(LayerForward):
    """A convolution in channels_last: a GEMM, Winograd's F(4x4, 3x3), or oneDNN with packed weights.

    Attributes:
        shape: kernel, stride, padding, dilation.
        int16: whether Winograd's products may be in 16-bit fixed point: in bfloat16 where images are not.
        rounds: whether images may be rounded as they are read and multiplied in bfloat16: there too, if
            weights may be kept.
    """

    # `invariant` tells about the last call
    how = "convolution: channels_last; 1x1 as a GEMM, 3x3 by Winograd where that pays, else oneDNN, packed"

    def __init__(self, module: nn.Module, session: Session, keep_dtype: bool = False) -> None:
        super().__init__(module, session)
        m = self.module
        self.shape = (m.kernel_size, m.stride, m.padding, m.dilation)
        dtype = session.dtype if self.shape == POINTWISE else session.image_dtype
        self.dtype = None if keep_dtype else dtype
        self.weights = Packed(session)
        self.products = Packed(session)
        self.transformed = Packed(session)
        self.invariant = session.invariant
        if self.shape == POINTWISE and multiplies_split(m.weight):
            self.how = f"{type(self).how}; {SPLIT}"
        images_stay = session.dtype is torch.bfloat16 and session.image_dtype is None
        self.int16 = images_stay and not keep_dtype and multiplies_int16()
        # without a budget weights would be packed in every call
        self.rounds = images_stay and not keep_dtype and multiplies_pairs() and session.budget > 0
        if self.shape == WINOGRAD and self.int16:
            self.how = f"{type(self).how}; {INT16}"
        self._ways: dict[tuple[Any, ...], Way] = {}

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
        return why_not_weight(self.module.weight, self.session)

    def run(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H', W'], in the layout in which it came."""
        out = self.apply(input, NOTHING)
        return out if input.is_contiguous(memory_format=CHANNELS_LAST) else out.contiguous()

    def rows(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """A 1x1 convolution on the pixels of an image as rows, plus the residual."""
        return rows(self, x, residual)

    def apply(self, x: Tensor, around: Surroundings) -> Tensor:
        """The convolution and what surrounds it; channels_last."""
        if not (self.rounds and self.shape == POINTWISE and x.dtype is torch.float32):
            x = cast(x, self.dtype or self.module._parameters["weight"].dtype)
        x = x.contiguous(memory_format=CHANNELS_LAST)
        way = self.way(x, around.doubled)
        self.invariant = way.invariant
        if way.winograd is not None:
            return self._winograd(x, around, way.winograd)
        if around.doubled:
            x, around = doubled_by(around, x)
        if way.fuses:
            if "add" in around.modulation:  # the convolution before this one was of another kind
                x = normalize(around.norm, x, silu=True, **around.modulation)
                around = around._replace(norm=None)
            out = self._product(x, around)
            return out if around.scale == 1 else out.mul_(around.scale)
        if around.norm is not None:
            x = normalize(around.norm, x, silu=True, **around.modulation)
        if self.shape == POINTWISE:
            n, _, height, width = x.shape
            rows = self.rows(x.permute(0, 2, 3, 1).reshape(n, height * width, -1))
            out = rows.view(n, height, width, -1).permute(0, 3, 1, 2)
            if around.residual is not None:
                out.add_(around.residual)
        else:
            out = self._direct(x, around.residual, around.owned)
        if around.add is not None:
            out.add_(around.add[:, :, None, None])
        return out if around.scale == 1 else out.mul_(around.scale)

    def way(self, x: Tensor, doubled: bool = False) -> Way:
        """How an image of this size, or doubled, is computed; found once for each size and dtype."""
        weight = self.module._parameters["weight"]
        active = self.quantized is not None and self.quantized.active
        height, width = double_size(x) if doubled else x.shape[2:]
        key = (height, width, x.dtype, weight.dtype, active)
        way = self._ways.get(key)
        if way is None:
            rounded = not active and x.dtype is torch.float32 and self._rounds(height * width)
            layer = None if active or rounded else self._winograd_plan(height, width)
            own = rounded or self._by_gemm_conv(height * width, x.dtype)
            fuses = rounded or (own and not active and (self.dtype or weight.dtype) is torch.bfloat16)
            way = self._ways[key] = Way(layer, own, fuses, layer is not None or own)
        return way

    def _rounds(self, pixels: int) -> bool:
        """Whether an image in float32 is multiplied in bfloat16, faster than by other ways."""
        m = self.module
        if not self.rounds or m.dilation != (1, 1) or min(m.in_channels, m.out_channels) < FEW_CHANNELS:
            return False
        return m.kernel_size == (1, 1) or m.stride != (1, 1) or (self.shape == WINOGRAD and pixels <= ROUNDED)

    def _by_gemm_conv(self, pixels: int, dtype: torch.dtype) -> bool:
        if self.module.dilation != (1, 1):
            return False
        m = self.module
        if self.session.invariant:
            return True
        if dtype is torch.float32:
            few = pixels <= FEW_PIXELS and m.in_channels >= FEW_CHANNELS
            fits = few and m.stride != (1, 1) and self.session.budget > 0
            return fits and products.own_product_is_faster(dtype)
        if self.shape == POINTWISE:
            return products.own_product_is_faster(dtype)
        if m.in_channels < FEW_CHANNELS or not (products.fast_bfloat16_convolution() and multiplies_pairs()):
            return False
        return pixels <= OWN_PRODUCT or (m.stride == (1, 1) and m.out_channels >= FEW_CHANNELS)

    def _winograd_plan(self, height: int, width: int) -> LayerPlan | None:
        m = self.module
        dtype = m._parameters["weight"].dtype
        if self.shape != WINOGRAD or dtype is not torch.float32 or (self.dtype or dtype) is not torch.float32:
            return None
        layer = winograd_plan(m.in_channels, m.out_channels, height, width, self.int16)
        return layer if layer.winograd else None

    def _winograd(self, x: Tensor, around: Surroundings, layer: LayerPlan) -> Tensor:
        parameters = self.module._parameters
        weight = parameters["weight"]
        multiplier = offset = norm = None
        if around.norm is not None and not around.modulation:
            norm = norm_before(around.norm)
        else:
            x, multiplier, offset = normalized_by(around, x)
        form = self._form_for_winograd(layer)
        residual = around.residual
        if residual is not None:
            residual = cast(residual, x.dtype).contiguous(memory_format=CHANNELS_LAST)
        return winograd_conv(
            x,
            weight,
            parameters["bias"],
            multiplier=multiplier,
            offset=offset,
            silu=around.norm is not None,
            add=around.add,
            residual=residual,
            output_scale=around.scale,
            packed=form,
            norm=norm,
            doubled=around.doubled,
            moments=around.moments,
            norm_moments=None if norm is None else around.norm_moments,
        )

    def _form_for_winograd(self, layer: LayerPlan) -> Tensor | None:
        form, weight = None, self.module._parameters["weight"]
        dtype = torch.int16 if layer.int16 else torch.float32
        if layer.gain >= WORTH_PACKING:
            form = self.transformed.get(
                (weight,),
                lambda: pack_weight(weight, layer.transformed, dtype),
                layer.packed_bytes,
                layer.gain,
                dtype,
            )
        return IN_CALL if form is None and layer.int16 else form

    def prepare(self, like: Tensor, norm: Any) -> Prepared | None:
        """The convolution of images of this size behind a norm and SiLU, with its weights as they are now.

        None where Winograd's algorithm is not taken.
        """
        layer = self.way(like).winograd
        if layer is None:
            return None
        parameters = self.module._parameters
        form = self._form_for_winograd(layer)
        return prepared(parameters["weight"], parameters["bias"], form, norm_before(norm))

    def prepare_pixels(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The convolution of images like this one, channels_last, with its weight as it is now."""
        dtype = self.dtype or self.module._parameters["weight"].dtype
        product = prepare_product(self, dtype) if self.shape == POINTWISE else None
        if product is None or not (dtype is like.dtype or self.way(like).fuses):
            return lambda x: cast(self.apply(x, NOTHING), x.dtype)
        return lambda x: product(x, None)

    def _product(self, x: Tensor, around: Surroundings) -> Tensor:
        m = self.module
        weight, residual = m._parameters["weight"], around.residual
        x, multiplier, offset = normalized_by(around, x)
        if residual is not None:
            residual = cast(residual, x.dtype).contiguous(memory_format=CHANNELS_LAST)
        form = form_for_gemm(weight, self.products, torch.bfloat16)
        if form is None:
            form = pack_for_gemm(weight, torch.bfloat16)  # the same bits, slower
        return gemm_conv(
            x,
            weight,
            m._parameters["bias"],
            multiplier=multiplier,
            offset=offset,
            silu=around.norm is not None,
            add=around.add,
            residual=residual,
            stride=m.stride,
            padding=m.padding,
            packed=form,
        )

    def _direct(self, x: Tensor, residual: Tensor | None, owned: bool) -> Tensor:
        m = self.module
        if self.quantized is not None and (result := self.quantized.convolution(x, m)) is not None:
            return result if residual is None else result.add_(residual)
        weight, bias = m._parameters["weight"], m._parameters["bias"]
        if self.way(x).own:
            if residual is not None:
                residual = cast(residual, x.dtype).contiguous(memory_format=CHANNELS_LAST)
            form = form_for_gemm(weight, self.products, x.dtype)
            return gemm_conv(
                x, weight, bias, residual=residual, stride=m.stride, padding=m.padding, packed=form
            )
        options = [list(m.padding), list(m.stride), list(m.dilation), 1]
        if not torch.backends.mkldnn.is_available():
            plain = bias if bias is None else cast(bias, x.dtype)
            out: Tensor = F.conv2d(x, weight.to(x.dtype), plain, m.stride, m.padding, m.dilation)
            out = out.contiguous(memory_format=CHANNELS_LAST)
            return out if residual is None else out.add_(residual)

        def pack() -> tuple[Tensor, Tensor | None]:
            # oneDNN chooses the layout for a size of images; in another it packs anew in each call.
            plain = weight.detach().to(x.dtype)
            ordered = MKLDNN._reorder_convolution_weight(plain, *options, [1, *x.shape[1:]])
            return ordered, kept(bias, x.dtype)

        size = weight.numel() * x.dtype.itemsize
        packed = self.weights.get(sources(weight, bias), pack, size, math.inf, tuple(x.shape[2:]))
        if packed is None:  # memory is short: the same bits, slower
            packed = pack()
        if residual is None:
            out = MKLDNN._convolution_pointwise(x, *packed, *options, "none", [], "")
            return out
        residual = cast(residual, x.dtype).contiguous(memory_format=CHANNELS_LAST)
        call = (*packed, *options, "add", 1.0, None, [], None)
        if owned:
            out = MKLDNN._convolution_pointwise_(residual, x, *call)
        else:
            out = MKLDNN._convolution_pointwise(x, residual, *call)
        return out


def norm_before(norm: Any) -> Norm:
    """A group norm's module as `winograd_conv` takes it."""
    parameters = norm._parameters
    return Norm(norm.num_groups, parameters["weight"], parameters["bias"], norm.eps)


def doubled_by(around: Surroundings, x: Tensor) -> tuple[Tensor, Surroundings]:
    """x normalised and doubled as `around` says, and what is left of that."""
    if around.norm is not None:
        x = normalize(around.norm, x, silu=True, **around.modulation)
    return double(x), around._replace(norm=None, modulation={}, doubled=False)


def double_size(x: Tensor) -> tuple[int, int]:
    """Of x doubled."""
    return 2 * x.shape[2], 2 * x.shape[3]


def normalized_by(around: Surroundings, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, and the multiplier and offset by which a convolution normalises it as it reads it, if it is to."""
    if around.norm is None:
        return x, None, None
    norm, terms = around.norm, dict(around.modulation)
    if "add" in terms:  # the convolution before this one was of another kind
        x = x + terms.pop("add")[:, :, None, None]
    of_norm = norm._parameters
    affine = (x, norm.num_groups, of_norm["weight"], of_norm["bias"], norm.eps)
    return x, *group_norm_affine(*affine, **terms, moments=around.norm_moments)


@cache
def winograd_plan(in_channels: int, out_channels: int, height: int, width: int, int16: bool) -> LayerPlan:
    """`winograd_conv.plan` or `plan_int16`, which never change within a process."""
    return (plan_int16 if int16 else plan)(in_channels, out_channels, height, width)


def apply_conv(layer: nn.Module, x: Tensor, around: Surroundings = NOTHING) -> Tensor:
    """A convolution with what surrounds it, whatever stands in its place."""
    forward = layer.__dict__.get("forward")
    if isinstance(forward, ConvForward) and not hooked(layer) and forward.declines(x) is None:
        return forward.apply(x, around)
    if around.doubled:
        x, around = doubled_by(around, x)
    if around.norm is not None:
        x = normalize(around.norm, x, silu=True, **around.modulation)
    out: Tensor = layer(x)
    if around.add is not None:
        out = out + around.add.to(out.dtype)[:, :, None, None]
    if around.residual is not None:
        out = around.residual + out
    return out if around.scale == 1 else out * around.scale


def adds_for_free(layer: nn.Module, x: Tensor, doubled: bool = False) -> bool:
    """Whether a convolution takes `add` without another pass over its result."""
    forward = layer.__dict__.get("forward")
    if not isinstance(forward, ConvForward) or hooked(layer):
        return False
    way = forward.way(x, doubled)
    return way.winograd is not None or way.fuses


def new_moments(layer: nn.Module, x: Tensor, doubled: bool = False) -> Tensor | None:
    """For the mean and variance of each channel of what a convolution of x gives, if it is to sum them."""
    forward = layer.__dict__.get("forward")
    if not isinstance(forward, ConvForward) or hooked(layer) or forward.declines(x) is not None:
        return None
    height, width = double_size(x) if doubled else x.shape[2:]
    if height * width < SUMMED or forward.way(x, doubled).winograd is None:
        return None
    return x.new_empty((x.shape[0], 2, forward.module.out_channels), dtype=torch.float64)


def direct(layer: nn.Module) -> bool:
    """Whether a block may compute this linear layer, or 1x1 convolution on rows, from its weight itself."""
    state = layer.__dict__  # a module's own lookup of a parameter takes longer than everything here
    forward = state.get("forward")
    return (
        isinstance(forward, LinearForward | ConvForward)
        and not hooked(layer)
        and why_not_weight(state["_parameters"]["weight"], forward.session) is None
    )


def apply_linear(layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """layer(x) of a linear layer on rows, or of a 1x1 convolution on the pixels of an image as rows."""
    if direct(layer):
        out: Tensor = layer.__dict__["forward"].rows(x, residual)
        return out
    out = layer(x)
    return out if residual is None else out + residual
