"""The model that comes with the package: what its folder holds, and that it draws what is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import difusores
from difusores import DDIMPipeline, DDPMPipeline
from difusores.__main__ import main

FOLDER = Path(difusores.__file__).parent / "assets" / "digits"
README_PICTURE = Path(__file__).parents[2] / "docs" / "images" / "digits.png"


def test_the_folder() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    weights = load_file(FOLDER / "unet" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    assert sum(w.numel() for w in weights.values()) <= 4_000_000
    assert "/tmp" not in "".join(path.read_text() for path in files if path.suffix == ".json")
    assert (FOLDER / "MODEL_CARD.md").is_file()


def test_the_picture_of_the_readme(tmp_path: Path) -> None:
    """`generate` draws the first row of it again: same labels, same noise."""
    out = tmp_path / "row.png"
    options = ["--num", "10", "--steps", "25", "--seed", "1", "--out", str(out)]
    main(["generate", "--model", "bundled:digits", *options])
    grid = np.asarray(Image.open(out), dtype=np.int64)
    digits = [
        grid[y : y + 32, x : x + 32] for y in range(0, len(grid), 32) for x in range(0, grid.shape[1], 32)
    ]
    row = np.asarray(Image.open(README_PICTURE), dtype=np.int64)[:32]
    assert np.abs(np.concatenate(digits[:10], axis=1) - row).max() <= 3


def test_guidance_draws_the_digit_that_is_asked_for() -> None:
    """Each sampler's digits are nearest to their own class's mean of the README's picture."""
    picture = torch.from_numpy(np.asarray(Image.open(README_PICTURE)).copy()).float() / 255
    columns = picture.reshape(10, 32, 10, 32).permute(2, 0, 1, 3)  # [class, row, 32, 32]
    means = columns.mean(1).flatten(1)
    for pipeline_class, options in (
        (DDIMPipeline, {"num_inference_steps": 8}),
        (DDPMPipeline, {"num_inference_steps": 20}),
    ):
        pipeline = pipeline_class.from_pretrained("bundled:digits")
        pipeline.set_progress_bar_config(disable=True)
        labels = [label for label in range(10) for _ in range(2)]
        images = pipeline(
            class_labels=labels,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(5),
            output_type="pt",
            **options,
        ).images
        nearest = torch.cdist(images.flatten(1), means).argmin(1)
        assert (nearest == torch.tensor(labels)).sum() >= 16, nearest.tolist()
