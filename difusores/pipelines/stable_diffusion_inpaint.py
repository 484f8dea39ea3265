"""Inpainting with Stable Diffusion: by a model that is told the mask, or by any text-to-image model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difusores.pipelines.latent import StepCallback
from difusores.pipelines.legacy_callback import takes_callback
from difusores.pipelines.mask_crop import MaskCrop
from difusores.pipelines.prompted import BESIDE, Texts
from difusores.pipelines.stable_diffusion import StableDiffusionBase, StableDiffusionPipelineOutput
from difusores.sampling import Generators


class StableDiffusionInpaintPipeline(StableDiffusionBase):
    """Fill the masked part of an image. Components: see `StableDiffusionBase`.

    A UNet of 9 input channels is told the mask and the latents of the rest of the image (Rombach et al. 2022,
    section 4.5). With one of 4, what is outside of the mask is put back after every step, with that step's
    noise (Lugmayr et al. 2022, "RePaint", equation 8).
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", *BESIDE)
    single_file_channels = (4, 9)

    def _update_old_configs(self, unet: Any, scheduler: Any) -> None:
        """What is replaced elsewhere, and PNDM's Runge-Kutta steps are left out."""
        super()._update_old_configs(unet, scheduler)
        if scheduler.config.get("skip_prk_steps") is False:
            scheduler.register_to_config(skip_prk_steps=True)

    @takes_callback
    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Texts = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        strict: bool = True,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Sample images.

        Args:
            image: see `preprocess`; or latents [N, 4, h, w], with the VAE's scaling factor. It is resized to
                `height` and `width`.
            mask_image: 1 where the image is made anew, see `preprocess_mask`.
            masked_image_latents: [N, 4, h, w] of the image without the masked part, in place of encoding it.
            padding_mask_crop: sample the part around the mask alone, with that many pixels more on each side,
                at `height` and `width`, and put it back into the image, see `MaskCrop`.
            strength: share of the steps that is done, from the end; 1 begins at noise alone.

        The other arguments and Raises are those of `StableDiffusionPipeline`.
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
        size = self._image_size(height, width, None)
        crop = None
        if padding_mask_crop is not None:
            crop = MaskCrop.around(image, mask_image, padding_mask_crop, size, output_type)
            image, mask_image = crop.parts(size)
        count, conditions = self._conditions(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt
        )
        run = self._begin_run(
            num_inference_steps, timesteps=timesteps, sigmas=sigmas, strength=strength, eta=eta, strict=strict
        )
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
            "noise" if strength == 1 else "noisy image",
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
