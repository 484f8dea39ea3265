"""The two diffusion models of 2015 on digits: bits that are flipped, and grey values under Gaussian noise. /
Los dos modelos de difusión de 2015 con dígitos: bits que se invierten y grises bajo ruido gaussiano.

    python examples/deep_unsupervised.py binomial|gaussian [--minutes M | --steps N] [--seed S]
        [--held-out K] [--out FOLDER]

Trains a small network on 5,000 MNIST digits (`python -m difusores fetch mnist`) for M minutes, or for N
steps, which give the same figures on every run. Then it prints the variational bound on K digits (1,000)
that it never saw, in bits per dimension, beside what independent pixels need, and writes a picture of samples
and the figures into FOLDER. /
Entrena una red pequeña con 5.000 dígitos de MNIST durante M minutos, o durante N pasos, que dan las mismas
cifras cada vez. Después imprime la cota variacional de K dígitos (1.000) que nunca ha visto, en bits por
dimensión, junto a lo que necesitan píxeles independientes, y escribe una imagen con muestras y las cifras en
FOLDER.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from difusores import UNet2DModel
from difusores.processes import BinomialProcess, GaussianProcess, independent_pixel_bits
from difusores.training.data import load_mnist
from difusores.training.ema import EMA

SIDE, BATCH, SAMPLES, CHAIN = 28, 48, 36, {"binomial": 100, "gaussian": 250}
TERMS = 40  # of the bound that are computed; they stand for all
LOG_SNR = (12.4, -9.0)  # of the first and the last step of the chain
LEARNING_RATE, WARM_UP, DECAY = 1.5e-3, 100, 0.995
CHANNELS = (24, 48, 48)


# 1. The digits, as bits or as grey values from -1 to 1, and what a model of independent pixels needs.
#    Los dígitos, como bits o como grises de -1 a 1, y lo que necesita un modelo de píxeles independientes.
def digits(binary: bool) -> tuple[dict[str, Tensor], float]:
    pixels = {part: load_mnist(part, resolution=SIDE).images for part in ("generator", "test")}
    if binary:
        pixels = {part: (images > 127).to(torch.uint8) for part, images in pixels.items()}
    baseline = independent_pixel_bits(pixels["generator"], pixels["test"], 2 if binary else 256)
    data = {
        part: images.unsqueeze(1).float() if binary else images.unsqueeze(1).float() / 127.5 - 1
        for part, images in pixels.items()
    }
    return data, baseline


# 2. The chain that destroys a digit: each step flips some bits, or each step adds Gaussian noise, from a
#    quarter of a grey level up, evenly in the logarithm of the signal-to-noise ratio. The bound then weighs
#    the error of the predicted noise alike at every step, as the loss does.
#    La cadena que destruye un dígito: cada paso invierte unos bits o añade ruido gaussiano, desde un cuarto
#    de nivel de gris, uniforme en el logaritmo de la relación señal-ruido. Así la cota pesa igual el error
#    del ruido predicho en todos los pasos, como la función de pérdida.
def chain(kind: str) -> BinomialProcess | GaussianProcess:
    if kind == "binomial":
        return BinomialProcess(steps=CHAIN[kind])
    share = torch.linspace(*LOG_SNR, CHAIN[kind], dtype=torch.float64).sigmoid()
    return GaussianProcess(1 - share / torch.cat([torch.ones(1, dtype=torch.float64), share[:-1]]))


# 3. The network that will restore it: one small UNet for both chains.
#    La red que lo va a restaurar: una pequeña UNet para las dos cadenas.
def network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def shares(minutes: float, steps: int | None) -> Iterator[float]:
    """What part of the training is over, from 0 to below 1. / Qué parte del entrenamiento ha pasado."""
    start, step = time.monotonic(), 0
    while (share := (time.monotonic() - start) / (60 * minutes) if steps is None else step / steps) < 1:
        yield share
        step += 1


# 4. Training: show the network digits at random steps of the chain; of bits it learns the original one, of
#    grey values the noise. What is kept is the average of its weights.
#    Entrenamiento: mostrar a la red dígitos en pasos al azar de la cadena; con bits aprende el original, con
#    grises el ruido. Se guarda la media de sus pesos.
def train(
    process: BinomialProcess | GaussianProcess, data: Tensor, parts: Iterator[float]
) -> tuple[Any, int]:
    model, step = network(), 0
    averaged = EMA(model, DECAY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for share in parts:
        rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        x0 = data[torch.randint(len(data), (BATCH,))]
        t = torch.randint(1, process.steps + 1, (BATCH,))
        if isinstance(process, BinomialProcess):
            logits = model(process.forward(x0, t), t).sample
            loss = F.binary_cross_entropy_with_logits(logits, x0)
        else:
            noise = torch.randn(x0.shape)
            loss = F.mse_loss(model(process.forward(x0, t, noise=noise), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update(model)
        step += 1
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return averaged.model.eval(), step


# 5. The images side by side, to be looked at. / Las imágenes una al lado de otra, para mirarlas.
def grid(images: Tensor, columns: int = 12) -> Image.Image:
    """uint8 [N, H, W]."""
    rows = images.unflatten(0, (-1, columns))
    return Image.fromarray(rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).contiguous().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("kind", choices=tuple(CHAIN))
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--steps", type=int, help="of training, in place of minutes / en lugar de minutos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=1000, help="digits of the bound / dígitos de la cota")
    parser.add_argument("--out", type=Path, default=Path("build/deep_unsupervised"))
    args = parser.parse_args()
    binary = args.kind == "binomial"
    data, baseline = digits(binary)
    process = chain(args.kind)
    torch.manual_seed(args.seed)
    model, steps = train(process, data["generator"], shares(args.minutes, args.steps))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = model(x, t).sample
        return output

    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        parts = data["test"][: args.held_out].split(250)
        bits = torch.cat([process.bound(predict, part, generator=generator, terms=TERMS) for part in parts])
        samples = process.sample(predict, (SAMPLES, 1, SIDE, SIDE), generator=generator)[:, 0]
    picture = samples * 255 if binary else ((samples + 1) * 127.5).clamp(0, 255).round()
    args.out.mkdir(parents=True, exist_ok=True)
    grid(picture.to(torch.uint8)).save(args.out / f"{args.kind}.png")
    figures = {
        "kind": args.kind,
        "bits_per_dimension": round(float(bits.mean()), 4),
        "independent_pixels": round(baseline, 4),
        "held_out": len(bits),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_steps": steps,
        "minutes": args.minutes if args.steps is None else None,
        "seed": args.seed,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    (args.out / f"{args.kind}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
