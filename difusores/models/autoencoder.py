"""Autoencoders of latent diffusion (Rombach et al. 2022): images to small latents and back.

`AutoencoderKL` gives a Gaussian over latents, `VQModel` the nearest entries of a codebook (Esser et al.
2021). Configuration and parameter names are diffusers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difusores.configuration import FrozenDict, register_to_config
from difusores.models import striped
from difusores.models.blocks import DownBlock2D, UNetMidBlock2D, UpBlock2D, image_attention
from difusores.models.layers import BlockOptions, GroupNormAct
from difusores.models.modeling import ModelMixin
from difusores.models.original_layout import VAE
from difusores.models.single_file import SingleFileModel
from difusores.outputs import BaseOutput
from difusores.sampling import Generators, draw_noise

NORM_EPS = 1e-6
LOGVAR_LIMITS = (-30.0, 20.0)
DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
TILE_OVERLAP = 0.25  # part of a tile that its neighbour covers too
COMMITMENT = 0.25  # weight of the term that pulls the codebook (sic, as published checkpoints were trained)


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """latent_dist: what `encode` found."""

    latent_dist: DiagonalGaussianDistribution


@dataclass
class VQEncoderOutput(BaseOutput):
    """latents: [N, vq_embed_dim, h, w], not yet quantised."""

    latents: Tensor


@dataclass
class DecoderOutput(BaseOutput):
    """sample: [N, out_channels, H, W], about -1 to 1; commit_loss: of a `VQModel`."""

    sample: Tensor
    commit_loss: Tensor | None = None


class DiagonalGaussianDistribution:
    """Independent normal latents.

    Args:
        parameters: [N, 2 * C, h, w], means and logarithms of variances.
        deterministic: variance 0.

    Attributes:
        mean, logvar, std, var: [N, C, h, w]; logvar is limited to `LOGVAR_LIMITS`.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_LIMITS)
        zero = torch.zeros_like(self.mean)
        self.std = zero if deterministic else (0.5 * self.logvar).exp()
        self.var = zero if deterministic else self.logvar.exp()

    def sample(self, generator: Generators = None) -> Tensor:
        """A draw from it; a list of generators draws one image each."""
        mean = self.mean
        return mean + self.std * draw_noise(mean.shape, generator, mean.device, mean.dtype)

    def mode(self) -> Tensor:
        """Its mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Kullback-Leibler divergence in nats per image from `other`, or from the standard normal: [N]."""
        if self.deterministic:
            return torch.zeros(1, dtype=self.mean.dtype, device=self.mean.device)
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean) ** 2
            terms = (distance + self.var) / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative logarithm of the density at `sample` in nats, summed over `dims`."""
        if self.deterministic:
            return torch.zeros(1, dtype=self.mean.dtype, device=self.mean.device)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=tuple(dims))


class Encoder(nn.Module):
    """[N, in_channels, H, W] -> [N, out_channels, H / f, W / f], f = 2 ** (resolutions - 1)."""

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict) -> None:
        super().__init__()
        widths, groups = list(config.block_out_channels), config.norm_num_groups
        options = BlockOptions(None, groups, NORM_EPS, config.act_fn)
        attend = image_attention(None, groups, NORM_EPS)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock2D(
                widths[max(i - 1, 0)],
                widths[i],
                options,
                num_layers=config.layers_per_block,
                attend=attend if kind == "AttnDownEncoderBlock2D" else None,
                downsample="conv" if i < len(widths) - 1 else None,
                padding=0,
            )
            for i, kind in enumerate(config.down_block_types)
        )
        self.mid_block = UNetMidBlock2D(
            widths[-1], options, attend if config.mid_block_add_attention else None
        )
        self.conv_norm_out = GroupNormAct(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor, by_stripes: bool = False) -> Tensor:
        """by_stripes: see `striped`."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = striped.down_block(block, x) if by_stripes else block(x)[0]
        out: Tensor = self.conv_out(self.conv_norm_out(self.mid_block(x)))
        return out


class Decoder(nn.Module):
    """[N, in_channels, h, w] -> [N, out_channels, f * h, f * w], f = 2 ** (resolutions - 1)."""

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict) -> None:
        super().__init__()
        widths, groups = list(config.block_out_channels)[::-1], config.norm_num_groups
        options = BlockOptions(None, groups, NORM_EPS, config.act_fn)
        attend = image_attention(None, groups, NORM_EPS)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            UpBlock2D(
                widths[max(i - 1, 0)],
                [0] * (config.layers_per_block + 1),
                widths[i],
                options,
                attend=attend if kind == "AttnUpDecoderBlock2D" else None,
                upsample="conv" if i < len(widths) - 1 else None,
            )
            for i, kind in enumerate(config.up_block_types)
        )
        self.mid_block = UNetMidBlock2D(
            widths[0], options, attend if config.mid_block_add_attention else None
        )
        self.conv_norm_out = GroupNormAct(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z: Tensor, by_stripes: bool = False) -> Tensor:
        """by_stripes: see `striped`."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = striped.up_block(block, x) if by_stripes else block(x, [])
        if by_stripes and striped.is_large(x):
            return striped.convolved(self.conv_out, x, self.conv_norm_out)
        out: Tensor = self.conv_out(self.conv_norm_out(x))
        return out


class AutoencoderKL(SingleFileModel):
    """Images to Gaussians over latents, latents to images.

    Args:
        in_channels, out_channels: of images.
        down_block_types, up_block_types: one for each resolution, see `DOWN_BLOCKS` and `UP_BLOCKS`.
        block_out_channels: width at each resolution, highest resolution first.
        layers_per_block: residual blocks at each resolution of the encoder; the decoder has one more.
        act_fn, norm_num_groups: as in `UNet2DModel`.
        latent_channels: width of latents.
        sample_size: height and width for which it was trained, which is also the size of a tile.
        scaling_factor, shift_factor, latents_mean, latents_std: pipelines normalise latents by them.
        force_upcast: pipelines decode in float32 where the model is in float16.
        use_quant_conv, use_post_quant_conv: a 1x1 convolution after the encoder, before the decoder.
        mid_block_add_attention: attention at the lowest resolution.

    Raises:
        ValueError: an option has a value that is not allowed.
    """

    original_layout = VAE

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | Sequence[int] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        _check_options(self.config, type(self).__name__)
        self.encoder = Encoder(in_channels, 2 * latent_channels, self.config)
        self.decoder = Decoder(latent_channels, out_channels, self.config)
        width = 2 * latent_channels
        self.quant_conv = nn.Conv2d(width, width, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.use_slicing = False
        self.use_tiling = False
        size = sample_size[0] if isinstance(sample_size, Sequence) else sample_size
        self.tile_sample_min_size = size
        self.tile_latent_min_size = size // 2 ** (len(block_out_channels) - 1)
        self.tile_overlap_factor = TILE_OVERLAP

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encode and decode large images tile by tile, blended where tiles overlap: memory stays bounded.

        On a CPU, without gradients, the largest layers of a tile go stripe by stripe besides (`striped`).
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Encode and decode whole images again."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Encode and decode one image of a batch after the other."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode whole batches again."""
        self.use_slicing = False

    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """[N, in_channels, H, W] in [-1, 1] to a Gaussian over latents, [N, latent_channels, H // f, W // f].

        Raises:
            ValueError: another shape.
        """
        _check_shape(x, self.encoder.conv_in.in_channels, "image")
        slices = x.split(1) if self.use_slicing else [x]
        moments = torch.cat([self._encode(part) for part in slices])
        latent_dist = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Generators = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents [N, latent_channels, h, w] to images. `generator` is not used: nothing is drawn here."""
        _check_shape(z, self.decoder.conv_in.in_channels, "latents")
        slices = z.split(1) if self.use_slicing else [z]
        sample = torch.cat([self._decode(part) for part in slices])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def tiled_encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """`encode` by tiles, whatever `enable_tiling` says."""
        moments = self._by_tiles(x, self._encode_tile, self.tile_sample_min_size, self.tile_latent_min_size)
        latent_dist = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """`decode` by tiles, whatever `enable_tiling` says."""
        sample = self._by_tiles(z, self._decode_tile, self.tile_latent_min_size, self.tile_sample_min_size)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """An image through both halves, by a draw of its latents or by their mean."""
        encoded = self.encode(sample)
        assert isinstance(encoded, AutoencoderKLOutput)
        latent_dist = encoded.latent_dist
        z = latent_dist.sample(generator) if sample_posterior else latent_dist.mode()
        return self.decode(z, return_dict=return_dict)

    def _encode(self, x: Tensor) -> Tensor:
        if self.use_tiling and max(x.shape[2:]) > self.tile_sample_min_size:
            return self._by_tiles(x, self._encode_tile, self.tile_sample_min_size, self.tile_latent_min_size)
        return self._encode_tile(x, self.use_tiling)

    def _decode(self, z: Tensor) -> Tensor:
        if self.use_tiling and max(z.shape[2:]) > self.tile_latent_min_size:
            return self._by_tiles(z, self._decode_tile, self.tile_latent_min_size, self.tile_sample_min_size)
        return self._decode_tile(z, self.use_tiling)

    def _encode_tile(self, x: Tensor, by_stripes: bool = True) -> Tensor:
        moments: Tensor = self.encoder(x, _by_stripes(x, by_stripes))
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode_tile(self, z: Tensor, by_stripes: bool = True) -> Tensor:
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        sample: Tensor = self.decoder(z, _by_stripes(z, by_stripes))
        return sample

    def _by_tiles(self, x: Tensor, work: Callable[[Tensor], Tensor], size: int, result_size: int) -> Tensor:
        """`work` on overlapping tiles of `size`, each giving one of `result_size`; overlaps blend linearly.

        Beside the result only what overlaps with later tiles is held.
        """
        stride = int(size * (1 - self.tile_overlap_factor))
        overlap = int(result_size * self.tile_overlap_factor)
        kept = result_size - overlap
        # what is narrower than one latent leaves none
        tops, lefts = (
            [start for start in range(0, length, stride) if (length - start) * result_size >= size]
            for length in x.shape[2:]
        )
        rows: list[Tensor] = []
        above: list[Tensor] = []
        for top in tops:
            parts: list[Tensor] = []
            lower: list[Tensor] = []
            beside: Tensor | None = None
            for i, left in enumerate(lefts):
                tile = work(x[:, :, top : top + size, left : left + size])
                if above:
                    _blend(above[i], tile, overlap, dim=2)
                if beside is not None:
                    _blend(beside, tile, overlap, dim=3)
                beside = tile[:, :, :, -overlap:].clone()
                lower.append(tile[:, :, -overlap:].clone())
                parts.append(tile[:, :, :kept, :kept].clone())
                del tile  # what is needed of it is copied, and the next one is made without it
            rows.append(torch.cat(parts, dim=3))
            above = lower
        return torch.cat(rows, dim=2)


class VectorQuantizer(nn.Module):
    """Replaces each latent by the nearest row of a table."""

    def __init__(self, n_e: int, vq_embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_e, vq_embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, C, h, w] -> (quantised, with gradients passed straight through; loss; [N * h * w] indices)."""
        rows = z.permute(0, 2, 3, 1).contiguous()
        indices = torch.cdist(rows.flatten(0, 2), self.embedding.weight).argmin(dim=1)
        nearest = self.embedding(indices).view(rows.shape)
        loss = F.mse_loss(nearest.detach(), rows) + COMMITMENT * F.mse_loss(nearest, rows.detach())
        quantised = rows + (nearest - rows).detach()
        return quantised.permute(0, 3, 1, 2).contiguous(), loss, indices

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None) -> Tensor:
        """Rows of the table; shape: [N, h, w, C], returned as [N, C, h, w], or None for [indices, C]."""
        rows: Tensor = self.embedding(indices)
        return rows if shape is None else rows.view(*shape).permute(0, 3, 1, 2).contiguous()


class VQModel(ModelMixin):
    """Images to latents that are entries of a codebook, and back.

    Args:
        num_vq_embeddings: entries of the codebook.
        vq_embed_dim: their width; None for `latent_channels`.
        norm_type: "group".
        lookup_from_codebook: `decode` with `force_not_quantize` takes indices.

    The other options are those of `AutoencoderKL`.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        _check_options(self.config, type(self).__name__)
        if norm_type != "group":
            raise ValueError(f"norm_type has {norm_type!r}; VQModel allows 'group'")
        embed_dim = vq_embed_dim or latent_channels
        self.encoder = Encoder(in_channels, latent_channels, self.config)
        self.quant_conv = nn.Conv2d(latent_channels, embed_dim, 1)
        self.quantize = VectorQuantizer(num_vq_embeddings, embed_dim)
        self.post_quant_conv = nn.Conv2d(embed_dim, latent_channels, 1)
        self.decoder = Decoder(latent_channels, out_channels, self.config)

    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """[N, in_channels, H, W] to latents that are not yet quantised; raises as `AutoencoderKL.encode`."""
        _check_shape(x, self.encoder.conv_in.in_channels, "image")
        latents = self.quant_conv(self.encoder(x))
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: Sequence[int] | None = None,
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Latents to images.

        Args:
            h: [N, vq_embed_dim, h, w]; indices with `force_not_quantize` and `lookup_from_codebook`.
            force_not_quantize: take latents as they are.
            return_dict: return a `DecoderOutput`; else the tuple (sample, commit_loss).
            shape: [N, h, w, vq_embed_dim], for indices.
        """
        if not force_not_quantize:
            _check_shape(h, self.post_quant_conv.in_channels, "latents")
            latents, loss, _ = self.quantize(h)
        else:
            looked_up = self.config.lookup_from_codebook
            latents = self.quantize.get_codebook_entry(h, shape) if looked_up else h
            loss = torch.zeros(len(h), dtype=latents.dtype, device=h.device)
        sample = self.decoder(self.post_quant_conv(latents))
        return DecoderOutput(sample=sample, commit_loss=loss) if return_dict else (sample, loss)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor, Tensor]:
        """An image through both halves, by way of the codebook."""
        encoded = self.encode(sample)
        assert isinstance(encoded, VQEncoderOutput)
        return self.decode(encoded.latents, return_dict=return_dict)


def _by_stripes(x: Tensor, wanted: bool) -> bool:
    """Stripes write over images, so that no gradient can be taken; a GPU's memory takes tiles whole."""
    return wanted and x.device.type == "cpu" and not torch.is_grad_enabled()


def _blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> None:
    """Let the beginning of a tile come out of the end of the one before, in place."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    ramp = torch.arange(extent, dtype=tile.dtype, device=tile.device) / max(extent, 1)
    ramp = ramp.view([-1 if d == dim else 1 for d in range(tile.ndim)])
    start = tile.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start.copy_(end * (1 - ramp) + start * ramp)


def _check_shape(x: Tensor, channels: int, what: str) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{what}: got shape {list(x.shape)}; needed is [N, {channels}, height, width]")


def _check_options(config: FrozenDict, name: str) -> None:
    widths = list(config.block_out_channels)
    for option, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        for kind in config[option]:
            if kind not in allowed:
                raise ValueError(f"{option} has {kind!r}; {name} allows {', '.join(map(repr, allowed))}")
        if len(config[option]) != len(widths):
            raise ValueError(
                f"{option} has {len(config[option])} entries, and block_out_channels has {len(widths)}"
            )
    groups = config.norm_num_groups
    if not isinstance(groups, int) or groups < 1 or any(width % groups for width in widths):
        raise ValueError(f"norm_num_groups is {groups}; it has to divide all of block_out_channels {widths}")
