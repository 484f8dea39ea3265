"""Stable Diffusion XL's pipelines against diffusers', from the same folders."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import difusores
from difusores.pipelines.pipeline import follows_plan

from .conftest import BETAS, XL_UNET, make_widened, make_xl_parts

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TEXT, CHANGE = "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"
FILL = "StableDiffusionXLInpaintPipeline"
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "heun": ("HeunDiscreteScheduler", {}),
}
IMAGE = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
MASK = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
LATENTS = torch.linspace(-2, 2, 4 * 64).view(1, 4, 8, 8)
GIVEN: dict[str, dict[str, Any]] = {
    TEXT: {},
    CHANGE: {"image": IMAGE, "strength": 0.7},
    FILL: {"image": IMAGE, "mask_image": MASK},
}


REFINER = {"cross_attention_dim": 24, "projection_class_embeddings_input_dim": 5 * 8 + 12}


@pytest.fixture(scope="module")
def save(text_parts: Any, second_text_parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """save(kind, channels, refiner, **changes) -> a folder, written once; changes: of the pipeline."""
    saved: dict[str, Path] = {}

    def write(kind: str, channels: int = 4, refiner: bool = False, **changes: Any) -> Path:
        name = f"{kind}-{channels}-{refiner}-{len(changes)}"
        if name not in saved:
            parts = make_xl_parts(text_parts, second_text_parts)
            if refiner:
                parts |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
            if channels == 9 or refiner:
                parts["unet"] = make_widened(channels, XL_UNET, **(REFINER if refiner else {}))
            saved[name] = tmp_path_factory.mktemp("saved") / name
            getattr(difusores, kind)(**parts, **changes).save_pretrained(saved[name])
        return saved[name]

    return write


@cache
def loaded(library: Any, folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    pipeline = getattr(library, kind).from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(library: Any, folder: Path, kind: str, scheduler: str = "euler") -> Any:
    pipeline = loaded(library, folder, kind)
    name, options = SCHEDULERS[scheduler]
    pipeline.scheduler = getattr(library, name)(
        **BETAS, steps_offset=1, timestep_spacing="leading", **options
    )
    return pipeline


def images(library: Any, folder: Path, kind: str, scheduler: str = "euler", **options: Any) -> Any:
    """[N, H, W, 3], or latents."""
    seeds = options.pop("seeds", 5)
    generator: Any = [torch.Generator().manual_seed(seed) for seed in np.atleast_1d(seeds).tolist()]
    generator = generator if isinstance(seeds, tuple) else generator[0]
    given = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "np", **GIVEN[kind], **options}
    return np.asarray(load(library, folder, kind, scheduler)(generator=generator, **given).images)


def difference(folder: Path, kind: str, scheduler: str = "euler", **options: Any) -> float:
    ours, theirs = (images(library, folder, kind, scheduler, **options) for library in (difusores, diffusers))
    assert theirs.std() > 0.05 and ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "dpm++"])
@pytest.mark.parametrize(("kind", "channels"), [(TEXT, 4), (CHANGE, 4), (FILL, 4), (FILL, 9)])
def test_same_seed_same_images(save: Any, kind: str, channels: int, scheduler: str) -> None:
    assert follows_plan(getattr(difusores, SCHEDULERS[scheduler][0])())
    options = {"prompt": ["a cat", "a dog"], "prompt_2": ["dog", "x"], "negative_prompt": "y"}
    assert difference(save(kind, channels), kind, scheduler, **options) < 2e-3


ZEROS, POOLED = torch.linspace(-1, 1, 77 * 40).view(1, 77, 40), torch.linspace(-1, 1, 12).view(1, 12)
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    (TEXT, {"guidance_scale": 1.0}),
    (TEXT, {"height": 24, "width": 8, "num_images_per_prompt": 2}),
    (TEXT, {"seeds": (3, 4), "num_images_per_prompt": 2}),
    (TEXT, {"guidance_rescale": 0.7, "latents": LATENTS}),
    (TEXT, {"prompt": None, "prompt_embeds": ZEROS, "pooled_prompt_embeds": POOLED}),
    (TEXT, {"negative_prompt": "x", "negative_prompt_2": "a dog", "clip_skip": 1, "prompt_2": ""}),
    (TEXT, {"original_size": (40, 20), "crops_coords_top_left": (3, 5), "target_size": (9, 7)}),
    (TEXT, {"negative_original_size": (4, 2), "negative_target_size": (9, 7)}),
    (TEXT, {"denoising_end": 0.6, "output_type": "latent"}),
    (TEXT, {"denoising_end": 0.499, "output_type": "latent"}),  # at a step's own time, 501 of 1000
    (TEXT, {"sigmas": [12.0, 4.0, 1.0, 0.0]}),
    (TEXT, {"timesteps": [900, 500, 100]}),
    (CHANGE, {"image": IMAGE[..., :8]}),  # what is told is its size, height first
    (CHANGE, {"original_size": (40, 20)}),  # of the negative prompts, too
    (CHANGE, {"original_size": (40, 20), "negative_original_size": (4, 2), "negative_target_size": (9, 7)}),
    (CHANGE, {"crops_coords_top_left": (3, 5), "negative_original_size": (4, 2), "target_size": (9, 7)}),
    (CHANGE, {"image": LATENTS, "strength": 0.3, "denoising_start": 0.5, "num_inference_steps": 8}),
    (CHANGE, {"denoising_start": 0.3, "denoising_end": 0.8, "num_inference_steps": 8, "strength": 0.3}),
    (CHANGE, {"sigmas": [12.0, 4.0, 1.0, 0.0], "strength": 1.0}),
    (CHANGE, {"timesteps": [900, 500, 100], "strength": 1.0}),
    (CHANGE, {"seeds": (1, 2), "num_images_per_prompt": 2, "guidance_rescale": 0.5}),
    (FILL, {"strength": 1.0, "seeds": (1, 2), "num_images_per_prompt": 2}),
    (FILL, {"image": LATENTS, "denoising_start": 0.3, "denoising_end": 0.8, "num_inference_steps": 8}),
    (FILL, {"sigmas": [12.0, 4.0, 1.0, 0.0]}),
    (FILL, {"height": 24, "width": 8, "timesteps": [900, 500, 100]}),
    (FILL, {"latents": LATENTS, "height": 16, "width": 16, "guidance_rescale": 0.5}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_options(save: Any, kind: str, options: dict[str, Any]) -> None:
    assert difference(save(kind), kind, **options) < 2e-3


@pytest.mark.parametrize("kind", [CHANGE, FILL])
def test_heun_in_the_middle(save: Any, kind: str) -> None:
    options: dict[str, Any] = {"denoising_start": 0.35, "denoising_end": 0.8, "num_inference_steps": 8}
    options |= {"image": IMAGE, "strength": {CHANGE: 0.3, FILL: 0.9999}[kind]}
    assert difference(save(kind), kind, "heun", **options) < 2e-3


@pytest.mark.parametrize("kind", [TEXT, CHANGE, FILL])
def test_noise_of_the_steps(save: Any, kind: str) -> None:
    assert difference(save(kind), kind, "ddim", eta=0.5) < 2e-3


@pytest.mark.parametrize("kind", [CHANGE, FILL])
def test_heun_by_strength(save: Any, kind: str) -> None:
    assert difference(save(kind), kind, "heun", strength=0.6) < 2e-3


def test_inpainting_a_part(save: Any) -> None:
    """To the byte but for rounding."""
    pixels = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
    mask = np.zeros((30, 40), np.uint8)
    mask[5:12, 20:33] = 255
    given = {"image": Image.fromarray(pixels), "mask_image": Image.fromarray(mask), "output_type": "pil"}
    ours, theirs = (
        images(library, save(FILL), FILL, padding_mask_crop=4, **given)[0].astype(int)
        for library in (difusores, diffusers)
    )
    assert np.abs(ours - theirs).max() <= 1 and ours.shape == (30, 40, 3)
    changed = np.abs(ours - pixels).max(axis=2) > 1
    assert changed[mask > 0].mean() > 0.5 and not changed[mask == 0].any()


def test_nine_channels_from_the_middle(save: Any) -> None:
    options = {"denoising_start": 0.3, "num_inference_steps": 8}
    assert difference(save(FILL, 9), FILL, "ddim", **options) < 2e-3


@pytest.mark.parametrize(
    "options",
    [{}, {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0, "crops_coords_top_left": (3, 5)}],
    ids=["defaults", "scores"],
)
@pytest.mark.parametrize("kind", [CHANGE, FILL])
def test_refiners(save: Any, kind: str, options: dict[str, Any]) -> None:
    assert difference(save(kind, refiner=True), kind, negative_prompt="x", **options) < 2e-3


def test_base_and_refiner(save: Any) -> None:
    base, second = save(TEXT), save(CHANGE, refiner=True)
    results = []
    for library in (difusores, diffusers):
        steps: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 6}
        half = load(library, base, TEXT)(
            **steps, denoising_end=0.5, output_type="latent", generator=torch.Generator().manual_seed(2)
        ).images
        whole = load(library, second, CHANGE)(**steps, denoising_start=0.5, image=half, output_type="np")
        results.append(whole.images)
    assert results[1].std() > 0.05 and np.abs(results[0] - results[1]).max() < 2e-3


def test_empty_prompts_that_are_encoded(save: Any) -> None:
    folder = save(TEXT, force_zeros_for_empty_prompt=False)
    assert difference(folder, TEXT, negative_prompt_2="a dog") < 2e-3
    encoded = images(difusores, folder, TEXT)
    assert np.abs(encoded - images(diffusers, folder, TEXT)).max() < 2e-3
    assert np.abs(encoded - images(difusores, save(TEXT), TEXT)).max() > 1e-2


@pytest.mark.parametrize("kind", [TEXT, CHANGE])
def test_means_and_deviations_of_latents(save: Any, kind: str) -> None:
    folder, plain = save(kind), images(difusores, save(kind), kind)
    moments = {"latents_mean": [0.5, -1.0, 0.2, 0.3], "latents_std": [1.5, 0.7, 2.0, 1.1]}
    models = [loaded(library, folder, kind).vae for library in (difusores, diffusers)]
    try:
        for model in models:
            model.register_to_config(**moments)
        assert difference(folder, kind) < 2e-3
        assert np.abs(images(difusores, folder, kind) - plain).max() > 1e-2
    finally:
        for model in models:
            model.register_to_config(latents_mean=None, latents_std=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(save: Any, dtype: torch.dtype) -> None:
    folder, results = save(CHANGE), []
    for library, kind in ((difusores, torch.float32), (difusores, dtype), (diffusers, dtype)):
        pipeline = loaded(library, folder, CHANGE, kind)
        given = {"image": LATENTS / 2, "denoising_start": 0.5, "num_inference_steps": 4}
        results.append(pipeline("a cat", output_type="np", **given).images)
        assert pipeline.vae.dtype is kind
    exact, ours, theirs = results
    assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max() + 1e-3


def test_folders_that_diffusers_wrote(save: Any, tmp_path: Path) -> None:
    load(diffusers, save(CHANGE), CHANGE).save_pretrained(tmp_path / "theirs")
    assert difference(tmp_path / "theirs", CHANGE) < 2e-3


@pytest.mark.parametrize("kind", [TEXT, CHANGE, FILL])
def test_same_signatures(kind: str) -> None:
    for method in ("__init__", "__call__", "encode_prompt"):
        theirs, ours = (
            [
                p
                for p in inspect.signature(getattr(getattr(library, kind), method)).parameters.values()
                if p.kind is not p.VAR_KEYWORD
            ]
            for library in (diffusers, difusores)
        )
        assert [p.name for p in theirs] == [p.name for p in ours[: len(theirs)]]
        for mine, other in zip(ours, theirs, strict=False):
            same = list(mine.default) if isinstance(other.default, list) else mine.default
            assert same == other.default, mine.name
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
