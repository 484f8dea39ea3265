"""Times every kernel on a GPU beside PyTorch's ways and other libraries', after checking it.

A result is compared with a float64 oracle before it is timed, by the rule of the tests: at most twice eager
PyTorch's own error, plus four roundings of the largest number. A wrong result is reported and not timed.
Ops named "gradients" or "backward" are a forward pass and its backward pass: less the row of the forward
pass, the kernels of the gradients alone.

Each way is captured in a CUDA graph, so that what the processor needs to launch it is not in the figure.
`warm` is a tenth of a graph of ten calls, whose inputs lie in the L2 cache if they fit; `cold` is one call
after the L2 cache was overwritten, with the constant cost of starting a graph in it; `host` is what a call
from Python takes of the processor. Ways take turns in random order; figures are medians in microseconds.
Rates are of `warm`, over what this card reaches in a copy and in a matrix product, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from difusores import ops
from difusores.bench.case import KERNELS, Call, Case
from difusores.bench.cases import OPS, cases
from difusores.files import replacing
from difusores.ops.dispatch import BackendUnavailable, status

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PACKAGES = ("torch", "triton", "difusores", "xformers", "flash-attn", "apex")
ROUNDS = 20
CALLS = 10  # in the graph of `warm`


class Clock(Protocol):
    """Takes the time of several calls, interleaved."""

    def medians(self, calls: Mapping[str, Call]) -> dict[str, dict[str, Any]]:
        """For each name microseconds as `warm`, `cold` and `host`; or why there are none, as `not timed`."""
        ...


class GraphClock:
    """Events around replays of graphs, on one card."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(4 * l2, dtype=torch.uint8, device=device)

    def medians(self, calls: Mapping[str, Call]) -> dict[str, dict[str, Any]]:
        once, often, refused = {}, {}, dict[str, dict[str, Any]]()
        for name, call in calls.items():
            try:
                once[name], often[name] = self._captured(call, 1), self._captured(call, CALLS)
            except Exception as refusal:  # a way that waits for the GPU, or that no graph can hold
                refused[name] = {"not timed": f"not captured: {in_words(refusal)}"}
        order = list(often)
        taken: dict[str, dict[str, list[float]]] = {n: {"warm": [], "cold": [], "host": []} for n in order}
        shuffle = random.Random(0).shuffle
        for _ in range(ROUNDS):
            shuffle(order)
            for name in order:
                self.flush.zero_()
                taken[name]["cold"].append(self._microseconds(once[name].replay))
                taken[name]["warm"].append(self._microseconds(often[name].replay) / CALLS)
                taken[name]["host"].append(self._host(calls[name]))
        return refused | {
            name: {kind: round(statistics.median(times), 2) for kind, times in kinds.items()}
            for name, kinds in taken.items()
        }

    @staticmethod
    def _captured(call: Call, times: int) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph

    @staticmethod
    def _microseconds(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        taken: float = start.elapsed_time(end)
        return 1e3 * taken

    @staticmethod
    def _host(call: Call) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        torch.cuda.synchronize()
        return 1e6 * taken


def error(result: Any, eager: Any, oracle: Any) -> tuple[float, float]:
    """The largest error of a result, and the largest allowed; of several tensors, of the first wrong one."""

    def of_one(result: Tensor, eager: Tensor, oracle: Tensor) -> tuple[float, float]:
        allowed = 2 * (eager.double() - oracle).abs().max()
        allowed = allowed + 4 * torch.finfo(result.dtype).eps * oracle.abs().max()
        return (result.double() - oracle).abs().max().item(), allowed.item()

    tensors = [(t,) if isinstance(t, Tensor) else t for t in (result, eager, oracle)]
    errors = [of_one(*parts) for parts in zip(*tensors, strict=True)]
    return next((pair for pair in errors if not pair[0] <= pair[1]), max(errors))


def checked(case: Case, ways: Mapping[str, Call], drawn: set[str]) -> dict[str, dict[str, Any]]:
    """Of each way its error, or why it is not timed; nothing of those that draw numbers of their own."""
    standard, oracle = case.view(case.whole(partial(case.standard, *case.operands))()), case.oracle()
    results: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # PyTorch's words on each attention it does not take
                result = case.view(way())
                found, allowed = (0.0, 0.0) if name in drawn else error(result, standard, oracle)
        except Exception as refusal:  # Triton's, say, of a kernel that needs more than the card has
            results[name] = {"not timed": in_words(refusal)}
            continue
        results[name] = {} if name in drawn else {"error": found, "allowed": allowed}
        if wrong(results[name]):
            results[name]["not timed"] = f"wrong: error {found:.2e}, allowed {allowed:.2e}"
    return results


def measure(case: Case, clock: Clock, compile_too: bool, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """A row of the table: every way's times, or why it has none."""
    ways: dict[str, Call] = {"eager": partial(case.formula, *case.operands), **case.peers}
    if compile_too:
        ways["compile"] = partial(torch.compile(case.formula, dynamic=False), *case.operands)
    ways = {name: case.whole(way) for name, way in ways.items()}
    refused: dict[str, dict[str, Any]] = {}
    for kernel in case.kernels:
        reason = ops.availability()[case.registered][kernel]
        if reason is not None:
            refused[f"difusores {kernel}"] = {"not timed": reason}
        else:
            ways[f"difusores {kernel}"] = under(kernel, case.whole(case.ours))
    results = refused | checked(case, ways, {"eager", "compile"} if case.numbers else set())
    runnable = {name: way for name, way in ways.items() if "not timed" not in results[name]}
    for name, times in clock.medians(runnable).items():
        if "not timed" in times:
            results[name] |= times
            continue
        seconds = 1e-6 * times["warm"]
        rate = case.bytes / seconds / (1e9 * ceilings["copy GB/s"])
        if case.flops:
            rate = max(rate, case.flops / seconds / (1e12 * ceilings["matmul TFLOP/s"]))
        results[name] |= {**times, "of ceiling": round(rate, 3)}
    torch.compiler.reset()
    return {"op": case.op, "case": case.label, "bytes": case.bytes, "flops": case.flops, "ways": results}


def in_words(refusal: Exception) -> str:
    return (str(refusal).strip() or repr(refusal)).splitlines()[0][:200]


def wrong(way: Mapping[str, Any]) -> bool:
    return "error" in way and not way["error"] <= way["allowed"]


def under(kernel: str, call: Call) -> Call:
    def way() -> Any:
        with ops.use_backend(kernel):
            return call()

    return way


def measure_ceilings(clock: Clock, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this card reaches: bytes read and written by a copy, and a product of two large matrices."""
    big = 1 << 28 if device.type == "cuda" else 1 << 12
    side = 8192 if device.type == "cuda" else 64
    source = torch.randn(big, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = clock.medians({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b})
    return {
        "copy GB/s": round(8 * big / times["copy"]["warm"] / 1e3, 1),
        "matmul TFLOP/s": round(2 * side**3 / times["matmul"]["warm"] / 1e6, 2),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def lines(row: Mapping[str, Any]) -> list[str]:
    """A row for people: one line for each way, fastest first."""
    timed = [(way["warm"], name, way) for name, way in row["ways"].items() if "warm" in way]
    peers = [warm for warm, name, _ in timed if not name.startswith("difusores")]
    text = [f"{row['op']} {row['dtype']} {row['case']}"]
    for warm, name, way in sorted(timed):
        over = f"{min(peers) / warm:6.2f}x" if name.startswith("difusores") and peers else " " * 7
        times = f"{warm:9.2f}{way['cold']:9.2f}{way['host']:9.1f}"
        text.append(f"  {name:<18}{times}  {over}{way['of ceiling']:7.0%}")
    text += [f"  {name:<18}{way['not timed']}" for name, way in row["ways"].items() if "not timed" in way]
    return text


def run(
    names: Sequence[str],
    dtypes: Sequence[str],
    clock: Clock,
    device: torch.device,
    *,
    quick: bool = False,
    compile_too: bool = True,
    keep: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """All rows of the ops named, printed as they come; `keep` is given what there is after each of them."""
    torch.manual_seed(0)
    with torch.no_grad():
        ceilings = {dtype: measure_ceilings(clock, device, DTYPES[dtype]) for dtype in dtypes}
        print(
            f"ceilings: {ceilings}; warm, cold, host: us; x: of the fastest peer's speed; %: of the ceiling"
        )
        result: dict[str, Any] = {"ceilings": ceilings, "rows": []}
        for name in names:
            for dtype in dtypes:
                for case in cases(name, DTYPES[dtype], device, quick):
                    row = measure(case, clock, compile_too, ceilings[dtype]) | {"dtype": dtype}
                    print("\n".join(lines(row)), flush=True)
                    result["rows"].append(row)
                    keep(result)
    return result


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", choices=["gpu"], help="what to time")
    parser.add_argument("--op", choices=OPS, action="append", help="only this op; may be given again")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        action="append",
        help="may be given again; default: float16 and float32, in which attention has kernels of its own",
    )
    parser.add_argument("--quick", action="store_true", help="two shapes of each op")
    parser.add_argument(
        "--no-compile", action="store_true", help="without torch.compile, which takes a minute"
    )
    parser.add_argument("--json", type=Path, help="file for the figures, written after every row")


def run_bench(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise BackendUnavailable("there is nothing to time: no CUDA device was found")
    device = torch.device("cuda", torch.cuda.current_device())
    for kernel in KERNELS:
        if (reason := status(kernel)) is not None:
            print(f"{kernel}: {reason}", file=sys.stderr)
    stamp = {
        "device": torch.cuda.get_device_name(device),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(stamp))

    def keep(result: Mapping[str, Any]) -> None:
        with replacing(args.json) as unfinished:
            Path(unfinished).write_text(json.dumps({**stamp, **result}, indent=1) + "\n", encoding="utf-8")

    result = run(
        args.op or OPS,
        args.dtype or ("float16", "float32"),
        GraphClock(device),
        device,
        quick=args.quick,
        compile_too=not args.no_compile,
        **({} if args.json is None else {"keep": keep}),
    )
    return 1 if any(wrong(way) for row in result["rows"] for way in row["ways"].values()) else 0
