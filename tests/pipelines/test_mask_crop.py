"""The part of an image around its mask: cut out and put back as diffusers does, and bad input in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from difusores.pipelines.mask_crop import MaskCrop


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    bands = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], -1).astype(np.uint8)
    return Image.fromarray(bands).convert(mode)


def marked(width: int, height: int, box: tuple[int, int, int, int], value: int = 255) -> Image.Image:
    values = np.zeros((height, width), np.uint8)
    values[box[1] : box[3], box[0] : box[2]] = value
    return Image.fromarray(values)


# size of the image, what is masked, padding, height and width of the sample
CASES: list[tuple[tuple[int, int], tuple[int, int, int, int], int, tuple[int, int]]] = [
    ((64, 48), (20, 20, 30, 25), 4, (16, 16)),
    ((64, 48), (0, 0, 3, 40), 2, (16, 32)),
    ((64, 48), (50, 40, 64, 48), 7, (24, 16)),
    ((64, 48), (1, 10, 63, 12), 0, (32, 16)),
    ((33, 57), (5, 30, 8, 57), 100, (40, 16)),
    ((57, 33), (5, 30, 8, 31), 1, (16, 80)),
    ((40, 16), (0, 4, 40, 5), 3, (16, 16)),
    ((16, 41), (7, 0, 8, 41), 0, (16, 24)),
]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize(("whole", "box", "padding", "size"), CASES, ids=str)
def test_same_pixels_as_diffusers(whole: Any, box: Any, padding: int, size: Any, mode: str) -> None:
    processors = pytest.importorskip("diffusers.image_processor")
    image, mask, (height, width) = picture(*whole, mode), marked(*whole, box), size
    crop = MaskCrop.around(image, mask, padding, size, "pil")
    theirs = processors.VaeImageProcessor(vae_scale_factor=8)
    of_masks = processors.VaeImageProcessor(
        vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    assert crop.box == theirs.get_crop_region(mask, width, height, pad=padding)
    ours = [np.asarray(part, np.float32) / 255 for part in crop.parts(size)]
    told: dict[str, Any] = {"resize_mode": "fill", "crops_coords": crop.box}
    expected = theirs.preprocess(image, height, width, **told)[0].permute(1, 2, 0).numpy()
    assert np.abs(2 * ours[0] - 1 - expected).max() < 1e-6
    assert np.array_equal(ours[1] >= 0.5, of_masks.preprocess(mask, height, width, **told)[0, 0] > 0)
    pictures = [picture(width, height).rotate(180), picture(width, height)]
    back = [theirs.apply_overlay(mask, image, part, crop.box) for part in pictures]
    crop.put_back(pictures)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, back, strict=True))


def test_only_what_is_masked_changes() -> None:
    image, mask = picture(64, 48), marked(64, 48, (20, 10, 30, 30), 128)
    crop = MaskCrop.around(image, mask, 3, (16, 16), "pil")
    assert crop.box == (12, 7, 38, 33)
    pictures = [Image.new("RGB", (16, 16), (250, 0, 90))]
    crop.put_back(pictures)
    before, after = np.asarray(image).astype(int), np.asarray(pictures[0]).astype(int)
    inside = np.asarray(mask) > 0
    assert np.array_equal(before[~inside], after[~inside])
    half = (128 * np.array([250, 0, 90]) + 127 * before[inside]) / 255
    assert np.abs(after[inside] - half).max() <= 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image": np.zeros((48, 64, 3))}, "image is a ndarray; padding_mask_crop needs a PIL image"),
        ({"mask": None}, "mask_image is a NoneType; padding_mask_crop needs a PIL image"),
        ({"mask": marked(48, 64, (1, 1, 2, 2))}, r"image is \(64, 48\) pixels and mask_image \(48, 64\)"),
        ({"mask": marked(64, 48, (1, 1, 1, 1))}, "mask_image is black everywhere"),
        ({"output_type": "np"}, "output_type is 'np'; padding_mask_crop needs 'pil'"),
        ({"padding": -1}, "padding_mask_crop is -1; it has to be 0 or more pixels"),
    ],
)
def test_bad_input_in_words(given: dict[str, Any], words: str) -> None:
    usual: dict[str, Any] = {"image": picture(64, 48), "mask": marked(64, 48, (1, 1, 2, 2)), "padding": 3}
    with pytest.raises(ValueError, match=words):
        MaskCrop.around(**{**usual, "size": (16, 16), "output_type": "pil", **given})
