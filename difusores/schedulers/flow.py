"""Schedulers of flow models, whose sample is (1 - sigma) * x0 + sigma * noise."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage
from difusores.sampling import Generators, draw_noise, flow_step_by_token
from difusores.schedulers.base import SchedulerOutput
from difusores.schedulers.indexed import IndexedScheduler, refuse_integers
from difusores.schedules import Array, SigmaGrid

logger = logging.getLogger(__name__)


class FlowScheduler(IndexedScheduler):
    """Base of the schedulers of this file.

    Attributes:
        sigma_min, sigma_max: the range of the noise levels before `set_timesteps` shifts them.
    """

    _compatibles: ClassVar[list[str]] = []
    returned = ("y",)
    upcast = True
    sigma_min: float
    sigma_max: float

    def _first_levels(self, shift: float | None) -> None:
        """The levels until `set_timesteps` is called; a shift of None leaves them."""
        table, self.timesteps = schedules.training_flow_levels(len(self), shift)
        self.sigmas = table
        self.sigma_min, self.sigma_max = float(table[-1]), float(table[0])
        self.num_inference_steps = None
        self._restart()

    def _evenly(self, num_inference_steps: int) -> Array:
        """[steps] float64, timesteps from the highest to the lowest.

        Raises:
            ValueError: less than one step.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be from 1 on, got {num_inference_steps}")
        return np.linspace(self.sigma_max * len(self), self.sigma_min * len(self), int(num_inference_steps))

    def _set(self, grid: SigmaGrid, device: str | torch.device | None) -> None:
        self.timesteps = torch.tensor(grid.timesteps, dtype=torch.float32, device=device or "cpu")
        self.sigmas = torch.tensor(grid.sigmas, dtype=torch.float32, device="cpu")
        self._restart()

    def _plan_at(self, grid: SigmaGrid, begin: int, **options: Any) -> Plan:
        stages = tuple(self._stages(grid, begin, **options))
        name = type(self).__name__.removesuffix("Scheduler")
        return Plan(name, stages, "flow_prediction", (), continuous=True)

    def _mixed(self, indices: list[int], sample: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            raise ValueError("scale_noise needs the noise")
        levels = [float(self.sigmas[index]) for index in indices]
        return solvers.mix([(1 - sigma, sigma) for sigma in levels], sample, noise)


class FlowMatchEulerDiscreteScheduler(FlowScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    Args:
        num_train_timesteps: T; the model is told sigma * T.
        shift: see `difusores.schedules.shifted`.
        use_dynamic_shifting, time_shift_type: levels are shifted by the `mu` that `set_timesteps` is given
            instead, see `difusores.schedules.time_shifted`; without it a `mu` is not read.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: for pipelines, which find `mu` by them.
        invert_sigmas: from the image to the noise, with levels 1 - sigma.
        shift_terminal: the last level before the end, see `difusores.schedules.stretched`; None or 0: none.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: see `difusores.schedules.sigma_grid`.
        stochastic_sampling: fresh noise at every step, see `difusores.solvers.flow_renoised`.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        self._kind()
        if time_shift_type not in schedules.TIME_SHIFTS:
            allowed = " or ".join(map(repr, schedules.TIME_SHIFTS))
            raise ValueError(f"time_shift_type must be {allowed}, got {time_shift_type!r}")
        self._shift = shift
        self._first_levels(None if use_dynamic_shifting else shift)

    @property
    def shift(self) -> float:
        """What the next `set_timesteps` shifts by, without use_dynamic_shifting."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Change `shift`; the levels change at the next `set_timesteps`."""
        self._shift = shift

    def _kind(self) -> str | None:
        kinds = [kind for kind in schedules.SIGMA_KINDS if self.config[f"use_{kind}_sigmas"]]
        if len(kinds) > 1:
            names = ", ".join(f"use_{kind}_sigmas" for kind in schedules.SIGMA_KINDS)
            raise ValueError(f"only one of {names} can be used, got {' and '.join(kinds)}")
        return kinds[0] if kinds else None

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """Levels t (array or tensor) shifted by `mu`, as time_shift_type says; sigma: a power."""
        return schedules.time_shifted(t, mu, self.config["time_shift_type"], sigma)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Levels t (array or tensor) stretched to end at the configuration's shift_terminal."""
        return schedules.stretched(t, self.config["shift_terminal"])

    def _grid(
        self,
        num_inference_steps: int | None,
        sigmas: Sequence[float] | None,
        mu: float | None,
        timesteps: Sequence[float] | None,
    ) -> SigmaGrid:
        config = self.config
        if config["use_dynamic_shifting"] and mu is None:
            raise ValueError("use_dynamic_shifting=True needs mu, what the levels are shifted by")
        _must_agree(
            num_inference_steps=num_inference_steps,
            sigmas=None if sigmas is None else len(sigmas),
            timesteps=None if timesteps is None else len(timesteps),
        )
        told = None if timesteps is None else np.array([float(t) for t in timesteps], dtype=np.float32)
        if sigmas is not None:
            levels: Array = np.array([float(sigma) for sigma in sigmas], dtype=np.float32)
        else:
            if told is not None:
                logger.warning(
                    "timesteps without sigmas: the model is told these timesteps, and the noise levels that "
                    "belong to them are shifted; give sigmas too where they should be others"
                )
            levels = (self._evenly(num_inference_steps or 0) if told is None else told) / len(self)
        if len(levels) == 0:
            raise ValueError("sigmas or timesteps must hold at least one step, and are empty")
        if config["use_dynamic_shifting"]:
            levels = self.time_shift(mu or 0.0, 1.0, levels)
        else:
            levels = schedules.shifted(levels, self._shift)
        if config["shift_terminal"]:
            levels = self.stretch_shift_to_terminal(levels)
        return schedules.flow_grid(
            levels,
            len(self),
            kind=self._kind(),
            sigma_min=config.get("sigma_min"),
            sigma_max=config.get("sigma_max"),
            timesteps=told,
            inverted=config["invert_sigmas"],
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the noise levels at which the model is called; what `step` remembers is forgotten.

        Args:
            num_inference_steps: how many.
            device: where `self.timesteps` is put.
            sigmas: the levels, which are then shifted; the end is not one of them.
            mu: see use_dynamic_shifting.
            timesteps: what the model is told, and without sigmas also the levels, as sigma * T.

        Raises:
            ValueError: no number of steps, or more than one.
        """
        grid = self._grid(num_inference_steps, sigmas, mu, timesteps)
        self._set(grid, device)
        self.num_inference_steps = len(grid.timesteps)

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
        begin: int = 0,
    ) -> Plan:
        """The run from step `begin` on as an immutable plan; arguments as `set_timesteps`."""
        return self._plan_at(self._grid(num_inference_steps, sigmas, mu, timesteps), begin)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        solver = solvers.flow_renoised if self.config["stochastic_sampling"] else solvers.flow_euler
        return solver(*grid, begin=begin)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None) -> Tensor:
        """(1 - sigma) * sample + sigma * noise at each image's timestep, or at the run's place.

        Args:
            sample, noise: [B, ...].
            timestep: [B] or [1], elements of `timesteps`; after `set_begin_index` not looked at.
        """
        if self._begin_index is None:
            times = timestep.reshape(-1).unbind() if isinstance(timestep, Tensor) else [timestep]
            return self._mixed([self.index_for_timestep(t) for t in times], sample, noise)
        index = self._run.index if self._run.index is not None else self._begin_index
        return self._mixed([index], sample, noise)

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step to the next noise level.

        Args:
            model_output: [B, C, ...].
            timestep: where the run begins, at its first step; then not looked at.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            s_churn, s_tmin, s_tmax, s_noise: only these: diffusers takes others, and does nothing with them.
            generator: source of the noise of stochastic_sampling; a list draws one image each.
            per_token_timesteps: [B, L] for a sample [B, L, C], see `difusores.sampling.flow_step_by_token`.
            return_dict: False returns the tuple (prev_sample,).

        Raises:
            ValueError: timestep is an integer, churn is asked for, or `set_timesteps` was not called.
        """
        refuse_integers(self, timestep)
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        if s_churn or s_tmin or s_tmax != math.inf or s_noise != 1.0:
            raise ValueError(
                f"{type(self).__name__} adds no churn, got s_churn={s_churn}, s_tmin={s_tmin}, "
                f"s_tmax={s_tmax}, s_noise={s_noise}: noise comes with stochastic_sampling=True"
            )
        if per_token_timesteps is None:
            result = self._take(model_output, timestep, sample, generator)
        else:
            run = self._run
            index = self._start(timestep) if run.index is None else run.index
            noise = None
            if self.config["stochastic_sampling"]:
                noise = draw_noise(sample.shape, generator, sample.device, torch.float32)
            tokens = (per_token_timesteps, len(self))
            result = (flow_step_by_token(self.sigmas, *tokens, sample, model_output, noise),)
            run.index = index + 1
        return SchedulerOutput(*result) if return_dict else result


def _must_agree(**counts: int | None) -> None:
    given = {name: count for name, count in counts.items() if count is not None}
    if len(set(given.values())) != 1:
        got = ", ".join(f"{name} of {count}" for name, count in given.items()) or "none of them"
        raise ValueError(f"{', '.join(counts)} must agree on the number of steps, got {got}")


class FlowMatchHeunDiscreteScheduler(FlowScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    Args:
        num_train_timesteps: T; the model is told sigma * T.
        shift: see `difusores.schedules.shifted`.
    """

    order = 2

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        self._first_levels(shift)

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call of `step` begins a step."""
        run = self._run
        return run.index is None or (run.index - run.begin) % 2 == 0

    def _grid(self, num_inference_steps: int) -> SigmaGrid:
        levels = schedules.shifted(self._evenly(num_inference_steps) / len(self), self.config["shift"])
        return schedules.twice(schedules.flow_grid(levels, len(self)))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose how many steps; `device` is where `self.timesteps` is put. Forgets what `step` remembers."""
        self._set(self._grid(num_inference_steps), device)
        self.num_inference_steps = num_inference_steps

    def plan(
        self,
        num_inference_steps: int,
        *,
        begin: int = 0,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> Plan:
        """The run from timestep index `begin` on as an immutable plan; arguments as `step`."""
        options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
        return self._plan_at(self._grid(num_inference_steps), begin, **options)

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        single, step = schedules.once(grid, begin)
        return solvers.flow_heun(*single, begin=step, **options)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) * sample + sigma * noise at the run's place, which `timestep` says if none is known."""
        index = self._start(timestep) if self._run.index is None else self._run.index
        return self._mixed([index], sample, noise)

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
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One model call of a step.

        Args:
            model_output: [B, C, ...].
            timestep: where the run begins, at its first call; then not looked at.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            s_churn, s_tmin, s_tmax, s_noise: see `difusores.solvers.flow_heun`; the same for both calls.
            generator: source of the noise, drawn where s_churn > 0; a list draws one image each.
            return_dict: False returns the tuple (prev_sample,).

        Raises:
            ValueError: timestep is an integer.
        """
        refuse_integers(self, timestep)
        options: dict[str, Any] = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
        result = self._take(model_output, timestep, sample, generator, None, options)
        return SchedulerOutput(*result) if return_dict else result
