"""Layers of ADM (Dhariwal & Nichol 2021), and its options as guided-diffusion writes them.

Module names are those of its checkpoints. Images are [N, C, H, W], `emb` is the time embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from difusores.models.layers import GroupNormAct, double
from difusores.ops import attention

WIDTHS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
"""`channel_mult` by image size, where it is not given."""
UPSAMPLER_WIDTHS: dict[int, tuple[float, ...]] = {
    512: (1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    64: (1, 2, 3, 4),
}
"""The same for models that are given a small image."""
GROUPS = 32

Numbers = str | Sequence[float]
Attend = Callable[[int], "AttentionBlock"]
Residual = Callable[..., "ResBlock"]


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut; the time embedding enters at the second normalisation.

    Args:
        width_in, width_out: channels.
        emb_width: of the time embedding.
        dropout: probability, in training only.
        scale_shift: the embedding scales and shifts after the normalisation; else it is added before.
        resample: "up" doubles, "down" halves height and width of both branches (Brock et al. 2019).
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        emb_width: int,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        # nn.Identity keeps the places of what is fused into the normalisation, or has no parameters
        self.in_layers = nn.Sequential(
            GroupNormAct(GROUPS, width_in, 1e-5), nn.Identity(), nn.Conv2d(width_in, width_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_width, 2 * width_out if scale_shift else width_out)
        )
        self.out_layers = nn.Sequential(
            GroupNormAct(GROUPS, width_out, 1e-5),
            nn.Identity(),
            nn.Dropout(dropout),
            nn.Conv2d(width_out, width_out, 3, padding=1),
        )
        nn.init.zeros_(self.out_layers[3].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.out_layers[3].bias)  # type: ignore[arg-type]
        self.skip_connection = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def _resampled(self, x: torch.Tensor) -> torch.Tensor:
        if self.resample == "up":
            return double(x)
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        norm, _, dropout, conv = self.out_layers
        hidden = self.in_layers[2](self._resampled(self.in_layers[0](x)))
        embedding = self.emb_layers(emb)
        if self.scale_shift:
            scale, shift = embedding.chunk(2, dim=1)
            hidden = norm(hidden, scale=scale, shift=shift)
        else:
            hidden = norm(hidden, add=embedding)
        out: torch.Tensor = self.skip_connection(self._resampled(x)) + conv(dropout(hidden))
        return out


class AttentionBlock(nn.Module):
    """Self-attention over the pixels of a normalised image, added to the image.

    Args:
        channels: width of the image.
        heads: their number, of which channels is a multiple.
        new_order: the projection holds all queries, then all keys, then all values; else those of the first
            head, then of the second, and so on.
    """

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = GroupNormAct(GROUPS, channels, 1e-5, act_fn=None)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        if self.proj_out.bias is not None:
            nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        """x: [N, C, H, W]; `emb` is not looked at: residual blocks stand in the same row."""
        tokens = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # [N, HW, C]
        qkv = F.linear(tokens, self.qkv.weight[:, :, 0], self.qkv.bias)
        if self.new_order:
            q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = qkv.unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        out = attention(q, k, v).transpose(1, 2).flatten(2)
        out = F.linear(out, self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x + out.transpose(1, 2).reshape(x.shape)


class AttentionPool2d(nn.Module):
    """Attention from the mean of the pixels to the mean and the pixels: [N, C, S, S] -> [N, out_channels].

    Args:
        size: S.
        channels: C.
        head_width: of a head; C is a multiple of it.
    """

    def __init__(self, size: int, channels: int, head_width: int, out_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_width
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat((tokens.mean(dim=1, keepdim=True), tokens), dim=1)
        tokens = tokens + self.positional_embedding.t().to(x.dtype)
        channels = tokens.shape[2]
        weight, bias = self.qkv_proj.weight[:, :, 0], self.qkv_proj.bias
        assert bias is not None
        # of all queries only the mean's has an answer that is read
        q = F.linear(tokens[:, :1], weight[:channels], bias[:channels])
        k, v = F.linear(tokens, weight[channels:], bias[channels:]).chunk(2, dim=2)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = attention(q, k, v).transpose(1, 2).flatten(1)
        return F.linear(out, self.c_proj.weight[:, :, 0], self.c_proj.bias)


class Downsample(nn.Module):
    """Height and width halved by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Height and width doubled by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.conv(double(x))
        return out


class Row(nn.Sequential):
    """Layers one after the other; those that take a time embedding are given it."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb)
        return x


def time_layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))


def way_down(
    in_channels: int,
    widths: Sequence[int],
    layers: int,
    attended: Iterable[int],
    residual: Residual,
    attend: Attend,
    resblock_updown: bool,
) -> tuple[nn.ModuleList, list[int]]:
    """The input blocks, and the width of what each of them gives."""
    blocks = nn.ModuleList([Row(nn.Conv2d(in_channels, widths[0], 3, padding=1))])
    states = [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(layers):
            row = [residual(states[-1], width), *([attend(width)] if 2**level in attended else [])]
            blocks.append(Row(*row))
            states.append(width)
        if level < len(widths) - 1:
            last = residual(width, width, resample="down") if resblock_updown else Downsample(width)
            blocks.append(Row(last))
            states.append(width)
    return blocks, states


def _numbers(name: str, value: Numbers) -> tuple[float, ...]:
    """ "32,16,8" or a sequence of numbers."""
    try:
        return tuple(map(float, value.split(",") if isinstance(value, str) else value))
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}; needed are numbers with commas between them") from error


def widths_of(
    num_channels: int, channel_mult: Numbers, image_size: int, known: dict[int, tuple[float, ...]]
) -> list[int]:
    factors: Sequence[float]
    if isinstance(channel_mult, str) and not channel_mult:
        if image_size not in known:
            raise ValueError(
                f'channel_mult is "" and image_size is {image_size}; without channel_mult the sizes '
                f"{', '.join(map(str, sorted(known)))} are allowed"
            )
        factors = known[image_size]
    else:
        factors = _numbers("channel_mult", channel_mult)
    widths = [int(factor * num_channels) for factor in factors]
    if any(width % GROUPS or width < 1 for width in widths):
        raise ValueError(
            f"num_channels is {num_channels} and channel_mult {list(factors)}: widths of {widths}; needed "
            f"are multiples of {GROUPS}, into which the normalisations divide them"
        )
    return widths


def attended_levels(attention_resolutions: Numbers, image_size: int, levels: int) -> set[int]:
    """The factors of downsampling at which there is attention."""
    reached = {image_size / 2**level: 2**level for level in range(levels)}
    sides = [] if attention_resolutions == "" else _numbers("attention_resolutions", attention_resolutions)
    for side in sides:
        if side not in reached:
            raise ValueError(
                f"attention_resolutions has {side:g}; this network's are "
                f"{', '.join(f'{known:g}' for known in reached)}"
            )
    return {reached[side] for side in sides}


def head_count(width: int, number: int, head_width: int) -> int:
    """How many heads attention of this width has: `number`, or those of `head_width` channels each."""
    name, value = ("num_heads", number) if head_width == -1 else ("num_head_channels", head_width)
    if value < 1 or width % value:
        raise ValueError(
            f"{name} is {value}; needed is a divisor of the width of all attention, here {width}"
        )
    return value if head_width == -1 else width // value


def check_image(sample: torch.Tensor, channels: int, factor: int) -> None:
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


def times_of(timestep: torch.Tensor | float, sample: torch.Tensor) -> torch.Tensor:
    times = torch.as_tensor(timestep, device=sample.device).reshape(-1)
    if times.numel() not in (1, sample.shape[0]):
        raise ValueError(f"timestep has {times.numel()} elements; needed is one, or one for each image")
    return times.expand(sample.shape[0])
