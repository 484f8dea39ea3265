"""Stable Diffusion XL: text to image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difusores.pipelines.latent import StepCallback
from difusores.pipelines.legacy_callback import takes_callback
from difusores.pipelines.prompted import Texts
from difusores.pipelines.stable_diffusion_xl_base import (
    Size,
    StableDiffusionXLBase,
    StableDiffusionXLPipelineOutput,
    sizes,
)
from difusores.sampling import Generators


class StableDiffusionXLPipeline(StableDiffusionXLBase):
    """Text to image with Stable Diffusion XL. Components: see `StableDiffusionXLBase`."""

    @takes_callback
    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts = None,
        prompt_2: Texts = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
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
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        strict: bool = True,
    ) -> StableDiffusionXLPipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            prompt, prompt_2, negative_prompt, negative_prompt_2, prompt_embeds, negative_prompt_embeds,
                pooled_prompt_embeds, negative_pooled_prompt_embeds: see `encode_prompt`. Texts of more than
                77 tokens are cut, with a warning.
            denoising_end: share of the training steps, from the noise on, up to which steps are done, in
                (0, 1]; a refiner's `denoising_start` goes on from there with the latents.
            original_size, crops_coords_top_left, target_size: what the model is told about its image: height
                and width before it was made smaller, top and left of what was cut out, height and width of
                the image. (height, width) for sizes that are None.
            negative_original_size, negative_crops_coords_top_left, negative_target_size: what it is told
                with the negative prompts; that of the prompts if both sizes are None.
            callback_on_step_end_tensor_inputs: of "latents", "prompt_embeds", "add_text_embeds" and
                "add_time_ids"; with guidance those of the negative prompts first.
            return_dict: return a `StableDiffusionXLPipelineOutput`; else a tuple of the images.

        The other arguments are those of `StableDiffusionPipeline`.

        Raises:
            NotImplementedError: an IP adapter's image is given.
            ValueError: an argument that is not one of these, or tensors that do not fit.
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
        self._denoising_start, self._denoising_end = None, denoising_end
        size = self._image_size(height, width, latents)
        told = sizes(original_size, crops_coords_top_left, target_size, size)
        negative = negative_original_size, negative_crops_coords_top_left, negative_target_size
        if None not in negative:
            told_negative = sizes(*negative, size)
        elif negative == (None, (0, 0), None):
            told_negative = told
        else:
            raise ValueError("negative_original_size and negative_target_size are needed both, or neither")
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
        self._tell_sizes(conditions, count, told, told_negative)
        run = self._begin_run(
            num_inference_steps, timesteps=timesteps, sigmas=sigmas, end=denoising_end, eta=eta, strict=strict
        )
        factor = self.vae_scale_factor
        shape = (count, self.unet.config["in_channels"], size[0] // factor, size[1] // factor)
        return self._sample(
            run,
            self._latents(shape, latents, generator, run),
            conditions,
            generator,
            output_type,
            return_dict,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
