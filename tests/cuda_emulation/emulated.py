"""Runs the CUDA kernels' own source on the CPU: compiled behind emulation.h, called with torch's tensors.

Each op's library is compiled once and kept under build/, named by what went into it. A call runs under three
schedules of the threads and asserts that they give the same bits. `SANITIZE=1` (with libasan preloaded, see
test_emulation.py) compiles with the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCHEDULES = ("in order", "reversed", "random")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
FLAGS = ("-std=c++20", "-fPIC", "-shared", "-fno-strict-aliasing", "-fno-gnu-unique", *WARNINGS)
SANITIZE = os.environ.get("SANITIZE") == "1"
SANITIZERS = (
    "-g1",
    "-fsanitize=address,signed-integer-overflow,shift,bounds,alignment",
    "-fno-sanitize-recover=all",
)


def why_not() -> str | None:
    """None if kernels can be emulated on this machine, else the reason in words."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the emulation of CUDA needs an x86-64 processor"
    return None if shutil.which("g++") else "the emulation of CUDA needs g++"


@functools.cache
def library(op: str, change: tuple[str, str] | None = None) -> ctypes.CDLL:
    """The compiled test library of an op.

    change: text of the kernel's source, or of what all kernels share, and what takes its place, to see
        whether the tests notice.
    """
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cuh")), ROOT / "csrc" / "kernels.h"]
    ours = [*sorted(HERE.glob("*.h")), HERE / f"{op}.cpp"]
    flags = [*FLAGS, *(SANITIZERS if SANITIZE else ()), *(["-DDIFUSORES_FAULTY"] if change else [])]
    flags.append("-O0" if change or SANITIZE else "-O1")  # few cases follow: compiling would take longer
    texts = {path.relative_to(ROOT / "csrc"): path.read_text(encoding="utf-8") for path in sources}
    if change is not None:
        of_op = (path for path in texts if path.name.startswith((op, "common")))
        found = [path for path in of_op if change[0] in texts[path]]
        # no assertion, which would pass for a fault that was noticed
        if len(found) != 1 or texts[found[0]].count(change[0]) != 1:
            raise RuntimeError(f"{change[0]!r} must stand once")
        texts[found[0]] = texts[found[0]].replace(*change)
    key = "\n".join([*flags, *texts.values(), *(path.read_text(encoding="utf-8") for path in ours)])
    folder = ROOT / "build" / "cuda_emulation" / hashlib.sha256(key.encode()).hexdigest()[:16]
    target = folder / f"{op}.so"
    if not target.is_file():
        for path, text in texts.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        include = (f"-I{folder}", f"-I{HERE}", "-include", _precompiled(tuple(flags)))
        _compile(target, *flags, *include, ours[-1])
    loaded = ctypes.CDLL(str(target))
    loaded.launched_kernels.restype = ctypes.c_char_p
    return loaded


@functools.cache
def _precompiled(flags: tuple[str, ...]) -> Path:
    """A header that includes emulation.h, precompiled: half of what a library takes to compile."""
    header = HERE / "emulation.h"
    key = "\n".join([*flags, header.read_text(encoding="utf-8")])
    folder = ROOT / "build" / "cuda_emulation" / hashlib.sha256(key.encode()).hexdigest()[:16]
    prefix, target = folder / "prefix.h", folder / "prefix.h.gch"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        prefix.write_text(f'#include "{header}"\n', encoding="utf-8")
        _compile(target, *flags, "-x", "c++-header", prefix)
    return prefix


def _compile(target: Path, *arguments: str | Path) -> None:
    """Another process may be at the same: the target appears whole."""
    unfinished = target.with_name(f"{os.getpid()}.{target.name}")
    built = subprocess.run(["g++", *arguments, "-o", unfinished], capture_output=True, text=True)
    if built.returncode != 0 or built.stderr:  # no assertion, which would pass for a fault that was noticed
        raise RuntimeError(built.stderr[-3000:])
    unfinished.rename(target)


def launched(op: str) -> set[str]:
    """The symbols of the kernels that ran in this process."""
    names: bytes = library(op).launched_kernels()
    return set(names.decode().split())


class EmulationError(RuntimeError):
    """What the hardware would leave undefined: a deadlock, barriers that differ, a grid that is none."""


def under_all_schedules(run: Callable[[int], bytes | None], outputs: Sequence[Tensor]) -> None:
    """Runs a launch for each schedule on outputs full of NaN; they must hold the same bits afterwards.

    Under the sanitizers for one: what a thread accesses does not depend on when.
    """
    before: list[Tensor] | None = None
    for number, name in enumerate(SCHEDULES[:1] if SANITIZE else SCHEDULES):
        for t in outputs:
            t.fill_(torch.nan)
        message = run(number)
        if message is not None:
            raise EmulationError(message.decode())
        if before is not None:
            same = all(same_bits(a, b) for a, b in zip(before, outputs, strict=True))
            assert same, f"other bits with the threads {name}: a barrier is missing"
        before = [t.clone() for t in outputs]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bits and not numbers: NaN equals NaN, and 0 does not equal -0."""
    kind = torch.int32 if a.element_size() == 4 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


# --- scheduler_step ---


class Operand(ctypes.Structure):
    _fields_ = (("ptr", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("batch_stride", ctypes.c_int64))


class Result(ctypes.Structure):
    _fields_ = (("ptr", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("repeats", ctypes.c_int64))


class SchedulerStepArgs(ctypes.Structure):
    _fields_ = (
        ("row", ctypes.c_void_p),
        ("sample", Operand),
        ("e", Operand * 3),
        ("noise", Operand),
        ("variance", Operand),
        ("slots", Operand * 5),
        ("threshold", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("seeds", ctypes.c_void_p),
        *((name, Result) for name in ("y", "d", "u", "x0", "m")),
        ("batch", ctypes.c_int64),
        ("inner", ctypes.c_int64),
    )


class StepRow(ctypes.Structure):
    _fields_ = (
        ("table", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("row", ctypes.c_double * 40),
    )


def _check_layouts(
    sample: Tensor, operands: Sequence[Tensor | None], outputs: Sequence[Tensor | None]
) -> None:
    """What the binding refuses: images that are laid out in other ways than the sample's, or with gaps."""

    def of_image(t: Tensor) -> list[tuple[int, int]]:
        return [(n, s) for n, s in zip(t.shape[1:], t.stride()[1:], strict=True) if n > 1]

    covered = 1
    for stride, size in sorted((s, n) for n, s in of_image(sample)):
        if stride != covered:
            raise RuntimeError("the images of sample must be dense")
        covered *= size
    for t in (*operands, *outputs):
        if t is not None and of_image(t) != of_image(sample):
            raise RuntimeError("another layout than the sample's")
    if any(t is not None and len(t) > 1 and t.stride(0) != covered for t in outputs):
        raise RuntimeError("outputs must be dense")


def _operand(t: Tensor | None) -> Operand:
    return Operand() if t is None else Operand(t.data_ptr(), DTYPES[t.dtype], t.stride(0))


def _step_row(row: Tensor, step: Tensor | None) -> StepRow:
    """As if a table lay in device memory."""
    source = StepRow()
    if step is None:
        source.row[:] = row.tolist()
    else:
        source.table, source.step, source.count = row.data_ptr(), step.data_ptr(), len(row)
    return source


def scheduler_step(
    row: Tensor,
    step: Tensor | None,
    sample: Tensor,
    *tensors: Tensor | None,
    change: tuple[str, str] | None = None,
) -> None:
    """The registered op `scheduler_step`, arguments as in its schema, carried out by the CUDA kernel."""
    e, (noise, variance, threshold, factor), slots = tensors[:3], tensors[3:7], tensors[7:12]
    seeds, outputs = tensors[12], tensors[13:]
    _check_layouts(sample, (*e, noise, variance, *slots), outputs)
    batch = sample.shape[0]
    args = SchedulerStepArgs(
        sample=_operand(sample),
        e=(Operand * 3)(*map(_operand, e)),
        noise=_operand(noise),
        variance=_operand(variance),
        slots=(Operand * 5)(*map(_operand, slots)),
        threshold=None if threshold is None else threshold.data_ptr(),
        factor=None if factor is None else factor.data_ptr(),
        seeds=None if seeds is None else seeds.data_ptr(),
        batch=batch,
        inner=sample[0].numel(),
    )
    for name, t in zip(("y", "d", "u", "x0", "m"), outputs, strict=True):
        if t is not None:
            setattr(args, name, Result(t.data_ptr(), DTYPES[t.dtype], t.shape[0] // batch))
    source = _step_row(row, step)
    function = library("scheduler_step", change).scheduler_step
    function.restype = ctypes.c_char_p
    under_all_schedules(
        lambda schedule: function(ctypes.byref(args), ctypes.byref(source), schedule),
        [t for t in outputs if t is not None],
    )


class GuidanceRescaleArgs(ctypes.Structure):
    _fields_ = (
        ("row", ctypes.c_void_p),
        ("e", Operand * 3),
        ("conditional", ctypes.c_int64),
        ("share", ctypes.c_double),
        ("factor", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("inner", ctypes.c_int64),
    )


def guidance_rescale(
    row: Tensor,
    step: Tensor | None,
    e1: Tensor,
    e2: Tensor | None,
    e3: Tensor | None,
    conditional: int,
    share: float,
    factor: Tensor,
    *,
    change: tuple[str, str] | None = None,
) -> None:
    """The registered op `guidance_rescale`, carried out by the CUDA kernels."""
    if e1.numel() == 0:
        raise RuntimeError("the kernel takes images with elements")
    _check_layouts(e1, (e2, e3), ())
    args = GuidanceRescaleArgs(
        e=(Operand * 3)(*map(_operand, (e1, e2, e3))),
        conditional=conditional,
        share=share,
        factor=factor.data_ptr(),
        batch=len(e1),
        inner=e1[0].numel(),
    )
    source = _step_row(row, step)
    function = library("guidance_rescale", change).guidance_rescale
    function.restype = ctypes.c_char_p
    under_all_schedules(
        lambda schedule: function(ctypes.byref(args), ctypes.byref(source), schedule), [factor]
    )


# --- group_norm_silu ---


class Param(ctypes.Structure):
    _fields_ = (("ptr", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("row_stride", ctypes.c_int64))


class GroupNormSiluArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "y", "sum")),
        ("dtype", ctypes.c_int32),
        *((name, Param) for name in ("weight", "bias", "scale", "shift", "add")),
        *((name, ctypes.c_int64) for name in ("n", "c", "s", "groups")),
        ("eps", ctypes.c_double),
        ("silu", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("fetch", "chunks", "chunk_rows", "padded_c")),
        *((name, ctypes.c_void_p) for name in ("scratch", "partial", "channels")),
    )


class GroupNormPlan(ctypes.Structure):
    _fields_ = (
        ("channels_last", ctypes.c_bool),
        ("vec", ctypes.c_int32),
        ("whole", ctypes.c_bool),
        *(
            (name, ctypes.c_int64)
            for name in ("chunk", "chunks", "span", "spans", "groups_in_span", "parts", "table")
        ),
        *((name, ctypes.c_uint32) for name in ("threads", "cluster")),
        *((name, ctypes.c_int64) for name in ("partials", "shared_bytes")),
    )


SHARED_LIMIT = 227 << 10
"""Bytes of shared memory that a block may have; of sm_90. A test sets less, and tiles become smaller."""
CLUSTER = 8
"""Blocks of a cluster at most; 1 on a device without clusters."""


def _param(t: Tensor | None) -> Param:
    return Param() if t is None else Param(t.data_ptr(), DTYPES[t.dtype], t.stride(0) if t.ndim == 2 else 0)


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    return_sum: bool,
    *,
    shared_limit: int | None = None,
    cluster: int | None = None,
    change: tuple[str, str] | None = None,
    plan: GroupNormPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """The registered op `group_norm_silu`, carried out by the CUDA kernels; `plan` takes how they cut it."""
    channels_last = not x.is_contiguous()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if channels_last and not (x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])):
        raise RuntimeError("the kernel takes contiguous and channels_last tensors")
    if residual is not None and (residual.stride() != x.stride() or residual.dtype is not x.dtype):
        raise RuntimeError("residual must be like x")
    if any(p is not None and p.stride(-1) != 1 for p in (weight, bias, scale, shift, add)):
        raise RuntimeError("parameters must be contiguous along the channels")
    y, total = torch.empty_like(x), torch.empty_like(x) if return_sum else x.new_empty(0)
    if x.numel() == 0:
        return y, total
    n, c = x.shape[:2]
    args = GroupNormSiluArgs(
        x=x.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        y=y.data_ptr(),
        sum=total.data_ptr() if return_sum else None,
        dtype=DTYPES[x.dtype],
        weight=_param(weight),
        bias=_param(bias),
        scale=_param(scale),
        shift=_param(shift),
        add=_param(add),
        n=n,
        c=c,
        s=x.numel() // (n * c),
        groups=num_groups,
        eps=eps,
        silu=silu,
    )
    function = library("group_norm_silu", change).group_norm_silu
    function.restype = ctypes.c_char_p
    limit = ctypes.c_int64(SHARED_LIMIT if shared_limit is None else shared_limit)
    most = ctypes.c_uint32(CLUSTER if cluster is None else cluster)
    found = GroupNormPlan() if plan is None else plan
    under_all_schedules(
        lambda schedule: function(
            ctypes.byref(args), channels_last, limit, most, schedule, ctypes.byref(found)
        ),
        [y, total] if return_sum else [y],
    )
    return y, total


def group_norm_silu_plan(
    x: Tensor, num_groups: int, shared_limit: int = SHARED_LIMIT, cluster: int = CLUSTER
) -> GroupNormPlan:
    """How the kernels cut a call on a tensor like x, which may be on the meta device."""
    n, c = x.shape[:2]
    args = GroupNormSiluArgs(dtype=DTYPES[x.dtype], n=n, c=c, s=x.shape[2:].numel(), groups=num_groups)
    plan = GroupNormPlan()
    library("plans").group_norm_silu_plan(
        ctypes.byref(args),
        not x.is_contiguous(),
        ctypes.c_int64(shared_limit),
        ctypes.c_uint32(cluster),
        ctypes.byref(plan),
    )
    return plan


class GroupNormSiluGrads(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "sum", "x")),
        *((name, Param) for name in ("weight", "bias", "scale", "shift", "add")),
    )


class GroupNormBackwardPlan(ctypes.Structure):
    _fields_ = (
        ("tiles", GroupNormPlan),
        *((name, ctypes.c_uint32) for name in ("lanes", "threads")),
        *((name, ctypes.c_int64) for name in ("chunk", "chunks", "floats")),
    )


def group_norm_silu_backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    *,
    change: tuple[str, str] | None = None,
    plan: GroupNormBackwardPlan | None = None,
) -> tuple[Tensor, ...]:
    """The registered op `group_norm_silu_backward`, carried out by the CUDA kernels."""
    for t in (grad_y, grad_sum, residual):
        assert t is None or t.is_contiguous() is x.is_contiguous(), "gradients must have x's layout"
    n, c = x.shape[:2]
    grad_x = torch.empty_like(x)
    params = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "add": add}
    of_params = {name: x.new_empty(0) if p is None else p.new_empty(p.shape) for name, p in params.items()}
    if x.numel() == 0:
        return (grad_x, *(t.zero_() for t in of_params.values()))
    args = GroupNormSiluArgs(
        x=x.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        dtype=DTYPES[x.dtype],
        n=n,
        c=c,
        s=x.numel() // (n * c),
        groups=num_groups,
        eps=eps,
        silu=silu,
        **{name: _param(p) for name, p in params.items()},
    )
    grads = GroupNormSiluGrads(
        y=grad_y.data_ptr(),
        sum=None if grad_sum is None else grad_sum.data_ptr(),
        x=grad_x.data_ptr(),
        **{name: _param(of_params[name]) for name, p in params.items() if p is not None},
    )
    function = library("group_norm_silu", change).group_norm_silu_backward
    function.restype = ctypes.c_char_p
    found = GroupNormBackwardPlan() if plan is None else plan
    last = not x.is_contiguous()
    under_all_schedules(
        lambda schedule: function(
            ctypes.byref(args), ctypes.byref(grads), last, schedule, ctypes.byref(found)
        ),
        [grad_x, *of_params.values()],
    )
    return (grad_x, *of_params.values())


# --- geglu, layer_norm ---


class GegluArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        ("tanh", ctypes.c_bool),
    )


def geglu(x: Tensor, approximate: str, *, change: tuple[str, str] | None = None) -> Tensor:
    """The registered op `geglu`, carried out by the CUDA kernel."""
    if not x.is_contiguous():
        raise RuntimeError("the kernel takes contiguous tensors")
    columns = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], columns))
    if y.numel() == 0:
        return y
    rows = y.numel() // columns
    args = GegluArgs(x.data_ptr(), y.data_ptr(), DTYPES[x.dtype], rows, columns, approximate == "tanh")
    function = library("geglu", change).geglu
    function.restype = ctypes.c_char_p
    under_all_schedules(lambda schedule: function(ctypes.byref(args), schedule), [y])
    return y


class LayerNormArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "y", "sum")),
        ("dtype", ctypes.c_int32),
        *((name, Param) for name in ("weight", "bias", "sum_bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        ("eps", ctypes.c_double),
    )


class LayerNormPlan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("vec", "per_lane")),
        *((name, ctypes.c_uint32) for name in ("lanes", "threads")),
    )


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    return_sum: bool,
    sum_bias: Tensor | None = None,
    *,
    change: tuple[str, str] | None = None,
    plan: LayerNormPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """The registered op `layer_norm`, carried out by the CUDA kernel; `plan` takes how it cut a row."""
    if not all(t is None or t.is_contiguous() for t in (x, weight, bias, residual, sum_bias)):
        raise RuntimeError("the kernel takes contiguous tensors")
    y, total = torch.empty_like(x), torch.empty_like(x) if return_sum else x.new_empty(0)
    if x.numel() == 0:
        return y, total
    args = LayerNormArgs(
        x=x.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        y=y.data_ptr(),
        sum=total.data_ptr() if return_sum else None,
        dtype=DTYPES[x.dtype],
        weight=_param(weight),
        bias=_param(bias),
        sum_bias=_param(sum_bias),
        rows=x.numel() // x.shape[-1],
        columns=x.shape[-1],
        eps=eps,
    )
    function = library("layer_norm", change).layer_norm
    function.restype = ctypes.c_char_p
    found = LayerNormPlan() if plan is None else plan
    under_all_schedules(
        lambda schedule: function(ctypes.byref(args), schedule, ctypes.byref(found)),
        [y, total] if return_sum else [y],
    )
    return y, total


# --- bias_residual ---


class BiasResidualArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "y")),
        ("dtype", ctypes.c_int32),
        *((name, Param) for name in ("bias", "add")),
        *((name, ctypes.c_int64) for name in ("n", "c", "s")),
        ("scale", ctypes.c_float),
    )


def bias_residual(
    x: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    residual: Tensor | None,
    scale: float,
    *,
    change: tuple[str, str] | None = None,
) -> Tensor:
    """The registered op `bias_residual`, carried out by the CUDA kernel."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    n, c = x.shape[:2]
    args = BiasResidualArgs(
        x=x.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        y=y.data_ptr(),
        dtype=DTYPES[x.dtype],
        bias=_param(bias),
        add=_param(add),
        n=n,
        c=c,
        s=x.numel() // (n * c),
        scale=scale,
    )
    function = library("bias_residual", change).bias_residual
    function.restype = ctypes.c_char_p
    last = not x.is_contiguous()
    under_all_schedules(lambda schedule: function(ctypes.byref(args), last, schedule), [y])
    kept = x.clone(memory_format=torch.preserve_format)
    args.x = args.y = kept.data_ptr()
    message = function(ctypes.byref(args), last, 0)
    assert message is None and same_bits(kept, y), "in place the result is another"
    return y


# --- attention ---


class Heads(ctypes.Structure):
    _fields_ = (("ptr", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4))


class AttentionArgs(ctypes.Structure):
    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v", "mask")),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64 * 3),
        ("dtype", ctypes.c_int32),
        ("mask_dtype", ctypes.c_int32),
        ("mask_is_bool", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("b", "h", "l", "s", "d", "dv")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("packed", "log2_sums")),
        ("padded_l", ctypes.c_int64),
    )


class Gradient(ctypes.Structure):
    _fields_ = (("ptr", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3))


class AttentionGradArgs(ctypes.Structure):
    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v", "grad", "out", "mask")),
        ("mask_dtype", ctypes.c_int32),
        ("mask_is_bool", ctypes.c_bool),
        *((name, Gradient) for name in ("grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("log2_sums", "delta")),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("b", "h", "l", "s", "d", "dv", "padded_l")),
        ("scale", ctypes.c_float),
    )


class AttentionPlan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("width", "warps", "groups", "tile_keys", "rows")),
        *((name, ctypes.c_uint32) for name in ("blocks", "threads")),
        ("shared_bytes", ctypes.c_int64),
    )


MULTIPROCESSORS = 132
"""Of the device; a test sets others, and a block takes other queries."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    change: tuple[str, str] | None = None,
    plan: AttentionPlan | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """The registered op `attention`, carried out by the CUDA kernel; `sums` takes what gradients need."""
    b, h, length, d = q.shape
    keys, dv = k.shape[2], v.shape[3]
    out = q.new_empty(b, length, h, dv).transpose(1, 2)
    if out.numel() == 0 or keys == 0:
        return out.zero_()
    args = AttentionArgs(
        *map(_heads, (q, k, v)),
        out=out.data_ptr(),
        out_stride=(ctypes.c_int64 * 3)(*out.stride()[:3]),
        dtype=DTYPES[q.dtype],
        scale=scale,
        **dict(zip(("b", "h", "l", "s", "d", "dv"), (b, h, length, keys, d, dv), strict=True)),
    )
    if sums is not None:
        args.log2_sums, args.padded_l = sums.data_ptr(), sums.shape[2]
    _set_mask(args, mask, (b, h, length, keys))
    function = library("attention", change).attention
    function.restype = ctypes.c_char_p
    limit = ctypes.c_int64(SHARED_LIMIT)
    found = AttentionPlan() if plan is None else plan
    under_all_schedules(
        lambda schedule: function(ctypes.byref(args), limit, MULTIPROCESSORS, schedule, ctypes.byref(found)),
        [out],
    )
    return out


def _heads(t: Tensor) -> Heads:
    return Heads(t.data_ptr(), (ctypes.c_int64 * 4)(*t.stride()))


def _set_mask(args: AttentionArgs | AttentionGradArgs, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    if mask is not None:
        args.mask = _heads(mask.expand(shape))
        args.mask_is_bool = mask.dtype is torch.bool
        args.mask_dtype = 0 if args.mask_is_bool else DTYPES[mask.dtype]


def attention_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    change: tuple[str, str] | None = None,
) -> tuple[Tensor, Tensor]:
    """The registered op of this name, carried out by the CUDA kernel."""
    sums = torch.full((*q.shape[:2], -(-q.shape[2] // 64) * 64), torch.nan)
    return attention(q, k, v, mask, scale, change=change, sums=sums), sums


def attention_gradients(
    *tensors: Any, change: tuple[str, str] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op of this name, carried out by the CUDA kernels."""
    grad, q, k, v, mask, out, sums, scale = tensors
    (b, h, length, d), (keys, dv) = q.shape, v.shape[2:]
    results = tuple(
        t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v)
    )
    delta = torch.full_like(sums, torch.nan)
    args = AttentionGradArgs(
        *map(_heads, (q, k, v, grad, out)),
        log2_sums=sums.data_ptr(),
        delta=delta.data_ptr(),
        dtype=DTYPES[q.dtype],
        padded_l=sums.shape[2],
        scale=scale,
        **dict(zip(("b", "h", "l", "s", "d", "dv"), (b, h, length, keys, d, dv), strict=True)),
        **{
            f"grad_{name}": Gradient(t.data_ptr(), (ctypes.c_int64 * 3)(*t.stride()[:3]))
            for name, t in zip("qkv", results, strict=True)
        },
    )
    _set_mask(args, mask, (b, h, length, keys))
    function = library("attention", change).attention_gradients
    function.restype = ctypes.c_char_p
    limit = ctypes.c_int64(SHARED_LIMIT)
    under_all_schedules(lambda schedule: function(ctypes.byref(args), limit, schedule), results)
    return results


def attention_plan(
    b: int, h: int, length: int, keys: int, width: int, limit: int, dtype: torch.dtype
) -> AttentionPlan:
    """How a call of this size is cut on a device with `limit` bytes of shared memory for a block."""
    args = AttentionArgs(b=b, h=h, l=length, s=keys, d=width, dv=width, dtype=DTYPES[dtype])
    plan = AttentionPlan()
    library("attention").attention_plan(
        ctypes.byref(args), ctypes.c_int64(limit), MULTIPROCESSORS, ctypes.byref(plan)
    )
    return plan


def at_the_end_of_a_page(b: int, h: int, length: int, width: int, dtype: torch.dtype) -> Tensor:
    """Numbers in memory [b, length, h, width], behind which lies a page that may not be touched."""
    count = b * length * h * width
    page = mmap.PAGESIZE
    size = -(-count * dtype.itemsize // page) * page
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=dtype)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + size), ctypes.c_size_t(page), 0) == 0
    flat = whole[size // dtype.itemsize - count : size // dtype.itemsize]
    return flat.copy_(torch.randn(count)).view(b, length, h, width).transpose(1, 2)


OPS: dict[str, Any] = {
    "attention": attention,
    "bias_residual": bias_residual,
    "geglu": geglu,
    "group_norm_silu": group_norm_silu,
    "guidance_rescale": guidance_rescale,
    "layer_norm": layer_norm,
    "scheduler_step": scheduler_step,
}
