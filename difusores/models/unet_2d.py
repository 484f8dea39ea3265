"""The UNet of DDPM (Ho et al. 2020) and its variants, with diffusers' configuration and parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from difusores.configuration import FrozenDict, register_to_config
from difusores.models.blocks import Attend, DownBlock2D, UNetMidBlock2D, UpBlock2D, image_attention
from difusores.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from difusores.models.layers import BlockOptions, GroupNormAct
from difusores.models.modeling import ModelMixin
from difusores.outputs import BaseOutput

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
OLD_PREFIX = "UNetRes"  # of block names in configurations older than diffusers 0.3


@dataclass
class UNet2DOutput(BaseOutput):
    """sample: [N, out_channels, H, W], what the network predicts (noise, image or velocity)."""

    sample: torch.Tensor


class UNet2DModel(ModelMixin):
    """A UNet that takes noisy images and timesteps and returns a prediction of the images' shape.

    Args:
        sample_size: height and width for which it was trained; pipelines read it, the network takes any.
        in_channels, out_channels: widths of input and output.
        center_input_sample: map the input from [0, 1] to [-1, 1] first.
        time_embedding_type: "positional" (sinusoids), "fourier" (of the logarithm of a noise level, by which
            the output is divided too) or "learned" (a table of `num_train_timesteps` rows).
        time_embedding_dim: width of the time embedding; None for four times the first block's.
        freq_shift, flip_sin_to_cos: of the sinusoids, see `Timesteps`.
        down_block_types: "DownBlock2D", "AttnDownBlock2D" or "ResnetDownsampleBlock2D" for each resolution.
        mid_block_type: "UNetMidBlock2D" or None.
        up_block_types: "UpBlock2D", "AttnUpBlock2D" or "ResnetUpsampleBlock2D", lowest resolution first.
        block_out_channels: width at each resolution.
        layers_per_block: residual blocks at each resolution on the way down; one more on the way up.
        mid_block_scale_factor: the residual sums of the mid block are divided by it.
        downsample_padding: 1, or 0 for one row and column at the far sides only.
        downsample_type, upsample_type: "conv" or "resnet", in the blocks with attention.
        dropout: probability, in training only.
        act_fn: "silu" ("swish"), "mish", "gelu" or "relu", in the residual blocks.
        attention_head_dim: width of an attention head; None for a single head.
        norm_num_groups, norm_eps: of the group normalisations.
        attn_norm_num_groups: groups of the mid block's attention; None for `norm_num_groups`, or for no
            normalisation there with "scale_shift".
        resnet_time_scale_shift: "default" adds the time embedding before the second normalisation of a
            residual block, "scale_shift" scales and shifts after it.
        add_attention: attention in the mid block.
        class_embed_type: None, "timestep" (labels are numbers, embedded as timesteps are) or "identity"
            (labels are embeddings already).
        num_class_embeds: rows of the label table, with `class_embed_type` None.
        num_train_timesteps: rows of the "learned" time embedding.

    Raises:
        ValueError: an option has a value that is not among those above.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = (
            "DownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)
        down_kinds = [name.removeprefix(OLD_PREFIX) for name in down_block_types]
        up_kinds = [name.removeprefix(OLD_PREFIX) for name in up_block_types]
        _check_options(self.config, down_kinds, up_kinds)
        self.center_input_sample = center_input_sample
        self.divides_by_time = time_embedding_type == "fourier"
        self.embeds_class_as_time = class_embed_type == "timestep"
        options = BlockOptions(
            temb_channels=time_embedding_dim or 4 * widths[0],
            groups=norm_num_groups,
            eps=norm_eps,
            act_fn=act_fn,
            dropout=dropout,
            scale_shift=resnet_time_scale_shift == "scale_shift",
        )

        attend = image_attention(attention_head_dim, norm_num_groups, norm_eps)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self._build_embeddings(self.config, widths[0], time_embedding_dim or 4 * widths[0])
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(down_kinds):
            down_block = DownBlock2D(
                widths[max(i - 1, 0)],
                widths[i],
                options,
                num_layers=layers_per_block,
                attend=attend if kind == "AttnDownBlock2D" else None,
                downsample=_resampling(kind, downsample_type) if i < len(widths) - 1 else None,
                padding=downsample_padding,
            )
            self.down_blocks.append(down_block)
        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(len(widths))), up_kinds, strict=True):
            up_block = UpBlock2D(
                widths[min(i + 1, len(widths) - 1)],
                [widths[i]] * layers_per_block + [widths[max(i - 1, 0)]],
                widths[i],
                options,
                attend=attend if kind == "AttnUpBlock2D" else None,
                upsample=_resampling(kind, upsample_type) if i > 0 else None,
            )
            self.up_blocks.append(up_block)
        self.mid_block: UNetMidBlock2D | None = None
        if mid_block_type is not None:
            attention_groups = attn_norm_num_groups
            if attention_groups is None and not options.scale_shift:
                attention_groups = norm_num_groups
            mid_attend: Attend | None = None
            if add_attention:
                mid_attend = image_attention(
                    attention_head_dim, attention_groups, norm_eps, mid_block_scale_factor
                )
            self.mid_block = UNetMidBlock2D(widths[-1], options, mid_attend, mid_block_scale_factor)
        self.conv_norm_out = GroupNormAct(norm_num_groups, widths[0], norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def _build_embeddings(self, config: FrozenDict, width: int, time_embed_dim: int) -> None:
        self.time_proj: nn.Module
        embedding_in = width
        if config.time_embedding_type == "fourier":
            self.time_proj = GaussianFourierProjection(width, scale=16)
            embedding_in = 2 * width
        elif config.time_embedding_type == "positional":
            self.time_proj = Timesteps(width, config.flip_sin_to_cos, config.freq_shift)
        else:
            self.time_proj = nn.Embedding(config.num_train_timesteps, width)
        self.time_embedding = TimestepEmbedding(embedding_in, time_embed_dim)
        self.class_embedding: nn.Module | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(embedding_in, time_embed_dim)
        elif config.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_embed_dim)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict.

        Args:
            sample: [N, in_channels, H, W] in the model's dtype, NCHW or channels_last; H and W are multiples
                of 2 ** (number of resolutions - 1).
            timestep: a number, whose fraction is cut off, or a tensor of no dimension, [1] or [N].
            class_labels: [N]; with `class_embed_type="identity"` [N, time embedding].
            return_dict: return a `UNet2DOutput`; else a tuple of one.

        Raises:
            ValueError: a shape is not one of those above, or labels are missing or not expected.
        """
        self._check_inputs(sample, class_labels)
        if self.center_input_sample:
            sample = 2 * sample - 1
        if not isinstance(timestep, torch.Tensor):
            # a list, because torch.compile makes a graph for each value of a tensor that is made of a number
            timestep = torch.tensor([timestep], dtype=torch.int64, device=sample.device)
        timesteps = timestep.to(sample.device).reshape(-1).expand(sample.shape[0])
        emb = self._embed(timesteps, class_labels)

        x = self.conv_in(sample)
        states = [x]
        for down_block in self.down_blocks:
            x, new_states = down_block(x, emb)
            states += new_states
        if self.mid_block is not None:
            x = self.mid_block(x, emb)
        for up_block in self.up_blocks:
            x = up_block(x, states, emb)
        x = self.conv_out(self.conv_norm_out(x))
        if self.divides_by_time:
            x = x / timesteps.reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _embed(self, timesteps: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        dtype = self.time_embedding.linear_1.weight.dtype
        emb: torch.Tensor = self.time_embedding(self.time_proj(timesteps).to(dtype))
        if self.class_embedding is None:
            return emb
        if self.embeds_class_as_time:
            class_labels = self.time_proj(class_labels).to(dtype)
        class_emb: torch.Tensor = self.class_embedding(class_labels)
        return emb + class_emb.to(emb.dtype)

    def _check_inputs(self, sample: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        channels, factor = self.conv_in.in_channels, 2 ** (len(self.down_blocks) - 1)
        if (
            sample.ndim != 4
            or sample.shape[1] != channels
            or sample.shape[2] % factor
            or sample.shape[3] % factor
        ):
            raise ValueError(
                f"sample has shape {list(sample.shape)}; "
                f"needed is [N, {channels}, H, W] with H and W multiples of {factor}"
            )
        if self.class_embedding is None and class_labels is not None:
            raise ValueError("class_labels are given, and this model is not class-conditional")
        if self.class_embedding is not None and class_labels is None:
            raise ValueError("this model is class-conditional and needs class_labels, one per image")


def _check_options(config: FrozenDict, down_kinds: list[str], up_kinds: list[str]) -> None:
    allowed: dict[str, tuple[object, ...]] = {
        "mid_block_type": ("UNetMidBlock2D", None),
        "time_embedding_type": ("positional", "fourier", "learned"),
        "downsample_padding": (0, 1),
        "downsample_type": ("conv", "resnet"),
        "upsample_type": ("conv", "resnet"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": (None, "timestep", "identity"),
    }
    given = [(option, config[option], values) for option, values in allowed.items()]
    given += [("down_block_types", kind, DOWN_BLOCKS) for kind in down_kinds]
    given += [("up_block_types", kind, UP_BLOCKS) for kind in up_kinds]
    for option, value, values in given:
        if value not in values:
            raise ValueError(f"{option} has {value!r}; UNet2DModel allows {', '.join(map(repr, values))}")
    widths = config.block_out_channels
    if not len(down_kinds) == len(up_kinds) == len(widths) > 0:
        raise ValueError(
            "down_block_types, up_block_types and block_out_channels need one entry per resolution each; "
            f"they have {len(down_kinds)}, {len(up_kinds)} and {len(widths)}"
        )
    groups, head_dim = config.norm_num_groups, config.attention_head_dim
    if not isinstance(groups, int) or groups < 1 or any(width % groups for width in widths):
        raise ValueError(
            f"norm_num_groups is {groups}; it has to divide all of block_out_channels {list(widths)}"
        )
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"attention_head_dim is {head_dim}; allowed are None and 1 or more")
    if config.time_embedding_type == "learned" and config.num_train_timesteps is None:
        raise ValueError('time_embedding_type "learned" needs num_train_timesteps, which is None')


def _resampling(kind: str, of_attention_blocks: str) -> str:
    if kind.startswith("Attn"):
        return of_attention_blocks
    return "resnet" if kind.startswith("Resnet") else "conv"
