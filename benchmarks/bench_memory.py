"""Peak memory of decoding large images by tiles with Stable Diffusion's autoencoder at full width.

    python benchmarks/bench_memory.py [--side 2048] [--dtype bfloat16|float32]

Prints the peak of the whole process, Python and PyTorch included, before and after.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from timing import stamp

from difusores import AutoencoderKL

CONFIG = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}


def peak() -> float:
    """Largest resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--side", type=int, default=2048, help="height and width of the image in pixels")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    model = AutoencoderKL(**CONFIG).to(dtype).eval()
    model.enable_tiling()
    before, start = peak(), time.perf_counter()
    side = arguments.side // 8
    with torch.no_grad():
        decoded = model.decode(torch.randn(1, 4, side, side, dtype=dtype), return_dict=False)[0]
    if decoded.shape != (1, 3, arguments.side, arguments.side) or not decoded.isfinite().all():
        raise SystemExit(f"decoded {tuple(decoded.shape)}, or not finite")
    result = {
        "side": arguments.side,
        "dtype": arguments.dtype,
        "before_gb": round(before, 2),
        "peak_gb": round(peak(), 2),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps({**result, "machine": stamp()}))


if __name__ == "__main__":
    main()
