"""Guidance without a classifier: inside of the fused step where it is linear, else beside it; in one model
call for all of its parts, or in one for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difusores.models.conditioning import Conditioning
from difusores.models.embeddings import Timesteps
from difusores.pipelines.checks import as_number, check_numbers, is_pair
from difusores.pipelines.pipeline import DiffusionPipeline
from difusores.sampling import Model


class GuidedPipeline(DiffusionPipeline):
    """Base of pipelines whose `unet` is called with a condition and without: for both at once or for each."""

    unet: Any
    _separate_guidance = False
    _guidance_limits = (0.0, 1.0)  # `accelerate(approximate=("partial_guidance",))` sets others

    def enable_separate_guidance(self) -> None:
        """Call the UNet once for each part of guidance, which takes less memory, not once for all."""
        self._separate_guidance = True

    def disable_separate_guidance(self) -> None:
        """Call the UNet once for all parts of guidance again."""
        self._separate_guidance = False

    def _call_unet(
        self,
        conditioning: Conditioning,
        x: Tensor,
        t: Tensor,
        count: int,
        image_scale: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """The UNet's output for [parts * count, C, h, w]; options: with a row for each of x, or none."""
        if not self._separate_guidance or len(x) == count:
            return as_tensor(conditioning(self.unet, x, t, image_scale, **options))
        parts = []
        for begin in range(0, len(x), count):
            rows = slice(begin, begin + count)
            of_rows = {name: _of_rows(value, rows) for name, value in options.items()}
            part = conditioning.part(rows)
            parts.append(as_tensor(part(self.unet, x[rows], t, image_scale, **of_rows)))
        return torch.cat(parts)


def check_guidance(
    guidance_scale: Any, guidance_rescale: Any = 0.0, guidance_interval: Any = (0.0, 1.0)
) -> float:
    """The scale as a number, of a number or of a tensor with one; 1 for None.

    Raises:
        ValueError: it is not finite, the rescale is no share, or the interval is none.
    """
    scale = as_number(guidance_scale, "guidance_scale")
    check_numbers(guidance_rescale=guidance_rescale)
    if guidance_rescale is None or not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale is {guidance_rescale}; it is a share, from 0 to 1")
    interval = guidance_interval
    if not is_pair(interval) or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval is {interval}; needed are two shares, 0 <= first <= last <= 1")
    return 1.0 if scale is None else scale


class Guided:
    """Guidance without a classifier (Ho & Salimans 2022): the model for `Plan.run`, and what the step makes
    of its outputs.

    The weighted sum, (1 - w) * unconditional + w * conditional, is linear, and with its rescale the step does
    it. Where the weights are others than those of the run, or guidance is not wanted at a step, the outputs
    are combined here, and all parts given to the step are the same. A learned variance is the conditional
    one's.

    Args:
        predict: predict(x, t) -> output, for x with a copy of the batch for each weight, or with one copy
            for the conditional part alone.
        weights: those of now, whose sum is 1; callbacks may change them. At first those of the run. All on
            the conditional part is no guidance.
        steps: calls in the run.
        conditional: which part is the conditional one: the first, 0, or the last, -1. The unconditional one
            is at the other end.
        rescale: share of the sum that is brought to the deviation of the conditional part, see `rescaled`.
        interval: share of the calls from which and up to which there is guidance (Kynkäänniemi et al. 2024,
            "Applying guidance in a limited interval improves sample and distribution quality").
        limits: shares outside which there is none either.
        step_rescales: False where what takes the outputs is no `Plan.run`, or not of these weights alone:
            then they are rescaled here.

    Attributes:
        weights: of the run, for `Plan.run`; (1.0,) where there is no guidance.
        conditional: the same.
    """

    def __init__(
        self,
        predict: Model,
        weights: Callable[[], tuple[float, ...]],
        steps: int,
        *,
        conditional: int = -1,
        rescale: float = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
        limits: tuple[float, float] = (0.0, 1.0),
        step_rescales: bool = True,
    ) -> None:
        self.weights, self.conditional = weights(), conditional
        self._predict, self._weights, self._steps, self._calls = predict, weights, steps, 0
        self._share, self._step_rescales, self._of_step = rescale, step_rescales, 0.0
        self._begin, self._end = max(interval[0], limits[0]), min(interval[1], limits[1])
        parts = len(self.weights)
        self._alone = tuple(float(k == conditional % parts) for k in range(parts))
        if self.weights == self._alone:
            self.weights = self._alone = (1.0,)

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        parts = len(self.weights)
        if parts == 1:
            return self._predict(x, t)
        now, at = self._weights(), self._calls / self._steps
        self._calls += 1
        self._of_step = 0.0
        if not self._begin <= at < self._end or now == self._alone:
            return torch.cat([as_tensor(self._predict(x[: len(x) // parts], t))] * parts)
        output = as_tensor(self._predict(x, t))
        if now == self.weights and (self._step_rescales or not self._share):
            self._of_step = self._share
            return output
        outputs, channels = output.chunk(parts), x.shape[1]
        means = [part[:, :channels] for part in outputs]
        base = means[-1 - self.conditional]
        mixed = base + sum(w * (mean - base) for w, mean in zip(now, means, strict=True) if mean is not base)
        if self._share:
            mixed = rescaled(mixed, means[self.conditional], self._share)
        mixed = torch.cat((mixed, outputs[self.conditional][:, channels:]), dim=1)
        return torch.cat([mixed] * parts)

    def rescale(self) -> float:
        """The share that the step has to rescale of what the last call returned."""
        return self._of_step


def rescaled(mixed: Tensor, conditional: Tensor, share: float) -> Tensor:
    """`mixed`, a share of it scaled to the standard deviation that `conditional` has in each image.

    `difusores.ops.guidance_rescale` with the step is the same in fewer passes; this is for what is mixed
    elsewhere.

    Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", section 3.4.
    """
    axes = list(range(1, mixed.ndim))
    factor = conditional.std(axes, keepdim=True) / mixed.std(axes, keepdim=True)
    return mixed * (share * factor + 1 - share)


def guidance_embedding(weight: float, count: int, width: int, device: torch.device) -> Tensor:
    """[count, width] sinusoids of the weight, for models that are told it.

    Luo et al. 2023, "Latent consistency models".
    """
    weights = torch.full((count,), 1000 * (weight - 1), device=device)
    waves: Tensor = Timesteps(width, flip_sin_to_cos=False, downscale_freq_shift=1)(weights)
    return waves


def as_tensor(output: Any) -> Tensor:
    """A tensor, or the first entry of an output."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def _of_rows(value: Any, rows: slice) -> Any:
    """Those rows of a tensor, and of each one in a tuple or dictionary; other things as they are."""
    if isinstance(value, tuple):
        return tuple(_of_rows(part, rows) for part in value)
    if isinstance(value, dict):
        return {name: _of_rows(part, rows) for name, part in value.items()}
    return value[rows] if isinstance(value, Tensor) else value
