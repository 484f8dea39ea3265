"""Schedulers whose noise is the path of one Brownian motion, whatever the steps; it needs torchsde."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.brownian import BrownianPath, brownian_span
from difusores.configuration import register_to_config
from difusores.plan import Noise, Plan, Stage
from difusores.sampling import Generators, noise_dtype
from difusores.schedulers.base import PredictedSchedulerOutput, SchedulerOutput
from difusores.schedulers.edm import EDMMultistepScheduler
from difusores.schedulers.indexed import IndexedScheduler
from difusores.schedulers.twostage import MidpointScheduler
from difusores.schedules import SigmaGrid


def _with_spans(stages: Iterable[Stage], spans: Iterable[tuple[float, float]], dtype: str) -> Iterator[Stage]:
    """The stages with noise of these parts of a Brownian path, and without where there are no more."""
    parts = iter(spans)
    for stage in stages:
        span = next(parts, None)
        yield replace(stage, noise=None if span is None else Noise(dtype=dtype, span=span))


class _BrownianScheduler(IndexedScheduler):
    """Mixed into a scheduler: the noise of its stages is a path, which the first one that draws begins.

    Attributes:
        noise_sampler: the Brownian path of the run, from its first step on.
    """

    noise_sampler: Any

    def _restart(self) -> None:
        super()._restart()
        self.__dict__["noise_sampler"] = None

    def _path(self, sigmas: Sequence[float]) -> BrownianPath:
        """The path of a run at these noise levels."""
        raise NotImplementedError

    def _drawn(self, draw: Noise, sample: Tensor, model_output: Tensor, generator: Generators) -> Tensor:
        if self.noise_sampler is None:
            like = torch.empty_like(sample, dtype=noise_dtype(draw, sample, model_output))
            self.__dict__["noise_sampler"] = self._path(self.sigmas.tolist()).begin(like, generator)
        noise: Tensor = self.noise_sampler(*(draw.span or ()))
        return noise


class CosineDPMSolverMultistepScheduler(_BrownianScheduler, EDMMultistepScheduler):
    """Drop-in for the class of the same name in diffusers 0.42: "sde-dpmsolver++" with Brownian noise.

    The noise needs torchsde. Options as `EDMDPMSolverMultistepScheduler`; solver_order goes up to 2.
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

    def _path(self, sigmas: Sequence[float]) -> BrownianPath:
        return BrownianPath(self.config["sigma_min"], self.config["sigma_max"])

    def plan(self, num_inference_steps: int, *, begin: int = 0) -> Plan:
        """The run from step `begin` on as an immutable plan."""
        return replace(super().plan(num_inference_steps, begin=begin), path=self._path(()))

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        spans = [span for span in pairwise(grid.sigmas[begin:]) if span[1] > 0]
        return _with_spans(super()._stages(grid, begin, **options), spans, "promoted")

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
        return self._advance(model_output, timestep, sample, return_dict, generator)


@dataclass
class DPMSolverSDESchedulerOutput(PredictedSchedulerOutput):
    """What `DPMSolverSDEScheduler.step` returns; see `PredictedSchedulerOutput`."""


class DPMSolverSDEScheduler(_BrownianScheduler, MidpointScheduler):
    """Drop-in for the class of the same name in diffusers 0.42: two model calls a step, and Brownian noise.

    The noise needs torchsde.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas: see `difusores.schedules.betas`.
        prediction_type: "epsilon" or "v_prediction".
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: see `difusores.schedules.sigma_grid`.
        noise_sampler_seed: of the Brownian path, one or one per image. None: one that is drawn from torch's
            global generator; a plan that is run with a generator takes the seed of that.
        timestep_spacing, steps_offset: see `difusores.schedules.timesteps`.
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
        noise_sampler_seed: int | Sequence[int] | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._initialize()
        self.noise_sampler_seed = noise_sampler_seed

    def _grid(self, num_inference_steps: int, total: int | None) -> SigmaGrid:
        times, sigmas = self._levels(self._spaced_over(num_inference_steps, total))
        middles = schedules.middle_sigmas(sigmas, ancestral=False)
        between = schedules.sigma_to_timestep(middles, schedules.training_sigmas(self.alphas_cumprod))
        doubled = schedules.twice(SigmaGrid(times, sigmas))
        pairs = chain.from_iterable(zip(between, times[1:], strict=True))
        return SigmaGrid((times[0], *pairs), doubled.sigmas)

    def _path(self, sigmas: Sequence[float]) -> BrownianPath:
        levels, seed = [sigma for sigma in sigmas if sigma > 0], self.noise_sampler_seed
        if seed is not None:  # numpy's integers are not JSON
            seed = tuple(map(int, seed)) if isinstance(seed, Sequence) else int(seed)
        return BrownianPath(min(levels), max(levels), seed)

    def plan(self, num_inference_steps: int, *, begin: int = 0, s_noise: float = 1.0) -> Plan:
        """The run from timestep index `begin` on as an immutable plan."""
        grid = self._grid(num_inference_steps, None)
        return replace(self._plan_at(grid, begin, s_noise=s_noise), path=self._path(grid.sigmas))

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        times, sigmas, first = self._single(grid, begin)
        middles = schedules.middle_sigmas(sigmas, ancestral=False)
        pairs = list(zip(grid.timesteps[1::2], middles, strict=True))
        stages = solvers.dpm_sde(times, sigmas, self._prediction(), middles=pairs, begin=first, **options)
        steps = [step for step in pairwise(sigmas[first:]) if step[1] > 0]
        spans = [brownian_span(*step, halfway) for step in steps for halfway in (True, False)]
        return _with_spans(stages, spans, "sample")

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
        result = self._take(model_output, timestep, sample, options={"s_noise": s_noise})
        return DPMSolverSDESchedulerOutput(*result) if return_dict else result
