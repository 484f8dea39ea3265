"""Samplers with the interface of diffusers 0.42: thin shells over difusores.solvers."""

from __future__ import annotations

from difusores.schedulers.base import SchedulerMixin, SchedulerOutput
from difusores.schedulers.brownian import CosineDPMSolverMultistepScheduler, DPMSolverSDEScheduler
from difusores.schedulers.consistency import CMStochasticIterativeScheduler, LCMScheduler, TCDScheduler
from difusores.schedulers.ddim import DDIMInverseScheduler, DDIMParallelScheduler, DDIMScheduler
from difusores.schedulers.ddpm import DDPMParallelScheduler, DDPMScheduler
from difusores.schedulers.dpm import (
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
)
from difusores.schedulers.edm import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from difusores.schedulers.flow import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from difusores.schedulers.multistep import DEISMultistepScheduler, IPNDMScheduler, PNDMScheduler
from difusores.schedulers.repaint import RePaintScheduler
from difusores.schedulers.sasolver import SASolverScheduler
from difusores.schedulers.score import KarrasVeScheduler, ScoreSdeVeScheduler, ScoreSdeVpScheduler
from difusores.schedulers.sigma import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
)
from difusores.schedulers.twostage import (
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from difusores.schedulers.unclip import UnCLIPScheduler
from difusores.schedulers.unipc import UniPCMultistepScheduler

__all__ = [
    "CMStochasticIterativeScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KarrasVeScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "SchedulerMixin",
    "SchedulerOutput",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
]
