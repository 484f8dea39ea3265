"""Schedulers for models that jump to the image or close to it: LCM, TCD and consistency models."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage
from difusores.sampling import Generators
from difusores.schedulers.base import SchedulerOutput
from difusores.schedulers.indexed import IndexedScheduler, refuse_integers
from difusores.schedulers.sigma import SigmaScheduler
from difusores.schedules import Array, SigmaGrid

logger = logging.getLogger(__name__)


@dataclass
class LCMSchedulerOutput(SchedulerOutput):
    """What `LCMScheduler.step` returns.

    Attributes:
        prev_sample: the next sample, like `sample`.
        denoised: the image as predicted at this step, like `sample`.
    """

    denoised: Tensor | None = None


@dataclass
class TCDSchedulerOutput(SchedulerOutput):
    """What `TCDScheduler.step` returns.

    Attributes:
        prev_sample: the next sample, like `sample`.
        pred_noised_sample: the same before noise was added, like `sample`.
    """

    pred_noised_sample: Tensor | None = None


@dataclass
class CMStochasticIterativeSchedulerOutput(SchedulerOutput):
    """What `CMStochasticIterativeScheduler.step` returns; see `SchedulerOutput`."""


class _DistilledScheduler(IndexedScheduler):
    """Base of LCM and TCD: timesteps chosen out of those of distillation, noise levels by timestep.

    Attributes:
        custom_timesteps: whether `set_timesteps` was given them.
        final_alpha_cumprod: not used; editing code reads it.
    """

    _compatibles: ClassVar[list[str]] = []
    returned = ("y", "d")
    init_noise_sigma: float

    def _initialize(self) -> None:
        if self.config["timestep_spacing"] not in schedules.SPACINGS:
            allowed, given = " or ".join(map(repr, schedules.SPACINGS)), self.config["timestep_spacing"]
            raise ValueError(f"timestep_spacing must be {allowed}, got {given!r}")
        super()._initialize()
        one = torch.tensor(1.0, dtype=torch.float32, device="cpu")
        self.final_alpha_cumprod = one if self.config["set_alpha_to_one"] else self.alphas_cumprod[0]
        self.init_noise_sigma = 1.0
        self.custom_timesteps = False
        self._as_in_diffusers("set_alpha_to_one", "steps_offset", "timestep_spacing")
        self._restart()

    def _levels_table(self) -> Tensor:
        return self.alphas_cumprod

    def _teacher_steps(self, original_inference_steps: int | None) -> int | None:
        """How many steps the teacher made; None: all of training."""
        return int(original_inference_steps or self.config["original_inference_steps"])

    def _timesteps(
        self,
        num_inference_steps: int | None,
        original_inference_steps: int | None,
        timesteps: Sequence[int] | None,
        strength: float,
    ) -> list[int]:
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("exactly one of num_inference_steps and timesteps has to be given")
        total, teacher = len(self), self._teacher_steps(original_inference_steps)
        if num_inference_steps is not None:
            most = original_inference_steps or self.config["original_inference_steps"]
            if num_inference_steps > most:
                raise ValueError(
                    f"num_inference_steps must be at most {most} (original_inference_steps), "
                    f"got {num_inference_steps}"
                )
            return schedules.distilled_timesteps(int(num_inference_steps), total, teacher, strength)
        values = schedules.custom_timesteps(timesteps or [], total)
        known = set(schedules.teacher_timesteps(total, teacher, strength))
        unknown = [t for t in values if t not in known]
        if unknown:
            logger.warning("the model was not distilled at the timesteps %s", unknown)
        return values

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the training steps at which the model is called; what `step` remembers is forgotten.

        Args:
            num_inference_steps: how many, out of those of distillation.
            device: where `self.timesteps` is put.
            original_inference_steps: how many those are, where not as in the configuration.
            timesteps: the steps themselves, descending, in place of a number.
            strength: the share of the timesteps that is left, the lowest ones.

        Raises:
            ValueError: both or neither given, or more than there are.
        """
        values = self._timesteps(num_inference_steps, original_inference_steps, timesteps, strength)
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(values)
        if timesteps is not None:
            values = values[len(values) - min(int(len(values) * strength), len(values)) :]
        self.timesteps = torch.tensor(values, dtype=torch.int64, device="cpu" if device is None else device)
        self._keep_times(values)
        self._restart()

    def _plan_at(self, values: list[int], begin: int, **options: Any) -> Plan:
        grid = SigmaGrid(tuple(values), tuple(self.alphas_cumprod.tolist()))
        return self._plan([*self._stages(grid, begin, **options)])

    def _next(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators, **options: Any
    ) -> tuple[Tensor, ...]:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        last = self.num_inference_steps - 1
        return self._take(model_output, timestep, sample, generator, None, {"last": last, **options})

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The model's input: the sample itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a) * original_samples + sqrt(1 - a) * noise, a = alphas_cumprod[timesteps]."""
        table = self.alphas_cumprod.to(original_samples.device).double()
        return solvers.forward_process(table, original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a "v_prediction" model predicts, sqrt(a) * noise - sqrt(1 - a) * sample."""
        table = self.alphas_cumprod.to(sample.device).double()
        return solvers.forward_process(table, sample, noise, timesteps, velocity=True)

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The timestep that follows in sampling, -1 after the last one."""
        if not self.custom_timesteps and not self.num_inference_steps:
            return int(timestep) - 1
        index = self.index_for_timestep(timestep)
        values = self._times()
        return int(values[index + 1]) if index + 1 < len(values) else -1


class LCMScheduler(_DistilledScheduler):
    """Drop-in for the class of the same name in diffusers 0.42 (Luo et al. 2023, latent consistency models).

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see
            `difusores.schedules.betas`.
        original_inference_steps: steps of the teacher, out of which timesteps are chosen.
        clip_sample, clip_sample_range: clamp the predicted x0 to [-clip_sample_range, clip_sample_range].
        prediction_type: "epsilon", "sample" or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding, in place of
            clipping.
        timestep_scaling: see `difusores.solvers.lcm_scalings`.
        set_alpha_to_one, steps_offset, timestep_spacing: other schedulers' options, for which the timesteps
            of distillation leave no room: refused here but for their defaults, and told in the log where a
            configuration holds others.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Any = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._initialize()

    def plan(
        self,
        num_inference_steps: int,
        *,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
        begin: int = 0,
    ) -> Plan:
        """The run from step `begin` on as an immutable plan; arguments as `set_timesteps`."""
        values = self._timesteps(num_inference_steps, original_inference_steps, None, strength)
        return self._plan_at(values, begin)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        times, scaling = [int(t) for t in grid.timesteps], self.config["timestep_scaling"]
        prediction = self._prediction()
        return solvers.lcm(times, grid.sigmas, prediction, begin=begin, timestep_scaling=scaling, **options)

    def get_scalings_for_boundary_condition_discrete(self, timestep: Any) -> tuple[Any, Any]:
        """(c_skip, c_out); see `difusores.solvers.lcm_scalings`."""
        return solvers.lcm_scalings(timestep, self.config["timestep_scaling"])

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, ...]:
        """One step: to the image and, but in the last one, back to the next timestep's noise.

        Args:
            model_output: [B, C, ...].
            timestep: where the run begins, at its first step; then not looked at.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            generator: source of the noise; a list draws one image each.
            return_dict: False returns the tuple (prev_sample, denoised).

        Raises:
            ValueError: `set_timesteps` was not called.
        """
        result = self._next(model_output, timestep, sample, generator)
        return LCMSchedulerOutput(*result) if return_dict else result


class TCDScheduler(_DistilledScheduler):
    """Drop-in for the class of the same name in diffusers 0.42 (Zheng et al. 2024, trajectory consistency).

    Options as `LCMScheduler`, but that clip_sample, thresholding and timestep_scaling have no effect, as in
    diffusers: a sample between noise and image is not limited. Other values than their defaults are refused;
    a configuration may hold them (`from_config`, `from_pretrained`), and the log tells it.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Any = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._initialize()
        self._as_in_diffusers("clip_sample", "clip_sample_range", "thresholding", "timestep_scaling")
        self._as_in_diffusers("dynamic_thresholding_ratio", "sample_max_value")

    def _teacher_steps(self, original_inference_steps: int | None) -> int | None:
        given = original_inference_steps is not None
        return None if given else super()._teacher_steps(None)

    def plan(
        self,
        num_inference_steps: int,
        *,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
        begin: int = 0,
        eta: float = 0.3,
    ) -> Plan:
        """The run from step `begin` on as an immutable plan; arguments as `set_timesteps` and `step`."""
        values = self._timesteps(num_inference_steps, original_inference_steps, None, strength)
        return self._plan_at(values, begin, eta=eta)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        times, prediction = (
            [int(t) for t in grid.timesteps],
            solvers.Prediction(self.config["prediction_type"]),
        )
        return solvers.tcd(times, grid.sigmas, prediction, begin=begin, **options)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, ...]:
        """One step below the next timestep and, but in the last one, noise up to it.

        Args:
            model_output, timestep, sample, generator: as `LCMScheduler.step`.
            eta: from 0, without noise, to 1, to the image and back.
            return_dict: False returns the tuple (prev_sample, pred_noised_sample).

        Raises:
            ValueError: `set_timesteps` was not called, or eta is outside [0, 1].
        """
        result = self._next(model_output, timestep, sample, generator, eta=float(eta))
        return TCDSchedulerOutput(*result) if return_dict else result


class CMStochasticIterativeScheduler(SigmaScheduler):
    """Drop-in for the class of the same name in diffusers 0.42 (Song et al. 2023, consistency models).

    Args:
        num_train_timesteps: T, noise levels of training.
        sigma_min, sigma_max, rho: their range and spacing, see `difusores.schedules.karras_sigmas`.
        sigma_data: standard deviation of the data.
        s_noise: factor of the noise that is added.
        clip_denoised: clamp the image to [-1, 1].

    Attributes:
        timesteps: [steps] float64, 250 * log(sigma).
        custom_timesteps: whether `set_timesteps` was given them.
    """

    _compatibles: ClassVar[list[str]] = []
    returned = ("y",)
    times_dtype = torch.float64

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
    ) -> None:
        self.num_inference_steps = None
        self.is_scale_input_called = False
        self.custom_timesteps = False
        levels = schedules.karras_sigmas(sigma_min, sigma_max, num_train_timesteps, rho)
        self.sigmas, self.timesteps = torch.from_numpy(levels), torch.from_numpy(self.sigma_to_t(levels))
        self._restart()

    @property
    def init_noise_sigma(self) -> float:  # type: ignore[override]
        """Standard deviation of the first sample."""
        return self.config["sigma_max"]  # type: ignore[no-any-return]

    @property
    def _data(self) -> float:
        return float(self.config["sigma_data"])

    def sigma_to_t(self, sigmas: float | Array) -> Array:
        """What the model is told at noise levels."""
        times: Array = 250 * np.log(np.asarray(sigmas, dtype=np.float64) + 1e-44)
        return times

    def get_scalings(self, sigma: Any) -> tuple[Any, Any]:
        """(c_skip, c_out) of a model of which sigma = 0 is the end (Karras et al. 2022, table 1)."""
        return solvers.boundary_scalings(sigma, self._data)

    def get_scalings_for_boundary_condition(self, sigma: Any) -> tuple[Any, Any]:
        """(c_skip, c_out) of a model of which sigma_min is the end (Song et al. 2023, appendix C)."""
        return solvers.boundary_scalings(sigma, self._data, self.config["sigma_min"])

    def _grid(self, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> SigmaGrid:
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("exactly one of num_inference_steps and timesteps has to be given")
        config, total = self.config, len(self)
        if total < 2:
            raise ValueError(f"num_train_timesteps must be at least 2 to space noise levels, got {total}")
        if timesteps is None:
            values = schedules.timesteps("leading", int(num_inference_steps or 0), total)
        else:
            values = schedules.custom_timesteps(timesteps, total)
        places = np.array(values[::-1]) / (total - 1)
        levels = schedules.karras_levels(config["sigma_min"], config["sigma_max"], places, config["rho"])
        sigmas = schedules.as_float32([*levels, config["sigma_min"]])
        return SigmaGrid(tuple(self.sigma_to_t(levels).tolist()), sigmas)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the noise levels at which the model is called; what `step` remembers is forgotten.

        Args:
            num_inference_steps: how many, from 1 to T.
            device: where `self.timesteps` is put.
            timesteps: places among the T levels in place of a number: 0 is the highest level, T - 1 the
                lowest; given in descending order, as in diffusers.

        Raises:
            ValueError: both or neither given, or out of range.
        """
        grid = self._grid(num_inference_steps, timesteps)
        self.custom_timesteps = timesteps is not None
        if timesteps is None:
            self.num_inference_steps = num_inference_steps
        self._set(grid, device)

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        begin: int = 0,
    ) -> Plan:
        """The run from step `begin` on as an immutable plan; arguments as `set_timesteps`."""
        grid = self._grid(num_inference_steps, timesteps)
        stages = tuple(self._stages(grid, begin))
        return Plan("CMStochasticIterative", stages, "consistency", (), True, self.init_noise_sigma)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        config = self.config
        return solvers.consistency(
            *grid,
            begin=begin,
            sigma_min=config["sigma_min"],
            sigma_max=config["sigma_max"],
            sigma_data=self._data,
            s_noise=config["s_noise"],
            clip=1.0 if config["clip_denoised"] else None,
        )

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> CMStochasticIterativeSchedulerOutput | tuple[Tensor, ...]:
        """One step: to the image, then noise of the next level.

        Args:
            model_output: [B, C, ...]; the model was given `scale_model_input(sample, timestep)`.
            timestep: where the run begins, at its first step; then not looked at.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            generator: source of the noise, drawn in every run of several steps; a list draws one image each.
            return_dict: False returns the tuple (prev_sample,).

        Raises:
            ValueError: timestep is an integer, or `set_timesteps` was not called.
        """
        refuse_integers(self, timestep)
        if self.num_inference_steps is None and not self.custom_timesteps:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        result: Any = self._step(model_output, timestep, sample, False, generator)
        return CMStochasticIterativeSchedulerOutput(*result) if return_dict else result
