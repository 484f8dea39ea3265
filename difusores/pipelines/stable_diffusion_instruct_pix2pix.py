"""Editing an image by an instruction (InstructPix2Pix): guidance by the image and by the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difusores.pipelines.call_state import CallState
from difusores.pipelines.checks import as_number, check_finite
from difusores.pipelines.latent import Conditions, StepCallback
from difusores.pipelines.legacy_callback import takes_callback
from difusores.pipelines.preprocess import preprocess, repeat_to
from difusores.pipelines.prompted import Texts
from difusores.pipelines.stable_diffusion import StableDiffusionBase, StableDiffusionPipelineOutput
from difusores.sampling import Generators


class StableDiffusionInstructPix2PixPipeline(StableDiffusionBase):
    """Edit images by instructions (Brooks et al. 2023, "InstructPix2Pix"). Components: see
    `StableDiffusionBase`; the UNet has 8 input channels, the latents of the sample and those of the image.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "image_latents")
    single_file_channels = (8,)
    _image_guidance_scale = CallState[float](1.5)

    @property
    def image_guidance_scale(self) -> float:
        """Of the call."""
        return self._image_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the model is called with both conditions, with the image's alone and with none."""
        return self._guidance_scale > 1 and self._image_guidance_scale >= 1

    def _guidance_weights(self, ended: bool = False) -> tuple[float, ...]:
        """Of the parts with text and image, with the image alone, and with neither."""
        if ended or not self.do_classifier_free_guidance:
            return 1.0, 0.0, 0.0
        text, image = self._guidance_scale, self._image_guidance_scale
        return text, image - text, 1 - image

    def _update_old_configs(self, unet: Any, scheduler: Any) -> None:
        """Nothing: diffusers leaves the configurations of these folders as they are."""

    @takes_callback
    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts = None,
        image: Any = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
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
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cross_attention_kwargs: dict[str, Any] | None = None,
        *,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        strict: bool = True,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Sample images.

        Args:
            image: what is edited, see `preprocess`; or latents [N, 4, h, w] as the VAE has them.
            guidance_scale, image_guidance_scale: weights s_T of the text and s_I of the image in
                (1 - s_I) * e() + (s_I - s_T) * e(image) + s_T * e(image, text), equation 3. None of both
                where s_T is at most 1 or s_I below 1.
            latents: first sample, of the size of the image's latents.

        The other arguments and Raises are those of `StableDiffusionPipeline`.
        """
        self._image_guidance_scale = as_number(image_guidance_scale, "image_guidance_scale") or 0.0
        self._start_call(
            (guidance_scale, guidance_rescale, guidance_interval),
            None,
            cross_attention_kwargs,
            output_type,
            callback_on_step_end_tensor_inputs,
            ip_adapter_image,
            ip_adapter_image_embeds,
        )
        count, conditions = self._conditions(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt
        )
        pixels = preprocess(image, self.vae_scale_factor)
        if pixels.shape[1] == 4:
            check_finite(pixels, "image")
            known = pixels.to(self.device, self.unet.dtype)
        else:
            known = self._encode_image(pixels, None, mode=True)
        known = repeat_to(known, count, "image")
        if self.unet.config["in_channels"] != 2 * known.shape[1]:
            raise ValueError(
                f"the UNet has {self.unet.config['in_channels']} input channels; needed are "
                f"{2 * known.shape[1]}: those of the sample and of the image"
            )
        run = self._begin_run(num_inference_steps, eta=eta, strict=strict)
        first = self._latents(tuple(known.shape), latents, generator, run)
        embeds = conditions.tensors["prompt_embeds"]
        if self.do_classifier_free_guidance:
            negative, positive = embeds.chunk(2)
            embeds = torch.cat((positive, negative, negative))
            known = torch.cat((known, known, torch.zeros_like(known)))
        return self._sample(
            run,
            first,
            Conditions({"prompt_embeds": embeds, "image_latents": known}, conditional=0),
            generator,
            output_type,
            return_dict,
            beside=("image_latents",),
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
