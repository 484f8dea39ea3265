"""The steps of one call of a pipeline: which of its scheduler's they are, and what does them."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from difusores.pipelines.checks import check_numbers, check_steps
from difusores.pipelines.pipeline import follows_plan, step_accepts_generator
from difusores.plan import Plan


@dataclass
class Run:
    """The steps of one call: which they are, and what does them.

    Attributes:
        scheduler: a copy of the pipeline's, set to these steps, or the pipeline's own where it has no plan.
        plan: None where the scheduler's `step` is called.
        timesteps: those of the steps that are done, on the models' device.
        begin: how many were left out at the beginning.
        options: of the scheduler's `step`, beside the generator.
    """

    scheduler: Any
    plan: Plan | None
    timesteps: Tensor
    begin: int
    options: dict[str, Any]

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """Standard deviation of the first sample of all steps, those left out too."""
        if self.plan is not None and not self.begin:
            return self.plan.init_noise_sigma
        return getattr(self.scheduler, "init_noise_sigma", 1.0)

    def add_noise(self, latents: Tensor, noise: Tensor, index: int = 0) -> Tensor:
        """Latents [B, ...] with the noise of `timesteps[index]`."""
        if self.plan is not None and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.begin + index)
        times = self.timesteps[index : index + 1].repeat(len(latents))
        noisy: Tensor = self.scheduler.add_noise(latents, noise, times)
        return noisy


def begin_run(
    scheduler: Any,
    device: torch.device,
    num_inference_steps: int | None,
    *,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float | None = None,
    start: float | None = None,
    end: float | None = None,
    eta: float = 0.0,
) -> Run:
    """The steps of a call.

    Args:
        scheduler: is left as it is where its plan is followed, else set to the steps.
        device: the models'.
        timesteps, sigmas: in place of `num_inference_steps`, for schedulers that take them.
        strength: share of the steps that is done, from the end, for a sample that begins as an image.
        start, end: shares of the training steps, from the noise on, from which and up to which the steps
            are done; a start stands in the place of `strength`.
        eta: noise of DDIM and others with it; a warning says where it has no place.

    Raises:
        ValueError: the scheduler does not take one of these, or no step is left.
    """
    name = type(scheduler).__name__
    given = {"timesteps": timesteps, "sigmas": sigmas}
    custom = {key: value for key, value in given.items() if value is not None}
    known = inspect.signature(scheduler.set_timesteps).parameters
    if len(custom) == 2:
        raise ValueError("only one of timesteps and sigmas can be given")
    for key in custom:
        if key not in known:
            raise ValueError(f"{name}.set_timesteps takes no {key}")
        if not len(custom[key]):
            raise ValueError(f"{key} is empty; needed is one step or more")
    if strength is not None and not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it has to be from 0 to 1")
    if not custom:
        check_steps(num_inference_steps)
    check_numbers(0, eta=eta)
    _check_shares(start, end)
    count = None if custom else num_inference_steps
    takes_generator = step_accepts_generator(scheduler)
    options: dict[str, Any] = {}
    step = inspect.signature(scheduler.step).parameters.values()
    if any(p.name == "eta" or p.kind is p.VAR_KEYWORD for p in step):
        options["eta"] = eta
    elif eta:
        warnings.warn(f"eta is {eta}, and {name} has none: it is not used", stacklevel=5)

    planned = follows_plan(scheduler)
    if planned:
        scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(count, device=device, **custom)
    every = scheduler.timesteps
    steps = len(every) if custom else int(num_inference_steps or 0)
    begin = _first_step(scheduler, steps, strength, start)
    late = strength is not None or start is not None
    if late and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    plan = None
    if planned:
        first = {"begin": begin} if begin else {}
        plan = scheduler.plan(count, **custom, **first, **options)
    elif takes_generator:
        options["generator"] = None  # filled in by the loop
    done = every[begin:]
    if start is not None or end is not None:
        _check_training_steps(name, plan.betas if plan is not None else getattr(scheduler, "betas", ()))
    if end is not None:
        done = done[: int((done >= _training_step(scheduler, end)).sum())]
        if not len(done):
            raise ValueError(f"denoising_end {end} leaves none of {len(every) - begin} steps")
        if plan is not None:
            plan = replace(plan, stages=plan.stages[: len(done)])
    return Run(scheduler, plan, done, begin, options)


def _training_step(scheduler: Any, share: float) -> int:
    """The training step at which a share of the noise is gone."""
    steps: int = scheduler.config["num_train_timesteps"]
    return round(steps - share * steps)


def _first_step(scheduler: Any, steps: int, strength: float | None, start: float | None) -> int:
    """How many of the scheduler's timesteps are left out at the beginning; see `begin_run`."""
    every, order = scheduler.timesteps, getattr(scheduler, "order", 1)
    if start is not None:
        left = int((every < _training_step(scheduler, start)).sum())
        left += order == 2 and left % 2 == 0  # the two stages of a step are not parted
        if not left:
            raise ValueError(f"denoising_start {start} leaves none of {steps} steps")
        return len(every) - left
    if strength is None:
        return 0
    begin: int = max(steps - min(int(steps * strength), steps), 0) * order
    if begin >= len(every):
        raise ValueError(
            f"strength {strength} leaves none of {steps} steps; needed is at least {1 / steps:.3g}"
        )
    return begin


def _check_shares(start: float | None, end: float | None) -> None:
    if start is not None and not 0 < start < 1:
        raise ValueError(f"denoising_start is {start}; it has to be above 0 and below 1, or None")
    if end is not None and not (start or 0) < end <= 1:
        raise ValueError(f"denoising_end is {end}; it has to be above {start or 0} and at most 1, or None")


def _check_training_steps(name: str, betas: Any) -> None:
    if betas is None or not len(betas):
        raise ValueError(
            f"denoising_start and denoising_end are shares of the training steps, and the times of {name} "
            "are none"
        )
