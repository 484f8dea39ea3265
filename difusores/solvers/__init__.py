"""Samplers as rows of coefficients.

A sampler is a function that yields one `Stage` per model call, in float64, from schedule and options alone.
"""

from __future__ import annotations

from difusores.plan import Noise, Plan, Stage, Threshold
from difusores.solvers.common import PREDICTION_TYPES, Prediction, forward_process, mix, raise_noise
from difusores.solvers.discrete import (
    VARIANCE_TYPES,
    ddim,
    ddim_inverse,
    ddim_variance,
    ddpm,
    ddpm_variances,
    raised,
    repaint,
)
from difusores.solvers.multistep import ipndm, pndm
from difusores.solvers.sigma import euler, euler_ancestral, heun, kdpm2, kdpm2_ancestral, lms

__all__ = [
    "PREDICTION_TYPES",
    "VARIANCE_TYPES",
    "Noise",
    "Plan",
    "Prediction",
    "Stage",
    "Threshold",
    "ddim",
    "ddim_inverse",
    "ddim_variance",
    "ddpm",
    "ddpm_variances",
    "euler",
    "euler_ancestral",
    "forward_process",
    "heun",
    "ipndm",
    "kdpm2",
    "kdpm2_ancestral",
    "lms",
    "mix",
    "pndm",
    "raise_noise",
    "raised",
    "repaint",
]
