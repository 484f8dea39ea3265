"""Every method of a scheduler that makes a step, beside diffusers' in the same run and what memory allows.

    python benchmarks/bench_schedulers.py [--case NAME …] [--shape small|large] [--threads N] [--seconds S]
        [--json FILE] [--markdown]

A contestant makes all its steps one after another on the same tensors; the figures are medians of a step.
Before anything is timed, both libraries run from the same generator and have to agree; a wrong result is not
timed. The noise is then drawn in advance on both sides, so that no draw is in the figures. Contestants take
turns in random order. `limit`: the bytes that our steps read and write (the operands that their rows name,
and their outputs) at the speed of `clone` of a tensor of that shape, with as many clones held at a time as a
step returns: new memory is a part of the cost. At small shapes it is that of calling PyTorch.

--markdown keeps the figures in benchmarks/results/schedulers.json and writes the table of docs/samplers.md.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import torch
from results import RESULTS, ROOT, replace, table, where
from timing import interleave, stamp
from torch import Tensor

import difusores
from difusores.ops.scheduler_step import COLUMNS, PE, PX, R, W

TINY, SMALL, LARGE = (1, 4, 8, 8), (1, 4, 64, 64), (8, 3, 512, 512)
SHAPES = {"small": [TINY, SMALL], "large": [LARGE]}
ALONE = ("DDIM", "FlowMatchEulerDiscrete", "KarrasVe.add_noise_to_input")
"""Cases that are timed at TINY too, where overhead is all."""
STEPS = {TINY: 20, SMALL: 20, LARGE: 6}
AGREEMENT = 1e-3
ASKED = {
    "DDPM": 6,
    "DPMSolverMultistep": 8,
    "EulerDiscrete": 1.7,
    "HeunDiscrete": 1.7,
    "LMSDiscrete": 100,
    "PNDM": 3,
    "UniPCMultistep": 12,
}
"""How many times as fast as diffusers' a step is meant to be at SMALL; 4 for the others."""

Arguments = list[tuple[Any, ...]]


class Case(NamedTuple):
    """A row of the table.

    arguments: (scheduler, x, e) -> those of all calls, after `set_timesteps`; by default (e, t, x) at each
        timestep, made in advance: PyTorch takes a microsecond to take one out of a tensor.
    traffic: tensors read and written by a call; None: as the plan's rows say.
    grid: of `set_timesteps`, in place of the number of steps. noises: how many different ones there are.
    """

    name: str
    method: str = "step"
    options: Mapping[str, Any] = {}
    arguments: Callable[[Any, Tensor, Tensor], Arguments] | None = None
    traffic: tuple[int, int] | None = None
    grid: Callable[[int], tuple[int, ...]] = lambda steps: (steps,)
    noises: int = 1

    @property
    def label(self) -> str:
        method = "" if self.method == "step" else f".{self.method}"
        options = "".join(f" {key}={value}" for key, value in self.options.items())
        return self.name.removesuffix("Scheduler") + method + options


def churned(scheduler: Any, x: Tensor, e: Tensor) -> Arguments:
    return [(e, 1.2 * level, after, x) for level, after in levels(scheduler)]


def levels(scheduler: Any) -> list[tuple[float, float]]:
    return [*pairwise(scheduler.schedule.flip(0).tolist())]


def painted(scheduler: Any, x: Tensor, e: Tensor) -> Arguments:
    mask = (x > 0).to(x.dtype)
    return [(e, t, x, x.flip(0), mask) for t in scheduler.timesteps]


OTHER_LOOPS = [
    Case("KarrasVeScheduler", arguments=churned, traffic=(2, 2)),
    Case(
        "KarrasVeScheduler",
        "step_correct",
        arguments=lambda s, x, e: [(*given, x.flip(0), e) for given in churned(s, x, e)],
        traffic=(3, 1),
    ),
    Case(
        "KarrasVeScheduler",
        "add_noise_to_input",
        arguments=lambda s, x, e: [(x, level) for level, _ in levels(s)],
        traffic=(2, 1),
    ),
    Case("RePaintScheduler", arguments=painted, traffic=(5, 2), grid=lambda steps: (steps, 1, 1)),
    # ten training steps a call, which ours makes in two passes, of seven noises and of three
    Case(
        "RePaintScheduler",
        "undo_step",
        arguments=lambda s, x, e: [(x, t) for t in s.timesteps[:3]],
        traffic=(12, 2),
        grid=lambda steps: (100, 1, 1),
        noises=10,
    ),
    Case("ScoreSdeVeScheduler", "step_pred", traffic=(3, 2)),
    # score and noise are read for their norms, and then for the step
    Case(
        "ScoreSdeVeScheduler",
        "step_correct",
        arguments=lambda s, x, e: [(e, x) for _ in s.timesteps],
        traffic=(5, 1),
    ),
    Case(
        "ScoreSdeVpScheduler",
        "step_pred",
        arguments=lambda s, x, e: [(e, x, t) for t in s.timesteps],
        traffic=(3, 2),
    ),
]
CASES = [
    case
    for name in difusores.schedulers.__all__
    if name.endswith("Scheduler")
    for case in (
        [each for each in OTHER_LOOPS if each.name == name]
        or [Case(name), *([Case(name, options={"eta": 1.0})] if name == "DDIMScheduler" else [])]
    )
]


def theirs_of(name: str) -> Any:
    """The class of that name in diffusers, whose top level leaves two of them out."""
    deprecated = {"KarrasVeScheduler": "karras_ve", "ScoreSdeVpScheduler": "sde_vp"}
    if name in deprecated:
        module = importlib.import_module(f"diffusers.schedulers.deprecated.scheduling_{deprecated[name]}")
        return getattr(module, name)
    return getattr(diffusers, name)


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


class Contestant:
    """A scheduler with the calls of a case: what is timed, and what is done before."""

    def __init__(self, case: Case, scheduler: Any, shape: tuple[int, ...], noises: Sequence[Tensor]) -> None:
        self.case, self.scheduler, self.shape, self.noises = case, scheduler, shape, noises
        generator = torch.Generator().manual_seed(0)
        self.x, self.e = (torch.randn(shape, generator=generator) for _ in range(2))
        self.method: Callable[..., Any] = getattr(scheduler, case.method)
        self.options = dict(case.options)
        if "return_dict" in inspect.signature(self.method).parameters:
            self.options["return_dict"] = False
        self.prepare()

    def prepare(self) -> None:
        """The scheduler at the beginning of a run, and the arguments of its calls."""
        scheduler, case = self.scheduler, self.case
        scheduler.set_timesteps(*case.grid(STEPS[self.shape]))
        if case.name == "ScoreSdeVeScheduler":
            scheduler.set_sigmas(len(scheduler.timesteps))
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.__dict__["is_scale_input_called"] = True
        if hasattr(scheduler, "noise_sampler"):  # a Brownian path, which is torchsde's work on both sides
            scheduler.__dict__["noise_sampler"] = lambda *span: self.noises[0]
        given = case.arguments
        self.arguments = (
            given(scheduler, self.x, self.e) if given else [(self.e, t, self.x) for t in scheduler.timesteps]
        )

    def run(self) -> Any:
        """All calls, each from the same sample."""
        method, options, result = self.method, self.options, None
        for arguments in self.arguments:
            result = method(*arguments, **options)
        return result

    def drawn(self) -> list[Tensor]:
        """What the last call gives, its noise drawn from the generator of a seed."""
        self.prepare()
        if "generator" in inspect.signature(self.method).parameters:
            self.options["generator"] = torch.Generator().manual_seed(1)
        result = self.run()
        self.options.pop("generator", None)
        return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]


def copies(x: Tensor, calls: int, count: int) -> Any:
    """As many new tensors as `run` makes, which live as long."""
    result = None
    for _ in range(calls):
        result = tuple([x.clone() for _ in range(count)])
    return result


def measure(case: Case, shape: tuple[int, ...], seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """The row of a case at a shape.

    Raises:
        SystemExit: the two libraries disagree.
    """
    noises = [torch.randn(shape) for _ in range(case.noises)]
    schedulers = getattr(difusores, case.name)(), theirs_of(case.name)()
    ours, theirs = (Contestant(case, scheduler, shape, noises) for scheduler in schedulers)
    results = ours.drawn(), theirs.drawn()
    for one, other in zip(*results, strict=True):
        worst = ((one - other).abs().max() / other.abs().max()).item()
        if not worst <= AGREEMENT:
            raise SystemExit(f"{case.label} {shape}: differs from diffusers by {worst:.2e}; not timed")

    given = cycle(noises)
    calls, count = len(ours.arguments), len(results[0])
    with ExitStack() as stack:
        for scheduler in schedulers:
            for base in type(scheduler).__mro__:
                module = importlib.import_module(base.__module__)
                for name in ("draw_noise", "noise_of_the_host", "randn_tensor"):
                    if hasattr(module, name) and not isinstance(getattr(module, name), Given):
                        stack.enter_context(mock.patch.object(module, name, Given(given)))
        medians = interleave(
            {"difusores": ours.run, "diffusers": theirs.run, "clone": lambda: copies(ours.x, calls, count)},
            seconds=seconds,
            clock=clock,
            prepare={"difusores": ours.prepare, "diffusers": theirs.prepare},
        )
    figures = {key: value / calls * 1e6 for key, value in medians.items()}
    figures["clone"] /= count
    reads, writes = case.traffic or traffic(ours.scheduler, STEPS[shape])
    figures["limit"] = (reads + writes) / 2 * figures["clone"]
    return {
        "case": case.label,
        "shape": list(shape),
        **{key: round(value, 2) for key, value in figures.items()},
        "faster": round(figures["diffusers"] / figures["difusores"], 2),
        "over_limit": round(figures["difusores"] / figures["limit"], 2),
    }


class Given:
    """In place of a function that draws noise: noise that is there already."""

    def __init__(self, noises: cycle[Tensor]) -> None:
        self.noises = noises

    def __call__(self, *shape: Any, **options: Any) -> Tensor:
        return next(self.noises)


def markdown(machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of docs/samplers.md, and what it says of the aims."""
    found = {(row["case"], tuple(row["shape"])): row for row in rows}
    lines, below, above = [], [], []
    for case in CASES:
        small, large = (found[case.label, shape] for shape in (SMALL, LARGE))
        asked = ASKED.get(case.label, 4)
        if small["faster"] < asked:
            aim, limit = small["diffusers"] / asked, small["limit"]
            than = "less" if aim < limit else "more"
            alone = found.get((case.label, TINY))
            rest = f"; overhead alone: {alone['difusores']:.1f}" if alone else ""
            below.append(
                f"{case.label} ({aim:.1f} µs would be asked, {than} than the limit of {limit:.1f}{rest})"
            )
        if large["over_limit"] > 1.5:
            above.append(f"{case.label} ({large['over_limit']:.2f})")
        us = [f"{small[key]:.1f}" for key in ("difusores", "diffusers", "limit")]
        ms = [f"{large[key] / 1e3:.1f}" for key in ("difusores", "diffusers", "limit")]
        lines.append(
            [
                case.label,
                *(*us[:2], f"{small['faster']:.1f} ({asked:g})", us[2], f"{small['over_limit']:.2f}"),
                *(*ms[:2], f"{large['faster']:.1f}", ms[2], f"{large['over_limit']:.2f}"),
            ]
        )
    columns = ["diffusers", "faster", "limit", "over it"]
    tiny = found["DDIM", TINY]
    clock = "of the processor's time, others at work beside it" if machine["clock"] == "process_time" else ""
    return [
        f"{where(machine)}; medians of interleaved runs {clock}".rstrip() + ".",
        "",
        *table(["", f"{size(SMALL)}, µs", *columns, f"{size(LARGE)}, ms", *columns], lines),
        "",
        f"DDIM at {size(TINY)}, overhead alone: {tiny['difusores']:.1f} µs; diffusers: "
        f"{tiny['diffusers']:.1f} µs; the share: {tiny['difusores'] / tiny['diffusers']:.3f} (asked: 0.15).",
        "",
        f"Slower at {size(SMALL)} than asked: {'; '.join(below) or 'none'}.",
        f"Above 1.5 times the limit at {size(LARGE)}: {'; '.join(above) or 'none'}.",
    ]


def size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--case", action="append", help="only this row (may be given again)")
    parser.add_argument("--shape", choices=tuple(SHAPES), action="append", help="small or large shapes only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.8, help="time spent on one row, at least")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the process: where others use the machine"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument(
        "--markdown", action="store_true", help="keep the figures and write the table in docs/"
    )
    arguments = parser.parse_args()
    if arguments.markdown and (arguments.case or arguments.shape):
        parser.error("--markdown needs all rows: no --case and no --shape with it")
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    machine = {**stamp(), "diffusers": diffusers.__version__, "clock": clock.__name__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    columns = ("difusores", "diffusers", "faster", "limit", "over_limit")
    print(f"{'a step, µs':<40}{'shape':<14}" + "".join(f"{column:>11}" for column in columns))
    rows = []
    for shape in (shape for kind in arguments.shape or SHAPES for shape in SHAPES[kind]):
        for case in CASES:
            if arguments.case and case.label not in arguments.case:
                continue
            if shape == TINY and case.label not in ALONE:
                continue
            row = measure(case, shape, arguments.seconds, clock)
            rows.append(row)
            values = "".join(f"{row[column]:>11}" for column in columns)
            print(f"{row['case']:<40}{size(shape):<14}{values}", flush=True)
    result = json.dumps({"machine": machine, "microseconds": rows}, indent=1) + "\n"
    if arguments.json:
        arguments.json.write_text(result)
    if arguments.markdown:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "schedulers.json").write_text(result)
        replace(ROOT / "docs" / "samplers.md", "schedulers", markdown(machine, rows))


if __name__ == "__main__":
    main()
