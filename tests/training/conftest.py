"""Pictures to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes, eight grey 8x8 pictures each: bright above, or bright below."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, rows in (("above", slice(0, 4)), ("below", slice(4, 8))):
        (folder / name).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 40, (8, 8), dtype=np.uint8)
            pixels[rows] += 200
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder
