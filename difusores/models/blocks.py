"""Stages of UNets and autoencoders: several layers at one resolution, and the change to the next.

Layouts and `temb` as in `layers`. Module names are those of diffusers, so that checkpoints fit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from difusores.models.layers import Attention, BlockOptions, Downsample2D, ResnetBlock2D, Upsample2D
from difusores.models.transformer import NO_CONTEXT, Context
from difusores.ops import cat_channels

Attend = Callable[[int], nn.Module]
"""Makes the attention of a layer: width -> module(image, context) -> image of the same shape."""


class Block(nn.Module):
    """Base of the blocks below.

    Attributes:
        gradient_checkpointing: layers compute anew for the gradient what is within them.
    """

    gradient_checkpointing = False

    def _layer(self, layer: nn.Module, *inputs: object) -> torch.Tensor:
        out: torch.Tensor
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out = checkpoint(layer, *inputs, use_reentrant=False)
        else:
            out = layer(*inputs)
        return out


class DownBlock2D(Block):
    """Residual blocks, each followed by attention if `attend` is given, then a halving of height and width.

    Args:
        attend: makes the attentions.
        downsample: "conv", "resnet" or None.
        padding: of the convolution that halves.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        options: BlockOptions,
        num_layers: int = 1,
        attend: Attend | None = None,
        downsample: str | None = "conv",
        padding: int = 1,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_layers - 1)
        self.attentions = _attentions(num_layers, out_channels, attend)
        self.resnets = nn.ModuleList(ResnetBlock2D(width, out_channels, options) for width in widths)
        self.downsamplers: nn.ModuleList | None = None
        if downsample == "resnet":
            self.downsamplers = nn.ModuleList(
                [ResnetBlock2D(out_channels, out_channels, options, resample="down")]
            )
        elif downsample == "conv":
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding)])

    def forward(
        self,
        x: torch.Tensor,
        temb: torch.Tensor | None = None,
        context: Context = NO_CONTEXT,
        residual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the output and, for the way up, what every layer gave.

        residual: added to what the last layer gives, before the halving.
        """
        states = []
        for i, resnet in enumerate(self.resnets):
            x = self._layer(resnet, x, temb)
            if self.attentions is not None:
                x = self._layer(self.attentions[i], x, context)
            if residual is not None and i == len(self.resnets) - 1:
                x = x + residual
            states.append(x)
        for downsampler in self.downsamplers or ():
            x = downsampler(x, temb)
            states.append(x)
        return x, states


class UpBlock2D(Block):
    """The way up: each residual block reads a state of the way down too; at the end height and width double.

    Args:
        in_channels: width of the input from below.
        skip_channels: widths of the states of the way down, in the order in which they are read; 0: none.
        attend: makes the attentions.
        upsample: "conv", "resnet" or None.

    Attributes:
        freeu: (backbone, skip) of `reweighted`; None for neither.
    """

    freeu: tuple[float, float] | None = None

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        options: BlockOptions,
        attend: Attend | None = None,
        upsample: str | None = "conv",
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.attentions = _attentions(len(skip_channels), out_channels, attend)
        self.reads_states = [width > 0 for width in skip_channels]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(width + skip, out_channels, options)
            for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.upsamplers: nn.ModuleList | None = None
        if upsample == "resnet":
            self.upsamplers = nn.ModuleList(
                [ResnetBlock2D(out_channels, out_channels, options, resample="up")]
            )
        elif upsample == "conv":
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels)])

    def forward(
        self,
        x: torch.Tensor,
        states: list[torch.Tensor],
        temb: torch.Tensor | None = None,
        context: Context = NO_CONTEXT,
    ) -> torch.Tensor:
        """Takes its states off the end of the list."""
        for i, resnet in enumerate(self.resnets):
            if self.reads_states[i]:
                state = states.pop()
                if self.freeu is not None:
                    x, state = reweighted(x, state, *self.freeu)
                x = cat_channels(x, state)
            x = self._layer(resnet, x, temb)
            if self.attentions is not None:
                x = self._layer(self.attentions[i], x, context)
        size = states[-1].shape[2:] if states else None  # odd ones do not come back by doubling
        for upsampler in self.upsamplers or ():
            x = upsampler(x, temb, size)
        return x


def reweighted(
    x: torch.Tensor, state: torch.Tensor, backbone: float, skip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """FreeU (Si et al. 2024): half of the channels from below times `backbone`, and the four lowest
    frequencies of the state from the way down times `skip`.
    """
    half = x.shape[1] // 2
    x = torch.cat((x[:, :half] * backbone, x[:, half:]), dim=1)
    spectrum = torch.fft.fftshift(torch.fft.fftn(state.float(), dim=(-2, -1)), dim=(-2, -1))
    row, column = state.shape[-2] // 2, state.shape[-1] // 2
    spectrum[..., max(row - 1, 0) : row + 1, max(column - 1, 0) : column + 1] *= skip
    filtered = torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=(-2, -1)), dim=(-2, -1)).real
    return x, filtered.to(state.dtype)


def _attentions(count: int, channels: int, attend: Attend | None) -> nn.ModuleList | None:
    return None if attend is None else nn.ModuleList(attend(channels) for _ in range(count))


def image_attention(
    head_dim: int | None, groups: int | None, eps: float, output_scale_factor: float = 1.0
) -> Attend:
    """Self-attention over the pixels; head_dim None is one head."""
    return lambda channels: Attention(channels, head_dim or channels, groups, eps, output_scale_factor)


class UNetMidBlock2D(Block):
    """Residual blocks with attention between them.

    Args:
        attend: makes the attentions; None for none.
        output_scale_factor: the sums in the residual blocks are divided by it.
        num_layers: residual blocks after the first one.
    """

    def __init__(
        self,
        channels: int,
        options: BlockOptions,
        attend: Attend | None,
        output_scale_factor: float = 1.0,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            [] if attend is None else (attend(channels) for _ in range(num_layers))
        )
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, channels, options, output_scale_factor=output_scale_factor)
            for _ in range(num_layers + 1)
        )

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor | None = None, context: Context = NO_CONTEXT
    ) -> torch.Tensor:
        x = self._layer(self.resnets[0], x, temb)
        for i, resnet in enumerate(self.resnets[1:]):
            if self.attentions:
                x = self._layer(self.attentions[i], x, context)
            x = self._layer(resnet, x, temb)
        return x
