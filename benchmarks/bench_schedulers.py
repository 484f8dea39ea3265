"""`step()` of every scheduler beside diffusers' in the same run, and beside what the memory allows.

    python benchmarks/bench_schedulers.py [--threads N] [--seconds S] [--json FILE]

Before anything is timed, both libraries take the same step from the same generator and have to agree; a wrong
result is not timed. The noise is then drawn in advance on both sides, so that no draw is in the figures.
Contestants are interleaved, figures are medians. `limit`: as many reads and writes as the step needs (the
sample, the model's output and the noise in; the next sample and x0 out), as plain copies into new tensors,
which is what a step returns; `copy`: the same into memory that exists already. At small shapes both are the
cost of calling PyTorch, not of memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from timing import interleave, stamp
from torch import Tensor

import difusores

SHAPES = [(1, 4, 8, 8), (1, 4, 64, 64), (8, 3, 512, 512)]
# scheduler, arguments of step, whether noise is read
CASES: list[tuple[str, dict[str, Any], bool]] = [
    ("DDIMScheduler", {}, False),
    ("DDIMScheduler", {"eta": 1.0}, True),
    ("DDPMScheduler", {}, True),
]
STEPS = 50
AGREEMENT = 1e-4


def limits(x: Tensor, e: Tensor, z: Tensor | None) -> dict[str, Any]:
    """A copy with as many reads and writes as the step, into new tensors and into old ones."""
    y, x0 = torch.empty_like(x), torch.empty_like(x)

    def fresh() -> tuple[Tensor, Tensor]:
        return x.clone(), e.clone() if z is None else e + z

    def reused() -> None:
        y.copy_(x)
        if z is None:
            x0.copy_(e)
        else:
            torch.add(e, z, out=x0)

    return {"limit": fresh, "copy": reused}


def measure(
    name: str, options: dict[str, Any], noisy: bool, shape: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    x, e, z = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    ours, theirs = getattr(difusores, name)(), getattr(diffusers, name)()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
    index = STEPS // 2

    def step(scheduler: Any) -> Any:
        return scheduler.step(e, scheduler.timesteps[index], x, **options, return_dict=False)

    def drawn(scheduler: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        t = scheduler.timesteps[index]
        return scheduler.step(e, t, x, **options, generator=generator, return_dict=False)

    for one, other in zip(drawn(ours), drawn(theirs), strict=True):
        worst = (one - other).abs().max().item()
        if not worst <= AGREEMENT:
            raise SystemExit(f"{name} {options} {shape}: differs from diffusers by {worst:.2e}; not timed")

    times = [scheduler.timesteps[index] for scheduler in (ours, theirs)]
    module = f"diffusers.schedulers.scheduling_{name.removesuffix('Scheduler').lower()}"
    with (
        mock.patch("difusores.schedulers.base.draw_noise", lambda *args, **kwargs: z),
        mock.patch(f"{module}.randn_tensor", lambda *args, **kwargs: z),
    ):
        contestants = {
            "difusores": lambda: ours.step(e, times[0], x, **options, return_dict=False),
            "diffusers": lambda: theirs.step(e, times[1], x, **options, return_dict=False),
            **limits(x, e, z if noisy else None),
        }
        medians = interleave(contestants, seconds=seconds)
    figures = {key: round(value * 1e6, 2) for key, value in medians.items()}
    label = name + "".join(f" {key}={value}" for key, value in options.items())
    ratios = {
        "faster": round(figures["diffusers"] / figures["difusores"], 2),
        "over_limit": round(figures["difusores"] / figures["limit"], 2),
    }
    return {"case": label, "shape": list(shape), **figures, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on one row")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {**stamp(), "diffusers": diffusers.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    columns = ("difusores", "diffusers", "faster", "limit", "copy", "x limit")
    print(f"{'step(), µs':<26}{'shape':<16}" + "".join(f"{column:>11}" for column in columns))
    rows = []
    for shape in SHAPES:
        for name, options, noisy in CASES:
            row = measure(name, options, noisy, shape, arguments.seconds)
            rows.append(row)
            size = "x".join(map(str, shape))
            values = (row[key] for key in ("difusores", "diffusers", "faster", "limit", "copy", "over_limit"))
            print(f"{row['case']:<26}{size:<16}" + "".join(f"{value:>11}" for value in values))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "microseconds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
