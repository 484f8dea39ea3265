"""Image and text to image with Stable Diffusion: the run begins at an image with noise (SDEdit)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difusores.pipelines.latent import StepCallback
from difusores.pipelines.legacy_callback import takes_callback
from difusores.pipelines.prompted import Texts
from difusores.pipelines.stable_diffusion import StableDiffusionBase, StableDiffusionPipelineOutput
from difusores.sampling import Generators


class StableDiffusionImg2ImgPipeline(StableDiffusionBase):
    """Image and text to image with Stable Diffusion 1.x and 2.x (Meng et al. 2022, "SDEdit"). Components: see
    `StableDiffusionBase`.
    """

    @takes_callback
    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int | None = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = 7.5,
        negative_prompt: Texts = None,
        num_images_per_prompt: int | None = 1,
        eta: float | None = 0.0,
        generator: Generators = None,
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
            image: see `preprocess`; or latents [N, 4, h, w], with the VAE's scaling factor. Where there are
                fewer than prompts, the whole list is used again.
            strength: share of the steps that is done, from the end: 1 leaves little of the image. One
                that leaves no step is refused.

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
        count, conditions = self._conditions(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt
        )
        run = self._begin_run(
            num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            strength=strength,
            eta=eta or 0.0,
            strict=strict,
        )
        return self._sample(
            run,
            self._noisy_image(image, count, run, generator),
            conditions,
            generator,
            output_type,
            return_dict,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
