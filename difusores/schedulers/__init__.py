"""Samplers with the interface of diffusers 0.42: thin shells over difusores.solvers."""

from __future__ import annotations

from difusores.schedulers.base import SchedulerMixin, SchedulerOutput
from difusores.schedulers.ddim import DDIMScheduler
from difusores.schedulers.ddpm import DDPMScheduler

__all__ = ["DDIMScheduler", "DDPMScheduler", "SchedulerMixin", "SchedulerOutput"]
