"""ControlNet (Zhang et al. 2023): a copy of a UNet's way down that reads an image and steers the UNet by it.

Configuration and parameter names are diffusers'.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from difusores.configuration import register_to_config
from difusores.models.conditional import DOWN_BLOCKS, ConditionalModel, check_options, score_bias
from difusores.models.lora import lora_strength
from difusores.models.original_layout import CONTROLNET
from difusores.models.transformer import Context
from difusores.models.unet_2d_condition import UNet2DConditionModel
from difusores.outputs import BaseOutput

COPIED = (
    "conv_in",
    "time_embedding",
    "class_embedding",
    "add_embedding",
    "down_blocks",
    "mid_block",
)
"""Parts whose weights `ControlNetModel.from_unet` takes from the UNet."""

SINGLE = ("layers_per_block", "cross_attention_dim", "mid_block_type")
"""Options that a ControlNet has one value of, where a UNet may have one for each resolution, or none."""


@dataclass
class ControlNetOutput(BaseOutput):
    """What is added in the UNet.

    Attributes:
        down_block_res_samples: to the states of the way down, one each, [N, C, h, w].
        mid_block_res_sample: to what the mid block gives, [N, C, h, w].
    """

    down_block_res_samples: tuple[torch.Tensor, ...]
    mid_block_res_sample: torch.Tensor


class ControlNetConditioningEmbedding(nn.Module):
    """An image at the size of pixels, by convolutions of stride 2, as a map at the size of latents."""

    def __init__(
        self,
        conditioning_embedding_channels: int,
        conditioning_channels: int,
        block_out_channels: Sequence[int],
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)
        self.conv_in = nn.Conv2d(conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(widths):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = _zero(nn.Conv2d(widths[-1], conditioning_embedding_channels, 3, padding=1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.conv_in(image))
        for block in self.blocks:
            hidden = F.silu(block(hidden))
        out: torch.Tensor = self.conv_out(hidden)
        return out


class ControlNetModel(ConditionalModel):
    """Reads an image such as edges, depth or a pose, and gives the UNet's residuals.

    Args:
        conditioning_channels: of the image.
        controlnet_conditioning_channel_order: "rgb", or "bgr" for one that was trained on reversed channels.
        conditioning_embedding_out_channels: widths of the convolutions over the image; after each but the
            first the size halves, so there is one more of them than there are halvings in the autoencoder.
        global_pool_conditions: residuals are their mean over the pixels, [N, C, 1, 1].

    The other options are those of `UNet2DConditionModel`, of which it is a copy; `layers_per_block` and
    `cross_attention_dim` are single numbers, `encoder_hid_dim` is None, and there is a mid block.

    Raises:
        ValueError: an option has a value that is not among those above.
    """

    original_layout = CONTROLNET

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 3,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        only_cross_attention: bool | Sequence[bool] = False,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        transformer_layers_per_block: int | Sequence[int] = 1,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | Sequence[int] = 8,
        num_attention_heads: int | Sequence[int] | None = None,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        projection_class_embeddings_input_dim: int | None = None,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: Sequence[int] | None = (16, 32, 96, 256),
        global_pool_conditions: bool = False,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        super().__init__()
        allowed: dict[str, tuple[object, ...]] = {
            "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
            "class_embed_type": (None, "timestep", "identity", "projection"),
            "controlnet_conditioning_channel_order": ("rgb", "bgr"),
            "encoder_hid_dim": (None,),  # diffusers makes a projection of it and never calls that
        }
        check_options("ControlNetModel", self.config, allowed, {"down_block_types": DOWN_BLOCKS})
        if not conditioning_embedding_out_channels:
            raise ValueError("conditioning_embedding_out_channels is empty; needed is at least one width")
        if not isinstance(layers_per_block, int) or not isinstance(cross_attention_dim, int):
            raise ValueError("layers_per_block and cross_attention_dim of a ControlNet are single numbers")
        widths = list(block_out_channels)
        time_embed_dim = 4 * widths[0]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self._build_embeddings(time_embed_dim, "silu")
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            widths[0], conditioning_channels, conditioning_embedding_out_channels
        )
        options = self._block_options(time_embed_dim)
        self.down_blocks = self._way_down(options)
        of_states = [widths[0]]
        for i, width in enumerate(widths):
            of_states += [width] * (layers_per_block + (i < len(widths) - 1))
        self.controlnet_down_blocks = nn.ModuleList(_zero(nn.Conv2d(c, c, 1)) for c in of_states)
        self.controlnet_mid_block = _zero(nn.Conv2d(widths[-1], widths[-1], 1))
        self.mid_block = self._lowest_block(options)

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: Sequence[int] | None = (16, 32, 96, 256),
        load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
    ) -> ControlNetModel:
        """A ControlNet with which to begin training: residuals are 0, all else is the UNet's.

        Args:
            unet: what the configuration comes from, and the weights of `COPIED` parts.
            load_weights_from_unet: False for the configuration alone.

        Raises:
            ValueError: the UNet has an option that ControlNets do not have.
        """
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
        }
        own = set(inspect.signature(cls.__init__).parameters)
        lost = ["center_input_sample", "class_embeddings_concat", "time_embedding_dim", "conv_in_kernel"]
        lost += ["time_embedding_act_fn", "timestep_post_act"]
        for name in lost:
            if unet.config[name] != defaults[name]:
                raise ValueError(f"{name} of the UNet is {unet.config[name]!r}, which no ControlNet has")
        options = {name: value for name, value in unet.config.items() if name in own}
        for name in SINGLE:
            value = options[name]
            if isinstance(value, Sequence) and not isinstance(value, str):
                if len(set(value)) != 1:
                    raise ValueError(f"{name} of the UNet is {value}; a ControlNet has one for all")
                options[name] = value[0]
        model = cls(
            **options,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
            conditioning_channels=conditioning_channels,
        )
        if load_weights_from_unet:
            for name in COPIED:
                part = getattr(model, name)
                if part is not None:
                    part.load_state_dict(
                        {
                            key: value
                            for key, value in getattr(unet, name).state_dict().items()
                            if not key.startswith("cond_proj.")
                        }
                    )
        return model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The residuals for one call of the UNet, whose other inputs are the same.

        Args:
            controlnet_cond: [N, conditioning_channels, H, W] in [0, 1], RGB, of the image's size in pixels.
            conditioning_scale: factor on all residuals.
            guess_mode: factors from 0.1 at the top to 1 at the mid block, for use without a prompt.
            return_dict: return a `ControlNetOutput`; else a tuple of its two entries.

        The other arguments are those of `UNet2DConditionModel.forward`.

        Raises:
            ValueError: a shape does not fit, a condition is missing or not expected.
        """
        self._check_inputs(sample, encoder_hidden_states, class_labels, cross_attention_kwargs)
        self._check_image(sample, controlnet_cond)
        if self.config.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = controlnet_cond.flip(1)
        with lora_strength(self, (cross_attention_kwargs or {}).get("scale")):
            emb = self._embed(
                sample, timestep, encoder_hidden_states, class_labels, timestep_cond, added_cond_kwargs
            )
            context = Context(encoder_hidden_states, None, score_bias(attention_mask, sample.dtype))

            x = self.conv_in(sample) + self.controlnet_cond_embedding(controlnet_cond)
            states = [x]
            for down_block in self.down_blocks:
                x, new_states = down_block(x, emb, context)
                states += new_states
            assert self.mid_block is not None
            states.append(self.mid_block(x, emb, context))

        layers = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        residuals = [layer(state) for layer, state in zip(layers, states, strict=True)]
        if self.config.global_pool_conditions:
            residuals = [conditioning_scale * r.mean(dim=(2, 3), keepdim=True) for r in residuals]
        elif guess_mode:
            factors = torch.logspace(-1, 0, len(residuals)) * conditioning_scale
            residuals = [r * float(factor) for r, factor in zip(residuals, factors, strict=True)]
        else:
            residuals = [r * conditioning_scale for r in residuals]
        *down, mid = residuals
        if not return_dict:
            return tuple(down), mid
        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=mid)

    def _check_image(self, sample: torch.Tensor, image: torch.Tensor) -> None:
        channels, halvings = (
            self.config.conditioning_channels,
            len(self.controlnet_cond_embedding.blocks) // 2,
        )
        if image.ndim != 4 or image.shape[1] != channels or len(image) not in (1, len(sample)):
            raise ValueError(
                f"controlnet_cond has shape {list(image.shape)}; needed is [{len(sample)}, {channels}, H, W]"
            )
        needed, found = list(sample.shape[2:]), list(image.shape[2:])
        if [-(-side // 2**halvings) for side in found] != needed:
            height, width = (side * 2**halvings for side in needed)
            raise ValueError(
                f"controlnet_cond is {found[0]}x{found[1]}; for a sample of {needed[0]}x{needed[1]} "
                f"it has to be {height}x{width}"
            )


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with weights of 0, so that an untrained ControlNet changes nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
