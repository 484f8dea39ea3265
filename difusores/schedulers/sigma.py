"""Schedulers whose sample is x0 + sigma * noise, one model call a step: Euler, Euler ancestral, LMS."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage
from difusores.sampling import Generators, scaled_input
from difusores.schedulers.base import PredictedSchedulerOutput
from difusores.schedulers.indexed import NO_OPTIONS, IndexedScheduler, refuse_integers
from difusores.schedules import SigmaGrid

logger = logging.getLogger(__name__)


class SigmaScheduler(IndexedScheduler):
    """Base of the schedulers whose sample is x0 + sigma * noise.

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
        leading = self.config["timestep_spacing"] not in ("linspace", "trailing")
        return schedules.first_deviation(self.sigmas, with_image=leading)

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
        self._keep_times(times.tolist())
        self.sigmas = torch.tensor(grid.sigmas, dtype=torch.float32, device="cpu")
        self._restart()

    def _custom(self, timesteps: Sequence[float]) -> list[float]:
        for kind in self.grid_kinds:
            if self.config.get(f"use_{kind}_sigmas"):
                raise ValueError(f"cannot take timesteps with use_{kind}_sigmas, which chooses its own")
        times = [float(t) for t in timesteps]
        inside = all(0 <= t <= len(self) - 1 for t in times)
        if not inside or any(t <= after for t, after in itertools.pairwise(times)):
            raise ValueError(f"timesteps must descend within {len(self) - 1} to 0, got {times}")
        return times

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The model's input: sample / sqrt(sigma² + 1)."""
        index = self._start(timestep) if self._run.index is None else self._run.index
        self.__dict__["is_scale_input_called"] = True
        return scaled_input(sample, self._divisors()[index])

    def _divisors(self) -> list[float]:
        """√(sigma² + data²) of every call and of the run's end; computed where `sigmas` is another one."""
        sigmas, data = self.sigmas, self._data
        known, values = self.__dict__.get("_scales", (None, []))
        if known is None or known[0] is not sigmas or known[1:] != (sigmas._version, data):
            values = [math.sqrt(level**2 + data**2) for level in self._called_at(sigmas.tolist())]
            self.__dict__["_scales"] = ((sigmas, sigmas._version, data), values)
        return values  # type: ignore[no-any-return]

    def _called_at(self, sigmas: list[float]) -> list[float]:
        """The level of the model's input at each call."""
        return sigmas

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
        options: dict[str, Any] = NO_OPTIONS,
    ) -> PredictedSchedulerOutput | tuple[Tensor, ...]:
        if not self.is_scale_input_called:
            logger.warning("scale_model_input has to be called before step: the model sees the scaled sample")
        result = self._take(model_output, timestep, sample, generator, None, options)
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
        elif timestep_type == "continuous":
            logger.warning("timestep_type 'continuous' is for 'v_prediction': the model is told timesteps")
        ranged = sigma_min is not None or sigma_max is not None
        if ranged and not (use_karras_sigmas or use_exponential_sigmas or use_beta_sigmas):
            self._without_effect(
                f"sigma_min={sigma_min} and sigma_max={sigma_max} need use_karras_sigmas, "
                "use_exponential_sigmas or use_beta_sigmas: no other levels are chosen between them"
            )

    def _tells_levels(self) -> bool:
        config = self.config
        if config["timestep_type"] not in ("discrete", "continuous"):
            raise ValueError(
                f"timestep_type must be 'discrete' or 'continuous', got {config['timestep_type']!r}"
            )
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
        """What a "v_prediction" model predicts, sqrt(a) * noise - sqrt(1 - a) * sample.

        Args:
            sample, noise: [B, ...].
            timesteps: [B], training steps as integers, or elements of `self.timesteps` as real numbers.

        Raises:
            ValueError: a number and no tensor.
        """
        if not isinstance(timesteps, Tensor):
            raise ValueError(f"get_velocity takes a tensor of timesteps, got {timesteps!r}")
        if not timesteps.is_floating_point():
            table = self.alphas_cumprod.to(sample.device).double()
            return solvers.forward_process(table, sample, noise, timesteps, velocity=True)
        levels = self.sigmas[[self.index_for_timestep(t) for t in timesteps]].tolist()
        scales = [1 / math.sqrt(level * level + 1) for level in levels]
        weights = [(-level * scale, scale) for level, scale in zip(levels, scales, strict=True)]
        return solvers.mix(weights, sample, noise)

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
        return self._step(model_output, timestep, sample, return_dict, generator, options)


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

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """The weight of the slope `current_order` steps ago in step t of the run, where `order` are used."""
        sigmas = self.sigmas.tolist()
        nodes = [sigmas[t - k] for k in range(order)]
        return solvers.lagrange_integrals(nodes, sigmas[t], sigmas[t + 1])[current_order]

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
        return self._step(model_output, timestep, sample, return_dict, None, {"order": order})
