"""Stable Diffusion's pipelines that take an image, against diffusers' from the same folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import difusores

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
EDIT, FILL = "StableDiffusionInstructPix2PixPipeline", "StableDiffusionInpaintPipeline"
CHANGE = "StableDiffusionImg2ImgPipeline"


def picture(width: int = 19, height: int = 17, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    bands = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], -1).astype(np.uint8)
    return Image.fromarray(bands).convert(mode)


def mask(size: int = 16) -> Image.Image:
    square = np.zeros((size, size), np.uint8)
    square[size // 4 : -size // 4, : size // 2] = 255
    return Image.fromarray(square)


@pytest.fixture
def save(parts: dict[str, Any], widened: Any, tmp_path: Path) -> Any:
    def write(kind: str, channels: int = 4) -> Path:
        chosen = {**parts, "unet": parts["unet"] if channels == 4 else widened(channels)}
        getattr(difusores, kind)(**chosen).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return write


def both(folder: Path, kind: str, scheduler: str, **options: Any) -> Any:
    results = []
    for library in (difusores, diffusers):
        name, config = SCHEDULERS[scheduler]
        pipeline = getattr(library, kind).from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = getattr(library, name).from_config(pipeline.scheduler.config, **config)
        seeds = options.get("seeds", 5)
        generator: Any = [torch.Generator().manual_seed(seed) for seed in np.atleast_1d(seeds).tolist()]
        given = {key: value for key, value in options.items() if key != "seeds"}
        given = {"output_type": "np", "num_inference_steps": 6, **given}
        results.append(pipeline(generator=generator if "seeds" in options else generator[0], **given).images)
    assert results[1].std() > 0.05 and results[0].shape == results[1].shape
    return np.abs(results[0] - results[1]).max()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_image_to_image(save: Any, scheduler: str) -> None:
    options = {"prompt": "a cat", "image": picture(), "strength": 0.7}
    assert both(save(CHANGE), CHANGE, scheduler, **options) < 2e-3


TENSOR = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"image": TENSOR, "seeds": (1, 2), "num_images_per_prompt": 2, "eta": 0.5},
        {"image": TENSOR[0].permute(1, 2, 0).numpy(), "strength": 1.0},
        {"image": torch.linspace(-1, 1, 256).view(1, 4, 8, 8), "strength": 0.5},
        {"image": [picture(), picture(24, 24)], "prompt": ["a cat", "a dog"]},
    ],
    ids=["tensor", "array", "latents", "pictures"],
)
def test_image_to_image_options(save: Any, options: dict[str, Any]) -> None:
    assert both(save(CHANGE), CHANGE, "ddim", **{"prompt": "a cat", **options}) < 2e-3


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_inpainting(save: Any, scheduler: str, channels: int) -> None:
    options = {"prompt": "a cat", "image": picture(), "mask_image": mask(), "strength": 0.9}
    assert both(save(FILL, channels), FILL, scheduler, **options) < 2e-3


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(
    "options",
    [
        {"image": TENSOR, "seeds": (1, 2), "num_images_per_prompt": 2, "eta": 0.5},
        {"image": picture(), "guidance_scale": 1.0, "height": 24, "width": 16},
        {"image": picture(), "mask_image": TENSOR[:, :1], "strength": 0.5},
    ],
    ids=["generators", "size", "tensor"],
)
def test_inpainting_options(save: Any, options: dict[str, Any], channels: int) -> None:
    options = {"prompt": "a cat", "mask_image": mask(), **options}
    assert both(save(FILL, channels), FILL, "ddim", **options) < 2e-3


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_a_part(save: Any, channels: int) -> None:
    """To the byte but for rounding: the pictures of one library differ from the other's by 1 at most."""
    folder, results = save(FILL, channels), []
    for library in (difusores, diffusers):
        pipeline = getattr(library, FILL).from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        given = {"image": picture(40, 30), "mask_image": mask(40).crop((0, 0, 40, 30)), "strength": 0.9}
        call = pipeline("a cat", **given, padding_mask_crop=3, num_inference_steps=4, generator=generator)
        results.append(np.asarray(call.images[0]).astype(int))
    assert np.abs(results[0] - results[1]).max() <= 1
    changed = np.abs(results[0] - np.asarray(picture(40, 30))).max(axis=2) > 1
    assert changed.mean() > 0.2 and not changed[:, 20:].any() and not changed[:10].any()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_instructions(save: Any, scheduler: str) -> None:
    options = {"prompt": ["a cat", "x"], "negative_prompt": ["a dog", "y"], "image": [picture(), picture()]}
    assert both(save(EDIT, 8), EDIT, scheduler, image_guidance_scale=1.3, **options) < 2e-3


@pytest.mark.parametrize("options", [{"guidance_scale": 1.0}, {"image_guidance_scale": 0.5}], ids=str)
def test_instructions_without_guidance(save: Any, options: dict[str, Any]) -> None:
    assert both(save(EDIT, 8), EDIT, "ddim", prompt="a cat", image=picture(), **options) < 2e-3
