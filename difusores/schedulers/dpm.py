"""The DPM-Solver schedulers (Lu et al. 2022, "DPM-Solver" and "DPM-Solver++")."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage
from difusores.sampling import Generators
from difusores.schedulers.base import SchedulerOutput
from difusores.schedulers.logsnr import LogSnrScheduler
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
        """In which dtype noise is drawn, see `Noise`; here as where diffusers does not compute in float32."""
        return None if self.config["prediction_type"] == "sample" else "promoted"

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

    def _noise_dtype(self) -> str | None:
        return "float32"

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
