"""Latent diffusion of 2022 (Rombach et al.): images from noise alone, from a text, from a smaller image."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difusores.models.autoencoder import AutoencoderKL, VQModel
from difusores.models.conditioning import Conditioning
from difusores.models.ldm_bert import LDMBertModel
from difusores.models.unet_2d import UNet2DModel
from difusores.models.unet_2d_condition import UNet2DConditionModel
from difusores.pipelines.checks import check_count, check_finite
from difusores.pipelines.images import ImagePipelineOutput, check_output_type, to_images
from difusores.pipelines.latent import Conditions, LatentPipeline, StepCallback
from difusores.pipelines.prompts import as_list, check_prompts, check_width, repeat_each, tokenize
from difusores.pipelines.runs import Run
from difusores.sampling import Generators, draw_noise

TOKENS = 77
"""Length to which texts are filled up or cut."""
LATENT_PIXELS = 8
"""Pixels of a latent's side in the text-to-image pipeline's `height` and `width`."""
SMALL_IMAGE_UNIT = 32
"""The super-resolution pipeline makes the sides of pictures multiples of this."""


class ConditionedPipeline(LatentPipeline):
    """Base of pipelines whose condition is made once and stays as it is: with guidance, the unconditional
    rows and then the others.
    """

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the model is called with and without the condition."""
        return self._guidance_scale != 1

    def _sample(
        self,
        run: Run,
        noise: Tensor,
        conditioning: Conditioning,
        generator: Generators,
        output_type: str,
        return_dict: bool,
        callback: StepCallback | None,
        *,
        image_scale: Callable[[Tensor], float] = lambda time: 1.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Noise to images; image_scale: factor on the conditioning's image at a time."""
        conditions = Conditions()

        def predict(x: Tensor, time: Tensor) -> Tensor:
            told = conditioning.part(slice(-len(x), None))
            return self._call_unet(told, x, time, len(noise), image_scale(time))

        guided = self._guided(predict, conditions, run, len(noise))
        latents = self._denoise(
            run,
            noise,
            guided,
            conditions,
            generator=generator,
            callback=callback,
        )
        images = (
            latents if output_type == "latent" else to_images(self._decode(latents, generator), output_type)
        )
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class _VQPipeline(ConditionedPipeline):
    """What the pipelines below share: the autoencoder is called `vqvae`."""

    vqvae: Any

    @property
    def vae(self) -> Any:
        """The autoencoder under the name that other pipelines have for it."""
        return self.vqvae


class LDMPipeline(_VQPipeline):
    """Images from noise alone.

    Args:
        vqvae: decoder of latents, a `VQModel` or another.
        unet: a `UNet2DModel` over latents.
        scheduler: any that the UNet was trained for.
    """

    def __init__(self, vqvae: VQModel, unet: UNet2DModel, scheduler: Any) -> None:
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        callback_on_step_end: StepCallback | None = None,
        strict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            batch_size: how many.
            generator: source of all noise: one, one per image, or None for the global one. (diffusers draws
                the noise of the steps from the global one always.)
            eta: noise of DDIM and other schedulers with it; a warning says where it has no place.
            num_inference_steps: steps of the scheduler.
            output_type: "pil", "np" ([N, H, W, C] in [0, 1]), "pt" ([N, C, H, W] in [0, 1]) or "latent".
            return_dict: return an `ImagePipelineOutput`; else a tuple of one.
            callback_on_step_end: callback(pipeline, step, timestep, {"latents": ...}) after each step; may
                return a dictionary with others.
            strict: refuse a scheduler that contradicts the one in the models' folder, see `check_training`.

        Raises:
            ValueError: an argument that is not one of these.
        """
        output_type = _checked(output_type)
        batch_size = check_count(batch_size, "batch_size")
        # the scheduler's before it has steps: what diffusers multiplies by, which for some is another
        sigma = getattr(self.scheduler, "init_noise_sigma", 1.0)
        run = self._begin_run(num_inference_steps, eta=eta, strict=strict)
        size = self.unet.config["sample_size"]
        if size is None:
            raise ValueError("the UNet's sample_size is None, so the size of its latents is not known")
        sides = (size, size) if isinstance(size, int) else tuple(size)
        channels = self.unet.config["in_channels"]
        conditioning = Conditioning("none")
        noise = draw_noise((batch_size, channels, *sides), generator, self.device, self.unet.dtype)
        return self._sample(
            run, noise * sigma, conditioning, generator, output_type, return_dict, callback_on_step_end
        )


class LDMTextToImagePipeline(_VQPipeline):
    """Images from a text.

    Args:
        vqvae: decoder of latents, a `VQModel` or an `AutoencoderKL`.
        bert: the text encoder; bert(ids)[0] is [N, 77, cross_attention_dim].
        tokenizer: BERT's, of transformers.
        unet: a `UNet2DConditionModel`.
        scheduler: any that the UNet was trained for; those that scale the model's input (LMS, Euler, ...)
            give diffusers' images, which lack that scale and are spoilt: a warning says so.
    """

    def __init__(
        self,
        vqvae: VQModel | AutoencoderKL,
        bert: LDMBertModel,
        tokenizer: Any,
        unet: UNet2DModel | UNet2DConditionModel,
        scheduler: Any,
    ) -> None:
        self.register_modules(vqvae=vqvae, bert=bert, tokenizer=tokenizer, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = 50,
        guidance_scale: float | None = 1.0,
        eta: float | None = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        strict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            prompt: a text, or one for each image. What is beyond 77 tokens is cut, and shown in a warning.
            height, width: in pixels of an autoencoder with a factor of 8, to which they have to be divisible;
                None for the UNet's own size.
            guidance_scale: weight w of classifier-free guidance, unconditional + w * (conditional -
                unconditional) prediction (Ho & Salimans 2022); 1 for none.
            latents: the first sample, [N, C, height / 8, width / 8], in place of noise.
            guidance_rescale, guidance_interval: see `Guided`.
            negative_prompt: text of the unconditional prediction, empty if None.
            num_images_per_prompt: images of each prompt, side by side.
            prompt_embeds, negative_prompt_embeds: [prompts, tokens, width], what the encoder makes of texts,
                in their place.

        The other arguments are those of `LDMPipeline`.

        Raises:
            TypeError: `negative_prompt` is of another type than `prompt`.
            ValueError: an argument that is not one of these, or does not fit the others.
        """
        output_type = _checked(output_type)
        count = check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        times = check_count(num_images_per_prompt, "num_images_per_prompt")
        self._start_guidance(guidance_scale, guidance_rescale, guidance_interval)
        height, width = self._pixels(height), self._pixels(width)
        run = self._begin_run(num_inference_steps, eta=eta or 0.0, strict=strict)
        run = _without_scale(run)
        if prompt_embeds is None:
            prompt_embeds = self._encode_texts(as_list(prompt, count))
        parts = [prompt_embeds]
        if self.do_classifier_free_guidance:
            if negative_prompt_embeds is None:
                negative_prompt_embeds = self._encode_texts(as_list(negative_prompt, count))
            parts.insert(0, negative_prompt_embeds)
        for part in parts:
            check_width(part, self.unet.config)
        context = torch.cat([repeat_each(part, times) for part in parts])
        conditioning = Conditioning("crossattn", context=context.to(self.device, self.unet.dtype))
        channels = self.unet.config["in_channels"]
        conditioning.check(self.unet, channels)
        shape = (count * times, channels, height // LATENT_PIXELS, width // LATENT_PIXELS)
        noise = self._latents(shape, latents, generator, run)
        return self._sample(
            run, noise, conditioning, generator, output_type, return_dict, callback_on_step_end
        )

    def _encode_texts(self, texts: list[str]) -> Tensor:
        ids, _ = tokenize(self.tokenizer, texts, TOKENS)
        embeds: Tensor = self.bert(ids.to(self.device))[0]
        return embeds

    def _pixels(self, side: int | None) -> int:
        factor = self.vae_scale_factor
        if side is None:
            side = int(self.unet.config["sample_size"] * factor)
        if not isinstance(side, Integral) or side % LATENT_PIXELS or side < 1:
            raise ValueError(f"height and width have to be divisible by {LATENT_PIXELS}, and one is {side!r}")
        if factor != LATENT_PIXELS:
            warnings.warn(
                f"the autoencoder has a factor of {factor}, and this pipeline is made for {LATENT_PIXELS}: a "
                f"side of {side} becomes one of {side // LATENT_PIXELS * factor} pixels, as in diffusers",
                stacklevel=3,
            )
        return side


class LDMSuperResolutionPipeline(_VQPipeline):
    """A larger image from a small one, which is joined to the channels of the latents.

    Args:
        vqvae: decoder of latents, which are taken as they are: its `scaling_factor` is not used.
        unet: a `UNet2DModel` that takes the channels of latents and image, as many of each.
        scheduler: any that the UNet was trained for. One that scales the model's input (LMS, Euler, ...)
            scales the small image with it, as in diffusers.
    """

    def __init__(self, vqvae: VQModel, unet: UNet2DModel, scheduler: Any) -> None:
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)

    @property
    def _scaling_factor(self) -> float:
        return 1.0

    @torch.no_grad()
    def __call__(
        self,
        image: Tensor | Image.Image | None = None,
        batch_size: int | None = 1,
        num_inference_steps: int | None = 100,
        eta: float | None = 0.0,
        generator: Generators = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        callback_on_step_end: StepCallback | None = None,
        strict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            image: the small image: [N, C, h, w] in [-1, 1], latents having the same height and width; or a
                picture, whose sides are made multiples of 32.
            batch_size: 1, or the number of images; it follows from them.

        The other arguments are those of `LDMPipeline`.

        Raises:
            ValueError: an argument that is not one of these.
        """
        output_type = _checked(output_type)
        if isinstance(image, Image.Image):
            image = _small_image(image)
        if not isinstance(image, Tensor) or image.ndim != 4:
            found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image is {found}; needed is a picture or a tensor [N, C, H, W] in [-1, 1]")
        if batch_size not in (1, None, len(image)):
            raise ValueError(f"batch_size is {batch_size}, and there are {len(image)} images")
        check_finite(image, "image")
        channels = self.unet.config["in_channels"] // 2
        conditioning = Conditioning("concat", image=image.to(self.device, self.unet.dtype))
        conditioning.check(self.unet, channels)
        run = self._begin_run(num_inference_steps, eta=eta or 0.0, strict=strict)
        noise = self._latents((len(image), channels, *image.shape[2:]), None, generator, run)
        return self._sample(
            run,
            noise,
            conditioning,
            generator,
            output_type,
            return_dict,
            callback_on_step_end,
            image_scale=_scales(run),
        )


def _checked(output_type: str | None) -> str:
    output_type = output_type or "pil"
    check_output_type(output_type)
    return output_type


def _small_image(picture: Image.Image) -> Tensor:
    """[1, 3, h, w] in [-1, 1], h and w the largest multiples of 32 that are in the picture."""
    width, height = (side - side % SMALL_IMAGE_UNIT for side in picture.size)
    if not width or not height:
        raise ValueError(f"image is {picture.size} pixels; needed are at least {SMALL_IMAGE_UNIT} each way")
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255.0)
    return 2.0 * pixels.permute(2, 0, 1)[None] - 1.0


def _without_scale(run: Run) -> Run:
    """The run with noise of standard deviation 1 and a model's input that is not scaled."""
    plan, scheduler = run.plan, run.scheduler
    sigma = float(run.init_noise_sigma)
    if sigma == 1.0:
        return run
    warnings.warn(
        f"{type(scheduler).__name__} begins with noise of {sigma:.4g} and scales the model's input. "
        "diffusers' LDMTextToImagePipeline does neither, and nor does this: the image is spoilt. "
        "DDIM, PNDM, DPM-Solver and UniPC need no scale.",
        stacklevel=3,
    )
    if plan is not None:
        stages = tuple(replace(stage, c_in=1.0) for stage in plan.stages)
        return replace(run, plan=replace(plan, stages=stages, init_noise_sigma=1.0))
    return replace(run, scheduler=SimpleNamespace(step=scheduler.step))


def _scales(run: Run) -> Callable[[Tensor], float]:
    """What the model's input is multiplied by, call after call."""
    if run.plan is not None:
        calls = iter([stage.c_in for stage in run.plan.stages if stage.calls_model])
        return lambda time: next(calls)
    scheduler = run.scheduler
    if not hasattr(scheduler, "scale_model_input"):
        return lambda time: 1.0
    return lambda time: float(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), time))
