"""Convolution as one matrix product, with a bias and a residual: what Winograd's algorithm does not take.

    y[n, o, p] = sum over taps t and channels c of weight[o, c, t] * x[n, c, p * stride + t - padding]
                 + bias[o] + residual[n, o, p]

A linear layer is a 1x1 convolution of rows. An output's bits depend on its inputs alone: not on the batch and
not on the number of threads, neither of which libraries promise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores.ops.dispatch import LIBRARY, below_autograd, choose, needs_grad, register

LIBRARY.define(
    "gemm_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int stride_h, int stride_w, "
    "int padding_h, int padding_w, Tensor packed) -> Tensor"
)
register("gemm_conv", "cpu")

LANES = 16  # output channels are computed in multiples of it
COLUMNS = 64  # output channels of a panel


def pack_weight(weight: Tensor) -> Tensor:
    """The weight as the kernel reads it: panels of output channels, each [taps, channels in, channels out].

    The tensor is read as it is: make it anew when `weight` changes, and do not save it: its layout is that
    of this version.

    Args:
        weight: [O, C, kh, kw] fp32.

    Returns:
        [kh * kw * C * O], O rounded up to a multiple of 16.

    Raises:
        ValueError: another shape or dtype.
    """
    if weight.ndim != 4 or weight.dtype is not torch.float32:
        raise ValueError(f"weight must be float32 [O, C, kh, kw], got {weight.dtype} {tuple(weight.shape)}")
    columns = weight.detach().permute(2, 3, 1, 0).flatten(0, 2)
    columns = F.pad(columns, (0, -weight.shape[0] % LANES))
    return torch.cat([panel.flatten() for panel in columns.split(COLUMNS, dim=1)])


def packed_numbers(weight: Tensor) -> int:
    """Elements of `pack_weight(weight)`."""
    return weight[0].numel() * -(-weight.shape[0] // LANES) * LANES


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride_h: int,
    stride_w: int,
    padding_h: int,
    padding_w: int,
    packed: Tensor,
) -> Tensor:
    """The op in plain PyTorch; `packed` is not read."""
    y = F.conv2d(x, weight, bias, (stride_h, stride_w), (padding_h, padding_w))
    y = y if residual is None else y + residual
    return y.contiguous(memory_format=torch.channels_last)


LIBRARY.impl("gemm_conv", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::gemm_conv", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride_h: int,
    stride_w: int,
    padding_h: int,
    padding_w: int,
    packed: Tensor,
) -> Tensor:
    height = (x.shape[2] + 2 * padding_h - weight.shape[2]) // stride_h + 1
    width = (x.shape[3] + 2 * padding_w - weight.shape[3]) // stride_w + 1
    shape = (x.shape[0], weight.shape[0], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_OP = torch.ops.difusores.gemm_conv.default


def supports(
    backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    for t in (x, weight, bias, residual):
        if t is not None and t.dtype is not torch.float32:
            return f"the kernel takes float32, not {t.dtype}"
    return None


def gemm_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    packed: Tensor | None = None,
) -> Tensor:
    """y = conv(x, weight) + bias + residual, channels_last, to which x and residual are copied if need be.

    Args:
        x: [N, C, H, W]; the kernel takes fp32 on the CPU, all else goes to `F.conv2d`.
        weight: [O, C, kh, kw].
        bias: [O] or None.
        residual: like y, or None.
        stride, padding: down and across; what is outside the image is zero.
        packed: `pack_weight(weight)`; made anew in the call if None.

    Returns:
        y [N, O, H', W'] in x's dtype. Where a gradient is needed the reference runs, and the call is
        differentiable in every tensor but `packed`.

    Raises:
        ValueError: shapes that do not fit, named.
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            "x must be [N, C, H, W] and weight [O, C, kh, kw], "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    sizes = [(x.shape[2 + d] + 2 * padding[d] - weight.shape[2 + d]) // max(stride[d], 1) + 1 for d in (0, 1)]
    if min(*stride, *sizes) < 1 or min(padding) < 0:
        raise ValueError(
            f"stride {stride}, padding {padding} and a kernel of {tuple(weight.shape[2:])} "
            f"leave nothing of an image of {tuple(x.shape[2:])}"
        )
    shape = (x.shape[0], weight.shape[0], *sizes)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [O] = [{weight.shape[0]}], got {tuple(bias.shape)}")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must have y's shape {shape}, got {tuple(residual.shape)}")
    numbers = packed_numbers(weight)
    if packed is not None and packed.shape != (numbers,):
        raise ValueError(f"packed must be pack_weight(weight), [{numbers}], got {tuple(packed.shape)}")
    geometry = (*stride, *padding)
    tensors = (x, weight, bias, residual)
    nothing = x.new_empty(0)
    if needs_grad(*tensors):
        return reference(*tensors, *geometry, nothing)
    backend = choose("gemm_conv", x.device.type, supports, *tensors)
    if backend == "reference":
        return reference(*tensors, *geometry, nothing)
    if packed is None:
        packed = pack_weight(weight)
    bias = bias if bias is None else bias.contiguous()
    x = x.contiguous(memory_format=torch.channels_last)
    residual = residual if residual is None else residual.contiguous(memory_format=torch.channels_last)
    y: Tensor = below_autograd(_OP, x, weight, bias, residual, *geometry, packed)
    return y
