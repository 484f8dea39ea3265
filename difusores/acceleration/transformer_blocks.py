"""Replacements of layer normalisations and of the transformer blocks around them, ours and diffusers'.

    h = x + attn1(norm1(x));  h += attn2(norm2(h));  y = h + ff(norm3(h))

Every residual is added where the next normalisation reads it, or by the product before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from difusores.acceleration.layers import apply_linear, direct
from difusores.acceleration.session import Forward, hooked
from difusores.acceleration.transformer import AttentionForward
from difusores.models.transformer import NO_CONTEXT, Context, LayerNorm
from difusores.ops import layer_norm
from difusores.ops.linear import fused


class LayerNormForward(Forward):
    """A layer normalisation by the package's op."""

    how = "layer norm: the package's op"
    invariant = True

    def run(self, input: Tensor) -> Tensor:
        out = layer_norm(input, self.module.weight, self.module.bias, self.module.eps)
        assert isinstance(out, Tensor)
        return out

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        return None if len(module.normalized_shape) == 1 else "it normalises more than the last dimension"


def plain_layer_norm(norm: Any) -> bool:
    """Whether a block may compute this layer normalisation itself."""
    forward = norm.__dict__.get("forward") if isinstance(norm, nn.LayerNorm) else None
    if type(norm) not in (nn.LayerNorm, LayerNorm) or hooked(norm):
        return False
    return (forward is None or isinstance(forward, LayerNormForward)) and len(norm.normalized_shape) == 1


class TransformerBlockForward(Forward):
    """Two attentions and a feed-forward (ours); every residual is added where the next norm reads it."""

    how = "transformer block: residuals added within the normalisations"

    def declines(self, tokens: Tensor, context: Context = NO_CONTEXT) -> str | None:
        return why_not_block(self.module, tokens)

    def run(self, tokens: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        first = context.states if self.module.only_cross_attention else None
        return transform_tokens(
            self.module, tokens, (first, context.self_bias), (context.states, context.bias)
        )


def why_not_block(m: Any, tokens: Tensor) -> str | None:
    """Why a transformer block goes to its class's forward, or None."""
    if tokens.ndim != 3:
        return "the tokens' shape is not [N, L, C]"
    norms = [norm for norm in (m.norm1, m.norm2, m.norm3) if norm is not None]
    return None if all(map(plain_layer_norm, norms)) else "a hook or another module stands at a normalisation"


Asked = tuple[Tensor | None, Tensor | None]
"""What an attention looks at: states, None for the tokens themselves; what is added to the scores."""


def transform_tokens(m: Any, tokens: Tensor, first: Asked, second: Asked) -> Tensor:
    """h = x + attn1(norm1(x), *first); h += attn2(norm2(h), *second); h + ff(norm3(h))."""
    hidden, total = normed(m.norm1, tokens), tokens
    hidden, total = attended(m.attn1, hidden, total, first, m.norm3 if m.attn2 is None else m.norm2)
    if m.attn2 is not None:
        hidden, total = attended(m.attn2, hidden, total, second, m.norm3)
    return feed_forward(m.ff, hidden, total)


def adds_residual(layer: Any, rows: Tensor, residual: Tensor) -> bool:
    """Whether a layer on so many rows adds a residual without a launch of its own."""
    return direct(layer) and fused(rows, layer.weight, layer.bias, residual, False)


def attended(attn: Any, x: Tensor, total: Tensor, asked: Asked, norm: Any) -> tuple[Tensor, Tensor]:
    """total += attn(x, *asked), by its last product or else by the norm; returns norm(total) and total."""
    forward: Any = attn.__dict__.get("forward")
    if (
        isinstance(forward, AttentionForward)
        and not hooked(attn)
        and not attn.training
        and forward.declines(x, *asked) is None
        and adds_residual(attn.to_out[0], x, total)
    ):
        total = forward.attend(x, *asked, total)
        return normed(norm, total), total
    change: Tensor = attn(x, *asked).to(total.dtype)  # on a CPU products may be in bfloat16 beside float32
    y, total = layer_norm(change, norm.weight, norm.bias, norm.eps, residual=total, return_sum=True)
    return y, total


def normed(norm: Any, x: Tensor) -> Tensor:
    """norm(x), by the op."""
    out = layer_norm(x, norm.weight, norm.bias, norm.eps)
    assert isinstance(out, Tensor)
    return out


def feed_forward(ff: Any, x: Tensor, residual: Tensor) -> Tensor:
    """residual + ff(x); the last product, if nobody watches it, adds the residual itself."""
    layers = list(ff.net)
    while layers and type(layers[-1]) is nn.Dropout and not hooked(layers[-1]):
        layers.pop()
    if hooked(ff) or "forward" in ff.__dict__ or not layers or not direct(layers[-1]):
        out: Tensor = ff(x) + residual
        return out
    for layer in layers[:-1]:
        x = layer(x)
    return apply_linear(layers[-1], x, residual)


class DiffusersTransformerBlockForward(Forward):
    """The same of diffusers, with its plain normalisation and without masks."""

    how = TransformerBlockForward.how

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        if module.norm_type != "layer_norm" or module.pos_embed is not None or hasattr(module, "fuser"):
            return "its normalisation, positions or attention are not the plain ones"
        return None

    def declines(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        class_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> str | None:
        if attention_mask is not None or encoder_attention_mask is not None:
            return "a mask is given"
        given = {name for name, value in (cross_attention_kwargs or {}).items() if value is not None}
        if given:
            return f"cross_attention_kwargs has {', '.join(sorted(given))}"
        if self.module._chunk_size is not None:
            return "its feed-forward is computed in chunks"
        return why_not_block(self.module, hidden_states)

    def run(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *ignored: object,
        **kwargs: object,
    ) -> Tensor:
        first = encoder_hidden_states if self.module.only_cross_attention else None
        return transform_tokens(self.module, hidden_states, (first, None), (encoder_hidden_states, None))
