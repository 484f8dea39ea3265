"""`VaeImageProcessor`: pictures and arrays to the tensors of autoencoders, and back, as in diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from difusores.configuration import ConfigMixin, register_to_config

PipelineImageInput = Image.Image | npt.NDArray[Any] | Tensor | Sequence[Any]
"""A picture, an array [N, H, W, C], a tensor [N, C, H, W], or a list of one of these."""

FILTERS = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
OUTPUT_TYPES = ("latent", "pt", "np", "pil")


class VaeImageProcessor(ConfigMixin):
    """Images before and after an autoencoder.

    Args:
        do_resize: make height and width multiples of `vae_scale_factor`, or what `preprocess` is told.
        vae_scale_factor: pixels of a latent's side.
        vae_latent_channels: a tensor of so many channels is latents, which `preprocess` leaves as they are.
        resample: filter for pictures, see `FILTERS`; arrays and tensors take the nearest pixel.
        reducing_gap: see `PIL.Image.Image.resize`.
        do_normalize: [0, 1] to [-1, 1], and back in `postprocess`.
        do_binarize: 1 from 0.5 on, else 0.
        do_convert_rgb, do_convert_grayscale: of pictures; at most one.

    Raises:
        ValueError: both conversions, or a filter that is not one of these.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        do_resize: bool = True,
        vae_scale_factor: int = 8,
        vae_latent_channels: int = 4,
        resample: str = "lanczos",
        reducing_gap: int | None = None,
        do_normalize: bool = True,
        do_binarize: bool = False,
        do_convert_rgb: bool = False,
        do_convert_grayscale: bool = False,
    ) -> None:
        if do_convert_rgb and do_convert_grayscale:
            raise ValueError("do_convert_rgb and do_convert_grayscale are True; at most one of them can be")
        if resample not in FILTERS:
            raise ValueError(f"resample is {resample!r}; allowed are {', '.join(FILTERS)}")

    @staticmethod
    def numpy_to_pil(images: npt.NDArray[Any]) -> list[Image.Image]:
        """Arrays [N, H, W, C] or [H, W, C] in [0, 1] as pictures; one channel gives mode "L"."""
        pixels = np.rint((images if images.ndim == 4 else images[None]) * 255).astype(np.uint8)
        return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in pixels]

    @staticmethod
    def pil_to_numpy(images: Image.Image | list[Image.Image]) -> npt.NDArray[np.float32]:
        """Pictures of one size as an array [N, H, W, C], or [N, H, W] of mode "L", in [0, 1]."""
        pictures = images if isinstance(images, list) else [images]
        return np.stack([np.asarray(picture).astype(np.float32) / 255 for picture in pictures])

    @staticmethod
    def numpy_to_pt(images: npt.NDArray[Any]) -> Tensor:
        """[N, H, W, C] or [N, H, W] as a tensor [N, C, H, W]."""
        return torch.from_numpy((images if images.ndim == 4 else images[..., None]).transpose(0, 3, 1, 2))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> npt.NDArray[np.float32]:
        """[N, C, H, W] as an array [N, H, W, C]."""
        array: npt.NDArray[np.float32] = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return array

    @staticmethod
    def normalize(images: Any) -> Any:
        """[0, 1] to [-1, 1]."""
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Any) -> Any:
        """[-1, 1] to [0, 1]; what lies outside is clipped."""
        return (images * 0.5 + 0.5).clamp(0, 1)

    @staticmethod
    def convert_to_rgb(image: Image.Image) -> Image.Image:
        """The picture in mode "RGB"."""
        return image.convert("RGB")

    @staticmethod
    def convert_to_grayscale(image: Image.Image) -> Image.Image:
        """The picture in mode "L"."""
        return image.convert("L")

    @staticmethod
    def blur(image: Image.Image, blur_factor: int = 4) -> Image.Image:
        """The picture under a Gaussian of that deviation in pixels."""
        return image.filter(ImageFilter.GaussianBlur(blur_factor))

    @staticmethod
    def apply_overlay(mask: Image.Image, init_image: Image.Image, image: Image.Image) -> Image.Image:
        """The second picture where the mask is white, the first where it is black, in mode "RGB"."""
        first, second = init_image.convert("RGB"), image.convert("RGB")
        return Image.composite(second, first, mask.convert("L"))

    @staticmethod
    def binarize(image: Tensor) -> Tensor:
        """1 from 0.5 on, else 0."""
        return (image >= 0.5).to(image.dtype)

    def get_default_height_width(
        self, image: Any, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """The multiples of `vae_scale_factor` within a height and a width, which are the image's if None."""
        if isinstance(image, Image.Image):
            own = image.height, image.width
        else:
            own = tuple(image.shape[2:4] if isinstance(image, Tensor) else image.shape[1:3])
        unit = self.config.vae_scale_factor
        rows, columns = height or own[0], width or own[1]
        return rows - rows % unit, columns - columns % unit

    def resize(self, image: Any, height: int, width: int, resize_mode: str = "default") -> Any:
        """A picture, an array [N, H, W, C] or a tensor [N, C, H, W] in another size.

        resize_mode: "default" stretches; for pictures, "crop" cuts what is too much and "fill" repeats the
            border where something lacks.

        Raises:
            ValueError: another mode, or one that is for pictures alone.
        """
        if resize_mode not in ("default", "fill", "crop"):
            raise ValueError(f"resize_mode is {resize_mode!r}; allowed are 'default', 'fill' and 'crop'")
        if isinstance(image, Image.Image):
            if resize_mode == "default":
                return self._stretched(image, width, height, self.config.reducing_gap)
            return self._fitted(image, width, height, resize_mode == "crop")
        if resize_mode != "default":
            raise ValueError(f"resize_mode {resize_mode!r} is for pictures; got a {type(image).__name__}")
        if isinstance(image, Tensor):
            return F.interpolate(image, size=(height, width))
        return self.pt_to_numpy(F.interpolate(self.numpy_to_pt(image), size=(height, width)))

    def _stretched(
        self, image: Image.Image, width: int, height: int, gap: float | None = None
    ) -> Image.Image:
        return image.resize((width, height), resample=FILTERS[self.config.resample], reducing_gap=gap)

    def _fitted(self, image: Image.Image, width: int, height: int, crop: bool) -> Image.Image:
        """In the middle of a picture of that size, with its own proportions: covering it, or within it."""
        wider = image.width * height > width * image.height
        if wider == crop:
            inner = (image.width * height // image.height, height)
        else:
            inner = (width, image.height * width // image.width)
        resized = self._stretched(image, *inner)
        left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
        result = Image.new("RGB", (width, height))
        result.paste(resized, (left, top))
        if not crop and top > 0:
            for y, edge in ((0, 0), (top + inner[1], resized.height)):
                result.paste(resized.resize((width, top), box=(0, edge, width, edge)), (0, y))
        elif not crop and left > 0:
            for x, edge in ((0, 0), (left + inner[0], resized.width)):
                result.paste(resized.resize((left, height), box=(edge, 0, edge, height)), (x, 0))
        return result

    def preprocess(
        self,
        image: PipelineImageInput,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        crops_coords: tuple[int, int, int, int] | None = None,
    ) -> Tensor:
        """[N, C, H, W], by the configuration normalised or made binary; latents as they are.

        Args:
            image: see `PipelineImageInput`; arrays and tensors in [0, 1]. With a warning, those with numbers
                below 0 are taken as normalised.
            height, width: what they are resized to; None for the largest multiples of `vae_scale_factor`.
            resize_mode: see `resize`.
            crops_coords: part of a picture (left, upper, right, lower) that is taken first.

        Raises:
            ValueError: another kind of image.
        """
        parts: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
        first = parts[0] if parts else None
        if isinstance(first, Image.Image):
            pixels = self._from_pictures(parts, height, width, resize_mode, crops_coords)
        elif isinstance(first, (np.ndarray, Tensor)):
            pixels = self._from_arrays(parts)
            if isinstance(first, Tensor) and pixels.shape[1] == self.config.vae_latent_channels:
                return pixels
            if self.config.do_resize:
                pixels = self.resize(pixels, *self.get_default_height_width(pixels, height, width))
        else:
            raise ValueError(
                f"image is a {type(first).__name__}; needed is a PIL image, an array, a tensor, or a list of "
                "one of these"
            )
        normalize = self.config.do_normalize
        if normalize and float(pixels.min()) < 0:
            warnings.warn(
                f"image has numbers from {float(pixels.min()):g}: it is taken to be in [-1, 1], not [0, 1]",
                FutureWarning,
                stacklevel=2,
            )
            normalize = False
        pixels = self.normalize(pixels) if normalize else pixels
        return self.binarize(pixels) if self.config.do_binarize else pixels

    def _from_pictures(
        self,
        pictures: list[Image.Image],
        height: int | None,
        width: int | None,
        resize_mode: str,
        box: tuple[int, int, int, int] | None,
    ) -> Tensor:
        if box is not None:
            pictures = [picture.crop(box) for picture in pictures]
        if self.config.do_resize:
            size = self.get_default_height_width(pictures[0], height, width)
            pictures = [self.resize(picture, *size, resize_mode) for picture in pictures]
        if self.config.do_convert_rgb or self.config.do_convert_grayscale:
            mode = "RGB" if self.config.do_convert_rgb else "L"
            pictures = [picture.convert(mode) for picture in pictures]
        return self.numpy_to_pt(self.pil_to_numpy(pictures))

    def _from_arrays(self, parts: list[Any]) -> Tensor:
        """[N, C, H, W] of images, or batches of them; grey ones need no axis for the channel."""
        batches = []
        for part in parts:
            tensor = part if isinstance(part, Tensor) else torch.from_numpy(part)
            last = isinstance(part, np.ndarray)
            grey = self.config.do_convert_grayscale and tensor.ndim in (2, 3)
            if grey and not (last and tensor.shape[-1] == 1):
                tensor = tensor[..., None] if last else tensor.unsqueeze(-3)
            tensor = tensor if tensor.ndim == 4 else tensor[None]
            if tensor.ndim != 4:
                raise ValueError(f"image has shape {list(part.shape)}; needed are 3 or 4 dimensions")
            batches.append(tensor.permute(0, 3, 1, 2) if last else tensor)
        return torch.cat(batches)

    def postprocess(
        self, image: Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None
    ) -> Any:
        """Images of an autoencoder as pictures, an array or a tensor.

        Args:
            image: [N, C, H, W] in [-1, 1].
            output_type: "pil" for a list of pictures, "np" for an array [N, H, W, C] in [0, 1], "pt" for a
                tensor [N, C, H, W] in [0, 1], "latent" for `image` itself.
            do_denormalize: for each image, whether it is brought from [-1, 1] to [0, 1]; None for
                `do_normalize`.

        Raises:
            ValueError: `image` is no tensor, or another `output_type`.
        """
        if not isinstance(image, Tensor):
            raise ValueError(f"image is a {type(image).__name__}; needed is a tensor [N, C, H, W]")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; allowed are {', '.join(OUTPUT_TYPES)}")
        if output_type == "latent":
            return image
        chosen = [bool(self.config.do_normalize)] * len(image) if do_denormalize is None else do_denormalize
        images = torch.stack(
            [self.denormalize(one) if wanted else one for one, wanted in zip(image, chosen, strict=True)]
        )
        if output_type == "pt":
            return images
        array = self.pt_to_numpy(images)
        return array if output_type == "np" else self.numpy_to_pil(array)
