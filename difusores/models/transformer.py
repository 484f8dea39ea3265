"""Transformers inside UNets: self-attention over pixels, cross-attention to a context, gated feed-forward.

Vaswani et al. 2017; Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models".
Tokens are [N, L, C], images [N, C, H, W] in either layout. Module names are those of diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from difusores.models.attention_processor import AttentionLayer, is_standard
from difusores.models.layers import GroupNormAct
from difusores.ops import attention, geglu, layer_norm

NORM_EPS = 1e-6  # of the group norm before the tokens, whatever the network's own


class Context(NamedTuple):
    """What a transformer attends to besides its own tokens.

    Attributes:
        states: [N, L, cross_attention_dim], or None.
        bias: [N, 1, 1, L], added to the scores of cross-attention, or None.
        self_bias: [N, 1, 1, H * W], added to the scores of self-attention, or None.
    """

    states: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    self_bias: torch.Tensor | None = None


NO_CONTEXT = Context()


@dataclass(frozen=True)
class TransformerOptions:
    """What the transformers at one resolution share.

    Attributes:
        heads: of every attention; a head's width is channels // heads.
        layers: transformer blocks one after another.
        context_dim: width of the context; None leaves out the second attention. Where no context is given to
            one that expects it, it attends to the tokens themselves (AudioLDM).
        linear_projection: tokens go in and out through linear layers; else through 1x1 convolutions.
        only_cross_attention: the first attention looks at the context too.
        upcast_attention: scores in float32 for lower dtypes.
        groups: of the normalisation.
    """

    heads: int
    layers: int = 1
    context_dim: int | None = None
    linear_projection: bool = False
    only_cross_attention: bool = False
    upcast_attention: bool = False
    groups: int = 32


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension, by the package's op."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = layer_norm(input, self.weight, self.bias, self.eps)
        assert isinstance(out, torch.Tensor)
        return out


class CrossAttention(AttentionLayer):
    """Attention of tokens to a context, or to themselves.

    Args:
        dim: width of the tokens.
        context_dim: width of the context; None for the tokens' own.
        heads: their number; a head's width is dim // heads.
        upcast: scores in float32 for lower dtypes.
    """

    group_norm = None

    def __init__(self, dim: int, context_dim: int | None, heads: int, upcast: bool = False) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{heads} attention heads do not divide the {dim} channels of their block")
        self.heads = heads
        self.is_cross_attention = context_dim is not None
        self.upcast_attention = upcast
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def forward(
        self, tokens: torch.Tensor, states: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """tokens: [N, L, dim]; states: [N, M, context_dim] or None; bias: see `Context`."""
        call = self.attend if is_standard(self.processor) else self.processed
        return call(tokens, states, bias)

    def attend(
        self, tokens: torch.Tensor, states: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The arguments are those of `forward`."""
        source = tokens if states is None else states
        q, k, v = (
            heads.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for heads in (self.to_q(tokens), self.to_k(source), self.to_v(source))
        )
        if self.upcast_attention and q.dtype is not torch.float32:
            bias = None if bias is None else bias.float()
            mixed = attention(q.float(), k.float(), v.float(), mask=bias).to(v.dtype)
        else:
            mixed = attention(q, k, v, mask=bias)
        out = mixed.transpose(1, 2).flatten(2)
        for layer in self.to_out:
            out = layer(out)
        return out


class GEGLU(nn.Module):
    """A linear layer whose second half gates the first: [..., dim] -> [..., inner]."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return geglu(self.proj(tokens))


class FeedForward(nn.Module):
    """[..., dim] -> four times as wide, gated -> [..., dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for layer in self.net:
            tokens = layer(tokens)
        return tokens


class BasicTransformerBlock(nn.Module):
    """Two attentions and a feed-forward, each normalised before and added after."""

    def __init__(self, dim: int, options: TransformerOptions) -> None:
        super().__init__()
        heads, upcast = options.heads, options.upcast_attention
        self.only_cross_attention = options.only_cross_attention
        self.norm1 = LayerNorm(dim)
        first = options.context_dim if options.only_cross_attention else None
        self.attn1 = CrossAttention(dim, first, heads, upcast)
        self.norm2: LayerNorm | None = None
        self.attn2: CrossAttention | None = None
        if options.context_dim is not None:
            self.norm2 = LayerNorm(dim)
            self.attn2 = CrossAttention(dim, options.context_dim, heads, upcast)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, tokens: torch.Tensor, context: Context = NO_CONTEXT) -> torch.Tensor:
        first = context.states if self.only_cross_attention else None
        tokens = self.attn1(self.norm1(tokens), first, context.self_bias) + tokens
        if self.attn2 is not None and self.norm2 is not None:
            tokens = self.attn2(self.norm2(tokens), context.states, context.bias) + tokens
        out: torch.Tensor = self.ff(self.norm3(tokens)) + tokens
        return out


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a normalised image, added to the image."""

    def __init__(self, channels: int, options: TransformerOptions) -> None:
        super().__init__()
        self.linear = options.linear_projection
        self.norm = GroupNormAct(options.groups, channels, NORM_EPS, act_fn=None)

        def projection() -> nn.Module:
            return nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, options) for _ in range(options.layers)
        )
        self.proj_out = projection()

    def forward(self, x: torch.Tensor, context: Context = NO_CONTEXT) -> torch.Tensor:
        """x: [N, C, H, W]."""
        hidden = self.norm(x)
        if self.linear:
            tokens = self.proj_in(hidden.flatten(2).transpose(1, 2).contiguous())
        else:
            tokens = self.proj_in(hidden).flatten(2).transpose(1, 2).contiguous()
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        if self.linear:
            change = self.proj_out(tokens).transpose(1, 2).reshape(x.shape)
        else:
            change = self.proj_out(tokens.transpose(1, 2).reshape(x.shape))
        out: torch.Tensor = x + change
        return out
