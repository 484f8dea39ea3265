"""The text encoder of latent diffusion's text-to-image model (Rombach et al. 2022, section 4.3.1).

A transformer that normalises before each part, over word pieces of BERT's vocabulary. Parameter names and
files are those of the class of this name in diffusers' text-to-image pipeline.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difusores.configuration import FrozenDict, register_to_config
from difusores.models.layers import ACTIVATIONS
from difusores.models.modeling import ModelMixin
from difusores.models.transformer import LayerNorm
from difusores.ops import attention
from difusores.outputs import BaseOutput

ONLY_AT = {"encoder_layerdrop": 0.0, "attention_dropout": 0.0, "scale_embedding": False}


@dataclass
class LDMBertOutput(BaseOutput):
    """What the encoder makes of a text.

    last_hidden_state: [N, L, d_model]. hidden_states: if asked for, what each layer is given, and the end.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class SelfAttention(nn.Module):
    """Attention of tokens [N, L, width] to each other, heads of a width of their own."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.out_proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor, mask: Tensor | None, head_weights: Tensor | None) -> Tensor:
        q, k, v = (
            tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for tokens in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        mixed = attention(q, k, v, mask=mask)
        if head_weights is not None:
            mixed = mixed * head_weights.to(mixed.dtype)[:, None, None]
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class EncoderLayer(nn.Module):
    """Attention and a feed-forward, each normalised before and added after."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        width = config.d_model
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.self_attn = SelfAttention(width, config.encoder_attention_heads, config.head_dim)
        self.self_attn_layer_norm = LayerNorm(width)
        self.act = ACTIVATIONS[config.activation_function]()
        self.fc1 = nn.Linear(width, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, width)
        self.final_layer_norm = LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None, head_weights: Tensor | None) -> Tensor:
        change = self.self_attn(self.self_attn_layer_norm(x), mask, head_weights)
        x = x + F.dropout(change, self.dropout, self.training)
        hidden = self.act(self.fc1(self.final_layer_norm(x)))
        hidden = self.fc2(F.dropout(hidden, self.activation_dropout, self.training))
        x = x + F.dropout(hidden, self.dropout, self.training)
        if x.dtype is torch.float16:  # whose range the widest of these layers leaves
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x


class Encoder(nn.Module):
    """Token numbers to states: embeddings of words and places, the layers, a normalisation."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = LayerNorm(config.d_model)

    def forward(
        self, embeds: Tensor, positions: Tensor, mask: Tensor | None, head_mask: Tensor | None
    ) -> list[Tensor]:
        """embeds: [N, L, d_model]. Returns the states before each layer, and the last, normalised."""
        x = embeds + self.embed_positions(positions)
        x = F.dropout(x, self.dropout, self.training)
        states = [x]
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, None if head_mask is None else head_mask[i])
            states.append(x)
        states[-1] = self.layer_norm(x)
        return states


class LDMBertModel(ModelMixin):
    """Token numbers [N, L] to states [N, L, d_model] for cross-attention.

    Args:
        vocab_size: rows of the table of words.
        max_position_embeddings: the longest text in tokens.
        encoder_layers, d_model, encoder_ffn_dim: number of layers, their width and that inside.
        encoder_attention_heads, head_dim: number of heads, their width.
        activation_function: name of the activation of the feed-forward, see `ACTIVATIONS`.
        dropout, activation_dropout: probabilities, in training only.
        init_std: standard deviation of new weights.
        encoder_layerdrop, attention_dropout, scale_embedding: taken at their defaults only.
        classifier_dropout, use_cache, pad_token_id: stored; they mean nothing to an encoder.

    Raises:
        ValueError: an option has a value that is not among those above.
    """

    weights_names: ClassVar[dict[str, str]] = {"safetensors": "model", "bin": "pytorch_model"}
    index_library = "latent_diffusion"

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 30522,
        max_position_embeddings: int = 77,
        encoder_layers: int = 32,
        encoder_ffn_dim: int = 5120,
        encoder_attention_heads: int = 8,
        head_dim: int = 64,
        encoder_layerdrop: float = 0.0,
        activation_function: str = "gelu",
        d_model: int = 1280,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        init_std: float = 0.02,
        classifier_dropout: float = 0.0,
        scale_embedding: bool = False,
        use_cache: bool = True,
        pad_token_id: int = 0,
    ) -> None:
        super().__init__()
        for name, value in ONLY_AT.items():
            if self.config[name] != value:
                raise ValueError(f"{name} is {self.config[name]!r}; LDMBertModel allows {value!r} only")
        if activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function is {activation_function!r}; allowed are {', '.join(ACTIVATIONS)}"
            )
        self.model = Encoder(self.config)
        # of training; sampling does not call it, but checkpoints have it
        self.to_logits = nn.Linear(d_model, vocab_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """As elsewhere; what transformers adds to its configurations is left out."""
        own = inspect.signature(cls.__init__).parameters
        known = {key: value for key, value in config_dict.items() if key in own or key[0] == "_"}
        return super().extract_init_dict(known, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> LDMBertOutput | tuple[Any, ...]:
        """Encode.

        Args:
            input_ids: [N, L] integers.
            attention_mask: [N, L], 1 for tokens that are looked at, 0 for the others; None for all.
            position_ids: [1 or N, L] integers; None for 0, 1, ...
            head_mask: [encoder_layers, encoder_attention_heads], a factor on what each head gives.
            inputs_embeds: [N, L, d_model] in place of `input_ids`.
            output_attentions: None or False; attention does not keep its weights.
            output_hidden_states: return the states before each layer too.
            return_dict: return an `LDMBertOutput`, as None does; False for a tuple.

        Raises:
            ValueError: not one of `input_ids` and `inputs_embeds`, a text that is too long, a shape that does
                not fit, or `output_attentions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("needed is input_ids or inputs_embeds, one of the two")
        if output_attentions:
            raise ValueError("output_attentions=True is not supported: attention does not keep its weights")
        config = self.config
        if inputs_embeds is None:
            assert input_ids is not None
            input_ids = input_ids.reshape(-1, input_ids.shape[-1])
            inputs_embeds = self.model.embed_tokens(input_ids)
        length = inputs_embeds.shape[1]
        if position_ids is None:
            if length > config.max_position_embeddings:
                raise ValueError(
                    f"the text has {length} tokens; the encoder takes {config.max_position_embeddings}"
                )
            position_ids = torch.arange(length, device=inputs_embeds.device)[None]
        heads = (config.encoder_layers, config.encoder_attention_heads)
        if head_mask is not None and tuple(head_mask.shape) != heads:
            raise ValueError(f"head_mask has shape {list(head_mask.shape)}; needed is {list(heads)}")
        states = self.model(
            inputs_embeds, position_ids, _added_to_scores(attention_mask, inputs_embeds), head_mask
        )
        hidden = tuple(states) if output_hidden_states else None
        output = LDMBertOutput(states[-1], hidden)
        return output.to_tuple() if return_dict is False else output


def _added_to_scores(mask: Tensor | None, embeds: Tensor) -> Tensor | None:
    """[N, 1, 1, L]: 0 where the mask is 1, the lowest number elsewhere."""
    if mask is None:
        return None
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; the tokens' is {list(embeds.shape[:2])}"
        )
    zero = torch.zeros((), dtype=embeds.dtype, device=embeds.device)
    return torch.where(mask == 1, zero, torch.finfo(embeds.dtype).min)[:, None, None]
