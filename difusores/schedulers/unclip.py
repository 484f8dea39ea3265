"""UnCLIPScheduler: the ancestral sampling of unCLIP (Ramesh et al. 2022, "DALL-E 2")."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage
from difusores.sampling import Generators
from difusores.schedulers.base import DiscreteScheduler, SchedulerOutput

VARIANCE_TYPES = ("fixed_small_log", "learned_range")


@dataclass
class UnCLIPSchedulerOutput(SchedulerOutput):
    """What `UnCLIPScheduler.step` returns.

    Attributes:
        prev_sample: the next sample, like `sample`.
        pred_original_sample: x0 as predicted at this step, clipped, like `sample`.
    """

    pred_original_sample: Tensor | None = None


class UnCLIPScheduler(DiscreteScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    Args:
        num_train_timesteps: T.
        variance_type: "fixed_small_log" or "learned_range", see `difusores.solvers.ddpm`.
        clip_sample, clip_sample_range: clamp the predicted x0 to [-clip_sample_range, clip_sample_range].
        prediction_type: "epsilon" or "sample".
        beta_schedule: "squaredcos_cap_v2".
    """

    _compatibles: ClassVar[list[str]] = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        variance_type: str = "fixed_small_log",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        prediction_type: str = "epsilon",
        beta_schedule: str = "squaredcos_cap_v2",
    ) -> None:
        if beta_schedule != "squaredcos_cap_v2":
            raise ValueError(f"beta_schedule must be 'squaredcos_cap_v2', got {beta_schedule!r}")
        self._initialize()
        self.variance_type = variance_type

    def _timesteps(self, num_inference_steps: int) -> list[int]:
        if num_inference_steps == 1:
            raise ValueError("num_inference_steps must be at least 2: the first and the last training step")
        return schedules.timesteps("linspace", int(num_inference_steps), len(self))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the training steps at which the model is called, evenly from T - 1 to 0.

        Args:
            num_inference_steps: how many, from 2 to T.
            device: where `self.timesteps` is put.

        Raises:
            ValueError: out of range.
        """
        values = self._timesteps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._set_grid(values, device)

    def plan(self, num_inference_steps: int) -> Plan:
        """The run as an immutable plan; the scheduler's own state is neither used nor changed."""
        return self._plan([*self._stages(pairwise([*self._timesteps(num_inference_steps), -1]))])

    def _stages(self, steps: Iterable[tuple[int, int]]) -> Iterable[Stage]:
        if self.variance_type not in VARIANCE_TYPES:
            raise ValueError(
                f"variance_type must be one of {', '.join(VARIANCE_TYPES)}, got {self.variance_type!r}"
            )
        prediction = self._prediction()
        if prediction.kind == "v_prediction":
            raise ValueError("prediction_type must be 'epsilon' or 'sample', got 'v_prediction'")
        adjacent = list(zip(self.alphas.tolist(), self.betas.tolist(), strict=True))
        return solvers.ddpm(
            self._alphas(), steps, prediction, variance_type=self.variance_type, adjacent=adjacent
        )

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        prev_timestep: int | Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> UnCLIPSchedulerOutput | tuple[Tensor, ...]:
        """One step back in time.

        Args:
            model_output: [B, C, ...], or [B, 2 * C, ...] for a learned variance.
            timestep: where the sample is; an element of `self.timesteps` costs no read.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            prev_timestep: where the step leads; None is the training step before.
            generator: source of the noise, drawn at every timestep above 0; a list draws one image each.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).
        """
        t = self._number(timestep)
        before = t - 1 if prev_timestep is None else self._number(prev_timestep)
        cached = self._rows.get((t, before))
        if cached is None:
            cached = self._cache((t, before), next(iter(self._stages([(t, before)]))))
        result = self._advance(cached, model_output, sample, generator)
        return UnCLIPSchedulerOutput(*result) if return_dict else result
