"""SASolverScheduler (Xue et al. 2023, "SA-Solver")."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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


def middle_tau(t: float) -> float:
    """Noise in the middle of the run alone: 1 from timestep 200 to 800, else 0."""
    return 1.0 if 200 <= t <= 800 else 0.0


class SASolverScheduler(LogSnrScheduler):
    """Drop-in for the class of the same name in diffusers 0.42; options as `DEISMultistepScheduler`.

    Args:
        predictor_order, corrector_order, lower_order_final: see `difusores.solvers.sasolver`.
        tau_func: how much noise is added at a timestep, a number; None is `middle_tau`.
        algorithm_type: "data_prediction" or "noise_prediction", which of the two is a polynomial in lambda.
        lambda_min_clipped: no step is where lambda is below this.
        variance_type: with "learned" or "learned_range" the second half of the model's channels is left out.
    """

    grid_kinds = ("karras", "exponential", "beta", "flow")
    _choices: ClassVar = {"algorithm_type": ("data_prediction", "noise_prediction")}

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        predictor_order: int = 2,
        corrector_order: int = 2,
        prediction_type: str = "epsilon",
        tau_func: Callable[..., Any] | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "data_prediction",
        lower_order_final: bool = True,
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
        self.predict_x0 = algorithm_type == "data_prediction"
        self.tau_func = middle_tau if tau_func is None else tau_func

    def _grid(self, num_inference_steps: int | None) -> SigmaGrid:
        lowest = float(schedules.training_sigmas(self.alphas_cumprod)[0])
        return self._levels(num_inference_steps, last=lowest if self._kind() is None else None)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Choose how many steps; `device` is where `self.timesteps` is put. Forgets what `step` remembers.

        Raises:
            ValueError: out of range.
        """
        self._set(self._grid(num_inference_steps), device)

    def plan(self, num_inference_steps: int, *, begin: int = 0) -> Plan:
        """The sampling run from step `begin` on as an immutable plan."""
        return self._plan_at(self._grid(num_inference_steps), begin)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        config = self.config
        return solvers.sasolver(
            grid.timesteps,
            self._signal_noise(grid.sigmas),
            self._prediction(),
            lambda t: float(self.tau_func(t)),
            begin=begin,
            predictor_order=config["predictor_order"],
            corrector_order=config["corrector_order"],
            predict_x0=self.predict_x0,
            lower_order_final=config["lower_order_final"],
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a) * original_samples + sqrt(1 - a) * noise, a = alphas_cumprod[timesteps].

        Args:
            original_samples, noise: [B, ...].
            timesteps: [B] int64, training steps.
        """
        table = self.alphas_cumprod.to(original_samples.device).double()
        return solvers.forward_process(table, original_samples, noise, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Correct the sample with the model's output, and predict the next one.

        Args:
            model_output: [B, C, ...].
            timestep: where the run begins, at its first step; then not looked at.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            generator: source of the noise, drawn at every step; a list draws one image each.
            return_dict: False returns the tuple (prev_sample,).
        """
        return self._step(model_output, timestep, sample, return_dict, generator)
