"""`step()` of every scheduler beside diffusers' in the same run, and beside what the memory allows.

    python benchmarks/bench_schedulers.py [--scheduler NAME …] [--shape small|large] [--threads N]
        [--seconds S] [--json FILE]

A contestant runs all its steps one after another on the same tensors; the figures are medians of a step.
Before anything is timed, both libraries run from the same generator and have to agree; a wrong result is not
timed. The noise is then drawn in advance on both sides, so that no draw is in the figures. Contestants take
turns in random order. `limit`: the bytes that our steps read and write (the operands that their rows name,
and their outputs) at the speed of `clone` of a tensor of that shape, with as many clones held at a time as a
step returns: new memory is a part of the cost. At small shapes it is that of calling PyTorch.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from timing import interleave, stamp
from torch import Tensor

import difusores
from difusores.ops.scheduler_step import COLUMNS, PE, PX, R, W

SHAPES = {"small": [(1, 4, 8, 8), (1, 4, 64, 64)], "large": [(8, 3, 512, 512)]}
# scheduler, arguments of step beyond the defaults
CASES: list[tuple[str, dict[str, Any]]] = [("DDIMScheduler", {}), ("DDIMScheduler", {"eta": 1.0})]
# Not timed: noise from a Brownian path is torchsde's work on both sides; a mask, a corrector or levels given
# by the caller make another loop.
ELSEWHERE = {
    "CosineDPMSolverMultistepScheduler",
    "DDIMScheduler",
    "DPMSolverSDEScheduler",
    "KarrasVeScheduler",
    "RePaintScheduler",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
}
CASES += [
    (name, {})
    for name in difusores.schedulers.__all__
    if name.endswith("Scheduler") and name not in ELSEWHERE and hasattr(diffusers, name)
]
STEPS = {"small": 20, "large": 6}
AGREEMENT = 1e-3


def run(scheduler: Any, times: list[Tensor], x: Tensor, e: Tensor, options: dict[str, Any]) -> Any:
    """All steps, each from the same sample.

    times: the elements of `timesteps`, made in advance: PyTorch takes a microsecond for each.
    """
    result = None
    for t in times:
        result = scheduler.step(e, t, x, **options, return_dict=False)
    return result


def copies(x: Tensor, steps: int, count: int) -> Any:
    """As many new tensors as `run` makes, which live as long."""
    result = None
    for _ in range(steps):
        result = tuple([x.clone() for _ in range(count)])
    return result


def traffic(scheduler: Any, steps: int) -> tuple[float, float]:
    """Tensors read and written by a step, on average over the run."""
    stages = scheduler.plan(steps).stages
    returned = getattr(scheduler, "returned", ("y", "x0"))
    reads = writes = 0
    for stage in stages:
        outputs = {*returned, *(name for name in ("d", "u", "x0") if name in stage.slots)}
        used = {
            column
            for k, name in enumerate(("y", "d", "u"))
            if name in outputs
            for column, weight in zip(COLUMNS, stage.row[W + 9 * k : W + 9 * k + 9], strict=True)
            if weight != 0
        }
        if "x0" in used | outputs:
            used |= {"xh"} if stage.row[PX] != 0 else set()
            used |= {"e"} if stage.row[PE] != 0 else set()
        if "xh" in used and stage.row[R] != 0:
            used |= {"z"}
        reads += len(used - {"x0"})
        writes += len(outputs)
    return reads / len(stages), writes / len(stages)


def measure(
    name: str, options: dict[str, Any], shape: tuple[int, ...], steps: int, seconds: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    x, e, z = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    ours, theirs = getattr(difusores, name)(), getattr(diffusers, name)()

    times: dict[Any, list[Tensor]] = {}

    def prepare(scheduler: Any) -> None:
        scheduler.set_timesteps(steps)
        times[scheduler] = list(scheduler.timesteps)
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.__dict__["is_scale_input_called"] = True

    takes_generator = "generator" in inspect.signature(ours.step).parameters
    results = []
    for scheduler in (ours, theirs):
        prepare(scheduler)
        generator = {"generator": torch.Generator().manual_seed(1)} if takes_generator else {}
        results.append(run(scheduler, times[scheduler], x, e, options | generator))
    for one, other in zip(*results, strict=True):
        worst = ((one - other).abs().max() / other.abs().max()).item()
        if not worst <= AGREEMENT:
            raise SystemExit(f"{name} {options} {shape}: differs from diffusers by {worst:.2e}; not timed")

    module = importlib.import_module(type(theirs).__module__)
    with ExitStack() as stack:
        stack.enter_context(mock.patch("difusores.schedulers.base.draw_noise", lambda *args, **kwargs: z))
        if hasattr(module, "randn_tensor"):
            stack.enter_context(mock.patch.object(module, "randn_tensor", lambda *args, **kwargs: z))
        medians = interleave(
            {
                "difusores": lambda: run(ours, times[ours], x, e, options),
                "diffusers": lambda: run(theirs, times[theirs], x, e, options),
                "clone": lambda: copies(x, steps, len(results[0])),
            },
            seconds=seconds,
            prepare={"difusores": lambda: prepare(ours), "diffusers": lambda: prepare(theirs)},
        )
    figures = {key: value / len(scheduler.timesteps) * 1e6 for key, value in medians.items()}
    figures["clone"] = medians["clone"] / (steps * len(results[0])) * 1e6
    reads, writes = traffic(ours, steps)
    figures["limit"] = (reads + writes) / 2 * figures["clone"]
    label = name + "".join(f" {key}={value}" for key, value in options.items())
    return {
        "case": label,
        "shape": list(shape),
        **{key: round(value, 2) for key, value in figures.items()},
        "faster": round(figures["diffusers"] / figures["difusores"], 2),
        "over_limit": round(figures["difusores"] / figures["limit"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--scheduler", action="append", help="only this class (may be given again)")
    parser.add_argument("--shape", choices=tuple(SHAPES), action="append", help="small or large shapes only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on one row")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {**stamp(), "diffusers": diffusers.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    columns = ("difusores", "diffusers", "faster", "limit", "x limit")
    print(f"{'a step, µs':<40}{'shape':<14}" + "".join(f"{column:>11}" for column in columns))
    rows = []
    for size_kind, shape in ((k, shape) for k in arguments.shape or SHAPES for shape in SHAPES[k]):
        for name, options in CASES:
            if arguments.scheduler and name not in arguments.scheduler:
                continue
            row = measure(name, options, shape, STEPS[size_kind], arguments.seconds)
            rows.append(row)
            size = "x".join(map(str, shape))
            values = (row[key] for key in ("difusores", "diffusers", "faster", "limit", "over_limit"))
            print(f"{row['case']:<40}{size:<14}" + "".join(f"{value:>11}" for value in values), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "microseconds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
