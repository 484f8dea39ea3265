"""The fused operations, each with a pure-PyTorch reference and the kernels that this machine offers.

`use_backend` chooses an implementation by name, `availability` says what there is.
"""

from difusores import native
from difusores.ops.attention import attention
from difusores.ops.bias_residual import bias_residual
from difusores.ops.cat_channels import cat_channels
from difusores.ops.dispatch import BackendUnavailable, availability, use_backend
from difusores.ops.geglu import geglu
from difusores.ops.gemm_conv import gemm_conv
from difusores.ops.group_norm_affine import group_norm_affine
from difusores.ops.group_norm_silu import group_norm_silu
from difusores.ops.guidance_rescale import guidance_rescale
from difusores.ops.layer_norm import layer_norm
from difusores.ops.linear import linear
from difusores.ops.scheduler_step import scheduler_step
from difusores.ops.winograd_conv import winograd_conv

native.load()

__all__ = [
    "BackendUnavailable",
    "attention",
    "availability",
    "bias_residual",
    "cat_channels",
    "geglu",
    "gemm_conv",
    "group_norm_affine",
    "group_norm_silu",
    "guidance_rescale",
    "layer_norm",
    "linear",
    "scheduler_step",
    "use_backend",
    "winograd_conv",
]
