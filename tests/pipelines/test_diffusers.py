"""Our pipelines against diffusers', from the same folders; and the loop that users write, word for word."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import difusores

diffusers = pytest.importorskip("diffusers")
fill = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "make.py"))["fill"]

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
SCHEDULERS: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_large"},
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    {"prediction_type": "sample", "clip_sample": False},
    {"thresholding": True, "sample_max_value": 1.5},
]


def images(pipeline: Any, **options: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(generator=torch.Generator().manual_seed(3), output_type="np", **options).images


@pytest.fixture(params=SCHEDULERS, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    unet = fill(diffusers.UNet2DModel(**CONFIG))
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**request.param)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DDPMPipeline", {}),
        ("DDIMPipeline", {}),
        ("DDIMPipeline", {"eta": 0.7}),
        ("DDIMPipeline", {"eta": 1.0, "use_clipped_model_output": True}),
    ],
    ids=str,
)
def test_same_seed_same_images(folder: Path, tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    options = {"batch_size": 3, "num_inference_steps": 7, **options}
    theirs = getattr(diffusers, kind).from_pretrained(folder)
    ours = getattr(difusores, kind).from_pretrained(folder)
    expected = images(theirs, **options)
    assert expected.std() > 0.05
    assert np.abs(images(ours, **options) - expected).max() < 2e-3
    ours.save_pretrained(tmp_path / "ours")
    back = getattr(diffusers, kind).from_pretrained(tmp_path / "ours")
    assert np.array_equal(images(back, **options), expected)


def test_a_generator_for_each_image(folder: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    result = []
    for library in (diffusers, difusores):
        pipeline = library.DDPMPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(i) for i in (5, 6)]
        result.append(pipeline(generator=generators, **options).images)
    assert np.abs(result[0] - result[1]).max() < 2e-3


LOOP = """
from {library} import DDPMScheduler, UNet2DModel
import torch

model = UNet2DModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
scheduler.set_timesteps(6)

torch.manual_seed(4)
noise = torch.randn((1, model.config.in_channels, model.config.sample_size, model.config.sample_size))
input = noise

for t in scheduler.timesteps:
    with torch.no_grad():
        noisy_residual = model(input, t).sample
    prev_noisy_sample = scheduler.step(noisy_residual, t, input).prev_sample
    input = prev_noisy_sample
"""


def test_the_loop_that_users_write(folder: Path) -> None:
    result = []
    for library in ("diffusers", "difusores"):
        scope: dict[str, Any] = {"folder": str(folder)}
        exec(LOOP.format(library=library), scope)
        result.append(scope["input"])
    assert (result[0] - result[1]).abs().max() < 4e-3 and result[0].std() > 0.05


def test_our_parts_in_their_pipeline(folder: Path) -> None:
    expected = images(diffusers.DDPMPipeline.from_pretrained(folder), num_inference_steps=5)
    unet = difusores.UNet2DModel.from_pretrained(folder, subfolder="unet")
    scheduler = difusores.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    mixed = diffusers.DDPMPipeline(unet, scheduler)
    assert np.abs(images(mixed, num_inference_steps=5) - expected).max() < 2e-3
    # and loaded by it, where the folder names this package
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"diffusers"', '"difusores"'))
    for library in (diffusers, difusores):
        loaded = library.DDPMPipeline.from_pretrained(folder)
        assert type(loaded.unet) is difusores.UNet2DModel
        assert type(loaded.scheduler) is difusores.DDPMScheduler
        assert np.abs(images(loaded, num_inference_steps=5) - expected).max() < 2e-3


def test_their_model_in_our_pipeline(folder: Path) -> None:
    theirs = diffusers.DDIMPipeline.from_pretrained(folder)
    ours = difusores.DDIMPipeline(theirs.unet, theirs.scheduler)
    options = {"num_inference_steps": 5}
    assert np.abs(images(ours, **options) - images(theirs, **options)).max() < 2e-3


@pytest.mark.parametrize(
    ("kind", "scheduler", "options"),
    [
        ("DDPMPipeline", "DDPMScheduler", {}),
        ("DDPMPipeline", "DDIMScheduler", {}),
        ("DDPMPipeline", "DPMSolverMultistepScheduler", {}),
        ("DDIMPipeline", "DDIMScheduler", {"eta": 0.7, "use_clipped_model_output": True}),
    ],
    ids=str,
)
def test_their_scheduler_in_our_pipeline(
    folder: Path, kind: str, scheduler: str, options: dict[str, Any]
) -> None:
    result = []
    for library in (diffusers, difusores):
        pipeline = getattr(library, kind).from_pretrained(folder)
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
        result.append(images(pipeline, batch_size=2, num_inference_steps=5, **options))
    assert np.abs(result[0] - result[1]).max() < 2e-3


def test_their_scheduler_is_checked_against_the_folders(folder: Path) -> None:
    pipeline = difusores.DDPMPipeline.from_pretrained(folder)
    config = dict(pipeline.scheduler.config)
    wrong = {"epsilon": "sample"}.get(config["prediction_type"], "epsilon")
    pipeline.scheduler = diffusers.DDPMScheduler.from_config({**config, "prediction_type": wrong})
    with pytest.raises(ValueError, match=rf"'{wrong}'.*'{config['prediction_type']}'"):
        images(pipeline, num_inference_steps=5)
    pipeline.scheduler = diffusers.DDPMScheduler.from_config({**config, "beta_schedule": "scaled_linear"})
    with pytest.warns(UserWarning, match="betas from"):
        images(pipeline, num_inference_steps=5)


def test_same_signature() -> None:
    import inspect

    for kind in ("DDPMPipeline", "DDIMPipeline"):
        theirs = inspect.signature(getattr(diffusers, kind).__call__).parameters.values()
        ours = list(inspect.signature(getattr(difusores, kind).__call__).parameters.values())
        assert [(p.name, p.default) for p in theirs] == [(p.name, p.default) for p in ours[: len(theirs)]]
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
