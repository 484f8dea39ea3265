"""From people's images and masks to tensors that models take."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

KINDS = "a PIL image, an array [N, H, W, C], a tensor [N, C, H, W], or a list of one of these"


def preprocess(
    image: Any, unit: int, height: int | None = None, width: int | None = None, latent_channels: int = 4
) -> Tensor:
    """[N, 3, H, W] float32 in [-1, 1]; latents [N, latent_channels, h, w] are returned as they are.

    Args:
        image: a PIL image, an array [H, W, C] or [N, H, W, C], a tensor [C, H, W] or [N, C, H, W], or a list
            of one kind. Arrays and tensors are in [0, 1]; with a warning, in [-1, 1] where they are below 0.
        unit: H and W are made multiples of it, by cutting what remains.
        height, width: what they are resized to; their own if None. PIL images are resized by Lanczos' filter,
            others by the nearest pixel.

    Raises:
        ValueError: another kind of image, or numbers outside of these.
    """
    first = _first(image, "image")
    if isinstance(first, Image.Image):
        return 2 * _pictures(_as_list(image), unit, height, width, "RGB") - 1
    pixels = _batch(image, 3, "image")
    if isinstance(first, Tensor) and pixels.shape[1] == latent_channels:
        return pixels
    pixels = _resized(pixels, unit, height, width)
    lowest, highest = float(pixels.min()), float(pixels.max())
    if not (lowest >= -1 and highest <= 1):  # NaN too
        raise ValueError(f"image has numbers from {lowest:g} to {highest:g}; needed are 0 to 1")
    if lowest < 0:
        warnings.warn(
            f"image has numbers from {lowest:g} to {highest:g}: it is taken to be in [-1, 1], not [0, 1]",
            stacklevel=2,
        )
        return pixels
    return 2 * pixels - 1


def preprocess_mask(mask: Any, unit: int, height: int, width: int) -> Tensor:
    """[N, 1, height, width], 1 where the mask is at least 0.5 and 0 elsewhere.

    mask: as `preprocess`'s image, of one channel, which arrays and tensors need not have.
    """
    first = _first(mask, "mask_image")
    if isinstance(first, Image.Image):
        values = _pictures(_as_list(mask), unit, height, width, "L")
    else:
        values = _resized(_batch(mask, 2, "mask_image"), unit, height, width)
    if values.shape[1] != 1:
        raise ValueError(f"mask_image has {values.shape[1]} channels; needed is one")
    if bool(values.isnan().any()):
        raise ValueError("mask_image has NaN; needed are numbers from 0 to 1")
    return (values >= 0.5).float()


def repeat_to(tensor: Tensor, count: int, name: str) -> Tensor:
    """[n, ...] -> [count, ...], the whole batch again and again.

    Raises:
        ValueError: `count` is not divisible by n.
    """
    if count % len(tensor):
        raise ValueError(f"{name}: {len(tensor)} cannot be shared by {count} images evenly")
    return tensor.repeat(count // len(tensor), *[1] * (tensor.ndim - 1))


def _first(image: Any, name: str) -> Any:
    first = image[0] if isinstance(image, (list, tuple)) and image else image
    if not isinstance(first, (Image.Image, np.ndarray, Tensor)):
        raise ValueError(f"{name} is a {type(first).__name__}; needed is {KINDS}")
    return first


def _as_list(image: Any) -> Sequence[Any]:
    return image if isinstance(image, (list, tuple)) else [image]


def _pictures(images: Sequence[Any], unit: int, height: int | None, width: int | None, mode: str) -> Tensor:
    """[N, C, H, W] in [0, 1]; all take the size of the first."""
    rows, columns = _sides(unit, height or images[0].height, width or images[0].width)
    resized = [
        image.resize((columns, rows), resample=Image.Resampling.LANCZOS).convert(mode) for image in images
    ]
    pixels = torch.from_numpy(np.stack([np.array(image) for image in resized])).float() / 255
    return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


def _batch(image: Any, dimensions: int, name: str) -> Tensor:
    """[N, C, H, W] float32 of arrays or tensors; dimensions: of one image."""
    parts = []
    for part in _as_list(image):
        tensor = part if isinstance(part, Tensor) else torch.from_numpy(np.asarray(part))
        tensor = tensor[None] if tensor.ndim == dimensions else tensor
        if dimensions == 2 and tensor.ndim == 3:
            last = isinstance(part, np.ndarray) and part.shape[-1] == 1
            tensor = (
                tensor[None] if last else tensor[:, None] if isinstance(part, Tensor) else tensor[..., None]
            )
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {list(part.shape)}; needed is {KINDS}")
        parts.append(tensor if isinstance(part, Tensor) else tensor.permute(0, 3, 1, 2))
    return torch.cat(parts).float()


def _sides(unit: int, height: int, width: int) -> tuple[int, int]:
    """The multiples of `unit` that are in a height and a width."""
    if min(height, width) < unit:
        raise ValueError(f"an image is {height}x{width} pixels; needed are {unit} each way or more")
    return height - height % unit, width - width % unit


def _resized(pixels: Tensor, unit: int, height: int | None, width: int | None) -> Tensor:
    size = _sides(unit, height or pixels.shape[2], width or pixels.shape[3])
    return F.interpolate(pixels, size=size)
