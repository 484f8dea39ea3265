"""The fused operations against eager PyTorch and against what the machine allows, at shapes of real UNets.

    python benchmarks/bench_ops.py
        [--op group_norm_silu|layer_norm|geglu|scheduler_step|guidance_rescale|winograd_conv|gemm_conv]
        [--set limit|sd15|cat|cifar10|vae]
        [--dtype float32|bfloat16|float16] [--seconds S] [--json FILE]

Every result is checked against the float64 reference before it is timed; a wrong one is not timed.
Contestants take turns in random order, figures are medians. `limit` is the greater of a copy of the tensor
(`clone`: like the op, it makes a new tensor) and of the arithmetic of act alone, run from L1 in the same
dtype (`_C.group_norm_silu_floor`) over all threads; `/+stats` counts the statistics into that arithmetic.
`copy_us` is the copy into memory that exists already. For the step, `limit` is `torch.add`; for layer_norm
(with a residual) and geglu, at the shapes of Stable Diffusion, a `clone` that moves as many bytes.
guidance_rescale is timed with the guided step that takes its factor, eager is PyTorch's operators before the
step, and `limit` that step without a rescale.

winograd_conv, with a bias as in a model: `F.conv2d` in NCHW and channels_last, oneDNN with weights that it
has packed for this very shape, ours with weights as they are and packed; and half a residual block (group
norm, SiLU, convolution, residual) by group_norm_silu + oneDNN and by group_norm_affine + ours.

gemm_conv, as a linear layer with a bias: `F.linear` (`mkl`; in bfloat16 oneDNN's, which packs in each call),
oneDNN with packed weights, ours with packed weights and, in float32 with AMX, `split`: ours of numbers split
in two of bfloat16, in GFLOP/s, beside the multiply-adds of peak.cpp in that precision, which take turns with
them: the processor's speed moves. Shares are of those. As in a network, each call has other weights, of
64 MB or more in turn, and results find memory that was used before. `geglu` and `split geglu`, where a
network has one: the time of MKL and the op after it over ours, which has it at its end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peak import fma_round
from timing import interleave, stamp
from torch import Tensor

from difusores import native, ops
from difusores.acceleration import heap
from difusores.bench.cases import Case, cases
from difusores.ops.gemm_conv import gemm_conv, multiplies_pairs, splits
from difusores.ops.gemm_conv import pack_weight as pack_for_gemm
from difusores.ops.scheduler_step import ROW, W
from difusores.ops.winograd_conv import Norm, pack_weight, plan
from difusores.pipelines.guidance import rescaled

# (N, C, H, W): the group norms of each network, 32 groups each, at the widest batch that is run by default.
SHAPES: dict[str, list[tuple[int, int, int, int]]] = {
    "limit": [(1, 128, 256, 256), (2, 320, 64, 64), (1, 512, 64, 64)],
    "sd15": [
        *((2, c, 64, 64) for c in (320, 640, 960)),
        *((2, c, 32, 32) for c in (320, 640, 960, 1280, 1920)),
        *((2, c, 16, 16) for c in (640, 1280, 1920, 2560)),
        *((2, c, 8, 8) for c in (1280, 2560)),
    ],
    "cat": [
        *((1, c, 256, 256) for c in (128, 256)),
        *((1, c, 128, 128) for c in (128, 256, 384)),
        *((1, c, 64, 64) for c in (128, 256, 384, 512)),
        *((1, c, 32, 32) for c in (256, 512, 768)),
        *((1, c, 16, 16) for c in (256, 512, 768, 1024)),
        *((1, c, 8, 8) for c in (512, 1024)),
    ],
    "cifar10": [
        *((n, c, 32, 32) for n in (1, 8) for c in (128, 256, 384)),
        *((n, c, 16, 16) for n in (1, 8) for c in (128, 256, 384, 512)),
        *((n, c, 8, 8) for n in (1, 8) for c in (256, 512)),
        *((n, c, 4, 4) for n in (1, 8) for c in (256, 512)),
    ],
}
GROUPS = 32

# (N, C, O, H, W): the stride-1 3x3 convolutions of each network.
CONVS: dict[str, list[tuple[int, int, int, int, int]]] = {
    "limit": [(1, 128, 128, 256, 256), (2, 320, 320, 64, 64), (2, 1280, 1280, 16, 16)],
    "cifar10": [
        *((n, c, 128, 32, 32) for n in (8, 1) for c in (128, 256)),
        *((n, c, 256, 16, 16) for n in (8, 1) for c in (256, 512)),
        *((n, c, 256, s, s) for n in (8, 1) for s in (8, 4) for c in (256, 512)),
    ],
    "cat": [
        *((1, c, 128, s, s) for s in (256, 128) for c in (128, 256)),
        *((1, c, 256, s, s) for s in (64, 32) for c in (256, 512)),
        *((1, c, 512, s, s) for s in (16, 8) for c in (512, 1024)),
    ],
    "sd15": [
        *((2, c, 320, 64, 64) for c in (320, 640, 960)),
        *((2, c, 640, 32, 32) for c in (640, 960, 1280, 1920)),
        *((2, c, 1280, s, s) for s in (16, 8) for c in (1280, 2560)),
    ],
    "vae": [
        *((1, 512, 512, s, s) for s in (64, 128)),
        (1, 256, 256, 256, 256),
        (1, 128, 128, 512, 512),
    ],
}


def checked(result: Tensor, eager: Tensor, oracle: Tensor, what: str) -> None:
    """The project's one tolerance rule; raises instead of timing a wrong result."""
    eps = torch.finfo(result.dtype).eps
    allowed = 2 * (eager.double() - oracle).abs().max() + 4 * eps * oracle.abs().max()
    error = (result.double() - oracle).abs().max()
    if not error <= allowed:
        raise SystemExit(f"{what}: error {error:.2e} exceeds {allowed:.2e}; a wrong result is not timed")


def group_norm_silu(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, seconds: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    target = torch.empty_like(x)

    def eager() -> Tensor:
        return F.silu(F.group_norm(x, GROUPS, weight, bias))

    def ours() -> Tensor:
        return ops.group_norm_silu(x, GROUPS, weight, bias)  # type: ignore[return-value]

    from difusores import _C  # here, so that `main` can say in words that it is missing

    name = str(dtype).removeprefix("torch.")
    oracle = F.silu(F.group_norm(x.double(), GROUPS, weight.double(), bias.double()))
    checked(ours(), eager(), oracle, f"group_norm_silu {shape} {dtype} {layout}")
    contestants: dict[str, Callable[[], object]] = {
        "ours": ours,
        "eager": eager,
        "clone": x.clone,
        "copy": lambda: target.copy_(x),
        "floor": lambda: _C.group_norm_silu_floor(name, x.numel(), False),
        "floor_with_statistics": lambda: _C.group_norm_silu_floor(name, x.numel(), True),
    }
    times = interleave(contestants, seconds=seconds)
    limit = max(times["clone"], times["floor"])
    with_statistics = max(times["clone"], times["floor_with_statistics"])
    return {
        "op": "group_norm_silu",
        "shape": list(shape),
        "dtype": name,
        "layout": layout,
        **{f"{name}_us": 1e6 * t for name, t in times.items()},
        "ours_over_limit": times["ours"] / limit,
        "ours_over_limit_with_statistics": times["ours"] / with_statistics,
        "eager_over_ours": times["eager"] / times["ours"],
    }


def scheduler_step(shape: tuple[int, ...], dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """A deterministic DDIM stage: reads sample and model output, writes the next sample."""
    torch.manual_seed(0)
    x, e = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    row = torch.zeros(ROW, dtype=torch.float64)
    row[0], row[4], row[5], row[6], row[7] = 1.0, 1.2, -0.7, -1.0, 1.0
    row[W], row[W + 2] = 0.9, 0.4

    def eager() -> Tensor:
        return 0.9 * (1.2 * x - 0.7 * e).clamp(-1, 1) + 0.4 * e

    def ours() -> Tensor:
        return ops.scheduler_step(row, x, [e])[0]

    oracle = 0.9 * (1.2 * x.double() - 0.7 * e.double()).clamp(-1, 1) + 0.4 * e.double()
    checked(ours(), eager(), oracle, f"scheduler_step {shape} {dtype}")
    contestants: dict[str, Callable[[], object]] = {
        "ours": ours,
        "eager": eager,
        "limit": lambda: torch.add(x, e),
    }
    times = interleave(contestants, seconds=seconds)
    return {
        "op": "scheduler_step",
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": "contiguous",
        **{f"{name}_us": 1e6 * t for name, t in times.items()},
        "ours_over_limit": times["ours"] / times["limit"],
        "eager_over_ours": times["eager"] / times["ours"],
    }


def guidance_rescale(
    shape: tuple[int, ...], dtype: torch.dtype, seconds: float, clock: Callable[[], float]
) -> dict[str, Any]:
    """A guided DDIM stage with rescale; eager: mixed and rescaled by PyTorch's operators, then a stage."""
    torch.manual_seed(0)
    x, none, some = torch.randn(shape), torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    row = torch.zeros(ROW, dtype=torch.float64)
    row[0], row[4], row[5], row[6], row[7], row[W], row[W + 2] = 1.0, 1.2, -0.7, -1.0, 1.0, 0.9, 0.4
    guided = row.clone()
    guided[0], guided[1] = -6.5, 7.5
    factor = torch.empty(shape[0])

    def ours() -> Tensor:
        ops.guidance_rescale(guided, (none, some), 0.7, out=factor)
        return ops.scheduler_step(guided, x, (none, some), factor=factor)[0]

    def eager(x: Tensor = x, none: Tensor = none, some: Tensor = some) -> Tensor:
        return ops.scheduler_step(row, x, (rescaled(none + 7.5 * (some - none), some, 0.7),))[0]

    checked(
        ours(), eager(), eager(x.double(), none.double(), some.double()), f"guidance_rescale {shape} {dtype}"
    )
    contestants: dict[str, Callable[[], object]] = {
        "ours": ours,
        "eager": eager,
        "limit": lambda: ops.scheduler_step(guided, x, (none, some)),
    }
    times = interleave(contestants, seconds=seconds, clock=clock)
    return {
        "op": "guidance_rescale",
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": "contiguous",
        **{f"{name}_us": 1e6 * t for name, t in times.items()},
        "ours_over_limit": times["ours"] / times["limit"],
        "eager_over_ours": times["eager"] / times["ours"],
    }


def tokens(case: Case, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """layer_norm and geglu."""
    checked(case.view(case.ours()), case.view(case.eager()), case.oracle(), f"{case.op} {case.label} {dtype}")
    moved = torch.ones(case.bytes // 2 // dtype.itemsize, dtype=dtype)  # once in, once out
    contestants = {"ours": case.ours, "eager": case.eager, "limit": moved.clone}
    times = interleave(contestants, seconds=seconds)
    return {
        "op": case.op,
        "shape": [int(side) for side in case.label.split(" ")[0].split("x")],
        "dtype": str(dtype).removeprefix("torch."),
        "layout": "contiguous",
        **{f"{name}_us": 1e6 * t for name, t in times.items()},
        "ours_over_limit": times["ours"] / times["limit"],
        "eager_over_ours": times["eager"] / times["ours"],
    }


def distance(y: Tensor, oracle: Tensor) -> float:
    """Relative L2."""
    return float((y.double() - oracle).norm() / oracle.norm())


def winograd_conv(
    shape: tuple[int, int, int, int, int], seconds: float, clock: Callable[[], float]
) -> dict[str, Any]:
    n, c, o, h, w = shape
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w).to(memory_format=torch.channels_last)
    residual = torch.randn(n, o, h, w).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(o, c, 3, 3) / (3 * c**0.5), torch.randn(o)
    gamma, beta, planes = torch.randn(c), torch.randn(c), x.contiguous()
    packed = pack_weight(weight)
    options = ([1, 1], [1, 1], [1, 1], 1)
    onednn = torch.ops.mkldnn._reorder_convolution_weight(weight, *options, [n, c, h, w])
    convolve = torch.ops.mkldnn._convolution_pointwise

    def block_of_onednn() -> Tensor:
        normed = ops.group_norm_silu(x, GROUPS, gamma, beta)
        out: Tensor = convolve.binary(normed, residual, onednn, bias, *options, "add", 1.0, None, [], None)
        return out

    def block(weights: Tensor | None) -> Tensor:
        multiplier, offset = ops.group_norm_affine(x, GROUPS, gamma, beta)
        parts: dict[str, Any] = {
            "multiplier": multiplier,
            "offset": offset,
            "silu": True,
            "residual": residual,
        }
        return ops.winograd_conv(x, weight, bias, packed=weights, **parts)

    second, norm = torch.randn(o, o, 3, 3) / (3 * o**0.5), Norm(GROUPS, None, None, 1e-5)

    def pair(moments: Tensor | None) -> Tensor:
        """A residual block, the moments of its second norm by that or by the convolution before."""
        y = ops.winograd_conv(x, weight, norm=norm, silu=True, moments=moments)
        return ops.winograd_conv(y, second, norm=norm, silu=True, residual=residual, norm_moments=moments)

    contestants: dict[str, Callable[[], Tensor]] = {
        "nchw": lambda: F.conv2d(planes, weight, bias, padding=1),
        "channels_last": lambda: F.conv2d(x, weight, bias, padding=1),
        "onednn": lambda: convolve(x, onednn, bias, *options, "none", [], ""),
        "ours": lambda: ops.winograd_conv(x, weight, bias),
        "ours_packed": lambda: ops.winograd_conv(x, weight, bias, packed=packed),
    }
    blocks: dict[str, Callable[[], Tensor]] = {
        "block_onednn": block_of_onednn,
        "block_ours": lambda: block(None),
        "block_ours_packed": lambda: block(packed),
    }
    pairs: dict[str, Callable[[], Tensor]] = {
        "pair": lambda: pair(None),
        "pair_summed": lambda: pair(torch.empty(n, 2, o, dtype=torch.float64)),
    }
    errors = {}
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    normed = F.silu(F.group_norm(x.double(), GROUPS, gamma.double(), beta.double()))
    exact_block = F.conv2d(normed, weight.double(), bias.double(), padding=1) + residual.double()
    between = F.conv2d(F.silu(F.group_norm(x.double(), GROUPS)), weight.double(), padding=1)
    normed = F.silu(F.group_norm(between, GROUPS))
    exact_pair = F.conv2d(normed, second.double(), padding=1) + residual.double()
    with ops.use_backend("cpu"):  # the kernel also where the plan leaves the layer to oneDNN
        for calls, oracle in ((contestants, exact), (blocks, exact_block), (pairs, exact_pair)):
            for name, call in calls.items():
                errors[name] = distance(call(), oracle)
                if not errors[name] <= 1e-5:
                    raise SystemExit(f"winograd_conv {shape} {name}: error {errors[name]:.1e}; not timed")
        times = interleave({**contestants, **blocks}, seconds=seconds, clock=clock)
        heap.keep(pair)  # results lie in memory that is kept, as within an accelerated network
        times |= interleave(pairs, seconds=seconds, clock=clock)
        heap.release(pair)
    return {
        "op": "winograd_conv",
        "shape": list(shape),
        **{f"{name}_us": 1e6 * t for name, t in times.items()},
        **{f"{name}_error": e for name, e in errors.items()},
        "winograd": plan(c, o, h, w).winograd,
        "gflops": 18e-9 * n * c * o * h * w / times["ours"],
        "onednn_over_ours": times["onednn"] / times["ours"],
        "onednn_over_packed": times["onednn"] / times["ours_packed"],
        "block": times["block_onednn"] / times["block_ours"],
        "block_packed": times["block_onednn"] / times["block_ours_packed"],
        "summed": times["pair"] / times["pair_summed"],
    }


CONV_COLUMNS = {
    **dict.fromkeys(("nchw_us", "channels_last_us", "onednn_us", "ours_us", "ours_packed_us"), 10.0),
    **dict.fromkeys(("onednn_over_ours", "onednn_over_packed", "block", "block_packed"), 6.2),
    "summed": 6.3,
    "gflops": 6.0,
}


def print_convs(
    shapes: Sequence[tuple[int, int, int, int, int]], seconds: float, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """One line per shape as it is measured; ratios are the time of oneDNN over ours."""
    print(f"{'winograd_conv':22} " + " ".join(CONV_COLUMNS) + " error of ours and of oneDNN, chosen")
    rows = []
    for shape in shapes:
        row = winograd_conv(shape, seconds, clock)
        rows.append(row)
        figures = " ".join(f"{row[name]:{width}f}" for name, width in CONV_COLUMNS.items())
        n, c, o, h, w = shape
        print(
            f"{f'{n}x{c}>{o} {h}x{w}':22} {figures} {row['ours_error']:.1e} {row['onednn_error']:.1e} "
            f"{'winograd' if row['winograd'] else 'onednn'}",
            flush=True,
        )
    return rows


WEIGHTS = 64 << 20  # bytes of weights that products read in turn

# (M, K, N): the linear layers of Stable Diffusion 1.5's UNet at 64x64 and 32x32, batch 2.
LINEARS = [
    *((8192, 320, 320), (8192, 320, 2560), (8192, 1280, 320)),
    *((2048, 640, 640), (2048, 640, 5120), (2048, 2560, 640)),
    *((512, 1280, 1280), (512, 1280, 10240), (512, 5120, 1280)),
    *((2048, 320, 320), (2048, 320, 2560), (2048, 1280, 320)),
    *((512, 640, 640), (512, 640, 5120), (512, 2560, 640)),
    *((128, 1280, 1280), (128, 1280, 10240), (128, 5120, 1280)),
    *((154, 768, 320), (154, 768, 640), (154, 768, 1280)),
]


def linear(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    seconds: float,
    clock: Callable[[], float],
    adds: Callable[[], float],
) -> dict[str, Any]:
    m, k, n = shape
    torch.manual_seed(0)
    x, bias, gates = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), n == 8 * k
    copies = max(2, -(-WEIGHTS // (dtype.itemsize * k * n)))
    weights = [(torch.randn(n, k) / k**0.5).to(dtype) for _ in range(copies)]
    image = x.t()[None, :, :, None]
    turn = itertools.cycle(range(copies))
    onednn = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in weights]
    kernels = [weight[:, :, None, None] for weight in weights]
    ways = {"ours": False, "split": True} if splits_in(dtype) else {"ours": False}

    def by(way: str, geglu: bool = False) -> Callable[[int], Tensor]:
        packed = [pack_for_gemm(kernel, dtype, geglu, ways[way]) for kernel in kernels]

        def call(i: int) -> Tensor:
            return gemm_conv(image, kernels[i], bias, packed=packed[i], geglu=geglu)[0, :, :, 0].t()

        return call

    products: dict[str, Callable[[int], Tensor]] = {
        "mkl": lambda i: F.linear(x, weights[i], bias),
        "onednn": lambda i: torch.ops.mkldnn._linear_pointwise(x, onednn[i], bias, "none", [], ""),
        **{way: by(way) for way in ways},
    }
    exact = F.linear(x.double(), weights[0].double(), bias.double())
    errors = {name: distance(call(0), exact) for name, call in products.items()}
    calls = {name: lambda call=call: call(next(turn)) for name, call in products.items()}
    if gates:
        calls["mkl_geglu"] = lambda: ops.geglu(F.linear(x, weights[next(turn)], bias))
        for way in ways:
            gated = by(way, geglu=True)
            errors[f"{way}_geglu"] = distance(gated(0), ops.geglu(exact))
            calls[f"{way}_geglu"] = lambda gated=gated: gated(next(turn))
    allowed = {"ours": 1e-6 if dtype is torch.float32 else 4e-3, "split": 1e-5}
    if not all(error <= allowed.get(name.split("_")[0], 1) for name, error in errors.items()):
        raise SystemExit(f"gemm_conv {shape}: errors {errors}; not timed")
    with ops.use_backend("cpu"):  # an error, and not the reference, where the module lacks it
        times = interleave({**calls, "peak": adds}, seconds=seconds, clock=clock)
    peak = 1e-9 * adds() / times["peak"]
    gflops = {name: 2e-9 * m * k * n / times[name] for name in products}
    return {
        "op": "gemm_conv",
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "peak_gflops": peak,
        **{f"{name}_gflops": figure for name, figure in gflops.items()},
        **{f"{name}_share": figure / peak for name, figure in gflops.items()},
        **{f"{name}_error": e for name, e in errors.items()},
        "geglu": times["mkl_geglu"] / times["ours_geglu"] if gates else None,
        "split_geglu": times["mkl_geglu"] / times["split_geglu"] if gates and "split" in ways else None,
    }


def splits_in(dtype: torch.dtype) -> bool:
    """Whether products in this dtype may be of pairs of bfloat16."""
    return dtype is torch.float32 and splits()


def print_linears(dtype: torch.dtype, seconds: float, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """One line per shape as it is measured."""
    precision = "fp32" if dtype is torch.float32 else "bf16"
    heap.keep(adds := fma_round(torch.get_num_threads(), precision))  # while it lives
    names = ("mkl", "onednn", "ours", *(("split",) if splits_in(dtype) else ()))
    print(f"gemm_conv in {dtype}, GFLOP/s (share of the multiply-adds)")
    columns = " ".join(f"{name:>11}" for name in names)
    print(f"{'M x K x N':18} {'peak':>6} {columns} {'geglu':>6} {'split geglu':>11}")
    rows = []
    for shape in LINEARS:
        row = linear(shape, dtype, seconds, clock, adds)
        rows.append(row)
        figures = " ".join(f"{row[f'{name}_gflops']:4.0f} ({row[f'{name}_share']:4.2f})" for name in names)
        geglu = " ".join(f"{row[name]:6.2f}" for name in ("geglu", "split_geglu") if row[name] is not None)
        print(f"{'x'.join(map(str, shape)):18} {row['peak_gflops']:6.0f} {figures} {geglu}", flush=True)
    return rows


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--op",
        choices=(
            *("group_norm_silu", "layer_norm", "geglu", "scheduler_step", "guidance_rescale"),
            *("winograd_conv", "gemm_conv"),
        ),
        action="append",
    )
    parser.add_argument("--set", choices=(*SHAPES, "vae"), action="append", dest="sets")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), action="append", dest="dtypes")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of one line of the table")
    parser.add_argument("--json", type=Path, help="write the figures and the machine to this file")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="products and guidance_rescale on one thread, by the processor time they take: "
        "for a machine that others use",
    )
    args = parser.parse_args(arguments)
    if args.cpu_time:
        torch.set_num_threads(1)
    missing = native.status("cpu")
    if missing is not None:
        raise SystemExit(f"the compiled module is needed and is not here: {missing}")
    dtypes = [getattr(torch, name) for name in args.dtypes or ("float32", "bfloat16")]
    jobs: list[Callable[[], dict[str, Any]]] = []
    if "group_norm_silu" in (args.op or ("group_norm_silu",)):
        for name in args.sets or SHAPES:
            for shape in SHAPES.get(name, ()):
                for dtype in dtypes:
                    for layout in ("contiguous", "channels_last"):
                        jobs.append(
                            lambda s=shape, d=dtype, la=layout: group_norm_silu(s, d, la, args.seconds)
                        )  # type: ignore[misc]
    if "scheduler_step" in (args.op or ("scheduler_step",)):
        for step_shape in ((1, 4, 8, 8), (1, 4, 64, 64), (8, 3, 512, 512)):
            for dtype in dtypes:
                jobs.append(lambda s=step_shape, d=dtype: scheduler_step(s, d, args.seconds))  # type: ignore[misc]
    if "guidance_rescale" in (args.op or ("guidance_rescale",)):
        clock = time.process_time if args.cpu_time else time.perf_counter
        for latents in ((1, 4, 64, 64), (2, 4, 128, 128), (8, 3, 512, 512)):
            for dtype in dtypes:
                jobs.append(lambda s=latents, d=dtype: guidance_rescale(s, d, args.seconds, clock))  # type: ignore[misc]
    for op in ("layer_norm", "geglu"):
        if op in (args.op or (op,)):
            jobs += [
                lambda c=case, d=dtype: tokens(c, d, args.seconds)  # type: ignore[misc]
                for dtype in dtypes
                for case in cases(op, dtype, torch.device("cpu"))
            ]
    rows = []
    print(json.dumps(stamp()))
    print(
        f"{'op':16} {'shape':20} {'dtype':9} {'layout':14} {'ours us':>9} {'eager us':>9} "
        f"{'/limit':>7} {'eager/':>7} {'/+stats':>8}"
    )
    with torch.no_grad():
        for job in jobs:
            row = job()
            rows.append(row)
            shape_text = "x".join(map(str, row["shape"]))
            print(
                f"{row['op']:16} {shape_text:20} {row['dtype']:9} {row['layout']:14} {row['ours_us']:9.1f} "
                f"{row['eager_us']:9.1f} {row['ours_over_limit']:7.2f} {row['eager_over_ours']:7.2f} "
                f"{row.get('ours_over_limit_with_statistics', float('nan')):8.2f}",
                flush=True,
            )
    slower = [row for row in rows if row["eager_over_ours"] < 1.0]
    print(f"{len(rows)} lines, slower than eager in {len(slower)}")
    if "winograd_conv" in (args.op or ("winograd_conv",)):
        with torch.no_grad():
            shapes = [shape for name in args.sets or CONVS for shape in CONVS[name]]
            rows += print_convs(
                shapes, args.seconds, time.process_time if args.cpu_time else time.perf_counter
            )
    if "gemm_conv" in (args.op or ("gemm_conv",)):
        clock = time.process_time if args.cpu_time else time.perf_counter
        with torch.no_grad():
            for dtype in dtypes:
                if dtype is torch.float32 or (dtype is torch.bfloat16 and multiplies_pairs()):
                    rows += print_linears(dtype, args.seconds, clock)
    if args.json:
        args.json.write_text(json.dumps({"machine": stamp(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
