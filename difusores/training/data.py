"""Training images: the MNIST digits, or a folder of pictures; and the order in which they are seen."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from difusores.training.fetch import MNIST_FILE, cache_dir, read_mnist

MNIST_SPLIT = {"generator": 5000, "judge": 4000, "test": 1000}
"""Disjoint parts of the 10,000 digits: generative models train on the first, the judge on the second only."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DECODING_THREADS = 4


@dataclass(frozen=True)
class Digits:
    """Images in memory. images: uint8 [N, S, S]; labels: int64 [N]; class_names: of each label.

    fingerprint: sha256 of the images.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> Tensor:
        """fp32 [B, 1, S, S] in [-1, 1] of the images at `indices`: int64 [B]."""
        return self.images[indices].unsqueeze(1).float() / 127.5 - 1


@dataclass(frozen=True)
class ImageFolder:
    """Pictures on disk, decoded when they are asked for: the shorter side is resized and the middle cut out.

    What is transparent becomes white.

    labels: int64 [N], from the names of the sub-folders, or all 0 where there are none.
    fingerprint: sha256 of the names of the files, as they are below the folder.
    """

    files: tuple[Path, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    fingerprint: str
    resolution: int
    channels: int

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Tensor) -> Tensor:
        """fp32 [B, C, S, S] in [-1, 1] of the pictures at `indices`: int64 [B]."""
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            return torch.stack(list(pool.map(self._decode, indices.tolist())))

    def _decode(self, index: int) -> Tensor:
        path, size = self.files[index], self.resolution
        try:
            with Image.open(path) as file:
                picture = _opaque(ImageOps.exif_transpose(file)).convert("L" if self.channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a picture: {error}") from error
        width, height = picture.size
        scale = size / min(width, height)
        picture = picture.resize(
            (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.LANCZOS
        )
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        pixels = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float32)
        return torch.from_numpy(pixels.reshape(size, size, self.channels)).permute(2, 0, 1) / 127.5 - 1


def _opaque(picture: Image.Image) -> Image.Image:
    """`picture` in 8 bits a channel, laid on white where it is transparent."""
    if picture.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut off at 255
        picture = Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
    if picture.mode.endswith("A") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture


def split_indices(count: int, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Deal out `count` items by the hash of their index: disjoint, the same on every machine.

    Returns:
        For each name its number of indices, int64, ascending.

    Raises:
        ValueError: `sizes` ask for more than there is.
    """
    if sum(sizes.values()) > count:
        raise ValueError(f"a split into {sizes} needs {sum(sizes.values())} items, there are {count}")
    ranked = sorted(range(count), key=lambda i: hashlib.sha256(str(i).encode()).digest())
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = torch.tensor(sorted(ranked[start : start + size]), dtype=torch.int64)
        start += size
    return parts


def load_mnist(part: str, file: Path | None = None, resolution: int = 32) -> Digits:
    """One part of `MNIST_SPLIT`, padded with black from 28x28 to `resolution`.

    Args:
        file: where `difusores fetch mnist` stored the digits; None for its default.

    Raises:
        FileNotFoundError: the digits have not been fetched.
        ValueError: unknown part, resolution below 28, damaged file.
    """
    if part not in MNIST_SPLIT:
        raise ValueError(f"the part is {part!r}; the digits have the parts {', '.join(MNIST_SPLIT)}")
    if resolution < 28:
        raise ValueError(f"the resolution is {resolution}; the digits have 28x28 pixels and are only padded")
    file = file or cache_dir() / MNIST_FILE
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is not there; bring the digits with `python -m difusores fetch mnist`"
        )
    images, labels = map(torch.from_numpy, read_mnist(file))
    indices = split_indices(len(images), MNIST_SPLIT)[part]
    before = (resolution - 28) // 2
    after = resolution - 28 - before
    padded = torch.nn.functional.pad(images[indices], (before, after, before, after))
    fingerprint = hashlib.sha256(padded.numpy().tobytes()).hexdigest()
    return Digits(padded, labels[indices].long(), tuple(map(str, range(10))), fingerprint)


def load_folder(folder: Path, resolution: int, channels: int) -> ImageFolder:
    """The pictures in `folder` and below; the name of the first sub-folder is a picture's class.

    Raises:
        FileNotFoundError: no such folder. ValueError: no pictures, or some in sub-folders and some not.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give a folder of pictures, or mnist")
    files = tuple(sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES))
    if not files:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    names = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in files]
    class_names = tuple(sorted(set(names)))
    if "" in class_names and len(class_names) > 1:
        raise ValueError(f"{folder} holds pictures both in sub-folders, which are classes, and outside them")
    labels = torch.tensor([class_names.index(name) for name in names], dtype=torch.int64)
    relative = "\n".join(path.relative_to(folder).as_posix() for path in files)
    fingerprint = hashlib.sha256(relative.encode(errors="surrogateescape")).hexdigest()
    return ImageFolder(files, labels, class_names, fingerprint, resolution, channels)


def batch_indices(step: int, batch_size: int, count: int, seed: int) -> Tensor:
    """int64 [batch_size]: which of `count` images step `step` (from 0) sees.

    An endless row of shuffled epochs, a function of its arguments only: a resumed run goes on where it was.
    """
    start = step * batch_size
    epochs = range(start // count, (start + batch_size - 1) // count + 1)
    orders = []
    for epoch in epochs:
        key = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        orders.append(torch.randperm(count, generator=generator))
    offset = start - epochs[0] * count
    return torch.cat(orders)[offset : offset + batch_size]
