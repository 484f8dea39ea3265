"""Splits, the order of the images, and reading them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from difusores.training.data import (
    MNIST_SPLIT,
    batch_indices,
    load_folder,
    load_mnist,
    split_indices,
)


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 images of 28x28 as `fetch` stores them; the first two pixels hold the image's number."""
    numbers = np.arange(10_000)
    images = np.full((10_000, 28, 28), 255, dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1] = numbers // 256, numbers % 256
    file = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(file, images=images, labels=(numbers % 10).astype(np.uint8))
    return file


def test_the_split_is_disjoint_complete_and_fixed():
    parts = split_indices(10_000, MNIST_SPLIT)
    assert {name: len(part) for name, part in parts.items()} == MNIST_SPLIT
    together = torch.cat(list(parts.values()))
    assert torch.equal(together.sort().values, torch.arange(10_000))
    # The bundled model and its judge depend on these very indices.
    assert parts["generator"][:5].tolist() == [0, 1, 3, 4, 7]
    assert parts["test"][:5].tolist() == [5, 6, 20, 31, 70]


def test_a_split_of_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match="needs 11 items, there are 10"):
        split_indices(10, {"a": 6, "b": 5})


def test_mnist_parts_are_padded_scaled_and_labelled(digits_file: Path):
    parts = split_indices(10_000, MNIST_SPLIT)
    for name, part in parts.items():
        data = load_mnist(name, digits_file)
        assert torch.equal(data.labels, part % 10)
        batch = data.batch(torch.tensor([0, 3]))
        assert batch.shape == (2, 1, 32, 32) and batch.dtype is torch.float32
        assert batch.min() == -1 and batch.max() == 1
        assert torch.equal(batch[:, :, :2], torch.full((2, 1, 2, 32), -1.0))
        pixels = ((batch[:, 0, 2, 2:4] + 1) * 127.5).round().long()
        assert torch.equal(pixels[:, 0] * 256 + pixels[:, 1], part[[0, 3]])


def test_mnist_mistakes_are_named(tmp_path: Path, digits_file: Path):
    with pytest.raises(FileNotFoundError, match="difusores fetch mnist"):
        load_mnist("test", tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match="generator, judge, test"):
        load_mnist("train", digits_file)
    with pytest.raises(ValueError, match="28x28"):
        load_mnist("test", digits_file, resolution=16)


def test_a_damaged_file_of_digits_is_named(tmp_path: Path, digits_file: Path):
    whole = digits_file.read_bytes()
    file = tmp_path / "digits.npz"
    for content in (
        b"",
        b"garbage",
        whole[: len(whole) // 2],
        whole.replace(b"images", b"dogs.."),
        whole[:5000] + b"damage" + whole[5006:],
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"digits\.npz .* `python -m difusores fetch mnist`"):
            load_mnist("test", file)


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (7, 7), (3, 8)])
def test_every_epoch_shows_every_image_once(count: int, batch: int):
    epochs = 4
    steps = -(-count * epochs // batch)
    seen = torch.cat([batch_indices(step, batch, count, seed=1) for step in range(steps)])[: count * epochs]
    orders = seen.view(epochs, count)
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(count))
    assert not torch.equal(orders[0], orders[1])


def test_the_order_depends_on_seed_and_step_only():
    first = batch_indices(5, 4, 100, seed=1)
    torch.manual_seed(123)
    assert torch.equal(batch_indices(5, 4, 100, seed=1), first)
    assert not torch.equal(batch_indices(5, 4, 100, seed=2), first)


def test_a_folder_gives_labels_and_centre_crops(tmp_path: Path):
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / name).mkdir()
        wide = Image.new("RGB", (30, 10), (0, 255, 0))
        wide.paste(colour, (10, 0, 20, 10))
        wide.save(tmp_path / name / "a.png")
    data = load_folder(tmp_path, 10, 3)
    assert data.class_names == ("blue", "red") and data.labels.tolist() == [0, 1] and len(data) == 2
    batch = data.batch(torch.tensor([1, 0]))
    assert batch.shape == (2, 3, 10, 10)
    assert torch.equal(batch[0, :, 5, 5], torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(batch[1, :, 5, 5], torch.tensor([-1.0, -1.0, 1.0]))
    assert load_folder(tmp_path, 4, 1).batch(torch.tensor([0])).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_and_transparency_lies_on_white(tmp_path: Path, channels: int):
    Image.fromarray(np.full((4, 4), 257 * 60, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("LA", (4, 4), (60, 0)).save(tmp_path / "empty.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(tmp_path / "faint.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([60, 60, 60])
    palette.save(tmp_path / "palette.png", transparency=0)
    batch = load_folder(tmp_path, 4, channels).batch(torch.arange(4))
    grey = (batch[:, :, 0, 0] + 1) * 127.5
    torch.testing.assert_close(grey, torch.tensor([[60.0], [255], [204], [255]]).expand(4, channels))


def test_folder_mistakes_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_folder(tmp_path / "nowhere", 8, 3)
    with pytest.raises(ValueError, match="holds no pictures"):
        load_folder(tmp_path, 8, 3)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as a picture"):
        load_folder(tmp_path, 8, 3).batch(torch.tensor([0]))
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="both in sub-folders"):
        load_folder(tmp_path, 8, 3)
