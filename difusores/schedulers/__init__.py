"""Samplers with the interface of diffusers 0.42: thin shells over difusores.solvers."""

from __future__ import annotations

from difusores.schedulers.base import SchedulerMixin, SchedulerOutput
from difusores.schedulers.ddim import DDIMInverseScheduler, DDIMParallelScheduler, DDIMScheduler
from difusores.schedulers.ddpm import DDPMParallelScheduler, DDPMScheduler
from difusores.schedulers.multistep import IPNDMScheduler, PNDMScheduler
from difusores.schedulers.sigma import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
from difusores.schedulers.unclip import UnCLIPScheduler

__all__ = [
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
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
    "UnCLIPScheduler",
]
