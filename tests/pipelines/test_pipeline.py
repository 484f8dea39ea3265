"""What all pipelines share: components, folders, the check of the scheduler against the model's own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import difusores
from difusores import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
    files,
)
from difusores.pipelines.fit import needs

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(kind: Any, scheduler: Any = None) -> Any:
    torch.manual_seed(1)
    return quiet(kind(UNet2DModel(**CONFIG).eval(), scheduler or DDPMScheduler()))


def sample(pipeline: Any, **options: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline(2, generator, num_inference_steps=4, output_type="np", **options).images


def test_components_and_swapping() -> None:
    pipeline = build(DDPMPipeline)
    assert list(pipeline.components) == ["unet", "scheduler"]
    assert pipeline.components["unet"] is pipeline.unet
    other = DDIMPipeline(**pipeline.components)
    assert other.unet is pipeline.unet and isinstance(other.scheduler, DDIMScheduler)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert pipeline.config["scheduler"] == ("diffusers", "DDIMScheduler")
    assert np.array_equal(sample(pipeline), sample(quiet(other)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(DDPMPipeline, DDPMScheduler(beta_end=0.03)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_round_trip(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    expected = sample(build(DDPMPipeline, DDPMScheduler(beta_end=0.03)))
    for kind in (DDPMPipeline, DiffusionPipeline):
        loaded = quiet(kind.from_pretrained(folder))
        assert type(loaded) is DDPMPipeline
        assert np.array_equal(sample(loaded), expected)
    assert DDIMPipeline.from_pretrained(folder).scheduler.config.beta_end == 0.03
    assert DDIMPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).dtype is torch.bfloat16


def test_dtypes(folder: Path) -> None:
    def load(**options: Any) -> torch.dtype:
        return DDPMPipeline.from_pretrained(folder, **options).dtype

    half = torch.float16
    for name in ("dtype", "torch_dtype"):
        assert load(**{name: half}) is half
        assert load(**{name: {"unet": half}}) is load(**{name: {"default": half}}) is half
        assert load(**{name: {"unet": half, "default": torch.float64}}) is half
        assert load(**{name: {}}) is torch.float32
        for wrong in ("float16", {"unet": "float16"}):
            with pytest.raises(TypeError, match=r"'float16'.*torch\.float16"):
                load(**{name: wrong})
    assert load(dtype=half, torch_dtype=half) is half
    with pytest.raises(ValueError, match=r"dtype is .*, and torch_dtype is"):
        load(dtype=half, torch_dtype=torch.float32)


def test_arguments_of_diffusers_that_ask_for_nothing(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        pipeline = DDPMPipeline.from_pretrained(folder, device_map=None, custom_pipeline=None, use_onnx=False)
        pipeline = DDPMPipeline.from_pipe(pipeline, safety_checker=None)
    assert "has no use_onnx, which is False" in caplog.text and "has no safety_checker" in caplog.text
    with pytest.raises(TypeError, match="and no safety_checker"):
        DDPMPipeline.from_pretrained(folder, safety_checker=1)
    assert DDPMPipeline.from_pretrained(folder, device_map="meta").device.type == "meta"
    for name, value in (("device_map", "some"), ("custom_pipeline", "some/thing")):
        with pytest.raises(NotImplementedError, match=f"{name} is '{value}'"):
            DDPMPipeline.from_pretrained(folder, **{name: value})
    assert pipeline.to(torch.float64, silence_dtype_warnings=True).dtype is torch.float64
    for size in (None, "1GB", 100_000):
        pipeline.save_pretrained(tmp_path / "again", max_shard_size=size)
        again = DDPMPipeline.from_pretrained(tmp_path / "again").unet.state_dict()
        assert all(torch.equal(again[name].double(), t) for name, t in pipeline.unet.state_dict().items())


def test_own_package_name_in_the_index(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"diffusers"', '"difusores"'))
    assert isinstance(DDPMPipeline.from_pretrained(folder).unet, UNet2DModel)


def test_oldest_layout_has_all_files_in_the_root(folder: Path) -> None:
    expected = sample(quiet(DDPMPipeline.from_pretrained(folder)))
    for name in ("unet", "scheduler"):
        for path in (folder / name).iterdir():
            path.rename(folder / path.name)
        (folder / name).rmdir()
    assert np.array_equal(sample(quiet(DDPMPipeline.from_pretrained(folder))), expected)


def test_bundled_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ASSETS", str(folder.parent))
    assert isinstance(DiffusionPipeline.from_pretrained("bundled:saved"), DDPMPipeline)
    assert isinstance(UNet2DModel.from_pretrained("bundled:saved", subfolder="unet"), UNet2DModel)
    assert DDIMScheduler.from_pretrained("bundled:saved", subfolder="scheduler").config.beta_end == 0.03
    with pytest.raises(OSError, match="'nothing'; there are: saved"):
        DDPMPipeline.from_pretrained("bundled:nothing")


@pytest.mark.parametrize("flat", [False, True])
def test_hub_id(folder: Path, flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    expected = sample(quiet(DDPMPipeline.from_pretrained(folder)))

    def download(repo: str, filename: str, subfolder: str | None, **options: Any) -> str:
        assert (repo, options["revision"]) == ("someone/something", "v2")
        folders = [folder, folder / "unet", folder / "scheduler"] if flat else [folder / (subfolder or "")]
        found = [place / filename for place in folders if (place / filename).is_file()]
        if not found or (flat and subfolder):
            raise huggingface_hub.errors.EntryNotFoundError(filename)
        return str(found[0])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = DDPMPipeline.from_pretrained("someone/something", revision="v2")
    assert np.array_equal(sample(quiet(loaded)), expected)


def test_passed_components_replace_the_folders(folder: Path) -> None:
    scheduler = DDIMScheduler()
    loaded = DDPMPipeline.from_pretrained(folder, scheduler=scheduler)
    assert loaded.scheduler is scheduler


def test_passed_scheduler_is_checked_against_the_folders_where_that_is_known(folder: Path) -> None:
    scheduler = DDPMScheduler(prediction_type="sample", beta_end=0.03)
    with pytest.raises(ValueError, match=r"'sample'.*'epsilon'"):
        sample(quiet(DDPMPipeline.from_pretrained(folder, scheduler=scheduler)))
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    for entry in ({"scheduler": ["diffusers", "SchedulerOfAnotherVersion"]}, {}):
        index.write_text(json.dumps({"_class_name": "DDPMPipeline", "unet": content["unet"], **entry}))
        sample(quiet(DDPMPipeline.from_pretrained(folder, scheduler=scheduler)))


def test_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(TypeError, match="vae"):
        DDPMPipeline.from_pretrained(folder, vae=7)
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    for entry in (["diffusers", "NoSuchModel"], ["os", "system"]):
        index.write_text(json.dumps({**content, "unet": entry}))
        with pytest.raises(ValueError, match=rf"{entry[0]}\.{entry[1]}"):
            DDPMPipeline.from_pretrained(folder)
    index.write_text(json.dumps({**content, "_class_name": "NoSuchPipeline"}))
    with pytest.raises(ValueError, match="NoSuchPipeline"):
        DiffusionPipeline.from_pretrained(folder)
    del content["unet"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no unet"):
        DDPMPipeline.from_pretrained(folder)


def test_contradiction_with_the_models_folder_is_refused(folder: Path) -> None:
    pipeline = quiet(DDPMPipeline.from_pretrained(folder))
    pipeline.scheduler = DDPMScheduler(prediction_type="v_prediction", beta_end=0.03)
    with pytest.raises(ValueError, match=r"'v_prediction'.*'epsilon'"):
        sample(pipeline)
    sample(pipeline, strict=False)
    pipeline.scheduler = DDPMScheduler(beta_end=0.02)
    with pytest.warns(UserWarning, match="0.02, .*0.03"):
        sample(pipeline)
    # nothing is known of another model
    pipeline.unet = UNet2DModel(**CONFIG)
    sample(pipeline)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_another_kind_of_time_is_refused(name: str) -> None:
    stored = difusores.DDPMPipeline.from_pretrained("bundled:digits")
    scheduler = getattr(difusores, name)()
    pipeline = difusores.DDPMPipeline.from_pretrained("bundled:digits", scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"class_labels": [3], "num_inference_steps": 2, "output_type": "np"}
    with pytest.raises(ValueError, match=r"prediction_type is .*but the model's own folder says 'v_pred"):
        pipeline(**options)
    assert np.isfinite(pipeline(**options, strict=False).images).all()
    assert type(stored.scheduler).__name__ == "DDPMScheduler"


V, FLOW = {"prediction_type": "v_prediction"}, {"prediction_type": "flow_prediction"}
CONTINUOUS = {**V, "timestep_type": "continuous", "use_karras_sigmas": True}
FITS: list[tuple[str, dict[str, Any], str, dict[str, Any], str | None]] = [
    ("DDPM", V, "EulerDiscrete", CONTINUOUS, r"time is log\(sigma\) / 4, .* 1000 training steps"),
    ("DDPM", V, "EulerDiscrete", V, None),
    ("DDPM", {}, "DDIM", V, "'v_prediction', .* 'epsilon'"),
    ("DDPM", {}, "DPMSolverMultistep", {"use_karras_sigmas": True}, None),
    ("DDPM", {}, "DDIM", {"num_train_timesteps": 500}, "500 training steps, .* 1000 training steps"),
    ("DDPM", {}, "IPNDM", {}, r"atan\(sigma\) / pi, .* training steps"),
    ("DDPM", {}, "KarrasVe", {}, "'-epsilon', .* 'epsilon'"),
    ("FlowMatchEulerDiscrete", {}, "EDMEuler", {}, "'epsilon' of EDM, .* 'flow_prediction'"),
    ("FlowMatchEulerDiscrete", {}, "EDMDPMSolverMultistep", V, "'v_prediction', .* 'flow_prediction'"),
    ("FlowMatchEulerDiscrete", {}, "UniPCMultistep", {**FLOW, "use_flow_sigmas": True}, None),
    ("UniPCMultistep", {**FLOW, "use_flow_sigmas": True}, "FlowMatchEulerDiscrete", {}, None),
    (
        "FlowMatchEulerDiscrete",
        {},
        "FlowMatchHeunDiscrete",
        {"num_train_timesteps": 10},
        r"\* 10, .* \* 1000",
    ),
    ("EDMEuler", {}, "EDMEuler", {"sigma_data": 1.0}, "deviation is 1.0, .* 0.5"),
    ("EDMEuler", {}, "EDMDPMSolverMultistep", {}, None),
    ("EulerDiscrete", CONTINUOUS, "EDMEuler", {**V, "sigma_data": 1.0}, None),
    ("EDMEuler", V, "CosineDPMSolverMultistep", {}, r"atan\(sigma\) / pi, .* log\(sigma\) / 4"),
    ("CMStochasticIterative", {}, "EDMEuler", {}, "'epsilon' of EDM, .* preconditioned"),
    ("ScoreSdeVe", {}, "EDMEuler", {}, "'epsilon' of EDM, .* 'score'"),
]


@pytest.mark.parametrize(("trained", "options", "used", "others", "message"), FITS)
def test_a_scheduler_fits_the_model_or_is_refused(
    trained: str, options: dict[str, Any], used: str, others: dict[str, Any], message: str | None
) -> None:
    pipeline = build(DDPMPipeline)
    pipeline._trained_with = getattr(difusores, f"{trained}Scheduler")(**options)
    pipeline.scheduler = getattr(difusores, f"{used}Scheduler")(**others)
    if message is None:
        pipeline.check_training()
    else:
        with pytest.raises(ValueError, match=message):
            pipeline.check_training()


def test_every_scheduler_fits_itself_alone() -> None:
    """Every class is known to the check, and one that it does not know is not judged."""
    for name in [each for each in difusores.schedulers.__all__ if each.endswith("Scheduler")]:
        scheduler = getattr(difusores, name)()
        pipeline = build(DDPMPipeline)
        pipeline._trained_with = pipeline.scheduler = scheduler
        assert needs(scheduler) is not None, name
        pipeline.check_training()
    assert needs(object()) is None


def test_failed_write_leaves_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        build(DDPMPipeline).save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
