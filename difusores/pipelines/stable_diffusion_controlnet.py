"""Stable Diffusion led by images such as edges or a pose, through ControlNets (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difusores.models.controlnet import ControlNetModel
from difusores.models.multi_controlnet import MultiControlNetModel
from difusores.pipelines.checks import check_numbers
from difusores.pipelines.latent import Conditions, StepCallback
from difusores.pipelines.legacy_callback import takes_callback
from difusores.pipelines.preprocess import preprocess
from difusores.pipelines.prompted import Texts
from difusores.pipelines.runs import Run
from difusores.pipelines.stable_diffusion import StableDiffusionBase, StableDiffusionPipelineOutput
from difusores.sampling import Generators, Model


class Lead(NamedTuple):
    """What leads one network: [N, 3, H, W] in [0, 1], a factor, and the shares of the run between which."""

    pixels: Tensor
    scale: float
    start: float
    end: float

    def scale_at(self, done: int, steps: int) -> float:
        """The factor at the call behind `done` of `steps`."""
        return self.scale if done / steps >= self.start and (done + 1) / steps <= self.end else 0.0


class StableDiffusionControlNetPipeline(StableDiffusionBase):
    """Text to image, led by an image, or by one for each of several networks.

    Args:
        controlnet: a `ControlNetModel`; several in a list or a `MultiControlNetModel`.

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
        if isinstance(controlnet, (list, tuple)):
            several = MultiControlNetModel(controlnet)
            controlnet = several if len(several.nets) > 1 else several.nets[0]
        if not isinstance(controlnet, (ControlNetModel, MultiControlNetModel)):
            raise ValueError(
                f"controlnet is a {type(controlnet).__name__}; needed is a ControlNetModel, or a list of them"
            )
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
        controlnet_conditioning_scale: float | list[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
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
            image: what leads: see `preprocess`, numbers in [0, 1]; one for all prompts or one for each. With
                several networks a list with one for each of them; or for each prompt a list with one for
                each network.
            height, width: pixels; those of `image` if None.
            controlnet_conditioning_scale: factor on the residuals. This and the two shares below may be
                lists, with a number for each network.
            guess_mode: see `ControlNetModel.forward`; the negative half of guidance is not led.
            control_guidance_start, control_guidance_end: share of the steps from which and up to which the
                image leads.

        The other arguments are those of `StableDiffusionPipeline`.

        Raises:
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
        scales, starts, ends = (
            self._of_networks(value, name)
            for value, name in (
                (controlnet_conditioning_scale, "controlnet_conditioning_scale"),
                (control_guidance_start, "control_guidance_start"),
                (control_guidance_end, "control_guidance_end"),
            )
        )
        for start, end in zip(starts, ends, strict=True):
            if not 0 <= start < end <= 1:
                raise ValueError(
                    f"control_guidance_start and control_guidance_end are {start} and {end}; needed are two "
                    "shares, 0 <= start < end <= 1"
                )
        count, conditions = self._conditions(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt
        )
        unit = max(8, self.vae_scale_factor)
        self._image_size(height or unit, width or unit, None)  # refuses what is not divisible
        times = num_images_per_prompt or 1
        pixels = [self._leading(one, unit, (height, width), count, times) for one in self._images(image)]
        run = self._begin_run(num_inference_steps, timesteps=timesteps, sigmas=sigmas, eta=eta, strict=strict)
        factor = self.vae_scale_factor
        sides = [side // factor for side in pixels[0].shape[2:]]
        shape = (count, self.unet.config["in_channels"], *sides)
        first = self._latents(shape, latents, generator, run)
        guess_mode = guess_mode or self._networks()[0].config.global_pool_conditions
        leads = [Lead(*lead) for lead in zip(pixels, scales, starts, ends, strict=True)]
        predictor = self._led(conditions, leads, run, guess_mode)
        guided = self._guided(predictor, conditions, run, count)
        last = self._denoise(
            run,
            first,
            guided,
            conditions,
            generator=generator,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        return self._output(last, output_type, return_dict, generator)

    def _networks(self) -> list[Any]:
        several = isinstance(self.controlnet, MultiControlNetModel)
        return list(self.controlnet.nets) if several else [self.controlnet]

    def _of_networks(self, value: Any, name: str) -> list[float]:
        """A number for each network, of one for all or of a list."""
        count = len(self._networks())
        values = list(value) if isinstance(value, (list, tuple)) else [value] * count
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} numbers for {count} ControlNets")
        check_numbers(**{f"{name}[{i}]": number for i, number in enumerate(values)})
        return values

    def _images(self, image: Any) -> list[Any]:
        """What leads each network."""
        count = len(self._networks())
        if not isinstance(self.controlnet, MultiControlNetModel):
            return [image]
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        of_prompts = [list(one) for one in images if isinstance(one, (list, tuple))]
        for one in of_prompts or [images]:
            if len(one) != count:
                raise ValueError(f"there are {len(one)} images for {count} ControlNets")
        if of_prompts and len(of_prompts) < len(images):
            raise ValueError("image has lists and single images; needed is a list for each prompt, or none")
        return [list(one) for one in zip(*of_prompts, strict=True)] or images

    def _leading(
        self, image: Any, unit: int, size: tuple[int | None, int | None], count: int, times: int
    ) -> Tensor:
        """[count, 3, H, W] in [0, 1]."""
        pixels = (preprocess(image, unit, *size, latent_channels=0) + 1) / 2
        if len(pixels) not in (1, count // times):
            raise ValueError(
                f"there are {len(pixels)} images for {count // times} prompts: needed is 1 or as many"
            )
        pixels = pixels.repeat_interleave(count if len(pixels) == 1 else times, dim=0)
        return pixels.to(self.device, self.controlnet.dtype)

    def _led(self, conditions: Conditions, leads: list[Lead], run: Run, guess_mode: bool) -> Model:
        """predict(x, t) of the UNet with the ControlNets' residuals."""
        done, steps, count = 0, len(run.timesteps), len(leads[0].pixels)
        timestep_cond = self._guidance_embedding(count)
        several = isinstance(self.controlnet, MultiControlNetModel)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            nonlocal done
            seen = x[-count:] if guess_mode else x
            images = [lead.pixels.repeat(len(seen) // count, 1, 1, 1) for lead in leads]
            scales = [lead.scale_at(done, steps) for lead in leads]
            done += 1
            down, mid = self._conditioning(conditions, len(seen))(
                self.controlnet,
                seen,
                t,
                controlnet_cond=images if several else images[0],
                conditioning_scale=scales if several else scales[0],
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
                count,
                timestep_cond=timestep_cond,
                cross_attention_kwargs=self._cross_attention_kwargs,
                return_dict=False,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
            )

        return predict
