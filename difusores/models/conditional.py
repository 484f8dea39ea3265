"""What the UNet of latent diffusion and a ControlNet share: embeddings, the way down, the mid block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from difusores.configuration import FrozenDict
from difusores.models.blocks import Attend, DownBlock2D, UNetMidBlock2D
from difusores.models.embeddings import TextTimeEmbedding, TimestepEmbedding, Timesteps
from difusores.models.layers import BlockOptions, activation
from difusores.models.single_file import SingleFileModel
from difusores.models.transformer import Transformer2DModel, TransformerOptions

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
MASKED = -10000.0  # added to a score that is not to count


class ConditionalModel(SingleFileModel):
    """Base of networks that take a noisy sample, a time, a context to attend to, and other conditions.

    The options are those of `UNet2DConditionModel`; a subclass may lack some.
    """

    def _build_embeddings(self, time_embed_dim: int, class_act_fn: str) -> None:
        """Embeddings of time, of classes and of what else is one vector for an image."""
        config, width = self.config, self.config.block_out_channels[0]
        waves = (config.flip_sin_to_cos, config.freq_shift)
        self.time_proj = Timesteps(width, *waves)
        self.time_embedding = TimestepEmbedding(
            width,
            time_embed_dim,
            config.act_fn,
            config.get("timestep_post_act"),
            config.get("time_cond_proj_dim"),
        )
        self.encoder_hid_proj: nn.Module | None = None
        if config.encoder_hid_dim is not None:
            self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
        self.class_embedding: nn.Module | None = None
        projected = config.projection_class_embeddings_input_dim
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(width, time_embed_dim, class_act_fn)
        elif config.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif config.class_embed_type == "projection":
            self.class_embedding = TimestepEmbedding(projected, time_embed_dim)
        elif config.class_embed_type == "simple_projection":
            self.class_embedding = nn.Linear(projected, time_embed_dim)
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_embed_dim)
        self.add_embedding: nn.Module | None = None
        if config.addition_embed_type == "text":
            text_dim = config.encoder_hid_dim or config.cross_attention_dim
            self.add_embedding = TextTimeEmbedding(
                text_dim, time_embed_dim, config.addition_embed_type_num_heads
            )
        elif config.addition_embed_type == "text_time":
            self.add_time_proj = Timesteps(config.addition_time_embed_dim, *waves)
            self.add_embedding = TimestepEmbedding(projected, time_embed_dim)
        name = config.get("time_embedding_act_fn")
        self.time_embed_act = None if name is None else activation(name)

    def _block_options(self, time_embed_dim: int) -> BlockOptions:
        """What all residual blocks share."""
        config = self.config
        return BlockOptions(
            temb_channels=time_embed_dim * (2 if config.get("class_embeddings_concat") else 1),
            groups=config.norm_num_groups or 32,
            eps=config.norm_eps,
            act_fn=config.act_fn,
            dropout=config.get("dropout", 0.0),
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
        )

    def _attend(self, i: int, depth: Any, only: bool) -> Attend:
        """Attention at resolution i; depth: blocks, or one number of blocks for each layer."""
        config, count = self.config, len(self.config.block_out_channels)
        depths_of_layers = iter(depth) if isinstance(depth, Sequence) else None

        def make(channels: int) -> nn.Module:
            blocks = depth if depths_of_layers is None else next(depths_of_layers)
            return Transformer2DModel(
                channels,
                TransformerOptions(
                    heads=each(config.attention_head_dim, count)[i],
                    layers=blocks,
                    context_dim=each(config.cross_attention_dim, count)[i],
                    linear_projection=config.use_linear_projection,
                    only_cross_attention=only,
                    upcast_attention=config.upcast_attention,
                    groups=config.norm_num_groups or 32,
                ),
            )

        return make

    def _way_down(self, options: BlockOptions) -> nn.ModuleList:
        config, widths = self.config, list(self.config.block_out_channels)
        count = len(widths)
        layers, depths = (
            each(config.layers_per_block, count),
            each(config.transformer_layers_per_block, count),
        )
        only_cross = each(config.only_cross_attention, count)
        blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            crossing = kind == "CrossAttnDownBlock2D"
            block = DownBlock2D(
                widths[max(i - 1, 0)],
                widths[i],
                options,
                num_layers=layers[i],
                attend=self._attend(i, depths[i], only_cross[i]) if crossing else None,
                downsample="conv" if i < count - 1 else None,
                padding=config.downsample_padding,
            )
            blocks.append(block)
        return blocks

    def _lowest_block(self, options: BlockOptions) -> UNetMidBlock2D | None:
        config, count = self.config, len(self.config.block_out_channels)
        if config.mid_block_type is None:
            return None
        crossing = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        depth = each(config.transformer_layers_per_block, count)[-1]
        return UNetMidBlock2D(
            config.block_out_channels[-1],
            options,
            self._attend(count - 1, depth[0] if isinstance(depth, Sequence) else depth, False)
            if crossing
            else None,
            config.mid_block_scale_factor,
            num_layers=1 if crossing else 0,
        )

    def _embed(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        states: torch.Tensor | None,
        class_labels: torch.Tensor | None,
        timestep_cond: torch.Tensor | None,
        added: Mapping[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """[N, temb_channels], of time and of everything else that is one vector for an image."""
        if not isinstance(timestep, torch.Tensor):
            dtype = torch.float64 if isinstance(timestep, float) else torch.int64
            timestep = torch.tensor([timestep], dtype=dtype, device=sample.device)
        timesteps = timestep.to(sample.device).reshape(-1).expand(sample.shape[0])
        emb: torch.Tensor = self.time_embedding(self.time_proj(timesteps).to(sample.dtype), timestep_cond)
        if self.class_embedding is not None:
            labels = class_labels
            if self.config.class_embed_type == "timestep":
                labels = self.time_proj(labels).to(sample.dtype)
            class_emb = self.class_embedding(labels).to(sample.dtype)
            together = self.config.get("class_embeddings_concat")
            emb = torch.cat((emb, class_emb), dim=-1) if together else emb + class_emb
        if self.config.addition_embed_type == "text" and self.add_embedding is not None:
            emb = emb + self.add_embedding(states)
        elif self.add_embedding is not None:
            missing = [name for name in ("text_embeds", "time_ids") if name not in (added or {})]
            if added is None or missing:
                raise ValueError(
                    f"added_cond_kwargs lacks {' and '.join(missing)}, "
                    "which addition_embed_type 'text_time' needs"
                )
            text_embeds, ids = added["text_embeds"], added["time_ids"]
            time_embeds = self.add_time_proj(ids.flatten()).reshape(len(text_embeds), -1)
            emb = emb + self.add_embedding(torch.cat((text_embeds, time_embeds), dim=-1).to(emb.dtype))
        return emb if self.time_embed_act is None else self.time_embed_act(emb)

    def _check_inputs(
        self,
        sample: torch.Tensor,
        states: torch.Tensor | None,
        class_labels: torch.Tensor | None,
        cross_attention_kwargs: Mapping[str, Any] | None,
    ) -> None:
        channels = self.conv_in.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(
                f"sample has shape {list(sample.shape)}; needed is [N, {channels}, H, W]"
                + (" (latents, mask and masked image)" if channels == 9 else "")
            )
        widths = (
            {self.config.encoder_hid_dim}
            if self.encoder_hid_proj is not None
            else set(each(self.config.cross_attention_dim, 1))
        )
        if states is not None and (states.ndim != 3 or states.shape[-1] not in widths):
            raise ValueError(
                f"encoder_hidden_states has shape {list(states.shape)}; "
                f"needed is [N, L, {' or '.join(map(str, sorted(widths)))}]"
            )
        if states is None and self.encoder_hid_proj is not None:
            raise ValueError("this model projects its context first and needs encoder_hidden_states")
        if self.class_embedding is None and class_labels is not None:
            raise ValueError("class_labels are given, and this model is not class-conditional")
        if self.class_embedding is not None and class_labels is None:
            raise ValueError("this model is class-conditional and needs class_labels, one per image")
        unknown = set(cross_attention_kwargs or {}) - {"scale"}
        if unknown:
            raise ValueError(f"cross_attention_kwargs takes 'scale' alone, got {', '.join(sorted(unknown))}")


def each(value: Any, count: int) -> list[Any]:
    """One value for each resolution."""
    return list(value) if isinstance(value, Sequence) else [value] * count


def score_bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask [N, L] with 0 for what is not looked at, as a term of the scores [N, 1, 1, L]."""
    return None if mask is None else ((1 - mask.to(dtype)) * MASKED)[:, None, None]


def check_options(
    name: str,
    config: FrozenDict,
    allowed: Mapping[str, tuple[object, ...]],
    kinds: Mapping[str, tuple[str, ...]],
) -> None:
    """Compare a configuration with what is supported.

    Args:
        name: of the model.
        allowed: the values of options that the model has beside those of all.
        kinds: option with a type of block for each resolution -> the types that there are.

    Raises:
        ValueError: an option has another value, or another number of entries than there are resolutions.
    """
    shared: dict[str, tuple[object, ...]] = {
        "downsample_padding": (0, 1),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "addition_embed_type": (None, "text", "text_time"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "num_attention_heads": (None,),
    }
    given = [(option, config[option], values) for option, values in {**shared, **allowed}.items()]
    given += [(option, kind, values) for option, values in kinds.items() for kind in config[option]]
    for option, value, values in given:
        if value not in values:
            raise ValueError(f"{option} has {value!r}; {name} allows {', '.join(map(repr, values))}")
    widths = list(config.block_out_channels)
    per_level = [*kinds, "only_cross_attention", "layers_per_block", "cross_attention_dim"]
    per_level += [
        "transformer_layers_per_block",
        "attention_head_dim",
        "reverse_transformer_layers_per_block",
    ]
    for option in per_level:
        value = config.get(option)
        if isinstance(value, Sequence) and len(value) != len(widths):
            raise ValueError(f"{option} has {len(value)} entries; block_out_channels has {len(widths)}")
    groups = config.norm_num_groups
    if not isinstance(groups, int) or groups < 1 or any(width % groups for width in widths):
        raise ValueError(f"norm_num_groups is {groups}; it has to divide all of block_out_channels {widths}")
    if config.encoder_hid_dim_type is not None and config.encoder_hid_dim is None:
        raise ValueError("encoder_hid_dim_type is set and encoder_hid_dim is None")
    needs = {"projection", "simple_projection"} & {config.class_embed_type}
    if (needs or config.addition_embed_type == "text_time") and (
        config.projection_class_embeddings_input_dim is None
    ):
        raise ValueError("projection_class_embeddings_input_dim is None, and a projection needs its width")
    if config.addition_embed_type == "text_time" and config.addition_time_embed_dim is None:
        raise ValueError("addition_embed_type 'text_time' needs addition_time_embed_dim, which is None")
