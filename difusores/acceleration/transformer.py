"""Replacements of attention and of the transformers of UNets, ours and diffusers'.

Tokens are the pixels of a channels_last image, so that going from one to the other copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difusores.acceleration import image_attention
from difusores.acceleration.layers import CHANNELS_LAST, apply_linear, direct
from difusores.acceleration.merged import Merged
from difusores.acceleration.norms import normalize, plain_norm
from difusores.acceleration.products import cast, packed_together, plus, product
from difusores.acceleration.prompts import Prompts
from difusores.acceleration.session import Forward, Packed, Session, hooked
from difusores.acceleration.standing import Prepared
from difusores.acceleration.token_merging import Merging
from difusores.models.attention_processor import is_standard
from difusores.models.transformer import NO_CONTEXT, Context
from difusores.ops import attention, geglu, linear

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")  # of diffusers, that do what `attend` does


class AttentionForward(Forward):
    """Base of the attentions: projections, attention by the package's op, and projection.

    q, k and v of tokens that attend to themselves are one product on a GPU, and on a CPU where oneDNN packs
    their weights; k and v of a prompt are one on a GPU. A prompt's keys and values are computed once.
    """

    how = "attention: the package's op, tokens without copies; a prompt's keys and values once"

    def __init__(self, module: nn.Module, session: Session) -> None:
        super().__init__(module, session)
        self.prompts = Prompts(session)
        self.weights = Merged(session, "weight")
        self.biases = Merged(session, "bias")
        self.packed = Packed(session)
        self._steady: Prepared[Callable[[Tensor], Tensor] | None] = Prepared()

    def release(self) -> None:
        self.weights.release()
        self.biases.release()

    def steady_image(self, standing: object, x: Tensor, divisor: float) -> Tensor | None:
        """(x + attention over the pixels of norm(x)) / divisor, or None: the long way."""
        if not image_attention.is_taken(x):
            return None

        def prepare() -> Callable[[Tensor], Tensor] | None:
            plain = self._why_plain((x,), {}) or self.declines(x)
            return image_attention.prepare(self, x, divisor) if plain is None else None

        known = self._steady.get(standing, (x.shape, x.dtype), prepare)
        try:
            return known if known is None else known(x)
        except (RuntimeError, TypeError):  # a kernel refuses what it did not when this was prepared
            return None

    def attend(
        self, tokens: Tensor, states: Tensor | None, mask: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        """[N, L, C], with [N, S, D] or themselves, to [N, L, C], plus the residual."""
        size = getattr(self.session.here, "size", None)
        if size is None or states is not None or mask is not None:
            return self._attend(tokens, states, mask, residual)
        merging = Merging(tokens, size, self.session.approximate["token_merging"].ratio)
        return plus(merging.spread(self._attend(merging.merge(tokens), None, None, None)), residual)

    def _attend(
        self, tokens: Tensor, states: Tensor | None, mask: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        heads, parts = self.module.heads, self.module._modules  # whose own lookup takes a microsecond each
        projected = self._itself(parts, tokens) if states is None else self._prompt(parts, tokens, states)
        q, k, v = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in projected)
        if k.dtype is not q.dtype or v.dtype is not q.dtype:  # an adapter gave one of them another dtype
            k, v = k.to(q.dtype), v.to(q.dtype)
        mixed = attention(q, k, v, mask=mask if mask is None else mask.to(q.dtype))
        last, *rest = parts["to_out"]._modules.values()
        rest = [layer for layer in rest if type(layer) is not nn.Dropout or hooked(layer)]
        if not rest:
            return apply_linear(last, mixed.transpose(1, 2).flatten(2), residual)
        out = apply_linear(last, mixed.transpose(1, 2).flatten(2))
        for layer in rest:
            out = layer(out)
        return out if residual is None else out + residual

    def _itself(self, parts: Mapping[str, Any], tokens: Tensor) -> tuple[Tensor, ...]:
        layers = (parts["to_q"], parts["to_k"], parts["to_v"])
        if self.session.cuda and all(map(direct, layers)):
            merged = self._merged(layers, layers)
            if merged is not None:
                return F.linear(tokens, *merged).chunk(3, dim=-1)
        elif all(map(direct, layers)):
            together = packed_together(tokens, layers, self.packed)
            if together is not None:
                return together.chunk(3, dim=-1)
        return tuple(apply_linear(layer, tokens) for layer in layers)

    def _prompt(self, parts: Mapping[str, Any], tokens: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        first, layers = parts["to_q"], (parts["to_k"], parts["to_v"])
        plain = all(map(direct, layers))

        def project() -> tuple[Tensor, ...]:
            if self.session.cuda and plain:
                together = direct(first) and first.in_features == layers[0].in_features
                merged = self._merged((first, *layers) if together else layers, layers)
                if merged is not None:
                    return F.linear(states, *merged).chunk(2, dim=-1)
            return tuple(apply_linear(layer, states) for layer in layers)

        q = apply_linear(first, tokens)
        if not plain or self.session.calibrating:  # an adapter's matrices may change unseen
            return q, *project()
        own = [p for layer in layers for p in layer._parameters.values() if p is not None]
        return q, *self.prompts.get(states, own, project)

    def _merged(
        self, gathered: tuple[Any, ...], wanted: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the last of these layers as one; None where they do not fit together."""
        with_bias = sum(layer._parameters["bias"] is not None for layer in gathered)
        if with_bias not in (0, len(gathered)):
            return None
        weight = self.weights.get(gathered)
        bias = self.biases.get(gathered) if with_bias else None
        if weight is None or (bias is None and with_bias):
            return None
        if len(gathered) == len(wanted):
            return weight, bias
        skipped = gathered[0].out_features
        return weight[skipped:], bias if bias is None else bias[skipped:]


def as_tokens(x: Tensor) -> Tensor:
    """[N, C, H, W], channels_last, as [N, H * W, C]; shares its memory."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h * w, c)


def as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """[N, H * W, C] as an image of the height and width of `like`, channels_last; shares its memory."""
    n, _, h, w = like.shape
    return tokens.reshape(n, h, w, -1).permute(0, 3, 1, 2)


class ImageAttentionForward(AttentionForward):
    """Self-attention over the pixels of a normalised image, added to the image (ours)."""

    def declines(self, x: Tensor, context: object = None) -> str | None:
        norm, processor = self.module.group_norm, self.module.processor
        if not is_standard(processor):
            return f"its processor is {type(processor).__name__}"
        if x.ndim != 4:
            return "the input's shape is not [N, C, H, W]"
        return None if norm is None or plain_norm(norm) else "a hook or another module stands at its norm"

    def steady(self, standing: object, x: Tensor, context: object = None) -> Tensor | None:
        return self.steady_image(standing, x, self.module.output_scale_factor)

    def run(self, x: Tensor, context: object = None) -> Tensor:
        return attend_image(self, x, self.module.output_scale_factor)


def attend_image(forward: AttentionForward, x: Tensor, divisor: float) -> Tensor:
    """(x + attention over the pixels of norm(x)) / divisor."""
    session, norm = forward.session, forward.module.group_norm
    x = cast(x, session.image_dtype or x.dtype).contiguous(memory_format=CHANNELS_LAST)
    hidden = x if norm is None else normalize(norm, x, silu=False)
    tokens = cast(as_tokens(hidden), session.dtype or x.dtype)
    out = as_image(forward.attend(tokens, None, None, as_tokens(x)), x)
    return out if divisor == 1 else out / divisor


class CrossAttentionForward(AttentionForward):
    """Attention of tokens to a context or to themselves (ours)."""

    def declines(
        self, tokens: Tensor, states: Tensor | None = None, bias: Tensor | None = None
    ) -> str | None:
        processor = self.module.processor
        if not is_standard(processor):
            return f"its processor is {type(processor).__name__}"
        if tokens.ndim != 3:
            return "the tokens' shape is not [N, L, C]"
        # On a GPU every backend has its scores in float32.
        given = self.session.dtype or tokens.dtype
        if self.module.upcast_attention and given is not torch.float32 and not self.session.cuda:
            return "scores in float32 are asked for"
        return None

    def run(self, tokens: Tensor, states: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return self.attend(tokens, states, bias)


class DiffusersAttentionForward(AttentionForward):
    """diffusers' `Attention` with its standard processor: over pixels, tokens, or a context."""

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

    def steady(self, standing: object, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        given = [name for name, value in kwargs.items() if value is not None and name != "temb"]
        if hidden_states.ndim != 4 or args or given:
            return None
        return self.steady_image(standing, hidden_states, self.module.rescale_output_factor)

    def run(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        **ignored: Any,
    ) -> Tensor:
        m = self.module
        if hidden_states.ndim == 4:
            return attend_image(self, hidden_states, m.rescale_output_factor)
        return self.attend(hidden_states, encoder_hidden_states, None)


class GEGLUForward(Forward):
    """A gated linear layer, ours and diffusers'."""

    how = "GEGLU: one GEMM with it or before it, by the package's ops"

    def declines(self, tokens: Tensor, *args: object, **kwargs: object) -> str | None:
        return "it is given more than tokens" if args or kwargs else None

    def __init__(self, module: nn.Module, session: Session) -> None:
        super().__init__(module, session)
        self.packed = Packed(session)

    def run(self, tokens: Tensor) -> Tensor:
        layer = self.module.proj
        if self.session.cuda and direct(layer) and layer.weight.dtype is tokens.dtype:
            return linear(tokens, layer.weight, layer.bias, geglu=True)
        if not self.session.cuda and direct(layer):
            forward, parameters = layer.__dict__["forward"], layer._parameters
            rows = cast(tokens, forward.dtype or parameters["weight"].dtype)
            if forward.quantized is None:
                out = product(rows, parameters["weight"], parameters["bias"], self.packed, geglu=True)
                if out is not None:
                    forward.invariant = True
                    return out
        return geglu(apply_linear(layer, tokens))


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
    x = cast(x, forward.session.image_dtype or x.dtype).contiguous(memory_format=CHANNELS_LAST)
    tokens = project(m.proj_in, as_tokens(normalize(m.norm, x, silu=False)), x)
    here = forward.session.here
    if "token_merging" in forward.session.approximate and x.shape[2:] == getattr(here, "full", None):
        here.size = tuple(x.shape[2:])  # of the tokens that attention merges
    try:
        for block in m.transformer_blocks:
            tokens = block(tokens, *args, **kwargs)
    finally:
        here.size = None
    return as_image(project(m.proj_out, tokens, x, as_tokens(x)), x)


def project(layer: Any, tokens: Tensor, image: Tensor, residual: Tensor | None = None) -> Tensor:
    """A linear layer or 1x1 convolution on tokens, whatever stands in its place, plus the residual."""
    weight = getattr(layer, "weight", None)
    if type(layer) is nn.Linear or (type(layer) is nn.Conv2d and not hooked(layer)):
        return apply_linear(layer, tokens, residual)
    if isinstance(weight, Tensor) and weight.ndim == 4:  # an image for a convolution that somebody watches
        out: Tensor = as_tokens(layer(as_image(tokens, image)).contiguous(memory_format=CHANNELS_LAST))
    else:
        out = layer(tokens)
    return out if residual is None else out + residual


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
