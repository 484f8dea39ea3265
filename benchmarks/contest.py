"""Contestants in processes of their own, checked first, then timed in turn, so that all see the same machine.

Threads that have worked wait for more work on their processor for milliseconds, which OpenMP's do for 5: the
next contestant is asked when those of the one before have gone to sleep.

A contestant is built (its library loads the network) and prepared (converted, compiled, packed, called once).
Its results have to agree with the oracle's; what does not agree is not timed. The parent has imported
everything and computes on one thread, so that a fork is safe and costs nothing: a process forked from one
whose team of threads has worked waits for that team for ever.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORK = multiprocessing.get_context("fork")
LIMITS = {"fp32": 5e-5, "bf16": 5e-2}  # relative L2 distance from the oracle
PAUSE, AWAKE = 5e-3, 1e-4  # seconds, and those of the processor that a sleeping process does not use in them
LONGEST_PAUSE = 1.0
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to compute some cases.

    Attributes:
        precision: "fp32" or "bf16", by which its distance from the oracle is judged.
        build: makes the network in its library, with its weights.
        prepare: what is then done to it; returns a call for each case, the first of which is timed. The first
            call may have a `report` of `difusores.accelerate`.
    """

    precision: str
    build: Callable[[], Any]
    prepare: Callable[[Any], Sequence[Call]]


def peak_gb(reset: bool = False) -> float:
    """Largest resident memory of this process since the last reset, in GB."""
    if reset:
        with contextlib.suppress(OSError):  # where the kernel forbids it, the peak is of the whole life
            Path("/proc/self/clear_refs").write_text("5")
    fields = Path("/proc/self/status").read_text().split()
    return round(int(fields[fields.index("VmHWM:") + 1]) * 1024 / 1e9, 2)


def _work(pipe: Any, contestant: Contestant, threads: int) -> None:
    """A contestant's process: sets up, then answers "results", "time" and "report" until it is told None."""
    try:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        start = time.perf_counter()
        network = contestant.build()
        built = time.perf_counter()
        calls = contestant.prepare(network)
        first = _array(calls[0]())
        setup = {"build_s": built - start, "prepare_s": time.perf_counter() - built}
        pipe.send({**{key: round(value, 2) for key, value in setup.items()}, "setup_peak_gb": peak_gb()})
        while (order := pipe.recv()) is not None:
            if order == "results":
                pipe.send([first, *(_array(call()) for call in calls[1:])])
                peak_gb(reset=True)
            elif order == "time":
                pipe.send(_timed(calls[0]))
            else:
                pipe.send(_reported(calls[0]))
    except Exception:
        pipe.send({"error": traceback.format_exc().strip().splitlines()[-1]})


def _array(result: Tensor) -> Any:
    """A copy, because a call may write to the same memory again."""
    return result.detach().float().contiguous().numpy().copy()


def _timed(call: Call) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return {"seconds": seconds, "faults": faults, "peak_gb": peak_gb()}


def _reported(call: Call) -> dict[str, Any]:
    """What the report of an accelerated model says; nothing of others."""
    report = getattr(call, "report", None)
    if report is None:
        return {}
    share = round(report.share_not_replaced(call), 4)
    return {"packed_gb": round(report.packed_bytes / 1e9, 3), "share_not_replaced": share}


class _Process:
    """The parent's end of a contestant."""

    def __init__(self, contestant: Contestant, threads: int) -> None:
        self.pipe, theirs = FORK.Pipe()
        arguments = (theirs, contestant, threads)
        self.process = FORK.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.setup = self._answer()

    def ask(self, order: str) -> Any:
        """Its answer, after which its threads are asleep."""
        with contextlib.suppress(OSError):  # it ended: then there is no answer either
            self.pipe.send(order)
        answer = self._answer()
        end = time.perf_counter() + LONGEST_PAUSE
        while self._worked() > AWAKE and time.perf_counter() < end:
            pass
        return answer

    def _worked(self) -> float:
        """Seconds of the processor that all its threads take during a pause."""
        clock = (~(self.process.pid or 0) << 3) | 2  # Linux's name for the clock of a process
        try:
            before = time.clock_gettime(clock)
            time.sleep(PAUSE)
            return time.clock_gettime(clock) - before
        except OSError:  # it ended
            return 0.0

    def _answer(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return {"error": "the process ended"}

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(20)
        self.process.kill()


def apart(work: Callable[..., None], *arguments: Any) -> None:
    """Do something in a process of its own, which leaves this one as it was.

    Raises:
        RuntimeError: it failed.
    """
    process = FORK.Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{work.__name__} ended with status {process.exitcode}")


def distance(got: Tensor, want: Tensor) -> float:
    """Relative L2."""
    return ((got.to(want.dtype) - want).norm() / want.norm()).item()


def _check(process: _Process, limit: float, wanted: Sequence[Tensor]) -> dict[str, Any]:
    """The worst distance of all cases; "error" where it is above the limit."""
    if "error" in process.setup:
        return {}
    results = process.ask("results")
    if isinstance(results, dict):
        return results
    worst = max(
        (distance(torch.from_numpy(got), want) for got, want in zip(results, wanted, strict=True)),
        key=lambda far: far if far == far else float("inf"),  # NaN is the worst
    )
    found: dict[str, Any] = {"distance": float(f"{worst:.2e}")}
    if not worst <= limit:
        found["error"] = f"its result is {worst:.1e} away from the oracle"
    return found


def compete(
    contestants: Mapping[str, Contestant],
    wanted: Sequence[Tensor],
    seconds: float,
    *,
    rounds: int = 3,
    together: int = 99,
    base: str = "diffusers",
    limits: Mapping[str, float] = LIMITS,
) -> dict[str, dict[str, Any]]:
    """A row of figures for each contestant.

    Args:
        wanted: the oracle's result of each case.
        seconds: time of the rounds of a group; there are at least `rounds` of them.
        together: contestants that the memory holds beside the base; more compete in groups, in their order.
        base: the contestant over whose time the others are faster; it takes part in every group.
        limits: see `LIMITS`.

    Returns:
        For each: set-up (`build_s`, `prepare_s`, `setup_peak_gb`), `distance` (relative L2, the worst case),
        `ms` (median), `ms_quartiles` and `rounds`, `times_base` within its group; `faults` of memory pages in
        the last round and `peak_gb` while it runs; of accelerated models `packed_gb` and
        `share_not_replaced`; or "error", in words.
    """
    others = [name for name in contestants if name != base]
    first = [base] if base in contestants else []
    rows: dict[str, dict[str, Any]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for begin in range(0, max(1, len(others)), together):
            group = {name: contestants[name] for name in [*first, *others[begin : begin + together]]}
            found = _compete(group, wanted, seconds, rounds, limits, threads)
            slowest = found.get(base, {}).get("ms")
            for row in found.values():
                if slowest and "ms" in row:
                    row["times_base"] = round(slowest / row["ms"], 2)
            rows = {**found, **rows}  # the base's row is that of the first group
    finally:
        torch.set_num_threads(threads)
    return {name: rows[name] for name in contestants}


def _compete(
    contestants: Mapping[str, Contestant],
    wanted: Sequence[Tensor],
    seconds: float,
    rounds: int,
    limits: Mapping[str, float],
    threads: int,
) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, _Process] = {}
    for name, contestant in contestants.items():
        process = _Process(contestant, threads)
        row = rows[name] = {**process.setup, **_check(process, limits[contestant.precision], wanted)}
        print(f"{name} {row}", file=sys.stderr, flush=True)
        if "error" in row:
            process.end()
        else:
            ready[name] = process
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in ready}
    end, order, count = time.perf_counter() + seconds, list(ready), 0
    while order and (count < rounds or time.perf_counter() < end):
        random.Random(count).shuffle(order)
        for name in order:
            samples[name].append(ready[name].ask("time"))
        count += 1
    for name, process in ready.items():
        reported = process.ask("report")
        process.end()
        rows[name].update(_figures(samples[name]), **reported)
    return rows


def _figures(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    failed = next((sample for sample in samples if "error" in sample), None)
    if failed is not None:
        return failed
    times = sorted(sample["seconds"] for sample in samples)
    return {
        "ms": round(1e3 * statistics.median(times), 1),
        "ms_quartiles": [round(1e3 * times[len(times) * i // 4], 1) for i in (1, 3)],
        "rounds": len(times),
        "faults": samples[-1]["faults"],
        "peak_gb": samples[-1]["peak_gb"],
    }
