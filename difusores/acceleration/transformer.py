"""Replacements of attention and of the transformers of UNets, ours and diffusers'.

Tokens are the pixels of a channels_last image, so that going from one to the other copies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from difusores.acceleration.layers import CHANNELS_LAST, apply_linear, normalize, plain_norm
from difusores.acceleration.session import Forward, Session, hooked
from difusores.models.transformer import NO_CONTEXT, Context
from difusores.ops import attention, geglu

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")  # of diffusers, that do what `attend` does


def attend(m: Any, tokens: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    """Projections, attention by the package's op, and projection: [N, L, C] and [N, S, D] to [N, L, C]."""
    q, k, v = (
        apply_linear(layer, rows).unflatten(-1, (m.heads, -1)).transpose(1, 2)
        for layer, rows in ((m.to_q, tokens), (m.to_k, source), (m.to_v, source))
    )
    if k.dtype is not q.dtype or v.dtype is not q.dtype:  # an adapter gave one of them another dtype
        k, v = k.to(q.dtype), v.to(q.dtype)
    mixed = attention(q, k, v, mask=mask if mask is None else mask.to(q.dtype))
    out = apply_linear(m.to_out[0], mixed.transpose(1, 2).flatten(2))
    for layer in m.to_out[1:]:
        out = layer(out)
    return out


def as_tokens(x: Tensor) -> Tensor:
    """[N, C, H, W], channels_last, as [N, H * W, C]; shares its memory."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h * w, c)


def as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """[N, H * W, C] as an image of the height and width of `like`, channels_last; shares its memory."""
    n, _, h, w = like.shape
    return tokens.reshape(n, h, w, -1).permute(0, 3, 1, 2)


class ImageAttentionForward(Forward):
    """Self-attention over the pixels of a normalised image, added to the image (ours)."""

    how = "attention: the package's op, tokens without copies"

    def declines(self, x: Tensor, context: object = None) -> str | None:
        norm = self.module.group_norm
        if x.ndim != 4:
            return "the input's shape is not [N, C, H, W]"
        return None if norm is None or plain_norm(norm) else "a hook or another module stands at its norm"

    def run(self, x: Tensor, context: object = None) -> Tensor:
        m = self.module
        return attend_image(m, m.group_norm, x, self.session, m.output_scale_factor)


def attend_image(m: Any, norm: Any, x: Tensor, session: Session, divisor: float) -> Tensor:
    """(x + attention over the pixels of norm(x)) / divisor."""
    x = x.to(session.image_dtype or x.dtype).contiguous(memory_format=CHANNELS_LAST)
    hidden = x if norm is None else normalize(norm, x, silu=False)
    tokens = as_tokens(hidden).to(session.dtype or x.dtype)
    out = as_image(attend(m, tokens, tokens, None), x) + x
    return out if divisor == 1 else out / divisor


class CrossAttentionForward(Forward):
    """Attention of tokens to a context or to themselves (ours)."""

    how = ImageAttentionForward.how

    def declines(
        self, tokens: Tensor, states: Tensor | None = None, bias: Tensor | None = None
    ) -> str | None:
        if tokens.ndim != 3:
            return "the tokens' shape is not [N, L, C]"
        if self.module.upcast and (self.session.dtype or tokens.dtype) is not torch.float32:
            return "scores in float32 are asked for"
        return None

    def run(self, tokens: Tensor, states: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return attend(self.module, tokens, tokens if states is None else states, bias)


class DiffusersAttentionForward(Forward):
    """diffusers' `Attention` with its standard processor: over pixels, tokens, or a context."""

    how = ImageAttentionForward.how

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        parts = ("spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
        for part in parts:
            if getattr(module, part, None) is not None:
                return f"it has {part}"
        if getattr(module, "is_causal", False) or module.inner_kv_dim != module.inner_dim:
            return "it is causal, or has fewer heads for keys than for queries"
        return None

    def declines(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> str | None:
        m = self.module
        processor = type(m.processor)
        if processor.__name__ not in PROCESSORS or not processor.__module__.startswith("diffusers."):
            return f"its processor is {processor.__name__}"
        if attention_mask is not None:
            return "a mask is given"
        given = [name for name, value in kwargs.items() if value is not None and name != "temb"]
        if given:  # the time embedding is for a spatial norm alone
            return f"it is given {', '.join(given)}"
        if m.group_norm is not None and not (plain_norm(m.group_norm) and hidden_states.ndim == 4):
            return "a hook or another module stands at its norm, or it normalises tokens"
        if hidden_states.ndim == 4 and (encoder_hidden_states is not None or not m.residual_connection):
            return "an image attends to something else, or is not added"
        if hidden_states.ndim == 3 and (m.residual_connection or m.rescale_output_factor != 1):
            return "tokens are added or divided"
        return None

    def run(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **ignored: Any
    ) -> Tensor:
        m = self.module
        if hidden_states.ndim == 4:
            return attend_image(m, m.group_norm, hidden_states, self.session, m.rescale_output_factor)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return attend(m, hidden_states, source, None)


class GEGLUForward(Forward):
    """A gated linear layer, ours and diffusers'."""

    how = "GEGLU: one GEMM and the package's op"

    def declines(self, tokens: Tensor, *args: object, **kwargs: object) -> str | None:
        return "it is given more than tokens" if args or kwargs else None

    def run(self, tokens: Tensor) -> Tensor:
        return geglu(apply_linear(self.module.proj, tokens))


class TransformerForward(Forward):
    """Transformer blocks over the pixels of a normalised image (ours)."""

    how = "transformer: projections as GEMMs, tokens without copies"

    def declines(self, x: Tensor, context: Context = NO_CONTEXT) -> str | None:
        if x.ndim != 4:
            return "the input's shape is not [N, C, H, W]"
        return None if plain_norm(self.module.norm) else "a hook or another module stands at its norm"

    def run(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        return transform(self, x, (context,), {})


def transform(forward: Forward, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """x plus what the blocks, called with these arguments, make of its pixels."""
    m = forward.module
    x = x.to(forward.session.image_dtype or x.dtype).contiguous(memory_format=CHANNELS_LAST)
    tokens = project(m.proj_in, as_tokens(normalize(m.norm, x, silu=False)), x)
    for block in m.transformer_blocks:
        tokens = block(tokens, *args, **kwargs)
    return as_image(project(m.proj_out, tokens, x), x) + x


def project(layer: Any, tokens: Tensor, image: Tensor) -> Tensor:
    """A linear layer or 1x1 convolution on tokens, whatever stands in its place."""
    weight = getattr(layer, "weight", None)
    if type(layer) is nn.Linear or (type(layer) is nn.Conv2d and not hooked(layer)):
        return apply_linear(layer, tokens)
    if isinstance(weight, Tensor) and weight.ndim == 4:  # an image for a convolution that somebody watches
        return as_tokens(layer(as_image(tokens, image)).contiguous(memory_format=CHANNELS_LAST))
    out: Tensor = layer(tokens)
    return out


class DiffusersTransformerForward(Forward):
    """diffusers' `Transformer2DModel` over an image, without masks."""

    how = TransformerForward.how

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        return None if module.is_input_continuous else "its input is no image"

    def declines(
        self,
        hidden_states: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | None:
        if hidden_states.ndim != 4 or args:
            return "the input's shape is not [N, C, H, W], or arguments have no names"
        if attention_mask is not None or encoder_attention_mask is not None:
            return "a mask is given"
        if (cross_attention_kwargs or {}).get("scale") is not None:
            return "cross_attention_kwargs has a scale"
        return None if plain_norm(self.module.norm) else "a hook or another module stands at its norm"

    def run(self, hidden_states: Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        kwargs.pop("added_cond_kwargs", None)
        out = transform(self, hidden_states, (), kwargs)
        if not return_dict:
            return (out,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=out)
