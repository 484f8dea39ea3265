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
from difusores.models.blocks import UpBlock2D
from difusores.models.conditional import DOWN_BLOCKS, ConditionalModel, check_options, each, score_bias
from difusores.models.layers import GroupNormAct
from difusores.models.lora import lora_strength
from difusores.models.original_layout import UNET
from difusores.models.transformer import Context
from difusores.outputs import BaseOutput

UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")


@dataclass
class UNet2DConditionOutput(BaseOutput):
    """sample: [N, out_channels, H, W], what the network predicts (noise, image or velocity)."""

    sample: torch.Tensor


class UNet2DConditionModel(ConditionalModel):
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

    original_layout = UNET

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
        layers = each(layers_per_block, count)
        depths = each(transformer_layers_per_block, count)
        only_cross = each(only_cross_attention, count)

        self.conv_in = nn.Conv2d(in_channels, widths[0], conv_in_kernel, padding=(conv_in_kernel - 1) // 2)
        time_embed_dim = time_embedding_dim or 4 * widths[0]
        self._build_embeddings(time_embed_dim, act_fn)
        options = self._block_options(time_embed_dim)
        self.down_blocks = self._way_down(options)
        depths_up = list(reverse_transformer_layers_per_block or depths[::-1])
        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(count)), up_block_types, strict=True):
            crossing = kind == "CrossAttnUpBlock2D"
            up_block = UpBlock2D(
                widths[min(i + 1, count - 1)],
                [widths[i]] * layers[i] + [widths[max(i - 1, 0)]],
                widths[i],
                options,
                attend=self._attend(i, depths_up[count - 1 - i], only_cross[i]) if crossing else None,
                upsample="conv" if i > 0 else None,
            )
            self.up_blocks.append(up_block)
        self.mid_block = self._lowest_block(options)
        self.conv_norm_out = GroupNormAct(options.groups, widths[0], norm_eps, act_fn)
        self.conv_out = nn.Conv2d(
            widths[0], out_channels, conv_out_kernel, padding=(conv_out_kernel - 1) // 2
        )

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Weigh what comes from below against what comes from the way down (FreeU, Si et al. 2024, see
        `reweighted`): by b1 and s1 in the first block of the way up, by b2 and s2 in the second.
        """
        blocks: list[Any] = list(self.up_blocks)
        for block, factors in zip(blocks, ((b1, s1), (b2, s2)), strict=False):
            block.freeu = factors

    def disable_freeu(self) -> None:
        """Weigh nothing."""
        blocks: list[Any] = list(self.up_blocks)
        for block in blocks:
            block.freeu = None

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
        with lora_strength(self, (cross_attention_kwargs or {}).get("scale")):
            if self.config.center_input_sample:
                sample = 2 * sample - 1
            emb = self._embed(
                sample, timestep, encoder_hidden_states, class_labels, timestep_cond, added_cond_kwargs
            )
            if self.encoder_hid_proj is not None:
                encoder_hidden_states = self.encoder_hid_proj(encoder_hidden_states)
            context = Context(
                encoder_hidden_states,
                score_bias(encoder_attention_mask, sample.dtype),
                score_bias(attention_mask, sample.dtype),
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
        "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
        "dual_cross_attention": (False,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "attention_type": ("default",),
        "cross_attention_norm": (None,),
        "mid_block_only_cross_attention": (None, False),
    }
    kinds = {"down_block_types": DOWN_BLOCKS, "up_block_types": UP_BLOCKS}
    check_options("UNet2DConditionModel", config, allowed, kinds)
    depths = config.transformer_layers_per_block
    nested = isinstance(depths, Sequence) and any(isinstance(depth, Sequence) for depth in depths)
    if nested and config.reverse_transformer_layers_per_block is None:
        raise ValueError(
            "transformer_layers_per_block has numbers for single layers: "
            "reverse_transformer_layers_per_block has to say those of the way up"
        )
