"""PosteriorPipeline: the product of two Gaussians by hand, digits filled in and cleaned, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import difusores
from difusores import DDPMScheduler, PosteriorPipeline

README_PICTURE = Path(__file__).parents[2] / "docs" / "images" / "digits.png"
NULL_LABEL = 10  # of the bundled model: no class
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**options: Any) -> PosteriorPipeline:
    unet = difusores.UNet2DModel(**UNET).eval()
    torch.nn.init.zeros_(unet.conv_out.weight)  # predicts no noise anywhere: x0 = x / sqrt(ᾱ)
    torch.nn.init.zeros_(unet.conv_out.bias)
    pipeline = PosteriorPipeline(unet, DDPMScheduler(**{"clip_sample": False, **options}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def digits() -> PosteriorPipeline:
    pipeline = PosteriorPipeline.from_pretrained("bundled:digits")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def clean() -> Tensor:
    """[5, 1, 32, 32] in [-1, 1], digits 0, 3, 5, 7, 8."""
    picture = torch.from_numpy(np.asarray(Image.open(README_PICTURE)).copy()).float() / 127.5 - 1
    return picture[:32].reshape(32, 10, 32).permute(1, 0, 2)[[0, 3, 5, 7, 8]][:, None]


@pytest.mark.parametrize("noise_std", [0.0, 0.8])
def test_a_step_is_the_product_of_two_gaussians(noise_std: float) -> None:
    """For ᾱ = 0.1, ᾱ' = 0.4: m = sqrt(ᾱ') β x0 / (1 - ᾱ) + sqrt(α) (1 - ᾱ') x / (1 - ᾱ), α = 0.1 / 0.4."""
    seen: list[Tensor] = []
    pipeline = small(trained_betas=[0.6, 0.75], num_train_timesteps=2)
    y = torch.full((64, 1, 8, 8), 0.5)
    pipeline(
        y,
        torch.ones(1, 1, 8, 1) * torch.tensor([1.0, 0.0] * 4),
        noise_std,
        2,
        seeded(),
        callback_on_step_end=lambda pipeline, i, t, given: seen.append(given["image"]),
    )
    x = torch.randn(y.shape, generator=seeded())
    mean = 0.4**0.5 * 0.75 / 0.9 * x / 0.1**0.5 + 0.25**0.5 * 0.6 / 0.9 * x
    variance = 0.75 * 0.6 / 0.9
    known, free = seen[0][..., ::2], seen[0][..., 1::2]
    precision = 1 / variance + 1 / (0.6 + 0.4 * noise_std**2)
    product = (mean / variance + 0.4**0.5 * y / (0.6 + 0.4 * noise_std**2)) / precision
    for result, centre, spread in (
        (known, product[..., ::2], 1 / precision),
        (free, mean[..., 1::2], variance),
    ):
        rest = result - centre
        # 2048 numbers: their mean to 0.09 deviations and their variance to 13 %, four standard errors each
        assert abs(float(rest.mean())) < 0.09 * spread**0.5
        assert abs(float(rest.var()) / spread - 1) < 0.13
        assert abs(float((rest * centre).mean())) < 0.09 * spread**0.5 * float(centre.std())
    if noise_std == 0:
        assert torch.equal(seen[1][..., ::2], y[..., ::2])


def test_inpainting_keeps_what_is_known(digits: PosteriorPipeline, clean: Tensor) -> None:
    mask = torch.ones(1, 1, 32, 32)
    mask[..., 14:18, :] = 0
    holes = torch.where(mask == 1, clean, torch.nan)  # what is not known does not count
    options: dict[str, Any] = {"num_inference_steps": 20, "class_labels": NULL_LABEL}
    options |= {"output_type": "latent"}
    filled = digits(holes, mask, generator=seeded(4), **options).images
    unknown = (mask == 0).expand_as(clean)
    assert torch.equal(filled[~unknown], clean[~unknown])
    inside = filled[unknown].reshape(5, -1)
    assert torch.isfinite(inside).all() and inside.abs().max() < 1.5
    # as much ink as digits have there, and nearer to what was there than other digits' fillings
    there = clean[unknown].reshape(5, -1)
    assert 0.5 < (inside + 1).mean() / (there + 1).mean() < 2
    assert (inside - there).square().mean() < 0.75 * (inside.roll(1, 0) - there).square().mean()
    # another seed, another filling
    again = digits(clean[:1], mask, generator=seeded(3), **options).images
    assert (again - filled[:1])[unknown[:1]].abs().max() > 0.1


def test_denoising(digits: PosteriorPipeline, clean: Tensor) -> None:
    noisy = clean + 0.6 * torch.randn(clean.shape, generator=seeded(1))
    options: dict[str, Any] = {"num_inference_steps": 20, "class_labels": NULL_LABEL}
    given = {"noise_std": 0.6, "generator": seeded(2), "output_type": "pt"}
    result = digits(noisy, **given, **options).images * 2 - 1
    before = (noisy.clamp(-1, 1) - clean).square().mean()
    assert before > 0.15 and (result - clean).square().mean() < 0.3 * before
    nearest = torch.cdist(result.flatten(1), clean.flatten(1)).argmin(1)
    assert nearest.tolist() == [0, 1, 2, 3, 4]


def test_noise_and_a_mask_together(digits: PosteriorPipeline, clean: Tensor) -> None:
    mask = torch.ones(2, 1, 32, 1)
    mask[:, :, 12:20] = 0
    noisy = clean[:2] + 0.6 * torch.randn(clean[:2].shape, generator=seeded(1))
    options = {"num_inference_steps": 10, "class_labels": NULL_LABEL, "output_type": "pt"}
    result = digits(noisy, mask, 0.6, generator=seeded(2), **options).images * 2 - 1
    known = (mask == 1).expand_as(result)
    error = (result - clean[:2])[known].square().mean()
    assert 0 < error < 0.4 * (noisy.clamp(-1, 1) - clean[:2])[known].square().mean()


def test_folders_seeds_and_generators(tmp_path: Path) -> None:
    pipeline = small()
    y, mask = torch.rand(2, 1, 8, 8) * 2 - 1, torch.tensor([1.0, 0.0] * 4)
    given: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    first = pipeline(y, mask, generator=seeded(), **given).images
    pipeline.save_pretrained(tmp_path)
    back = difusores.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(back) is PosteriorPipeline and type(back.scheduler) is DDPMScheduler
    back.set_progress_bar_config(disable=True)
    assert np.array_equal(back(y, mask, generator=seeded(), **given).images, first)
    each = pipeline(y, mask, generator=[seeded(4), seeded(5)], **given).images
    alone = pipeline(y[1:], mask, generator=seeded(5), **given).images
    assert np.abs(each[1:] - alone).max() < 1e-5
    (pictures,) = pipeline(y, mask, num_inference_steps=2, return_dict=False)
    assert pictures[0].size == (8, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "all is known and without noise: needed is a mask"),
        ({"noise_std": -1.0}, "noise_std is -1.0"),
        ({"observation": torch.zeros(1, 3, 8, 8), "noise_std": 1.0}, r"\[1, 3, 8, 8\]; needed is .*N, 1, H"),
        ({"observation": torch.zeros(1, 1, 8, 8).byte(), "noise_std": 1.0}, "observation is torch.uint8"),
        ({"mask": torch.full((1, 1, 8, 8), 0.5)}, "values besides 0"),
        ({"mask": torch.ones(1, 1, 8, 7)}, r"\[1, 1, 8, 7\], which does not fit"),
        ({"observation": torch.full((1, 1, 8, 8), torch.nan), "noise_std": 0.1}, "64 of 64 numbers are NaN"),
        ({"noise_std": 1.0, "class_labels": [1, 2]}, "batch_size is 3, and there are 2 class_labels"),
        ({"noise_std": 1.0, "output_type": "jpg"}, "output_type is 'jpg'"),
    ],
)
def test_bad_input(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small()(**{"observation": torch.zeros(3, 1, 8, 8), "num_inference_steps": 2, **options})


def test_learned_variances_are_refused() -> None:
    pipeline = small(variance_type="learned_range")
    with pytest.raises(ValueError, match="variance_type is 'learned_range'; allowed are fixed_small"):
        pipeline(torch.zeros(1, 1, 8, 8), noise_std=1.0)
