"""Pictures in and out of files, under the names that diffusers' `utils` has for it; see also `logging` and
`torch_utils`.
"""

from __future__ import annotations

import io
import os
import tempfile
import urllib.request
from collections.abc import Callable, Sequence

from PIL import Image, ImageOps
from torch import Tensor

from difusores.files import replacing
from difusores.image_processor import VaeImageProcessor
from difusores.utils import logging as logging

TIMEOUT = 60.0  # seconds, of a server

numpy_to_pil = VaeImageProcessor.numpy_to_pil


def pt_to_pil(images: Tensor) -> list[Image.Image]:
    """[N, C, H, W] in [-1, 1] as pictures."""
    return numpy_to_pil(VaeImageProcessor.pt_to_numpy(VaeImageProcessor.denormalize(images)))


def load_image(
    image: str | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """A picture from a file, an address or memory, turned as its EXIF says.

    Args:
        image: a path, an address that begins with http:// or https://, or a picture.
        convert_method: what is done with it in the place of a conversion to RGB.

    Raises:
        OSError: the address does not answer, or what it sends is no picture.
        ValueError: another kind of thing, or there is no such file.
    """
    if isinstance(image, str):
        if image.startswith(("http://", "https://")):
            with urllib.request.urlopen(image, timeout=TIMEOUT) as answer:
                image = Image.open(io.BytesIO(answer.read()))
        elif os.path.isfile(image):
            image = Image.open(image)
        else:
            raise ValueError(f"{image!r} is no file, and no address that begins with http:// or https://")
    elif not isinstance(image, Image.Image):
        raise ValueError(f"image is a {type(image).__name__}; needed is a path, an address or a picture")
    upright = ImageOps.exif_transpose(image)
    return upright.convert("RGB") if convert_method is None else convert_method(upright)


def make_image_grid(
    images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None
) -> Image.Image:
    """Pictures of one size side by side, row after row.

    resize: width and height that each is given first.

    Raises:
        ValueError: there are not rows * cols of them.
    """
    if len(images) != rows * cols or not images:
        raise ValueError(f"there are {len(images)} images for {rows} rows of {cols}")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid


def export_to_gif(image: Sequence[Image.Image], output_gif_path: str | None = None, fps: int = 10) -> str:
    """Write pictures as a GIF that is shown without end; returns its path, a temporary file's if None."""
    if output_gif_path is None:
        handle, output_gif_path = tempfile.mkstemp(suffix=".gif")
        os.close(handle)
    with replacing(output_gif_path) as temporary:
        image[0].save(temporary, "GIF", save_all=True, append_images=image[1:], duration=1000 // fps, loop=0)
    return output_gif_path
