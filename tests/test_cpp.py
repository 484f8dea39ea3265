"""The kernels without torch, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    scripts = sysconfig.get_path("scripts")
    cmake, ninja = (shutil.which(name, path=scripts) or shutil.which(name) for name in ("cmake", "ninja"))
    assert cmake and ninja, "the test extras bring cmake and ninja"
    configure = [cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    options = ["-DDIFUSORES_MODULE=OFF", "-DDIFUSORES_CPP_TESTS=ON", "-DDIFUSORES_SANITIZE=ON"]
    subprocess.run([*configure, *options], check=True, capture_output=True)
    build = subprocess.run([cmake, "--build", tmp_path], capture_output=True, text=True)
    assert build.returncode == 0, build.stdout[-3000:]
    result = subprocess.run([tmp_path / "kernel_tests"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.strip().endswith("0 failures")
