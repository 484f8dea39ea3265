"""DDPM, batched too: ancestral sampling (Ho et al. 2020, "Denoising diffusion probabilistic models")."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage
from difusores.sampling import Generators, split_output
from difusores.schedulers.base import DiscreteScheduler, SchedulerOutput, advance_each


@dataclass
class DDPMSchedulerOutput(SchedulerOutput):
    """What `DDPMScheduler.step` returns.

    Attributes:
        prev_sample: the next sample, like `sample`.
        pred_original_sample: x0 as predicted at this step, clipped or thresholded, like `sample`.
    """

    pred_original_sample: Tensor | None = None


@dataclass
class DDPMParallelSchedulerOutput(DDPMSchedulerOutput):
    """What `DDPMParallelScheduler.step` returns: as `DDPMSchedulerOutput`."""


class DDPMScheduler(DiscreteScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see
            `difusores.schedules.betas`.
        variance_type: see `difusores.solvers.ddpm`.
        clip_sample, clip_sample_range: clamp the predicted x0 to [-clip_sample_range, clip_sample_range].
        prediction_type: "epsilon", "sample" or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding, in place of
            clipping.
        timestep_spacing, steps_offset: see `difusores.schedules.timesteps`.
    """

    _output: ClassVar[type[DDPMSchedulerOutput]] = DDPMSchedulerOutput

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self.custom_timesteps = False
        self._initialize()

    @property
    def variance_type(self) -> str:
        """The configuration's variance type, or the one that was assigned since."""
        return str(self.__dict__.get("_variance_type", self.config["variance_type"]))

    @variance_type.setter
    def variance_type(self, value: str) -> None:
        self._variance_type = value

    def _timesteps(self, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> list[int]:
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("exactly one of num_inference_steps and timesteps has to be given")
        total, config = len(self), self.config
        if timesteps is not None:
            return schedules.custom_timesteps(timesteps, total)
        spacing, offset = config["timestep_spacing"], config["steps_offset"]
        return schedules.timesteps(spacing, int(num_inference_steps), total, offset)  # type: ignore[arg-type]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the training steps at which the model is called.

        Args:
            num_inference_steps: how many, from 1 to T, spaced by the configuration.
            device: where `self.timesteps` is put.
            timesteps: the steps themselves, descending, in place of a number.

        Raises:
            ValueError: both or neither given, or out of range.
        """
        values = self._timesteps(num_inference_steps, timesteps)
        self.custom_timesteps = timesteps is not None
        if timesteps is None:
            self.num_inference_steps = num_inference_steps
        self._set_grid(values, device)

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """The timestep that follows in sampling, -1 after the last one."""
        return self._previous(self._number(timestep))

    def _previous(self, t: int) -> int:
        if not self.custom_timesteps and not self.num_inference_steps:
            return t - 1
        values = self._current_grid().values
        if t not in values:
            raise IndexError(f"timestep {t} is not one of the scheduler's timesteps {values}")
        index = values.index(t)
        return values[index + 1] if index + 1 < len(values) else -1

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        begin: int = 0,
    ) -> Plan:
        """The run from step `begin` on as an immutable plan; the scheduler's own state stays as it is.

        The other arguments and Raises: as `set_timesteps`.
        """
        values = self._timesteps(num_inference_steps, timesteps)[begin:]
        return self._plan([*self._stages(pairwise([*values, -1]))])

    def _stages(self, steps: Any) -> Any:
        return solvers.ddpm(self._alphas(), steps, self._prediction(), variance_type=self.variance_type)

    def _get_variance(
        self,
        t: int | Tensor,
        predicted_variance: Tensor | None = None,
        variance_type: str | None = None,
    ) -> Tensor | None:
        """What diffusers' pipelines read under this name: 0-dim float32, or like predicted_variance.

        It is the variance, but the standard deviation for "fixed_small_log" and the logarithm of the variance
        for "fixed_large_log" and "learned_range".
        """
        kind, t = variance_type or self.variance_type, self._number(t)
        if kind == "learned":
            return predicted_variance
        a, before = self._alphas(), self._previous(t)
        small, beta = solvers.ddpm_variances(a[t], a[before] if before >= 0 else 1.0)
        if kind == "learned_range" and predicted_variance is not None:
            return solvers.log_variance_between(predicted_variance, small, beta)
        values = {
            "fixed_small": small,
            "fixed_small_log": math.sqrt(small),
            "fixed_large": beta,
            "fixed_large_log": math.log(max(beta, 1e-20)),
        }
        return torch.tensor(values[kind], dtype=torch.float32, device="cpu")

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, ...]:
        """One step back in time.

        Args:
            model_output: [B, C, ...], or [B, 2 * C, ...] for a learned variance.
            timestep: where the sample is; an element of `self.timesteps` costs no read.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            generator: source of the noise, drawn at every timestep above 0; a list draws one image each.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).
        """
        t = self._number(timestep)
        key = (t, self._previous(t))
        cached = self._rows.get(key)
        if cached is None:
            cached = self._cache(key, next(self._stages([key])))
        result = self._advance(cached, model_output, sample, generator)
        return self._output(*result) if return_dict else result


class DDPMParallelScheduler(DDPMScheduler):
    """`DDPMScheduler` that also takes each image at a timestep of its own; drop-in as there, same options."""

    _output = DDPMParallelSchedulerOutput

    def batch_step_no_noise(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        """The mean of one step of every image from its own timestep (Shih et al. 2023, "ParaDiGMS").

        Args:
            model_output: [B, C, ...], or [B, 2 * C, ...] for a learned variance, which is not used.
            timesteps: [B] int64; the step goes T // num_inference_steps further, whatever the spacing.
            sample: [B, C, ...].
        """
        stride = len(self) // (self.num_inference_steps or len(self))
        prediction = self._prediction()
        if self.variance_type.startswith("learned"):
            (model_output,), _ = split_output(
                model_output, torch.Size((len(model_output), *sample.shape[1:])), False
            )

        def stages(t: int) -> Iterable[Stage]:
            return solvers.ddpm(self._alphas(), [(t, t - stride)], prediction, noise=False)

        return advance_each(self._cached_each(timesteps, stages, "each"), model_output, sample)[0]
