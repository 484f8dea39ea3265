"""Latent diffusion with conditions of this package's own: a semantic map -> image, a sound -> image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from difusores.models.audio_encoder import AudioEncoder
from difusores.models.conditioning import Conditioning
from difusores.pipelines.checks import check_count, check_finite
from difusores.pipelines.images import ImagePipelineOutput, check_output_type
from difusores.pipelines.latent import StepCallback
from difusores.pipelines.latent_diffusion import ConditionedPipeline
from difusores.sampling import Generators

SemanticMap = Tensor | Image.Image | Sequence[Image.Image]
Audio = Tensor | np.ndarray[Any, Any] | Sequence[Any]


class SemanticToImagePipeline(ConditionedPipeline):
    """Images of a layout: a map is joined to the channels of the latents ("concat", Rombach et al. 2022).

    Args:
        vae: decoder of latents.
        unet: a `UNet2DModel` or another, whose input has `out_channels` of the latents first, then the map's:
            one for each class, or those of an image.
        scheduler: any that the UNet was trained for.
    """

    def __init__(self, vae: Any, unet: Any, scheduler: Any) -> None:
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        semantic_map: SemanticMap,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_map: SemanticMap | None = None,
        callback_on_step_end: StepCallback | None = None,
        strict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images, one for each map and of its size.

        Args:
            semantic_map: class numbers, integers [N, H, W] or [H, W], of which each latent gets the nearest
                one, one-hot; or an image, floating point [N, C, H, W] (colours in [-1, 1], or shares of
                classes), averaged over each latent. A picture of mode "L" or "P" holds class numbers, and
                any other one is an image; a list of pictures of one size is a batch. H and W are divisible
                by 8 and by the decoder's factor.
            latents: the first sample, [N, C, h, w], in place of noise.
            guidance_scale: weight w of classifier-free guidance, unconditional + w * (conditional -
                unconditional) prediction; 1 for none. For models that were trained with maps left out.
            guidance_rescale, guidance_interval: see `Guided`.
            negative_map: what stands for no condition, one map for all or one for each; zeros, which are of
                no class, if None (Wang et al. 2022, "Semantic image synthesis via diffusion models").

        The other arguments are those of `LDMPipeline`.

        Raises:
            ValueError: an argument that is not one of these, or a class that the UNet does not know.
        """
        check_output_type(output_type)
        self._start_guidance(guidance_scale, guidance_rescale, guidance_interval)
        channels = self.unet.config["out_channels"]
        classes = self.unet.config["in_channels"] - channels
        given = _map(semantic_map, "semantic_map")
        height, width = self._image_size(given.shape[-2], given.shape[-1], None)
        size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        image = _map_of_latents(given, classes, size)
        count, both = len(image), image
        if self.do_classifier_free_guidance:
            negative = torch.zeros_like(image)
            if negative_map is not None:
                negative = _map_of_latents(_map(negative_map, "negative_map"), classes, size)
            if len(negative) not in (1, count):
                raise ValueError(f"there are {len(negative)} negative maps for {count} maps")
            both = torch.cat((negative.to(image).expand(image.shape), image))
        conditioning = Conditioning("concat", image=both.to(self.device, self.unet.dtype))
        conditioning.check(self.unet, channels)
        run = self._begin_run(num_inference_steps, eta=eta, strict=strict)
        shape = (count, channels, *size)
        noise = self._latents(shape, latents, generator, run)
        return self._sample(
            run, noise, conditioning, generator, output_type, return_dict, callback_on_step_end
        )


class AudioToImagePipeline(ConditionedPipeline):
    """Images of a sound, whose tokens the UNet attends to ("crossattn").

    Args:
        vae: decoder of latents.
        audio_encoder: an `AudioEncoder`.
        unet: a `UNet2DConditionModel` whose `cross_attention_dim` is the encoder's width.
        scheduler: any that the UNet was trained for.
    """

    def __init__(self, vae: Any, audio_encoder: AudioEncoder, unet: Any, scheduler: Any) -> None:
        self.register_modules(vae=vae, audio_encoder=audio_encoder, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        audio: Audio,
        sampling_rate: int,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        num_images_per_audio: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_audio: Audio | None = None,
        callback_on_step_end: StepCallback | None = None,
        strict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            audio: [samples] or [N, samples], floating point in [-1, 1], or a list of sounds of one length.
            sampling_rate: of the audio, in hertz; it has to be the encoder's.
            height, width: in pixels; None for the UNet's own size.
            guidance_scale: weight w of classifier-free guidance, unconditional + w * (conditional -
                unconditional) prediction (Ho & Salimans 2022); 1 for none.
            num_images_per_audio: images of each sound, side by side.
            latents: the first sample, [N, C, h, w], in place of noise.
            guidance_rescale, guidance_interval: see `Guided`.
            negative_audio: what to lead away from, one sound for all or one for each, of the length of
                `audio`; silence if None.

        The other arguments are those of `LDMPipeline`.

        Raises:
            ValueError: an argument that is not one of these.
        """
        check_output_type(output_type)
        self._start_guidance(guidance_scale, guidance_rescale, guidance_interval)
        times = check_count(num_images_per_audio, "num_images_per_audio")
        waves = _waveforms(audio).to(self.device)
        height, width = self._image_size(height, width, latents)
        tokens = self.audio_encoder(waves, sampling_rate)
        count = len(tokens) * times
        if self.do_classifier_free_guidance:
            unwanted = torch.zeros_like(waves[:1])
            if negative_audio is not None:
                unwanted = _waveforms(negative_audio).to(waves)
            if len(unwanted) not in (1, len(waves)) or unwanted.shape[1:] != waves.shape[1:]:
                raise ValueError(
                    f"negative_audio has shape {list(unwanted.shape)}; needed is [1, {waves.shape[-1]}], or "
                    f"{list(waves.shape)}"
                )
            negative = self.audio_encoder(unwanted, sampling_rate).expand(tokens.shape)
            tokens = torch.cat((negative, tokens))
        tokens = tokens.repeat_interleave(times, dim=0)
        conditioning = Conditioning("crossattn", context=tokens.to(self.unet.dtype))
        channels = self.unet.config["in_channels"]
        conditioning.check(self.unet, channels)
        run = self._begin_run(num_inference_steps, eta=eta, strict=strict)
        factor = self.vae_scale_factor
        shape = (count, channels, height // factor, width // factor)
        return self._sample(
            run,
            self._latents(shape, latents, generator, run),
            conditioning,
            generator,
            output_type,
            return_dict,
            callback_on_step_end,
        )


def _map(given: SemanticMap, name: str) -> Tensor:
    """Class numbers [N, H, W] or an image [N, C, H, W]."""
    found = given if isinstance(given, Tensor) else _from_pictures(given, name)
    check_finite(found, name)
    return found[None] if found.ndim == 2 else found


def _from_pictures(pictures: Image.Image | Sequence[Image.Image], name: str) -> Tensor:
    """Class numbers [N, H, W] of pictures of mode "L" or "P", else an image [N, 3, H, W] in [-1, 1]."""
    every = [pictures] if isinstance(pictures, Image.Image) else pictures
    if (
        not isinstance(every, Sequence)
        or not every
        or not all(isinstance(picture, Image.Image) for picture in every)
    ):
        raise ValueError(f"{name} is {pictures!r}; needed is a tensor, a picture or a list of pictures")
    kinds = {(picture.mode, picture.size) for picture in every}
    if len(kinds) > 1:
        raise ValueError(f"the pictures of one batch need one mode and size, and these have {sorted(kinds)}")
    if every[0].mode in ("L", "P"):
        return torch.stack([torch.from_numpy(np.asarray(picture).astype(np.int64)) for picture in every])
    colours = [np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in every]
    return torch.from_numpy(np.stack(colours)).permute(0, 3, 1, 2) / 127.5 - 1


def _map_of_latents(given: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """[N, channels, *size]: class numbers one-hot, an image averaged."""
    if given.is_floating_point():
        if given.ndim != 4:
            raise ValueError(
                f"semantic_map is {given.dtype} {list(given.shape)}; needed are integers [N, H, W] or an "
                "image, floating point [N, C, H, W]"
            )
        return F.interpolate(given, size, mode="area")
    if given.ndim != 3 or not given.numel():
        raise ValueError(f"semantic_map is {given.dtype} {list(given.shape)}; needed are integers [N, H, W]")
    lowest, highest = int(given.min()), int(given.max())
    if lowest < 0 or highest >= channels:
        raise ValueError(
            f"the map has classes from {lowest} to {highest}; the UNet takes {channels}, from 0 to "
            f"{channels - 1}"
        )
    rows, columns = (
        (torch.arange(new, device=given.device) * 2 + 1) * old // (2 * new)
        for new, old in zip(size, given.shape[1:], strict=True)
    )
    nearest = given[:, rows[:, None], columns].long()
    return F.one_hot(nearest, channels).permute(0, 3, 1, 2).float()


def _waveforms(audio: Audio) -> Tensor:
    """[N, samples]."""
    if isinstance(audio, (Tensor, np.ndarray)):
        waves = torch.as_tensor(audio)
        return waves[None] if waves.ndim == 1 else waves
    if isinstance(audio, str) or not isinstance(audio, Sequence) or not audio:
        raise ValueError(
            f"audio is {audio!r}; needed are samples, [samples] or [N, samples], or a list of them"
        )
    parts = [torch.as_tensor(part) for part in audio]
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) != 1 or parts[0].ndim != 1:
        raise ValueError(
            f"a list of sounds needs one length, [samples] each, and these have shapes {sorted(shapes)}"
        )
    return torch.stack(parts)
