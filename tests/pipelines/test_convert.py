"""`python -m difusores convert`: original checkpoints and the height-map model become folders."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from difusores import ADMClassifier, ADMPipeline, ADMUNet, DDIMScheduler, DDPMScheduler, DiffusionPipeline
from difusores.__main__ import main
from difusores.pipelines.terrain import MEMBER
from difusores.plan import Plan
from difusores.solvers import consistency
from difusores.training.fetch import TERRAIN_FILE, cache_dir

SMALL: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "8",
    "learn_sigma": True,
}
CLASSIFIER: dict[str, Any] = {
    "image_size": 8,
    "classifier_width": 32,
    "classifier_depth": 1,
    "channel_mult": "1",
    "classifier_attention_resolutions": "8",
    "num_head_channels": 32,
    "num_classes": 3,
}


def written(folder: Path, model: Any, config: dict[str, Any]) -> tuple[str, str]:
    """The paths of a .pt file and of its configuration."""
    paths = folder / f"{type(model).__name__}.pt", folder / f"{type(model).__name__}.json"
    torch.save(model.state_dict(), paths[0])
    paths[1].write_text(json.dumps(config))
    return str(paths[0]), str(paths[1])


def converted(folder: Path, *more: str, **options: Any) -> int:
    config = {**SMALL, **options}
    known = {name: config[name] for name in SMALL}
    file, path = written(folder, ADMUNet(**known), config)
    return main(["convert", "adm", file, str(folder / "out"), "--config", path, *more])


def test_adm_with_its_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = ADMClassifier(**CLASSIFIER)
    file, path = written(tmp_path, classifier, {**CLASSIFIER, "classifier_use_fp16": True})
    options = {
        "noise_schedule": "cosine",
        "timestep_respacing": "250",
        "use_fp16": True,
        "use_checkpoint": False,
    }
    assert converted(tmp_path, "--classifier", file, "--classifier-config", path, **options) == 0
    output = capsys.readouterr().out
    assert "left out use_checkpoint, use_fp16" in output and "parameters in an ADMUNet" in output
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline, ADMPipeline) and isinstance(pipeline.scheduler, DDPMScheduler)
    original = torch.load(tmp_path / "ADMUNet.pt", weights_only=True)
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    for name, tensor in pipeline.classifier.state_dict().items():
        assert torch.equal(tensor, classifier.state_dict()[name]), name
    config = pipeline.scheduler.config
    assert config["beta_schedule"] == "squaredcos_cap_v2" and config["timestep_spacing"] == "linspace"
    assert config["variance_type"] == "learned_range" and config["prediction_type"] == "epsilon"


def test_adm_for_ddim(tmp_path: Path) -> None:
    """The betas of 1000 steps are stretched over 500: 0.0002 to 0.04."""
    options = {"timestep_respacing": "ddim25", "predict_xstart": True, "diffusion_steps": 500}
    assert converted(tmp_path, **options) == 0
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "out").scheduler
    assert isinstance(scheduler, DDIMScheduler) and len(scheduler) == 500
    assert scheduler.config["prediction_type"] == "sample"
    torch.testing.assert_close(scheduler.betas[[0, -1]], torch.tensor([0.0002, 0.04]))


def test_all_that_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, path = written(tmp_path, ADMUNet(**SMALL), SMALL)
    tensors = torch.load(file, weights_only=True)
    del tensors["time_embed.2.bias"], tensors["out.0.weight"]
    tensors |= {"label_emb.weight": torch.zeros(10, 128), "out.2.bias": torch.zeros(3)}
    torch.save(tensors, file)
    assert main(["convert", "adm", file, str(tmp_path / "out"), "--config", path]) == 2
    error = capsys.readouterr().err
    for words in (
        "missing time_embed.2.bias",
        "missing out.0.weight",
        "unexpected label_emb.weight",
        "out.2.bias has shape [3], and [6] is needed",
    ):
        assert words in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_chanels": 32}, "num_chanels: no options of ADMUNet; allowed are image_size, num_channels"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule is 'sigmoid'; allowed are linear, cosine"),
        ({"timestep_respacing": "10,20"}, "timestep_respacing is '10,20'; allowed are"),
        ({"rescale_timesteps": True, "diffusion_steps": 500}, "rescale_timesteps is not supported"),
        ({"large_size": 8}, "large_size and image_size are one option"),
    ],
)
def test_bad_options_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], words: str
) -> None:
    assert converted(tmp_path, **options) == 2
    assert words in capsys.readouterr().err


def test_bad_files_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, path = written(tmp_path, ADMUNet(**SMALL), SMALL)
    (tmp_path / "list.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "damaged.pt").write_bytes(Path(file).read_bytes()[:1000])
    torch.save({"model": ADMUNet(**SMALL)}, tmp_path / "pickle.pt")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "no.json").write_text("{")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("other.txt", "")
    (tmp_path / "no.onnx").write_bytes(b"\xff" * 100)
    out = str(tmp_path / "out")
    cases = [
        (["adm", str(tmp_path / "list.pt"), out, "--config", path], "a dictionary of tensors"),
        (["adm", str(tmp_path / "damaged.pt"), out, "--config", path], "is no file of tensors alone"),
        (["adm", str(tmp_path / "pickle.pt"), out, "--config", path], "is no file of tensors alone"),
        (["adm", str(tmp_path / "nothing.pt"), out, "--config", path], "nothing.pt"),
        (["adm", file, out, "--config", str(tmp_path / "list.json")], "holds a list"),
        (["adm", file, out, "--config", str(tmp_path / "no.json")], "is no JSON"),
        (["adm", file, out, "--config", path, "--classifier", file], "belong together"),
        (["terrain", str(tmp_path / "other.whl"), out], f"holds no {MEMBER}"),
        (["terrain", str(tmp_path / "no.onnx"), out], "is no .onnx file"),
    ]
    for arguments, words in cases:
        assert main(["convert", *arguments]) == 2
        assert words in capsys.readouterr().err, arguments
    assert not Path(out).exists()


@pytest.fixture(scope="module")
def wheel() -> Path:
    path = cache_dir() / TERRAIN_FILE
    if not path.exists():
        pytest.skip(f"the terrain weights are not in {path.parent}: `make fetch-terrain` brings them")
    return path


@pytest.mark.slow
def test_terrain_against_onnx_runtime(wheel: Path, tmp_path: Path) -> None:
    """Five difficulties at four noise levels: weights that this project did not train, to 1e-5."""
    import onnxruntime

    out = tmp_path / "terrain"
    assert main(["convert", "terrain", str(wheel), str(out)]) == 0
    assert {"LICENSE", "CONSISTENCY_MODELS_LICENSE.txt"} <= {path.name for path in out.iterdir()}
    pipeline = DiffusionPipeline.from_pretrained(out)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    assert unet.num_parameters() == 10_456_545
    options = onnxruntime.SessionOptions()
    # its threads would go on spinning while ours compute
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with zipfile.ZipFile(wheel) as opened:
        content = opened.read(MEMBER)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.tensor([0.0, 0.1, 0.35, 0.7, 1.0])
    config = scheduler.config
    limits = {name: config[name] for name in ("sigma_min", "sigma_max", "sigma_data")}
    for sigma in (80.0, 5.0, 0.5, 0.05):
        slope = torch.linspace(-0.8, 0.6, 128)[:, None].expand(5, 1, 128, 128)
        noisy = slope + sigma * torch.randn(5, 1, 128, 128, generator=generator)
        levels = np.full(5, sigma, np.float32)
        inputs = {"noisy": noisy.numpy(), "sigma": levels, "difficulty": difficulty.numpy()}
        expected = torch.from_numpy(session.run(None, inputs)[0])
        stages = consistency([float(scheduler.sigma_to_t(sigma))], [sigma, 0.002], **limits)
        plan = Plan("one step", tuple(stages), "consistency", (), continuous=True, init_noise_sigma=sigma)
        denoised = plan.run(lambda x, t: unet(x, t, class_labels=difficulty), noisy)
        assert (denoised - expected).abs().max() <= 1e-5 * expected.abs().max()
        if sigma == 80.0:
            step = expected
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    images = pipeline(class_labels=difficulty[[4]], num_inference_steps=1, output_type="latent").images
    torch.manual_seed(0)
    noise = 80 * torch.randn(1, 1, 128, 128)
    inputs = {"noisy": noise.numpy(), "sigma": levels[:1] * 0 + 80, "difficulty": difficulty[[4]].numpy()}
    expected = torch.from_numpy(session.run(None, inputs)[0])
    assert (images - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (images - step[[4]]).abs().max() > 0.1
