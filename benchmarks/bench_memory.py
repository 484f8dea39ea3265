"""Peak memory of large images by tiles through Stable Diffusion's autoencoders at full width.

    python benchmarks/bench_memory.py [--tile 512|768|1024] [--way decode|encode] [--dtype float32]

512 is the tile of Stable Diffusion 1.x, 768 of 2.x, 1024 of XL; their networks are alike. Prints the peak of
the whole process, Python and PyTorch included, before and after. `--tiles 1` computes the first tile alone,
whose like the others are, and lets zeros stand for the rest.
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
}


def peak() -> float:
    """Largest resident memory of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def some_tiles(model: AutoencoderKL, way: str, count: int) -> None:
    """Let `model` compute so many tiles and no more."""
    network, left = (model.decoder if way == "decode" else model.encoder), [count]
    whole = network.forward

    def forward(x: torch.Tensor, by_stripes: bool = False) -> torch.Tensor:
        left[0] -= 1
        if left[0] >= 0:
            return whole(x, by_stripes)
        channels = 3 if way == "decode" else 8
        return x.new_zeros(
            len(x), channels, *(side * 8 if way == "decode" else side // 8 for side in x.shape[2:])
        )

    network.forward = forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--side", type=int, default=2048, help="height and width of the image in pixels")
    parser.add_argument("--tile", type=int, choices=(512, 768, 1024), default=1024, help="in pixels")
    parser.add_argument("--way", choices=("decode", "encode"), default="decode")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tiles", type=int, help="compute so many; all if left out")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    model = AutoencoderKL(**CONFIG, sample_size=arguments.tile).to(dtype).eval()
    model.enable_tiling()
    if arguments.tiles is not None:
        some_tiles(model, arguments.way, arguments.tiles)
    before, start = peak(), time.perf_counter()
    decodes, small = arguments.way == "decode", arguments.side // 8
    with torch.no_grad():
        if decodes:
            out = model.decode(torch.randn(1, 4, small, small, dtype=dtype), return_dict=False)[0]
        else:
            image = torch.rand(1, 3, arguments.side, arguments.side, dtype=dtype)
            out = model.encode(image, return_dict=False)[0].mean
    shape = (1, 3, arguments.side, arguments.side) if decodes else (1, 4, small, small)
    if out.shape != shape or not out.isfinite().all():
        raise SystemExit(f"{arguments.way} gave {tuple(out.shape)}, or not finite")
    result = {
        **vars(arguments),
        "before_gb": round(before, 2),
        "peak_gb": round(peak(), 2),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps({**result, "machine": stamp()}))


if __name__ == "__main__":
    main()
