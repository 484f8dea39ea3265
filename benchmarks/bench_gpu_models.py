"""Whole networks and whole sampling loops on an NVIDIA GPU, in fp16, beside diffusers and torch.compile.

    python benchmarks/bench_gpu_models.py [--model NAME ...] [--loop NAME ...] [--compile] [--json FILE]
    python benchmarks/bench_gpu_models.py --table FILE

Public configurations and random weights, the same for all; nothing is downloaded. The oracle is diffusers in
fp32, without TF32, with the weights and inputs that fp16 has: a contestant may be twice as far from it as
diffusers' own fp16, plus 4 eps, and what is farther away is not timed. All contestants take turns; times are
medians by CUDA events, from before the first launch to after the last one, so that the host counts where it
is slower than the device. Loops are text to image without texts and decoder: UNet with guidance, and steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from bench_unet import CONFIGS
from gpu_model import SDXL, VAE
from timing import stamp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import difusores
from difusores.cuda_graph import Graphed

Call = Callable[[], Tensor]
STABLE_DIFFUSION: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs", "reduce-overhead")


@dataclass(frozen=True)
class Workload:
    """A network and the shapes of its inputs.

    Attributes:
        kind: name of the class in both libraries.
        context: width of the text, 0 for none.
    """

    kind: str
    config: dict[str, Any]
    sample: tuple[int, ...]
    context: int = 0

    def inputs(self, device: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Arguments of the network, rounded to fp16 first."""
        source = torch.Generator().manual_seed(1)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source).half().to(device, dtype)

        x, named = noise(*self.sample), dict[str, Any]()
        if self.kind == "AutoencoderKL":
            return (x,), named
        time = torch.tensor(500, device=device)
        if self.kind == "UNet2DModel":
            return (x, time), named
        context = noise(len(x), 77, self.context)
        if self.config.get("addition_embed_type") == "text_time":
            ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], device=device, dtype=dtype)
            named = {
                "added_cond_kwargs": {"text_embeds": noise(len(x), 1280), "time_ids": ids.repeat(len(x), 1)}
            }
        return (x, time, context), named


MODELS = {
    "sd15-batch2": Workload("UNet2DConditionModel", STABLE_DIFFUSION, (2, 4, 64, 64), 768),
    "sd15-batch8": Workload("UNet2DConditionModel", STABLE_DIFFUSION, (8, 4, 64, 64), 768),
    "sdxl-batch2": Workload("UNet2DConditionModel", SDXL, (2, 4, 128, 128), 2048),
    "cat-256-batch1": Workload("UNet2DModel", CONFIGS["cat"], (1, 3, 256, 256)),
    "cat-256-batch8": Workload("UNet2DModel", CONFIGS["cat"], (8, 3, 256, 256)),
    "vae-decode-512px": Workload("AutoencoderKL", VAE, (1, 4, 64, 64)),
}
LOOPS = {"dpm++2m-25": ("DPMSolverMultistepScheduler", 25), "ddim-50": ("DDIMScheduler", 50)}
GUIDANCE = 7.5


class Network:
    """What a contestant calls: the whole model, or the decoder of an autoencoder."""

    def __init__(self, workload: Workload, device: str, dtype: torch.dtype) -> None:
        self.workload, self.device, self.dtype = workload, device, dtype
        self.wide = torch.float64 if dtype is torch.float32 else torch.float32  # the oracle's
        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(diffusers, workload.kind)(**workload.config)
        self.weights = {k: t.half().to(dtype) for k, t in model.state_dict().items()}

    def model(self, library: Any, last: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
        """A library's model with the weights, which models of one dtype and layout share."""
        with torch.device("meta"):
            model: nn.Module = getattr(library, self.workload.kind)(**self.workload.config)
        weights = {k: t.to(dtype or self.dtype) for k, t in self.weights.items()}
        model.load_state_dict(weights, assign=True)
        model = model.eval().requires_grad_(False)
        return model.to(memory_format=torch.channels_last) if last else model

    def call(self, model: Any, last: bool = False, dtype: torch.dtype | None = None) -> Call:
        """One call; model: a module, or what wraps one."""
        (x, *rest), named = self.workload.inputs(self.device, dtype or self.dtype)
        if last:
            x = x.to(memory_format=torch.channels_last)
        function = model.decode if self.workload.kind == "AutoencoderKL" else model
        return lambda: function(x, *rest, **named, return_dict=False)[0]  # type: ignore[no-any-return]

    def accelerated(self, library: Any) -> nn.Module:
        model = self.model(library)
        difusores.accelerate(model)
        return model

    def graphed(self, model: nn.Module, last: bool = False) -> Call:
        """Our graph of a module; a new result for each call."""
        if self.workload.kind != "AutoencoderKL":
            return self.call(Graphed(model), last)
        decode = Graphed(model.decode)  # type: ignore[arg-type]
        (x, *_), _ = self.workload.inputs(self.device, self.dtype)
        return lambda: decode(x, return_dict=False)[0]  # type: ignore[no-any-return]


def plain_graph(call: Call) -> Call:
    """PyTorch's own capture of a call, whose result is written again each time: a graph without a wrapper."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def contestants(net: Network, compiles: bool) -> dict[str, Callable[[], Call]]:
    """What makes each contestant's call; diffusers as it is comes first."""
    found: dict[str, Callable[[], Call]] = {
        "diffusers": lambda: net.call(net.model(diffusers)),
        "diffusers channels_last": lambda: net.call(net.model(diffusers, True), True),
        "diffusers graph": lambda: plain_graph(net.call(net.model(diffusers))),
        "diffusers channels_last graph": lambda: plain_graph(net.call(net.model(diffusers, True), True)),
        "difusores": lambda: net.call(net.model(difusores)),
        "difusores channels_last": lambda: net.call(net.model(difusores, True), True),
        "difusores accelerated": lambda: net.call(net.accelerated(difusores)),
        "difusores accelerated graph": lambda: net.graphed(net.accelerated(difusores)),
        "diffusers accelerated": lambda: net.call(net.accelerated(diffusers)),
        "diffusers accelerated graph": lambda: net.graphed(net.accelerated(diffusers)),
    }
    if compiles:
        torch._dynamo.reset()  # once: what one mode compiled, a reset for the next would throw away
        name = "diffusers channels_last torch.compile"
        for mode in COMPILE_MODES:
            found[f"{name} {mode}"] = lambda mode=mode: compiled(net, mode)
        found[f"{name} default graph"] = lambda: plain_graph(compiled(net, "default"))
    return found


def compiled(net: Network, mode: str) -> Call:
    model: Any = net.model(diffusers, True)
    if net.workload.kind == "AutoencoderKL":
        model.decode = torch.compile(model.decode, mode=mode, fullgraph=True)
        return net.call(model, True)
    return net.call(torch.compile(model, mode=mode, fullgraph=True), True)


@dataclass(frozen=True)
class Loop:
    """A sampling run of a UNet with guidance, as each library does it."""

    net: Network
    scheduler: str
    steps: int

    def made(self, library: Any) -> Any:
        # without these, DDIM would clip latents
        config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        more = {"clip_sample": False, "set_alpha_to_one": False} if "DDIM" in self.scheduler else {}
        return getattr(library, self.scheduler)(**config, **more)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """First latents of half the UNet's batch, and the text."""
        (x, _, context), _ = self.net.workload.inputs(self.net.device, dtype)
        return x[: len(x) // 2].contiguous(), context

    def theirs(self, unet: Any, dtype: torch.dtype, last: bool = False) -> Call:
        """The loop of diffusers' pipeline."""
        first, context = self.tensors(dtype)
        scheduler = self.made(diffusers)

        def run() -> Tensor:
            scheduler.set_timesteps(self.steps, device=self.net.device)
            x = first * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                given = scheduler.scale_model_input(torch.cat([x] * 2), t)
                if last:
                    given = given.to(memory_format=torch.channels_last)
                e = unet(given, t, encoder_hidden_states=context, return_dict=False)[0]
                without, told = e.chunk(2)
                x = scheduler.step(without + GUIDANCE * (told - without), t, x, return_dict=False)[0]
            return x

        return run

    def ours(self, unet: nn.Module, graph: bool) -> Call:
        """`Plan.run`."""
        first, context = self.tensors(self.net.dtype)
        plan = self.made(difusores).plan(self.steps)

        def model(x: Tensor, t: Tensor) -> Tensor:
            return unet(x, t, context, return_dict=False)[0]  # type: ignore[no-any-return]

        return lambda: plan.run(
            model, first * plan.init_noise_sigma, guidance=(1 - GUIDANCE, GUIDANCE), graph=graph
        )


def loops(loop: Loop, compiles: bool) -> dict[str, Callable[[], Call]]:
    net, dtype = loop.net, loop.net.dtype
    found: dict[str, Callable[[], Call]] = {
        "diffusers": lambda: loop.theirs(net.model(diffusers), dtype),
        "diffusers channels_last": lambda: loop.theirs(net.model(diffusers, True), dtype, True),
        "difusores": lambda: loop.ours(net.model(difusores), False),
        "difusores graph": lambda: loop.ours(net.model(difusores), True),
        "difusores accelerated": lambda: loop.ours(net.accelerated(difusores), False),
        "difusores accelerated graph": lambda: loop.ours(net.accelerated(difusores), True),
        "diffusers accelerated graph": lambda: loop.ours(net.accelerated(diffusers), True),
    }
    for mode in COMPILE_MODES[-1:] if compiles else ():
        found[f"diffusers channels_last torch.compile {mode}"] = lambda mode=mode: loop.theirs(
            torch.compile(net.model(diffusers, True), mode=mode, fullgraph=True), dtype, True
        )
    return found


def distance(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def once(call: Call, device: str) -> float:
    """Milliseconds of a call."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1])


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def compare(
    makers: dict[str, Callable[[], Call]],
    want: Tensor,
    device: str,
    dtype: torch.dtype,
    seconds: float,
    fewest: int,
) -> dict[str, dict[str, Any]]:
    """Every contestant's distance from what the oracle wants, and milliseconds; the first sets the limit.

    seconds, fewest: how long rounds are begun, and how many there are at least.
    """
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Call] = {}
    with torch.no_grad():
        limit = None
        for name, make in makers.items():
            row = rows[name] = {}
            start = time.perf_counter()
            try:
                call = make()
                for _ in range(2):  # compiled, captured and packed on the way
                    got = call()
                row["distance"] = float(f"{distance(got, want):.3g}")
            except Exception as error:
                row["error"] = in_words(error)
                continue
            row["setup_s"] = round(time.perf_counter() - start, 1)
            limit = limit or 2 * row["distance"] + 4 * torch.finfo(dtype).eps
            if not row["distance"] <= limit:  # nor NaN
                row["error"] = f"{row['distance']} from the oracle; the limit is {limit:.3g}"
                continue
            ready[name] = call
        samples: dict[str, list[float]] = {name: [] for name in ready}
        order, end, rounds = list(ready), time.perf_counter() + seconds, 0
        while rounds < fewest or (time.perf_counter() < end and rounds < 200):
            random.Random(rounds).shuffle(order)
            for name in list(order):
                try:
                    samples[name].append(once(ready[name], device))
                except Exception as error:  # it leaves, and the others go on
                    rows[name]["error"] = in_words(error)
                    order.remove(name)
            rounds += 1
    for name, times in ((name, samples[name]) for name in order):
        times.sort()
        quartiles = [round(times[len(times) * i // 4], 3) for i in (1, 3)]
        rows[name].update(ms=round(statistics.median(times), 3), ms_quartiles=quartiles, rounds=rounds)
    base = rows["diffusers"].get("ms")
    for row in rows.values():
        if base and "ms" in row:
            row["times_diffusers"] = round(base / row["ms"], 2)
    return rows


def measure(
    workload: Workload, device: str, dtype: torch.dtype, seconds: float, compiles: bool
) -> dict[str, Any]:
    """Every contestant's row for one network."""
    net = Network(workload, device, dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        want = net.call(net.model(diffusers, dtype=net.wide), dtype=net.wide)()
    tera = counter.get_total_flops() / 1e12
    rows = compare(contestants(net, compiles), want, device, dtype, seconds, 7)
    for row in rows.values():
        if "ms" in row:
            row["tflop_per_s"] = round(tera / row["ms"] * 1e3, 1)
    return {"tflop": round(tera, 3), "contestants": rows}


def measure_loop(
    workload: Workload,
    scheduler: str,
    steps: int,
    device: str,
    dtype: torch.dtype,
    seconds: float,
    compiles: bool,
) -> dict[str, Any]:
    """Every contestant's row for one loop, with images a second."""
    loop = Loop(Network(workload, device, dtype), scheduler, steps)
    with torch.no_grad():
        want = loop.theirs(loop.net.model(diffusers, dtype=loop.net.wide), loop.net.wide)()
    rows = compare(loops(loop, compiles), want, device, dtype, seconds, 3)
    for row in rows.values():
        if "ms" in row:
            row["images_per_s"] = round(1e3 * workload.sample[0] / 2 / row["ms"], 2)
    return {"images": workload.sample[0] // 2, "contestants": rows}


def table(name: str, result: dict[str, Any]) -> str:
    lines = [
        f"{name}, {result['tflop']} TFLOP" if "tflop" in result else f"{name}, {result['images']} image(s)"
    ]
    for contestant, row in result["contestants"].items():
        if "ms" not in row:
            lines.append(f"  {contestant:<52} {row['error']}")
            continue
        rate = (
            f"{row['tflop_per_s']:7.1f} TFLOP/s"
            if "tflop_per_s" in row
            else f"{row['images_per_s']:7.2f} images/s"
        )
        lines.append(
            f"  {contestant:<52}{row['ms']:10.2f} ms{row['times_diffusers']:6.2f} x{rate}"
            f"   error {row['distance']:.1e}   set-up {row['setup_s']:.1f} s"
        )
    return "\n".join(lines)


COLUMNS = (
    "diffusers",
    "diffusers channels_last",
    "diffusers graph",
    "diffusers channels_last graph",
    "difusores accelerated",
    "difusores accelerated graph",
    "diffusers accelerated graph",
)


def markdown(results: dict[str, Any]) -> str:
    """Milliseconds as a table, from what `--json` wrote."""
    found = results["machine"]
    names = [
        f"{key} {found[key]}" for key in ("gpu", "torch", "cuda", "cudnn", "triton", "diffusers", "date")
    ]
    every = {**results["models"], **results["loops"]}
    columns = list(COLUMNS)
    for result in every.values():
        columns += [name for name in result["contestants"] if "compile" in name and name not in columns]
    lines = [
        f"{', '.join(names)}; ms:",
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, result in every.items():
        rows = [result["contestants"].get(column, {}) for column in columns]
        lines.append(
            f"| {name} | {' | '.join(format(row['ms'], '.2f') if 'ms' in row else '' for row in rows)} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    import triton

    return {
        **stamp(),
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "diffusers": diffusers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--loop", nargs="*", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes for each network")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="time of the rounds of one network or loop"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--table", type=Path, help="print the figures of such a file as Markdown")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown(json.loads(arguments.table.read_text())))
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu_models.py: no CUDA device was found")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    diffusers.utils.logging.set_verbosity_error()
    results: dict[str, Any] = {"machine": machine(), "models": {}, "loops": {}}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)
    common = ("cuda", torch.float16, arguments.seconds, arguments.compile)
    for kind, names in (("models", arguments.model), ("loops", arguments.loop)):
        for name in names:
            if kind == "models":
                result = measure(MODELS[name], *common)
            else:
                result = measure_loop(MODELS["sd15-batch2"], *LOOPS[name], *common)
            results[kind][name] = result
            print(table(name, result), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
