"""The DPM-Solver schedulers (Lu et al. 2022, "DPM-Solver" and "DPM-Solver++")."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.brownian import BrownianNoise, brownian_levels
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage, Threshold
from difusores.sampling import Generators
from difusores.schedulers.base import PredictedSchedulerOutput, SchedulerOutput
from difusores.schedulers.logsnr import LogSnrScheduler, adopt_names
from difusores.schedulers.sigma import EDMScheduler, MidpointScheduler
from difusores.schedules import SigmaGrid

logger = logging.getLogger(__name__)

FOREIGN = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
}
"""What stands for the solvers of DEIS and UniPC, whose configurations are read too."""


class _DPMSolverScheduler(LogSnrScheduler):
    """Base of the schedulers whose model is told training steps."""

    _choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "algorithm_type": solvers.DPM_ALGORITHMS,
        "solver_type": solvers.DPM_TYPES,
    }
    _foreign = FOREIGN

    def _initialize(self) -> None:
        super()._initialize()
        config = self.config
        if not config["algorithm_type"].endswith("++") and config.get("final_sigmas_type") == "zero":
            raise ValueError(
                f"algorithm_type {config['algorithm_type']!r} cannot reach sigma = 0: it needs "
                "final_sigmas_type='sigma_min', got 'zero'"
            )

    def _noise_dtype(self) -> str | None:
        """In which dtype the classes of diffusers draw that do not compute in float32."""
        return None if self.config["prediction_type"] == "sample" else "promoted"


class DPMSolverMultistepScheduler(_DPMSolverScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see
            `difusores.schedules.betas`.
        solver_order, algorithm_type, solver_type, lower_order_final, euler_at_final: see
            `difusores.solvers.dpm_multistep`.
        prediction_type: "epsilon", "sample", "v_prediction", or with use_flow_sigmas "flow_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas, use_flow_sigmas,
            flow_shift: see `difusores.schedules.lambda_grid`.
        final_sigmas_type: the run ends at "zero" or at "sigma_min", the lowest level of training.
        lambda_min_clipped: training steps with a lower lambda are left out.
        variance_type: "learned" or "learned_range" for models with twice the channels.
        timestep_spacing, steps_offset: see `difusores.schedules.inner_timesteps`.
        use_dynamic_shifting, time_shift_type: whether `set_timesteps` takes mu, and "exponential".
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
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        self._initialize()

    def _rounded(self) -> tuple[str, ...]:
        return () if self.config["beta_schedule"] == "squaredcos_cap_v2" else ("karras", "lu")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the noise levels at which the model is called; what `step` remembers is forgotten.

        Args:
            num_inference_steps: how many. timesteps: or where.
            device: where `self.timesteps` is put.
            mu: the logarithm of flow_shift, for this run.

        Raises:
            ValueError: not exactly one of the two, or one that the configuration leaves no room for.
        """
        self._set(self._levels(num_inference_steps, timesteps, mu, self._end()), device)

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
        begin: int = 0,
    ) -> Plan:
        """The run from step `begin` on as an immutable plan; arguments as `set_timesteps`."""
        return self._plan_at(self._levels(num_inference_steps, timesteps, mu, self._end()), begin)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        config = self.config
        return solvers.dpm_multistep(
            grid.timesteps,
            self._signal_noise(grid.sigmas),
            self._prediction(),
            begin=begin,
            order=config["solver_order"],
            algorithm=config["algorithm_type"],
            solver_type=config["solver_type"],
            lower_order_final=config["lower_order_final"],
            euler_at_final=config["euler_at_final"],
        )

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step to the next noise level.

        Args:
            model_output: [B, C, ...]; with a learned variance [B, 2 * C, ...], of which half is dropped.
            timestep: where the run begins, at its first step; then not looked at.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            generator: source of the noise of the "sde-" algorithms, float32; a list draws one image each.
            variance_noise: the noise itself, like sample, in place of a generator.
            return_dict: False returns the tuple (prev_sample,).

        Raises:
            ValueError: `set_timesteps` was not called.
        """
        return self._step(model_output, timestep, sample, return_dict, generator, variance_noise)


class DPMSolverMultistepInverseScheduler(_DPMSolverScheduler):
    """Drop-in for the class of the same name in diffusers 0.42: from the image to its noise.

    Options as `DPMSolverMultistepScheduler`. The "sde-" algorithms have no inverse and are refused in `step`,
    but with use_flow_sigmas, whose noise levels descend here too, as in diffusers.

    Attributes:
        noisiest_timestep: where the run ends.
    """

    ascending = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._initialize()

    def _initialize(self) -> None:
        super()._initialize()
        self.timesteps = self.timesteps.flip(0)

    def _ascending_levels(self, num_inference_steps: int | None) -> SigmaGrid:
        table, end = schedules.training_sigmas(self.alphas_cumprod), self._last_timestep() - 1
        kind = self._kind()
        grid = self._levels(num_inference_steps, last=float(table[end]) if kind is None else None)
        if kind not in (None, *self._rounded()):
            return grid
        # of equal timesteps one is left, and `sigmas` keeps its length, as in diffusers
        return SigmaGrid(tuple(dict.fromkeys(grid.timesteps)), grid.sigmas)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Choose how many steps; `device` is where `self.timesteps` is put. Forgets what `step` remembers."""
        self._set(self._ascending_levels(num_inference_steps), device)
        self.noisiest_timestep = self._last_timestep() - 1

    def plan(self, num_inference_steps: int, *, begin: int = 0) -> Plan:
        """The run from step `begin` on as an immutable plan."""
        return self._plan_at(self._ascending_levels(num_inference_steps), begin)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        config = self.config
        return solvers.dpm_multistep(
            grid.timesteps,
            self._signal_noise(grid.sigmas),
            self._prediction(),
            begin=begin,
            order=config["solver_order"],
            algorithm=config["algorithm_type"],
            solver_type=config["solver_type"],
            lower_order_final=config["lower_order_final"],
            euler_at_final=config["euler_at_final"],
            noise_dtype=self._noise_dtype(),
        )

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step to more noise; as `DPMSolverMultistepScheduler.step`."""
        return self._step(model_output, timestep, sample, return_dict, generator, variance_noise)


class DPMSolverSinglestepScheduler(_DPMSolverScheduler):
    """Drop-in for the class of the same name in diffusers 0.42; options as `DPMSolverMultistepScheduler`.

    Attributes:
        order_list: the order of each step.
    """

    _choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
        "solver_type": solvers.DPM_TYPES,
    }

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        self._initialize()

    def _initialize(self) -> None:
        super()._initialize()
        self.order_list = self.get_order_list(len(self))

    def get_order_list(self, num_inference_steps: int) -> list[int]:
        """The order of each of so many steps; see `difusores.solvers.singlestep_orders`."""
        config = self.config
        order, ends_at_zero = config["solver_order"], config["final_sigmas_type"] == "zero"
        return solvers.singlestep_orders(
            num_inference_steps, order, config["lower_order_final"], ends_at_zero
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """As `DPMSolverMultistepScheduler.set_timesteps`.

        lower_order_final becomes True, as in diffusers, where the run ends at zero or solver_order does not
        divide the number of steps.
        """
        grid = self._levels(num_inference_steps, timesteps, mu, self._end())
        steps, config = len(grid.timesteps), self.config
        uneven = steps % config["solver_order"] != 0
        if not config["lower_order_final"] and (uneven or config["final_sigmas_type"] == "zero"):
            logger.warning(
                "lower_order_final is set to True: %d steps of solver_order %d that end at %r need it",
                steps,
                config["solver_order"],
                config["final_sigmas_type"],
            )
            self.register_to_config(lower_order_final=True)
        self._set(grid, device)
        self.order_list = self.get_order_list(steps)

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
        begin: int = 0,
    ) -> Plan:
        """The run from step `begin` on as an immutable plan; arguments as `set_timesteps`."""
        return self._plan_at(self._levels(num_inference_steps, timesteps, mu, self._end()), begin)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        config, steps = self.config, len(grid.timesteps)
        order, ends_at_zero = config["solver_order"], config["final_sigmas_type"] == "zero"
        lower = config["lower_order_final"] or ends_at_zero or steps % order != 0
        return solvers.dpm_singlestep(
            grid.timesteps,
            self._signal_noise(grid.sigmas),
            self._prediction(),
            solvers.singlestep_orders(steps, order, lower, ends_at_zero),
            begin=begin,
            algorithm=config["algorithm_type"],
            solver_type=config["solver_type"],
            noise_dtype=self._noise_dtype(),
        )

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step to the next noise level; as `DPMSolverMultistepScheduler.step`."""
        return self._step(model_output, timestep, sample, return_dict, generator)


class _EDMDPMSolverScheduler(EDMScheduler):
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
        noise: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        result = self._take(model_output, timestep, sample, generator, noise)
        return SchedulerOutput(*result) if return_dict else result


class EDMDPMSolverMultistepScheduler(_EDMDPMSolverScheduler):
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


class CosineDPMSolverMultistepScheduler(_EDMDPMSolverScheduler):
    """Drop-in for the class of the same name in diffusers 0.42: "sde-dpmsolver++" with Brownian noise.

    The noise needs torchsde. Options as `EDMDPMSolverMultistepScheduler`; solver_order goes up to 2.

    Attributes:
        noise_sampler: the Brownian path of the run, from its first step on.
    """

    orders: ClassVar[Mapping[str, tuple[int, ...]]] = {"sde-dpmsolver++": (1, 2)}

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.3,
        sigma_max: float = 500,
        sigma_data: float = 1.0,
        sigma_schedule: str = "exponential",
        num_train_timesteps: int = 1000,
        solver_order: int = 2,
        prediction_type: str = "v_prediction",
        rho: float = 7.0,
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        self._initialize()

    def _restart(self) -> None:
        super()._restart()
        self.__dict__["noise_sampler"] = None

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """What the model is told at a noise level."""
        if not isinstance(sigma, Tensor):
            sigma = torch.tensor([sigma], dtype=torch.float32, device="cpu")
        return schedules.cosine_times(sigma)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step to the next noise level; as `EDMDPMSolverMultistepScheduler.step`.

        The generator, or each of a list, is not drawn from: its initial seed is that of the Brownian path.
        """
        if self._run.index is None:
            self._start(timestep)
        if self.noise_sampler is None:
            seed: int | list[int] | None = None
            if isinstance(generator, torch.Generator):
                seed = generator.initial_seed()
            elif generator is not None:
                seed = [one.initial_seed() for one in generator]
            like = torch.empty_like(sample, dtype=torch.promote_types(sample.dtype, model_output.dtype))
            ends = self.config["sigma_min"], self.config["sigma_max"]
            self.__dict__["noise_sampler"] = BrownianNoise(like, *ends, seed)
        noise = self._noise()
        return self._advance(model_output, timestep, sample, return_dict, noise=noise)

    def _noise(self) -> Tensor | None:
        """The noise of the next step."""
        here = self._run.index or 0
        if here + 1 >= len(self.sigmas):
            return None
        noise: Tensor = self.noise_sampler(self.sigmas[here], self.sigmas[here + 1])
        return noise


@dataclass
class DPMSolverSDESchedulerOutput(PredictedSchedulerOutput):
    """What `DPMSolverSDEScheduler.step` returns; see `PredictedSchedulerOutput`."""


class DPMSolverSDEScheduler(MidpointScheduler):
    """Drop-in for the class of the same name in diffusers 0.42: two model calls a step, and Brownian noise.

    The noise needs torchsde.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: see `difusores.schedules.betas`.
        prediction_type: "epsilon" or "v_prediction".
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: see `difusores.schedules.sigma_grid`.
        noise_sampler_seed: of the Brownian path; None draws one from torch's global generator.
        timestep_spacing, steps_offset: see `difusores.schedules.timesteps`.

    Attributes:
        noise_sampler: the Brownian path of the run, from its first step on.
    """

    ancestral = False
    times_dtype = torch.float64

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
        noise_sampler_seed: int | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._initialize()
        self.noise_sampler_seed = noise_sampler_seed

    def _restart(self) -> None:
        super()._restart()
        self.__dict__["noise_sampler"] = None

    def _grid(self, num_inference_steps: int, total: int | None) -> SigmaGrid:
        times, sigmas = self._levels(self._spaced_over(num_inference_steps, total))
        middles = schedules.middle_sigmas(sigmas, ancestral=False)
        between = schedules.sigma_to_timestep(middles, schedules.training_sigmas(self.alphas_cumprod))
        doubled = schedules.twice(SigmaGrid(times, sigmas))
        pairs = chain.from_iterable(zip(between, times[1:], strict=True))
        return SigmaGrid((times[0], *pairs), doubled.sigmas)

    def plan(self, num_inference_steps: int, *, begin: int = 0, s_noise: float = 1.0) -> Plan:
        """The run from timestep index `begin` on as an immutable plan, whose noise is not a path."""
        return self._plan_at(self._grid(num_inference_steps, None), begin, s_noise=s_noise)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        times, sigmas, first = self._single(grid, begin)
        middles = schedules.middle_sigmas(sigmas, ancestral=False)
        pairs = list(zip(grid.timesteps[1::2], middles, strict=True))
        return solvers.dpm_sde(times, sigmas, self._prediction(), middles=pairs, begin=first, **options)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
    ) -> DPMSolverSDESchedulerOutput | tuple[Tensor, ...]:
        """One model call of a step, each with noise, but the last step is one call without.

        Args:
            model_output, timestep, sample, return_dict: as `EulerDiscreteScheduler.step`.
            s_noise: factor of the noise.
        """
        if self._run.index is None:
            self._start(timestep)
        if self.noise_sampler is None:
            positive = [sigma for sigma in self.sigmas.tolist() if sigma > 0]
            seed = self.noise_sampler_seed
            self.__dict__["noise_sampler"] = BrownianNoise(sample, min(positive), max(positive), seed)
        result = self._take(model_output, timestep, sample, None, self._noise(), s_noise=s_noise)
        return DPMSolverSDESchedulerOutput(*result) if return_dict else result

    def _noise(self) -> Tensor | None:
        """The noise of the next model call, from where the step begins to where the call leads."""
        index, first = self._run.index or 0, self.state_in_first_order
        start = index if first else index - 1
        if start + 1 >= len(self.sigmas) or self.sigmas[start + 1] == 0:
            return None
        levels = brownian_levels(self.sigmas[start], self.sigmas[start + 1], halfway=first)
        noise: Tensor = self.noise_sampler(*levels)
        return noise
