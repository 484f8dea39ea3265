"""The programs of examples/ on small folders: with this package and, by their import line, diffusers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import difusores
from difusores.training import data
from difusores.training.fetch import MNIST_FILE

EXAMPLES = Path(__file__).parents[1] / "examples"
DROP_IN = Path(__file__).parent / "fixtures" / "drop_in.py"


def run(source: Path, library: str, folder: Path, out: Path) -> dict[str, Any]:
    """What a program writes: pictures in [0, 1], and facts.

    Under this package it runs as a user runs it; the other is imported by this process anyway.
    """
    text = source.read_text(encoding="utf-8")
    assert len(re.findall(r"^from difusores import", text, re.MULTILINE)) == 1
    out.mkdir()
    program = out / source.name
    program.write_text(re.sub(r"^from difusores\b", f"from {library}", text, flags=re.MULTILINE), "utf-8")
    arguments = [str(program), str(folder), str(out)]
    if library == "difusores":
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # the models are too small for two
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    else:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(sys, "argv", arguments)
            runpy.run_path(str(program), run_name="__main__")
    found: dict[str, Any] = {path.stem: np.asarray(Image.open(path)) / 255.0 for path in out.glob("*.png")}
    return found | {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.fixture
def ddpm(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    unet = difusores.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    )
    difusores.DDPMPipeline(unet=unet, scheduler=difusores.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    return tmp_path / "ddpm"


def marks_everything(transformers: Any) -> Any:
    """A safety checker whose thresholds every image is above."""
    from difusores.pipelines.safety_checker import StableDiffusionSafetyChecker

    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=vision, projection_dim=4))
    torch.nn.init.constant_(checker.concept_embeds_weights, -2.0)
    return checker.eval()


@pytest.fixture
def stable_diffusion(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path / "tokenizer_files"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    text_config = transformers.CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": transformers.CLIPTextModel(text_config).eval(),
        "unet": difusores.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        ).eval(),
        "vae": difusores.AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            sample_size=64,
        ).eval(),
        "scheduler": difusores.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        "safety_checker": marks_everything(transformers),
        "feature_extractor": transformers.CLIPImageProcessor(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        ),
    }
    pipeline = difusores.StableDiffusionPipeline(**parts)
    pipeline.save_pretrained(tmp_path / "stable_diffusion")
    return tmp_path / "stable_diffusion"


def test_unconditional(ddpm: Path, tmp_path: Path) -> None:
    ours = run(EXAMPLES / "unconditional.py", "difusores", ddpm, tmp_path / "ours")
    assert ours.keys() == {"by_hand", "by_pipeline"}
    assert all(picture.shape == (16, 16, 3) and picture.std() > 0.05 for picture in ours.values())
    assert np.array_equal(ours["by_hand"], ours["by_pipeline"])
    pytest.importorskip("diffusers")
    for name, theirs in run(EXAMPLES / "unconditional.py", "diffusers", ddpm, tmp_path / "theirs").items():
        assert abs(ours[name] - theirs).max() <= 1.5 / 255, name


@pytest.mark.slow
def test_stable_diffusion(stable_diffusion: Path, tmp_path: Path) -> None:
    ours = run(EXAMPLES / "stable_diffusion.py", "difusores", stable_diffusion, tmp_path / "ours")
    assert ours.keys() == {"by_hand", "by_pipeline", "unchecked", "other_decoder"}
    assert not ours.pop("by_pipeline").any()  # the folder's safety checker marks everything
    assert all(picture.shape == (64, 64, 3) and picture.std() > 0.01 for picture in ours.values())
    grey = ours["other_decoder"]
    assert np.ptp(grey, axis=2).max() == 0
    assert abs(grey.mean() - ours["unchecked"].mean()) < 0.05
    pytest.importorskip("diffusers")
    theirs = run(EXAMPLES / "stable_diffusion.py", "diffusers", stable_diffusion, tmp_path / "theirs")
    assert not theirs.pop("by_pipeline").any()
    for name, picture in theirs.items():
        assert abs(ours[name] - picture).max() <= 1.5 / 255, name


def test_lines_of_scripts_for_diffusers(stable_diffusion: Path, tmp_path: Path) -> None:
    """The same file with both imports: pictures, and what callbacks and parts tell."""
    ours = run(DROP_IN, "difusores", stable_diffusion, tmp_path / "ours")
    pytest.importorskip("diffusers")
    theirs = run(DROP_IN, "diffusers", stable_diffusion, tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and len(ours) > 10
    assert ours.pop("facts") == theirs.pop("facts")
    for name, picture in theirs.items():
        assert ours[name].shape == picture.shape and picture.std() > 0.01, name
        assert abs(ours[name] - picture).max() <= 1.5 / 255, name


@pytest.mark.parametrize("kind", ["binomial", "gaussian"])
def test_deep_unsupervised(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter chains and a smaller network, on squares for digits: the bound falls while it is trained."""
    spec = importlib.util.spec_from_file_location("deep_unsupervised", EXAMPLES / "deep_unsupervised.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    small = {"CHAIN": {"binomial": 5, "gaussian": 8}, "CHANNELS": (8, 8, 8), "TERMS": 2, "SAMPLES": 12}
    for name, value in {**small, "BATCH": 4, "WARM_UP": 1, "LEARNING_RATE": 0.01}.items():
        monkeypatch.setattr(program, name, value)
    monkeypatch.setattr(data, "MNIST_SPLIT", {"generator": 90, "judge": 0, "test": 10})
    images = np.zeros((100, 28, 28), dtype=np.uint8)
    for i, image in enumerate(images):
        image[i % 9 : i % 9 + 12, i % 7 : i % 7 + 12] = 200
    (tmp_path / "difusores").mkdir()
    np.savez(tmp_path / "difusores" / MNIST_FILE, images=images, labels=np.zeros(100, dtype=np.uint8))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    figures = []
    for steps in (1, 12, 12) if kind == "binomial" else (1, 12):
        arguments = [kind, "--steps", str(steps), "--held-out", "4", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["deep_unsupervised.py", *arguments])
        program.main()
        figures.append(json.loads((tmp_path / f"{kind}.json").read_text()))
    first, last = figures[:2]
    bits = [each["bits_per_dimension"] for each in figures]
    assert np.isfinite(bits).all() and 0 < bits[1] < 0.9 * bits[0], bits
    assert figures[-1] == last, "the steps and the seed say all"
    assert (first["training_steps"], last["training_steps"], last["held_out"]) == (1, 12, 4)
    picture = np.asarray(Image.open(tmp_path / f"{kind}.png"))
    assert picture.shape == (28, 12 * 28) and picture.dtype == np.uint8 and picture.std() > 1


@pytest.mark.parametrize("name", ["unconditional", "stable_diffusion", "deep_unsupervised"])
def test_the_text_is_in_both_languages(name: str) -> None:
    """Every numbered step has an English and a Spanish sentence."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    steps = re.split(r"^# \d+\. ", source, flags=re.MULTILINE)[1:]
    assert len(steps) >= 4
    spanish = re.compile(r"\b(el|la|los|las|una?|en|de|del|con|sin|cada|otro|lo)\b", re.IGNORECASE)
    for step in steps:
        comment = step.split("\n\n")[0].split("\n")
        words = " ".join(line for i, line in enumerate(comment) if i == 0 or line.startswith("#"))
        assert spanish.search(words) and re.search(r"\b(the|to|in|one|another)\b", words, re.I), words
