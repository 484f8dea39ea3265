"""What `accelerate` costs before the first image: the call itself, and the weights that are then prepared.

    python benchmarks/bench_setup.py [--model sd15|cifar10|cat] [--pixels 256] [--dtype bfloat16]
        [--batch 2] [--memory fast] [--cpu-time]

Weights are random: nothing here depends on their values. `accelerate_s` is the call; `preparing_s` the part
of the first forward that makes weights for later ones; `first_s` and `later_s` are whole forwards.
`fresh_memory_s` is what the machine takes of it: the time in which a new process touches as many bytes of new
memory once, measured after the rest. A virtual machine may have to fetch them from its host.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_unet import CONFIGS
from timing import stamp

import difusores

STABLE_DIFFUSION: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def build(name: str) -> torch.nn.Module:
    """The network with random weights."""
    kind = difusores.UNet2DConditionModel if name == "sd15" else difusores.UNet2DModel
    with torch.device("meta"):
        model = kind(**(STABLE_DIFFUSION if name == "sd15" else CONFIGS[name]))
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    return model


def seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return round(clock() - start, 2)


TOUCH = """
import mmap, sys, time
size = int(sys.argv[1])
memory = mmap.mmap(-1, size)
if hasattr(mmap, "MADV_HUGEPAGE"):
    memory.madvise(mmap.MADV_HUGEPAGE)
ones = bytes([1]) * len(range(0, size, mmap.PAGESIZE))
start = time.perf_counter()
memory[:: mmap.PAGESIZE] = ones
print(time.perf_counter() - start)
"""


def fresh_memory(size: int) -> float:
    """Seconds in which a process of its own touches every page of `size` bytes of new memory."""
    command = [sys.executable, "-c", TOUCH, str(size)]
    return round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout), 2)


def measure(name: str, batch: int, pixels: int, clock: Callable[[], float], **options: Any) -> dict[str, Any]:
    """The figures of one network at one size of image."""
    torch.manual_seed(0)
    model = build(name)
    side = pixels // 8 if name == "sd15" else pixels
    inputs = [torch.randn(batch, 4 if name == "sd15" else 3, side, side), torch.tensor(500)]
    if name == "sd15":
        inputs.append(torch.randn(batch, 77, 768))
    row: dict[str, Any] = {"model": name, "batch": batch, "pixels": pixels}
    start = clock()
    report = difusores.accelerate(model, **options)
    row["accelerate_s"] = round(clock() - start, 2)
    row["first_s"] = seconds(lambda: model(*inputs), clock)
    row["preparing_s"] = round(report.preparing_seconds, 2)
    row["later_s"] = min(seconds(lambda: model(*inputs), clock) for _ in range(2))
    row["packed_gb"] = round(report.packed_bytes / 1e9, 2)
    row["fresh_memory_s"] = fresh_memory(report.packed_bytes)
    row["model_gb"] = round(report.model_bytes / 1e9, 2)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=("sd15", "cifar10", "cat"), default="sd15")
    parser.add_argument("--pixels", type=int, default=256, help="height and width of the image")
    parser.add_argument("--batch", type=int, default=2, help="images of a forward")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--memory", choices=("balanced", "fast"), default="balanced")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and the processor's time of all but `preparing_s`: for a machine that others use",
    )
    args = parser.parse_args(arguments)
    clock = time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time
    with torch.no_grad():
        row = measure(args.model, args.batch, args.pixels, clock, dtype=args.dtype, memory=args.memory)
    print(json.dumps({**row, "machine": stamp()}))


if __name__ == "__main__":
    main()
