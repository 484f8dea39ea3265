"""Pipelines that make images from noise alone, or from noise and a class label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from difusores.models.conditioning import Conditioning
from difusores.models.unet_2d import UNet2DModel
from difusores.pipelines.checks import as_number, check_count, check_numbers, check_steps
from difusores.pipelines.guidance import Guided, GuidedPipeline, check_guidance
from difusores.pipelines.images import ImagePipelineOutput, check_output_type, to_images
from difusores.pipelines.pipeline import follows_plan, step_accepts_generator
from difusores.sampling import Callback, Generators, Model, draw_noise
from difusores.schedulers import DDIMScheduler

Labels = int | Sequence[int] | torch.Tensor | None
StepCallback = Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


class UNetPipeline(GuidedPipeline):
    """Base of the pipelines below: a UNet, and a scheduler.

    With a scheduler of this package all state of a call is local to it, so threads may share a pipeline. One
    of diffusers, or with a `step` of its own, is used as diffusers' pipelines do, and its state changes.
    """

    unet: UNet2DModel

    @torch.no_grad()
    def _sample(
        self,
        num_inference_steps: int,
        options: dict[str, Any],
        batch_size: int,
        generator: Generators,
        output_type: str,
        return_dict: bool,
        *,
        class_labels: Labels,
        guidance: tuple[float | None, float, tuple[float, float]],
        null_label: int | None,
        callback_on_step_end: StepCallback | None,
        strict: bool,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            options: of the scheduler's `plan` and `step`.
            guidance: its scale, rescale and interval.

        The other arguments are those of `DDPMPipeline`.
        """
        check_output_type(output_type)
        check_steps(num_inference_steps)
        scale = check_guidance(*guidance)
        check_numbers(0, eta=options.get("eta"))
        batch_size = check_count(batch_size, "batch_size")
        scheduler, plan = self.scheduler, None
        takes_generator = step_accepts_generator(scheduler)
        if follows_plan(scheduler):
            plan = scheduler.plan(num_inference_steps, **options)
        else:
            scheduler.set_timesteps(num_inference_steps)
        if strict:
            self.check_training()
        labels = self._labels(class_labels, batch_size)
        batch_size = batch_size if labels is None else len(labels)
        shape = (batch_size, self.unet.config["in_channels"], *self._image_size())
        if scale != 1:
            labels = self._with_null_labels(labels, null_label)
        elif null_label is not None:
            raise ValueError("null_label is given, and there is no guidance_scale that needs it")
        conditioning = conditioning_of(labels)
        conditioning.check(self.unet, shape[1])
        steps = len(scheduler.timesteps if plan is None else plan)
        guided = Guided(
            lambda x, t: self._call_unet(conditioning.part(slice(len(x))), x, t, batch_size),
            lambda: (scale, 1 - scale),
            steps,
            conditional=0,
            rescale=guidance[1],
            interval=guidance[2],
            limits=self._guidance_limits,
            step_rescales=plan is not None,
        )

        seen = None if plan is None else num_inference_steps
        with self.progress_bar(total=steps) as bar, self._running(scheduler, seen):

            def after_step(index: int, time: torch.Tensor, image: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                # a copy: the loop writes its buffers again
                changed = callback_on_step_end(self, index, time, {"image": image.clone()})
                return None if changed is None else changed.get("image")

            noise = draw_noise(shape, generator, self.device, self.unet.dtype)
            noise *= getattr(scheduler, "init_noise_sigma", 1.0) if plan is None else plan.init_noise_sigma
            if plan is None:
                if takes_generator:
                    options = {**options, "generator": generator}
                image = self._steps(scheduler, noise, guided, guided.weights, after_step, options)
            else:
                image = plan.run(
                    guided,
                    noise,
                    generator=generator,
                    callback=after_step,
                    guidance=guided.weights,
                    rescale=guided.rescale,
                    conditional=guided.conditional,
                )
        images = to_images(image, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _steps(
        self,
        scheduler: Any,
        image: torch.Tensor,
        model: Model,
        weights: tuple[float, ...],
        callback: Callback,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """The loop of diffusers' pipelines. options: of `step`."""
        for i, time in enumerate(scheduler.timesteps):
            given = torch.cat((image,) * len(weights))
            if hasattr(scheduler, "scale_model_input"):
                given = scheduler.scale_model_input(given, time)
            output = model(given, time)
            if len(weights) > 1:
                parts, channels = output.chunk(len(weights)), image.shape[1]
                mixed = sum(w * part[:, :channels] for w, part in zip(weights, parts, strict=True))
                # the others are a learned variance, which guidance leaves as it is
                output = torch.cat((mixed, parts[0][:, channels:]), dim=1)
            image = scheduler.step(output, time, image, **options).prev_sample
            changed = callback(i, time, image)
            image = image if changed is None else changed
        return image

    def _image_size(self) -> tuple[int, int]:
        size = self.unet.config["sample_size"]
        if size is None:
            raise ValueError("the model's sample_size is None, so the size of its images is not known")
        return (size, size) if isinstance(size, int) else tuple(size)

    def _labels(self, class_labels: Labels, batch_size: int) -> torch.Tensor | None:
        """[batch], or [batch, channels] for labels that are embeddings."""
        if class_labels is None:
            return None
        labels = torch.as_tensor(class_labels, device=self.device)
        if labels.ndim == 0:
            labels = labels.repeat(batch_size)
        if batch_size not in (1, len(labels)):
            raise ValueError(f"batch_size is {batch_size}, and there are {len(labels)} class_labels")
        return labels

    def _with_null_labels(self, labels: torch.Tensor | None, null_label: int | None) -> torch.Tensor:
        """The labels, then as many times the null label."""
        classes = self.unet.config.get("num_class_embeds")
        if labels is None or classes is None:
            raise ValueError("guidance_scale needs class_labels, and a model with num_class_embeds")
        return torch.cat((labels, torch.full_like(labels, classes - 1 if null_label is None else null_label)))


def conditioning_of(labels: torch.Tensor | None) -> Conditioning:
    """By rows of a table or numbers [N], by embeddings [N, width], or by nothing."""
    if labels is None:
        return Conditioning("none")
    return Conditioning("adm", vector=labels) if labels.ndim == 2 else Conditioning("class", labels=labels)


class DDPMPipeline(UNetPipeline):
    """Sample with the ancestral sampler of DDPM (Ho et al. 2020, algorithm 2), or whatever its scheduler is.

    Args:
        unet: a `UNet2DModel`.
        scheduler: any of this package that the model was trained for, or one of diffusers.
    """

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        class_labels: Labels = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        null_label: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        strict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            batch_size: how many; with `class_labels`, their number.
            generator: source of the noise: one, one per image, or None for the global one.
            num_inference_steps: model calls, from 1 to the scheduler's training steps.
            output_type: "pil", "np" ([N, H, W, C] in [0, 1]), "pt" ([N, C, H, W] in [0, 1]) or "latent" (the
                last sample as it is, [N, C, H, W]).
            return_dict: return an `ImagePipelineOutput`; else a tuple of one.
            class_labels: one for all images or one per image; needed by class-conditional models.
            guidance_scale: weight w of classifier-free guidance, w * conditional + (1 - w) * unconditional
                prediction (Ho & Salimans 2022). None or 1 for no guidance.
            guidance_rescale, guidance_interval: see `Guided`.
            null_label: the label of the unconditional prediction; the model's last one if None.
            callback_on_step_end: callback(pipeline, step, timestep, {"image": sample}) after each step; may
                return a dictionary with another "image".
            strict: refuse a scheduler that contradicts the one in the model's folder, see `check_training`.

        Raises:
            ValueError: an argument that is not one of these.
        """
        return self._sample(
            num_inference_steps,
            {},
            batch_size,
            generator,
            output_type,
            return_dict,
            class_labels=class_labels,
            guidance=(guidance_scale, guidance_rescale, guidance_interval),
            null_label=null_label,
            callback_on_step_end=callback_on_step_end,
            strict=strict,
        )


class DDIMPipeline(UNetPipeline):
    """Sample with DDIM (Song et al. 2021).

    Args:
        unet: a `UNet2DModel`.
        scheduler: any whose configuration a `DDIMScheduler` reads; it is converted.
    """

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        self.register_modules(unet=unet, scheduler=DDIMScheduler.from_config(scheduler.config))

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        class_labels: Labels = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        null_label: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        strict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            eta: 0 is deterministic given the first noise, 1 adds the noise of DDPM.
            use_clipped_model_output: derive the noise from the clipped prediction of the image; None for
                False without guidance, as in diffusers, and True with it: guided predictions lie far outside
                the range of images, and clipping them while their noise stays spoils the image.

        The other arguments are those of `DDPMPipeline`.
        """
        if use_clipped_model_output is None and guidance_scale is not None:
            use_clipped_model_output = as_number(guidance_scale, "guidance_scale") != 1
        return self._sample(
            num_inference_steps,
            {"eta": eta, "use_clipped_model_output": use_clipped_model_output},
            batch_size,
            generator,
            output_type,
            return_dict,
            class_labels=class_labels,
            guidance=(guidance_scale, guidance_rescale, guidance_interval),
            null_label=null_label,
            callback_on_step_end=callback_on_step_end,
            strict=strict,
        )
