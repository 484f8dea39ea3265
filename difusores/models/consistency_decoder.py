"""OpenAI's consistency decoder: Stable Diffusion's latents to images in two steps of a consistency model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difusores import schedules
from difusores.configuration import FrozenDict, register_to_config
from difusores.models.autoencoder import (
    AutoencoderKLOutput,
    DecoderOutput,
    DiagonalGaussianDistribution,
    Encoder,
)
from difusores.models.modeling import ModelMixin
from difusores.models.unet_2d import UNet2DModel
from difusores.plan import Noise, Plan, Stage, make_row
from difusores.sampling import Generators, draw_noise

LATENT_MEANS = (0.38862467, 0.02253063, 0.07381133, -0.0171294)
LATENT_STDS = (0.9654121, 1.0440036, 0.76147926, 0.77022034)
"""Of the latents that the decoder was trained with."""
TRAINING_STEPS = 1024
TIMES = (1008, 512)
SIGMA_DATA = 0.5


@cache
def decoder_plan() -> Plan:
    """The two steps (Song et al. 2023, "Consistency models", algorithm 1), over a cosine schedule.

    x0 = c_skip x + c_out f(c_in x), with the factors of Karras et al. 2022 (table 1) for x of a chain that
    keeps its variance; then noise up to the next time, and x0 again.
    """
    betas = schedules.betas("squaredcos_cap_v2", TRAINING_STEPS, 0.0, 0.0)
    alphas = torch.cumprod(1.0 - torch.as_tensor(betas, dtype=torch.float32), dim=0).double()
    stages = []
    for time, later in zip(TIMES, (*TIMES[1:], None), strict=True):
        alpha = float(alphas[time])
        variance = 1 / alpha - 1
        both = variance + SIGMA_DATA**2
        c_skip = alpha**-0.5 * SIGMA_DATA**2 / both
        c_out = variance**0.5 * SIGMA_DATA / both**0.5
        y, noise = {"x0": 1.0}, None
        if later is not None:
            after = float(alphas[later])
            y, noise = {"x0": after**0.5, "z": (1 - after) ** 0.5}, Noise()
        row = make_row((c_skip, c_out), y)
        stages.append(Stage(float(time), row, c_in=(alpha * both) ** -0.5, noise=noise))
    first = (1 - float(alphas[TIMES[0]])) ** 0.5
    return Plan("consistency decoder", tuple(stages), "sample", (), init_noise_sigma=first)


class ConsistencyDecoderVAE(ModelMixin):
    """Images to Gaussians over latents, and latents to images by a consistency model: no tiles, no slices.

    Args:
        scaling_factor: of the latents, which pipelines divide by and `decode` multiplies by.
        latent_channels: 4, for which the decoder's normalisation is known.
        sample_size: height and width for which the encoder was trained.
        encoder_...: of the encoder, as in `AutoencoderKL`; `encoder_double_z` is True.
        decoder_...: of the decoder, a `UNet2DModel` that takes the noisy image and the enlarged latents and
            gives twice an image's channels, of which the first half counts.

    Raises:
        ValueError: an option has a value that is not allowed.
    """

    @register_to_config
    def __init__(
        self,
        scaling_factor: float = 0.18215,
        latent_channels: int = 4,
        sample_size: int = 32,
        encoder_act_fn: str = "silu",
        encoder_block_out_channels: Sequence[int] = (128, 256, 512, 512),
        encoder_double_z: bool = True,
        encoder_down_block_types: Sequence[str] = ("DownEncoderBlock2D",) * 4,
        encoder_in_channels: int = 3,
        encoder_layers_per_block: int = 2,
        encoder_norm_num_groups: int = 32,
        encoder_out_channels: int = 4,
        decoder_add_attention: bool = False,
        decoder_block_out_channels: Sequence[int] = (320, 640, 1024, 1024),
        decoder_down_block_types: Sequence[str] = ("ResnetDownsampleBlock2D",) * 4,
        decoder_downsample_padding: int = 1,
        decoder_in_channels: int = 7,
        decoder_layers_per_block: int = 3,
        decoder_norm_eps: float = 1e-05,
        decoder_norm_num_groups: int = 32,
        decoder_num_train_timesteps: int = 1024,
        decoder_out_channels: int = 6,
        decoder_resnet_time_scale_shift: str = "scale_shift",
        decoder_time_embedding_type: str = "learned",
        decoder_up_block_types: Sequence[str] = ("ResnetUpsampleBlock2D",) * 4,
    ) -> None:
        super().__init__()
        count = len(LATENT_MEANS)
        if latent_channels != count or encoder_out_channels != count or not encoder_double_z:
            raise ValueError(
                f"latent_channels is {latent_channels}, encoder_out_channels {encoder_out_channels} and "
                f"encoder_double_z {encoder_double_z}; allowed are {count}, {count} and True"
            )
        config = self.config
        encoder = {
            "block_out_channels": encoder_block_out_channels,
            "down_block_types": encoder_down_block_types,
            "layers_per_block": encoder_layers_per_block,
            "norm_num_groups": encoder_norm_num_groups,
            "act_fn": encoder_act_fn,
            "mid_block_add_attention": True,
        }
        self.encoder = Encoder(encoder_in_channels, 2 * latent_channels, FrozenDict(encoder))
        prefix = "decoder_"
        options = {key.removeprefix(prefix): config[key] for key in config if key.startswith(prefix)}
        self.decoder_unet = UNet2DModel(**options)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        # what pipelines read of an autoencoder
        self.register_to_config(block_out_channels=encoder_block_out_channels, force_upcast=False)

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """As elsewhere; what the constructor adds to the configuration is left out."""
        added = ("block_out_channels", "force_upcast")
        own = {key: value for key, value in config_dict.items() if key not in added}
        return super().extract_init_dict(own, **kwargs)

    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """[N, encoder_in_channels, H, W] in [-1, 1] to a Gaussian over latents, [N, 4, H / f, W / f]."""
        latent_dist = DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        num_inference_steps: int = 2,
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents to images, without gradients.

        Args:
            z: [N, 4, h, w].
            generator: source of the noise: one, one per image, or None for the global one.
            num_inference_steps: 2.

        Raises:
            ValueError: another shape or number of steps.
        """
        if num_inference_steps != len(TIMES):
            raise ValueError(f"num_inference_steps is {num_inference_steps}; the decoder has {len(TIMES)}")
        if z.ndim != 4 or z.shape[1] != len(LATENT_MEANS):
            raise ValueError(f"latents: got shape {list(z.shape)}; needed is [N, 4, height, width]")
        means, stds = (
            torch.tensor(values, dtype=z.dtype, device=z.device)[:, None, None]
            for values in (LATENT_MEANS, LATENT_STDS)
        )
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        beside = F.interpolate((z * self.config.scaling_factor - means) / stds, scale_factor=factor)
        plan, channels = decoder_plan(), self.config.decoder_in_channels - z.shape[1]
        shape = (len(z), channels, *beside.shape[2:])
        noise = draw_noise(shape, generator, z.device, z.dtype) * plan.init_noise_sigma

        def predict(x: Tensor, time: Tensor) -> Tensor:
            output: Tensor = self.decoder_unet(torch.cat((x, beside), dim=1), time).sample
            return output[:, :channels]

        sample = plan.run(predict, noise, generator=generator)
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
        latents = encoded.latent_dist.sample(generator) if sample_posterior else encoded.latent_dist.mode()
        return self.decode(latents, generator, return_dict)
