"""Where an accelerated network's time goes on a CPU: kinds of work, their share, and what they reach.

    python benchmarks/bench_profile.py [--workload cifar10-batch1] [--dtype bfloat16] [--threads 2]
        [--memory balanced] [--least 0.01] [--cpu-time]

Every operation that PyTorch's dispatcher sees is timed while a mode watches (torch.utils._python_dispatch);
the time between them, in calls that nobody watches, is Python's and the dispatcher's: "between operations".
Rows are operations at one size of image or number of rows, from a share of `--least` on; the rest stands
together. `GFLOP/s` counts the direct algorithm's operations, as bench_models.py does, of which Winograd's
algorithm needs fewer. Medians of the calls; `us` is that of one call.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from bench_models import WORKLOADS, Network
from peak import fma_round
from results import where
from timing import stamp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import difusores

ROUNDS = 5
Clock = Callable[[], float]
Key = tuple[str, str]  # what is done, and at which size
CONVOLUTIONS = (
    "winograd_conv",
    "gemm_conv",
    "_convolution_pointwise",
    "_convolution_pointwise_",
    "convolution",
)
PRODUCTS = ("_linear_pointwise", "linear", "mm", "addmm", "bmm", "baddbmm")


def operations(name: str, overload: str, args: Sequence[Any], out: Any) -> float:
    """Floating-point operations of the direct algorithm; 0 for what is no product."""
    if "attention" in name:  # ours, or one of PyTorch's
        q, k, v = args[:3]
        return float(2 * math.prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3]))
    if name == "gemm_conv" and out.ndim < 4:  # rows; with GEGLU there are fewer channels out
        return 2.0 * out.numel() / out.shape[-1] * args[1].numel()
    if name in CONVOLUTIONS:
        tensors = [t for t in args if isinstance(t, Tensor) and t.ndim == 4]
        weight = tensors[2 if overload == "binary" else 1]
        return 2.0 * out.numel() / out.shape[1] * weight.numel()
    if name in PRODUCTS:
        rows = args[1 if name in ("addmm", "baddbmm") else 0]
        return 2.0 * out.numel() * rows.shape[-1]
    return 0.0


def size(name: str, out: Any) -> str:
    """An image's, a matrix's or nothing."""
    if name in CONVOLUTIONS and out.ndim == 4:
        return f"{out.shape[2]}×{out.shape[3]}"
    if name in (*PRODUCTS, "gemm_conv"):
        return f"{out.numel() // out.shape[-1]} rows"
    return f"{out.shape[2]} tokens" if "attention" in name else ""


class Watch(TorchDispatchMode):
    """Seconds, calls and operations of each kind in one call of a network."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.seconds: dict[Key, float] = defaultdict(float)
        self.calls: dict[Key, int] = defaultdict(int)
        self.operations: dict[Key, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        start = self.clock()
        out = func(*args, **(kwargs or {}))
        taken = self.clock() - start
        name = func.overloadpacket.__name__
        result = out[0] if isinstance(out, tuple) else out
        key = (name, size(name, result))
        self.seconds[key] += taken
        self.calls[key] += 1
        self.operations[key] += operations(name, func._overloadname, args, result)
        return out


def profile(
    call: Callable[[], object], clock: Clock, rounds: int = ROUNDS
) -> tuple[float, list[dict[str, Any]]]:
    """Median seconds of a call; for each kind of operation a row: its median seconds, calls, operations."""
    call()
    plain, watched = [], []
    for _ in range(rounds):
        start = clock()
        call()
        plain.append(clock() - start)
        with Watch(clock) as watch:
            call()
        watched.append(watch)
    rows = [
        {
            "name": key[0],
            "size": key[1],
            "seconds": statistics.median(watch.seconds[key] for watch in watched),
            "calls": watched[0].calls[key],
            "operations": watched[0].operations[key],
        }
        for key in watched[0].seconds
    ]
    return statistics.median(plain), sorted(rows, key=lambda row: -row["seconds"])


def reached(adds: Callable[[], float], clock: Clock) -> float:
    """Operations a second of a round of multiply-adds, by the clock of the profile; median."""
    rates = []
    for _ in range(ROUNDS):
        start = clock()
        done = adds()
        rates.append(done / (clock() - start))
    return statistics.median(rates)


def markdown(whole: float, rows: Sequence[Mapping[str, Any]], peak: float | None, least: float) -> str:
    """The table; rows below `least` of the whole together."""
    lines = [
        "| operation | size | calls | ms | share | us a call | GFLOP | GFLOP/s | of the peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    shown = [row for row in rows if row["seconds"] >= least * whole]
    rest = [row for row in rows if row["seconds"] < least * whole]
    together = {key: sum(row[key] for row in rest) for key in ("seconds", "calls", "operations")}
    between = whole - sum(row["seconds"] for row in rows)
    last = [
        {"name": "other operations", "size": "", **together},
        {"name": "between operations", "size": "", "seconds": between, "calls": 0, "operations": 0},
    ]
    for row in [*shown, *last]:
        rate = row["operations"] / row["seconds"] / 1e9 if row["operations"] else 0
        lines.append(
            f"| {row['name']} | {row['size']} | {row['calls'] or ''} | {1e3 * row['seconds']:.2f} "
            f"| {row['seconds'] / whole:.1%} | {1e6 * row['seconds'] / max(row['calls'], 1):.0f} "
            f"| {row['operations'] / 1e9:.2f} | {rate:.0f} "
            f"| {f'{rate / peak:.0%}' if peak and rate else ''} |"
        )
    total = sum(row["operations"] for row in rows)
    rate = total / whole / 1e9
    lines.append(
        f"| whole | | {sum(row['calls'] for row in rows)} | {1e3 * whole:.2f} | | | {total / 1e9:.2f} "
        f"| {rate:.0f} | {f'{rate / peak:.0%}' if peak else ''} |"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workload", choices=list(WORKLOADS), default="cifar10-batch1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--memory", choices=("lean", "balanced", "fast"), default="balanced")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--least", type=float, default=0.01, help="share from which on a row is shown")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and the processor's time: for a machine that others use",
    )
    args = parser.parse_args(arguments)
    threads, clock = (1, time.process_time) if args.cpu_time else (args.threads, time.perf_counter)
    torch.set_num_threads(threads)
    workload = WORKLOADS[args.workload]
    torch.manual_seed(0)
    with torch.device("meta"):
        model = getattr(difusores, workload.kind)(**workload.config)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
        difusores.accelerate(model, dtype=args.dtype, memory=args.memory)
        network, case = Network(model), workload.cases()[0]
        whole, rows = profile(lambda: network(*case), clock)
    precision = "bf16" if args.dtype == "bfloat16" else "fp32"
    peak = reached(fma_round(threads, precision), clock)
    words = f"{1e-9 * peak:.0f} GFLOP/s of {precision} multiply-adds" if peak else "peak not known"
    print(f"{args.workload}, {args.dtype or 'float32'}: {where(stamp())}; {words}\n")
    print(markdown(whole, rows, 1e-9 * peak if peak else None, args.least))


if __name__ == "__main__":
    main()
