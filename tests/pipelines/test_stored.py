"""Stored images of pipelines, diffusers' and ours: what is compared where diffusers is not installed."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import difusores

pytest.importorskip("transformers")

TESTS = Path(__file__).parents[1]
pipelines = runpy.run_path(str(TESTS / "fixtures" / "pipelines.py"))
STORED = {
    name: image
    for place in ("diffusers", "ours")
    for name, image in load_file(TESTS / "fixtures" / place / "images.safetensors").items()
}

WITHOUT_DIFFUSERS = """
import sys
import pytest

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

sys.meta_path.insert(0, Missing())
status = pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]])
sys.exit(int(status) or "diffusers" in sys.modules)
"""


@pytest.mark.filterwarnings("ignore:the autoencoder has a factor of 2")
@pytest.mark.parametrize("name", [*pipelines["CASES"], *pipelines["OURS"]])
def test_stored_images(name: str, tmp_path: Path) -> None:
    found = pipelines["images"](name, difusores, tmp_path)
    assert found.shape == STORED[name].shape and STORED[name].std() > 0.02
    assert (found - STORED[name]).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("text", 2),
        ("instruction", 3),
        ("controlnet", 2),
        ("inpainting_9", 2),
        ("xl_image", 2),
        ("xl_inpainting", 2),
        ("ldm_text", 2),
    ],
)
@pytest.mark.filterwarnings("ignore:the autoencoder has a factor of 2")
def test_separate_guidance(name: str, parts: int, tmp_path: Path) -> None:
    """The UNet is called for each part of guidance by itself; the image is the same."""
    rows: list[int] = []

    def separately(library: Any, folder: Path) -> Any:
        pipeline = pipelines["CASES"][name][0](library, folder)
        pipeline.enable_separate_guidance()
        pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        return pipeline

    found = pipelines["images"](name, difusores, tmp_path, separately)
    steps = 2 if name.startswith("xl") else 4  # of a strength
    assert rows == [1] * (parts * steps) and (found - STORED[name]).abs().max() < 2e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.filterwarnings("ignore:the autoencoder has a factor of 2")
@pytest.mark.parametrize("name", pipelines["CASES"])
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    def there(library: Any, folder: Path) -> Any:
        return pipelines["CASES"][name][0](library, folder).to("cuda")

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        found = pipelines["images"](name, difusores, tmp_path, there)
    assert (found - STORED[name]).abs().max() < 2e-3


@pytest.mark.slow
def test_nothing_needs_diffusers() -> None:
    """The tests with stored outputs pass in a process that cannot import it; for others see conftest.py."""
    files = [str(TESTS / "pipelines" / name) for name in ("test_stored.py", "test_adm.py")]
    chosen = ["-k", "stored_images or test_images_of_guided_diffusion"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DIFFUSERS, *files, *chosen],
        cwd=TESTS.parent,
        env={**os.environ, "CI": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(STORED) + 5} passed" in done.stdout, done.stdout
