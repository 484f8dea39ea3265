"""Stable Diffusion's pipelines against diffusers', from the same folders."""

from __future__ import annotations

import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import difusores
from difusores.pipelines import own_loops
from difusores.pipelines.pipeline import follows_plan

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
PEER = diffusers.StableDiffusionPipeline

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "v": ("DDIMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
}


@pytest.fixture
def folder(parts: dict[str, Any], tmp_path: Path) -> Path:
    difusores.StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(library: Any, folder: Path, kind: str = "StableDiffusionPipeline", **options: Any) -> Any:
    pipeline = getattr(library, kind).from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def swap(pipeline: Any, library: Any, scheduler: str) -> None:
    name, options = SCHEDULERS[scheduler]
    pipeline.scheduler = getattr(library, name).from_config(pipeline.scheduler.config, **options)
    pipeline._trained_with = None


def both(folder: Path, scheduler: str = "ddim", kind: str = "StableDiffusionPipeline", **options: Any) -> Any:
    """(ours, diffusers'), [N, H, W, 3]."""
    results = []
    for library in (difusores, diffusers):
        pipeline = load(library, folder, kind)
        swap(pipeline, library, scheduler)
        generator = options.get("generator") or torch.Generator().manual_seed(5)
        if isinstance(generator, tuple):
            generator = [torch.Generator().manual_seed(seed) for seed in generator]
        given = {"output_type": "np", "num_inference_steps": 6, **options, "generator": generator}
        results.append(pipeline(**given).images)
    assert results[1].std() > 0.05
    return results


def assert_same(results: Any) -> None:
    assert results[0].shape == results[1].shape
    assert np.abs(results[0] - results[1]).max() < 2e-3


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_same_seed_same_images(folder: Path, scheduler: str) -> None:
    assert follows_plan(getattr(difusores, SCHEDULERS[scheduler][0])())
    assert_same(both(folder, scheduler, prompt=["a cat", "a dog"], negative_prompt=["dog", "x"]))


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"height": 24, "width": 8, "num_images_per_prompt": 2},
        {"generator": (3, 4), "num_images_per_prompt": 2, "eta": 0.6},
        {"guidance_rescale": 0.7},
        {"prompt": None, "prompt_embeds": torch.linspace(-1, 1, 77 * 16).view(1, 77, 16)},
        {"latents": torch.linspace(-2, 2, 4 * 64).view(1, 4, 8, 8)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(folder: Path, options: dict[str, Any]) -> None:
    assert_same(both(folder, **{"prompt": "a cat", **options}))


def test_a_model_that_is_told_the_guidance(parts: dict[str, Any], widened: Any, tmp_path: Path) -> None:
    told = {**parts, "unet": widened(4, time_cond_proj_dim=8)}
    difusores.StableDiffusionPipeline(**told).save_pretrained(tmp_path / "told")
    assert_same(both(tmp_path / "told", prompt="a cat", guidance_scale=3.0))


def test_clip_skip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPTextModel

    # where diffusers looks for the last norm, and transformers 5 no longer has it
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    assert_same(both(folder, prompt="a cat", clip_skip=1))


def test_their_scheduler_in_our_pipeline(folder: Path) -> None:
    expected = both(folder, "heun", prompt="a cat")[1]
    pipeline = load(difusores, folder)
    swap(pipeline, diffusers, "heun")
    generator = torch.Generator().manual_seed(5)
    result = pipeline("a cat", num_inference_steps=6, generator=generator, output_type="np").images
    assert_same((result, expected))


def test_a_folder_that_diffusers_wrote(folder: Path, tmp_path: Path) -> None:
    load(diffusers, folder).save_pretrained(tmp_path / "theirs")
    assert_same(both(tmp_path / "theirs", "pndm", prompt="a cat"))


def test_a_scheduler_of_the_first_folders(parts: dict[str, Any], folder: Path) -> None:
    results = []
    for library in (difusores, diffusers):
        old = library.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=0, clip_sample=True)
        pipeline = load(library, folder, scheduler=old)
        generator = torch.Generator().manual_seed(5)
        results.append(pipeline("a cat", num_inference_steps=5, generator=generator, output_type="np").images)
    assert_same(results)


KINDS = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
]


@pytest.mark.parametrize("kind", KINDS)
def test_same_signatures(kind: str) -> None:
    edits = "Pix2Pix" in kind  # which has no encode_prompt
    for method in ("__init__", "__call__", *(() if edits else ("encode_prompt",))):
        theirs, ours = (
            [
                parameter
                for parameter in inspect.signature(
                    getattr(getattr(library, kind), method)
                ).parameters.values()
                if parameter.kind is not parameter.VAR_KEYWORD
            ]
            for library in (diffusers, difusores)
        )
        assert [p.name for p in theirs] == [p.name for p in ours[: len(theirs)]]
        for mine, other in zip(ours, theirs, strict=False):
            same = list(mine.default) if isinstance(mine.default, tuple) else mine.default
            assert same == other.default, mine.name
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_components_without_the_variant(folder: Path, parts: dict[str, Any]) -> None:
    """Are read without it, as diffusers does; a folder that has none of it is refused."""
    for library in (difusores, diffusers):
        with pytest.raises(ValueError, match="fp16"):
            load(library, folder, variant="fp16")
    shutil.rmtree(folder / "unet")
    parts["unet"].half().save_pretrained(folder / "unet", variant="fp16")
    with pytest.warns(UserWarning, match=r"^vae, text_encoder of .* have no files of variant 'fp16'"):
        ours = load(difusores, folder, variant="fp16")
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    given = {"num_inference_steps": 2, "output_type": "np"}
    theirs = load(diffusers, folder, variant="fp16")
    images = [
        pipeline("a cat", generator=generator, **given).images
        for pipeline, generator in zip((ours, theirs), generators, strict=True)
    ]
    assert_same(images)
    with pytest.raises(OSError, match="no file named"):
        load(difusores, folder)


@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
def test_a_loop_of_ones_own(
    parts: dict[str, Any], widened: Any, tmp_path: Path, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subclass whose `__call__` is a copy of diffusers', which calls the parts of a loop."""
    own = type("Own", (difusores.StableDiffusionPipeline,), {"__call__": PEER.__call__})
    used = sys.modules[PEER.__module__]
    for name in ("retrieve_timesteps", "rescale_noise_cfg"):
        monkeypatch.setattr(used, name, getattr(own_loops, name))
    told = {"unet": widened(4, time_cond_proj_dim=8)} if scheduler == "heun" else {}
    images = []
    for kind in (own, difusores.StableDiffusionPipeline):
        pipeline = kind(**{**parts, **told})
        pipeline.set_progress_bar_config(disable=True)
        swap(pipeline, difusores, scheduler)
        sources = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        options = {
            "num_inference_steps": 4,
            "guidance_rescale": 0.4,
            "eta": 0.5 if scheduler == "ddim" else 0,
        }
        images.append(pipeline(["a cat", "a dog"], generator=sources, output_type="np", **options).images)
    assert images[0].shape == (2, 16, 16, 3) and images[0].std() > 0.05
    assert np.abs(images[0] - images[1]).max() < 1e-4
    for options, message in (
        ({"timesteps": [5], "sigmas": [1.0]}, "only one of"),
        ({"sigmas": [1.0]}, "DDIMScheduler.set_timesteps takes no sigmas"),
    ):
        with pytest.raises(ValueError, match=message):
            own_loops.retrieve_timesteps(difusores.DDIMScheduler(), **options)
    with pytest.raises(ValueError, match=r"12 and 16; both have to be divisible by 8"):
        pipeline.check_inputs("a cat", 12, 16)
