"""One stage of any sampler as one pass over memory, from a row of float64 coefficients.

    e   = f[image] * sum_k g_k * e_k                    guidance over up to three outputs; f: 1, or given
    xh  = x + r * z                                     churn
    x0  = clamp(p_x * xh + p_e * e, lo, hi)             or clamp(., -s, s) / s with a threshold s[image]
    z*  = z  |  z * exp(nu0 + nu1 * v)  |  z * sqrt(v)  by mode 0, 1, 2 (v: learned variance)
    (y, d, u) = W . [x0, xh, e, z*, s0, s1, s2, s3, s4] an exact 0 in W means that the operand is not read
    m   = c_in * y                                      the next model input, in the model's dtype, repeated

y is the next sample, d what the solver remembers, u a second kept tensor. Every diffusion sampler in use is
a list of such rows (docs/design.md derives it); `difusores.solvers` writes them.

In fp32 the order of the sums counts: x0, z, e, slots, xh. At a high noise level x is large: it comes last, so
that one rounding is of its size and not one for each column. Where y has a slot of weight 1, that is the
sample which the step begins from, and the slots come last. x0 is what is left where x and e cancel: p_x, p_e
and the weights of xh are two fp32 numbers each, the rounded one and, first in the sum, what it leaves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from difusores import native
from difusores.ops.dispatch import (
    LIBRARY,
    choose,
    needs_grad,
    register,
    register_triton,
    status,
    straight_to_cpu,
    wanted,
    watchers,
)

G1, G2, G3, R, PX, PE, LO, HI, NU0, NU1, MODE, CIN = range(12)
"""Positions in a row before W."""
W = 12
"""Where the 3 x 9 matrix W begins, row-major over (y, d, u)."""
DRAW = 39
"""The number of this row's noise draw, which keys in-kernel noise."""
ROW = 40
"""Length of a row."""
COLUMNS = ("x0", "xh", "e", "z", "s0", "s1", "s2", "s3", "s4")
"""The operands of W, in order."""
OUTPUTS = ("y", "d", "u", "x0", "m")
"""The outputs that can be asked for."""

_SIGNATURE = (
    "(Tensor row, Tensor? step, Tensor sample, Tensor e1, Tensor? e2, Tensor? e3, Tensor? noise, "
    "Tensor? variance, Tensor? threshold, Tensor? factor, Tensor? s0, Tensor? s1, Tensor? s2, Tensor? s3, "
    "Tensor? s4, Tensor? seeds, "
    "Tensor(a!)? y, Tensor(b!)? d, Tensor(c!)? u, Tensor(d!)? x0, Tensor(e!)? m) -> ()"
)
LIBRARY.define("scheduler_step" + _SIGNATURE)
# The reference reads the row as Python numbers, which Dynamo cannot trace: a graph holds it as an op.
LIBRARY.define("scheduler_step_reference" + _SIGNATURE)
_TRITON_OP = register_triton("scheduler_step", _SIGNATURE)
register("scheduler_step", "cuda", "triton", "cpu")

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox_integers(seeds: Tensor, blocks: int, draw: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        seeds: [B] int64, one key per image (low and high 32 bits).
        blocks: number of counters (block index, block index >> 32, draw, 0).
        draw: the number of the noise draw.

    Returns:
        [B, blocks, 4] int64, each in [0, 2**32).
    """
    index = torch.arange(blocks, device=seeds.device, dtype=torch.int64)
    c = [index & _MASK, index >> 32, torch.full_like(index, draw & _MASK), torch.zeros_like(index)]
    c = [t.expand(seeds.shape[0], blocks) for t in c]
    key = [(seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]]

    def product(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
        # 32 x 32 -> 64 bits in signed int64: by 16-bit halves, so that nothing overflows.
        low, high = a & 0xFFFF, a >> 16
        partial = low * m
        middle = high * m + (partial >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (partial & 0xFFFF)

    for _ in range(10):
        hi0, lo0 = product(c[0], _PHILOX_M[0])
        hi1, lo1 = product(c[2], _PHILOX_M[1])
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [(k + w) & _MASK for k, w in zip(key, _PHILOX_W, strict=True)]
    return torch.stack(c, dim=-1)


def philox_normal(
    seeds: Tensor, shape: Sequence[int], draw: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise that depends on (image seed, draw, element) alone: not on batch, device, backend.

    Args:
        seeds: [B] int64, one per image.
        shape: [B, ...].
        draw: the number of the noise draw.
        dtype: of the result.

    Returns:
        A tensor of `shape`: element i of an image is output i % 4 of Philox counter i // 4; pairs (0, 1) and
        (2, 3) of its integers (a, b) go through Box-Muller: sqrt(-2 ln u) * (cos, sin)(2 pi t), with
        u = ((a >> 9) + 0.5) / 2**23 and t = (b >> 8) / 2**24.
    """
    per_image = math.prod(shape[1:])
    bits = philox_integers(seeds, (per_image + 3) // 4, draw)
    u = ((bits[..., 0::2] >> 9).double() + 0.5) * 2.0**-23
    angle = (bits[..., 1::2] >> 8).double() * (2.0**-24 * 2.0 * math.pi)
    radius = torch.sqrt(-2.0 * torch.log(u))
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return normal.reshape(seeds.shape[0], -1)[:, :per_image].reshape(tuple(shape)).to(dtype)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float64 else t.float()


def reference(
    row: Tensor,
    step: Tensor | None,
    sample: Tensor,
    model_outputs: Sequence[Tensor | None],
    noise: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    factor: Tensor | None,
    slots: Sequence[Tensor | None],
    seeds: Tensor | None,
) -> dict[str, Tensor]:
    """The op in plain PyTorch: all outputs of the row, unrounded, in fp32 (fp64 for an fp64 sample)."""
    coefficients: list[float] = (row if step is None else row[int(step)]).tolist()
    x = _wide(sample)
    e: Tensor | None = None
    for g, output in zip(coefficients[G1 : G3 + 1], model_outputs, strict=False):
        if output is not None and g != 0.0:
            e = g * _wide(output) if e is None else e + g * _wide(output)
    if e is None:
        e = torch.zeros_like(x)
    if factor is not None:
        e = e * _of_images(factor, x)
    z = _wide(noise) if noise is not None else None
    if z is None and seeds is not None:
        z = philox_normal(seeds, sample.shape, int(coefficients[DRAW]), x.dtype)
    xh = x
    if coefficients[R] != 0.0:
        xh = x + coefficients[R] * _required(z, "noise", "r")
    prediction = [(coefficients[PX], xh), (coefficients[PE], e)]
    x0 = _combine([*_rests(prediction), *prediction], x)
    if threshold is not None:
        s = _of_images(threshold, x)
        x0 = torch.maximum(torch.minimum(x0, s), -s) / s
    else:
        x0 = x0.clamp(coefficients[LO], coefficients[HI])
    weights = [coefficients[W + 9 * k : W + 9 * k + 9] for k in range(3)]
    scaled = z
    if coefficients[MODE] != 0.0 and any(w[3] != 0.0 for w in weights):
        v = _wide(_required(variance, "variance", "mode"))
        factor = (
            torch.exp(coefficients[NU0] + coefficients[NU1] * v)
            if coefficients[MODE] == 1.0
            else torch.sqrt(v)
        )
        scaled = _required(z, "noise", "mode") * factor
    operands = [x0, xh, e, scaled, *(None if s is None else _wide(s) for s in slots)]
    operands += [None] * (9 - len(operands))
    outputs = {"x0": x0}
    order = (0, 3, 2, 1, 4, 5, 6, 7, 8) if 1.0 in weights[0][4:] else (0, 3, 2, 4, 5, 6, 7, 8, 1)
    for name, w in zip(("y", "d", "u"), weights, strict=True):
        terms = [
            (w[j], _required(operands[j], "noise" if COLUMNS[j] == "z" else COLUMNS[j], "W"))
            for j in order
            if w[j] != 0.0
        ]
        outputs[name] = _combine([*_rests([(w[1], xh)]), *terms], x)
    outputs["m"] = coefficients[CIN] * outputs["y"]
    return outputs


def _of_images(t: Tensor, x: Tensor) -> Tensor:
    """[B] numbers, one for each image of x, to be broadcast."""
    return t.to(x.dtype).reshape(-1, *([1] * (x.ndim - 1)))


def _rests(terms: Sequence[tuple[float, Tensor]]) -> list[tuple[float, Tensor]]:
    """What rounding the coefficients to fp32 leaves of the terms; nothing in fp64."""
    return [(c - float(np.float32(c)), t) for c, t in terms if t.dtype is torch.float32]


def _combine(terms: Sequence[tuple[float, Tensor]], like: Tensor) -> Tensor:
    total: Tensor | None = None
    for c, t in terms:
        if c != 0.0:
            if total is None or total.dtype is not t.dtype:  # fp32 noise is scaled in fp32, as in diffusers
                total = c * t if total is None else total + c * t
            else:
                total = torch.add(total, t, alpha=c)  # rounds once
    return torch.zeros_like(like) if total is None else total


def _required(t: Tensor | None, name: str, by: str) -> Tensor:
    if t is None:
        raise ValueError(f"scheduler_step: this row's {by} reads {name}, which was not given")
    return t


def _registered(
    row: Tensor,
    step: Tensor | None,
    sample: Tensor,
    e1: Tensor,
    e2: Tensor | None,
    e3: Tensor | None,
    noise: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    factor: Tensor | None,
    s0: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    s3: Tensor | None,
    s4: Tensor | None,
    seeds: Tensor | None,
    y: Tensor | None,
    d: Tensor | None,
    u: Tensor | None,
    x0: Tensor | None,
    m: Tensor | None,
) -> None:
    results = reference(
        row, step, sample, (e1, e2, e3), noise, variance, threshold, factor, (s0, s1, s2, s3, s4), seeds
    )
    for name, out in zip(OUTPUTS, (y, d, u, x0, m), strict=True):
        if out is not None:
            _write(name, results[name], out)


def _write(name: str, result: Tensor, out: Tensor) -> None:
    if name == "m" and out.shape[0] != result.shape[0]:
        result = result.repeat(out.shape[0] // result.shape[0], *([1] * (result.ndim - 1)))
    out.copy_(result)


LIBRARY.impl("scheduler_step", _registered, "CompositeExplicitAutograd")
LIBRARY.impl("scheduler_step_reference", _registered, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::scheduler_step", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("difusores::scheduler_step_reference", lib=LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("difusores::scheduler_step_triton", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(*args: Tensor | None) -> None:
    return None


_OP = torch.ops.difusores.scheduler_step.default
_REFERENCE_OP = torch.ops.difusores.scheduler_step_reference.default
_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def supports(
    backend: str,
    sample: Tensor,
    tensors: Sequence[Tensor | None],
    seeds: Tensor | None,
    model_dtype: torch.dtype | None,
) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    if sample.dtype not in _KERNEL_DTYPES:
        return f"the kernel takes float32, bfloat16 and float16, not {sample.dtype}"
    for t in tensors:
        if t is not None and t.dtype not in _KERNEL_DTYPES:
            return f"the kernel takes float32, bfloat16 and float16, not {t.dtype}"
    if model_dtype is not None and model_dtype not in _KERNEL_DTYPES:
        return f"the kernel writes float32, bfloat16 and float16, not {model_dtype}"
    if seeds is not None and not sample.is_contiguous():
        return "in-kernel noise needs a contiguous sample"
    return None


def why_not_captured(sample: Tensor, seeds: Tensor | None, model_dtype: torch.dtype) -> str | None:
    """Why a CUDA graph cannot hold steps of this sample, or None."""
    call = (sample, (), seeds, model_dtype)
    if choose("scheduler_step", sample.device.type, supports, *call) != "reference":
        return None
    reasons = (
        status(name) or supports(name, *call) or f"it takes no {sample.device.type}"
        for name in ("cuda", "triton")
    )
    return f"the step's reference reads its row on the host, and has to: {'; '.join(reasons)}"


def _like(t: Tensor, sample: Tensor) -> Tensor:
    """t in the memory layout of `sample` (any batch stride); copied only where the layouts differ."""
    if t.stride()[1:] == sample.stride()[1:]:
        return t
    return torch.empty_like(sample, dtype=t.dtype).copy_(t)


def scheduler_step(
    row: Tensor,
    sample: Tensor,
    model_outputs: Sequence[Tensor],
    slots: Sequence[Tensor | None] = (),
    *,
    noise: Tensor | None = None,
    variance: Tensor | None = None,
    threshold: Tensor | None = None,
    factor: Tensor | None = None,
    outputs: Sequence[str] = ("y",),
    out: Sequence[Tensor] | None = None,
    model_dtype: torch.dtype | None = None,
    model_repeats: int = 1,
    step: Tensor | None = None,
    seeds: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One stage of a sampler: guidance, prediction, clipping, noise, history, next model input, in one pass.

    Args:
        row: [40] float64 on the CPU (layout: module constants), or [rows, 40] on any device with `step`.
        sample: [B, ...], x; fp32, bf16, fp16 (fp64 by the reference), any dense layout, which the outputs
            keep.
        model_outputs: one to three tensors e_k shaped like sample; a channel slice (any batch stride) is
            read in place.
        slots: up to five tensors s_k shaped like sample, or None.
        noise: z, shaped like sample. seeds: [B] int64 instead, for in-kernel Philox noise keyed by (seed,
            row[39], element).
        variance: v, shaped like sample (the other half of the model's channels).
        threshold: [B], clips x0 to [-s, s] and divides it by s; then lo and hi are not used.
        factor: [B], of the guided output, see `guidance_rescale`; a 1 changes no bit. The learned variance is
            as it was.
        outputs: names among "y", "d", "u", "x0", "m".
        out: the tensors to write, in the order of `outputs`; must not overlap any input. New ones if None.
        model_dtype: dtype of "m" (sample's if None). model_repeats: how often "m" is repeated along the
            batch.
        step: [1] int64 on row's device, the index of the row.

    Returns:
        The tensors named in `outputs`, in that order, in sample's dtype ("m": model_dtype). Inputs are not
        changed.
        Arithmetic in fp32 (fp64 for an fp64 sample). Differentiable: calls that need a gradient run the
        reference.

    Raises:
        ValueError: a shape, name or count that does not fit. An operand that the row reads and was not given:
            ValueError from the reference, RuntimeError from a kernel.
    """
    if sample.dtype in _KERNEL_DTYPES and straight_to_cpu(
        sample, *model_outputs, *slots, row, noise, variance, threshold, factor, step, seeds
    ):
        try:
            return _native(
                row,
                sample,
                model_outputs,
                slots,
                noise,
                variance,
                threshold,
                factor,
                step,
                seeds,
                outputs,
                out,
                model_dtype,
                model_repeats,
            )
        except (RuntimeError, ValueError):
            pass  # the kernel refused; what follows finds another way or the words for it
    operands = (row, sample, model_outputs, slots, noise, variance, threshold, factor, step, seeds)
    return _general(operands, outputs, out, model_dtype, model_repeats)


_Operands = tuple[
    Tensor,  # row
    Tensor,  # sample
    Sequence[Tensor],  # model_outputs
    Sequence[Tensor | None],  # slots
    Tensor | None,  # noise
    Tensor | None,  # variance
    Tensor | None,  # threshold
    Tensor | None,  # factor
    Tensor | None,  # step
    Tensor | None,  # seeds
]


_NO_SLOTS = (None,) * 5


def _native(
    row: Tensor,
    sample: Tensor,
    model_outputs: Sequence[Tensor],
    slots: Sequence[Tensor | None],
    noise: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    factor: Tensor | None,
    step: Tensor | None,
    seeds: Tensor | None,
    outputs: Sequence[str],
    out: Sequence[Tensor] | None,
    model_dtype: torch.dtype | None,
    repeats: int,
) -> tuple[Tensor, ...]:
    """The kernel on operands as they are: at a small size, looking at them costs more than the step."""
    given: tuple[Tensor | None, ...] = (*model_outputs, *_NO_SLOTS[len(model_outputs) : 3])
    e1, e2, e3 = given
    s0, s1, s2, s3, s4 = (*slots, *_NO_SLOTS[len(slots) :]) if slots else _NO_SLOTS
    if out is None:
        out = _new_outputs(sample, outputs, model_dtype, repeats)
    elif not all(t.is_cpu for t in out):
        raise ValueError("see _check")
    if noise is not None and seeds is not None:
        raise ValueError("see _check")
    places: list[Tensor | None] = [None] * len(OUTPUTS)
    for name, t in zip(outputs, out, strict=True):
        place = OUTPUTS.index(name)
        if places[place] is not None:
            raise ValueError("see _check")
        places[place] = t
    call = (row, step, sample, e1, e2, e3, noise, variance, threshold, factor, s0, s1, s2, s3, s4, seeds)
    _OP(*call, *places)
    return tuple(out)


def shortcut() -> Any:
    """The compiled module, whose functions go around the dispatcher; None if it is missing or code is traced.

    The dispatcher would take longer than the kernel at the size of a latent. Results lie in memory that
    dropped results of the same size have left. All functions return None where this way is not open: somebody
    watches, or the tensors are not plain ones on the CPU, of one shape and with the model output in the
    sample's dtype.

    `plain_step(row, sample, model_output, noise, slots, outputs, places)` is `scheduler_step` for one model
    output: the results and what the slots hold afterwards. row is no negated view, or the bytes of its
    numbers; outputs: positions in OUTPUTS, without "m"; places: positions in (*results,
    sample, noise, *slots) of what the slots hold afterwards.

    `take_stage(run, options, model_output, sample, noise)` is the same for the next stage of a run of the
    schedulers, in C from end to end: in Python, finding the stage takes as long as carrying it out. It moves
    the run on and returns the results that `step` does; or None, and the run stays; or what the stage draws,
    if it draws noise and none was given.
    """
    # not `is_compiling`, which takes longer: other tracers than Dynamo are modes, and those are looked for
    return None if is_dynamo_compiling() else _without_dispatcher()


@functools.cache
def _without_dispatcher() -> Any:
    """The compiled module, told who may be watching; None if it is not there."""
    if native.status("cpu") is not None:
        return None
    from difusores import _C

    wanted()  # looks at the environment, which that way does not
    _C.watch(*watchers())
    return _C


def _general(
    operands: _Operands,
    outputs: Sequence[str],
    out: Sequence[Tensor] | None,
    model_dtype: torch.dtype | None,
    repeats: int,
) -> tuple[Tensor, ...]:
    """Any backend, layout and dtype; refuses in words what no backend takes."""
    row, sample, model_outputs, slots, noise, variance, threshold, factor, step, seeds = operands
    of_images = (threshold, factor)
    needed = (*model_outputs, *slots, noise, variance)
    _check(row, sample, model_outputs, slots, noise, variance, *of_images, outputs, out, repeats, step, seeds)
    differentiates = needs_grad(sample, *needed, *of_images)
    backend = "reference"
    if not differentiates:
        backend = choose("scheduler_step", sample.device.type, supports, sample, needed, seeds, model_dtype)
    if not _dense(sample):
        sample = sample.contiguous()
    if out is None:
        out = _new_outputs(sample, outputs, model_dtype, repeats)
    if backend == "reference" and (differentiates or not torch.compiler.is_compiling()):
        results = reference(
            *(row, step, sample, model_outputs, noise, variance, threshold, factor, slots, seeds)
        )
        for name, target in zip(outputs, out, strict=True):
            _write(name, results[name], target)
        return tuple(out)
    op = {"reference": _REFERENCE_OP, "triton": _TRITON_OP}.get(backend, _OP)
    e = [_like(t, sample) for t in model_outputs]
    s = [None if t is None else _like(t, sample) for t in slots]
    noise, variance = (None if t is None else _like(t, sample) for t in (noise, variance))
    threshold, factor = (None if t is None else t.float().contiguous() for t in of_images)
    strides = (sample.shape[1:].numel(), *sample.stride()[1:])
    new = [
        t if t.stride() == strides else torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)
        for t in out
    ]
    written = dict(zip(outputs, new, strict=True))
    op(
        *(row, step, sample, *e, *_NO_SLOTS[: 3 - len(e)], noise, variance, threshold, factor),
        *(*s, *_NO_SLOTS[: 5 - len(s)], seeds),
        *(written.get(name) for name in OUTPUTS),
    )
    for given, result in zip(out, new, strict=True):
        if given is not result:
            given.copy_(result)
    return tuple(out)


def _dense(t: Tensor) -> bool:
    """Whether each image is one run of memory, in whatever order of dimensions."""
    covered = 1
    for stride, size in () if t.is_contiguous() else sorted(zip(t.stride()[1:], t.shape[1:], strict=True)):
        if size > 1:
            if stride != covered:
                return False
            covered *= size
    return True


def _new_outputs(
    sample: Tensor, outputs: Sequence[str], model_dtype: torch.dtype | None, repeats: int
) -> list[Tensor]:
    return [
        _empty_model_input(sample, model_dtype or sample.dtype, repeats)
        if name == "m"
        else torch.empty_like(sample)
        for name in outputs
    ]


def _empty_model_input(sample: Tensor, dtype: torch.dtype, repeats: int) -> Tensor:
    if repeats == 1:
        return torch.empty_like(sample, dtype=dtype)
    shape = (sample.shape[0] * repeats, *sample.shape[1:])
    return torch.empty_strided(shape, sample.stride(), dtype=dtype, device=sample.device)


def _check(
    row: Tensor,
    sample: Tensor,
    model_outputs: Sequence[Tensor],
    slots: Sequence[Tensor | None],
    noise: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    factor: Tensor | None,
    outputs: Sequence[str],
    out: Sequence[Tensor] | None,
    repeats: int,
    step: Tensor | None,
    seeds: Tensor | None,
) -> None:
    if row.dtype is not torch.float64 or row.shape[-1] != ROW or row.ndim != (1 if step is None else 2):
        raise ValueError(
            f"row must be float64 [{ROW}], or [rows, {ROW}] with step, got {tuple(row.shape)} {row.dtype}"
        )
    elsewhere = row.device.type != "cpu" and row.device != sample.device
    if elsewhere or (step is not None and step.device != row.device):
        raise ValueError(
            f"row must be on the CPU or with step on the sample's device, got it on {row.device}"
        )
    if not 1 <= len(model_outputs) <= 3 or len(slots) > 5:
        raise ValueError(
            f"one to three model outputs and at most five slots, got {len(model_outputs)} and {len(slots)}"
        )
    shape = sample.shape
    for t in (*model_outputs, *slots, noise, variance):
        if t is not None and t.shape != shape:
            raise ValueError(
                f"every operand must have the sample's shape {tuple(shape)}, got {tuple(t.shape)}"
            )
    for name, t in (("threshold", threshold), ("factor", factor), ("seeds", seeds)):
        if t is not None and t.shape != shape[:1]:
            raise ValueError(f"{name} must have shape [B] = [{shape[0]}], got {tuple(t.shape)}")
    for t in (*model_outputs, *slots, noise, variance, threshold, factor, seeds):
        if t is not None and t.device != sample.device:
            raise ValueError(
                f"every operand must be on the sample's device, {sample.device}, got one on {t.device}"
            )
    if noise is not None and seeds is not None:
        raise ValueError("noise is given, or seeds for in-kernel noise, not both")
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"unknown output {name!r}; the outputs are {', '.join(OUTPUTS)}")
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"an output can be asked for once, got {', '.join(outputs)}")
    if out is None:
        return
    if len(out) != len(outputs):
        raise ValueError(f"out must hold a tensor for each of {', '.join(outputs)}, got {len(out)}")
    for name, t in zip(outputs, out, strict=True):
        expected = (shape[0] * repeats, *shape[1:]) if name == "m" else shape
        if t.shape != expected or t.device != sample.device:
            raise ValueError(
                f"out for {name} must have shape {tuple(expected)} on {sample.device}, "
                f"got {tuple(t.shape)} on {t.device}"
            )
