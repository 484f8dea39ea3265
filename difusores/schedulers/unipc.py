"""UniPCMultistepScheduler (Zhao et al. 2023, "UniPC")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage
from difusores.schedulers.base import SchedulerOutput
from difusores.schedulers.logsnr import LogSnrScheduler
from difusores.schedules import SigmaGrid


class UniPCMultistepScheduler(LogSnrScheduler):
    """Drop-in for the class of the same name in diffusers 0.42; options as `DEISMultistepScheduler`.

    Args:
        rescale_betas_zero_snr: see `difusores.schedules.betas`.
        solver_order, predict_x0, solver_type, lower_order_final, disable_corrector: see
            `difusores.solvers.unipc`; what other solvers have for solver_type means "bh2".
        solver_p: None. Another scheduler as the predictor is refused, since predictor and corrector are one.
        use_karras_sigmas: with use_flow_sigmas the levels are sigma / (sigma + 1), and are not shifted.
        flow_shift, use_dynamic_shifting, time_shift_type, shift_terminal: see
            `difusores.schedules.lambda_flow_grid`.
        final_sigmas_type: the run ends at "zero" or at "sigma_min", the lowest level.
        sigma_min, sigma_max: the range of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas.
    """

    grid_kinds = ("karras", "exponential", "beta", "flow")
    _choices: ClassVar = {"solver_type": ("bh1", "bh2"), "time_shift_type": schedules.TIME_SHIFTS}
    _foreign: ClassVar = {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}

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
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: list[int] = [],  # noqa: B006 (read only, and the default of diffusers)
        solver_p: Any = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
    ) -> None:
        if solver_p is not None:
            raise ValueError(
                f"solver_p must be None, got {type(solver_p).__name__}: the predictor is part of the step"
            )
        if shift_terminal is not None and not use_flow_sigmas:
            raise ValueError("shift_terminal needs use_flow_sigmas=True")
        ranged = sigma_min is not None or sigma_max is not None
        if ranged and not (use_karras_sigmas or use_exponential_sigmas or use_beta_sigmas):
            self._without_effect(
                f"sigma_min={sigma_min} and sigma_max={sigma_max} need use_karras_sigmas, "
                "use_exponential_sigmas or use_beta_sigmas: no other levels are chosen between them"
            )
        if thresholding and not predict_x0:
            raise ValueError("thresholding needs predict_x0=True: it limits x0, which is not used otherwise")
        self._initialize()
        self.predict_x0 = predict_x0
        self.disable_corrector = disable_corrector

    def _kind(self) -> str | None:
        config = self.config
        others = config["use_exponential_sigmas"] or config["use_beta_sigmas"]
        both = config["use_karras_sigmas"] and config["use_flow_sigmas"]
        return "karras" if both and not others else super()._kind()

    def _grid(
        self, num_inference_steps: int | None, sigmas: Sequence[float] | None, mu: float | None
    ) -> SigmaGrid:
        config, kind, flow = self.config, self._kind(), self.config["use_flow_sigmas"]
        if config["use_dynamic_shifting"] and flow and mu is None:
            raise ValueError("use_dynamic_shifting needs mu")
        if sigmas is not None and kind != "flow":
            raise ValueError("sigmas need use_flow_sigmas=True, without use_karras_sigmas")
        end = self._end()
        last = end if end == 0 or kind is None else None
        if not flow:
            return self._levels(num_inference_steps, last=last)
        steps = int(num_inference_steps or 0) if sigmas is None else len(sigmas)
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if kind == "karras":
            table = schedules.training_sigmas(self.alphas_cumprod)
            low = float(table[0]) if config["sigma_min"] is None else config["sigma_min"]
            high = float(table[-1]) if config["sigma_max"] is None else config["sigma_max"]
            levels = schedules.karras_sigmas(low, high, steps)
            return schedules.lambda_flow_grid(levels / (levels + 1), len(self), last=last)
        return schedules.lambda_flow_grid(
            schedules.whole_flow_sigmas(steps, len(self)) if sigmas is None else sigmas,
            len(self),
            shift=config["flow_shift"],
            mu=mu if config["use_dynamic_shifting"] else None,
            kind=config["time_shift_type"],
            terminal=config["shift_terminal"],
            last=last,
        )

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """Levels t (array or tensor) shifted by `mu`, as time_shift_type says; sigma: a power."""
        return schedules.time_shifted(t, mu, self.config["time_shift_type"], sigma)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Levels t (array or tensor) stretched to end at the configuration's shift_terminal."""
        return schedules.stretched(t, self.config["shift_terminal"])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the noise levels at which the model is called; what `step` remembers is forgotten.

        Args:
            num_inference_steps: how many.
            device: where `self.timesteps` is put.
            sigmas: with use_flow_sigmas, the levels before they are shifted, which count then.
            mu: the shift with use_dynamic_shifting; without, not looked at.

        Raises:
            ValueError: out of range, sigmas without use_flow_sigmas, or use_dynamic_shifting without mu.
        """
        self._set(self._grid(num_inference_steps, sigmas, mu), device)

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        begin: int = 0,
    ) -> Plan:
        """The run from step `begin` on as an immutable plan; arguments as `set_timesteps`."""
        return self._plan_at(self._grid(num_inference_steps, sigmas, mu), begin)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        config = self.config
        return solvers.unipc(
            grid.timesteps,
            self._signal_noise(grid.sigmas),
            self._prediction(),
            begin=begin,
            order=config["solver_order"],
            solver_type=config["solver_type"],
            predict_x0=self.predict_x0,
            lower_order_final=config["lower_order_final"],
            disable_corrector=self.disable_corrector,
        )

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Correct the sample with the model's output, and predict the next one.

        Args:
            model_output: [B, C, ...].
            timestep: where the run begins, at its first step; then not looked at.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            return_dict: False returns the tuple (prev_sample,).
        """
        return self._step(model_output, timestep, sample, return_dict)
