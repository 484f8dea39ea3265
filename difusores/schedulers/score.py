"""Schedulers for models that predict the score: the two processes of Song et al. 2021, and KarrasVe.

Predictor and corrector have names and arguments of their own, in which the caller's loop gives the levels;
`plan` is that loop as one value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.outputs import BaseOutput
from difusores.plan import Plan, Stage
from difusores.sampling import Generators, draw_noise, langevin, noise_of_the_host
from difusores.schedulers.base import (
    MOST_ROWS,
    CachedStage,
    SchedulerOutput,
    TableScheduler,
    advance,
    advance_each,
    cached_stage,
)


@dataclass
class SdeVeOutput(BaseOutput):
    """What `ScoreSdeVeScheduler.step_pred` returns.

    Attributes:
        prev_sample: the next sample, like `sample`.
        prev_sample_mean: the same before noise was added: the last one is the image.
    """

    prev_sample: Tensor
    prev_sample_mean: Tensor


@dataclass
class KarrasVeOutput(BaseOutput):
    """What `KarrasVeScheduler.step` returns.

    Attributes:
        prev_sample: the next sample, like `sample_hat`.
        derivative: dx/dsigma at sigma_hat.
        pred_original_sample: x0 as predicted at this step.
    """

    prev_sample: Tensor
    derivative: Tensor
    pred_original_sample: Tensor | None = None


class _ScoreScheduler(TableScheduler):
    """Base of the schedulers of this file: rows kept under what they are made of."""

    _compatibles: ClassVar[list[str]] = []

    def _keep(self, key: Any, stage: Stage, returned: tuple[str, ...]) -> CachedStage:
        if len(self._rows) >= MOST_ROWS:
            self._rows.clear()
        cached = self._rows[key] = cached_stage(stage, returned)
        return cached

    def _stage_at(self, time: float) -> CachedStage:
        """The predictor's stage at a time."""
        raise NotImplementedError

    def _predict(
        self,
        timestep: float | Tensor,
        model_output: Tensor,
        sample: Tensor,
        generator: Generators,
    ) -> tuple[Tensor, ...]:
        """(next sample, its mean), at least float32 as in diffusers; timestep: one, or one per image."""
        if self.timesteps is None:
            raise ValueError("timesteps is None: call set_timesteps before step_pred")
        noise = draw_noise(sample.shape, generator, sample.device, sample.dtype)
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            stages = [self._stage_at(t) for t in timestep.tolist()]
            return advance_each(stages, model_output, sample, noise)
        if sample.dtype is not torch.float32:
            sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
        return advance(self._stage_at(self._value(timestep)), model_output, sample, None, noise)[0]


class ScoreSdeVeScheduler(_ScoreScheduler):
    """Drop-in for the class of the same name in diffusers 0.42: the variance-exploding process.

    Args:
        num_train_timesteps: T.
        snr: signal-to-noise ratio of the corrector's step.
        sigma_min, sigma_max: lowest and highest noise level.
        sampling_eps: the last time.
        correct_steps: how often pipelines correct a step.

    Attributes:
        timesteps: [steps] float32 from 1 to sampling_eps.
        sigmas: [steps] their noise levels, which the model is told. discrete_sigmas: [steps] ascending.
    """

    init_noise_sigma: float
    sigmas: Tensor
    discrete_sigmas: Tensor

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 2000,
        snr: float = 0.15,
        sigma_min: float = 0.01,
        sigma_max: float = 1348.0,
        sampling_eps: float = 1e-5,
        correct_steps: int = 1,
    ) -> None:
        self.init_noise_sigma = sigma_max
        self.set_timesteps(num_train_timesteps)
        self.set_sigmas(num_train_timesteps)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The model's input: the sample itself."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int,
        sampling_eps: float | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Choose how many times there are from 1 to sampling_eps; `device` is where they are put."""
        last = self.config["sampling_eps"] if sampling_eps is None else sampling_eps
        self.timesteps = schedules.real_times(num_inference_steps, last).to(device)

    def set_sigmas(
        self,
        num_inference_steps: int,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sampling_eps: float | None = None,
    ) -> None:
        """The noise levels of `timesteps`, to be called after `set_timesteps` with the same number.

        Args:
            num_inference_steps: how many.
            sigma_min, sigma_max: their range, if not the configuration's.
            sampling_eps: not used, as in diffusers, since the times are chosen already.
        """
        low = self.config["sigma_min"] if sigma_min is None else sigma_min
        high = self.config["sigma_max"] if sigma_max is None else sigma_max
        self.discrete_sigmas = schedules.geometric_sigmas(low, high, num_inference_steps)
        self.sigmas = schedules.sigmas_at(self.timesteps.cpu(), low, high)

    def get_adjacent_sigma(self, timesteps: Tensor, t: Tensor) -> Tensor:
        """The levels below the places `timesteps` of `discrete_sigmas`, 0 below the first; in t's dtype."""
        return schedules.levels_below(self.discrete_sigmas, timesteps).to(t.dtype)

    def plan(
        self,
        num_inference_steps: int,
        *,
        sampling_eps: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        begin: int = 0,
    ) -> Plan:
        """The run of the predictor from step `begin` on as an immutable plan, the last step without noise.

        The model is told the noise level, as `sigmas` has it. Arguments as `set_timesteps` and `set_sigmas`.

        Raises:
            ValueError: correct_steps is not 0: how far the corrector goes follows from norms of the score and
                of the noise, and a row is known before them.
        """
        config = self.config
        if config["correct_steps"]:
            raise ValueError(
                f"correct_steps={config['correct_steps']} has no plan: how far the corrector goes follows "
                "from the sample; use step_correct and step_pred, or correct_steps=0"
            )
        low = config["sigma_min"] if sigma_min is None else sigma_min
        high = config["sigma_max"] if sigma_max is None else sigma_max
        last = config["sampling_eps"] if sampling_eps is None else sampling_eps
        times = schedules.real_times(num_inference_steps, last)
        levels = [0.0, *schedules.geometric_sigmas(low, high, num_inference_steps).tolist()]
        told = schedules.sigmas_at(times, low, high).tolist()
        places = [schedules.place_of(t, num_inference_steps) for t in times.tolist()]
        stages = solvers.ended(
            replace(solvers.ve_predictor(levels[place + 1], levels[place]), time=sigma)
            for place, sigma in list(zip(places, told, strict=True))[begin:]
        )
        first = told[begin] if begin else config["sigma_max"]
        return Plan("ScoreSdeVe", tuple(stages), "score", (), continuous=True, init_noise_sigma=first)

    def _stage_at(self, time: float) -> CachedStage:
        levels, steps = self.discrete_sigmas, len(self._times())
        key = (time, steps, levels._version)
        cached: CachedStage | None = self._rows.get(key)
        if cached is not None:
            return cached
        place = schedules.place_of(time, steps)
        if not 0 <= place < len(levels):
            raise IndexError(f"time {time} is outside the {len(levels)} levels of set_sigmas")
        below = float(levels[place - 1]) if place > 0 else 0.0
        return self._keep(key, solvers.ve_predictor(float(levels[place]), below), ("y", "d"))

    def step_pred(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple[Tensor, ...]:
        """One step of the predictor, see `difusores.solvers.ve_predictor`.

        Args:
            model_output: [B, C, ...], the score.
            timestep: a number or tensor in [0, 1], or [B] of them; an element of `self.timesteps` costs no
                read.
            sample: [B, C, ...]. Not changed.
            generator: source of the noise, drawn at every step; a list draws one image each.
            return_dict: False returns the tuple (prev_sample, prev_sample_mean).
        """
        result = self._predict(timestep, model_output, sample, generator)
        return SdeVeOutput(*result) if return_dict else result

    def step_correct(
        self,
        model_output: Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """One step of Langevin dynamics at the same level, of a length that `snr` gives; reads nothing back.

        Args:
            model_output: [B, C, ...], the score.
            sample: [B, C, ...]. Not changed.
            generator: source of the noise, drawn in float32 on the CPU; a list draws one image each.
            return_dict: False returns the tuple (prev_sample,).
        """
        noise = noise_of_the_host(sample, generator)
        result = langevin(model_output, sample, noise, self.config["snr"])
        return SchedulerOutput(result) if return_dict else (result,)

    def add_noise(self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor:
        """original_samples + sigma * noise; noise None is drawn.

        timesteps: [B] int64, places of `discrete_sigmas`.
        """
        if noise is None:
            noise = draw_noise(original_samples.shape, None, original_samples.device, original_samples.dtype)
        levels = self.discrete_sigmas[timesteps.to(self.discrete_sigmas.device)]
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        return solvers.raise_noise(levels, original_samples.to(wide), noise)


class ScoreSdeVpScheduler(_ScoreScheduler):
    """Drop-in for the class of the same name in diffusers 0.42: the variance-preserving process.

    Args:
        num_train_timesteps: T.
        beta_min, beta_max: the process' rate at times 0 and 1.
        sampling_eps: the last time.

    Attributes:
        timesteps: [steps] float32 from 1 to sampling_eps; None before `set_timesteps`.
        sigmas, discrete_sigmas: None.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 2000,
        beta_min: float = 0.1,
        beta_max: float = 20,
        sampling_eps: float = 1e-3,
    ) -> None:
        self.sigmas = None
        self.discrete_sigmas = None
        self.__dict__["timesteps"] = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose how many times there are from 1 to sampling_eps; `device` is where they are put."""
        self.timesteps = schedules.real_times(num_inference_steps, self.config["sampling_eps"]).to(device)

    def plan(self, num_inference_steps: int, *, begin: int = 0) -> Plan:
        """The run from step `begin` on as an immutable plan, the last step without noise.

        The model is told the time, as `timesteps` has it.
        """
        config = self.config
        times = schedules.real_times(num_inference_steps, config["sampling_eps"]).tolist()
        options = num_inference_steps, config["beta_min"], config["beta_max"]
        stages = solvers.ended(solvers.vp_predictor(t, *options) for t in times[begin:])
        return Plan("ScoreSdeVp", tuple(stages), "epsilon", (), continuous=True)

    def _stage_at(self, time: float) -> CachedStage:
        steps = len(self._times())
        cached: CachedStage | None = self._rows.get((time, steps))
        if cached is not None:
            return cached
        stage = solvers.vp_predictor(time, steps, self.config["beta_min"], self.config["beta_max"])
        return self._keep((time, steps), stage, ("y", "d"))

    def step_pred(
        self, score: Tensor, x: Tensor, t: float | Tensor, generator: Generators = None
    ) -> tuple[Tensor, ...]:
        """One step of the predictor: (the next sample, the same before noise was added).

        Args:
            score: [B, C, ...], the model's output, -std * score.
            x: [B, C, ...], the sample. Not changed.
            t: a number or tensor in (0, 1], or [B] of them; an element of `self.timesteps` costs no read.
            generator: source of the noise, drawn at every step; a list draws one image each.

        Raises:
            ValueError: `set_timesteps` was not called, or t is 0.
        """
        return self._predict(t, score, x, generator)


class KarrasVeScheduler(_ScoreScheduler):
    """Drop-in for the class of the same name in diffusers 0.42 (Karras et al. 2022, algorithm 2).

    Args:
        sigma_min, sigma_max: lowest and highest noise level.
        s_noise: factor of the noise that is added.
        s_churn: how much noise, over the whole run.
        s_min, s_max: levels between which it is added.

    Attributes:
        timesteps: [steps] int64, descending to 0; None before `set_timesteps`.
        schedule: [steps] float32, the squares of the noise levels of the timesteps 0, 1, ..., ascending.
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.02,
        sigma_max: float = 100,
        s_noise: float = 1.007,
        s_churn: float = 80,
        s_min: float = 0.05,
        s_max: float = 50,
    ) -> None:
        self.init_noise_sigma = sigma_max
        self.num_inference_steps = None
        self.__dict__["timesteps"] = None
        self.schedule: Tensor | None = None

    def __len__(self) -> int:
        raise TypeError("KarrasVeScheduler has no length: it knows no training steps")

    def __bool__(self) -> bool:
        return True

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The model's input: the sample itself."""
        return sample

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose how many steps; `device` is where timesteps and schedule are put."""
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device="cpu").to(device)
        self.schedule = self._schedule(num_inference_steps).to(device)

    def _schedule(self, num_inference_steps: int) -> Tensor:
        variances = self.config["sigma_max"] ** 2, self.config["sigma_min"] ** 2
        return schedules.geometric_variances(*variances, num_inference_steps)

    def _gamma(self, level: float, steps: int) -> float:
        """By what part of itself noise raises a level."""
        config = self.config
        churns = config["s_min"] <= level <= config["s_max"]
        return float(min(config["s_churn"] / steps, 2**0.5 - 1)) if churns else 0.0

    def plan(self, num_inference_steps: int, *, begin: int = 0) -> Plan:
        """The run from step `begin` on as an immutable plan, one stage with noise and two with calls a step.

        The model is told the level, and predicts what `step` takes: x0 = x + level * output. As in diffusers'
        pipeline the elements of `schedule` are the levels.

        Raises:
            ValueError: fewer steps than one.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        levels = self._schedule(num_inference_steps).flip(0).tolist()[begin:]
        hats = [level * (1 + self._gamma(level, num_inference_steps)) for level in levels]
        stages = solvers.karras_ve(levels, hats, self.config["s_noise"])
        first = levels[0] if begin else float(self.init_noise_sigma)
        return Plan("KarrasVe", tuple(stages), "-epsilon", (), continuous=True, init_noise_sigma=first)

    def add_noise_to_input(
        self, sample: Tensor, sigma: Any, generator: Generators = None
    ) -> tuple[Tensor, Any]:
        """(the sample raised to sigma_hat, sigma_hat), which is above sigma between s_min and s_max.

        Args:
            sample: [B, C, ...], at level sigma. Not changed.
            sigma: a number or 0-dim tensor.
            generator: source of the noise, drawn in any case, in float32 on the CPU.

        Raises:
            ValueError: `set_timesteps` was not called.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before add_noise_to_input")
        level = float(sigma)
        sigma_hat = schedules.churned(sigma, self._gamma(level, self.num_inference_steps))
        hat = float(sigma_hat)
        cached = self._rows.get(("churn", level, hat))
        if cached is None:
            stage = solvers.karras_ve_churn(level, hat, self.config["s_noise"])
            cached = self._keep(("churn", level, hat), stage, ("y",))
        noise = noise_of_the_host(sample, generator)
        if sample.dtype is not noise.dtype:
            wide = torch.promote_types(sample.dtype, noise.dtype)
            sample, noise = sample.to(wide), noise.to(wide)
        (raised,), _ = advance(cached, sample, sample, None, noise)
        return raised, sigma_hat

    def step(
        self,
        model_output: Tensor,
        sigma_hat: Any,
        sigma_prev: Any,
        sample_hat: Tensor,
        return_dict: bool = True,
    ) -> KarrasVeOutput | tuple[Tensor, ...]:
        """Euler's step from sigma_hat to sigma_prev.

        Args:
            model_output: [B, C, ...], such that x0 = sample_hat + sigma_hat * model_output.
            sigma_hat, sigma_prev: numbers or 0-dim tensors.
            sample_hat: [B, C, ...]. Not changed.
            return_dict: False returns the tuple (prev_sample, derivative).
        """
        # a tensor is never a key: its value is
        cached = self._rows.get((sigma_hat, sigma_prev, return_dict))
        if cached is None:
            hat, after = float(sigma_hat), float(sigma_prev)
            returned = ("y", "d", "x0") if return_dict else ("y", "d")
            key = hat, after, return_dict
            cached = self._rows.get(key) or self._keep(key, solvers.karras_ve_step(hat, after), returned)
        result, _ = advance(cached, model_output, sample_hat, None)
        return KarrasVeOutput(*result) if return_dict else result

    def step_correct(
        self,
        model_output: Tensor,
        sigma_hat: Any,
        sigma_prev: Any,
        sample_hat: Tensor,
        sample_prev: Tensor,
        derivative: Tensor,
        return_dict: bool = True,
    ) -> KarrasVeOutput | tuple[Tensor, ...]:
        """Heun's correction of a step.

        Args:
            model_output: [B, C, ...], at sample_prev and sigma_prev.
            sigma_hat, sigma_prev, sample_hat: as `step` was given them.
            sample_prev, derivative: what it returned.
            return_dict: False returns the tuple (prev_sample, derivative).
        """
        hat, after = float(sigma_hat), float(sigma_prev)
        cached = self._rows.get(("correct", hat, after, return_dict))
        if cached is None:
            returned = ("y", "x0") if return_dict else ("y",)
            stage = solvers.karras_ve_correct(hat, after)
            cached = self._keep(("correct", hat, after, return_dict), stage, returned)
        result, _ = advance(cached, model_output, sample_prev, None, slots=(sample_hat, derivative))
        corrected, *x0 = result
        return KarrasVeOutput(corrected, derivative, *x0) if return_dict else (corrected, derivative)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> NoReturn:
        """Refused, as in diffusers.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("KarrasVeScheduler only samples")
