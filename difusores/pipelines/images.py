"""From tensors to images: what pipelines return, and grids of images as files."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from difusores.files import replacing
from difusores.outputs import BaseOutput

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class ImagePipelineOutput(BaseOutput):
    """images: as the pipeline's `output_type` says, see `to_images`."""

    images: Any


def check_output_type(output_type: str) -> None:
    """Raise ValueError for what `to_images` does not know."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; allowed are {', '.join(OUTPUT_TYPES)}")


def to_images(sample: torch.Tensor, output_type: str) -> Any:
    """Images from samples.

    Args:
        sample: [N, C, H, W] in [-1, 1]; what lies outside is clipped.
        output_type: "pt" for a tensor [N, C, H, W] in [0, 1] on the same device, "np" for a float array [N,
            H, W, C] in [0, 1], "pil" for a list of images, "latent" for the sample as it is.
    """
    check_output_type(output_type)
    if output_type == "latent":
        return sample
    images = (sample / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.float().cpu().permute(0, 2, 3, 1).numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(picture) for picture in _to_bytes(array)]


def _to_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """[N, H, W, C] in [0, 1] -> bytes, without the last axis for one channel."""
    pictures: npt.NDArray[np.uint8] = np.rint(array * 255).astype(np.uint8)
    return pictures[..., 0] if pictures.shape[-1] == 1 else pictures


def write_grid(images: npt.NDArray[Any], path: str | os.PathLike[str], columns: int | None = None) -> None:
    """Write images side by side into one PNG: the whole file or, on failure, none.

    Args:
        images: [N, H, W, C] in [0, 1], C being 1, 3 or 4.
        columns: images in a row; None for a grid about as wide as it is high.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, height, width, channels), images.dtype)
    cells[:count] = images
    grid = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    (picture,) = _to_bytes(grid.reshape(1, rows * height, columns * width, channels))
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
