"""Judge a class-conditional digits model: is each generated digit the one that was asked for, and is it new?

A small classifier is trained on MNIST digits that the generator has not seen (`MNIST_SPLIT["judge"]`),
checked on others that neither has seen ("test"), and then reads generated digits. Copying would show as
generated digits that lie nearer to the generator's training digits than real held-out digits do.

    python -m difusores fetch mnist
    python benchmarks/digits_judge.py --model bundled:digits
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import difusores
from difusores.training.data import Digits, load_mnist
from difusores.training.fetch import cache_dir

EPOCHS = 20
JUDGE_SEED = 0
JUDGE_GATE = 0.98  # accuracy on real held-out digits below which the judge may not judge
BATCH = 100


class Judge(nn.Module):
    """[B, 1, 32, 32] in [-1, 1] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 24, 5, padding=2), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(48, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 16, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


def augment(images: Tensor) -> Tensor:
    """Turn by up to 15 degrees, scale by up to 15 %, shift by up to 2 pixels; outside is black."""
    count, size = len(images), images.shape[-1]
    angle = (torch.rand(count) * 2 - 1) * torch.pi * 15 / 180
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.15
    shift = (torch.rand(count, 2) * 2 - 1) * 2 * 2 / size
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train_judge(digits: Digits) -> Judge:
    """Train on `digits`, with augmentation, `EPOCHS` times."""
    torch.manual_seed(JUDGE_SEED)
    judge = Judge()
    steps = EPOCHS * (len(digits) // BATCH)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for epoch in range(EPOCHS):
        for indices in torch.randperm(len(digits)).split(BATCH):
            loss = F.cross_entropy(judge(augment(digits.batch(indices))), digits.labels[indices])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(f"judge: epoch {epoch + 1}/{EPOCHS}  loss {loss.item():.3f}", file=sys.stderr)
    return judge.eval()


@torch.no_grad()
def read(judge: Judge, images: Tensor) -> Tensor:
    """int64 [N]: the digit that the judge sees in each of `images`, [N, 1, 32, 32] in [-1, 1]."""
    return torch.cat([judge(part).argmax(1) for part in images.split(BATCH)])


def load_judge(mnist: Path | None) -> Judge:
    """The judge from the cache, where this very script has trained it on these digits; else a new one."""
    digits = load_mnist("judge", mnist)
    key = hashlib.sha256(Path(__file__).read_bytes() + digits.fingerprint.encode()).hexdigest()[:12]
    path = cache_dir() / f"digits-judge-{key}.pt"
    if path.exists():
        judge = Judge().eval()
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge
    path.parent.mkdir(parents=True, exist_ok=True)
    judge = train_judge(digits)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(judge.state_dict(), unfinished)
    os.replace(unfinished, path)
    return judge


def generate(args: argparse.Namespace) -> tuple[Tensor, Tensor, float]:
    """Images [N, 1, 32, 32] in [-1, 1], the labels asked for [N], and the seconds it took."""
    pipeline = difusores.DDIMPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(10).repeat_interleave(args.per_class)
    generator = torch.Generator().manual_seed(args.seed)
    begin = time.perf_counter()
    images = [
        pipeline(
            batch_size=len(part),
            class_labels=part.tolist(),
            guidance_scale=args.guidance,
            num_inference_steps=args.steps,
            generator=generator,
            output_type="pt",
        ).images
        for part in labels.split(BATCH)
    ]
    return torch.cat(images) * 2 - 1, labels, time.perf_counter() - begin


def nearest(images: Tensor, others: Tensor) -> Tensor:
    """[N]: L2 distance, of pixels in [0, 1], from each image to the nearest of `others`."""
    a, b = images.flatten(1) / 2, others.flatten(1) / 2
    return torch.cat([torch.cdist(part, b).amin(1) for part in a.split(BATCH)])


def percentiles(distances: Tensor) -> dict[str, float]:
    """The median and the low end, where copies would lie."""
    points = {"min": 0.0, "p1": 0.01, "p5": 0.05, "median": 0.5}
    return {name: round(distances.quantile(point).item(), 3) for name, point in points.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    test, training = load_mnist("test", args.mnist), load_mnist("generator", args.mnist)
    real = test.batch(torch.arange(len(test)))
    judge = load_judge(args.mnist)
    real_accuracy = (read(judge, real) == test.labels).double().mean().item()
    if real_accuracy < JUDGE_GATE:
        raise SystemExit(
            f"the judge reads only {real_accuracy:.3f} of real digits right, needed {JUDGE_GATE}"
        )
    images, labels, seconds = generate(args)
    right = (read(judge, images) == labels).double().view(10, -1)
    seen = training.batch(torch.arange(len(training)))
    return {
        "model": args.model,
        "command": "python " + " ".join(sys.argv),
        "seed": args.seed,
        "steps": args.steps,
        "guidance": args.guidance,
        "images": len(images),
        "seconds": round(seconds, 1),
        "judge_accuracy_on_real": round(real_accuracy, 4),
        "accuracy": round(right.mean().item(), 4),
        "accuracy_per_class": [round(value, 3) for value in right.mean(1).tolist()],
        "nearest_training_digit": {
            "generated": percentiles(nearest(images, seen)),
            "held_out_real": percentiles(nearest(real, seen)),
        },
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as the model card gives them."""
    per_class = figures["accuracy_per_class"]
    distances = figures["nearest_training_digit"]
    columns = list(distances["generated"])
    lines = [
        "| digit | all | " + " | ".join(map(str, range(10))) + " |",
        "|---|" + "---|" * 11,
        f"| read as asked | {figures['accuracy']:.3f} | " + " | ".join(f"{v:.2f}" for v in per_class) + " |",
        "",
        "| L2 distance to the nearest training digit | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for kind, values in distances.items():
        lines.append(
            f"| {kind.replace('_', ' ')} | " + " | ".join(f"{values[c]:.2f}" for c in columns) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, judge, print JSON and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled:digits", help="pipeline folder or bundled name")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free guidance scale")
    parser.add_argument("--per-class", type=int, default=100, help="digits generated of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mnist", type=Path, help="the fetched .npz file, if it is not in the cache")
    figures = run(parser.parse_args())
    print(json.dumps(figures, indent=2))
    print(table(figures))


if __name__ == "__main__":
    main()
