"""Image and text to image with Stable Diffusion XL, and its refiners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difusores.pipelines.checks import check_finite
from difusores.pipelines.latent import Conditions, StepCallback
from difusores.pipelines.legacy_callback import takes_callback
from difusores.pipelines.prompted import Texts
from difusores.pipelines.stable_diffusion_xl_base import (
    Size,
    StableDiffusionXLBase,
    StableDiffusionXLPipelineOutput,
    sizes,
)
from difusores.sampling import Generators

STRENGTH = 0.3
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


class StableDiffusionXLImageBase(StableDiffusionXLBase):
    """What the pipelines of Stable Diffusion XL that begin at an image have in common.

    Args:
        requires_aesthetics_score: the UNet is told an aesthetic score in the place of the target size, as
            refiners are.

    The other components are those of `StableDiffusionXLBase`.
    """

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super().__init__(
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            image_encoder,
            feature_extractor,
            force_zeros_for_empty_prompt,
            add_watermarker,
        )
        self.register_to_config(requires_aesthetics_score=requires_aesthetics_score)

    def _strength(
        self, strength: float, default: float, start: float | None, end: float | None
    ) -> float | None:
        """The strength, None with a `denoising_start`; both shares are kept for callbacks."""
        self._denoising_start, self._denoising_end = start, end
        if start is None:
            return strength
        if strength != default:
            raise ValueError(
                f"strength is {strength} and denoising_start {start}: each of them says where the run begins"
            )
        return None

    def _tell(
        self,
        conditions: Conditions,
        latents: Tensor,
        original_size: Size | None,
        crops_coords_top_left: Size,
        target_size: Size | None,
        negative_original_size: Size | None,
        negative_crops_coords_top_left: Size,
        negative_target_size: Size | None,
        aesthetic_score: float,
        negative_aesthetic_score: float,
    ) -> None:
        """Put the time ids among the conditions; see `StableDiffusionXLImg2ImgPipeline`.

        latents: the first sample.

        Raises:
            ValueError: one is given that the model is not told.
        """
        size = latents.shape[-2] * self.vae_scale_factor, latents.shape[-1] * self.vae_scale_factor
        told = sizes(original_size, crops_coords_top_left, target_size, size)
        scored = self.config["requires_aesthetics_score"]
        crops = negative_crops_coords_top_left
        if not scored and tuple(crops) == (0, 0):
            crops = crops_coords_top_left
        negative = sizes(negative_original_size, crops, negative_target_size, size)
        if negative_original_size is None:
            negative = told[0], *negative[1:]
        scores = aesthetic_score, negative_aesthetic_score
        if scored:
            if target_size is not None or negative_target_size is not None:
                raise ValueError(
                    "target_size or negative_target_size is given, and this model is told an aesthetic score "
                    "in its place (requires_aesthetics_score)"
                )
            told, negative = (*told[:2], scores[:1]), (*negative[:2], scores[1:])
        else:
            if scores != (AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE):
                raise ValueError(
                    f"aesthetic_score and negative_aesthetic_score are {scores[0]} and {scores[1]}, and this "
                    "model is told none (requires_aesthetics_score is False)"
                )
            if negative_target_size is None:
                negative = *negative[:2], told[2]
        reason = f"; requires_aesthetics_score is {scored}"
        self._tell_sizes(conditions, len(latents), told, negative, reason)


class StableDiffusionXLImg2ImgPipeline(StableDiffusionXLImageBase):
    """Image and text to image with Stable Diffusion XL or its refiners (Meng et al. 2022, "SDEdit").
    Components: see `StableDiffusionXLImageBase`.
    """

    @takes_callback
    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts = None,
        prompt_2: Texts = None,
        image: Any = None,
        strength: float = STRENGTH,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: Texts = None,
        negative_prompt_2: Texts = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        aesthetic_score: float = AESTHETIC_SCORE,
        negative_aesthetic_score: float = NEGATIVE_AESTHETIC_SCORE,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        strict: bool = True,
    ) -> StableDiffusionXLPipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            image: see `preprocess`; or latents [N, 4, h, w], with the VAE's scaling factor. Where there are
                fewer than prompts, the whole list is used again.
            strength: share of the steps that is done, from the end: 1 leaves little of the image. One
                that leaves no step is refused.
            denoising_start: share of the training steps, from the noise on, at which the steps begin, in
                (0, 1), in the place of `strength`. The image is taken to have the noise of the first one, as
                what a `denoising_end` left has.
            latents: the first sample, as it is, in the place of `image`.
            aesthetic_score, negative_aesthetic_score: what refiners are told in place of the target sizes.
            negative_original_size, negative_target_size: those of the prompts if None.
            negative_crops_coords_top_left: that of the prompts if (0, 0), and there is no aesthetic score.

        The other arguments and Raises are those of `StableDiffusionXLPipeline`.
        """
        self._start_call(
            (guidance_scale, guidance_rescale, guidance_interval),
            clip_skip,
            cross_attention_kwargs,
            output_type,
            callback_on_step_end_tensor_inputs,
            ip_adapter_image,
            ip_adapter_image_embeds,
        )
        count, conditions = self._conditions(
            num_images_per_prompt,
            prompt,
            prompt_2,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
        )
        run = self._begin_run(
            num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            strength=self._strength(strength, STRENGTH, denoising_start, denoising_end),
            start=denoising_start,
            end=denoising_end,
            eta=eta,
            strict=strict,
        )
        if latents is None:
            first = self._noisy_image(image, count, run, generator, denoising_start is None)
        elif image is not None:
            raise ValueError(
                "image and latents are given: latents are the first sample, and image is not read"
            )
        else:
            first = self._given(latents, count)
        self._tell(
            conditions,
            first,
            original_size,
            crops_coords_top_left,
            target_size,
            negative_original_size,
            negative_crops_coords_top_left,
            negative_target_size,
            aesthetic_score,
            negative_aesthetic_score,
        )
        return self._sample(
            run,
            first,
            conditions,
            generator,
            output_type,
            return_dict,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )

    def _given(self, latents: Tensor, count: int) -> Tensor:
        """The caller's first sample."""
        check_finite(latents, "latents")
        if latents.ndim != 4 or len(latents) != count:
            raise ValueError(f"latents have shape {list(latents.shape)}; needed is {[count, 4, 'h', 'w']}")
        return latents.to(self.device, self.unet.dtype)
