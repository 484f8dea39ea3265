"""What pipelines share that sample latents and decode them: steps, guidance, the loop, the decoder's slot."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from difusores.image_processor import VaeImageProcessor
from difusores.pipelines.call_state import CallState
from difusores.pipelines.checks import check_finite
from difusores.pipelines.guidance import (
    Guided,
    GuidedPipeline,
    as_tensor,
    check_guidance,
    guidance_embedding,
)
from difusores.pipelines.runs import Run, begin_run
from difusores.sampling import Generators, Model, draw_noise

StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Tensor] | None]
After = Callable[[int, Tensor, Tensor], Tensor | None]

SCALING_FACTOR = 0.18215
"""Of latents, where a decoder has no configuration that says it: Stable Diffusion's."""
VAE_SCALE_FACTOR = 8


@dataclass
class Conditions:
    """The tensors that the model is given beside the sample, by the names that callbacks know.

    Each has a row for every row of the model's input: with guidance [unconditional, conditional], or the
    other way round. A callback that puts rows of the conditional part alone in their place ends the guidance.

    Attributes:
        conditional: which part is the conditional one, the first, 0, or the last, -1.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    conditional: int = -1

    def rows(self, name: str, count: int) -> Tensor:
        """All rows, or those of the conditional part."""
        return self.tensors[name][-count:] if self.conditional else self.tensors[name][:count]


class _Interrupted(Exception):
    """A callback has set `_interrupt`; carries the latents."""


class LatentPipeline(GuidedPipeline):
    """Base of pipelines with a `vae`, a `unet` and a `scheduler`, and guidance without a classifier.

    `vae` is a slot: anything with `decode(latents)`, which returns images or an object that begins with them.
    Where it has no `config`, latents have Stable Diffusion's scale and its 8 pixels.

    With a scheduler of this package a call leaves it as it is. What callbacks see on the pipeline
    (`scheduler`, `guidance_scale`, `num_timesteps`, `interrupt`) is of their own call, so threads may share a
    pipeline.
    """

    vae: Any
    _callback_tensor_inputs: tuple[str, ...] = ("latents",)

    _guidance_scale = CallState[float](1.0)
    _guidance_rescale = CallState[float](0.0)
    _guidance_interval = CallState[tuple[float, float]]((0.0, 1.0))
    _clip_skip = CallState[int | None](None)
    _cross_attention_kwargs = CallState[dict[str, Any] | None](None)
    _num_timesteps = CallState[int](0)
    _interrupt = CallState[bool](False)

    @property
    def guidance_scale(self) -> float:
        """Of the call; a callback changes it by `_guidance_scale`."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """Of the call."""
        return self._guidance_rescale

    @property
    def clip_skip(self) -> int | None:
        """Of the call."""
        return self._clip_skip

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        """Of the call."""
        return self._cross_attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Model calls of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which ends the run after this step."""
        return self._interrupt

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the model is called with and without the condition."""
        return self._guidance_scale > 1 and self.unet.config.get("time_cond_proj_dim") is None

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a latent's side."""
        config = getattr(self.vae, "config", None)
        widths = None if config is None else config.get("block_out_channels")
        return VAE_SCALE_FACTOR if widths is None else int(2 ** (len(widths) - 1))

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Of pictures to and from the decoder."""
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def _scaling_factor(self) -> float:
        config = getattr(self.vae, "config", None)
        return SCALING_FACTOR if config is None else float(config.get("scaling_factor", SCALING_FACTOR))

    def _scaled(self, latents: Tensor) -> Tensor:
        """Latents as the UNet has them, of those that the VAE has."""
        moments = self._latent_moments(latents)
        if moments is None:
            return self._scaling_factor * latents
        mean, std = moments
        return (latents - mean) * self._scaling_factor / std

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the VAE has them, of those that the UNet has."""
        moments = self._latent_moments(latents)
        if moments is None:
            return latents / self._scaling_factor
        mean, std = moments
        return latents * std / self._scaling_factor + mean

    def _latent_moments(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of each channel of the VAE's latents, where its configuration has both."""
        config = getattr(self.vae, "config", None)
        moments = [None if config is None else config.get(f"latents_{name}") for name in ("mean", "std")]
        if any(moment is None for moment in moments):
            return None
        mean, std = (torch.tensor(moment).view(1, -1, 1, 1).to(like) for moment in moments)
        return mean, std

    def _encoder(self) -> Any:
        """What encodes images: the VAE, or a copy in the dtype that this takes."""
        return self.vae

    def _decoder(self) -> Any:
        """What decodes latents: the VAE, or a copy in the dtype that this takes."""
        return self.vae

    def enable_vae_tiling(self) -> None:
        """Decode large images by tiles, in bounded memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode whole images again."""
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decode one image of a batch after the other."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode whole batches again."""
        self.vae.disable_slicing()

    def _image_size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """Height and width in pixels: as given, or those of the latents, or of the UNet's training.

        Raises:
            ValueError: not divisible by 8 and by the VAE's factor, or not known.
        """
        factor = self.vae_scale_factor
        if latents is not None and latents.ndim == 4:
            size = latents.shape[-2] * factor, latents.shape[-1] * factor
            height, width = height or size[0], width or size[1]
        if not height or not width:
            trained = self.unet.config["sample_size"]
            if trained is None:
                raise ValueError("the UNet's sample_size is None: height and width have to be given")
            sides = (trained, trained) if isinstance(trained, int) else tuple(trained)
            height, width = height or sides[0] * factor, width or sides[1] * factor
        unit = max(8, factor) if latents is None else factor
        whole = isinstance(height, Integral) and isinstance(width, Integral)
        if not whole or height % unit or width % unit or height < 1 or width < 1:
            raise ValueError(
                f"height and width are {height!r} and {width!r}; both have to be divisible by {unit}"
            )
        return height, width

    def _begin_run(self, num_inference_steps: int | None, *, strict: bool = True, **options: Any) -> Run:
        """The steps of a call.

        Args:
            strict: see `check_training`.
            options: see `begin_run`.

        Raises:
            ValueError: see `begin_run` and `check_training`.
        """
        run = begin_run(self.scheduler, self.device, num_inference_steps, **options)
        if strict:
            self.check_training()
        return run

    def _latents(
        self, shape: tuple[int, ...], latents: Tensor | None, generator: Generators, run: Run
    ) -> Tensor:
        """The first sample: noise, or the caller's, with the run's standard deviation.

        Raises:
            ValueError: the caller's have another shape, or numbers that are not finite.
        """
        if isinstance(generator, Sequence) and len(generator) != shape[0]:
            raise ValueError(f"there are {len(generator)} generators for {shape[0]} images")
        if latents is None:
            latents = draw_noise(shape, generator, self.device, self.unet.dtype)
        else:
            check_finite(latents, "latents")
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents have shape {list(latents.shape)}; needed is {list(shape)}")
            latents = latents.to(self.device)
        return latents * run.init_noise_sigma

    def _denoise(
        self,
        run: Run,
        latents: Tensor,
        guided: Guided,
        conditions: Conditions,
        *,
        generator: Generators,
        after: After | None = None,
        callback: StepCallback | None = None,
        callback_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """The loop.

        Args:
            latents: [B, C, h, w], the first sample.
            guided: the model; the step combines its outputs.
            after: after(index, time, latents) -> other latents or None, before the callback.
            callback, callback_inputs: see `StableDiffusionPipeline`.
        """
        self._num_timesteps, self._interrupt = len(run.timesteps), False
        with self.progress_bar(total=len(run.timesteps)) as bar, self._running(run.scheduler):

            def after_step(index: int, time: Tensor, x: Tensor) -> Tensor | None:
                bar.update()
                if run.plan is not None and hasattr(run.scheduler, "_step_index"):
                    run.scheduler._step_index = run.begin + index + 1
                changed = None if after is None else after(index, time, x)
                if callback is None:
                    return changed
                latents = (x if changed is None else changed).clone()  # the loop writes its buffers again
                seen = {"latents": latents, **conditions.tensors}
                answer = callback(self, index, time, {key: seen.get(key) for key in callback_inputs}) or {}
                latents = answer.pop("latents", latents)
                conditions.tensors.update(answer)
                if self._interrupt:
                    raise _Interrupted(latents)
                return latents

            try:
                if run.plan is None:
                    return self._step_by_step(run, latents, guided, generator, after_step)
                return run.plan.run(
                    guided,
                    latents,
                    generator=generator,
                    callback=after_step,
                    guidance=guided.weights,
                    rescale=guided.rescale,
                    conditional=guided.conditional,
                    model_dtype=self.unet.dtype,
                )
            except _Interrupted as interrupted:
                stopped: Tensor = interrupted.args[0]
                return stopped

    def _step_by_step(
        self,
        run: Run,
        latents: Tensor,
        guided: Guided,
        generator: Generators,
        after: Callable[[int, Tensor, Tensor], Tensor | None],
    ) -> Tensor:
        """The loop of diffusers' pipelines, for its schedulers and others without a plan."""
        scheduler, options, weights = run.scheduler, dict(run.options), guided.weights
        if "generator" in options:
            options["generator"] = generator
        for i, t in enumerate(run.timesteps):
            given = torch.cat([latents] * len(weights))
            if hasattr(scheduler, "scale_model_input"):
                given = scheduler.scale_model_input(given, t)
            parts = as_tensor(guided(given.to(self.unet.dtype), t)).chunk(len(weights))
            output = sum(weight * part for weight, part in zip(weights, parts, strict=True))
            latents = scheduler.step(output, t, latents, **options, return_dict=False)[0]
            changed = after(i, t, latents)
            latents = latents if changed is None else changed
        return latents

    def _start_guidance(self, scale: Any, rescale: float, interval: tuple[float, float]) -> None:
        """Keep a call's guidance; see `check_guidance`."""
        self._guidance_scale = check_guidance(scale, rescale, interval)
        self._guidance_rescale, self._guidance_interval = rescale, interval

    def _guidance_weights(self, ended: bool = False) -> tuple[float, ...]:
        """Of the unconditional and the conditional part of the model's output, now."""
        scale = 1.0 if ended or not self.do_classifier_free_guidance else self._guidance_scale
        return 1 - scale, scale

    def _guided(self, predict: Model, conditions: Conditions, run: Run, count: int) -> Guided:
        """The model for `_denoise`, with the call's guidance.

        count: images, which are the rows of "prompt_embeds" where a callback has ended the guidance.
        """

        def weights() -> tuple[float, ...]:
            return self._guidance_weights(len(conditions.tensors.get("prompt_embeds", ())) == count)

        return Guided(
            predict,
            weights,
            len(run.timesteps),
            conditional=conditions.conditional,
            rescale=self._guidance_rescale,
            interval=self._guidance_interval,
            limits=self._guidance_limits,
            step_rescales=run.plan is not None,
        )

    def _guidance_embedding(self, count: int) -> Tensor | None:
        """[count, width] for a model that is told the guidance; None for others."""
        width = self.unet.config.get("time_cond_proj_dim")
        if width is None:
            return None
        return guidance_embedding(self._guidance_scale, count, width, self.device).to(self.unet.dtype)

    def _encode_image(self, image: Tensor, generator: Generators, mode: bool = False) -> Tensor:
        """Latents [N, C, h, w] of images in [-1, 1], as the VAE has them; several generators draw for each.

        Args:
            mode: take the mean of their distribution and not a draw.
        """
        if not hasattr(self.vae, "encode"):
            raise ValueError(f"vae is a {type(self.vae).__name__}, which has no encode; latents can be given")
        vae = self._encoder()
        image = image.to(self.device, vae.dtype)
        parts: Iterable[tuple[Tensor, Any]] = [(image, generator)]
        if isinstance(generator, Sequence) and not mode:
            parts = zip(image.split(1), generator, strict=False)
        found = []
        for part, source in parts:
            encoded = vae.encode(part)
            distribution = getattr(encoded, "latent_dist", None)
            if distribution is None:
                found.append(as_tensor(encoded))
            else:
                found.append(distribution.mode() if mode else distribution.sample(source))
        return torch.cat(found).to(self.unet.dtype)

    def _decode(self, latents: Tensor, generator: Generators = None) -> Tensor:
        """Images [B, 3, H, W] around [-1, 1] from the loop's latents; a warning names those that have NaN."""
        broken = [i for i, image in enumerate(latents) if not bool(torch.isfinite(image).all())]
        if broken:
            warnings.warn(
                f"the latents of image(s) {broken} have NaN or infinity: the model or its guidance has "
                f"left the range of {latents.dtype}",
                stacklevel=5,
            )
        vae = self._decoder()
        dtype = getattr(vae, "dtype", None) or latents.dtype
        options: dict[str, Any] = {}
        if "generator" in inspect.signature(vae.decode).parameters:
            options["generator"] = generator
        wide = latents.to(torch.promote_types(latents.dtype, dtype))
        images = vae.decode(self._unscaled(wide).to(dtype), **options)
        return as_tensor(images)


def check_callback_inputs(pipeline: Any, names: Sequence[str]) -> None:
    """Raise ValueError for names that a pipeline's callbacks do not get."""
    unknown = [name for name in names if name not in pipeline._callback_tensor_inputs]
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {', '.join(unknown)}; "
            f"allowed are {', '.join(pipeline._callback_tensor_inputs)}"
        )
