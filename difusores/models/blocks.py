"""Stages of UNets and autoencoders: several layers at one resolution, and the change to the next.

Layouts and `temb` as in `layers`. Module names are those of diffusers, so that checkpoints fit.
"""

from __future__ import annotations

import torch
from torch import nn

from difusores.models.layers import Attention, BlockOptions, Downsample2D, ResnetBlock2D, Upsample2D


class DownBlock2D(nn.Module):
    """Residual blocks, each followed by attention if `head_dim` is given, then a halving of height and width.

    Args:
        downsample: "conv", "resnet" or None.
        padding: of the convolution that halves.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        options: BlockOptions,
        num_layers: int = 1,
        head_dim: int | None = None,
        downsample: str | None = "conv",
        padding: int = 1,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_layers - 1)
        self.attentions = _attentions(num_layers, out_channels, head_dim, options)
        self.resnets = nn.ModuleList(ResnetBlock2D(width, out_channels, options) for width in widths)
        self.downsamplers: nn.ModuleList | None = None
        if downsample == "resnet":
            self.downsamplers = nn.ModuleList(
                [ResnetBlock2D(out_channels, out_channels, options, resample="down")]
            )
        elif downsample == "conv":
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding)])

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the output and, for the way up, what every layer gave."""
        states = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions is not None:
                x = self.attentions[i](x)
            states.append(x)
        for downsampler in self.downsamplers or ():
            x = downsampler(x, temb)
            states.append(x)
        return x, states


class UpBlock2D(nn.Module):
    """The way up: each residual block reads a state of the way down too; at the end height and width double.

    Args:
        in_channels: width of the input from below.
        skip_channels: widths of the states of the way down, in the order in which they are read.
        upsample: "conv", "resnet" or None.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        options: BlockOptions,
        head_dim: int | None = None,
        upsample: str | None = "conv",
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.attentions = _attentions(len(skip_channels), out_channels, head_dim, options)
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
        self, x: torch.Tensor, states: list[torch.Tensor], temb: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Takes its states off the end of the list."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat((x, states.pop()), dim=1), temb)
            if self.attentions is not None:
                x = self.attentions[i](x)
        for upsampler in self.upsamplers or ():
            x = upsampler(x, temb)
        return x


def _attentions(
    count: int, channels: int, head_dim: int | None, options: BlockOptions
) -> nn.ModuleList | None:
    if head_dim is None:
        return None
    return nn.ModuleList(Attention(channels, head_dim, options.groups, options.eps) for _ in range(count))


class UNetMidBlock2D(nn.Module):
    """Two residual blocks with attention between them.

    Args:
        head_dim: width of an attention head; None for no attention.
        attention_groups: of the attention's normalisation; None for none.
        output_scale_factor: the sums in all three are divided by it.
    """

    def __init__(
        self,
        channels: int,
        options: BlockOptions,
        head_dim: int | None,
        attention_groups: int | None,
        output_scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList()
        if head_dim is not None:
            self.attentions.append(
                Attention(channels, head_dim, attention_groups, options.eps, output_scale_factor)
            )
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, channels, options, output_scale_factor=output_scale_factor)
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        x = self.resnets[0](x, temb)
        for attend in self.attentions:
            x = attend(x)
        out: torch.Tensor = self.resnets[1](x, temb)
        return out
