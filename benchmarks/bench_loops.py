"""Whole images: wall time from the prompt, or the noise, to the picture, beside diffusers.

    python benchmarks/bench_loops.py [--loop NAME ...] [--rounds N]

`ddim-50-cifar10`: eight images by 50 steps of DDIM with the UNet of google/ddpm-cifar10-32.
`dpm-20-sd-256px`: one of 256x256 pixels by 20 steps of DPM-Solver++(2M) with Stable Diffusion's text encoder,
UNet and decoder, with guidance. Weights are random, the noise is the same for all; the networks are taken to
predict velocity, since x0 of an untrained prediction of noise is a difference of large numbers, in which any
rounding grows. The images are compared with those of diffusers in fp32 first; figures go to
benchmarks/results/, and `bench_models.py --table` makes the tables.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import results
import torch
from bench_models import AUTOENCODER, STABLE_DIFFUSION, Workload, build, machine
from bench_unet import CONFIGS
from contest import Call, Contestant, apart, compete

import difusores

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LIMITS = {"fp32": 1e-3, "bf16": 5e-2}  # relative L2 of images: steps carry differences on
Pipe = Any


def model(library: str, folder: str, kind: str, config: dict[str, Any]) -> Any:
    """A network with random weights, the same in all processes, and in memory once."""
    weights = Path(folder, f"{kind}.pt")
    if not weights.exists():
        torch.manual_seed(0)
        torch.save(getattr(diffusers, kind)(**config).state_dict(), weights)
    return build(library, Workload(kind, config, ()), str(weights))


def ddim(library: str, folder: str) -> Pipe:
    package = importlib.import_module(library)
    unet = model(library, folder, "UNet2DModel", CONFIGS["cifar10"])
    return package.DDIMPipeline(unet, package.DDIMScheduler(prediction_type="v_prediction"))


def ddim_image(pipe: Pipe) -> Any:
    generator = torch.Generator().manual_seed(1)
    return pipe(batch_size=8, num_inference_steps=50, generator=generator, output_type="np").images


def text_parts() -> dict[str, Any]:
    """A text encoder of Stable Diffusion's size with random weights, and a tokenizer that knows letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps({name: index for index, name in enumerate(names)}))
        files[1].write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(*map(str, files), model_max_length=77)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer}


def stable_diffusion(library: str, folder: str) -> Pipe:
    package = importlib.import_module(library)
    return package.StableDiffusionPipeline(
        vae=model(library, folder, "AutoencoderKL", AUTOENCODER),
        unet=model(library, folder, "UNet2DConditionModel", STABLE_DIFFUSION),
        scheduler=package.DPMSolverMultistepScheduler(**BETAS, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **text_parts(),
    )


def stable_diffusion_image(pipe: Pipe) -> Any:
    generator = torch.Generator().manual_seed(1)
    size = {"height": 256, "width": 256}
    return pipe("a cat", **size, num_inference_steps=20, generator=generator, output_type="np").images


LOOPS: dict[str, tuple[Callable[[str, str], Pipe], Callable[[Pipe], Any]]] = {
    "ddim-50-cifar10": (ddim, ddim_image),
    "dpm-20-sd-256px": (stable_diffusion, stable_diffusion_image),
}
CLASSES = {
    "ddim-50-cifar10": ("UNet2DModel", "DDIMPipeline", "DDIMScheduler"),
    "dpm-20-sd-256px": (
        "AutoencoderKL",
        "UNet2DConditionModel",
        "StableDiffusionPipeline",
        "DPMSolverMultistepScheduler",
    ),
}


def plain(pipe: Pipe) -> Pipe:
    return pipe


def bfloat16(pipe: Pipe) -> Pipe:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16).to(memory_format=torch.channels_last)
    return pipe


def accelerated(pipe: Pipe, dtype: str | None = None) -> Pipe:
    difusores.accelerate(pipe, dtype=dtype)
    return pipe


# name -> precision, library, what is done to its pipeline
CONTESTANTS: dict[str, tuple[str, str, Callable[[Pipe], Pipe]]] = {
    "diffusers": ("fp32", "diffusers", plain),
    "difusores accelerated": ("fp32", "difusores", accelerated),
    "difusores accelerated bf16": ("bf16", "difusores", lambda pipe: accelerated(pipe, "bfloat16")),
    "diffusers accelerated": ("fp32", "diffusers", accelerated),
    "diffusers channels_last bf16": ("bf16", "diffusers", bfloat16),
}
TOGETHER = 2  # beside diffusers: whole pipelines of Stable Diffusion in 24 GB


def contestant(loop: str, name: str, folder: str) -> Contestant:
    precision, library, change = CONTESTANTS[name]
    make, image = LOOPS[loop]

    def load() -> Pipe:
        pipe = make(library, folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def prepare(pipe: Pipe) -> list[Call]:
        pipe = change(pipe)
        return [lambda: torch.from_numpy(image(pipe))]

    return Contestant(precision, load, prepare)


def write_oracle(loop: str, folder: str) -> None:
    first = contestant(loop, "diffusers", folder)
    with torch.no_grad():
        torch.save([call() for call in first.prepare(first.build())], f"{folder}/oracle.pt")


def measure(loop: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Every contestant's row."""
    for library in (diffusers, difusores):  # imported before the forks, not as a part of them
        for name in CLASSES[loop]:
            getattr(library, name)
    with tempfile.TemporaryDirectory() as folder:
        apart(write_oracle, loop, folder)
        wanted = torch.load(f"{folder}/oracle.pt")
        contestants = {name: contestant(loop, name, folder) for name in CONTESTANTS}
        return compete(contestants, wanted, 0.0, rounds=rounds, together=TOGETHER, limits=LIMITS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--loop", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--rounds", type=int, default=3, help="images of each contestant that are timed")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    where = machine()
    for loop in arguments.loop:
        result = {"workload": loop, "machine": where, "rows": measure(loop, arguments.rounds)}
        print(results.markdown(result), flush=True)
        results.keep(f"loops-{loop}", result)


if __name__ == "__main__":
    main()
