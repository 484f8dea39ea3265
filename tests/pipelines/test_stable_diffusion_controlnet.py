"""StableDiffusionControlNetPipeline: against diffusers' from the same folder, and what the image does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import difusores

pytest.importorskip("transformers")


def network(unet: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    net = difusores.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=[4, 4]).eval()
    for layer in (
        net.controlnet_cond_embedding.conv_out,
        *net.controlnet_down_blocks,
        net.controlnet_mid_block,
    ):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return net


@pytest.fixture
def pipeline(parts: dict[str, Any]) -> Any:
    made = difusores.StableDiffusionControlNetPipeline(**parts, controlnet=network(parts["unet"], 0))
    made.set_progress_bar_config(disable=True)
    return made


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8))


def sample(pipeline: Any, **options: Any) -> Any:
    given = {"num_inference_steps": 4, "output_type": "np", "image": picture(), "prompt": "a cat", **options}
    return pipeline(**given, generator=torch.Generator().manual_seed(1)).images


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("DDIMScheduler", {}),
        ("UniPCMultistepScheduler", {"guess_mode": True, "num_images_per_prompt": 2}),
        ("EulerDiscreteScheduler", {"control_guidance_start": 0.3, "control_guidance_end": 0.8}),
        ("PNDMScheduler", {"guidance_scale": 1.0, "controlnet_conditioning_scale": 0.6}),
        ("DDIMScheduler", {"prompt": ["a cat", "a dog"], "image": [picture(1), picture(2)]}),
    ],
)
def test_same_seed_same_images(
    pipeline: Any, scheduler: str, options: dict[str, Any], tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline.save_pretrained(tmp_path)
    results = []
    for library in (difusores, diffusers):
        loaded = library.StableDiffusionControlNetPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        loaded.scheduler = getattr(library, scheduler).from_config(loaded.scheduler.config)
        results.append(sample(loaded, **options))
    assert results[0].shape == results[1].shape and results[0].shape[1:3] == (16, 24)
    assert np.abs(results[0] - results[1]).max() < 2e-3


def test_the_image_is_felt(pipeline: Any) -> None:
    led = sample(pipeline)
    assert np.abs(led - sample(pipeline, image=picture(5))).max() > 1e-2
    free = sample(pipeline, controlnet_conditioning_scale=0.0)
    assert np.abs(led - free).max() > 1e-2
    assert np.array_equal(free, sample(pipeline, image=picture(5), controlnet_conditioning_scale=0.0))


def test_the_prompt_is_felt(pipeline: Any) -> None:
    """Two that change places swap the images, guidance of 1 is none, and callbacks see each step."""
    noise = torch.randn(1, 4, 8, 12).repeat(2, 1, 1, 1)
    pair = sample(pipeline, prompt=["a cat", "a dog"], latents=noise)
    swapped = sample(pipeline, prompt=["a dog", "a cat"], latents=noise)
    assert np.abs(pair - swapped[::-1]).max() < 1e-5 < 1e-2 < np.abs(pair[0] - pair[1]).max()
    alone = sample(pipeline, guidance_scale=1.0)
    assert np.abs(sample(pipeline, guidance_scale=1 + 1e-6) - alone).max() < 1e-4
    assert np.abs(sample(pipeline) - alone).max() > 1e-2
    seen: list[int] = []
    sample(pipeline, callback_on_step_end=lambda pipe, step, time, tensors: seen.append(step))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": [picture()] * 3}, "there are 3 images for 1 prompts"),
        ({"height": 20, "width": 24}, "both have to be divisible by 8"),
        ({"image": None}, "image is a NoneType"),
        ({"control_guidance_start": 0.9, "control_guidance_end": 0.5}, "needed are two shares"),
    ],
)
def test_bad_input_in_words(pipeline: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(pipeline, **options)


@pytest.fixture
def two(parts: dict[str, Any]) -> Any:
    nets = [network(parts["unet"], seed) for seed in (1, 2)]
    made = difusores.StableDiffusionControlNetPipeline(**parts, controlnet=nets)
    made.set_progress_bar_config(disable=True)
    return made


def test_several_networks(two: Any, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    cases: list[dict[str, Any]] = [
        {"image": [picture(1), picture(2)], "guess_mode": True},
        {
            "image": [[picture(1), picture(2)], [picture(3), picture(4)]],
            "prompt": ["a cat", "a dog"],
            "controlnet_conditioning_scale": [0.5, 1.2],
            "control_guidance_start": [0.0, 0.4],
            "control_guidance_end": [0.6, 1.0],
        },
    ]
    two.save_pretrained(tmp_path)
    results = []
    for library in (difusores, diffusers):
        loaded = library.StableDiffusionControlNetPipeline.from_pretrained(tmp_path)
        assert len(loaded.controlnet.nets) == 2
        loaded.set_progress_bar_config(disable=True)
        results.append([sample(loaded, **options) for options in cases])
    free = [sample(two, **{**options, "controlnet_conditioning_scale": 0.0}) for options in cases]
    for found, expected, other in zip(*results, free, strict=True):
        assert np.abs(found - expected).max() < 2e-3 < 1e-2 < np.abs(found - other).max()


def test_lists_of_one(pipeline: Any, parts: dict[str, Any]) -> None:
    made = difusores.StableDiffusionControlNetPipeline(**parts, controlnet=[pipeline.controlnet])
    assert made.controlnet is pipeline.controlnet
    lists = {
        "controlnet_conditioning_scale": [0.5],
        "control_guidance_start": [0.0],
        "control_guidance_end": [0.5],
    }
    numbers = {name: value[0] for name, value in lists.items()}
    assert np.array_equal(sample(pipeline, **lists), sample(pipeline, **numbers))


def test_lists_that_do_not_fit(two: Any, parts: dict[str, Any]) -> None:
    images = [picture(1), picture(2)]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"image": picture()}, "there are 1 images for 2 ControlNets"),
        ({"image": [[picture()] * 3]}, "there are 3 images for 2 ControlNets"),
        ({"image": [images, picture()]}, "image has lists and single images"),
        ({"image": images, "control_guidance_start": [0.1]}, "control_guidance_start has 1 numbers for 2"),
        ({"image": images, "control_guidance_end": [0.1, 0.0]}, r"are 0\.0 and 0\.0; needed are two shares"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            sample(two, **options)
    for wrong, message in (
        ([], "controlnets has nothing"),
        ([parts["vae"]], "controlnets has AutoencoderKL"),
    ):
        with pytest.raises(ValueError, match=message):
            difusores.StableDiffusionControlNetPipeline(**parts, controlnet=wrong)
    with pytest.raises(ValueError, match="controlnet is a AutoencoderKL; needed is a ControlNetModel"):
        difusores.StableDiffusionControlNetPipeline(**parts, controlnet=parts["vae"])
    with pytest.raises(OSError, match="is no folder of this machine"):
        difusores.MultiControlNetModel.from_pretrained("some/repository")
    inputs = torch.zeros(1, 4, 8, 8), 3, torch.zeros(1, 5, 16)
    with pytest.raises(ValueError, match="there are 1 images and 2 scales for 2 ControlNets"):
        two.controlnet(*inputs, [torch.zeros(1, 3, 16, 16)], [1.0, 1.0])
