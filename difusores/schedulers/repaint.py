"""RePaintScheduler: inpainting with an unconditional model (Lugmayr et al. 2022, "RePaint")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.sampling import Generators, draw_noise, masked
from difusores.schedulers.base import DiscreteScheduler, SchedulerOutput, advance


@dataclass
class RePaintSchedulerOutput(SchedulerOutput):
    """What `RePaintScheduler.step` returns.

    Attributes:
        prev_sample: the next sample, like `sample`.
        pred_original_sample: x0 as predicted at this step, clipped, like `sample`.
    """

    pred_original_sample: Tensor


class RePaintScheduler(DiscreteScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    There is no `plan`: a mask decides what of two samples is kept, and no row of coefficients says that.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: see `difusores.schedules.betas`.
        eta: 0 is DDIM, 1 has the variance of DDPM.
        clip_sample: clamp the predicted x0 to [-1, 1].

    Attributes:
        eta: the configuration's, unless another one is assigned.
        timesteps: [steps] int64, with jumps back up.
    """

    _compatibles: ClassVar[list[str]] = []
    returned = ("y", "x0", "d")
    eta: float

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        eta: float = 0.0,
        trained_betas: Any = None,
        clip_sample: bool = True,
    ) -> None:
        self._initialize()
        self.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float32, device="cpu")
        self.eta = eta

    def _prediction(self) -> solvers.Prediction:
        return solvers.Prediction("epsilon", 1.0 if self.config["clip_sample"] else None)

    def set_timesteps(
        self,
        num_inference_steps: int,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        device: str | torch.device | None = None,
    ) -> None:
        """Choose the timesteps; where one is above the one before it, `undo_step` leads there, not `step`.

        Args:
            num_inference_steps, jump_length, jump_n_sample: see `difusores.schedules.repaint_timesteps`.
            device: where `self.timesteps` is put.

        Raises:
            ValueError: a number below 1.
        """
        values = schedules.repaint_timesteps(num_inference_steps, len(self), jump_length, jump_n_sample)
        self.num_inference_steps = min(len(self), num_inference_steps)
        self._set_grid(values, device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        original_image: Tensor,
        mask: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> RePaintSchedulerOutput | tuple[Tensor, ...]:
        """One step back in time, with the known part of the image put in.

        Args:
            model_output: [B, C, ...], predicted noise.
            timestep: where the sample is; an element of `self.timesteps` costs no read.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            original_image: like sample, or of batch 1; what is known of it is kept.
            mask: broadcast to sample: 1 where the image is known, 0 where it is to be made up.
            generator: source of the noise, drawn at every step; a list draws one image each.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: `set_timesteps` was not called, or eta asks for more noise than fits.
        """
        t, eta = self._number(timestep), float(self.eta)
        cached = self._rows.get((t, eta))
        if cached is None:
            steps = [(t, t - self._stride())]
            stage = next(solvers.repaint(self._alphas(), steps, self._prediction(), eta=eta))
            cached = self._cache((t, eta), stage)
        image = original_image.expand(sample.shape)
        (made_up, x0, known), _ = advance(cached, model_output, sample, generator, slots=(image,))
        # in its own place: a new tensor of a large image costs as much in page faults as in bytes
        place = None if made_up.requires_grad or mask.requires_grad else made_up
        result = masked(mask, known, made_up, out=place), x0
        return RePaintSchedulerOutput(*result) if return_dict else result

    def undo_step(self, sample: Tensor, timestep: int | Tensor, generator: Generators = None) -> Tensor:
        """Noise again: from a timestep to the one above it in `timesteps`, one training step at a time.

        Args:
            sample: [B, C, ...], at `timestep`. Not changed.
            timestep: where the sample is.
            generator: source of the noise, drawn T // num_inference_steps times; seven are held at a time.

        Raises:
            ValueError: `set_timesteps` was not called.
        """
        first = self._number(timestep)
        last, most = first + self._stride(), len(solvers.RAISED_BY)
        for t in range(first, last, most):
            count = min(most, last - t)
            cached = self._rows.get(("undo", t, count))
            if cached is None:
                betas = [float(self.betas[place]) for place in range(t, t + count)]
                cached = self._cache(("undo", t, count), solvers.raised(t, betas), ("y",))
            z, *more = (
                draw_noise(sample.shape, generator, sample.device, sample.dtype) for _ in range(count)
            )
            e = more[0] if more else sample
            ((sample,), _) = advance(cached, e, sample, None, z, tuple(more[1:]))
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> NoReturn:
        """Refused, as in diffusers: models for RePaint are trained as for `DDPMScheduler`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("RePaint only samples; use DDPMScheduler.add_noise to train")
