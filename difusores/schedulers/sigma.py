"""Schedulers whose sample is x0 + sigma * noise: Euler, Euler ancestral, EDM, Heun, LMS and the two KDPM2."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Noise, Plan, Stage
from difusores.sampling import Generators, scaled_input, scaled_sum
from difusores.schedulers.base import PredictedSchedulerOutput
from difusores.schedulers.indexed import IndexedScheduler, refuse_integers
from difusores.schedules import SigmaGrid

logger = logging.getLogger(__name__)


class SigmaScheduler(IndexedScheduler):
    """Base of the schedulers of this file.

    Attributes:
        is_scale_input_called: whether `scale_model_input` was; a step without it is warned of.
    """

    upcast = False
    grid_kinds: ClassVar[tuple[str, ...]] = ("karras", "exponential", "beta")
    times_dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def _data(self) -> float:
        """Standard deviation of the data, for which the model's input is scaled."""
        return 1.0

    def _initialize(self) -> None:
        super()._initialize()
        if self.config.get("rescale_betas_zero_snr"):
            # The last level would be infinite. The smallest number of float16 is as good as 0.
            self.alphas_cumprod[-1] = 2**-24
        kinds = [kind for kind in self.grid_kinds if self.config.get(f"use_{kind}_sigmas")]
        if len(kinds) > 1:
            names = ", ".join(f"use_{kind}_sigmas" for kind in self.grid_kinds)
            raise ValueError(f"only one of {names} can be used, got {' and '.join(kinds)}")
        self.is_scale_input_called = False
        table = schedules.training_sigmas(self.alphas_cumprod)
        self._set(SigmaGrid(tuple(self.timesteps.tolist()), (*map(float, table[::-1]), 0.0)), None)
        self.num_inference_steps = None

    @property
    def init_noise_sigma(self) -> Tensor:
        """Standard deviation of the first sample, 0-dim float32."""
        top = self.sigmas.max()
        return (
            top if self.config["timestep_spacing"] in ("linspace", "trailing") else schedules.with_data(top)
        )

    def _spaced(self, num_inference_steps: int) -> list[float]:
        config = self.config
        return schedules.real_timesteps(
            config["timestep_spacing"], int(num_inference_steps), len(self), config["steps_offset"]
        )

    def _levels(self, timesteps: Sequence[float], **options: Any) -> SigmaGrid:
        """The grid at these timesteps, or of the kind that the configuration asks for over their range."""
        config = self.config
        kinds = [kind for kind in self.grid_kinds if config.get(f"use_{kind}_sigmas")]
        return schedules.sigma_grid(
            schedules.training_sigmas(self.alphas_cumprod),
            timesteps,
            kind=kinds[0] if kinds else None,
            sigma_min=config.get("sigma_min"),
            sigma_max=config.get("sigma_max"),
            **options,
        )

    def _set(self, grid: SigmaGrid, device: str | torch.device | None) -> None:
        device = "cpu" if device is None else device
        times = torch.tensor(grid.timesteps, dtype=self.times_dtype, device="cpu")
        self.timesteps = times.to(device)
        self.__dict__["_host"] = (self.timesteps, self.timesteps._version, times.tolist())
        self.sigmas = torch.tensor(grid.sigmas, dtype=torch.float32, device="cpu")
        self._restart()

    def _custom(self, timesteps: Sequence[float]) -> list[float]:
        for kind in self.grid_kinds:
            if self.config.get(f"use_{kind}_sigmas"):
                raise ValueError(f"cannot take timesteps with use_{kind}_sigmas, which chooses its own")
        return [float(t) for t in timesteps]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The model's input: sample / sqrt(sigma² + 1)."""
        index = self._start(timestep) if self._run.index is None else self._run.index
        self.__dict__["is_scale_input_called"] = True
        return scaled_input(sample, math.sqrt(float(self.sigmas[index]) ** 2 + self._data**2))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """original_samples + sigma * noise at each image's timestep, or at the run's place.

        Args:
            original_samples, noise: [B, ...].
            timesteps: [B], elements of `timesteps`; after `set_begin_index` only their number counts.
        """
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            index = self._run.index if self._run.index is not None else self._begin_index
            indices = [index] * len(timesteps)
        return solvers.raise_noise(self.sigmas[indices], original_samples, noise)

    def _step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool,
        generator: Generators = None,
        **options: Any,
    ) -> PredictedSchedulerOutput | tuple[Tensor, ...]:
        if not self.is_scale_input_called:
            logger.warning("scale_model_input has to be called before step: the model sees the scaled sample")
        result = self._take(model_output, timestep, sample, generator, **options)
        return PredictedSchedulerOutput(*result) if return_dict else result

    def _plan_at(self, grid: SigmaGrid, begin: int, **options: Any) -> Plan:
        stages = tuple(self._stages(grid, begin, **options))
        name = type(self).__name__.removesuffix("Scheduler")
        top = max(grid.sigmas) if begin == 0 else grid.sigmas[begin]
        leading = self.config["timestep_spacing"] not in ("linspace", "trailing")
        first = math.sqrt(top * top + 1) if leading else top
        kind, betas = self.config["prediction_type"], tuple(self.betas.tolist())
        return Plan(name, stages, kind, betas, continuous=True, init_noise_sigma=first)

    def _prediction(self) -> solvers.Prediction:
        config = self.config
        clip = config["clip_sample_range"] if config.get("clip_sample") else None
        return solvers.Prediction(config["prediction_type"], clip)


class EulerDiscreteScheduler(SigmaScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see
            `difusores.schedules.betas`.
        prediction_type: "epsilon", "sample" or "v_prediction".
        interpolation_type: "linear" or "log_linear", the noise levels between training steps.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: see `difusores.schedules.sigma_grid`.
        sigma_min, sigma_max: the range of those.
        timestep_spacing, steps_offset: see `difusores.schedules.timesteps`.
        timestep_type: "continuous", with v_prediction, tells the model log(sigma) / 4.
        final_sigmas_type: the run ends at "zero" or at "sigma_min", the lowest level of training.
    """

    upcast = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        self._initialize()
        if self._tells_levels():
            self._set(self._with_levels_as_times(tuple(self.sigmas.tolist())), None)

    def _tells_levels(self) -> bool:
        config = self.config
        return (config["timestep_type"], config["prediction_type"]) == ("continuous", "v_prediction")

    def _with_levels_as_times(self, sigmas: tuple[float, ...]) -> SigmaGrid:
        return SigmaGrid(tuple(0.25 * math.log(sigma) for sigma in sigmas[:-1]), sigmas)

    def _grid(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
    ) -> SigmaGrid:
        given = [value is not None for value in (num_inference_steps, timesteps, sigmas)]
        if sum(given) != 1:
            raise ValueError("exactly one of num_inference_steps, timesteps and sigmas has to be given")
        config = self.config
        last = schedules.training_sigmas(self.alphas_cumprod)[0]
        finals = {"zero": 0.0, "sigma_min": float(last)}
        if config["final_sigmas_type"] not in finals:
            raise ValueError(
                f"final_sigmas_type must be 'zero' or 'sigma_min', got {config['final_sigmas_type']!r}"
            )
        if config["interpolation_type"] not in ("linear", "log_linear"):
            raise ValueError(
                f"interpolation_type must be 'linear' or 'log_linear', got {config['interpolation_type']!r}"
            )
        if sigmas is not None:
            levels = schedules.as_float32([float(sigma) for sigma in sigmas])
            table = schedules.training_sigmas(self.alphas_cumprod)
            grid = SigmaGrid(tuple(schedules.sigma_to_timestep(levels[:-1], table)), levels)
        else:
            if timesteps is not None:
                if self._tells_levels():
                    raise ValueError("cannot take timesteps where the model is told levels: give sigmas")
                times = self._custom(timesteps)
            else:
                times = self._spaced(num_inference_steps or 0)
            log_linear = config["interpolation_type"] == "log_linear"
            grid = self._levels(times, log_linear=log_linear, last=finals[config["final_sigmas_type"]])
        return self._with_levels_as_times(grid.sigmas) if self._tells_levels() else grid

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the noise levels at which the model is called; what `step` remembers is forgotten.

        Args:
            num_inference_steps: how many. timesteps: or where. sigmas: or at which levels, and the last one.
            device: where `self.timesteps` is put.

        Raises:
            ValueError: not exactly one of the three, or one that the configuration leaves no room for.
        """
        grid = self._grid(num_inference_steps, timesteps, sigmas)
        self._set(grid, device)
        self.num_inference_steps = len(grid.timesteps)

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        begin: int = 0,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> Plan:
        """The run from step `begin` on as an immutable plan; arguments as `set_timesteps` and `step`."""
        grid = self._grid(num_inference_steps, timesteps, sigmas)
        options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
        return self._plan_at(grid, begin, **options)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        return solvers.euler(*grid, self._prediction(), begin=begin, **options)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a "v_prediction" model predicts, sqrt(a) * noise - sqrt(1 - a) * sample."""
        if not isinstance(timesteps, Tensor) or timesteps.is_floating_point():
            raise ValueError(f"get_velocity takes a tensor of training steps, integers; got {timesteps!r}")
        table = self.alphas_cumprod.to(sample.device).double()
        return solvers.forward_process(table, sample, noise, timesteps, velocity=True)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> PredictedSchedulerOutput | tuple[Tensor, ...]:
        """One step to the next noise level.

        Args:
            model_output: [B, C, ...]; the model was given `scale_model_input(sample, timestep)`.
            timestep: where the run begins, at its first step; then not looked at.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            s_churn, s_tmin, s_tmax, s_noise: see `difusores.solvers.euler`.
            generator: source of the noise, drawn where s_churn > 0; a list draws one image each.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: timestep is an integer.
        """
        refuse_integers(self, timestep)
        options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
        return self._step(model_output, timestep, sample, return_dict, generator, **options)


class EulerAncestralDiscreteScheduler(SigmaScheduler):
    """Drop-in for the class of the same name in diffusers 0.42; options as `EulerDiscreteScheduler`."""

    upcast = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._initialize()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose how many steps; `device` is where `self.timesteps` is put. Forgets what `step` remembers."""
        self._set(self._levels(self._spaced(num_inference_steps)), device)
        self.num_inference_steps = num_inference_steps

    def plan(self, num_inference_steps: int, *, begin: int = 0) -> Plan:
        """The sampling run from step `begin` on as an immutable plan."""
        return self._plan_at(self._levels(self._spaced(num_inference_steps)), begin)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        return solvers.euler_ancestral(*grid, self._prediction(), begin=begin)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> PredictedSchedulerOutput | tuple[Tensor, ...]:
        """One step, noise included; as `EulerDiscreteScheduler.step`. Noise is drawn at every step."""
        refuse_integers(self, timestep)
        return self._step(model_output, timestep, sample, return_dict, generator)


class LMSDiscreteScheduler(SigmaScheduler):
    """Drop-in for the class of the same name in diffusers 0.42; options as `EulerDiscreteScheduler`."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
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
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose how many steps; `device` is where `self.timesteps` is put. Forgets what `step` remembers."""
        self._set(self._levels(self._spaced(num_inference_steps)), device)
        self.num_inference_steps = num_inference_steps

    def plan(self, num_inference_steps: int, *, begin: int = 0, order: int = 4) -> Plan:
        """The sampling run from step `begin` on as an immutable plan."""
        return self._plan_at(self._levels(self._spaced(num_inference_steps)), begin, order=order)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        return solvers.lms(*grid, self._prediction(), begin=begin, **options)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> PredictedSchedulerOutput | tuple[Tensor, ...]:
        """One step; as `EulerDiscreteScheduler.step`. order: how many slopes are used, from 1 to 6."""
        return self._step(model_output, timestep, sample, return_dict, order=order)


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
        self.num_inference_steps = num_inference_steps or len(timesteps or ())

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
    """The two KDPM2: the second model call of a step is at a level between two."""

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
        if self.state_in_first_order:
            return super().scale_model_input(sample, timestep)
        index = self._run.index or 0
        grid = SigmaGrid(tuple(self._times()), tuple(self.sigmas.tolist()))
        sigmas = self._single(grid, 0)[1]
        middle = schedules.middle_sigmas(sigmas, ancestral=self.ancestral)[index // 2]
        return scaled_input(sample, math.sqrt(middle**2 + 1))


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
        return self._step(model_output, timestep, sample, return_dict)


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
        return self._step(model_output, timestep, sample, return_dict, generator)


class EDMScheduler(SigmaScheduler):
    """Base of the schedulers whose model is preconditioned for data of deviation sigma_data."""

    _compatibles: ClassVar[list[str]] = []

    def _initialize(self) -> None:
        self.is_scale_input_called = False
        self.num_inference_steps = None

    @property
    def init_noise_sigma(self) -> float:  # type: ignore[override]
        """Standard deviation of the first sample."""
        return math.sqrt(self.config["sigma_max"] ** 2 + 1)

    @property
    def _data(self) -> float:
        return float(self.config["sigma_data"])

    def _prediction(self) -> solvers.Preconditioned:
        return solvers.Preconditioned(self.config["prediction_type"], sigma_data=self._data)

    def _at(self, places: Tensor) -> SigmaGrid:
        config = self.config
        for name, allowed in {
            "sigma_schedule": ("karras", "exponential"),
            "final_sigmas_type": ("zero", "sigma_min"),
        }.items():
            if config[name] not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {config[name]!r}")
        ends = config["sigma_min"], config["sigma_max"]
        levels = schedules.edm_sigmas(config["sigma_schedule"], places, *ends, config["rho"])
        sigmas = levels.tolist()
        last = sigmas[-1] if config["final_sigmas_type"] == "sigma_min" else 0.0
        return SigmaGrid(tuple(self.precondition_noise(levels).tolist()), (*sigmas, last))

    def precondition_inputs(self, sample: Tensor, sigma: Any) -> Tensor:
        """c_in * sample."""
        return scaled_input(sample, schedules.with_data(sigma, self._data))

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """What the model is told at a noise level."""
        if not isinstance(sigma, Tensor):
            sigma = torch.tensor([sigma], dtype=torch.float32, device="cpu")
        return schedules.edm_times(sigma)

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: Any) -> Tensor:
        """x0 = c_skip * sample + c_out * model_output."""
        c_skip, c_out = solvers.boundary_scalings(sigma, sigma, self._data)
        sign = -1 if self._prediction().kind == "v_prediction" else 1
        return scaled_sum(c_skip, sample, sign * c_out, model_output)


@dataclass
class EDMEulerSchedulerOutput(PredictedSchedulerOutput):
    """What `EDMEulerScheduler.step` returns; see `PredictedSchedulerOutput`."""


class EDMEulerScheduler(EDMScheduler):
    """Drop-in for the class of the same name in diffusers 0.42 (Karras et al. 2022, EDM).

    Args:
        sigma_min, sigma_max, sigma_schedule, rho: see `difusores.schedules.edm_sigmas`.
        sigma_data: standard deviation of the data.
        num_train_timesteps: how many levels there are before `set_timesteps`, less one.
        prediction_type: "epsilon" or "v_prediction", see `difusores.solvers.Preconditioned`.
        final_sigmas_type: the run ends at "zero" or at "sigma_min", the lowest level.
    """

    upcast = True

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
    ) -> None:
        self._initialize()
        places = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu")
        self._set(self._at(places / num_train_timesteps), None)

    def _grid(self, num_inference_steps: int | None, sigmas: Any) -> SigmaGrid:
        if sigmas is None:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
            places = schedules.even_places(int(num_inference_steps))
        else:
            places = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").reshape(-1)
            if len(places) == 0 or min(places.tolist()) < 0 or max(places.tolist()) > 1:
                raise ValueError(
                    "sigmas are places of levels, from 0 for sigma_max to 1 for sigma_min, "
                    f"got {places.tolist()}"
                )
        return self._at(places)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Choose the noise levels at which the model is called; what `step` remembers is forgotten.

        Args:
            num_inference_steps: how many.
            device: where `self.timesteps` is put.
            sigmas: their places from 0, sigma_max, to 1, sigma_min (and not levels, as in diffusers).

        Raises:
            ValueError: no number, or places outside [0, 1].
        """
        grid = self._grid(num_inference_steps, sigmas)
        self._set(grid, device)
        self.num_inference_steps = len(grid.timesteps)

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Tensor | Sequence[float] | None = None,
        begin: int = 0,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> Plan:
        """The run from step `begin` on as an immutable plan; arguments as `set_timesteps` and `step`."""
        options: dict[str, Any] = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
        stages = tuple(self._stages(self._grid(num_inference_steps, sigmas), begin, **options))
        return Plan("EDMEuler", stages, self.config["prediction_type"], (), True, self.init_noise_sigma)

    def _stages(
        self, grid: SigmaGrid, begin: int, drawn: str | None = None, **options: Any
    ) -> Iterable[Stage]:
        # where the caller has x0, it takes the place of the model's output
        prediction = self._prediction() if drawn is None else solvers.Prediction("sample")
        return solvers.euler(*grid, prediction, begin=begin, noise=Noise(dtype=drawn), **options)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, ...]:
        """One step to the next noise level.

        Args:
            model_output, timestep, sample, generator: as `EulerDiscreteScheduler.step`.
            s_churn, s_tmin, s_tmax, s_noise: see `difusores.solvers.euler`.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).
            pred_original_sample: x0, like sample, where it is known already; then only the dtype of
                model_output counts.

        Raises:
            ValueError: timestep is an integer.
        """
        refuse_integers(self, timestep)
        options: dict[str, Any] = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
        dtype, e = model_output.dtype, model_output
        if pred_original_sample is not None:
            options["drawn"], e = str(dtype).removeprefix("torch."), pred_original_sample
        result: Any = self._step(e, timestep, sample, False, generator, **options)
        if pred_original_sample is not None:
            result = (result[0].to(dtype), pred_original_sample)
        return EDMEulerSchedulerOutput(*result) if return_dict else result
