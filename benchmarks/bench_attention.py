"""attention against PyTorch's own, plain matrix products with a softmax, and OpenVINO.

    python benchmarks/bench_attention.py [--dtype float32|bfloat16|float16] [--seconds S] [--json FILE]

Every result is checked against the float64 reference, at 64 of the queries, before it is timed; a wrong one
is not timed. Contestants take turns in random order on the same tensors, figures are medians of
microseconds; in brackets, how many times as long as ours. OpenVINO takes part where it is installed
(`pip install 'difusores[bench]'`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_ops import checked
from timing import interleave, stamp
from torch import Tensor

from difusores import native, ops

# B, H, queries, keys, D: attentions of the SD 1.5 UNet at 512 px and its text, of ddpm-cat-256, of the VAE.
SHAPES = [
    (2, 8, 4096, 4096, 40),
    (2, 8, 1024, 1024, 80),
    (2, 8, 256, 256, 160),
    (2, 8, 1024, 1024, 40),
    (2, 8, 4096, 77, 40),
    (8, 1, 256, 256, 256),
    (1, 1, 4096, 4096, 512),
]


def openvino_attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor] | None:
    """OpenVINO's operation on these tensors' memory, on torch's number of threads; None if not installed."""
    try:
        import openvino
        from openvino import opset13
    except ImportError:
        return None
    half = q.dtype is torch.bfloat16
    kind = openvino.Type.bf16 if half else openvino.Type.f32
    inputs = [opset13.parameter(list(x.shape), kind) for x in (q, k, v)]
    out = opset13.scaled_dot_product_attention(*inputs, causal=False)
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = (
        openvino.Core().compile_model(openvino.Model([out], inputs), "CPU", options).create_infer_request()
    )
    for i, x in enumerate((q, k, v)):
        bits = (x.view(torch.int16) if half else x).numpy()
        request.set_input_tensor(i, openvino.Tensor(bits, list(x.shape), kind))

    def run() -> Tensor:
        request.infer()
        result = torch.from_numpy(request.get_output_tensor(0).data.view("int16" if half else "float32"))
        return (result.view(torch.bfloat16) if half else result).reshape(*q.shape[:3], -1)

    return run


def attention(shape: tuple[int, ...], dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    b, h, length, keys, d = shape
    q, k, v = (torch.randn(b, h, n, d).to(dtype) for n in (length, keys, keys))

    def eager() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def ours() -> Tensor:
        return ops.attention(q, k, v)

    some = slice(0, length, max(1, length // 64))  # of the queries: the oracle of all of them takes minutes
    oracle = ops.attention(q[:, :, some].double(), k.double(), v.double())
    checked(ours()[:, :, some], eager()[:, :, some], oracle, f"attention {shape} {dtype}")
    contestants: dict[str, Callable[[], object]] = {
        "ours": ours,
        "eager": eager,
        "plain": lambda: torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * d**-0.5, dim=-1) @ v,
    }
    peer = openvino_attention(q, k, v)
    if peer is not None:
        worst = (peer()[:, :, some].double() - oracle).abs().max() / oracle.abs().max()
        if not worst <= (0.05 if dtype is torch.bfloat16 else 1e-5):
            raise SystemExit(f"openvino {shape} {dtype}: relative error {worst:.2e}; not timed")
        contestants["openvino"] = peer
    times = interleave(contestants, seconds=seconds)
    return {
        "op": "attention",
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_us": 1e6 * t for name, t in times.items()},
        "gflops": 4 * b * h * length * keys * d / times["ours"] / 1e9,
        "eager_over_ours": times["eager"] / times["ours"],
    }


def print_attention(row: dict[str, Any]) -> None:
    peers = "".join(
        f" {name} {row[f'{name}_us']:10.1f} ({row[f'{name}_us'] / row['ours_us']:5.2f})"
        for name in ("eager", "openvino", "plain")
        if f"{name}_us" in row
    )
    shape = "x".join(map(str, row["shape"]))
    ours = f"ours {row['ours_us']:9.1f} us {row['gflops']:5.0f} GFLOP/s"
    print(f"attention {shape:18} {row['dtype']:9} {ours}{peers}", flush=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), action="append", dest="dtypes")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of one line of the table")
    parser.add_argument("--json", type=Path, help="write the figures and the machine to this file")
    args = parser.parse_args(arguments)
    missing = native.status("cpu")
    if missing is not None:
        raise SystemExit(f"the compiled module is needed and is not here: {missing}")
    print(json.dumps({**stamp(), "isa": native.build_info()["isa_used"]}))
    rows = []
    with torch.no_grad():
        for name in args.dtypes or ("float32", "bfloat16"):
            for shape in SHAPES:
                rows.append(attention(shape, getattr(torch, name), args.seconds))
                print_attention(rows[-1])
    if args.json:
        args.json.write_text(json.dumps({"machine": stamp(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
