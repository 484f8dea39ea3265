"""Schedulers whose noise is the path of one Brownian motion, whatever the steps; it needs torchsde."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.brownian import BrownianNoise, brownian_levels
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage
from difusores.sampling import Generators
from difusores.schedulers.base import PredictedSchedulerOutput, SchedulerOutput
from difusores.schedulers.edm import EDMMultistepScheduler
from difusores.schedulers.twostage import MidpointScheduler
from difusores.schedules import SigmaGrid


class CosineDPMSolverMultistepScheduler(EDMMultistepScheduler):
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
