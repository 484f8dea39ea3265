"""How far guidance has spread a model's output, against which the next step can scale it, in one pass.

    factor = share * std(e_c) / std(sum_k g_k * e_k) + 1 - share

for each image, with deviations over its elements: Lin et al. 2024, "Common diffusion noise schedules and
sample steps are flawed", section 3.4. c is the conditional output, g_k are the row's weights of guidance, and
`scheduler_step` takes the factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difusores.ops.dispatch import (
    LIBRARY,
    choose,
    needs_grad,
    register,
    register_triton,
    straight_to_cpu,
)
from difusores.ops.scheduler_step import G1, G3, ROW, _dense, _like

_SIGNATURE = (
    "(Tensor row, Tensor? step, Tensor e1, Tensor? e2, Tensor? e3, int conditional, float share, "
    "Tensor(a!) factor) -> ()"
)
LIBRARY.define("guidance_rescale" + _SIGNATURE)
# As for scheduler_step: a graph holds the reference, which reads the row as Python numbers, as an op.
LIBRARY.define("guidance_rescale_reference" + _SIGNATURE)
_TRITON_OP = register_triton("guidance_rescale", _SIGNATURE)
register("guidance_rescale", "cuda", "triton", "cpu")

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def reference(
    row: Tensor, step: Tensor | None, model_outputs: Sequence[Tensor | None], conditional: int, share: float
) -> Tensor:
    """The op in plain PyTorch: [B], in fp32 (fp64 for fp64 outputs)."""
    weights: list[float] = (row if step is None else row[int(step)])[G1 : G3 + 1].tolist()
    outputs = [None if e is None else _images(e) for e in model_outputs]
    told = outputs[conditional]
    assert told is not None
    mixed = torch.zeros_like(told)
    for g, output in zip(weights, outputs, strict=False):
        if output is not None and g != 0.0:
            mixed = torch.add(mixed, output, alpha=g)
    # the quotient is that of PyTorch's default, n - 1, which warns where n is 1
    ratio = told.std(dim=1, correction=0) / mixed.std(dim=1, correction=0)
    return share * ratio + (1 - share)


def _images(e: Tensor) -> Tensor:
    wide = e if e.dtype is torch.float64 else e.float()
    return wide.reshape(e.shape[0], e.shape[1:].numel())


def _registered(
    row: Tensor,
    step: Tensor | None,
    e1: Tensor,
    e2: Tensor | None,
    e3: Tensor | None,
    conditional: int,
    share: float,
    factor: Tensor,
) -> None:
    factor.copy_(reference(row, step, (e1, e2, e3), conditional, share))


LIBRARY.impl("guidance_rescale", _registered, "CompositeExplicitAutograd")
LIBRARY.impl("guidance_rescale_reference", _registered, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::guidance_rescale", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("difusores::guidance_rescale_reference", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("difusores::guidance_rescale_triton", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    row: Tensor,
    step: Tensor | None,
    e1: Tensor,
    e2: Tensor | None,
    e3: Tensor | None,
    conditional: int,
    share: float,
    factor: Tensor,
) -> None:
    return None


_OP = torch.ops.difusores.guidance_rescale.default
_REFERENCE_OP = torch.ops.difusores.guidance_rescale_reference.default
_NONE = (None, None)


def supports(backend: str, model_outputs: Sequence[Tensor]) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    for e in model_outputs:
        if e.dtype not in _KERNEL_DTYPES:
            return f"the kernel takes float32, bfloat16 and float16, not {e.dtype}"
    return None


def guidance_rescale(
    row: Tensor,
    model_outputs: Sequence[Tensor],
    share: float,
    *,
    conditional: int = -1,
    step: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The factor that brings a guided output, or a share of it, to the conditional output's deviation.

    Args:
        row: [40] float64 on the CPU, or [rows, 40] on any device with `step`: that of `scheduler_step`.
        model_outputs: one to three tensors e_k, [B, ...], of one shape; fp32, bf16, fp16 (fp64 by the
            reference). A channel slice (any batch stride) is read in place.
        share: from 0, which gives 1, to 1.
        conditional: which output is the conditional one; -1 is the last.
        step: [1] int64 on row's device, the index of the row.
        out: [B] fp32, contiguous, to write. A new tensor if None.

    Returns:
        [B] fp32 (fp64 for fp64 outputs). A kernel sums in fp32, about a mean. Where the
        mixture has no deviation this is PyTorch's quotient: infinite, or NaN where the conditional output has
        none either (an image of one element, a constant one). Differentiable: calls that need a gradient run
        the reference.

    Raises:
        ValueError: a shape, index, share or count that does not fit.
    """
    count = len(model_outputs)
    plain = -count <= conditional < count <= 3 and 0 <= share <= 1
    if plain and straight_to_cpu(row, step, *model_outputs, out):
        try:
            return _native(row, step, model_outputs, conditional % count, share, out)
        except RuntimeError:
            pass  # the kernel refused; what follows finds another way or the words for it
    _check(row, model_outputs, share, conditional, step, out)
    first = model_outputs[0]
    conditional %= count
    dtype = torch.float64 if first.dtype is torch.float64 else torch.float32
    if first.numel() == 0:
        nothing = torch.full((len(first),), torch.nan, dtype=dtype, device=first.device)
        return nothing if out is None else out.copy_(nothing)
    differentiates = needs_grad(*model_outputs)
    backend = "reference"
    if not differentiates:
        backend = choose("guidance_rescale", first.device.type, supports, model_outputs)
    if backend == "reference" and (differentiates or not torch.compiler.is_compiling()):
        result = reference(row, step, model_outputs, conditional, share)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty(len(first), dtype=dtype, device=first.device)
    if not _dense(first):
        first = first.contiguous()
    outputs = (first, *(_like(e, first) for e in model_outputs[1:]), *_NONE[count - 1 :])
    op = {"reference": _REFERENCE_OP, "triton": _TRITON_OP}.get(backend, _OP)
    op(row, step, *outputs, conditional, share, out)
    return out


def _native(
    row: Tensor,
    step: Tensor | None,
    model_outputs: Sequence[Tensor],
    conditional: int,
    share: float,
    out: Tensor | None,
) -> Tensor:
    """The kernel on operands as they are, whose own checks cost less than Python's."""
    if out is None:
        out = torch.empty(len(model_outputs[0]))
    _OP(row, step, *model_outputs, *_NONE[len(model_outputs) - 1 :], conditional, share, out)
    return out


def _check(
    row: Tensor,
    model_outputs: Sequence[Tensor],
    share: float,
    conditional: int,
    step: Tensor | None,
    out: Tensor | None,
) -> None:
    if row.dtype is not torch.float64 or row.shape[-1] != ROW or row.ndim != (1 if step is None else 2):
        raise ValueError(
            f"row must be float64 [{ROW}], or [rows, {ROW}] with step, got {tuple(row.shape)} {row.dtype}"
        )
    if not 1 <= len(model_outputs) <= 3:
        raise ValueError(f"one to three model outputs, got {len(model_outputs)}")
    first = model_outputs[0]
    for e in model_outputs:
        if e.shape != first.shape or e.device != first.device:
            raise ValueError(
                f"every model output must be {tuple(first.shape)} on {first.device}, "
                f"got {tuple(e.shape)} on {e.device}"
            )
    elsewhere = row.device.type != "cpu" and row.device != first.device
    if elsewhere or (step is not None and step.device != row.device):
        raise ValueError(
            f"row must be on the CPU or with step on the outputs' device, got it on {row.device}"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; needed is a number from 0 to 1")
    if not -len(model_outputs) <= conditional < len(model_outputs):
        raise ValueError(f"conditional is {conditional}; there are {len(model_outputs)} model outputs")
    dtype = torch.float64 if first.dtype is torch.float64 else torch.float32
    if out is not None and (out.shape, out.dtype, out.device) != (first.shape[:1], dtype, first.device):
        raise ValueError(
            f"out must have shape [B] = [{len(first)}] and be {dtype} on {first.device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
