"""Schedulers with two model calls a step, the sample being x0 + sigma * noise: Heun and the two KDPM2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage
from difusores.sampling import Generators
from difusores.schedulers.base import PredictedSchedulerOutput
from difusores.schedulers.sigma import SigmaScheduler
from difusores.schedules import SigmaGrid


class _TwoStageScheduler(SigmaScheduler):
    """Two model calls a step: every timestep but the first stands twice, and so does its level."""

    order = 2

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call of `step` begins a step."""
        run = self._run
        return run.index is None or (run.index - run.begin) % 2 == 0

    def _single(self, grid: SigmaGrid, begin: int) -> tuple[list[float], list[float], int]:
        """Times, levels and beginning in steps."""
        single, step = schedules.once(grid, begin)
        return list(single.timesteps), list(single.sigmas), step

    def _spaced_over(self, num_inference_steps: int, num_train_timesteps: int | None) -> list[float]:
        config = self.config
        total = num_train_timesteps or len(self)
        return schedules.real_timesteps(
            config["timestep_spacing"],
            int(num_inference_steps),
            total,
            config["steps_offset"],
            rounded=self.times_dtype is torch.float32,
        )


class HeunDiscreteScheduler(_TwoStageScheduler):
    """Drop-in for the class of the same name in diffusers 0.42; options as `EulerDiscreteScheduler`.

    clip_sample, clip_sample_range: clamp the predicted x0 to [-clip_sample_range, clip_sample_range].
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._initialize()
        self.__dict__["is_scale_input_called"] = True  # this class of diffusers does not warn
        self.set_timesteps(num_train_timesteps)

    def _grid(
        self, num_inference_steps: int | None, total: int | None, timesteps: Sequence[float] | None
    ) -> SigmaGrid:
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("exactly one of num_inference_steps and timesteps has to be given")
        times = self._custom(timesteps) if timesteps is not None else None
        if times is None:
            times = self._spaced_over(num_inference_steps or 0, total)
        return schedules.twice(self._levels(times))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the steps; what `step` remembers is forgotten.

        Args:
            num_inference_steps: how many. timesteps: or where.
            device: where `self.timesteps` is put.
            num_train_timesteps: the range of the timesteps, T if None.

        Raises:
            ValueError: not exactly one of the two, or timesteps beside use_*_sigmas.
        """
        self._set(self._grid(num_inference_steps, num_train_timesteps, timesteps), device)
        self.num_inference_steps = num_inference_steps if timesteps is None else len(timesteps)

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        begin: int = 0,
    ) -> Plan:
        """The sampling run from timestep index `begin` on as an immutable plan."""
        return self._plan_at(self._grid(num_inference_steps, None, timesteps), begin)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        times, sigmas, first = self._single(grid, begin)
        return solvers.heun(times, sigmas, self._prediction(), begin=first)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> PredictedSchedulerOutput | tuple[Tensor, ...]:
        """One model call of a step; as `EulerDiscreteScheduler.step`."""
        return self._step(model_output, timestep, sample, return_dict)


class MidpointScheduler(_TwoStageScheduler):
    """The second model call of a step is at a level between two."""

    ancestral: ClassVar[bool]

    def _initialize(self) -> None:
        super()._initialize()
        self.__dict__["is_scale_input_called"] = True  # these classes of diffusers do not warn
        self.set_timesteps(len(self))

    def _grid(self, num_inference_steps: int, total: int | None) -> SigmaGrid:
        times, sigmas = self._levels(self._spaced_over(num_inference_steps, total))
        if self.config["use_karras_sigmas"]:
            times = tuple(float(round(t)) for t in times)
        middles = schedules.middle_sigmas(sigmas, ancestral=self.ancestral)
        between = schedules.sigma_to_timestep(middles, schedules.training_sigmas(self.alphas_cumprod))
        pairs = chain.from_iterable(zip(between, times[1:], strict=True))
        doubled = chain.from_iterable((sigma, sigma) for sigma in sigmas[1:])
        return SigmaGrid((times[0], *pairs), (sigmas[0], *doubled, sigmas[-1]))

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        """Choose how many steps, over `num_train_timesteps` (T if None); forgets what `step` remembers."""
        self._set(self._grid(num_inference_steps, num_train_timesteps), device)
        self.num_inference_steps = num_inference_steps

    def plan(self, num_inference_steps: int, *, begin: int = 0) -> Plan:
        """The sampling run from timestep index `begin` on as an immutable plan."""
        return self._plan_at(self._grid(num_inference_steps, None), begin)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        times, sigmas, first = self._single(grid, begin)
        middles = schedules.middle_sigmas(sigmas, ancestral=self.ancestral)
        pairs = list(zip(grid.timesteps[1::2], middles, strict=True))
        solver = solvers.kdpm2_ancestral if self.ancestral else solvers.kdpm2
        return solver(times, sigmas, self._prediction(), middles=pairs, begin=first)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The model's input, sample / sqrt(sigma² + 1); at a step's second call sigma lies between."""
        if (self._run.index or 0) >= len(self.timesteps):
            raise IndexError(f"the run is over: it has {len(self.timesteps)} timesteps; call set_timesteps")
        return super().scale_model_input(sample, timestep)

    def _called_at(self, sigmas: list[float]) -> list[float]:
        single = self._single(SigmaGrid(tuple(self._times()), tuple(sigmas)), 0)[1]
        middles = schedules.middle_sigmas(single, ancestral=self.ancestral)
        return [*chain.from_iterable(zip(single, middles, strict=False)), single[len(middles)]]


class KDPM2DiscreteScheduler(MidpointScheduler):
    """Drop-in for the class of the same name in diffusers 0.42; options as `EulerDiscreteScheduler`."""

    ancestral = False

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._initialize()

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> PredictedSchedulerOutput | tuple[Tensor, ...]:
        """One model call of a step; as `EulerDiscreteScheduler.step`."""
        result = self._take(model_output, timestep, sample)
        return PredictedSchedulerOutput(*result) if return_dict else result


class KDPM2AncestralDiscreteScheduler(MidpointScheduler):
    """Drop-in for the class of the same name in diffusers 0.42; options as `EulerDiscreteScheduler`."""

    ancestral = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._initialize()

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> PredictedSchedulerOutput | tuple[Tensor, ...]:
        """One model call of a step, noise at the second; as `EulerDiscreteScheduler.step`."""
        result = self._take(model_output, timestep, sample, generator)
        return PredictedSchedulerOutput(*result) if return_dict else result
