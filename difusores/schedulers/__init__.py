"""Samplers with the interface of diffusers 0.42: thin shells over difusores.solvers."""

from __future__ import annotations

from difusores.schedulers.base import SchedulerMixin, SchedulerOutput
from difusores.schedulers.consistency import CMStochasticIterativeScheduler, LCMScheduler, TCDScheduler
from difusores.schedulers.ddim import DDIMInverseScheduler, DDIMParallelScheduler, DDIMScheduler
from difusores.schedulers.ddpm import DDPMParallelScheduler, DDPMScheduler
from difusores.schedulers.dpm import (
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
)
from difusores.schedulers.flow import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from difusores.schedulers.multistep import DEISMultistepScheduler, IPNDMScheduler, PNDMScheduler
from difusores.schedulers.repaint import RePaintScheduler
from difusores.schedulers.sasolver import SASolverScheduler
from difusores.schedulers.sigma import (
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
)
from difusores.schedulers.unclip import UnCLIPScheduler
from difusores.schedulers.unipc import UniPCMultistepScheduler

__all__ = [
    "CMStochasticIterativeScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "SchedulerMixin",
    "SchedulerOutput",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
]
