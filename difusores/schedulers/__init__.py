"""Samplers with the interface of diffusers 0.42: thin shells over difusores.solvers."""

from __future__ import annotations

from difusores.schedulers.base import SchedulerMixin, SchedulerOutput
from difusores.schedulers.ddim import DDIMScheduler
from difusores.schedulers.ddpm import DDPMScheduler
from difusores.schedulers.multistep import IPNDMScheduler, PNDMScheduler
from difusores.schedulers.sigma import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SchedulerMixin",
    "SchedulerOutput",
]
