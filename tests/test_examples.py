"""The programs of examples/ on small folders: with this package and, by their import line, diffusers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import difusores

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, library: str, folder: Path, out: Path) -> dict[str, np.ndarray]:
    """The pictures that a program writes, run as a user runs it, in [0, 1]."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(re.findall(r"^from difusores import", source, re.MULTILINE)) == 1
    out.mkdir()
    program = out / f"{name}.py"
    program.write_text(source.replace("from difusores import", f"from {library} import"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(folder), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the models are too small for two
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {path.stem: np.asarray(Image.open(path)) / 255.0 for path in out.glob("*.png")}


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
        "safety_checker": None,
        "feature_extractor": None,
    }
    pipeline = difusores.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "stable_diffusion")
    return tmp_path / "stable_diffusion"


def test_unconditional(ddpm: Path, tmp_path: Path) -> None:
    ours = run("unconditional", "difusores", ddpm, tmp_path / "ours")
    assert ours.keys() == {"by_hand", "by_pipeline"}
    assert all(picture.shape == (16, 16, 3) and picture.std() > 0.05 for picture in ours.values())
    pytest.importorskip("diffusers")
    for name, theirs in run("unconditional", "diffusers", ddpm, tmp_path / "theirs").items():
        assert abs(ours[name] - theirs).max() <= 1.5 / 255, name


def test_stable_diffusion(stable_diffusion: Path, tmp_path: Path) -> None:
    ours = run("stable_diffusion", "difusores", stable_diffusion, tmp_path / "ours")
    assert ours.keys() == {"by_hand", "by_pipeline", "other_decoder"}
    assert all(picture.shape == (64, 64, 3) and picture.std() > 0.01 for picture in ours.values())
    grey = ours["other_decoder"]
    assert np.ptp(grey, axis=2).max() == 0 and abs(grey.mean() - ours["by_pipeline"].mean()) < 0.02
    pytest.importorskip("diffusers")
    for name, theirs in run("stable_diffusion", "diffusers", stable_diffusion, tmp_path / "theirs").items():
        assert abs(ours[name] - theirs).max() <= 1.5 / 255, name


@pytest.mark.parametrize("name", ["unconditional", "stable_diffusion"])
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
