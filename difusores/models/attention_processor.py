"""diffusers' interface to attention: what computes a layer, and what a processor of one's own asks of it.

Layers compute themselves, by `difusores.ops.attention`, which is never sliced: it holds no table of scores
that grows with the square of the tokens. A processor takes the place of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class AttnProcessor:
    """What the layer computes itself."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The layer's output.

        Args:
            attn: an `AttentionLayer`.
            hidden_states: [N, L, C], or [N, C, H, W] where the layer takes images.
            encoder_hidden_states: [N, S, D] that tokens attend to, or None for themselves.
            attention_mask: [N, 1, S], added to the scores, or None.
            temb: not looked at.
        """
        if encoder_hidden_states is None and attention_mask is None:
            return attn.attend(hidden_states)  # type: ignore[no-any-return]
        bias = None if attention_mask is None else attention_mask[:, None]
        return attn.attend(hidden_states, encoder_hidden_states, bias)  # type: ignore[no-any-return]


class AttnProcessor2_0(AttnProcessor):
    """The same, under its newer name."""


STANDARD = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
"""Processors, ours or diffusers', that compute plain attention: the layer does it in their place."""


def is_standard(processor: Any) -> bool:
    """Whether a layer need not ask this processor."""
    kind = type(processor)
    if kind is AttnProcessor2_0:
        return True
    return kind.__name__ in STANDARD and kind.__module__.partition(".")[0] in ("difusores", "diffusers")


class AttentionLayer(nn.Module):
    """Base of layers with attention; the names are those that diffusers' processors look for.

    Attributes:
        processor: called with (layer, hidden_states, encoder_hidden_states=, attention_mask=), which are
            those of `AttnProcessor`, in the place of `attend`; or one of `STANDARD`.
        heads: their number.
        is_cross_attention: whether it was built for a context.
        upcast_attention, upcast_softmax: scores in float32, from the product or from the softmax on.
        residual_connection, rescale_output_factor: whether the input is added, and what the sum is divided
            by; a processor does both.
    """

    processor: Any
    heads: int
    is_cross_attention = False
    upcast_attention = False
    upcast_softmax = False
    residual_connection = False
    rescale_output_factor = 1.0
    spatial_norm = norm_cross = norm_q = norm_k = None
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList

    def __init__(self) -> None:
        super().__init__()
        self.processor = AttnProcessor2_0()

    @property
    def scale(self) -> float:
        """Factor on the products of queries and keys."""
        return float((self.to_q.out_features // self.heads) ** -0.5)

    def set_processor(self, processor: Any) -> None:
        """Ask this processor from now on."""
        self._modules.pop("processor", None)  # a module can only be replaced by another one
        self.processor = processor

    def get_processor(self) -> Any:
        """The processor that is asked."""
        return self.processor

    def processed(self, hidden: Tensor, states: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """What the processor makes of the arguments of `attend`; bias: [N, 1, 1, S]."""
        mask = None if bias is None else bias[:, 0]
        out: Tensor = self.processor(self, hidden, encoder_hidden_states=states, attention_mask=mask)
        return out

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """[N, L, C] -> [N * heads, L, C / heads], or with `out_dim` 4 [N, heads, L, C / heads]."""
        heads: Tensor = tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads.flatten(0, 1) if out_dim == 3 else heads

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """[N * heads, L, C / heads] -> [N, L, C]."""
        heads: Tensor = tensor.unflatten(0, (-1, self.heads))
        return heads.transpose(1, 2).flatten(2)

    def get_attention_scores(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """[B, L, S] probabilities of queries [B, L, D] and keys [B, S, D]; the mask is added to scores."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key = query.float(), key.float()
        scores = self.scale * (query @ key.transpose(-1, -2))
        if attention_mask is not None:
            scores = scores + attention_mask
        if self.upcast_softmax:
            scores = scores.float()
        return scores.softmax(dim=-1).to(dtype)

    def prepare_attention_mask(
        self, attention_mask: Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Tensor | None:
        """A mask [N, 1, S] for every head: [N * heads, 1, S], or with `out_dim` 4 [N, heads, 1, S].

        Raises:
            ValueError: it is not for `target_length` keys.
        """
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] != target_length:
            raise ValueError(
                f"attention_mask is for {attention_mask.shape[-1]} keys, and there are {target_length}"
            )
        if out_dim == 4:
            return attention_mask.unsqueeze(1).repeat_interleave(self.heads, dim=1)
        if len(attention_mask) < batch_size * self.heads:
            return attention_mask.repeat_interleave(self.heads, dim=0)
        return attention_mask


Attention = AttentionLayer
"""diffusers' name, for what processors of one's own say of their first argument."""


class AttentionInterface(nn.Module):
    """What callers of diffusers' models ask of attention layers."""

    def _attention_layers(self) -> dict[str, AttentionLayer]:
        """Each by its name and ".processor"."""
        named = self.named_modules()
        return {f"{name}.processor": layer for name, layer in named if isinstance(layer, AttentionLayer)}

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The processor of each attention layer, by its name and ".processor"."""
        return {name: layer.processor for name, layer in self._attention_layers().items()}

    def set_attn_processor(self, processor: Any) -> None:
        """Ask this processor in every attention layer, or one by name for each.

        processor: see `AttentionLayer`. Those of `STANDARD` change nothing but memory that is not used here.

        Raises:
            ValueError: a dictionary has other names than `attn_processors`, or a processor is no callable.
        """
        layers = self._attention_layers()
        given = processor if isinstance(processor, Mapping) else dict.fromkeys(layers, processor)
        if given.keys() != layers.keys():
            raise ValueError(
                f"processor has {len(given)} entries; needed is one for each of the names in "
                f"attn_processors, which are {len(layers)}"
            )
        for one in given.values():
            if not callable(one):
                raise ValueError(f"processor is {one!r}, which cannot be called: see AttnProcessor")
        for name, layer in layers.items():
            layer.set_processor(given[name])

    def set_default_attn_processor(self) -> None:
        """Let every layer compute itself again."""
        self.set_attn_processor(AttnProcessor2_0())

    def fuse_qkv_projections(self) -> None:
        """Nothing: it changes no number, and `accelerate` computes them together where that is faster."""

    def unfuse_qkv_projections(self) -> None:
        """Nothing, see `fuse_qkv_projections`."""

    def set_attention_slice(self, slice_size: str | int | list[int] | None = "auto") -> None:
        """Nothing: attention holds no table of scores that slices could make smaller."""

    def enable_xformers_memory_efficient_attention(
        self, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """Nothing: attention takes no more memory than xFormers' already, and xFormers is not asked for."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Nothing, see `enable_xformers_memory_efficient_attention`."""
