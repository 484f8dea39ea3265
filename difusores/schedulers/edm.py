"""Schedulers of models that are preconditioned (Karras et al. 2022, "EDM")."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Noise, Plan, Stage, Threshold
from difusores.sampling import Generators, scaled_input, scaled_sum
from difusores.schedulers.base import PredictedSchedulerOutput, SchedulerOutput
from difusores.schedulers.dpm import FOREIGN
from difusores.schedulers.indexed import refuse_integers
from difusores.schedulers.logsnr import adopt_names
from difusores.schedulers.sigma import SigmaScheduler
from difusores.schedules import SigmaGrid


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

    def _get_conditioning_c_in(self, sigma: Any) -> Any:
        """c_in itself, which pipelines of diffusers read."""
        one: Any = 1.0
        return scaled_input(one, schedules.with_data(sigma, self._data))

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """What the model is told at a noise level."""
        if not isinstance(sigma, Tensor):
            sigma = torch.tensor([sigma], dtype=torch.float32, device="cpu")
        return schedules.edm_times(sigma)

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: Any) -> Tensor:
        """x0 = c_skip * sample + c_out * model_output."""
        c_skip, c_out = self._prediction().scalings(sigma)
        return scaled_sum(c_skip, sample, c_out, model_output)


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
        self._set(self._at(schedules.training_places(num_train_timesteps)), None)

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
        result: Any = self._step(e, timestep, sample, False, generator, options)
        if pred_original_sample is not None:
            result = (result[0].to(dtype), pred_original_sample)
        return EDMEulerSchedulerOutput(*result) if return_dict else result


class EDMMultistepScheduler(EDMScheduler):
    """Base of the schedulers whose model is preconditioned."""

    absent_is_last = True
    returned = ("y",)
    orders: ClassVar[Mapping[str, tuple[int, ...]]]
    """What solver_order may be, by algorithm."""

    def _initialize(self) -> None:
        super()._initialize()
        choices = {"algorithm_type": tuple(self.orders), "solver_type": solvers.DPM_TYPES}
        adopt_names(self, {key: choices[key] for key in choices if key in self.config}, FOREIGN)
        self._set(self._grid(self.config["num_train_timesteps"]), None)

    def _grid(self, num_inference_steps: int | None) -> SigmaGrid:
        if num_inference_steps is None or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        # where diffusers computes in float32
        dtype = torch.float32 if self.config["sigma_schedule"] == "karras" else torch.float64
        times, sigmas = self._at(torch.linspace(0, 1, int(num_inference_steps), dtype=dtype, device="cpu"))
        if self.config["final_sigmas_type"] == "sigma_min":
            sigmas = (*sigmas[:-1], *schedules.as_float32([self.config["sigma_min"]]))
        return SigmaGrid(times, sigmas)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Choose how many steps; `device` is where `self.timesteps` is put. Forgets what `step` remembers."""
        self._set(self._grid(num_inference_steps), device)
        self.num_inference_steps = num_inference_steps

    def plan(self, num_inference_steps: int, *, begin: int = 0) -> Plan:
        """The run from step `begin` on as an immutable plan."""
        stages = tuple(self._stages(self._grid(num_inference_steps), begin))
        name = type(self).__name__.removesuffix("Scheduler")
        return Plan(name, stages, self.config["prediction_type"], (), True, self.init_noise_sigma)

    def _prediction(self) -> solvers.Preconditioned:
        config = self.config
        threshold = None
        if config.get("thresholding"):
            threshold = Threshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
        return solvers.Preconditioned(
            config["prediction_type"], threshold=threshold, sigma_data=config["sigma_data"]
        )

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        config = self.config
        algorithm, order = config.get("algorithm_type", "sde-dpmsolver++"), config["solver_order"]
        if order not in self.orders[algorithm]:
            allowed = " or ".join(map(str, self.orders[algorithm]))
            raise ValueError(f"solver_order must be {allowed} with {algorithm!r}, got {order}")
        return solvers.dpm_multistep(
            grid.timesteps,
            [(1.0, sigma) for sigma in grid.sigmas],
            self._prediction(),
            begin=begin,
            order=order,
            algorithm=algorithm,
            solver_type=config["solver_type"],
            lower_order_final=config["lower_order_final"],
            euler_at_final=config["euler_at_final"],
            noise_dtype="promoted",
        )

    def _advance(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool,
        generator: Generators = None,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        result = self._take(model_output, timestep, sample, generator)
        return SchedulerOutput(*result) if return_dict else result


class EDMDPMSolverMultistepScheduler(EDMMultistepScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    Args:
        sigma_min, sigma_max, sigma_schedule, rho: see `difusores.schedules.edm_sigmas`.
        sigma_data: standard deviation of the data.
        num_train_timesteps: how many levels there are before `set_timesteps`.
        prediction_type: "epsilon" or "v_prediction", see `difusores.solvers.Preconditioned`.
        solver_order, algorithm_type, solver_type, lower_order_final, euler_at_final: see
            `difusores.solvers.dpm_multistep`. "sde-dpmsolver++" goes up to order 2.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0.
        final_sigmas_type: the run ends at "zero" or at "sigma_min".
    """

    orders: ClassVar[Mapping[str, tuple[int, ...]]] = {"dpmsolver++": (1, 2, 3), "sde-dpmsolver++": (1, 2)}

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
        solver_order: int = 2,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        self._initialize()

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step to the next noise level.

        Args:
            model_output: [B, C, ...]; the model was given `scale_model_input(sample, timestep)`.
            timestep: where the run begins, at its first step; then not looked at.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            generator: source of the noise of "sde-dpmsolver++"; a list draws one image each.
            return_dict: False returns the tuple (prev_sample,).

        Raises:
            ValueError: `set_timesteps` was not called.
        """
        return self._advance(model_output, timestep, sample, return_dict, generator)
