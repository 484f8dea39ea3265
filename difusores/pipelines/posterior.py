"""Inpainting and denoising with a model that was trained for neither: posterior sampling of 2015."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difusores.models.unet_2d import UNet2DModel
from difusores.ops.scheduler_step import COLUMNS, W
from difusores.pipelines.checks import check_finite, check_steps
from difusores.pipelines.images import ImagePipelineOutput, check_output_type, to_images
from difusores.pipelines.unconditional import Labels, StepCallback, UNetPipeline, conditioning_of
from difusores.sampling import Generators, draw_noise, masked
from difusores.schedulers import DDPMScheduler


class PosteriorPipeline(UNetPipeline):
    """Samples of p(x0) r(x0): a model of images times a second distribution, which knows some of the image.

    Sohl-Dickstein et al. 2015, "Deep Unsupervised Learning using Nonequilibrium Thermodynamics", section 2.5:
    each distribution of the chain is multiplied by an r_t(x_t), and each step of the reverse chain by the
    next one. Here r(x0) is a Gaussian around an observation y, of deviation `noise_std`, where the mask is 1,
    and constant elsewhere; r_t is r carried through the forward chain, a Gaussian around sqrt(ᾱ_t) y of
    variance 1 - ᾱ_t + ᾱ_t noise_std². Its product with a Gaussian step N(m, s²) is the Gaussian

        N((1 - k) m + k sqrt(ᾱ) y, (1 - k) s²),    k = s² / (s² + 1 - ᾱ + ᾱ noise_std²).

    At the end r_0 is r itself, so that pixels known without noise are kept exactly. As in the paper, the
    chain is the posterior's to the extent that r_t is p's expectation of r, which it is for a flat p.

    Args:
        unet: a `UNet2DModel`.
        scheduler: any whose configuration a `DDPMScheduler` reads; it is converted.
    """

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        self.register_modules(unet=unet, scheduler=DDPMScheduler.from_config(scheduler.config))

    @torch.no_grad()
    def __call__(
        self,
        observation: Tensor,
        mask: Tensor | None = None,
        noise_std: float = 0.0,
        num_inference_steps: int = 1000,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        class_labels: Labels = None,
        callback_on_step_end: StepCallback | None = None,
        strict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one image for each observation.

        Args:
            observation: [N, C, H, W] in [-1, 1], beyond it where there is noise. What it holds where the
                mask is 0 does not count.
            mask: 1 where a pixel is known, 0 where it is to be filled, broadcast to the observation's shape;
                None for known everywhere.
            noise_std: standard deviation of the observation's Gaussian noise, on the scale of [-1, 1].
            class_labels: as in `DDPMPipeline`.

        The other arguments are those of `DDPMPipeline`.

        Raises:
            ValueError: an argument that is not one of these, nothing to sample (all known, without noise), or
                a scheduler with learned variances.
        """
        check_output_type(output_type)
        channels = self.unet.config["in_channels"]
        if observation.ndim != 4 or observation.shape[1] != channels or not observation.is_floating_point():
            raise ValueError(
                f"observation is {observation.dtype} {list(observation.shape)}; needed is floating point "
                f"[N, {channels}, H, W]"
            )
        if not 0 <= noise_std < float("inf"):
            raise ValueError(f"noise_std is {noise_std}; needed is 0 or more")
        if noise_std == 0 and mask is None:
            raise ValueError("all is known and without noise: needed is a mask, a noise_std or both")
        if str(self.scheduler.variance_type).startswith("learned"):
            raise ValueError(
                f"the scheduler's variance_type is {self.scheduler.variance_type!r}; "
                "allowed are fixed_small, fixed_large and their logarithms"
            )
        observation = observation.to(self.device, self.unet.dtype)
        known = _known(mask, observation)
        observation = torch.where(known, observation, 0)
        check_finite(observation, "observation")
        check_steps(num_inference_steps)
        plan = self.scheduler.plan(num_inference_steps)
        if strict:
            self.check_training()
        labels = self._labels(class_labels, len(observation))
        conditioning = conditioning_of(labels)
        conditioning.check(self.unet, channels)
        alphas = [float(self.scheduler.alphas_cumprod[int(stage.time)]) for stage in plan.stages[1:]] + [1.0]

        steps = num_inference_steps
        with self.progress_bar(total=len(plan)) as bar, self._running(self.scheduler, steps):

            def after_step(index: int, time: Tensor, image: Tensor) -> Tensor:
                bar.update()
                alpha, s = alphas[index], abs(plan.stages[index].row[W + COLUMNS.index("z")])
                variance = 1 - alpha + alpha * noise_std**2
                k = s**2 / (s**2 + variance) if variance > 0 else 1.0
                noise = draw_noise(image.shape, generator, image.device, image.dtype)
                # of the step's sample, whose own mean nobody keeps, the same Gaussian
                product = (1 - k) * image + k * alpha**0.5 * observation + (k * (1 - k)) ** 0.5 * s * noise
                image = masked(known, product, image)
                if callback_on_step_end is None:
                    return image
                changed = callback_on_step_end(self, index, time, {"image": image}) or {}
                return changed.get("image", image)

            image = plan.run(
                lambda x, time: self._call_unet(conditioning, x, time, len(x)),
                draw_noise(observation.shape, generator, self.device, self.unet.dtype),
                generator=generator,
                callback=after_step,
            )
        images = to_images(image, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _known(mask: Tensor | None, observation: Tensor) -> Tensor:
    """bool, like the observation."""
    if mask is None:
        return torch.ones_like(observation, dtype=torch.bool)
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("the mask has values besides 0 (to be filled) and 1 (known)")
    try:
        return mask.to(observation.device).bool().expand(observation.shape)
    except RuntimeError:
        raise ValueError(
            f"the mask has shape {list(mask.shape)}, which does not fit the observation's "
            f"{list(observation.shape)}"
        ) from None
