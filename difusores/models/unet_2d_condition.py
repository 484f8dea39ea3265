"""The UNet of latent diffusion (Rombach et al. 2022): attends to a text or another context at several widths.

Configuration and parameter names are diffusers', of Stable Diffusion 1.x, 2.x and XL among others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from difusores.configuration import FrozenDict, register_to_config
from difusores.models.blocks import Attend, DownBlock2D, UNetMidBlock2D, UpBlock2D
from difusores.models.embeddings import TextTimeEmbedding, TimestepEmbedding, Timesteps
from difusores.models.layers import BlockOptions, GroupNormAct, activation
from difusores.models.modeling import ModelMixin
from difusores.models.transformer import Context, Transformer2DModel, TransformerOptions
from difusores.outputs import BaseOutput

DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
MASKED = -10000.0  # added to a score that is not to count


@dataclass
class UNet2DConditionOutput(BaseOutput):
    """sample: [N, out_channels, H, W], what the network predicts (noise, image or velocity)."""

    sample: torch.Tensor


class UNet2DConditionModel(ModelMixin):
    """A UNet that takes noisy latents, timesteps and a context to attend to, and returns a prediction.

    Options that take a sequence take one value for all resolutions, or one for each.

    Args:
        sample_size: height and width for which it was trained; pipelines read it, the network takes any.
        in_channels, out_channels: widths of input and output.
        center_input_sample: map the input from [0, 1] to [-1, 1] first.
        flip_sin_to_cos, freq_shift: of the sinusoids of the timestep, see `Timesteps`.
        down_block_types, up_block_types: with or without cross-attention, see `DOWN_BLOCKS` and `UP_BLOCKS`.
        mid_block_type: "UNetMidBlock2DCrossAttn", "UNetMidBlock2D" (one residual block) or None.
        only_cross_attention: both attentions of a block look at the context (not in the mid block).
        block_out_channels: width at each resolution.
        layers_per_block: residual blocks at each resolution on the way down; one more on the way up.
        downsample_padding, mid_block_scale_factor, dropout, act_fn, norm_num_groups, norm_eps,
            resnet_time_scale_shift: as in `UNet2DModel`.
        cross_attention_dim: width of the context.
        transformer_layers_per_block: transformer blocks after a residual block.
        reverse_transformer_layers_per_block: the same on the way up, lowest resolution first; None mirrors.
        encoder_hid_dim, encoder_hid_dim_type: width of a context that is projected first, "text_proj".
        attention_head_dim: NUMBER of attention heads (the name is an old mistake which checkpoints keep).
        use_linear_projection: tokens enter and leave transformers through linear layers.
        class_embed_type: None, "timestep", "identity", "projection" or "simple_projection".
        num_class_embeds: rows of the label table, with `class_embed_type` None.
        class_embeddings_concat: the class embedding goes beside the time embedding, not onto it (AudioLDM).
        addition_embed_type: None, "text" (the pooled context), or "text_time" (SDXL: `added_cond_kwargs`).
        addition_time_embed_dim: width of the sinusoids of each of SDXL's time ids.
        addition_embed_type_num_heads: heads of the pooling for "text".
        projection_class_embeddings_input_dim: width of what "projection" and "text_time" project.
        upcast_attention: scores in float32 for lower dtypes.
        time_embedding_dim: width of the time embedding; None for four times the first block's.
        time_embedding_act_fn, timestep_post_act: activations after all embeddings, after that of time.
        time_cond_proj_dim: width of `timestep_cond`.
        conv_in_kernel, conv_out_kernel: odd sizes of the first and last convolution.

    The other options are taken at their defaults only.

    Raises:
        ValueError: an option has a value that is not among those above.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: Sequence[str] = (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        only_cross_attention: bool | Sequence[bool] = False,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | Sequence[int] = 1280,
        transformer_layers_per_block: int | Sequence[Any] = 1,
        reverse_transformer_layers_per_block: Sequence[Any] | None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | Sequence[int] = 8,
        num_attention_heads: int | Sequence[int] | None = None,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        time_embedding_act_fn: str | None = None,
        timestep_post_act: str | None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
        attention_type: str = "default",
        class_embeddings_concat: bool = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: str | None = None,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        super().__init__()
        _check_options(self.config)
        widths, count = list(block_out_channels), len(block_out_channels)
        layers = _each(layers_per_block, count)
        depths = _each(transformer_layers_per_block, count)
        heads, contexts = _each(attention_head_dim, count), _each(cross_attention_dim, count)
        only_cross = _each(only_cross_attention, count)

        self.conv_in = nn.Conv2d(in_channels, widths[0], conv_in_kernel, padding=(conv_in_kernel - 1) // 2)
        time_embed_dim = time_embedding_dim or 4 * widths[0]
        self._build_embeddings(self.config, widths[0], time_embed_dim)
        options = BlockOptions(
            temb_channels=time_embed_dim * (2 if class_embeddings_concat else 1),
            groups=norm_num_groups or 32,
            eps=norm_eps,
            act_fn=act_fn,
            dropout=dropout,
            scale_shift=resnet_time_scale_shift == "scale_shift",
        )

        def transformer(i: int, depth: Any, only: bool) -> Attend:
            """Attention at resolution i; depth: blocks, or one number of blocks for each layer."""
            depths_of_layers = iter(depth) if isinstance(depth, Sequence) else None

            def make(channels: int) -> nn.Module:
                blocks = depth if depths_of_layers is None else next(depths_of_layers)
                return Transformer2DModel(
                    channels,
                    TransformerOptions(
                        heads=heads[i],
                        layers=blocks,
                        context_dim=contexts[i],
                        linear_projection=use_linear_projection,
                        only_cross_attention=only,
                        upcast_attention=upcast_attention,
                        groups=options.groups,
                    ),
                )

            return make

        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(down_block_types):
            crossing = kind == "CrossAttnDownBlock2D"
            down_block = DownBlock2D(
                widths[max(i - 1, 0)],
                widths[i],
                options,
                num_layers=layers[i],
                attend=transformer(i, depths[i], only_cross[i]) if crossing else None,
                downsample="conv" if i < count - 1 else None,
                padding=downsample_padding,
            )
            self.down_blocks.append(down_block)
        depths_up = list(reverse_transformer_layers_per_block or depths[::-1])
        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(count)), up_block_types, strict=True):
            crossing = kind == "CrossAttnUpBlock2D"
            up_block = UpBlock2D(
                widths[min(i + 1, count - 1)],
                [widths[i]] * layers[i] + [widths[max(i - 1, 0)]],
                widths[i],
                options,
                attend=transformer(i, depths_up[count - 1 - i], only_cross[i]) if crossing else None,
                upsample="conv" if i > 0 else None,
            )
            self.up_blocks.append(up_block)
        self.mid_block: UNetMidBlock2D | None = None
        if mid_block_type is not None:
            crossing = mid_block_type == "UNetMidBlock2DCrossAttn"
            depth = depths[-1][0] if isinstance(depths[-1], Sequence) else depths[-1]
            self.mid_block = UNetMidBlock2D(
                widths[-1],
                options,
                transformer(count - 1, depth, False) if crossing else None,
                mid_block_scale_factor,
                num_layers=1 if crossing else 0,
            )
        self.conv_norm_out = GroupNormAct(options.groups, widths[0], norm_eps, act_fn)
        self.conv_out = nn.Conv2d(
            widths[0], out_channels, conv_out_kernel, padding=(conv_out_kernel - 1) // 2
        )

    def _build_embeddings(self, config: FrozenDict, width: int, time_embed_dim: int) -> None:
        waves = (config.flip_sin_to_cos, config.freq_shift)
        self.time_proj = Timesteps(width, *waves)
        self.time_embedding = TimestepEmbedding(
            width, time_embed_dim, config.act_fn, config.timestep_post_act, config.time_cond_proj_dim
        )
        self.encoder_hid_proj: nn.Module | None = None
        if config.encoder_hid_dim is not None:
            self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
        self.class_embedding: nn.Module | None = None
        projected = config.projection_class_embeddings_input_dim
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(width, time_embed_dim, config.act_fn)
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
        name = config.time_embedding_act_fn
        self.time_embed_act = None if name is None else activation(name)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Predict.

        Args:
            sample: [N, in_channels, H, W] in the model's dtype, NCHW or channels_last, of any H and W.
            timestep: a number, or a tensor of no dimension, [1] or [N].
            encoder_hidden_states: [N, L, cross_attention_dim], or [N, L, encoder_hid_dim] where that is set;
                None lets the second attentions look at their own tokens (AudioLDM).
            class_labels: [N], or [N, width] for an embedding that is projected or taken as it is.
            timestep_cond: [N, time_cond_proj_dim].
            attention_mask, encoder_attention_mask: [N, pixels] and [N, L]; 0 where a token is not looked at.
            cross_attention_kwargs: {"scale": number}, the strength of LoRA layers.
            added_cond_kwargs: for SDXL {"text_embeds": [N, width], "time_ids": [N, ids]}.
            down_block_additional_residuals, mid_block_additional_residual: of a ControlNet, added to the
                states of the way down and to what the mid block gives.
            down_intrablock_additional_residuals: of a T2I adapter, one for each resolution. So are those for
                the way down where there is none for the mid block.
            return_dict: return a `UNet2DConditionOutput`; else a tuple of one.

        Raises:
            ValueError: a shape or a number of tensors does not fit, a condition is missing or not expected.
        """
        self._check_inputs(sample, encoder_hidden_states, class_labels, cross_attention_kwargs)
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        emb = self._embed(
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond, added_cond_kwargs
        )
        if self.encoder_hid_proj is not None:
            encoder_hidden_states = self.encoder_hid_proj(encoder_hidden_states)
        context = Context(
            encoder_hidden_states,
            _bias(encoder_attention_mask, sample.dtype),
            _bias(attention_mask, sample.dtype),
        )
        inside = list(down_intrablock_additional_residuals or ())
        around = down_block_additional_residuals
        if around is not None and mid_block_additional_residual is None and not inside:
            inside, around = list(around), None  # an adapter's, as diffusers takes them

        x = self.conv_in(sample)
        states = [x]
        for down_block in self.down_blocks:
            residual = inside.pop(0) if inside else None
            if residual is not None and down_block.attentions is None:
                # diffusers adds it in place to the block's output, which is the last state too
                x, new_states = down_block(x, emb, context)
                new_states[-1] = x = x + residual
            else:
                x, new_states = down_block(x, emb, context, residual)
            states += new_states
        if around is not None:
            states = _added(states, around)
        if self.mid_block is not None:
            x = self.mid_block(x, emb, context)
            if inside and inside[0].shape == x.shape:
                x = x + inside.pop(0)
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        for up_block in self.up_blocks:
            x = up_block(x, states, emb, context)
        x = self.conv_out(self.conv_norm_out(x))
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)

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
            together = self.config.class_embeddings_concat
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
            else set(_each(self.config.cross_attention_dim, 1))
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


def _each(value: Any, count: int) -> list[Any]:
    """One value for each resolution."""
    return list(value) if isinstance(value, Sequence) else [value] * count


def _bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask [N, L] with 0 for what is not looked at, as a term of the scores [N, 1, 1, L]."""
    return None if mask is None else ((1 - mask.to(dtype)) * MASKED)[:, None, None]


def _added(states: list[torch.Tensor], residuals: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if len(residuals) != len(states):
        raise ValueError(
            f"down_block_additional_residuals has {len(residuals)} tensors; "
            f"the way down of this model has {len(states)}"
        )
    return [state + residual for state, residual in zip(states, residuals, strict=True)]


def _check_options(config: FrozenDict) -> None:
    allowed: dict[str, tuple[object, ...]] = {
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "downsample_padding": (0, 1),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
        "addition_embed_type": (None, "text", "text_time"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "attention_type": ("default",),
        "cross_attention_norm": (None,),
        "mid_block_only_cross_attention": (None, False),
    }
    given = [(option, config[option], values) for option, values in allowed.items()]
    given += [("down_block_types", kind, DOWN_BLOCKS) for kind in config.down_block_types]
    given += [("up_block_types", kind, UP_BLOCKS) for kind in config.up_block_types]
    for option, value, values in given:
        if value not in values:
            raise ValueError(
                f"{option} has {value!r}; UNet2DConditionModel allows {', '.join(map(repr, values))}"
            )
    widths = list(config.block_out_channels)
    each = ["down_block_types", "up_block_types", "only_cross_attention", "layers_per_block"]
    each += ["cross_attention_dim", "transformer_layers_per_block", "attention_head_dim"]
    for option in (*each, "reverse_transformer_layers_per_block"):
        value = config[option]
        if isinstance(value, Sequence) and len(value) != len(widths):
            raise ValueError(f"{option} has {len(value)} entries; block_out_channels has {len(widths)}")
    depths = config.transformer_layers_per_block
    nested = isinstance(depths, Sequence) and any(isinstance(depth, Sequence) for depth in depths)
    if nested and config.reverse_transformer_layers_per_block is None:
        raise ValueError(
            "transformer_layers_per_block has numbers for single layers: "
            "reverse_transformer_layers_per_block has to say those of the way up"
        )
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
