"""The Triton kernels: in Triton's interpreter on any machine, on a GPU where there is one; the reasons."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from difusores.ops import dispatch

FOLDER = Path(__file__).parent
KERNELS = FOLDER / "triton_kernels.py"
DESCRIPTORS = FOLDER / "triton_descriptors.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DIFUSORES_") and k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env={**kept, **environment}, capture_output=True, text=True
    )


def passes(*arguments: str, **environment: str) -> None:
    """The kernels' tests in a process of their own: TRITON_INTERPRET is read when Triton is imported."""
    done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments, **environment)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    # Of the scheduler step's own tests what is not tested there, with the fullest row at the small
    # shapes, and a factor in one dtype.
    ops = {
        "triton_kernels": "",
        "triton_descriptors": "",
        "test_scheduler_step": "and triton and "
        "(everything and not (64 or factor and 16) or not (oracle or philox or compiles or factor))",
        "test_guidance_rescale": "and triton and (deviation or layouts or compiles)",
        "test_bias_residual": "and triton and not (33 or compiles)",
        "test_group_norm_silu": "and gradients_of_backends and triton and channels_last",
    }
    passes(
        *(str(FOLDER / f"{name}.py") for name in ops),
        *("-k", " or ".join(f"{name} {of}" for name, of in ops.items())),
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
def test_on_the_gpu() -> None:
    passes(str(KERNELS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
def test_descriptors_on_the_gpu() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no CUDA device was found that has tensor descriptors")
    passes(str(DESCRIPTORS))


def test_status(monkeypatch: pytest.MonkeyPatch) -> None:
    status = dispatch._triton_status.__wrapped__
    monkeypatch.delenv("DIFUSORES_DISABLE", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert status() == (None if torch.cuda.is_available() else "no CUDA device was found")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert status() is None
    monkeypatch.setattr(dispatch, "version", lambda _: "3.4.0")
    assert status() is None and status("triton_tma") == "triton 3.4.0 is older than 3.5"
    monkeypatch.setattr(dispatch, "version", lambda _: "3.1.0")
    assert status() == "triton 3.1.0 is older than 3.3"
    monkeypatch.setattr(dispatch, "find_spec", lambda _: None)
    assert status() == "triton is not installed"
    monkeypatch.setenv("DIFUSORES_DISABLE", "1")
    assert status() == "switched off by DIFUSORES_DISABLE=1"


def test_triton_is_imported_only_when_a_kernel_runs() -> None:
    code = (
        "import sys, torch\nfrom difusores import ops\n"
        "ops.geglu(torch.zeros(2, 4))\nassert 'triton' not in sys.modules\n"
        "with ops.use_backend('triton'): ops.geglu(torch.zeros(2, 4))\nassert 'triton' in sys.modules"
    )
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_order_of_preference() -> None:
    """PyTorch's own attention is faster than ours in Triton at most shapes (docs/gpu.md)."""
    on_a_gpu = [name for name in dispatch._OPS["group_norm_silu"] if name != "cpu"]
    assert on_a_gpu[-2:] == ["triton", "reference"]
    order = dispatch._OPS["attention"]
    assert order.index("torch") < order.index("triton")
