"""Inpainting with Stable Diffusion XL: by a model that is told the mask, or by any text-to-image model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difusores.pipelines.latent import StepCallback
from difusores.pipelines.legacy_callback import takes_callback
from difusores.pipelines.mask_crop import MaskCrop
from difusores.pipelines.prompted import BESIDE, Texts
from difusores.pipelines.stable_diffusion_xl_base import (
    Size,
    StableDiffusionXLBase,
    StableDiffusionXLPipelineOutput,
)
from difusores.pipelines.stable_diffusion_xl_img2img import (
    AESTHETIC_SCORE,
    NEGATIVE_AESTHETIC_SCORE,
    StableDiffusionXLImageBase,
)
from difusores.sampling import Generators

STRENGTH = 0.9999


class StableDiffusionXLInpaintPipeline(StableDiffusionXLImageBase):
    """Fill the masked part of an image, as `StableDiffusionInpaintPipeline` does. Components: see
    `StableDiffusionXLImageBase`; the UNet has 4 or 9 input channels.
    """

    single_file_channels = (4, 9)
    _callback_tensor_inputs = (*StableDiffusionXLBase._callback_tensor_inputs, *BESIDE)

    @takes_callback
    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts = None,
        prompt_2: Texts = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = STRENGTH,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 7.5,
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
            image, mask_image, masked_image_latents, height, width, padding_mask_crop, strength: see
                `StableDiffusionInpaintPipeline`.
            latents: [images, 4, height / 8, width / 8], standard normal, in place of drawn ones; not with
                `denoising_start`.

        The other arguments and Raises are those of `StableDiffusionXLImg2ImgPipeline`.
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
        if latents is not None and denoising_start is not None:
            raise ValueError(
                "latents and denoising_start are given: the run begins at the image's latents then"
            )
        size = self._image_size(height, width, None)
        crop = None
        if padding_mask_crop is not None:
            crop = MaskCrop.around(image, mask_image, padding_mask_crop, size, output_type)
            image, mask_image = crop.parts(size)
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
        begin = "image" if denoising_start is not None else "noise" if strength == 1 else "noisy image"
        first, after = self._inpainting(
            run,
            conditions,
            count,
            size,
            image,
            mask_image,
            masked_image_latents,
            latents,
            generator,
            begin,
        )
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
        result = self._sample(
            run,
            first,
            conditions,
            generator,
            output_type,
            return_dict,
            beside=self._beside(),
            after=after,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        if crop is not None:
            crop.put_back(result[0])
        return result
