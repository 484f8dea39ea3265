"""Sampling with ADM models, guided by a classifier or not (Dhariwal & Nichol 2021)."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from difusores.models.adm import ADMClassifier, ADMUNet
from difusores.models.conditioning import Conditioning, check_labels
from difusores.pipelines.checks import check_count, check_numbers, check_steps
from difusores.pipelines.classifier_guidance import Guide, MeanShift, NoiseShift
from difusores.pipelines.guidance import Guided, GuidedPipeline, check_guidance
from difusores.pipelines.images import ImagePipelineOutput, check_output_type, to_images
from difusores.pipelines.pipeline import follows_plan
from difusores.pipelines.unconditional import Labels, StepCallback
from difusores.plan import Plan
from difusores.sampling import Generators, Model, draw_noise
from difusores.schedulers import DDIMScheduler, DDPMScheduler


class ADMPipeline(GuidedPipeline):
    """Sample with an `ADMUNet`, and with an `ADMClassifier` that tells which class to move to.

    All state of a call is local to it, so threads may share a pipeline.

    Args:
        unet: an `ADMUNet`.
        scheduler: one of this package that has a plan. `DDPMScheduler` with "learned_range" and "linspace" is
            ancestral sampling with evenly respaced timesteps, `DDIMScheduler` with "leading" DDIM's.
        classifier: an `ADMClassifier`, or None.
    """

    unet: ADMUNet
    classifier: ADMClassifier | None

    def __init__(self, unet: ADMUNet, scheduler: Any, classifier: ADMClassifier | None = None) -> None:
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 250,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        class_labels: Labels = None,
        classifier_scale: float | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        null_label: int | None = None,
        low_res: torch.Tensor | None = None,
        eta: float | None = None,
        callback_on_step_end: StepCallback | None = None,
        strict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            batch_size: how many; with `class_labels`, their number.
            generator: source of the noise: one, one per image, or None for the global one.
            num_inference_steps: steps of the scheduler.
            output_type: "pil", "np" ([N, H, W, C] in [0, 1]), "pt" ([N, C, H, W] in [0, 1]) or "latent" (the
                last sample as it is, [N, C, H, W]).
            return_dict: return an `ImagePipelineOutput`; else a tuple of one.
            class_labels: one for all images or one per image, for a class-conditional model, for the
                classifier, or for both. Real numbers for a model whose `label_type` is "number".
            classifier_scale: factor s of the classifier's gradient; None for 1 where there are a classifier
                and labels, 0 for none. With a `DDPMScheduler` the mean of each step moves by variance * s *
                gradient, with others the predicted noise by -√(1 - ᾱ) * s * gradient, from an x0 that is
                clipped first where the scheduler clips.
            guidance_scale: weight w of classifier-free guidance, w * conditional + (1 - w) * unconditional
                prediction. None or 1 for none. May stand beside the classifier's.
            guidance_rescale, guidance_interval: of the classifier-free guidance, see `Guided`.
            null_label: the label for which the model predicts unconditionally; needed by `guidance_scale`.
                The public checkpoints have none.
            low_res: [N, C, h, w] in [-1, 1], for upsamplers: the images to be enlarged.
            eta: of a `DDIMScheduler` alone, 0 to 1; None for 0.
            callback_on_step_end: callback(pipeline, step, timestep, {"image": sample}) after each step; may
                return a dictionary with another "image".
            strict: refuse a scheduler that contradicts the one in the model's folder, see `check_training`.

        Raises:
            ValueError: an argument that is not one of these, or that nothing here takes.
        """
        check_output_type(output_type)
        check_steps(num_inference_steps)
        check_numbers(classifier_scale=classifier_scale)
        scale = check_guidance(guidance_scale, guidance_rescale, guidance_interval)
        check_numbers(0, eta=eta)
        batch_size = check_count(batch_size, "batch_size")
        labels = self._labels(class_labels, batch_size)
        batch_size = batch_size if labels is None else len(labels)
        guide = self._guide(labels, classifier_scale)
        if low_res is not None:
            if len(low_res) != batch_size:
                raise ValueError(f"low_res holds {len(low_res)} images, and {batch_size} are asked for")
            low_res = low_res.to(self.device, self.unet.dtype)
        conditioning = self._conditioning(labels, scale, null_label, low_res)
        conditioning.check(self.unet, self.unet.config["in_channels"])
        plan, clip = self._plan(num_inference_steps, eta, guide)
        if strict:
            self.check_training()

        def predict(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            told = conditioning.part(slice(len(x)))
            return self._call_unet(told, x, time, batch_size, return_dict=False)

        by_mean = isinstance(self.scheduler, DDPMScheduler)
        guided = Guided(
            predict,
            lambda: (scale, 1 - scale),
            len(plan),
            conditional=0,
            rescale=guidance_rescale,
            interval=guidance_interval,
            limits=self._guidance_limits,
            step_rescales=guide is None or by_mean,  # else the gradient is a part of the step's sum
        )
        model: Model = guided
        added = None
        guidance: tuple[float, ...] | None = guided.weights
        if guide is not None and by_mean:
            mean = MeanShift(guide, plan, self.scheduler, guided, len(guided.weights))
            model, added = mean.model, mean.shift
        elif guide is not None:
            shift = NoiseShift(guide, plan, self.scheduler, guided, guided.weights, clip)
            model, guidance = shift.model, shift.weights
        side = self.unet.config["image_size"]
        shape = (batch_size, self.unet.config["in_channels"], side, side)
        noise = draw_noise(shape, generator, self.device, self.unet.dtype) * plan.init_noise_sigma
        steps = num_inference_steps
        with self.progress_bar(total=len(plan)) as bar, self._running(self.scheduler, steps):

            def after_step(index: int, time: torch.Tensor, image: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return image
                # a copy: the loop writes its buffers again
                changed = callback_on_step_end(self, index, time, {"image": image.clone()})
                return image if changed is None else changed.get("image", image)

            image = plan.run(
                model,
                noise,
                generator=generator,
                callback=after_step,
                guidance=guidance,
                rescale=guided.rescale,
                conditional=guided.conditional,
                shift=added,
            )
        images = to_images(image, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _plan(self, steps: int, eta: float | None, guide: Guide | None) -> tuple[Plan, float | None]:
        """The scheduler's plan, and the limit of x0 that is left to the guidance."""
        scheduler, clip = self.scheduler, None
        if not follows_plan(scheduler):
            raise ValueError(
                f"{type(scheduler).__name__} has no plan; ADMPipeline needs a scheduler of difusores with one"
            )
        options: dict[str, Any] = {}
        if isinstance(scheduler, DDIMScheduler):
            options = {"eta": eta or 0.0, "use_clipped_model_output": True}
        elif eta is not None:
            raise ValueError(
                f"eta is an option of DDIMScheduler, and the scheduler is a {type(scheduler).__name__}"
            )
        known = inspect.signature(type(scheduler).__init__).parameters
        if guide is not None and not isinstance(scheduler, DDPMScheduler) and "clip_sample" in known:
            if scheduler.config["clip_sample"]:
                clip = scheduler.config["clip_sample_range"]
            scheduler = copy.copy(scheduler)
            scheduler.register_to_config(clip_sample=False)
        return scheduler.plan(steps, **options), clip

    def _guide(self, labels: torch.Tensor | None, scale: float | None) -> Guide | None:
        classifier = self.classifier
        if classifier is None:
            if scale:
                raise ValueError(f"classifier_scale is {scale}, and this pipeline has no classifier")
            return None
        if labels is None:
            if scale:
                raise ValueError(f"classifier_scale is {scale}, and there are no class_labels to move to")
            return None
        if scale == 0:
            return None
        classes = classifier.config["num_classes"]
        check_labels(labels, classes, type(classifier).__name__)
        return Guide(classifier, labels, 1.0 if scale is None else float(scale))

    def _labels(self, class_labels: Labels, batch_size: int) -> torch.Tensor | None:
        """[batch]."""
        conditional = self.unet.config["class_cond"]
        if class_labels is None:
            if conditional:
                raise ValueError("this model is class-conditional and needs class_labels")
            return None
        if not conditional and self.classifier is None:
            raise ValueError("class_labels are given, and neither the model nor a classifier takes them")
        labels = torch.as_tensor(class_labels, device=self.device)
        if labels.ndim == 0:
            labels = labels.repeat(batch_size)
        if labels.ndim != 1 or batch_size not in (1, len(labels)):
            raise ValueError(
                f"batch_size is {batch_size}, and class_labels have shape {list(labels.shape)}; needed is "
                "one for all images or one for each"
            )
        return labels

    def _conditioning(
        self,
        labels: torch.Tensor | None,
        scale: float,
        null_label: int | None,
        low_res: torch.Tensor | None,
    ) -> Conditioning:
        """What the network is told; with guidance the labels and then as many times the null label."""
        if not self.unet.config["class_cond"]:
            labels = None
        if scale == 1 and null_label is not None:
            raise ValueError("null_label is given, and there is no guidance_scale that needs it")
        if scale != 1 and (null_label is None or labels is None):
            raise ValueError("guidance_scale needs a class-conditional model, and its null_label")
        if labels is None:
            return Conditioning("none", low_res=low_res)
        if null_label is not None:
            labels = torch.cat((labels, torch.full_like(labels, null_label)))
            low_res = None if low_res is None else torch.cat((low_res, low_res))
        return Conditioning("class", labels=labels, low_res=low_res)
