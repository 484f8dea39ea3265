"""`python -m difusores generate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from difusores import (
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from difusores.__main__ import main
from difusores.pipelines import cli

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8,),
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    DDPMPipeline(UNet2DModel(**CONFIG, num_class_embeds=4), DDPMScheduler()).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


def generate(folder: Path, *options: object, name: str = "out.png") -> np.ndarray:
    out = folder.parent / name
    argv = ["generate", "--model", str(folder), "--steps", "3", "--out", str(out), *map(str, options)]
    assert main(argv) == 0
    with Image.open(out) as picture:
        return np.asarray(picture)


def tiles(grid: np.ndarray, side: int = 8) -> list[np.ndarray]:
    rows = (grid[i : i + side] for i in range(0, grid.shape[0], side))
    return [row[:, j : j + side] for row in rows for j in range(0, grid.shape[1], side)]


def test_grid_of_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = generate(folder, "--num", 5, "--label", 2)
    assert grid.shape == (16, 24) and grid.dtype == np.uint8
    images = tiles(grid)
    assert not images[5].any() and all(image.std() > 5 for image in images[:5])
    assert "5 images in" in capsys.readouterr().out


def test_an_image_depends_on_its_seed_and_label_alone(folder: Path) -> None:
    images = tiles(generate(folder, "--num", 4, "--seed", 10, "--label", 2, 0))
    (alone,) = tiles(generate(folder, "--num", 1, "--seed", 13, "--label", 0))
    assert np.abs(images[3].astype(int) - alone).max() <= 1
    (other,) = tiles(generate(folder, "--num", 1, "--seed", 13, "--label", 2))
    assert np.abs(other.astype(int) - alone).max() > 1


def test_without_a_label_all_classes_take_turns(folder: Path) -> None:
    assert np.array_equal(generate(folder, "--num", 4), generate(folder, "--num", 4, "--label", 0, 1, 2))


@pytest.mark.parametrize(
    "options",
    [
        ("--scheduler", "ddpm"),
        ("--eta", "0.9"),
        ("--guidance", "1"),
        ("--steps", "4"),
        ("--seed", "2"),
        ("--dtype", "bfloat16"),
    ],
    ids=str,
)
def test_options_change_the_picture(folder: Path, options: tuple[str, str]) -> None:
    assert not np.array_equal(generate(folder, "--num", 1), generate(folder, "--num", 1, *options))


def test_backends_agree(folder: Path) -> None:
    default, reference = (
        generate(folder, "--num", 2, *options) for options in ((), ("--backend", "reference"))
    )
    assert np.abs(default.astype(int) - reference).max() <= 1


def test_json(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    generate(folder, "--num", 2, "--label", 1, "--json", "--backend", "reference")
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert report["num"] == 2 and report["label"] == [1] and report["backend"] == "reference"
    assert report["images_per_second"] == pytest.approx(2 / report["seconds"])
    assert set(report["versions"]) == {"difusores", "torch"}
    assert "it/s" not in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num", "0"), "--num is 0"),
        (("--steps", "0"), "--steps is 0"),
        (("--steps", "2000"), "2000"),
        (("--label", "3"), "--label is 3; the classes of"),
        (("--eta", "2"), "--eta is 2.0"),
        (("--eta", "1", "--scheduler", "ddpm"), "--eta"),
        (("--out", "picture.jpg"), "picture.jpg"),
        (("--model", "bundled:nothing"), "bundled model 'nothing'"),
        (("--backend", "abacus"), "abacus"),
        (("--device", "toaster"), "toaster"),
        (("--device", "meta"), "--device meta is not available"),
        (("--guidance", "nan"), "--guidance is nan"),
        (("--guidance", "inf"), "--guidance is inf"),
        (("--seed", "-1"), "--seed is -1; it has to be from 0 to 9223372036854775807"),
        (("--seed", str(2**63)), "--seed is 9223372036854775808"),
    ],
    ids=str,
)
def test_mistakes_are_named(
    folder: Path, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    assert main(["generate", "--model", str(folder), "--out", str(out), "--json", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("option", ["label", "guidance"])
def test_a_model_without_classes_takes_no(
    option: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DDPMPipeline(UNet2DModel(**CONFIG), DDPMScheduler()).save_pretrained(folder)
    assert main(["generate", "--model", str(folder), f"--{option}", "1", "--out", "x.png"]) == 2
    assert f"--{option} is given, and" in capsys.readouterr().err
    generate(folder, "--num", 1, "--json")
    assert json.loads(capsys.readouterr().out)["guidance"] is None


def test_what_cannot_be_written_is_said_before_sampling(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_sample", lambda *_: pytest.fail("sampled"))
    taken = folder.parent / "taken.png"
    taken.mkdir()
    for out, words in ((taken, "is a folder"), (folder / "model_index.json" / "x.png", "model_index.json")):
        assert main(["generate", "--model", str(folder), "--out", str(out)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["abacus", "triton"])
def test_a_backend_of_the_environment_is_checked_before_sampling(name: str, folder: Path) -> None:
    program = (
        "import sys; from difusores.pipelines import cli; cli._sample = None; "
        f"from difusores.__main__ import main; sys.exit(main(['generate', '--model', {str(folder)!r}]))"
    )
    environment = {**os.environ, "DIFUSORES_BACKEND": name}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and name in done.stderr and done.stderr.count("\n") == 1


def test_damaged_weights_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10\0\0")
    assert main(["generate", "--model", str(folder), "--out", str(folder.parent / "x.png")]) == 2
    error = capsys.readouterr().err
    assert f"the weights in '{folder}' are damaged" in error and error.count("\n") == 1


def test_failed_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    assert (
        main(["generate", "--model", str(folder), "--steps", "1", "--out", str(folder.parent / "x.png")]) == 2
    )
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


class TestTexts:
    @pytest.fixture
    def told(self, parts: dict[str, Any], tmp_path: Path) -> Path:
        StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "told")
        return tmp_path / "told"

    def test_two_text_encoders(
        self, xl_parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "told"
        StableDiffusionXLPipeline(**xl_parts).save_pretrained(folder)
        images = tiles(generate(folder, "--num", 2, "--prompt", "a cat", "a dog", "--json"), 16)
        assert json.loads(capsys.readouterr().out)["guidance"] == 5.0
        (alone,) = tiles(generate(folder, "--num", 1, "--seed", 1, "--prompt", "a dog"), 16)
        assert np.abs(images[1].astype(int) - alone).max() <= 1
        (other,) = tiles(generate(folder, "--num", 1, "--seed", 1, "--prompt", "a cat"), 16)
        assert np.abs(other.astype(int) - alone).max() > 1
        half = ("--dtype", "float16", "--negative-prompt", "x", "--height", 24, "--width", 16)
        assert generate(folder, "--num", 1, "--prompt", "a", *half).shape == (24, 16, 3)

    def test_prompts_take_turns(self, told: Path) -> None:
        images = tiles(generate(told, "--num", 6, "--prompt", "a cat", "a dog"), 16)
        (alone,) = tiles(generate(told, "--num", 1, "--seed", 5, "--prompt", "a dog"), 16)
        assert np.abs(images[5].astype(int) - alone).max() <= 1
        (other,) = tiles(generate(told, "--num", 1, "--seed", 5, "--prompt", "a cat"), 16)
        assert np.abs(other.astype(int) - alone).max() > 1

    @pytest.mark.parametrize(
        "options",
        [("--negative-prompt", "x"), ("--guidance", "1"), ("--scheduler", "euler"), ("--eta", "0.7")],
    )
    def test_options_are_felt(self, told: Path, options: tuple[str, ...]) -> None:
        given = ("--num", 1, "--prompt", "a cat")
        assert not np.array_equal(generate(told, *given), generate(told, *given, *options))

    def test_size(self, told: Path) -> None:
        assert generate(told, "--num", 1, "--prompt", "a", "--height", 24, "--width", 8).shape == (24, 8, 3)

    def test_what_does_not_fit_is_named(
        self, told: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for model, options, message in (
            (told, (), "is told a text: --prompt is needed"),
            (told, ("--prompt", "a", "--label", "1"), "--label is given, and"),
            (folder, ("--prompt", "a"), "--prompt is given, and"),
            (folder, ("--negative-prompt", "a"), "--negative-prompt is given, and"),
        ):
            assert main(["generate", "--model", str(model), "--out", str(told / "x.png"), *options]) != 0
            assert message in capsys.readouterr().err
