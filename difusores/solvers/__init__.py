"""Samplers as rows of coefficients.

A sampler is a function that yields one `Stage` per model call, in float64, from schedule and options alone.
"""

from __future__ import annotations

from difusores.plan import Noise, Plan, Stage, Threshold
from difusores.solvers.common import (
    PREDICTION_TYPES,
    Preconditioned,
    Prediction,
    forward_process,
    mix,
    raise_noise,
)
from difusores.solvers.consistency import boundary_scalings, consistency, lcm, lcm_scalings, tcd
from difusores.solvers.discrete import (
    RAISED_BY,
    VARIANCE_TYPES,
    ddim,
    ddim_inverse,
    ddim_variance,
    ddpm,
    ddpm_variances,
    log_variance_between,
    raised,
    repaint,
)
from difusores.solvers.dpm import (
    DPM_ALGORITHMS,
    DPM_TYPES,
    dpm_multistep,
    dpm_sde,
    dpm_singlestep,
    singlestep_orders,
)
from difusores.solvers.flow import flow_euler, flow_heun, flow_renoised
from difusores.solvers.multistep import deis, ipndm, pndm
from difusores.solvers.sasolver import sasolver
from difusores.solvers.score import (
    ended,
    karras_ve,
    karras_ve_churn,
    karras_ve_correct,
    karras_ve_step,
    ve_predictor,
    vp_predictor,
)
from difusores.solvers.sigma import (
    euler,
    euler_ancestral,
    heun,
    kdpm2,
    kdpm2_ancestral,
    lagrange_integrals,
    lms,
)
from difusores.solvers.unipc import unipc

__all__ = [
    "DPM_ALGORITHMS",
    "DPM_TYPES",
    "PREDICTION_TYPES",
    "RAISED_BY",
    "VARIANCE_TYPES",
    "Noise",
    "Plan",
    "Preconditioned",
    "Prediction",
    "Stage",
    "Threshold",
    "boundary_scalings",
    "consistency",
    "ddim",
    "ddim_inverse",
    "ddim_variance",
    "ddpm",
    "ddpm_variances",
    "deis",
    "dpm_multistep",
    "dpm_sde",
    "dpm_singlestep",
    "ended",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_heun",
    "flow_renoised",
    "forward_process",
    "heun",
    "ipndm",
    "karras_ve",
    "karras_ve_churn",
    "karras_ve_correct",
    "karras_ve_step",
    "kdpm2",
    "kdpm2_ancestral",
    "lagrange_integrals",
    "lcm",
    "lcm_scalings",
    "lms",
    "log_variance_between",
    "mix",
    "pndm",
    "raise_noise",
    "raised",
    "repaint",
    "sasolver",
    "singlestep_orders",
    "tcd",
    "unipc",
    "ve_predictor",
    "vp_predictor",
]
