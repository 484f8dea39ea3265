"""What the pipelines of Stable Diffusion share, whichever text encoders they have: all but the texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores.image_processor import VaeImageProcessor
from difusores.models.conditioning import Conditioning
from difusores.pipelines.checks import check_finite
from difusores.pipelines.images import check_output_type
from difusores.pipelines.latent import (
    After,
    Conditions,
    StepCallback,
    check_callback_inputs,
)
from difusores.pipelines.preprocess import preprocess, preprocess_mask, repeat_to
from difusores.pipelines.prompts import check_width, repeat_each
from difusores.pipelines.runs import Run
from difusores.pipelines.single_file import SingleFilePipeline
from difusores.pipelines.textual_inversion import TextualInversion
from difusores.sampling import Generators, Model, draw_noise, masked

Texts = str | list[str] | None
Output = TypeVar("Output")

TOLD = {"prompt_embeds": "context", "add_text_embeds": "text_embeds", "add_time_ids": "time_ids"}
"""Names that callbacks know -> those of `Conditioning`."""
BESIDE = ("mask", "masked_image_latents")
"""Conditions that are channels of an inpainting UNet's input."""


class PromptedPipeline(TextualInversion, SingleFilePipeline, Generic[Output]):
    """Base of pipelines that are told texts. A subclass encodes them and says what a call returns."""

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """See `UNet2DConditionModel.enable_freeu`."""
        self.unet.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)

    def disable_freeu(self) -> None:
        """See `UNet2DConditionModel.disable_freeu`."""
        self.unet.disable_freeu()

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """Of masks for inpainting."""
        return VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )

    def _placed(self, embeds: Tensor, device: str | torch.device | None, times: int) -> Tensor:
        check_width(embeds, self.unet.config)
        return repeat_each(embeds.to(device or self.device, self.unet.dtype), times)

    def _start_call(
        self,
        guidance: tuple[Any, float, tuple[float, float]],
        clip_skip: int | None,
        cross_attention_kwargs: dict[str, Any] | None,
        output_type: str,
        callback_inputs: Sequence[str],
        *refused: Any,
    ) -> None:
        """Check and keep what a call is told, before anything is computed.

        guidance: its scale, rescale and interval, see `check_guidance`.
        refused: `ip_adapter_image` and `ip_adapter_image_embeds`, which have to be None.
        """
        check_output_type(output_type)
        check_callback_inputs(self, callback_inputs)
        if any(value is not None for value in refused):
            raise NotImplementedError(
                "ip_adapter_image and ip_adapter_image_embeds have to be None: there are no IP adapters, "
                "the UNets have no keys and values for images"
            )
        self._start_guidance(*guidance)
        self._clip_skip, self._cross_attention_kwargs = clip_skip, cross_attention_kwargs

    def _conditioning(self, conditions: Conditions, count: int, beside: Sequence[str] = ()) -> Conditioning:
        """What `count` rows of the UNet's input are told; beside: see `_predictor`."""
        inputs = {
            told: conditions.rows(name, count) for name, told in TOLD.items() if name in conditions.tensors
        }
        images = [conditions.rows(name, count) for name in beside]
        if not images:
            return Conditioning("crossattn", **inputs)
        return Conditioning("hybrid", image=torch.cat(images, dim=1), **inputs)

    def _predictor(self, conditions: Conditions, first: Tensor, beside: Sequence[str] = ()) -> Model:
        """predict(x, t) of the UNet.

        Args:
            first: the sample that the run begins with.
            beside: conditions [rows, C, h, w] that are channels of its input, behind the latents.
        """
        self._conditioning(conditions, len(first), beside).check(self.unet, first.shape[1])
        timestep_cond = self._guidance_embedding(len(first))

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self._call_unet(
                self._conditioning(conditions, len(x), beside),
                x,
                t,
                len(first),
                timestep_cond=timestep_cond,
                cross_attention_kwargs=self._cross_attention_kwargs,
                return_dict=False,
            )

        return predict

    def _sample(
        self,
        run: Run,
        first: Tensor,
        conditions: Conditions,
        generator: Generators,
        output_type: str,
        return_dict: bool,
        *,
        beside: Sequence[str] = (),
        after: After | None = None,
        callback: StepCallback | None = None,
        callback_inputs: Sequence[str] = ("latents",),
    ) -> Output:
        """From the first latents to the output, guided by the prompts; see `_guided` and `_denoise`."""
        predictor = self._predictor(conditions, first, beside)
        guided = self._guided(predictor, conditions, run, len(first))
        last = self._denoise(
            run,
            first,
            guided,
            conditions,
            generator=generator,
            after=after,
            callback=callback,
            callback_inputs=callback_inputs,
        )
        return self._output(last, output_type, return_dict, generator)

    def _output(self, latents: Tensor, output_type: str, return_dict: bool, generator: Generators) -> Output:
        """What a call returns, of the last latents."""
        raise NotImplementedError

    def _image_latents(
        self, image: Tensor, count: int, generator: Generators, each_draws: bool = False
    ) -> Tensor:
        """[count, C, h, w]: encoded and scaled images, or latents as they are.

        each_draws: several generators draw for each of `count` images, not for each of `image`'s.
        """
        if image.shape[1] == 4:
            check_finite(image, "image")
            return repeat_to(image.to(self.device, self.unet.dtype), count, "image")
        if each_draws and isinstance(generator, Sequence):
            image = repeat_to(image, count, "image")
        return repeat_to(self._scaled(self._encode_image(image, generator)), count, "image")

    def _noisy_image(
        self, image: Any, count: int, run: Run, generator: Generators, add_noise: bool = True
    ) -> Tensor:
        """The first sample of image to image.

        add_noise: False where the image's latents have the noise of the first step already.
        """
        known = self._image_latents(preprocess(image, self.vae_scale_factor), count, generator, True)
        if not add_noise:
            return known
        return run.add_noise(known, draw_noise(known.shape, generator, known.device, known.dtype))

    def _inpainting(
        self,
        run: Run,
        conditions: Conditions,
        count: int,
        size: tuple[int, int],
        image: Any,
        mask_image: Any,
        masked_image_latents: Tensor | None,
        latents: Tensor | None,
        generator: Generators,
        begin: str,
    ) -> tuple[Tensor, After | None]:
        """(first sample, what is done after each step), and the mask among the conditions.

        begin: what the sample begins as: "noise", "image", or "noisy image".
        """
        channels = self.unet.config["in_channels"]
        if channels not in (4, 9):
            raise ValueError(f"the UNet has {channels} input channels; inpainting needs 4 or 9")
        factor, (height, width) = self.vae_scale_factor, size
        pixels = preprocess(image, factor, height, width)
        mask = preprocess_mask(mask_image, factor, height, width)
        shape = (count, 4, height // factor, width // factor)

        known = None
        if channels == 4 or (latents is None and begin != "noise"):
            known = self._known(pixels, shape, generator)
        noise = latents
        if noise is None:
            noise = draw_noise(shape, generator, self.device, self.unet.dtype)
        first = self._latents(shape, noise, generator, run)
        if known is not None and latents is None and begin != "noise":
            first = known if begin == "image" else run.add_noise(known, noise)

        copies = 2 if self.do_classifier_free_guidance else 1
        small = F.interpolate(mask, size=shape[2:]).to(self.device, self.unet.dtype)
        conditions.tensors["mask"] = repeat_to(small, count, "mask_image").repeat(copies, 1, 1, 1)
        if channels == 9:
            rest = masked_image_latents
            if rest is None:
                if pixels.shape[1] == 4:
                    raise ValueError("image is latents: masked_image_latents are needed too")
                rest = pixels * (mask < 0.5)
            rest = self._known(rest, shape, generator).repeat(copies, 1, 1, 1)
            conditions.tensors["masked_image_latents"] = rest
            return first, None
        assert known is not None
        if masked_image_latents is not None:
            raise ValueError("masked_image_latents are given, and a UNet of 4 input channels reads none")
        if pixels.shape[1] != 4:
            # diffusers encodes the rest of the image here, for nothing: later noise is the same only so
            sources = generator[: len(pixels)] if isinstance(generator, Sequence) else generator
            draw_noise((len(pixels), *shape[1:]), sources, self.device, self._encoder().dtype)
        return first, self._put_back(run, known, noise.to(known), conditions)

    def _beside(self) -> tuple[str, ...]:
        """The conditions among the channels of an inpainting UNet's input."""
        return BESIDE if self.unet.config["in_channels"] == 9 else ()

    def _known(self, image: Tensor, shape: tuple[int, ...], generator: Generators) -> Tensor:
        """Latents of `shape`, of an image to be inpainted."""
        latents = self._image_latents(image, shape[0], generator)
        if latents.shape[1:] != shape[1:]:
            raise ValueError(
                f"the image's latents have shape {list(latents.shape)}; needed is {['N', *shape[1:]]}"
            )
        return latents

    def _put_back(self, run: Run, known: Tensor, noise: Tensor, conditions: Conditions) -> After:
        """What is done after each step: outside of the mask the image takes its place again."""

        def after(index: int, time: Tensor, latents: Tensor) -> Tensor:
            last = index + 1 == len(run.timesteps)
            outside = known if last else run.add_noise(known, noise, index + 1)
            mask = conditions.rows("mask", len(latents))
            return masked(mask, latents, outside.to(latents.dtype))

        return after
