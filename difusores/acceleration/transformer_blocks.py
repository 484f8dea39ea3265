"""Replacements of layer normalisations and of the transformer blocks around them, ours and diffusers'.

    h = x + attn1(norm1(x));  h += attn2(norm2(h));  y = h + ff(norm3(h))

Every residual is added where the next normalisation reads it, or by the product before it. On a GPU the last
product is added in place to h, which norm3 left with that product's bias: cuBLAS reads what it adds to.
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
    bias = bias_beforehand(m.ff, tokens)
    if m.attn2 is not None:
        hidden, total = attended(m.attn1, hidden, total, first, m.norm2)
        hidden, total = attended(m.attn2, hidden, total, second, m.norm3, bias)
    else:
        hidden, total = attended(m.attn1, hidden, total, first, m.norm3, bias)
    return feed_forward(m.ff, hidden, total, bias is not None)


def adds_residual(layer: Any, rows: Tensor, residual: Tensor) -> bool:
    """Whether a layer on so many rows adds a residual without a launch of its own."""
    return direct(layer) and fused(rows, layer.weight, layer.bias, residual, False)


def attended(
    attn: Any, x: Tensor, total: Tensor, asked: Asked, norm: Any, sum_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """total += attn(x, *asked), by its last product or else by the norm.

    Returns:
        norm(total), and total; with sum_bias a new tensor, total + sum_bias.
    """
    forward: Any = attn.__dict__.get("forward")
    if (
        isinstance(forward, AttentionForward)
        and not hooked(attn)
        and not attn.training
        and forward.declines(x, *asked) is None
        and adds_residual(attn.to_out[0], x, total)
    ):
        change, residual = forward.attend(x, *asked, total), None
    else:  # on a CPU products may be in bfloat16 beside float32
        change, residual = attn(x, *asked).to(total.dtype), total
    call = (change, norm.weight, norm.bias, norm.eps)
    y, total = layer_norm(*call, residual=residual, return_sum=True, sum_bias=sum_bias)
    return y, total


def normed(norm: Any, x: Tensor) -> Tensor:
    """norm(x), by the op."""
    out = layer_norm(x, norm.weight, norm.bias, norm.eps)
    assert isinstance(out, Tensor)
    return out


def last_product(ff: Any) -> Any:
    """The linear layer at the end of a feed-forward, if the block may compute it; else None."""
    layers = layers_of(ff)
    plain = layers and not hooked(ff) and "forward" not in ff.__dict__ and direct(layers[-1])
    return layers[-1] if plain else None


def layers_of(ff: Any) -> list[Any]:
    """What a feed-forward computes in turn, without the dropout at its end."""
    layers = list(ff.net)
    while layers and type(layers[-1]) is nn.Dropout and not hooked(layers[-1]):
        layers.pop()
    return layers


def bias_beforehand(ff: Any, tokens: Tensor) -> Tensor | None:
    """The bias of a feed-forward's last product where the sum, to which that is added, is to have it already.

    None on a CPU, and where the product adds a residual itself or is not computed by the block.
    """
    layer = last_product(ff)
    if layer is None or layer.bias is None or layer.weight.dtype is not tokens.dtype:
        return None
    if not layer.__dict__["forward"].session.cuda:
        return None
    rows = tokens[..., :1].expand(*tokens.shape[:-1], layer.weight.shape[1])  # as large as will come
    return None if adds_residual(layer, rows, tokens) else layer.bias


def feed_forward(ff: Any, x: Tensor, total: Tensor, has_bias: bool) -> Tensor:
    """total + ff(x); has_bias: total may be written over, and has the last product's bias."""
    layer = last_product(ff)
    if layer is None:
        out: Tensor = ff(x) + total
        return out
    for before in layers_of(ff)[:-1]:
        x = before(x)
    if not has_bias:
        return apply_linear(layer, x, total)
    total.flatten(0, -2).addmm_(x.flatten(0, -2), layer.weight.flatten(1).t())
    return total


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
