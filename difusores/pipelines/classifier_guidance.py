"""Guidance by a classifier of noisy images (Dhariwal & Nichol 2021, "Diffusion models beat GANs", sec. 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difusores.ops.scheduler_step import COLUMNS, MODE, NU0, NU1, W
from difusores.plan import Plan, Stage
from difusores.sampling import split_output
from difusores.solvers.discrete import ddpm_variances

Model = Callable[[Tensor, Tensor], Tensor]


def log_gradient(classifier: Any, x: Tensor, timestep: Tensor | float, labels: Tensor) -> Tensor:
    """The gradient of log p(label | x) in x, for each image by itself.

    Args:
        classifier: classifier(x, timestep) -> logits, [N, classes].
        x: [N, C, H, W], noisy images as the classifier was trained on.
        labels: [N] int64.

    Returns:
        Like x, at least fp32.
    """
    with torch.enable_grad():
        x = x.detach().to(classifier.dtype).requires_grad_()
        log_p = classifier(x, timestep).float().log_softmax(dim=-1)
        (gradient,) = torch.autograd.grad(log_p.gather(1, labels[:, None]).sum(), x)
    return gradient.float()


class Guide(NamedTuple):
    """A classifier with what it is asked for in one call.

    Attributes:
        classifier: see `log_gradient`.
        labels: [N] int64.
        scale: factor of the gradient, s; p(label | x) is raised to this power.
    """

    classifier: Any
    labels: Tensor
    scale: float

    def __call__(self, x: Tensor, timestep: Tensor | float) -> Tensor:
        """The scaled gradient, like x but at least fp32."""
        return self.scale * log_gradient(self.classifier, x, timestep, self.labels)


class MeanShift:
    """Guidance of ancestral sampling: the mean of each step moves by its variance times the scaled gradient.

    An object serves one run of the plan: `model` in the model's place, `shift` for what the step adds.

    Args:
        guide: gives the gradient.
        plan: of a DDPM scheduler.
        scheduler: that one.
        model: the network; its input holds `copies` of the batch, the conditional one first.
    """

    def __init__(self, guide: Guide, plan: Plan, scheduler: Any, model: Model, copies: int) -> None:
        self._guide, self._model, self._copies = guide, model, copies
        self._stages = plan.stages
        self._fixed_small = scheduler.variance_type.startswith("fixed_small")
        levels = [float(scheduler.alphas_cumprod[int(stage.time)]) for stage in plan.stages[-2:]]
        # the step to the image itself has no variance: it takes that of the one before, as the authors do
        self._last = ddpm_variances(*levels)[0] if len(levels) > 1 else ddpm_variances(levels[0], 1.0)[1]
        self._calls = 0
        self._shift: Tensor | None = None

    def model(self, x: Tensor, time: Tensor) -> Tensor:
        """What the network gives, unchanged."""
        output = self._model(x, time)
        stage, last = self._stages[self._calls], self._calls == len(self._stages) - 1
        self._calls += 1
        batch = x[: len(x) // self._copies]
        _, learned = split_output(output, batch.shape, stage.row[MODE] != 0, self._copies)
        self._shift = self._variance(stage, last, learned) * self._guide(batch, time)
        return output

    def shift(self) -> Tensor:
        """That of the step whose model call came last."""
        assert self._shift is not None
        return self._shift

    def _variance(self, stage: Stage, last: bool, learned: Tensor | None) -> Tensor | float:
        row = stage.row
        if row[MODE] == 2:
            assert learned is not None
            return learned.float()
        if row[MODE] == 1:
            assert learned is not None
            low, high = 2 * (row[NU0] - row[NU1]), 2 * (row[NU0] + row[NU1])
            low = math.log(self._last) if last else low
            return ((high + low) / 2 + (high - low) / 2 * learned.float()).exp()
        if not last:
            return row[W + COLUMNS.index("z")] ** 2
        return 0.0 if self._fixed_small else self._last


class NoiseShift:
    """Guidance of other samplers: s · √(1 − ᾱ) · gradient is taken from the predicted noise (algorithm 2).

    An object serves one run of the plan: `model` in the model's place, with `weights`. The shift is linear,
    and the fused step adds it as one part of guidance more, except where x0 is clamped before.

    Args:
        guide: gives the gradient.
        plan: for training steps; its rows do not limit x0.
        scheduler: the plan's.
        model: the network; its input holds a copy of the batch for each weight.
        weights: of classifier-free guidance, (1.0,) for none.
        clip: x0 is clamped to [-clip, clip] before the shift; None leaves it.

    Raises:
        ValueError: a plan for noise levels or flows, or one that begins without any signal.
    """

    def __init__(
        self,
        guide: Guide,
        plan: Plan,
        scheduler: Any,
        model: Model,
        weights: tuple[float, ...],
        clip: float | None,
    ) -> None:
        if not plan.betas or plan.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"guidance by a classifier needs a scheduler for training steps, and {plan.sampler} is none"
            )
        self._guide, self._model, self._weights, self._clip = guide, model, weights, clip
        self._kind = plan.prediction_type
        self.weights: tuple[float, ...] | None = (*weights, 1.0) if clip is None else None
        # where samples are x0 + sigma * noise, the model is given them times c_in, which is then alpha
        self._alphas = [
            stage.c_in if stage.c_in != 1 else math.sqrt(float(scheduler.alphas_cumprod[int(stage.time)]))
            for stage in plan.stages
            if stage.calls_model
        ]
        if min(self._alphas) <= 0:
            raise ValueError(
                "guidance by a classifier needs some signal at every step, and this run begins at a zero "
                "signal-to-noise ratio (rescale_betas_zero_snr)"
            )
        self._calls = 0

    def model(self, x: Tensor, time: Tensor) -> Tensor:
        """What the network gives, and the shift as one part more; or mixed and shifted, where x0 is clamped.
        A learned variance stays as it is.
        """
        alpha = self._alphas[self._calls]
        sigma = math.sqrt(1 - alpha * alpha)
        self._calls += 1
        if self._clip is not None:
            return self._clamped(x, time, alpha, sigma, self._clip)
        batch = x[: len(x) // (len(self._weights) + 1)]
        output = self._model(x[: len(x) - len(batch)], time)
        factor = {"epsilon": -sigma, "sample": sigma * sigma / alpha, "v_prediction": -sigma / alpha}[
            self._kind
        ]
        shift = torch.zeros_like(output[: len(batch)])  # of a learned variance there is none
        shift[:, : x.shape[1]] = factor * self._guide(batch, time)
        return torch.cat((output, shift))

    def _clamped(self, x: Tensor, time: Tensor, alpha: float, sigma: float, clip: float) -> Tensor:
        """Mixed, x0 clamped, and shifted."""
        copies = len(self._weights)
        output = self._model(torch.cat((x,) * copies) if copies > 1 else x, time)
        parts, _ = split_output(output, x.shape, False, copies)
        wide = x.float()
        e = sum((w * part.float() for w, part in zip(self._weights, parts, strict=True)), torch.zeros(()))
        if self._kind == "epsilon":
            x0 = (wide - sigma * e) / alpha
        else:
            x0 = e if self._kind == "sample" else alpha * wide - sigma * e
        x0 = x0.clamp(-clip, clip) + sigma * sigma / alpha * self._guide(x, time)
        if self._kind != "sample":
            noise = (wide - alpha * x0) / sigma
            x0 = noise if self._kind == "epsilon" else alpha * noise - sigma * x0
        return torch.cat((x0.to(output.dtype), output[: len(x), x.shape[1] :]), dim=1)
