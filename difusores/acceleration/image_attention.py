"""Self-attention over the pixels of a normalised image, in a pass of a network that stands as it did.

    y = (x + out(attention(q(h), k(h), v(h)))) / divisor,  h = norm(x)

The operations and bits of `AttentionForward`, whose questions were asked when the network was looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from difusores.acceleration.layers import CHANNELS_LAST, ConvForward, LinearForward, direct, prepare_product
from difusores.acceleration.norms import normalize
from difusores.acceleration.products import cast
from difusores.acceleration.session import Forward
from difusores.ops import attention


def prepare(forward: Forward, x: Tensor, divisor: float) -> Callable[[Tensor], Tensor] | None:
    """The whole, as a function of images like x, with the weights as they are now; None for the long way."""
    session, module = forward.session, forward.module
    norm, parts = module.group_norm, module._modules
    last, *rest = parts["to_out"]._modules.values()
    layers = (parts["to_q"], parts["to_k"], parts["to_v"], last)
    if norm is None or any(type(layer) is not nn.Dropout for layer in rest) or not all(map(direct, layers)):
        return None
    if session.image_dtype not in (None, x.dtype):
        return None
    forwards: list[LinearForward | ConvForward] = [layer.__dict__["forward"] for layer in layers]
    dtypes = {layer.dtype or layer.module._parameters["weight"].dtype for layer in forwards}
    if len(dtypes) > 1:
        return None
    (dtype,) = dtypes
    if session.dtype not in (None, dtype):
        return None
    q, k, v, out = (prepare_product(layer, dtype) for layer in forwards)
    if q is None or k is None or v is None or out is None:
        return None
    projections, project, heads, fused = (q, k, v), out, module.heads, dtype is x.dtype

    def attend(x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        pixels = (n, height * width, c)
        tokens = cast(normalize(norm, x, silu=False).permute(0, 2, 3, 1).view(pixels), dtype)
        of_heads: Any = (p(tokens, None).view(n, pixels[1], heads, -1).transpose(1, 2) for p in projections)
        mixed = attention(*of_heads).transpose(1, 2).flatten(2)
        residual = x.permute(0, 2, 3, 1).view(pixels)
        y = project(mixed, residual) if fused else project(mixed, None) + residual
        image = y.view(n, height, width, c).permute(0, 3, 1, 2)
        return image if divisor == 1 else image / divisor

    return attend


def is_taken(x: object) -> bool:
    """Whether images like this go the short way at all."""
    return type(x) is Tensor and x.is_cpu and x.ndim == 4 and x.is_contiguous(memory_format=CHANNELS_LAST)
