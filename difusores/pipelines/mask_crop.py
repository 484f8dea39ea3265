"""Inpainting of the part of an image around its mask, by itself and larger than it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class MaskCrop:
    """What diffusers calls `padding_mask_crop`.

    Attributes:
        image, mask: the whole ones, of one size.
        box: left, top, right, bottom of the part.
    """

    image: Image.Image
    mask: Image.Image
    box: tuple[int, int, int, int]

    @classmethod
    def around(cls, image: Any, mask: Any, padding: int, size: tuple[int, int], output_type: str) -> MaskCrop:
        """The smallest part with all of the mask and `padding` pixels more on each side, widened to the shape
        of what is sampled as far as the image goes.

        Args:
            size: height and width of what is sampled.

        Raises:
            ValueError: image and mask are no two pictures of one size, the mask is empty, a padding is below
                0, or the output is not to be pictures.
        """
        for name, picture in (("image", image), ("mask_image", mask)):
            if not isinstance(picture, Image.Image):
                raise ValueError(f"{name} is a {type(picture).__name__}; padding_mask_crop needs a PIL image")
        if image.size != mask.size:
            raise ValueError(
                f"image is {image.size} pixels and mask_image {mask.size}: they have to be equal"
            )
        if output_type != "pil":
            raise ValueError(f"output_type is {output_type!r}; padding_mask_crop needs 'pil'")
        if padding < 0:
            raise ValueError(f"padding_mask_crop is {padding}; it has to be 0 or more pixels")
        marked = np.asarray(mask.convert("L")) > 0
        if not marked.any():
            raise ValueError("mask_image is black everywhere: padding_mask_crop has no part to cut out")
        spans = []
        for axis, length in ((0, mask.width), (1, mask.height)):
            found = np.flatnonzero(marked.any(axis=axis))
            spans.append((max(int(found[0]) - padding, 0), min(int(found[-1]) + 1 + padding, length)))
        (left, right), (top, bottom) = spans
        shape = size[1] / size[0]
        if (right - left) / (bottom - top) > shape:
            top, bottom = _widened(top, bottom, (right - left) / shape, mask.height)
        else:
            left, right = _widened(left, right, (bottom - top) * shape, mask.width)
        return cls(image, mask, (left, top, right, bottom))

    def parts(self, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
        """The part of the image and that of the mask, of that height and width."""
        image, mask = (_fitted(whole.crop(self.box), *size) for whole in (self.image, self.mask))
        return image, mask.convert("L")

    def put_back(self, pictures: list[Image.Image]) -> None:
        """Replace each picture of the part by the whole image, with the picture where the mask is."""
        left, top, right, bottom = self.box
        whole, mask = self.image.convert("RGB"), self.mask.convert("L")
        for i, picture in enumerate(pictures):
            beneath = whole.copy()
            beneath.paste(_covering(picture, bottom - top, right - left), (left, top))
            pictures[i] = Image.composite(beneath, whole, mask)


def _widened(begin: int, end: int, wanted: float, length: int) -> tuple[int, int]:
    """A span of `wanted` pixels around another, moved and at last cut to lie in [0, length]."""
    more = int(wanted - (end - begin))
    begin, end = begin - more // 2, end + more - more // 2
    over = max(end - length, 0)
    begin, end = begin - over, end - over
    under = max(-begin, 0)
    return begin + under, min(end + under, length)


def _scaled(picture: Image.Image, height: int, width: int, by_width: bool) -> Image.Image:
    """Of the given width or height, in its own shape."""
    if by_width:
        return picture.resize((width, picture.height * width // picture.width), LANCZOS)
    return picture.resize((picture.width * height // picture.height, height), LANCZOS)


def _middle(picture: Image.Image, height: int, width: int) -> tuple[int, int]:
    """Where the picture's corner lies when it is in the middle."""
    return width // 2 - picture.width // 2, height // 2 - picture.height // 2


def _covering(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The picture as large as to cover that size, and its middle."""
    large = _scaled(picture, height, width, width / height > picture.width / picture.height)
    result = Image.new("RGB", (width, height))
    result.paste(large, _middle(large, height, width))
    return result


def _fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The whole picture inside of that size, its edges drawn out over what is left."""
    wide = width / height < picture.width / picture.height
    small = _scaled(picture, height, width, wide)
    left, top = _middle(small, height, width)
    result = Image.new("RGB", (width, height))
    result.paste(small, (left, top))
    if wide and top > 0:
        for corner, edge in ((0, 0), (top + small.height, small.height)):
            result.paste(small.resize((width, top), box=(0, edge, width, edge)), (0, corner))
    elif not wide and left > 0:
        for corner, edge in ((0, 0), (left + small.width, small.width)):
            result.paste(small.resize((left, height), box=(edge, 0, edge, height)), (corner, 0))
    return result
