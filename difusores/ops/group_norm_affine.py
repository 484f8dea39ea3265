"""A group norm as a multiplier and an offset per image and channel, for an op that applies them as it reads.

    multiplier[n, c] = (1 + scale[n, c]) * weight[c] * rstd
    offset[n, c]     = (1 + scale[n, c]) * bias[c] + shift[n, c] - mean * multiplier[n, c]

mean and rstd = 1 / sqrt(var + eps) over each image's group of C / num_groups channels (Wu & He 2018), so that
multiplier * x + offset is the normalised x. It is read once and not written, or not read either where the
moments of its channels are known from the convolution that wrote it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difusores.ops.dispatch import LIBRARY, below_autograd, choose, needs_grad, register, straight_to_cpu
from difusores.ops.group_norm_silu import _check as check_group_norm
from difusores.ops.group_norm_silu import _row as side_by_side

LIBRARY.define(
    "group_norm_affine(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? scale, "
    "Tensor? shift, Tensor? moments=None) -> (Tensor, Tensor)"
)
register("group_norm_affine", "cpu")


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch: fp32, or fp64 for an x of that; `moments` are not read."""
    n, c = x.shape[:2]
    wide = torch.promote_types(x.dtype, torch.float32)
    per_group = c // num_groups
    grouped = x.to(wide).reshape(n, num_groups, per_group * x.shape[2:].numel())
    mean = grouped.mean(dim=2)
    var = (grouped - mean[:, :, None]).square().mean(dim=2)
    multiplier = torch.rsqrt(var + eps).repeat_interleave(per_group, dim=1)
    if weight is not None:
        multiplier = multiplier * weight.to(wide)
    if scale is not None:
        multiplier = multiplier * (1 + scale.to(wide))
    offset = -mean.repeat_interleave(per_group, dim=1) * multiplier
    if bias is not None:
        offset = offset + (bias.to(wide) if scale is None else bias.to(wide) * (1 + scale.to(wide)))
    if shift is not None:
        offset = offset + shift.to(wide)
    return multiplier, offset


LIBRARY.impl("group_norm_affine", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::group_norm_affine", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[:2], dtype=wide), x.new_empty(x.shape[:2], dtype=wide)


_OP = torch.ops.difusores.group_norm_affine.default


def supports(
    backend: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    moments: Tensor | None,
) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    dtype = x.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel takes float32, bfloat16 and float16, not {dtype}"
    for p in (weight, bias, scale, shift):
        if p is not None and p.dtype is not dtype and p.dtype is not torch.float32:
            return f"the kernel takes parameters in float32 or {dtype}, not {p.dtype}"
    if moments is not None and (moments.dtype is not torch.float64 or not moments.is_contiguous()):
        return f"the kernel takes contiguous moments in float64, not {moments.dtype}, {moments.stride()}"
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return "the kernel takes channels_last images, not other strides"
    return None


def check_moments(name: str, moments: Tensor | None, n: int, c: int, device: torch.device) -> None:
    """ValueError where they are not those of n images of c channels on this device."""
    if moments is None:
        return
    if moments.shape != (n, 2, c):
        raise ValueError(f"{name} must have shape {[n, 2, c]}, got {tuple(moments.shape)}")
    if moments.device != device:
        raise ValueError(f"{name} must be on the device of x, {device}, got {moments.device}")


def group_norm_affine(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """multiplier and offset such that multiplier * x + offset = (1 + scale) * GroupNorm(x) + shift.

    Args:
        x: [N, C, *spatial], 3-D to 5-D; fp32, bf16, fp16 (fp64 by the reference). The kernel takes 4-D
            channels_last.
        num_groups: any divisor of C.
        weight, bias: [C] in x's dtype or fp32, or None.
        eps: added to the variance.
        scale, shift: [N, C] in x's dtype or fp32, or None.
        moments: [N, 2, C] in fp64, the mean and the biased variance of each channel of x, as `winograd_conv`
            writes those of its result, or None. The kernel takes them instead of reading x.

    Returns:
        multiplier, offset: [N, C] fp32 (fp64 for an x of that), for `winograd_conv`. Where a gradient is
        needed the reference runs, which is differentiable in every tensor.

    Raises:
        ValueError: shapes or devices that do not fit, named. TypeError: x is not floating point.
    """
    if straight_to_cpu(x, weight, bias, scale, shift, moments):
        try:
            with torch._C._AutoDispatchBelowAutograd():
                multiplier, offset = _OP(x, num_groups, weight, bias, eps, scale, shift, moments)
            return multiplier, offset
        except (RuntimeError, TypeError):
            pass  # the kernel refused; what follows finds another way or the words for it
    check_group_norm(x, num_groups, weight, bias, scale, shift, None, None)
    check_moments("moments", moments, x.shape[0], x.shape[1], x.device)
    weight, bias, scale, shift = map(side_by_side, (weight, bias, scale, shift))
    backend = choose("group_norm_affine", x.device.type, supports, x, weight, bias, scale, shift, moments)
    call = (x, num_groups, weight, bias, eps, scale, shift, moments)
    if backend == "reference" or needs_grad(x, weight, bias, scale, shift, moments):
        return reference(*call)
    multiplier, offset = below_autograd(_OP, *call)
    return multiplier, offset
