"""The UNet of DDPM (Ho et al. 2020) and its variants, with diffusers' configuration keys and parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from difusores.configuration import register_to_config
from difusores.models.blocks import BlockOptions, DownBlock2D, GroupNormAct, UNetMidBlock2D, UpBlock2D
from difusores.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from difusores.models.modeling import ModelMixin
from difusores.outputs import BaseOutput

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


@dataclass
class UNet2DOutput(BaseOutput):
    """sample: [N, out_channels, H, W], what the network predicts (noise, image or velocity)."""

    sample: torch.Tensor


class UNet2DModel(ModelMixin):
    """A UNet that takes noisy images and timesteps and returns a prediction of the images' shape.

    Args:
        sample_size: height and width for which it was trained; pipelines read it, the network takes other sizes too.
        in_channels, out_channels: widths of input and output.
        center_input_sample: map the input from [0, 1] to [-1, 1] first.
        time_embedding_type: "positional" (sinusoids), "fourier" (of the logarithm of a noise level, by which the output
            is divided too) or "learned" (a table of `num_train_timesteps` rows).
        time_embedding_dim: width of the time embedding; None for four times the first block's.
        freq_shift, flip_sin_to_cos: of the sinusoids, see `Timesteps`.
        down_block_types: "DownBlock2D", "AttnDownBlock2D" or "ResnetDownsampleBlock2D" for each resolution.
        mid_block_type: "UNetMidBlock2D" or None.
        up_block_types: "UpBlock2D", "AttnUpBlock2D" or "ResnetUpsampleBlock2D", from the lowest resolution upwards.
        block_out_channels: width at each resolution.
        layers_per_block: residual blocks at each resolution on the way down; one more on the way up.
        mid_block_scale_factor: the residual sums of the mid block are divided by it.
        downsample_padding: 1, or 0 for one row and column at the far sides only.
        downsample_type, upsample_type: "conv" or "resnet", in the blocks with attention.
        dropout: probability, in training only.
        act_fn: "silu" ("swish"), "mish", "gelu" or "relu", in the residual blocks.
        attention_head_dim: width of an attention head; None for a single head.
        norm_num_groups, norm_eps: of the group normalisations.
        attn_norm_num_groups: groups of the mid block's attention; None for `norm_num_groups`, or no normalisation there
            with "scale_shift".
        resnet_time_scale_shift: "default" adds the time embedding before the second normalisation of a residual block,
            "scale_shift" scales and shifts after it.
        add_attention: attention in the mid block.
        class_embed_type: None, "timestep" (labels are numbers, embedded as timesteps are) or "identity" (labels are
            embeddings already).
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
        down_kinds = [_block_kind("down_block_types", name, DOWN_BLOCKS) for name in down_block_types]
        up_kinds = [_block_kind("up_block_types", name, UP_BLOCKS) for name in up_block_types]
        if not len(down_kinds) == len(up_kinds) == len(block_out_channels) > 0:
            raise ValueError(
                "down_block_types, up_block_types and block_out_channels need one entry per resolution each; "
                f"they have {len(down_kinds)}, {len(up_kinds)} and {len(block_out_channels)}"
            )
        _check("mid_block_type", mid_block_type, ("UNetMidBlock2D", None))
        _check("time_embedding_type", time_embedding_type, ("positional", "fourier", "learned"))
        _check("downsample_padding", downsample_padding, (0, 1))
        _check("downsample_type", downsample_type, ("conv", "resnet", None))
        _check("upsample_type", upsample_type, ("conv", "resnet", None))
        _check("resnet_time_scale_shift", resnet_time_scale_shift, ("default", "scale_shift"))
        _check("class_embed_type", class_embed_type, ("timestep", "identity", None))
        if time_embedding_type == "learned" and num_train_timesteps is None:
            raise ValueError('time_embedding_type "learned" needs num_train_timesteps, which is None')
        for width in block_out_channels:
            if norm_num_groups is None or width % norm_num_groups:
                raise ValueError(
                    f"norm_num_groups is {norm_num_groups}; it has to divide block_out_channels {width}"
                )

        widths = list(block_out_channels)
        time_embed_dim = time_embedding_dim or widths[0] * 4
        self.center_input_sample = center_input_sample
        self.divides_by_time = time_embedding_type == "fourier"
        self.embeds_class_as_time = class_embed_type == "timestep"

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        embedding_in = widths[0]
        if time_embedding_type == "fourier":
            self.time_proj: nn.Module = GaussianFourierProjection(widths[0], scale=16)
            embedding_in *= 2
        elif time_embedding_type == "positional":
            self.time_proj = Timesteps(widths[0], flip_sin_to_cos, freq_shift)
        else:
            self.time_proj = nn.Embedding(num_train_timesteps or 0, widths[0])
        self.time_embedding = TimestepEmbedding(embedding_in, time_embed_dim)
        self.class_embedding: nn.Module | None = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(embedding_in, time_embed_dim)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, time_embed_dim)

        options = BlockOptions(
            temb_channels=time_embed_dim,
            groups=norm_num_groups,
            eps=norm_eps,
            act_fn=act_fn,
            dropout=dropout,
            scale_shift=resnet_time_scale_shift == "scale_shift",
        )
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(down_kinds):
            self.down_blocks.append(
                DownBlock2D(
                    widths[max(i - 1, 0)],
                    widths[i],
                    options,
                    num_layers=layers_per_block,
                    head_dim=(attention_head_dim or widths[i]) if kind == "AttnDownBlock2D" else None,
                    downsample=_resampling(kind, downsample_type or "conv") if i < len(widths) - 1 else None,
                    padding=downsample_padding,
                )
            )
        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(len(widths))), up_kinds, strict=True):
            self.up_blocks.append(
                UpBlock2D(
                    widths[min(i + 1, len(widths) - 1)],
                    [widths[i]] * layers_per_block + [widths[max(i - 1, 0)]],
                    widths[i],
                    options,
                    head_dim=(attention_head_dim or widths[i]) if kind == "AttnUpBlock2D" else None,
                    upsample=_resampling(kind, upsample_type or "conv") if i > 0 else None,
                )
            )
        self.mid_block: UNetMidBlock2D | None = None
        if mid_block_type is not None:
            attention_groups = attn_norm_num_groups
            if attention_groups is None and not options.scale_shift:
                attention_groups = norm_num_groups
            head_dim = (attention_head_dim or widths[-1]) if add_attention else None
            self.mid_block = UNetMidBlock2D(
                widths[-1], options, head_dim, attention_groups, mid_block_scale_factor
            )
        self.conv_norm_out = GroupNormAct(norm_num_groups, widths[0], norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict.

        Args:
            sample: [N, in_channels, H, W] in the model's dtype, NCHW or channels_last; H and W are multiples of
                2 ** (number of resolutions - 1).
            timestep: a number, or a tensor of no dimension, [1] or [N].
            class_labels: [N]; with `class_embed_type="identity"` [N, time embedding].
            return_dict: return a `UNet2DOutput`; else a tuple of one.

        Raises:
            ValueError: a shape is not one of those above, or labels are missing or not expected.
        """
        self._check_inputs(sample, class_labels)
        if self.center_input_sample:
            sample = 2 * sample - 1
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
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
        return emb + self.class_embedding(class_labels).to(emb.dtype)

    def _check_inputs(self, sample: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        channels, factor = self.conv_in.in_channels, 2 ** (len(self.down_blocks) - 1)
        if (
            sample.ndim != 4
            or sample.shape[1] != channels
            or sample.shape[2] % factor
            or sample.shape[3] % factor
        ):
            raise ValueError(
                f"sample has shape {list(sample.shape)}; [N, {channels}, H, W] with H and W multiples of {factor} is needed"
            )
        if self.class_embedding is None and class_labels is not None:
            raise ValueError(
                "class_labels are given, and this model has no class embedding (num_class_embeds is None)"
            )
        if self.class_embedding is not None and class_labels is None:
            raise ValueError("this model is class-conditional and needs class_labels, one per image")


def _block_kind(option: str, name: str, allowed: tuple[str, ...]) -> str:
    # names from before diffusers 0.3 begin with this
    name = name.removeprefix("UNetRes")
    _check(option, name, allowed)
    return name


def _check(option: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} is {value!r}; UNet2DModel allows {', '.join(map(repr, allowed))}")


def _resampling(kind: str, of_attention_blocks: str) -> str:
    if kind.startswith("Attn"):
        return of_attention_blocks
    return "resnet" if kind.startswith("Resnet") else "conv"
