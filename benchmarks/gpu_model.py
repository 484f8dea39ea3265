"""Launches, bytes and FLOPs of one forward pass on an NVIDIA GPU, counted from a trace; never a time.

    python benchmarks/gpu_model.py --model sd15|sdxl|ddpm-cat-256|vae [--gpu h100|a100|rtx4090]
                                   [--arch 80|89|90] [--json]

The real modules run on meta tensors, in fp16, under PyTorch's dispatch modes: diffusers' (eager, with
`scaled_dot_product_attention` as one launch), ours, and both as `accelerate` leaves them. The package's own
dispatch chooses each op's kernel, as on a GPU of the architecture with the compiled module and Triton; how
often a group norm reads its input says the plan of that kernel (the CUDA kernels' own, compiled from
csrc/cuda for this machine, which needs g++). What no kernel takes is counted as its reference. Of an
accelerated model the second call is counted, with the prompt of the first: a step.

- A view is no launch. A convolution is one, and one more for its bias, which cuDNN adds in a pass of its own.
- A group norm of PyTorch's is three launches (moments, factors, map) and reads its input twice.
- Any other op is one launch, which reads its tensors and writes its result once.
- Least possible: matrix products, convolutions and attention read and write their tensors once, and so do
  normalisations; everything else happens in those launches. "Least" is that of diffusers' modules, each
  product by itself; "its own" of the modules as they run: of the accelerated ones, products that read the
  same are one and GEGLU is within its product.
- Floor: the sum over all launches of max(bytes / bandwidth, FLOPs / rate) from the GPU's data sheet.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
from bench_unet import CONFIGS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import difusores
from difusores.acceleration.engine import install
from difusores.ops import dispatch
from difusores.ops.triton.attention import split
from difusores.ops.triton.group_norm_silu import cut_nchw, cut_nhwc

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cuda_emulation"))
import emulated

# What choices rest on: generation, bytes of shared memory that a block may have, blocks of a cluster.
ARCHITECTURES = {"80": (8, 163 << 10, 1), "89": (8, 99 << 10, 1), "90": (9, 227 << 10, 8)}
# Dense fp16 with fp32 sums, TFLOP/s, and TB/s: data sheets of H100 SXM, A100 SXM 80 GB, GeForce RTX 4090; and
# their architectures.
GPUS = {"h100": (989.0, 3.35, "90"), "a100": (312.0, 2.039, "80"), "rtx4090": (165.2, 1.008, "89")}
SDXL = {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
MODELS = ("sd15", "sdxl", "ddpm-cat-256", "vae")
MATRIX = ("convolution", "mm", "bmm", "addmm", "baddbmm", "attention")
NORMS = ("native_group_norm", "native_layer_norm", "group_norm_silu", "layer_norm")


def size(t: Tensor) -> int:
    """Bytes of a tensor in memory, what is expanded counted once."""
    elements = math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s != 0)
    return elements * t.element_size()


@dataclass
class Count:
    """What was counted, by name of the op."""

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    least_bytes: int = 0
    flops: int = 0
    attention_flops: int = 0
    attention_tiles: int = 0
    each: list[tuple[int, int]] = field(default_factory=list)  # bytes and FLOPs of every launch

    def add(self, name: str, moved: int, flops: int = 0, launches: int = 1) -> None:
        self.launches[name] += launches
        self.bytes[name] += moved
        self.flops += flops
        self.each.append((moved, flops))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One launch; what our Triton kernel's tiles would multiply is counted beside."""
        batch, heads, queries, width = q.shape
        keys, out_width = k.shape[2], v.shape[3]
        pairs = 2 * batch * heads * queries * keys
        out = q.new_empty(batch, queries, heads, out_width).transpose(1, 2)
        moved = sum(map(size, (q, k, v, out)))
        self.add("attention", moved, pairs * (width + out_width))
        self.least_bytes += moved
        self.attention_flops += pairs * (width + out_width)
        (d1, d2), (v1, v2) = split(width, 16), split(out_width, 8)
        self.attention_tiles += pairs * (d1 + d2 * (width > d1) + v1 + v2 * (out_width > v1))
        return out


class Attention(TorchFunctionMode):
    """Takes PyTorch's attention as one launch: on meta tensors it would fall apart into many."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            with torch.utils._python_dispatch._disable_current_modes():
                return self.count.attention(given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


class Trace(TorchDispatchMode):
    """Counts every op that launches something."""

    def __init__(self, count: Count, arch: str) -> None:
        super().__init__()
        self.count = count
        self.arch = arch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        full_name = func.overloadpacket.__name__.removesuffix("_")
        name = full_name.removesuffix("_triton")
        if func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "alias", "detach")):
            return out
        read = [size(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [size(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
        if out is None:  # written over the first tensor
            written = read[:1]
        moved = sum(read) + sum(written)
        count = self.count
        if name == "attention":
            count.attention(*args[:3])
            return out
        if name in MATRIX or name in NORMS or name == "linear":
            count.least_bytes += moved
        if name == "convolution":
            bias = args[2]
            if args[0].is_contiguous(memory_format=torch.channels_last):  # what cuDNN returns for such images
                out = out.contiguous(memory_format=torch.channels_last)
            count.add(name, moved - (0 if bias is None else size(bias)), self.products(name, args, out))
            if bias is not None:
                count.add("bias of a convolution", 2 * size(out) + size(bias))
        elif name == "native_group_norm":
            count.add(name, moved + read[0], launches=3)
        elif name == "group_norm_silu":
            twice = self.reads_twice(args, name != full_name)
            count.add(name, moved + (read[0] if twice else 0), launches=2 if twice else 1)
        else:
            count.add(name, moved, self.products(name, args, out))
        return out

    def reads_twice(self, args: Any, triton: bool) -> bool:
        """Whether our kernel has a launch for the statistics, and so reads its input twice from memory."""
        x, groups = args[:2]
        if not triton:
            return not emulated.group_norm_silu_plan(x, groups, *ARCHITECTURES[self.arch][1:]).whole
        sizes = (x.shape[1], groups, x.shape[2:].numel())
        cut = cut_nchw(*sizes) if x.is_contiguous() else cut_nhwc(*sizes, x.element_size())
        return cut.chunks > 1

    @staticmethod
    def products(name: str, args: Any, out: Any) -> int:
        if name == "convolution":
            weight: Tensor = args[1]
            return 2 * out.numel() * weight[0].numel()
        if name == "linear":
            return 2 * args[1].numel() * args[0].shape[:-1].numel()
        if name in MATRIX:
            return 2 * out.numel() * args[-2 if name in ("mm", "bmm") else 1].shape[-1]
        return 0


def half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


def build(library: Any, model: str) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """The model on the meta device, and one call of it."""
    time = torch.empty(1, device="meta")
    with torch.device("meta"):
        if model == "vae":
            module, sample = library.AutoencoderKL(**VAE), half(1, 4, 64, 64)
            return module, lambda m: m.decode(sample)
        if model == "ddpm-cat-256":
            module, sample = library.UNet2DModel(**CONFIGS["cat"]), half(1, 3, 256, 256)
            return module, lambda m: m(sample, time)
        if model == "sdxl":
            module = library.UNet2DConditionModel(**SDXL)
            added = {"text_embeds": half(2, 1280), "time_ids": half(2, 6)}
            sample, text = half(2, 4, 128, 128), half(2, 77, 2048)
            return module, lambda m: m(sample, time, text, added_cond_kwargs=added)
        module = library.UNet2DConditionModel(cross_attention_dim=768)
        sample, text = half(2, 4, 64, 64), half(2, 77, 768)
        return module, lambda m: m(sample, time, text)


def trace(library: Any, model: str, accelerated: bool = False, arch: str = "90") -> Count:
    """One forward pass of a library's module; our ops as on a GPU of the architecture."""
    module, call = build(library, model)
    module = module.half().eval()
    count = Count()
    with ExitStack() as stack:
        # Nothing runs on meta tensors, so nothing has to be there: `supports` alone decides.
        refusals = {"cuda": None, "triton": None, "torch": None}
        refuse = mock.Mock(side_effect=lambda backend, _: refusals.get(backend, "it is not counted"))
        stack.enter_context(mock.patch.object(dispatch, "_refusal", refuse))
        stack.enter_context(mock.patch.object(dispatch, "_left_out", return_value=None))
        of_attention = sys.modules["difusores.ops.attention"]  # the package has a function of that name
        device = mock.Mock(return_value=ARCHITECTURES[arch][:2])
        stack.enter_context(mock.patch.object(of_attention, "_device", device))
        if accelerated:
            install(module, "meta", True)
            stack.enter_context(torch.no_grad())
            call(module)  # lays parameters side by side, computes the prompt's keys and values
        for context in (torch.no_grad(), Attention(count), Trace(count, arch)):
            stack.enter_context(context)
        call(module)
    return count


def summary(count: Count, gpu: str) -> dict[str, Any]:
    rate, bandwidth = GPUS[gpu][0] * 1e12, GPUS[gpu][1] * 1e12
    floor = sum(max(moved / bandwidth, flops / rate) for moved, flops in count.each)
    return {
        "launches": count.launches.total(),
        "gigabytes": round(count.bytes.total() / 1e9, 3),
        "teraflops": round(count.flops / 1e12, 4),
        "floor_ms": round(1e3 * floor, 3),
        "by_op": {name: [n, round(count.bytes[name] / 1e9, 3)] for name, n in count.launches.most_common()},
    }


def report(model: str, gpu: str, arch: str | None = None) -> dict[str, Any]:
    """Of the GPU's own architecture, if no other is named."""
    arch = arch or GPUS[gpu][2]
    counts = {
        "eager": trace(diffusers, model, arch=arch),
        "ours": trace(difusores, model, arch=arch),
        "accelerated": trace(difusores, model, True, arch),
        "diffusers_accelerated": trace(diffusers, model, True, arch),
    }
    least, ours = counts["eager"].least_bytes, counts["ours"]
    return {
        "model": model,
        "arch": arch,
        "gpu": gpu,
        **{name: summary(count, gpu) for name, count in counts.items()},
        "least_gigabytes": round(least / 1e9, 3),
        "least_accelerated_gigabytes": round(counts["accelerated"].least_bytes / 1e9, 3),
        **{f"{name}_over_least": round(count.bytes.total() / least, 3) for name, count in counts.items()},
        **{
            f"{name}_over_own_least": round(count.bytes.total() / count.least_bytes, 3)
            for name, count in counts.items()
        },
        "attention_padding": round(ours.attention_tiles / max(ours.attention_flops, 1) - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="whose data sheet the floor is from")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="for which kernels are chosen; the GPU's own")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    result = report(arguments.model, arguments.gpu, arguments.arch)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"{result['model']}, fp16, sm_{result['arch']}, counted and not measured; "
        f"floor from the data sheet of {result['gpu']}"
    )
    for name in ("eager", "ours", "accelerated", "diffusers_accelerated"):
        one = result[name]
        over, own = result[f"{name}_over_least"], result[f"{name}_over_own_least"]
        print(
            f"{name:22}{one['launches']:6} launches{one['gigabytes']:9.3f} GB ({over:.3f} x least, "
            f"{own:.3f} x its own){one['teraflops']:9.4f} TFLOP   floor {one['floor_ms']:.3f} ms"
        )
        for op, (launches, gigabytes) in one["by_op"].items():
            print(f"      {launches:6} {op:<28}{gigabytes:9.3f} GB")
    merged = result["least_accelerated_gigabytes"]
    print(f"least possible: {result['least_gigabytes']:.3f} GB; of the accelerated modules {merged:.3f} GB")
    print(f"attention: {100 * result['attention_padding']:.1f} % more products in our Triton kernel's tiles")


if __name__ == "__main__":
    main()
