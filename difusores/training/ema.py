"""An exponential moving average of a model's weights, which samples better than the last weights do."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Keeps averaged copies of a model's parameters: ema ← d·ema + (1 - d)·parameter.

    The decay warms up, d = min(decay, (1 + n) / (10 + n)) after n updates, so that the random first weights
    are soon forgotten. Buffers are copied. `model` is the average, in eval mode, without gradients.

    Args:
        model: the model that is trained; it is copied.
        decay: in [0, 1).
    """

    def __init__(self, model: M, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the average is {decay}; allowed is 0 to below 1")
        self.decay = decay
        self.updates = 0
        self.model: M = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model`, which has the same parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged: list[Tensor] = list(self.model.parameters())
        current: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        self.updates += 1
