"""What `pip install .` makes, with a compiler, without one, and when our code does not compile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

import difusores
from difusores import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "csrc",
    "difusores",
)

pytestmark = pytest.mark.slow


def install(
    source: Path, target: Path, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index"]
    return subprocess.run(
        [*pip, "--no-build-isolation", "--no-deps", "--target", str(target), *options, "."],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def doctor(target: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "difusores", "doctor", "--json"],
        cwd=target,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


def files(package: Path) -> list[str]:
    """What a package consists of, data included; what is made on the spot left out."""
    return sorted(
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so") and path.name != "_build_reason.txt"
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources in which nothing has been built."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_reason.txt")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.skipif((native.status("cpu") or "").startswith("not built"), reason="needs a C++ compiler")
def test_with_a_compiler(tmp_path: Path) -> None:
    for stale in (ROOT / "build").glob("lib*"):  # setuptools would pack what an earlier build left there
        shutil.rmtree(stale)
    done = install(ROOT, tmp_path)  # in the checkout itself, where CMake finds its objects again
    assert done.returncode == 0, done.stdout + done.stderr
    report = doctor(tmp_path)
    assert report["modules"]["cpu"] is None
    assert report["versions"]["difusores"] == difusores.__version__
    assert "base" in report["build"]["isa_levels"].split(",")
    assert files(tmp_path / "difusores") == files(ROOT / "difusores")
    assert sorted(path.name for path in tmp_path.iterdir() if "dist-info" not in path.name) == [
        "bin",
        "difusores",
    ]
    version = difusores.__version__
    metadata = (tmp_path / f"difusores-{version}.dist-info" / "METADATA").read_text(encoding="utf-8")
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_without_a_compiler_the_install_is_pure_python_and_the_doctor_says_why(
    checkout: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    done = install(checkout, target, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(target.glob("difusores/*.so")) == []
    reason = "not built: no working C++ compiler was found (apt install g++)"
    report = doctor(target)
    assert report["modules"]["cpu"] == reason
    assert report["ops"]["group_norm_silu"]["cpu"] == reason
    assert report["problems"] == []


def test_a_compiler_that_was_removed_is_not_trusted(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.symlink_to(shutil.which("c++") or pytest.fail("needs a C++ compiler"))
    cmake, ninja = (Path(sysconfig.get_path("scripts"), name) for name in ("cmake", "ninja"))
    configure = [cmake, "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for name, expected in ((compiler, False), (compiler, True), ("c++", False), ("c++", False)):
        subprocess.run(
            [*configure, "-DDIFUSORES_MODULE=OFF"],
            env={**os.environ, "CXX": str(name)},
            check=True,
            capture_output=True,
        )
        assert (tmp_path / "build" / "no_compiler.txt").exists() is expected
        compiler.unlink(missing_ok=True)


def test_the_cuda_module_can_be_asked_for(checkout: Path, tmp_path: Path) -> None:
    """As docs/gpu.md says; here of a machine without nvcc, which may not pass over it in silence."""
    asked = ("build_ext", "--define=DIFUSORES_CUDA=ON")
    options = (f"--config-settings=--global-option={option}" for option in asked)
    done = install(checkout, tmp_path / "target", *options, CUDACXX="/nonexistent/nvcc")
    assert done.returncode != 0 and "/nonexistent/nvcc" in done.stdout + done.stderr
    assert "difusores: compiling failed; the messages above say where" in done.stdout + done.stderr
    cache = (checkout / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeCache.txt").read_text()
    assert "DIFUSORES_CUDA:STRING=ON" in cache


def test_code_that_does_not_compile_stops_the_install(checkout: Path, tmp_path: Path) -> None:
    for source in checkout.glob("csrc/**/*.cpp"):
        source.write_text("#error broken on purpose\n", encoding="utf-8")
    done = install(checkout, tmp_path / "target")
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert "difusores: compiling failed; the messages above say where" in done.stdout + done.stderr
    assert not (tmp_path / "target" / "difusores").exists()
