"""One denoising step, model and DDIM step, of whole UNets beside diffusers' in the same run.

    python benchmarks/bench_unet.py [--model digits|cifar10|cat] [--batch N] [--seconds S] [--json FILE]

`digits` is the bundled model; the others have the configuration of google/ddpm-cifar10-32 and
google/ddpm-cat-256 and random weights, the same in both libraries. Both take a step from the same sample
first and have to agree; a wrong result is not timed. Contestants are interleaved, figures are medians:
difusores, the same with its reference backend, diffusers, both with channels_last samples and weights, and
difusores accelerated. Acceleration keeps freed memory in the heap, from which all contestants gain here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from timing import interleave, stamp
from torch import Tensor, nn

import difusores

DDPM: dict[str, Any] = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "cifar10": {
        **DDPM,
        "sample_size": 32,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "cat": {
        **DDPM,
        "sample_size": 256,
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    },
}
BATCHES = {"digits": 16, "cifar10": 8, "cat": 1}
AGREEMENT = 1e-4
AGREEMENT_BF16 = 3e-2  # of a step, in which the sample has the larger part


def models(name: str) -> tuple[nn.Module, nn.Module]:
    """difusores' UNet and diffusers', with the same weights."""
    torch.manual_seed(0)
    if name == "digits":
        ours = difusores.UNet2DModel.from_pretrained("bundled:digits", subfolder="unet")
        config = {key: value for key, value in ours.config.items() if not key.startswith("_")}
    else:
        config = CONFIGS[name]
        ours = difusores.UNet2DModel(**config)
    theirs = diffusers.UNet2DModel(**config)
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def stepper(library: Any, unet: nn.Module, x: Tensor, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A step of the loop that users write by hand."""
    scheduler = library.DDIMScheduler()
    scheduler.set_timesteps(50)
    t = scheduler.timesteps[25]

    def step() -> Tensor:
        with torch.no_grad():
            y: Tensor = scheduler.step(unet(x, t, **inputs).sample, t, x).prev_sample
            return y

    return step


def measure(name: str, batch: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of every contestant."""
    ours, theirs = models(name)
    x = torch.randn(batch, ours.config["in_channels"], *[ours.config["sample_size"]] * 2)
    inputs = {"class_labels": torch.arange(batch) % 10} if name == "digits" else {}
    plain = stepper(difusores, ours, x, inputs)

    def reference() -> Tensor:
        with difusores.use_backend("reference"):
            return plain()

    contestants = {
        "difusores": plain,
        "reference": reference,
        "diffusers": stepper(diffusers, theirs, x, inputs),
    }
    last = x.to(memory_format=torch.channels_last)
    for library, unet in ((difusores, ours), (diffusers, theirs)):
        copy = type(unet).from_config(unet.config).eval().to(memory_format=torch.channels_last)
        copy.load_state_dict(unet.state_dict())
        contestants[f"{library.__name__} channels_last"] = stepper(library, copy, last, inputs)
    for label, dtype in (("accelerated", None), ("accelerated bfloat16", "bfloat16")):
        copy = type(ours).from_config(ours.config).eval()
        copy.load_state_dict(ours.state_dict())
        difusores.accelerate(copy, dtype=dtype)
        contestants[label] = stepper(difusores, copy, x, inputs)
    want = contestants["diffusers"]()
    for contestant, call in contestants.items():
        worst = ((call() - want).norm() / want.norm()).item()
        if not worst <= (AGREEMENT_BF16 if "bfloat16" in contestant else AGREEMENT):
            raise SystemExit(f"{name}: {contestant} differs from diffusers by {worst:.2e}; not timed")
    medians = interleave(contestants, seconds=seconds)
    return {"model": name, "batch": batch, **{key: round(1e3 * value, 1) for key, value in medians.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=list(BATCHES), help="all but cat if left out")
    parser.add_argument("--batch", type=int, help=", ".join(f"{k}: {v}" for k, v in BATCHES.items()))
    parser.add_argument("--seconds", type=float, default=20.0, help="time spent on one model")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    machine = {**stamp(), "diffusers": diffusers.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = []
    for name in [arguments.model] if arguments.model else ["digits", "cifar10"]:
        row = measure(name, arguments.batch or BATCHES[name], arguments.seconds)
        rows.append(row)
        print(f"{name}, batch {row['batch']}, ms of a step:")
        for contestant in list(row)[2:]:
            ratio = row["diffusers"] / row[contestant]
            print(f"  {contestant:<26}{row[contestant]:>9}{ratio:>7.2f} x diffusers")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "milliseconds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
