"""The emulation itself: it finds what it has to find, and the kernels run under the sanitizers in it."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import emulated
import pytest
import torch
from torch import Tensor

from difusores import native

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or "")


def run(name: str, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    function = emulated.library("faults").faults
    function.restype = ctypes.c_char_p

    def launch(schedule: int) -> bytes | None:
        result: bytes | None = function(
            name.encode(), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), schedule
        )
        return result

    emulated.under_all_schedules(launch, [y])
    return y


def test_a_kernel_without_a_fault() -> None:
    x = torch.arange(64.0)
    assert torch.equal(run("sum", x), x.sum().expand(64))


def test_a_missing_barrier_shows_in_the_bits() -> None:
    with pytest.raises(AssertionError, match="a barrier is missing"):
        run("sum without a barrier", torch.arange(64.0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "some wait",
            r"deadlock in block \(0, 0\): thread 0 has ended; thread 32 waits at the barrier in faults",
        ),
        (
            "different barriers",
            "threads of a block wait at different barriers: thread 0 at faults.cpp:.* thread 32",
        ),
        ("half a warp", r"deadlock .*: thread 0 waits for its warp in faults.cpp:\d+; thread 16 has ended"),
        ("foreign lane", "a shuffle reads a lane that does not take part"),
    ],
)
def test_what_hardware_leaves_undefined_is_refused(name: str, message: str) -> None:
    with pytest.raises(emulated.EmulationError, match=message):
        run(name, torch.zeros(64))


def test_shared_memory_is_nan_until_it_is_written() -> None:
    assert torch.isnan(run("unwritten", torch.zeros(64))).all()


@pytest.mark.slow
@pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or "")
def test_the_kernels_under_sanitizers() -> None:
    """Small cases of every op; the sanitizers end the process at the first access beyond a tensor."""
    preload = [
        subprocess.run(
            ["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    cases = "((everything or ddim) and 7) or table or philox"
    cases += " or (against and (17 or 63 or 126 or 168)) or 5000 or 1030 or within or cluster"
    cases += " or (BiasResidual and widths and 320) or (gradients and 160)"
    tests = emulated.ROOT / "tests" / "ops" / "test_emulated_cuda.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-k", cases, str(tests)],
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(preload),
            "ASAN_OPTIONS": "detect_leaks=0",
            "SANITIZE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    classes = re.findall(r"^class (Test\w+)", tests.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(classes) == 8 and all(f"::{name}::" in result.stdout for name in classes)
