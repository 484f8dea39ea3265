"""What the approximations of `accelerate(approximate=...)` cost in distance and gain in time.

    python benchmarks/bench_approximate.py [--workload digits|sd-narrow ...] [--rounds N]

`digits`: 16 images of the bundled model by 25 steps of DDIM, with guidance. `sd-narrow`: an image of 512x512
pixels by 20 steps of DPM-Solver++(2M), with guidance, of a UNet like Stable Diffusion's, a fifth as wide,
with random weights. Each row has the same noise as the first, which is accelerated and exact; `distance` is
the relative L2 distance of its last latents from that one's, PSNR that of the decoded images in [0, 1].
Layers in 8 bits are calibrated with other noise. Runs are timed in turn, in random order; figures are
medians. They go to benchmarks/results/, of which `bench_models.py --table` makes the tables in
docs/approximate.md, apart from everything exact.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import results
import torch
from bench_loops import BETAS
from bench_models import AUTOENCODER, STABLE_DIFFUSION, machine
from contest import distance
from torch import Tensor

import difusores

NARROW = {**STABLE_DIFFUSION, "block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 96}
NARROW_DECODER = {**AUTOENCODER, "block_out_channels": [32, 32, 64, 64]}
Pipe = Any
Allowed = Mapping[str, Mapping[str, Any]]


def digits() -> Pipe:
    return difusores.DDIMPipeline.from_pretrained("bundled:digits")


def digits_latents(pipe: Pipe, seed: int) -> Tensor:
    labels = [i % 10 for i in range(16)]
    options = {"guidance_scale": 2.0, "num_inference_steps": 25, "output_type": "latent"}
    generator = torch.Generator().manual_seed(seed)
    found: Tensor = pipe(class_labels=labels, generator=generator, **options).images
    return found


def stable_diffusion() -> Pipe:
    torch.manual_seed(0)
    return difusores.StableDiffusionPipeline(
        vae=difusores.AutoencoderKL(**NARROW_DECODER).eval(),
        text_encoder=None,
        tokenizer=None,
        unet=difusores.UNet2DConditionModel(**NARROW).eval(),
        scheduler=difusores.DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_latents(pipe: Pipe, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(2, 77, NARROW["cross_attention_dim"], generator=generator)
    found: Tensor = pipe(
        prompt_embeds=texts[:1],
        negative_prompt_embeds=texts[1:],
        num_inference_steps=20,
        generator=generator,
        output_type="latent",
    ).images
    return found


def decoded(pipe: Pipe, latents: Tensor) -> Tensor:
    """Images in [0, 1]."""
    vae = pipe.components.get("vae")
    if vae is not None:
        with torch.no_grad():
            latents = vae.decode(latents / vae.config["scaling_factor"]).sample
    return (latents / 2 + 0.5).clamp(0, 1)


def psnr(got: Tensor, want: Tensor) -> float:
    """Of images in [0, 1], in dB; infinite for equal ones."""
    error = (got.double() - want.double()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


UNETS: dict[str, Allowed] = {
    "exact": {},
    "int8": {"int8": {}},
    "feature_cache, interval 2": {"feature_cache": {"interval": 2}},
    "feature_cache, interval 3": {"feature_cache": {"interval": 3}},
    "feature_cache, interval 3, depth 2": {"feature_cache": {"interval": 3, "depth": 2}},
    "int8, feature_cache": {"int8": {}, "feature_cache": {}},
}
GUIDED: dict[str, Allowed] = {
    **UNETS,
    "token_merging, ratio 0.25": {"token_merging": {"ratio": 0.25}},
    "token_merging, ratio 0.5": {"token_merging": {}},
    "partial_guidance, first 60 %": {"partial_guidance": {}},
    "all four": {"int8": {}, "feature_cache": {}, "token_merging": {}, "partial_guidance": {}},
}
WORKLOADS: dict[str, tuple[Callable[[], Pipe], Callable[[Pipe, int], Tensor], dict[str, Allowed]]] = {
    "digits": (digits, digits_latents, UNETS),
    "sd-narrow": (stable_diffusion, stable_diffusion_latents, GUIDED),
}


def measure(name: str, rounds: int) -> dict[str, dict[str, Any]]:
    """A row for each approximation."""
    make, latents_of, variants = WORKLOADS[name]
    pipes: dict[str, Pipe] = {}
    rows: dict[str, dict[str, Any]] = {}
    exact: Tensor | None = None
    for variant, allowed in variants.items():
        pipe = pipes[variant] = make()
        pipe.set_progress_bar_config(disable=True)
        difusores.accelerate(pipe, approximate=allowed)
        if "int8" in allowed:
            difusores.calibrate(pipe, lambda pipe=pipe: latents_of(pipe, 2))  # type: ignore[misc]
        latents = latents_of(pipe, 1)
        exact = latents if exact is None else exact
        images = [decoded(pipes["exact"], kept) for kept in (latents, exact)]
        rows[variant] = {"distance": distance(latents, exact), "psnr": round(psnr(*images), 1)}
    samples: dict[str, list[float]] = {variant: [] for variant in variants}
    order = list(variants)
    for count in range(rounds):
        random.Random(count).shuffle(order)
        for variant in order:
            start = time.perf_counter()
            latents_of(pipes[variant], 1)
            samples[variant].append(time.perf_counter() - start)
    base = statistics.median(samples["exact"])
    for variant, times in samples.items():
        median = statistics.median(times)
        rows[variant].update(ms=round(1e3 * median, 1), times_base=round(base / median, 2))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each approximation that are timed")
    arguments = parser.parse_args()
    where = machine()
    for name in arguments.workload:
        result = {"workload": name, "machine": where, "rows": measure(name, arguments.rounds)}
        print("\n".join(results.approximation(result)), flush=True)
        results.keep(f"approximate-{name}", result)


if __name__ == "__main__":
    main()
