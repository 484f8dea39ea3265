"""What Triton makes of its kernels, held to a budget of the format of those in CUDA (cuda_budget.py).

`make cuda-check` compiles the launches named in CASES, which are those of real models, for every architecture
and compares with triton_budget.json, which was measured with triton 3.9.0. No GPU is needed.
`python tests/triton_budget.py --write` writes the budget anew after a change that is meant: read its diff.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from cuda_budget import INSTRUCTIONS, Usage, inspected, violations
from torch import Tensor
from triton.backends.compiler import GPUTarget

BUDGET = Path(__file__).with_name("triton_budget.json")
ARCHITECTURES = (80, 89, 90, 100, 120)
MATRIX = {"matrix": r"HMMA\S*|HGMMA\S*|UTC\w*MMA\S*"}
# What a kernel copies to shared memory without registers is a load too.
PRODUCTS = {
    "attention": MATRIX,
    "attention_gradients": MATRIX,
    "linear": {**MATRIX, "wide_loads": r"LDG(?:STS)?\.\S*128"},
}
# Boxes that the engine of sm_90 and newer copies, named where a kernel reads and writes through descriptors.
DESCRIPTORS = {"box_loads": r"UTMALDG\S*", "box_stores": r"UTMASTG\S*"}
HALF = torch.float16


def meta(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(
    shape: tuple[int, ...], last: bool = False, block: bool = False, dtype: torch.dtype = HALF
) -> tuple[Any, ...]:
    """Arguments of group_norm_silu: alone, or with an added time embedding, a residual and the sum kept."""
    x, residual = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype)
    if last:
        x, residual = (t.to(memory_format=torch.channels_last) for t in (x, residual))
    n, c = shape[:2]
    around = (None, None, meta(n, c), residual, True) if block else (None, None, None, None, False)
    return (x, 32, meta(c), meta(c), 1e-5, True, *around)


def norm_grads(shape: tuple[int, ...], last: bool = False) -> tuple[Any, ...]:
    """Arguments of group_norm_silu_backward, with add, residual and the gradient of the sum."""
    x, *call, scale, shift, add, residual, _ = norm(shape, last, block=True)
    return (x, residual, x, *call, scale, shift, add, residual)


def biased(shape: tuple[int, ...], last: bool = False) -> tuple[Any, ...]:
    """Arguments of bias_residual, all that there are."""
    x, residual = meta(*shape), meta(*shape)
    if last:
        x, residual = (t.to(memory_format=torch.channels_last) for t in (x, residual))
    return (x, meta(shape[1]), meta(*shape[:2]), residual, 1.0)


def heads(length: int, keys: int, count: int, width: int, dtype: torch.dtype = HALF) -> tuple[Any, ...]:
    """Arguments of attention, as projections leave its tensors."""
    q, k, v = (
        meta(2, rows, count * width, dtype=dtype).unflatten(2, (count, width)).transpose(1, 2)
        for rows in (length, keys, keys)
    )
    return (q, k, v, None, width**-0.5)


def heads_grads(length: int, keys: int, count: int, width: int, dtype: torch.dtype = HALF) -> tuple[Any, ...]:
    """Arguments of attention_gradients."""
    q, k, v, _, scale = heads(length, keys, count, width, dtype)
    return (q, q, k, v, None, q, meta(2, count, length, dtype=torch.float32), scale)


def step(noise: bool) -> tuple[Any, ...]:
    """Arguments of scheduler_step, fp32 latent and fp16 model: a guided step; all there is, Philox too."""
    x, e = meta(2, 4, 64, 64, dtype=torch.float32), meta(2, 4, 64, 64)
    table, counter = meta(50, 40, dtype=torch.float64), meta(1, dtype=torch.int64)
    if noise:
        seeds = meta(2, dtype=torch.int64)
        factors = meta(2, dtype=torch.float32)
        return (table, counter, x, e, e, e, None, e, None, factors, x, x, x, x, x, seeds, x, x, x, x, e)
    return (
        table,
        counter,
        x,
        e,
        e,
        None,
        None,
        None,
        None,
        None,
        x,
        x,
        None,
        None,
        None,
        None,
        x,
        x,
        None,
        None,
        e,
    )


def rescale(*shape: int, dtype: torch.dtype = HALF) -> tuple[Any, ...]:
    """Arguments of guidance_rescale: two parts, the second of them conditional."""
    e, factor = meta(*shape, dtype=dtype), meta(shape[0], dtype=torch.float32)
    return (meta(50, 40, dtype=torch.float64), meta(1, dtype=torch.int64), e, e, None, 1, 0.7, factor)


F32 = torch.float32
CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "group_norm_silu 2x320x64x64": ("group_norm_silu", norm((2, 320, 64, 64))),
    "group_norm_silu 2x640x32x32 block": ("group_norm_silu", norm((2, 640, 32, 32), block=True)),
    "group_norm_silu 2x1280x8x8 block": ("group_norm_silu", norm((2, 1280, 8, 8), block=True)),
    "group_norm_silu 2x960x64x64 float32": ("group_norm_silu", norm((2, 960, 64, 64), dtype=F32)),
    "group_norm_silu 1x128x512x512": ("group_norm_silu", norm((1, 128, 512, 512))),
    "group_norm_silu 2x320x64x64 channels_last": ("group_norm_silu", norm((2, 320, 64, 64), last=True)),
    "group_norm_silu 2x1280x8x8 block channels_last": (
        "group_norm_silu",
        norm((2, 1280, 8, 8), last=True, block=True),
    ),
    "group_norm_silu_backward 2x320x64x64": ("group_norm_silu_backward", norm_grads((2, 320, 64, 64))),
    "group_norm_silu_backward 2x320x64x64 channels_last": (
        "group_norm_silu_backward",
        norm_grads((2, 320, 64, 64), last=True),
    ),
    "bias_residual 2x320x64x64 channels_last": ("bias_residual", biased((2, 320, 64, 64), last=True)),
    "bias_residual 2x1280x8x8": ("bias_residual", biased((2, 1280, 8, 8))),
    "layer_norm 2x4096x320 residual": (
        "layer_norm",
        (meta(2, 4096, 320), meta(320), meta(320), 1e-5, meta(2, 4096, 320), True, None),
    ),
    "layer_norm 2x256x1280": (
        "layer_norm",
        (meta(2, 256, 1280), meta(1280), meta(1280), 1e-5, None, False, None),
    ),
    "geglu 2x4096x2560": ("geglu", (meta(2, 4096, 2560), "none")),
    "linear 2x4096x320 residual": (
        "linear",
        (meta(2, 4096, 320), meta(320, 320), meta(320), meta(2, 4096, 320), False),
    ),
    "linear 2x4096x1280 residual": (
        "linear",
        (meta(2, 4096, 1280), meta(640, 1280), meta(640), meta(2, 4096, 640), False),
    ),
    "linear 2x256x5120 residual": (
        "linear",
        (meta(2, 256, 5120), meta(1280, 5120), meta(1280), meta(2, 256, 1280), False),
    ),
    "linear 2x4096x320 geglu": (
        "linear",
        (meta(2, 4096, 320), meta(2560, 320), meta(2560), None, True),
    ),
    "linear 2x64x1280 geglu": ("linear", (meta(2, 64, 1280), meta(10240, 1280), meta(10240), None, True)),
    "scheduler_step guided": ("scheduler_step", step(noise=False)),
    "scheduler_step everything": ("scheduler_step", step(noise=True)),
    "guidance_rescale 2x4x64x64": ("guidance_rescale", rescale(2, 4, 64, 64)),
    "guidance_rescale 2x3x512x512 float32": ("guidance_rescale", rescale(2, 3, 512, 512, dtype=F32)),
    "attention 4096 of 40": ("attention", heads(4096, 4096, 8, 40)),
    "attention 4096 to 77 of 40": ("attention", heads(4096, 77, 8, 40)),
    "attention 4096 of 64": ("attention", heads(4096, 4096, 10, 64)),
    "attention 4096 of 64 bfloat16": ("attention", heads(4096, 4096, 10, 64, torch.bfloat16)),
    "attention 1024 of 80": ("attention", heads(1024, 1024, 8, 80)),
    "attention 256 of 160": ("attention", heads(256, 256, 8, 160)),
    "attention 4096 of 512": ("attention", heads(4096, 4096, 1, 512)),
    "attention 4096 of 40 float32": ("attention", heads(4096, 4096, 8, 40, F32)),
    "attention_gradients 4096 of 40": ("attention_gradients", heads_grads(4096, 4096, 8, 40)),
    "attention_gradients 4096 to 77 of 40": ("attention_gradients", heads_grads(4096, 77, 8, 40)),
    "attention_gradients 4096 of 64 bfloat16": (
        "attention_gradients",
        heads_grads(4096, 4096, 10, 64, torch.bfloat16),
    ),
    "attention_gradients 1024 of 80": ("attention_gradients", heads_grads(1024, 1024, 8, 80)),
    "attention_gradients 256 of 160": ("attention_gradients", heads_grads(256, 256, 8, 160)),
    "attention_gradients 1024 of 40 float32": ("attention_gradients", heads_grads(1024, 1024, 8, 40, F32)),
    "attention_gradients 1024 of 80 float32": ("attention_gradients", heads_grads(1024, 1024, 8, 80, F32)),
    "linear 2x4096x320 residual descriptors": (
        "linear",
        (meta(2, 4096, 320), meta(320, 320), meta(320), meta(2, 4096, 320), False, None, True),
    ),
    "linear 2x4096x320 geglu descriptors": (
        "linear",
        (meta(2, 4096, 320), meta(2560, 320), meta(2560), None, True, None, True),
    ),
    "attention 4096 of 40 descriptors": ("attention", (*heads(4096, 4096, 8, 40), True)),
    "attention 4096 of 64 bfloat16 descriptors": (
        "attention",
        (*heads(4096, 4096, 10, 64, torch.bfloat16), True),
    ),
    "attention 1024 of 80 descriptors": ("attention", (*heads(1024, 1024, 8, 80), True)),
    "attention 256 of 160 descriptors": ("attention", (*heads(256, 256, 8, 160), True)),
    "attention 4096 of 512 descriptors": ("attention", (*heads(4096, 4096, 1, 512), True)),
    "attention_gradients 4096 of 40 descriptors": (
        "attention_gradients",
        (*heads_grads(4096, 4096, 8, 40), True),
    ),
    "attention_gradients 256 of 160 descriptors": (
        "attention_gradients",
        (*heads_grads(256, 256, 8, 160), True),
    ),
}


class Target:
    """As much of a driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # compiled kernels are kept per device

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(op: str, call: tuple[Any, ...]) -> Iterator[Callable[[], Any]]:
    """What the op launches for a call, each as a function that compiles it."""
    kernels = importlib.import_module(f"difusores.ops.triton.{op}")
    with mock.patch.object(kernels, "run") as run:
        kernels.launch(*call)
    for launch in run.call_args_list:
        kernel, programs, _, *arguments = launch.args

        def compiled(k: Any = kernel, a: Any = arguments, n: int = programs, o: Any = launch.kwargs) -> Any:
            return k.warmup(*a, grid=(n,), enable_fp_fusion=True, **o)

        yield compiled


def usages(name: str, architecture: int) -> dict[str, Usage]:
    """Each launch of a case: its resources and instructions on one architecture."""
    op, call = CASES[name]
    found: dict[str, Usage] = {}
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Target(architecture))
    try:
        for k, compiled in enumerate(launches(op, call)):
            kernel = compiled()
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernel.cubin"
                cubin.write_bytes(kernel.asm["cubin"])
                instructions = INSTRUCTIONS | PRODUCTS.get(op, {})
                if name.endswith("descriptors"):
                    instructions |= DESCRIPTORS
                (usage,) = inspected(cubin, instructions).values()
            for rare in ("matrix", "wide_copies"):  # of which most kernels have none
                if not usage[rare]:
                    del usage[rare]
            usage["shared"] = kernel.metadata.shared  # dynamic, of which the file says nothing
            assert kernel.metadata.global_scratch_size == 0, "the launch would ask for memory"
            found[name if k == 0 else f"{name}, launch {k + 1}"] = usage
    finally:
        triton.runtime.driver._active = before
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = {"choices": ARCHITECTURES, "type": lambda name: int(name.rstrip("a"))}
    parser.add_argument("--architecture", nargs="+", default=ARCHITECTURES, **named)
    parser.add_argument("--write", action="store_true", help="make what is measured of all the budget")
    arguments = parser.parse_args()
    write, architectures = arguments.write, ARCHITECTURES if arguments.write else arguments.architecture
    budget = {} if write else json.loads(BUDGET.read_text(encoding="utf-8"))
    lines, broken = [], 0
    for architecture in architectures:
        measured: dict[str, Usage] = {}
        for name in CASES:
            measured |= usages(name, architecture)
        print(f"sm_{architecture}: {len(measured)} launches", flush=True)
        for sentence in [] if write else violations(budget[f"sm_{architecture}"], measured):
            print(f"  {sentence}")
            broken += 1
        rows = (f"  {json.dumps(name)}: {json.dumps(measured[name])}" for name in sorted(measured))
        lines.append(f'"sm_{architecture}": {{\n' + ",\n".join(rows) + "\n}")
    if write:
        BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
