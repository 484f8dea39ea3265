"""The learning rate of each step, and the lines that a run prints."""

from __future__ import annotations

import math
import sys
import time

import torch
from torch import Tensor

from difusores.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine that reaches 0 after the last step; `step` counts from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class Progress:
    """Prints a line every `log_every` steps: step, mean loss, learning rate, images/s, time left.

    On a terminal the line is overwritten.
    """

    def __init__(self, config: TrainConfig, step: int) -> None:
        self.config = config
        self.losses: list[Tensor] = []
        self.since = (step, time.perf_counter())

    def report(self, step: int, loss: Tensor) -> None:
        """Take in the loss of the step that has just been done, the `step`-th.

        Raises:
            FloatingPointError: the mean loss is not finite.
        """
        config = self.config
        self.losses.append(loss)
        if step % config.log_every and step != config.steps:
            return
        mean = torch.stack(self.losses).mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean} at step {step}; try a smaller --learning-rate")
        now = time.perf_counter()
        steps_per_s = (step - self.since[0]) / (now - self.since[1])
        minutes = (config.steps - step) / steps_per_s / 60
        line = (
            f"step {step}/{config.steps}  loss {mean:.4f}  lr {learning_rate(config, step - 1):.2e}  "
            f"{steps_per_s * config.batch_size:.1f} img/s  {minutes:.1f} min left"
        )
        if sys.stdout.isatty():
            line = line.ljust(79)  # covers what a longer line before it left
        overwrite = sys.stdout.isatty() and step != config.steps
        print(line, end="\r" if overwrite else "\n", flush=True)
        self.losses.clear()
        self.since = (step, now)
