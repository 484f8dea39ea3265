"""Inpainting with Stable Diffusion: by a model that is told the mask, or by any text-to-image model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores.pipelines.latent import After, Conditions, Run, StepCallback, check_finite
from difusores.pipelines.preprocess import preprocess, preprocess_mask, repeat_to
from difusores.pipelines.stable_diffusion import StableDiffusionBase, StableDiffusionPipelineOutput, Texts
from difusores.sampling import Generators, draw_noise, masked

BESIDE = ("mask", "masked_image_latents")


class StableDiffusionInpaintPipeline(StableDiffusionBase):
    """Fill the masked part of an image. Components: see `StableDiffusionBase`.

    A UNet of 9 input channels is told the mask and the latents of the rest of the image (Rombach et al. 2022,
    section 4.5). With one of 4, what is outside of the mask is put back after every step, with that step's
    noise (Lugmayr et al. 2022, "RePaint", equation 8).
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", *BESIDE)

    def _update_old_configs(self, unet: Any, scheduler: Any) -> None:
        """What is replaced elsewhere, and PNDM's Runge-Kutta steps are left out."""
        super()._update_old_configs(unet, scheduler)
        if scheduler.config.get("skip_prk_steps") is False:
            scheduler.register_to_config(skip_prk_steps=True)

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
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        strict: bool = True,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Sample images.

        Args:
            image: see `preprocess`; or latents [N, 4, h, w], with the VAE's scaling factor. It is resized to
                `height` and `width`.
            mask_image: 1 where the image is made anew, see `preprocess_mask`.
            masked_image_latents: [N, 4, h, w] of the image without the masked part, in place of encoding it.
            padding_mask_crop: not supported.
            strength: share of the steps that is done, from the end; 1 begins at noise alone.

        The other arguments and Raises are those of `StableDiffusionPipeline`.
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
        if padding_mask_crop is not None:
            raise NotImplementedError(f"padding_mask_crop is {padding_mask_crop}; only None is supported")
        channels = self.unet.config["in_channels"]
        if channels not in (4, 9):
            raise ValueError(f"the UNet has {channels} input channels; inpainting needs 4 or 9")
        height, width = self._image_size(height, width, None)
        count, conditions = self._conditions(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt
        )
        factor = self.vae_scale_factor
        pixels = preprocess(image, factor, height, width)
        mask = preprocess_mask(mask_image, factor, height, width)
        run = self._begin_run(
            num_inference_steps, timesteps=timesteps, sigmas=sigmas, strength=strength, eta=eta, strict=strict
        )
        shape = (count, 4, height // factor, width // factor)

        known = None
        if channels == 4 or (latents is None and strength < 1):
            known = self._known(pixels, shape, generator)
        noise = latents
        if noise is None:
            noise = draw_noise(shape, generator, self.device, self.unet.dtype)
        first = self._latents(shape, noise, generator, run)
        if latents is None and strength < 1:
            assert known is not None
            first = run.add_noise(known, noise)

        copies = 2 if self.do_classifier_free_guidance else 1
        small = F.interpolate(mask, size=shape[2:]).to(self.device, self.unet.dtype)
        conditions.tensors["mask"] = repeat_to(small, count, "mask_image").repeat(copies, 1, 1, 1)
        after: After | None = None
        if channels == 9:
            rest = masked_image_latents
            if rest is None:
                if pixels.shape[1] == 4:
                    raise ValueError("image is latents: masked_image_latents are needed too")
                rest = pixels * (mask < 0.5)
            rest = self._known(rest, shape, generator).repeat(copies, 1, 1, 1)
            conditions.tensors["masked_image_latents"] = rest
        else:
            assert known is not None
            if masked_image_latents is None and pixels.shape[1] != 4:
                # diffusers encodes the rest of the image here, for nothing: later noise is the same only so
                sources = generator[: len(pixels)] if isinstance(generator, Sequence) else generator
                draw_noise((len(pixels), *shape[1:]), sources, self.device, self.vae.dtype)
            after = self._put_back(run, known, noise.to(known), conditions)
        return self._sample(
            run,
            first,
            conditions,
            generator,
            output_type,
            return_dict,
            beside=BESIDE if channels == 9 else (),
            interval=guidance_interval,
            after=after,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )

    def _known(self, image: Tensor, shape: tuple[int, ...], generator: Generators) -> Tensor:
        """Latents of `shape`: of an image, or as they are."""
        if image.shape[1] == 4:
            check_finite(image, "image")
            latents = image.to(self.device, self.unet.dtype)
        else:
            latents = self._scaling_factor * self._encode_image(image, generator)
        if latents.shape[1:] != shape[1:]:
            raise ValueError(
                f"the image's latents have shape {list(latents.shape)}; needed is {['N', *shape[1:]]}"
            )
        return repeat_to(latents, shape[0], "image")

    def _put_back(self, run: Run, known: Tensor, noise: Tensor, conditions: Conditions) -> After:
        """What is done after each step: outside of the mask the image takes its place again."""

        def after(index: int, time: Tensor, latents: Tensor) -> Tensor:
            last = index + 1 == len(run.timesteps)
            outside = known if last else run.add_noise(known, noise, index + 1)
            mask = conditions.rows("mask", len(latents))
            return masked(mask, latents, outside.to(latents.dtype))

        return after
