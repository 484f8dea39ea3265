"""Linear multistep schedulers: PNDM, IPNDM and DEIS."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage
from difusores.schedulers.base import DiscreteScheduler, SchedulerOutput, advance
from difusores.schedulers.indexed import IndexedScheduler, Run
from difusores.schedulers.logsnr import LogSnrScheduler
from difusores.schedules import Array, SigmaGrid


class PNDMScheduler(DiscreteScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    A step depends on how often `step` was called since `set_timesteps`, and on its timestep.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: see `difusores.schedules.betas`.
        skip_prk_steps: no Runge-Kutta; the second timestep then comes twice.
        set_alpha_to_one: after the last step alphas_cumprod is 1 instead of its value at training step 0.
        prediction_type: "epsilon" or "v_prediction".
        timestep_spacing, steps_offset: see `difusores.schedules.timesteps`.
    """

    returned = ("y",)
    pndm_order: ClassVar[int] = 4
    _run: Run
    _calls: tuple[tuple[int, ...], tuple[int, ...]]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
    ) -> None:
        self._initialize()
        one = torch.tensor(1.0, dtype=torch.float32, device="cpu")
        self.final_alpha_cumprod = one if set_alpha_to_one else self.alphas_cumprod[0]
        self._restart(((), ()))

    def _restart(self, calls: tuple[Sequence[int], Sequence[int]]) -> None:
        self.__dict__.update(_calls=(tuple(calls[0]), tuple(calls[1])), _run=Run())

    @property
    def counter(self) -> int:
        """How often `step` was called since `set_timesteps`."""
        return self._run.index or 0

    @property
    def prk_timesteps(self) -> Array:
        """[12] int64, the timesteps of the Runge-Kutta calls; [0] where they are skipped."""
        return np.array(self._calls[0], dtype=np.int64)

    @property
    def plms_timesteps(self) -> Array:
        """int64, the timesteps of the calls after them."""
        return np.array(self._calls[1], dtype=np.int64)

    def _timesteps(self, num_inference_steps: int) -> tuple[Sequence[int], Sequence[int]]:
        config = self.config
        steps = schedules.timesteps(
            config["timestep_spacing"], int(num_inference_steps), len(self), config["steps_offset"]
        )
        if config["skip_prk_steps"]:
            return [], [*steps[:2], *steps[1:]]
        return schedules.pndm_timesteps(steps, len(self))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose how many steps; `device` is where `self.timesteps` is put. Forgets what `step` remembers.

        Raises:
            ValueError: out of range, or fewer than four without skip_prk_steps.
        """
        calls = self._timesteps(num_inference_steps)
        self._restart(calls)
        self.num_inference_steps = num_inference_steps
        self._set_grid([*calls[0], *calls[1]], device)

    def plan(self, num_inference_steps: int, *, begin: int = 0) -> Plan:
        """The sampling run from element `begin` of the timesteps on as an immutable plan."""
        prk, plms = self._timesteps(num_inference_steps)
        times = [*prk, *plms][begin:]
        return self._plan([*self._stages(times, 0, prk, num_inference_steps)])

    def _stages(self, times: Sequence[int], first: int, prk: Sequence[int], steps: int) -> Iterable[Stage]:
        return solvers.pndm(
            self._alphas(),
            times,
            solvers.Prediction(self.config["prediction_type"]),
            stride=len(self) // steps,
            final_alpha_cumprod=float(self.final_alpha_cumprod),
            bases=prk,
            first=first,
        )

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One call of the model: a Runge-Kutta stage in the first twelve, a multistep stage after them.

        Args:
            model_output: [B, C, ...].
            timestep: where the sample is; an element of `self.timesteps` costs no read.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            return_dict: False returns the tuple (prev_sample,).

        Raises:
            ValueError: `set_timesteps` was not called.
        """
        t = self._number(timestep)
        steps, run, calls, prk = self.num_inference_steps, self._run, self.counter, self._calls[0]
        if steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        key = (t, calls, prk, steps)
        cached = self._rows.get(key)
        if cached is None:
            cached = self._cache(key, next(iter(self._stages([t], calls, prk, steps))))
        results, run.slots = advance(cached, model_output, sample, None, slots=run.slots)
        run.index = calls + 1
        return SchedulerOutput(*results[:1]) if return_dict else results[:1]

    def step_prk(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """`step` while its calls are Runge-Kutta stages.

        Raises:
            ValueError: they are over, or skipped.
        """
        if self.counter >= len(self._calls[0]):
            raise ValueError(
                f"call {self.counter + 1} of this run is no Runge-Kutta stage: use step_plms or step"
            )
        return self.step(model_output, timestep, sample, return_dict)

    def step_plms(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """`step` once the Runge-Kutta stages are over.

        Raises:
            ValueError: they are not.
        """
        if self.counter < len(self._calls[0]):
            raise ValueError(
                f"call {self.counter + 1} of this run is a Runge-Kutta stage: use step_prk or step"
            )
        return self.step(model_output, timestep, sample, return_dict)

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The model's input: the sample itself."""
        return sample


class IPNDMScheduler(IndexedScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    The noise has the level sin²(pi/2 · t), and the model is told t in (0, 1]; it predicts
    alpha * noise - sigma * x0.

    Args:
        num_train_timesteps: how many steps there are before `set_timesteps`.
        trained_betas: the noise levels themselves, descending, whatever the number of steps; one more than
            timesteps.

    Attributes:
        betas, alphas: float32, the noise and the signal at every timestep and at the end.
    """

    _compatibles: ClassVar[list[str]] = []
    returned = ("y",)
    pndm_order: ClassVar[int] = 4

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, trained_betas: Any = None) -> None:
        self.init_noise_sigma = 1.0
        self.set_timesteps(num_train_timesteps)

    def _levels(self, num_inference_steps: int) -> tuple[Tensor, Tensor]:
        """(betas, timesteps), float32 on the CPU."""
        trained = self.config["trained_betas"]
        if trained is not None:
            betas = torch.as_tensor(trained, dtype=torch.float32, device="cpu").detach().clone()
        elif num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be from 1 on, got {num_inference_steps}")
        else:
            betas = schedules.sine_levels(int(num_inference_steps))
        return betas, schedules.angles(betas, schedules.signal_beside(betas))[:-1]

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose how many steps; `device` is where `self.timesteps` is put. Forgets what `step` remembers."""
        betas, times = self._levels(num_inference_steps)
        # not as a change that rows would be forgotten for: they are kept by timesteps and betas
        self.__dict__.update(betas=betas, alphas=schedules.signal_beside(betas))
        self.timesteps = times.to(device)
        self.num_inference_steps = num_inference_steps
        self._restart()

    def plan(self, num_inference_steps: int, *, begin: int = 0) -> Plan:
        """The sampling run from step `begin` on as an immutable plan."""
        betas, times = self._levels(num_inference_steps)
        sigmas = tuple(betas.tolist())
        stages = tuple(self._stages(SigmaGrid(tuple(times.tolist()), sigmas), begin))
        return Plan("IPNDM", stages, "v_prediction", sigmas, continuous=True)

    def _levels_table(self) -> Tensor:
        return self.betas

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        signal = schedules.signal_beside(torch.tensor(grid.sigmas, dtype=torch.float32, device="cpu"))
        return solvers.ipndm(grid.timesteps, grid.sigmas, signal.tolist(), begin=begin)

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The model's input: the sample itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step.

        Args:
            model_output: [B, C, ...].
            timestep: where the run begins, at its first step; then not looked at.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            return_dict: False returns the tuple (prev_sample,).
        """
        result = self._take(model_output, timestep, sample)
        return SchedulerOutput(*result) if return_dict else result


class DEISMultistepScheduler(LogSnrScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: see `difusores.schedules.betas`.
        solver_order, lower_order_final: see `difusores.solvers.deis`.
        prediction_type: "epsilon", "sample", "v_prediction", or with use_flow_sigmas "flow_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding.
        algorithm_type, solver_type: "deis" and "logrho"; what other solvers have here means the same.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_flow_sigmas, flow_shift: see
            `difusores.schedules.lambda_grid`.
        timestep_spacing, steps_offset: see `difusores.schedules.inner_timesteps`.
        use_dynamic_shifting, time_shift_type: whether `set_timesteps` may be given mu.
    """

    grid_kinds = ("karras", "exponential", "beta", "flow")
    _choices: ClassVar = {"algorithm_type": ("deis",), "solver_type": ("logrho",)}
    _foreign: ClassVar = {
        "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
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
        algorithm_type: str = "deis",
        solver_type: str = "logrho",
        lower_order_final: bool = True,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        self._initialize()

    def _grid(self, num_inference_steps: int, mu: float | None) -> SigmaGrid:
        lowest = float(schedules.training_sigmas(self.alphas_cumprod)[0])
        last = lowest if self._kind() is None else None
        return self._levels(num_inference_steps, mu=mu, last=last)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, mu: float | None = None
    ) -> None:
        """Choose how many steps; `device` is where `self.timesteps` is put. Forgets what `step` remembers.

        Args:
            mu: flow_shift is exp(mu) this time; needs use_dynamic_shifting.

        Raises:
            ValueError: out of range, or mu without its options.
        """
        self._set(self._grid(num_inference_steps, mu), device)

    def plan(self, num_inference_steps: int, *, mu: float | None = None, begin: int = 0) -> Plan:
        """The sampling run from step `begin` on as an immutable plan."""
        return self._plan_at(self._grid(num_inference_steps, mu), begin)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        return solvers.deis(
            grid.timesteps,
            self._signal_noise(grid.sigmas),
            self._prediction(),
            begin=begin,
            order=self.config["solver_order"],
            lower_order_final=self.config["lower_order_final"],
        )

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step; arguments as `IPNDMScheduler.step`."""
        return self._step(model_output, timestep, sample, return_dict)
