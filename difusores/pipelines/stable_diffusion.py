"""Stable Diffusion 1.x and 2.x: what its pipelines share, and text to image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difusores.models.lora import lora_strength
from difusores.outputs import BaseOutput
from difusores.pipelines.checks import check_count
from difusores.pipelines.images import to_images
from difusores.pipelines.latent import Conditions, StepCallback
from difusores.pipelines.legacy_callback import takes_callback
from difusores.pipelines.own_loops import OwnLoops
from difusores.pipelines.prompted import PromptedPipeline, Texts
from difusores.pipelines.prompts import as_list, check_prompts, encode_texts
from difusores.sampling import Generators

logger = logging.getLogger(__name__)


@dataclass
class StableDiffusionPipelineOutput(BaseOutput):
    """images: as the pipeline's `output_type` says. nsfw_content_detected: one bool per image, or None."""

    images: Any
    nsfw_content_detected: list[bool] | None


class StableDiffusionBase(PromptedPipeline[StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]]):
    """What the pipelines of Stable Diffusion have in common: components, prompts, the safety checker.

    Args:
        vae: an `AutoencoderKL`, or anything with `decode(latents)`.
        text_encoder, tokenizer: transformers' CLIP; None where only embeddings of prompts are given.
        unet: a `UNet2DConditionModel`.
        scheduler: any of this package that the model was trained for, or one of diffusers. As in diffusers,
            its `steps_offset` becomes 1 and its `clip_sample` False.
        safety_checker: None, a `StableDiffusionSafetyChecker`, or what is called with (images=[B, 3, H, W],
            clip_input=...) after decoding; it returns (images, one bool per image). Marked images are
            passed on as it returns them.
        feature_extractor: makes `clip_input` of the images; needed with a safety checker.
        image_encoder: kept for folders that have one; not used.
        requires_safety_checker: say so where there is none.
    """

    text_encoder: Any
    tokenizer: Any
    safety_checker: Any
    feature_extractor: Any
    _callback_tensor_inputs: tuple[str, ...] = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        if safety_checker is None and requires_safety_checker:
            logger.warning(
                "%s has no safety checker: what it makes is not looked at. The model's licence says what may "
                "be shown to whom.",
                type(self).__name__,
            )
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("safety_checker needs a feature_extractor, which is None")
        self._update_old_configs(unet, scheduler)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)

    def _update_old_configs(self, unet: Any, scheduler: Any) -> None:
        """Replace what diffusers replaces in configurations of old folders: images depend on it."""
        config = scheduler.config
        if config.get("steps_offset", 1) != 1:
            scheduler.register_to_config(steps_offset=1)
        if config.get("clip_sample") is True:
            scheduler.register_to_config(clip_sample=False)
        trained = unet.config.get("sample_size")
        version = str(unet.config.get("_diffusers_version", "1")).split(".")
        if isinstance(trained, int) and trained < 64 and version[0] == "0" and int(version[1]) < 9:
            unet.register_to_config(sample_size=64)  # 32 was a default then

    def encode_prompt(
        self,
        prompt: Texts,
        device: str | torch.device | None,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: Texts = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The model's conditions: (those of the prompts, those of the negative ones or None).

        Args:
            prompt, negative_prompt: texts; or their embeddings [N, tokens, width] in place of them.
            device: where they are put; None for the UNet's.
            num_images_per_prompt: each is repeated that often.
            do_classifier_free_guidance: make negative ones too, of empty texts if there are none.
            lora_scale: strength of LoRA layers in the text encoder; None for their own.
            clip_skip: see `encode_texts`; as in diffusers, negative prompts are encoded by all layers.

        Raises:
            ValueError, TypeError: see `check_prompts` and `encode_texts`.
        """
        count = check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        if prompt_embeds is None:
            prompt_embeds = self._encode_texts(as_list(prompt, count), clip_skip, lora_scale)
        positive = self._placed(prompt_embeds, device, num_images_per_prompt)
        if not do_classifier_free_guidance:
            return positive, None
        if negative_prompt_embeds is None:
            negative_prompt_embeds = self._encode_texts(
                as_list(negative_prompt, count), None, lora_scale, positive.shape[1]
            )
        return positive, self._placed(negative_prompt_embeds, device, num_images_per_prompt)

    def _encode_texts(
        self, texts: list[str], clip_skip: int | None, lora_scale: float | None, length: int | None = None
    ) -> Tensor:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "without a text_encoder and a tokenizer, prompt_embeds and negative_prompt_embeds are needed"
            )
        with lora_strength(self.text_encoder, lora_scale):
            return encode_texts(self.tokenizer, self.text_encoder, texts, clip_skip, length)

    def _conditions(
        self,
        prompt: Texts,
        negative_prompt: Texts,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        num_images_per_prompt: int | None,
    ) -> tuple[int, Conditions]:
        """(number of images, the embeddings as callbacks see them: [negative, positive] with guidance)."""
        positive, negative = self.encode_prompt(
            prompt,
            None,
            check_count(num_images_per_prompt, "num_images_per_prompt"),
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            lora_scale=(self._cross_attention_kwargs or {}).get("scale"),
            clip_skip=self._clip_skip,
        )
        if negative is None:
            return len(positive), Conditions({"prompt_embeds": positive})
        both = torch.cat((negative, positive))
        tensors = {"prompt_embeds": both, "negative_prompt_embeds": negative}
        return len(positive), Conditions(tensors)

    def run_safety_checker(
        self, image: Tensor, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, list[bool] | None]:
        """(images, whether each is marked), by the safety checker; (images, None) without one.

        image: [B, 3, H, W] around [-1, 1].
        """
        if self.safety_checker is None:
            return image, None
        features = self.feature_extractor(to_images(image, "pil"), return_tensors="pt").to(device)
        checked, marked = self.safety_checker(images=image, clip_input=features.pixel_values.to(dtype))
        return checked, [bool(mark) for mark in marked]

    def _output(
        self, latents: Tensor, output_type: str, return_dict: bool, generator: Generators
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Decoded, checked and converted latents."""
        marked: list[bool] | None = None
        if output_type == "latent":
            images: Any = latents
        else:
            decoded = self._decode(latents, generator)
            decoded, marked = self.run_safety_checker(decoded, decoded.device, self.unet.dtype)
            if marked is not None:  # what it has put there is in [0, 1]
                decoded = torch.stack([2 * d - 1 if m else d for d, m in zip(decoded, marked, strict=True)])
            images = to_images(decoded, output_type)
        if not return_dict:
            return images, marked
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=marked)


class StableDiffusionPipeline(StableDiffusionBase, OwnLoops):
    """Text to image with Stable Diffusion 1.x and 2.x (Rombach et al. 2022, "High-resolution image synthesis
    with latent diffusion models"). Components: see `StableDiffusionBase`.
    """

    @takes_callback
    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts = None,
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
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        strict: bool = True,
    ) -> StableDiffusionPipelineOutput | tuple[Any, list[bool] | None]:
        """Sample images.

        Args:
            prompt: a text, or a list of them. Those of more than 77 tokens are cut, with a warning.
            height, width: pixels, divisible by 8; the size of the UNet's training if None, or that of
                `latents`.
            num_inference_steps: model calls, more or less: the scheduler's `set_timesteps` says it exactly.
            timesteps, sigmas: in place of `num_inference_steps`, for schedulers that take them.
            guidance_scale: weight w of classifier-free guidance (Ho & Salimans 2022), the prediction is
                (1 - w) * negative + w * conditional; up to 1 there is none.
            negative_prompt: what to lead away from: one text for all prompts, or a list with one for each.
                Empty if None.
            num_images_per_prompt: images of one prompt come one behind the other.
            eta: noise of schedulers such as DDIM, from 0 to 1.
            generator: source of the noise: one, one per image, or None for the global one.
            latents: [images, 4, height / 8, width / 8], standard normal, in place of drawn ones.
            prompt_embeds, negative_prompt_embeds: [prompts, tokens, width], in place of texts.
            ip_adapter_image, ip_adapter_image_embeds: not supported.
            output_type: "pil", "np" ([N, H, W, C] in [0, 1]), "pt" ([N, C, H, W] in [0, 1]) or "latent".
            return_dict: return a `StableDiffusionPipelineOutput`; else (images, nsfw_content_detected).
            cross_attention_kwargs: {"scale": strength of LoRA layers}.
            guidance_rescale: see `rescaled` (Lin et al. 2024), from 0 to 1.
            clip_skip: see `encode_texts`.
            callback_on_step_end: callback(pipeline, step, timestep, tensors) after each model call; may
                return a dictionary with others. `pipeline._interrupt = True` ends the run.
            callback_on_step_end_tensor_inputs: the tensors that it is given: "latents", "prompt_embeds" (with
                guidance those of the negative prompts first), "negative_prompt_embeds".
            guidance_interval: shares of the run between which there is guidance (Kynkäänniemi et al. 2024).
            strict: refuse a scheduler that contradicts the one in the model's folder, see `check_training`.

        Raises:
            NotImplementedError: an IP adapter's image is given.
            TypeError: prompt and negative prompt are of two types.
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
        height, width = self._image_size(height, width, latents)
        count, conditions = self._conditions(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_images_per_prompt
        )
        run = self._begin_run(num_inference_steps, timesteps=timesteps, sigmas=sigmas, eta=eta, strict=strict)
        factor = self.vae_scale_factor
        shape = (count, self.unet.config["in_channels"], height // factor, width // factor)
        first = self._latents(shape, latents, generator, run)
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
