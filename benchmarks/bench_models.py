"""Whole networks beside what else there is: diffusers, OpenVINO, ONNX Runtime.

    python benchmarks/bench_models.py [--workload NAME ...] [--peer NAME ...] [--seconds S] [--quick]
    python benchmarks/bench_models.py --table

Workloads have the public configurations and random weights, the same for all. Every peer lives in a process
of its own and is asked in turn, so that all see the same machine. Its result has to agree with the float64
(large networks: float32) result of diffusers first; what does not is not timed. Figures go to
benchmarks/results/, one JSON file a workload; `--table` prints them all as Markdown. Exact methods alone:
"bf16" is rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import random
import resource
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import onnxruntime
import openvino
import torch
from bench_unet import CONFIGS
from timing import stamp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import difusores

RESULTS = Path(__file__).parent / "results"
STABLE_DIFFUSION: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
LIMITS = {"fp32": 5e-5, "bf16": 5e-2}  # relative L2 distance from the oracle


@dataclass(frozen=True)
class Workload:
    """A network and the shapes of its inputs.

    Attributes:
        kind: name of the class in both libraries.
        wide: whether the oracle is float64.
    """

    kind: str
    config: dict[str, Any]
    sample: tuple[int, ...]
    wide: bool = True

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.sample, generator=generator)
        if self.kind == "AutoencoderKL":
            return (x,)
        t = torch.full((len(x),), 500)
        if self.kind == "UNet2DModel":
            return x, t
        return x, t, torch.randn(len(x), 77, 768, generator=generator)


WORKLOADS = {
    "cifar10-batch1": Workload("UNet2DModel", CONFIGS["cifar10"], (1, 3, 32, 32)),
    "cifar10-batch8": Workload("UNet2DModel", CONFIGS["cifar10"], (8, 3, 32, 32)),
    "cat-256": Workload("UNet2DModel", CONFIGS["cat"], (1, 3, 256, 256)),
    "sd-256px": Workload("UNet2DConditionModel", STABLE_DIFFUSION, (2, 4, 32, 32), wide=False),
    "sd-512px": Workload("UNet2DConditionModel", STABLE_DIFFUSION, (2, 4, 64, 64), wide=False),
    "vae-decode-512px": Workload("AutoencoderKL", AUTOENCODER, (1, 4, 64, 64), wide=False),
}


class Network(nn.Module):
    """Tensors in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        call = self.model.decode if hasattr(self.model, "decode") else self.model
        out: Tensor = call(*inputs, return_dict=False)[0]
        return out


def build(library: str, workload: Workload, weights: str) -> nn.Module:
    """The model of a library with the weights of the file."""
    with torch.device("meta"):
        model: nn.Module = getattr(importlib.import_module(library), workload.kind)(**workload.config)
    model.load_state_dict(torch.load(weights, mmap=True), assign=True)
    return model.eval()


def eager(library: str, last: bool = False, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    """A library as it is."""

    def make(workload: Workload, weights: str) -> Callable[[], Tensor]:
        model = build(library, workload, weights).to(dtype)
        x, *rest = (t.to(dtype) if t.is_floating_point() else t for t in workload.inputs())
        if last:
            model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        network = Network(model)
        return lambda: network(x, *rest)

    return make


def accelerated(library: str, dtype: str | None = None) -> Callable[..., Any]:
    """A library's model after `difusores.accelerate`."""

    def make(workload: Workload, weights: str) -> Callable[[], Tensor]:
        network = Network(build(library, workload, weights))
        report = difusores.accelerate(network.model, dtype=dtype)
        inputs = workload.inputs()

        def call() -> Tensor:
            out: Tensor = network(*inputs)
            return out

        call.report = report  # type: ignore[attr-defined]
        return call

    return make


def on_openvino(precision: str) -> Callable[..., Any]:
    """OpenVINO, for latency, with as many threads as torch has."""

    def make(workload: Workload, weights: str) -> Callable[[], Tensor]:
        inputs = workload.inputs()
        model = openvino.convert_model(Network(build("diffusers", workload, weights)), example_input=inputs)
        model.reshape({i: list(t.shape) for i, t in enumerate(inputs)})
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = openvino.Core().compile_model(model, "CPU", options)
        request, arrays = compiled.create_infer_request(), [t.numpy() for t in inputs]
        return lambda: torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])

    return make


def on_onnxruntime(workload: Workload, weights: str) -> Callable[[], Tensor]:
    """ONNX Runtime with all its graph optimisations."""
    inputs = workload.inputs()
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        names = [f"input{i}" for i in range(len(inputs))]
        network = Network(build("diffusers", workload, weights))
        torch.onnx.export(network, inputs, file, input_names=names, opset_version=17, dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    arrays = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


PEERS: dict[str, tuple[str, Callable[..., Callable[[], Tensor]]]] = {
    "diffusers": ("fp32", eager("diffusers")),
    "diffusers channels_last": ("fp32", eager("diffusers", last=True)),
    "diffusers bf16": ("bf16", eager("diffusers", last=True, dtype=torch.bfloat16)),
    "ONNX Runtime": ("fp32", on_onnxruntime),
    "OpenVINO f32": ("fp32", on_openvino("f32")),
    "OpenVINO bf16": ("bf16", on_openvino("bf16")),
    "difusores": ("fp32", eager("difusores")),
    "difusores accelerated": ("fp32", accelerated("difusores")),
    "difusores accelerated bf16": ("bf16", accelerated("difusores", "bfloat16")),
    "diffusers accelerated": ("fp32", accelerated("diffusers")),
}
QUICK = ("diffusers", "OpenVINO f32", "OpenVINO bf16", "difusores accelerated", "difusores accelerated bf16")


# The parent has imported everything and computes on one thread, so that a fork is safe and costs nothing: a
# process forked from one whose team of threads has worked waits for that team for ever.
FORK = multiprocessing.get_context("fork")
THREADS = torch.get_num_threads()


def work(pipe: Any, peer: str, workload: Workload, weights: str, threads: int) -> None:
    """A peer's process: sets up, then answers "result" and "time" until it is told None."""
    try:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        start = time.perf_counter()
        call = PEERS[peer][1](workload, weights)
        first = call()
        pipe.send({"setup_s": round(time.perf_counter() - start, 2)})
        while (order := pipe.recv()) is not None:
            if order == "result":
                pipe.send(call().float().contiguous().numpy() if first is not None else None)
                continue
            before = resource.getrusage(resource.RUSAGE_SELF)
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_SELF)
            answer = {
                "seconds": elapsed,
                "faults": after.ru_minflt - before.ru_minflt,
                "peak_gb": round(after.ru_maxrss * 1024 / 1e9, 2),
            }
            if order == "last" and hasattr(call, "report"):
                answer["packed_gb"] = round(call.report.packed_bytes / 1e9, 3)
                answer["share_not_replaced"] = round(call.report.share_not_replaced(call), 4)
            pipe.send(answer)
    except Exception:
        pipe.send({"error": traceback.format_exc().strip().splitlines()[-1]})


class Process:
    """The main process's end of a peer."""

    def __init__(self, peer: str, workload: Workload, weights: str) -> None:
        self.pipe, theirs = FORK.Pipe()
        arguments = (theirs, peer, workload, weights, THREADS)
        self.process = FORK.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.setup = self.answer()

    def ask(self, order: str) -> Any:
        self.pipe.send(order)
        return self.answer()

    def answer(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            return {"error": "the process ended"}

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(20)
        self.process.kill()


def oracle(workload: Workload, folder: str, weights: str) -> None:
    """Write random weights, what the network makes of the inputs, and its floating-point operations."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = getattr(diffusers, workload.kind)(**workload.config).eval()
    torch.save(model.state_dict(), weights)
    with torch.no_grad():
        meta = Network(build("diffusers", workload, weights).to("meta"))
        with FlopCounterMode(display=False) as counter:
            meta(*(t.to("meta") for t in workload.inputs()))
        wide = torch.float64 if workload.wide else torch.float32
        inputs = (t.to(wide) if t.is_floating_point() else t for t in workload.inputs())
        found = (Network(model.to(wide))(*inputs), counter.get_total_flops() / 1e9)
    torch.save(found, f"{folder}/oracle.pt")


def measure(name: str, peers: list[str], seconds: float) -> dict[str, Any]:
    """Every peer's row for one workload."""
    workload = WORKLOADS[name]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/weights.pt"
        first = FORK.Process(target=oracle, args=(workload, folder, weights))
        first.start()
        first.join()
        want, gflop = torch.load(f"{folder}/oracle.pt")
        ready: dict[str, Process] = {}
        for peer in peers:
            process = Process(peer, workload, weights)
            row = rows[peer] = dict(process.setup)
            print(f"{name}: {peer} {row}", file=sys.stderr, flush=True)
            got = process.ask("result") if "error" not in row else None
            if isinstance(got, dict):
                row.update(got)
            elif got is not None:
                error = ((torch.from_numpy(got).to(want.dtype) - want).norm() / want.norm()).item()
                row["distance"] = float(f"{error:.2e}")
                if error <= LIMITS[PEERS[peer][0]]:
                    ready[peer] = process
                    continue
                row["error"] = f"its result is {error:.1e} away from the oracle"
            process.end()
        print(f"{name}: {len(ready)} peers begin", file=sys.stderr, flush=True)
        samples: dict[str, list[dict[str, Any]]] = {peer: [] for peer in ready}
        end, order, rounds = time.perf_counter() + seconds, list(ready), 0
        while rounds < 3 or time.perf_counter() < end:
            random.Random(rounds).shuffle(order)
            for peer in order:
                samples[peer].append(ready[peer].ask("time"))
            rounds += 1
        for peer, process in ready.items():
            last = process.ask("last")
            process.end()
            times = sorted(sample["seconds"] for sample in samples[peer])
            rows[peer].update(
                ms=round(1e3 * statistics.median(times), 1),
                ms_quartiles=[round(1e3 * times[len(times) * i // 4], 1) for i in (1, 3)],
                rounds=rounds,
                faults=last["faults"],
                **{key: value for key, value in last.items() if key not in ("seconds", "faults")},
            )
    base = rows.get("diffusers", {}).get("ms")
    for row in rows.values():
        if base and "ms" in row:
            row["times_diffusers"] = round(base / row["ms"], 2)
    return {"workload": name, "gflop": round(gflop, 1), "machine": machine(), "peers": rows}


def machine() -> dict[str, Any]:
    """Processor, what it can, and versions."""
    from importlib.metadata import version

    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
    packages = {name: version(name) for name in ("diffusers", "openvino", "onnxruntime")}
    return {
        **stamp(),
        "threads": THREADS,
        "instructions": [flag for flag in known if flag in flags],
        **packages,
    }


def table() -> str:
    """All results as Markdown."""
    lines = []
    for file in sorted(RESULTS.glob("models-*.json")):
        result = json.loads(file.read_text())
        machine = result["machine"]
        lines += [
            f"**{result['workload']}**, {result['gflop']:.0f} GFLOP: {machine['processor']}, "
            f"{machine['threads']} threads, {' '.join(machine['instructions'])}; torch {machine['torch']}, "
            f"diffusers {machine['diffusers']}, OpenVINO {machine['openvino']}, "
            f"ONNX Runtime {machine['onnxruntime']}; {machine['date']}",
            "",
            "| | ms (quartiles) | × diffusers | GFLOP/s | distance | set-up s | peak GB | faults |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for peer, row in result["peers"].items():
            if "ms" not in row:
                lines.append(f"| {peer} | {row['error']} | | | | | | |")
                continue
            low, high = row["ms_quartiles"]
            lines.append(
                f"| {peer} | {row['ms']:.0f} ({low:.0f}–{high:.0f}) | {row.get('times_diffusers', '')} "
                f"| {1e3 * result['gflop'] / row['ms']:.0f} | {row['distance']:.1e} | {row['setup_s']:.1f} "
                f"| {row['peak_gb']} | {row['faults']} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--peer", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--seconds", type=float, default=60.0, help="time of the rounds of one workload")
    parser.add_argument("--quick", action="store_true", help="two workloads and five peers, nothing is kept")
    parser.add_argument("--table", action="store_true", help="print the results that there are as Markdown")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of what tracing thinks about asserts in other people's code
    diffusers.utils.logging.set_verbosity_error()
    workloads, peers, seconds = arguments.workload, arguments.peer, arguments.seconds
    if arguments.quick:
        workloads, peers, seconds = ["cifar10-batch1", "cifar10-batch8"], list(QUICK), 15.0
    for name in workloads:
        result = measure(name, peers, seconds)
        print(json.dumps(result, indent=1), flush=True)
        if not arguments.quick:
            RESULTS.mkdir(exist_ok=True)
            file = RESULTS / f"models-{name}.json"
            if file.is_file():  # rows of peers that this run left out stay, with the ratio of their own run
                result["peers"] = {**json.loads(file.read_text())["peers"], **result["peers"]}
            file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
