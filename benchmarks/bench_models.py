"""Whole networks beside what else there is: diffusers, torch.compile, zentorch, OpenVINO, ONNX Runtime.

    python benchmarks/bench_models.py [--workload NAME ...] [--peer NAME ...] [--seconds S] [--quick]
    python benchmarks/bench_models.py --table

Workloads have the public configurations and random weights, the same for all. Every peer lives in a process
of its own and is asked in turn (contest.py). Its results have to agree with the float64 (large networks:
float32) ones of diffusers first, for three inputs at two timesteps each, of which the worst counts; what does
not is not timed. Figures go to benchmarks/results/, one JSON file a workload; `--table` prints all results
that are there as Markdown, draws docs/images/networks.png and writes the tables of README.md (results.py).
Exact methods alone: "bf16" is rounding. What is approximate stands in bench_approximate.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import results
import torch
from bench_unet import CONFIGS
from contest import Call, Contestant, apart, compete
from peak import fma_peak
from timing import stamp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import difusores

STABLE_DIFFUSION: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
INPUTS, TIMESTEPS = 3, (500, 50)
TOGETHER = 4  # large networks beside diffusers' in 24 GB
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """A network and the shapes of its inputs.

    Attributes:
        kind: name of the class in both libraries.
        wide: whether the oracle is float64; else the network is large, and only some peers fit into memory
            at a time.
    """

    kind: str
    config: dict[str, Any]
    sample: tuple[int, ...]
    wide: bool = True

    def cases(self) -> list[Inputs]:
        """Three inputs, each at two timesteps where the network takes one; the first is timed."""
        found: list[Inputs] = []
        for t in TIMESTEPS[: 1 if self.kind == "AutoencoderKL" else None]:
            for seed in range(INPUTS):
                generator = torch.Generator().manual_seed(1 + seed)
                x = torch.randn(self.sample, generator=generator)
                case: Inputs = (x,)
                if self.kind != "AutoencoderKL":
                    case += (torch.full((len(x),), t),)
                if self.kind == "UNet2DConditionModel":
                    case += (torch.randn(len(x), 77, 768, generator=generator),)
                found.append(case)
        return found


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


def cast(case: Inputs, dtype: torch.dtype, last: bool) -> Inputs:
    """A case in another dtype; last: the images in channels_last."""
    x, *rest = (t.to(dtype) if t.is_floating_point() else t for t in case)
    return (x.contiguous(memory_format=torch.channels_last) if last else x, *rest)


def eager(
    model: nn.Module,
    cases: Sequence[Inputs],
    last: bool = False,
    dtype: torch.dtype = torch.float32,
    compiler: str | None = None,
) -> list[Call]:
    """A library as it is, or by torch.compile with frozen weights and this backend of it."""
    if last:
        model = model.to(memory_format=torch.channels_last)
    network: nn.Module = Network(model.to(dtype))
    if compiler is not None:
        if compiler == "zentorch":
            importlib.import_module("zentorch")  # registers its backend
        torch._inductor.config.freezing = True
        network = torch.compile(network, backend=compiler)  # type: ignore[assignment]
    return [partial(network, *cast(case, dtype, last)) for case in cases]


def accelerated(model: nn.Module, cases: Sequence[Inputs], **options: Any) -> list[Call]:
    """A library's model after `difusores.accelerate`."""
    report = difusores.accelerate(model, **options)
    calls: list[Any] = [partial(Network(model), *case) for case in cases]
    calls[0].report = report
    return calls


def on_openvino(model: nn.Module, cases: Sequence[Inputs], precision: str) -> list[Call]:
    """OpenVINO, for latency, with as many threads as torch has."""
    import openvino

    converted = openvino.convert_model(Network(model), example_input=cases[0])
    converted.reshape({i: list(t.shape) for i, t in enumerate(cases[0])})
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(converted, "CPU", options).create_infer_request()

    def call(arrays: list[Any]) -> Tensor:
        return torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])

    return [partial(call, [t.numpy() for t in case]) for case in cases]


def on_onnxruntime(model: nn.Module, cases: Sequence[Inputs]) -> list[Call]:
    """ONNX Runtime with all its graph optimisations."""
    import onnxruntime

    names = [f"input{i}" for i in range(len(cases[0]))]
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        torch.onnx.export(Network(model), cases[0], file, input_names=names, opset_version=17, dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def call(arrays: dict[str, Any]) -> Tensor:
        return torch.from_numpy(session.run(None, arrays)[0])

    return [partial(call, {name: t.numpy() for name, t in zip(names, case, strict=True)}) for case in cases]


# name -> precision, library, what is done to its model; those that are compared most stand together, and of
# four in turn (`TOGETHER`) no two need 7 GB beside the weights of a large network
PEERS: dict[str, tuple[str, str, Callable[..., list[Call]]]] = {
    "diffusers": ("fp32", "diffusers", eager),
    "OpenVINO f32": ("fp32", "diffusers", partial(on_openvino, precision="f32")),
    "OpenVINO bf16": ("bf16", "diffusers", partial(on_openvino, precision="bf16")),
    "difusores accelerated": ("fp32", "difusores", accelerated),
    "difusores accelerated bf16": ("bf16", "difusores", partial(accelerated, dtype="bfloat16")),
    "difusores accelerated, invariant": ("fp32", "difusores", partial(accelerated, invariant=True)),
    "diffusers accelerated": ("fp32", "diffusers", accelerated),
    "zentorch": ("fp32", "diffusers", partial(eager, last=True, compiler="zentorch")),
    "zentorch bf16": (
        *("bf16", "diffusers"),
        partial(eager, last=True, dtype=torch.bfloat16, compiler="zentorch"),
    ),
    "difusores": ("fp32", "difusores", eager),
    "diffusers channels_last": ("fp32", "diffusers", partial(eager, last=True)),
    "diffusers channels_last bf16": ("bf16", "diffusers", partial(eager, last=True, dtype=torch.bfloat16)),
    "ONNX Runtime": ("fp32", "diffusers", on_onnxruntime),
    "torch.compile": ("fp32", "diffusers", partial(eager, last=True, compiler="inductor")),
}
QUICK = ("diffusers", "OpenVINO f32", "OpenVINO bf16", "difusores accelerated", "difusores accelerated bf16")


def contestant(peer: str, workload: Workload, weights: str) -> Contestant:
    precision, library, prepare = PEERS[peer]
    getattr(importlib.import_module(library), workload.kind)  # imported before the fork, not as a part of it
    return Contestant(
        precision, lambda: build(library, workload, weights), lambda model: prepare(model, workload.cases())
    )


def write_oracle(workload: Workload, weights: str, file: str) -> None:
    """Random weights; what the network makes of the cases, and its floating-point operations."""
    torch.manual_seed(0)
    model = getattr(diffusers, workload.kind)(**workload.config).eval()
    torch.save(model.state_dict(), weights)
    cases = workload.cases()
    with torch.no_grad():
        meta = Network(build("diffusers", workload, weights).to("meta"))
        with FlopCounterMode(display=False) as counter:
            meta(*(t.to("meta") for t in cases[0]))
        wide = torch.float64 if workload.wide else torch.float32
        found = [call() for call in eager(model, cases, dtype=wide)]
    torch.save((found, counter.get_total_flops() / 1e9), file)


def measure(workload: Workload, peers: Sequence[str], seconds: float) -> tuple[float, dict[str, Any]]:
    """Billions of floating-point operations of one call, and every peer's row."""
    with tempfile.TemporaryDirectory() as folder:
        weights, file = f"{folder}/weights.pt", f"{folder}/oracle.pt"
        apart(write_oracle, workload, weights, file)
        wanted, gflop = torch.load(file)
        contestants = {peer: contestant(peer, workload, weights) for peer in peers}
        together = 99 if workload.wide else TOGETHER
        return round(gflop, 1), compete(contestants, wanted, seconds, together=together)


def machine() -> dict[str, Any]:
    """Processor, what it can, and versions."""
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    peers = ("diffusers", "openvino", "onnxruntime", "zentorch")
    packages = {name: version(name) for name in peers if find_spec(name)}
    return {
        **stamp(),
        "instructions": [flag for flag in known if flag in flags],
        "peak_gflops": fma_peak(torch.get_num_threads()),
        **packages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--peer", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--seconds", type=float, default=60.0, help="time of the rounds of one workload")
    parser.add_argument("--quick", action="store_true", help="two workloads and five peers, nothing is kept")
    parser.add_argument(
        "--table", action="store_true", help="tables and the picture of the results there are"
    )
    arguments = parser.parse_args()
    if arguments.table:
        results.publish()
        return
    warnings.simplefilter("ignore")  # of what tracing thinks about asserts in other people's code
    diffusers.utils.logging.set_verbosity_error()
    workloads, peers, seconds = arguments.workload, arguments.peer, arguments.seconds
    if arguments.quick:
        workloads, peers, seconds = ["cifar10-batch1", "cifar10-batch8"], QUICK, 10.0
    where = machine()
    for name in ("openvino", "onnxruntime"):  # before the forks: an import is no part of the preparation
        if find_spec(name):
            importlib.import_module(name)
    for name in workloads:
        gflop, rows = measure(WORKLOADS[name], peers, seconds)
        result = {"workload": name, "gflop": gflop, "machine": where, "rows": rows}
        print(json.dumps(result, indent=1) if arguments.quick else results.markdown(result), flush=True)
        if not arguments.quick:
            results.keep(f"models-{name}", result)


if __name__ == "__main__":
    main()
