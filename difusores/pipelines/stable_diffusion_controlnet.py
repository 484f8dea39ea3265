"""Stable Diffusion led by an image such as edges or a pose, through a ControlNet (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difusores.models.controlnet import ControlNetModel
from difusores.pipelines.checks import check_numbers
from difusores.pipelines.latent import Conditions, StepCallback
from difusores.pipelines.legacy_callback import takes_callback
from difusores.pipelines.preprocess import preprocess
from difusores.pipelines.prompted import Texts
from difusores.pipelines.runs import Run
from difusores.pipelines.stable_diffusion import StableDiffusionBase, StableDiffusionPipelineOutput
from difusores.sampling import Generators, Model


class StableDiffusionControlNetPipeline(StableDiffusionBase):
    """Text to image, led by an image.

    Args:
        controlnet: one `ControlNetModel`; lists of them are refused.

    The other components are those of `StableDiffusionBase`.
    """

    controlnet: Any

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        controlnet: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        if not isinstance(controlnet, ControlNetModel):
            raise ValueError(f"controlnet is a {type(controlnet).__name__}; needed is one ControlNetModel")
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )

    @takes_callback
    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
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
        controlnet_conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        strict: bool = True,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Sample images.

        Args:
            image: what leads: see `preprocess`, numbers in [0, 1]; one for all prompts or one for each.
            height, width: pixels; those of `image` if None.
            controlnet_conditioning_scale: factor on the residuals.
            guess_mode: see `ControlNetModel.forward`; the negative half of guidance is not led.
            control_guidance_start, control_guidance_end: share of the steps from which and up to which the
                image leads.

        The other arguments are those of `StableDiffusionPipeline`.

        Raises:
            ValueError: an argument that is not one of these, or tensors that do not fit.
        """
        self._start_call(
            guidance_scale,
            0.0,
            clip_skip,
            cross_attention_kwargs,
            output_type,
            callback_on_step_end_tensor_inputs,
            ip_adapter_image,
            ip_adapter_image_embeds,
        )
        check_numbers(
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            control_guidance_start=control_guidance_start,
            control_guidance_end=control_guidance_end,
        )
        if not 0 <= control_guidance_start < control_guidance_end <= 1:
            raise ValueError(
                f"control_guidance_start and control_guidance_end are {control_guidance_start} and "
                f"{control_guidance_end}; needed are two shares, 0 <= start < end <= 1"
            )
        count, conditions = self._conditions(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt
        )
        unit = max(8, self.vae_scale_factor)
        self._image_size(height or unit, width or unit, None)  # refuses what is not divisible
        pixels = (preprocess(image, unit, height, width, latent_channels=0) + 1) / 2
        times = num_images_per_prompt or 1
        if len(pixels) not in (1, count // times):
            raise ValueError(
                f"there are {len(pixels)} images for {count // times} prompts: needed is 1 or as many"
            )
        pixels = pixels.repeat_interleave(count if len(pixels) == 1 else times, dim=0)
        pixels = pixels.to(self.device, self.controlnet.dtype)
        run = self._begin_run(num_inference_steps, timesteps=timesteps, sigmas=sigmas, eta=eta, strict=strict)
        factor = self.vae_scale_factor
        sides = [side // factor for side in pixels.shape[2:]]
        shape = (count, self.unet.config["in_channels"], *sides)
        first = self._latents(shape, latents, generator, run)
        predictor = self._led(
            conditions,
            pixels,
            run,
            controlnet_conditioning_scale,
            guess_mode or self.controlnet.config.global_pool_conditions,
            (control_guidance_start, control_guidance_end),
        )
        predict, weights = self._guided(predictor, conditions, run, interval=guidance_interval)
        last = self._denoise(
            run,
            first,
            predict,
            conditions,
            generator=generator,
            weights=weights,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        return self._output(last, output_type, return_dict, generator)

    def _led(
        self,
        conditions: Conditions,
        pixels: Tensor,
        run: Run,
        scale: float,
        guess_mode: bool,
        interval: tuple[float, float],
    ) -> Model:
        """predict(x, t) of the UNet with the ControlNet's residuals."""
        done, steps = 0, len(run.timesteps)
        timestep_cond = self._guidance_embedding(len(pixels))

        def predict(x: Tensor, t: Tensor) -> Tensor:
            nonlocal done
            on = done / steps >= interval[0] and (done + 1) / steps <= interval[1]
            done += 1
            seen = x[-len(pixels) :] if guess_mode else x
            down, mid = self._conditioning(conditions, len(seen))(
                self.controlnet,
                seen,
                t,
                controlnet_cond=pixels.repeat(len(seen) // len(pixels), 1, 1, 1),
                conditioning_scale=scale if on else 0.0,
                guess_mode=guess_mode,
                return_dict=False,
            )
            if len(seen) < len(x):
                down = tuple(torch.cat((torch.zeros_like(part), part)) for part in down)
                mid = torch.cat((torch.zeros_like(mid), mid))
            return self._call_unet(
                self._conditioning(conditions, len(x)),
                x,
                t,
                len(pixels),
                timestep_cond=timestep_cond,
                cross_attention_kwargs=self._cross_attention_kwargs,
                return_dict=False,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
            )

        return predict
