"""The two diffusion models of 2015 on digits: bits that are flipped, and grey values under Gaussian noise.

    python examples/deep_unsupervised.py binomial|gaussian [--minutes M] [--seed S] [--out FOLDER]

Trains a small network for M minutes on 5,000 MNIST digits (`python -m difusores fetch mnist`), then prints
the variational bound on 1,000 digits that it never saw, in bits per dimension, beside what independent pixels
need, and writes a picture of samples and the figures (with seed and time) into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from difusores import UNet2DModel
from difusores.processes import BinomialProcess, GaussianProcess, independent_pixel_bits
from difusores.training.data import load_mnist
from difusores.training.ema import EMA

SIDE, BATCH, STEPS = 28, 48, {"binomial": 100, "gaussian": 250}
TERMS = 40  # of the bound that are computed; they stand for all
LOG_SNR = (12.4, -9.0)  # of the first and the last step
LEARNING_RATE, WARM_UP, DECAY = 1.5e-3, 100, 0.995


def network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def betas(steps: int) -> Tensor:
    """Noise from a quarter of a grey level up, evenly in the logarithm of the signal-to-noise ratio.

    The bound then weighs the error of the predicted noise alike at every step, as the loss does.
    """
    share = torch.linspace(*LOG_SNR, steps, dtype=torch.float64).sigmoid()
    return 1 - share / torch.cat([torch.ones(1, dtype=torch.float64), share[:-1]])


def grid(images: Tensor, columns: int = 12) -> Image.Image:
    """uint8 [N, H, W] side by side."""
    rows = images.unflatten(0, (-1, columns))
    return Image.fromarray(rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).contiguous().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("kind", choices=tuple(STEPS))
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/deep_unsupervised"))
    args = parser.parse_args()
    binary = args.kind == "binomial"
    pixels = {part: load_mnist(part, resolution=SIDE).images for part in ("generator", "test")}
    if binary:
        pixels = {part: (images > 127).to(torch.uint8) for part, images in pixels.items()}
    levels = 2 if binary else 256
    baseline = independent_pixel_bits(pixels["generator"], pixels["test"], levels)
    data = {
        part: images.unsqueeze(1).float() if binary else images.unsqueeze(1).float() / 127.5 - 1
        for part, images in pixels.items()
    }

    torch.manual_seed(args.seed)
    model = network()
    averaged = EMA(model, DECAY)
    steps = STEPS[args.kind]
    gaussian = GaussianProcess(betas(steps))
    process = BinomialProcess(steps=steps) if binary else gaussian
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    start, step = time.monotonic(), 0
    while (share := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        x0 = data["generator"][torch.randint(len(data["generator"]), (BATCH,))]
        t = torch.randint(1, steps + 1, (BATCH,))
        if binary:
            logits = model(process.forward(x0, t), t).sample
            loss = F.binary_cross_entropy_with_logits(logits, x0)
        else:
            noise = torch.randn(x0.shape)
            loss = F.mse_loss(model(gaussian.forward(x0, t, noise=noise), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update(model)
        step += 1
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)

    best = averaged.model.eval()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = best(x, t).sample
        return output

    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        parts = data["test"].split(250)
        bits = torch.cat([process.bound(predict, part, generator=generator, terms=TERMS) for part in parts])
    samples = process.sample(predict, (36, 1, SIDE, SIDE), generator=generator)[:, 0]
    picture = samples * 255 if binary else ((samples + 1) * 127.5).clamp(0, 255).round()
    args.out.mkdir(parents=True, exist_ok=True)
    grid(picture.to(torch.uint8)).save(args.out / f"{args.kind}.png")
    figures = {
        "kind": args.kind,
        "bits_per_dimension": round(float(bits.mean()), 4),
        "independent_pixels": round(baseline, 4),
        "held_out": len(bits),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_steps": step,
        "minutes": args.minutes,
        "seed": args.seed,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    (args.out / f"{args.kind}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
