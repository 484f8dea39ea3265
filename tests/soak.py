"""1,000 forwards of an accelerated network in a container that shows all cores and gives one.

    python tests/soak.py

Prints how far three threads' result is from one thread's (relative L2); the KiB by which memory grew after
the first 200 forwards; the page faults of the other 800; and those of four forwards with tensors of 3 MiB,
whose memory glibc left to itself gives back to the system. A program, because what a test suite leaves on the
heap costs faults of its own.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import torch

import difusores

CONFIG: dict[str, Any] = {
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 8,
    "layers_per_block": 1,
}


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() // 1024


def faults(model: torch.nn.Module, case: tuple[torch.Tensor, ...], forwards: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(forwards):
        model(*case)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.manual_seed(0)
    model = difusores.UNet2DModel(block_out_channels=[32], attention_head_dim=16, **CONFIG).eval()
    case = torch.randn(1, 3, 8, 8), torch.tensor([371])
    difusores.accelerate(model)
    torch.set_num_threads(3)
    several = model(*case).sample
    torch.set_num_threads(1)
    one = model(*case).sample
    faults(model, case, 200)
    resident, peak = resident_kib(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    small = faults(model, case, 800)
    grown = max(resident_kib() - resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    model = difusores.UNet2DModel(block_out_channels=[8], add_attention=False, **CONFIG).eval()
    case = torch.randn(1, 3, 320, 336), torch.tensor([371])
    difusores.accelerate(model)
    faults(model, case, 12)
    print(((several - one).norm() / one.norm()).item(), grown, small, faults(model, case, 4))


if __name__ == "__main__":
    with torch.no_grad():
        main()
