"""Interleaved timing: every contestant in every round, so that a drifting machine slows all of them alike."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

BLOCK = 200e-6  # seconds of calls in a row, so that the timer does not show


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds per call of each contestant.

    Every round calls each contestant in random order, all of them equally often: once, or as often as the
    slowest one fits into `BLOCK`. So a machine that drifts slows all alike, and all find the caches alike:
    called twice in a row, a fast one would find its own data there and a slow one not.
    There are as many rounds as fit into `seconds`, at least 7. `prepare` names what is done, untimed, before
    each call; then a round calls each contestant once. `clock` measures; `time.process_time` where others use
    the machine.
    """
    prepare = prepare or {}
    slowest = BLOCK if prepare else 1e-7
    for name, call in contestants.items():
        ready = prepare.get(name, _nothing)
        ready()
        call()
        ready()
        start = clock()
        call()
        slowest = max(slowest, clock() - start)
    repeats = max(1, round(BLOCK / slowest))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    rounds = 0
    order = list(contestants.items())
    shuffle = random.Random(0).shuffle
    while rounds < 7 or time.perf_counter() < end:
        rounds += 1
        shuffle(order)
        for name, call in order:
            prepare.get(name, _nothing)()
            start = clock()
            for _ in range(repeats):
                call()
            samples[name].append((clock() - start) / repeats)
    return {name: statistics.median(times) for name, times in samples.items()}


def _nothing() -> None:
    pass


def stamp() -> dict[str, str | int]:
    """What a figure has to be printed with: processor, threads, versions, date."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        fields = dict(
            line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line
        )
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name, family, number = (fields.get(k) for k in ("model name", "cpu family", "model"))
        model = f"{name or model} (family {family}, model {number})"
    return {
        "processor": model,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
