"""Which backend answers: by name, by environment, per thread; and every ISA level of the native kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import difusores
from difusores import native, ops
from difusores.ops import dispatch

NATIVE = dispatch.status("cpu") is None


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DIFUSORES_")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True
    )


def test_the_native_kernels_are_there() -> None:
    """A suite that quietly runs without them proves nothing about them."""
    if os.environ.get("DIFUSORES_DISABLE") == "1":
        assert native.status("cpu") == "switched off by DIFUSORES_DISABLE=1"
    else:
        assert native.status("cpu") is None


def test_availability_names_every_op_and_backend() -> None:
    table = ops.availability()
    assert set(table) == {
        *("group_norm_silu", "group_norm_affine", "attention", "scheduler_step", "geglu", "layer_norm"),
        *("winograd_conv", "gemm_conv", "bias_residual", "linear", "group_norm_silu_backward"),
        *("guidance_rescale", "cat_channels"),
    }
    for backends in table.values():
        assert set(backends) == set(dispatch.BACKENDS)
        assert backends["reference"] is None
        assert all(reason is None or reason for reason in backends.values())
    assert table["gemm_conv"]["cuda"] == "gemm_conv has no cuda kernel in this version"


def test_asking_for_what_is_not_there_raises_with_the_reason() -> None:
    with pytest.raises(ValueError, match="unknown backend 'fast'"), difusores.use_backend("fast"):
        pass
    if not torch.cuda.is_available():
        refused = pytest.raises(ops.BackendUnavailable, match="backend 'cuda' is not available: ")
        with refused, difusores.use_backend("cuda"):
            pass


def test_use_backend_is_of_its_own_thread_and_nests() -> None:
    seen: list[str | None] = []
    with difusores.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.wanted()))
        thread.start()
        thread.join()
        with difusores.use_backend("torch"):
            assert dispatch.wanted() == "torch"
        assert dispatch.wanted() == "reference"
    assert seen == [os.environ.get("DIFUSORES_BACKEND")]
    assert dispatch.wanted() == os.environ.get("DIFUSORES_BACKEND")


def test_environment() -> None:
    ask = "from difusores.ops import dispatch; print(dispatch.wanted())"
    assert python(ask, DIFUSORES_BACKEND="reference").stdout.strip() == "reference"
    refused = python(ask, DIFUSORES_BACKEND="cpu", DIFUSORES_DISABLE="1")
    assert refused.returncode != 0 and "switched off by DIFUSORES_DISABLE=1" in refused.stderr
    unknown = python(ask, DIFUSORES_BACKEND="fast")
    assert unknown.returncode != 0 and "unknown backend 'fast'" in unknown.stderr


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE, reason=native.status("cpu") or "")
@pytest.mark.parametrize("isa", native.ISA_LEVELS)
def test_isa_levels(isa: str) -> None:
    """Each level that this processor has passes the ops' tests; another is refused in words, not replaced."""
    levels = native.build_info()["isa_levels"].split(",")
    highest = native.build_info()["isa_found"]
    call = "ops.group_norm_silu(torch.zeros(1, 2, 2), 1, None, None)"
    tried = python(f"import torch; from difusores import ops; {call}", DIFUSORES_ISA=isa)
    if tried.returncode != 0:
        assert isa not in levels or levels.index(isa) > levels.index(highest)
        assert f"DIFUSORES_ISA={isa}" in tried.stderr and "no such level" in tried.stderr
        return
    if isa == native.build_info()["isa_used"]:
        return  # the rest of the suite runs on it
    folder = os.path.dirname(__file__)
    # From AVX-512 on the levels differ in products of matrices alone.
    of_every_level = (
        *("group_norm_silu", "group_norm_affine", "scheduler_step", "winograd_conv"),
        "guidance_rescale",
        *("geglu", "layer_norm", "gemm_conv"),
    )
    differ = ("attention", *(() if isa.startswith("avx512") else of_every_level))
    tests = [os.path.join(folder, f"test_{op}.py") for op in differ]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-k",
            "(cpu or bitwise) and not (compiles or registration)",  # which no level changes
            "-p",
            "no:cacheprovider",
            *tests,
        ],
        env={**os.environ, "DIFUSORES_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_the_reference_does_not_answer_for_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that left a kernel out: the reference, registered for every device, must not stand in."""
    monkeypatch.setitem(dispatch._OPS, "bias_residual", ("cpu", "reference"))
    monkeypatch.setattr(dispatch, "status", lambda backend: None)
    monkeypatch.setattr(dispatch, "_HAS", {})
    assert dispatch.availability()["bias_residual"]["cpu"] == "difusores._C was built without bias_residual"
    assert dispatch.choose("bias_residual", "cpu", lambda *call: None) == "reference"
    with ops.use_backend("cpu"), pytest.raises(ops.BackendUnavailable, match="built without bias_residual"):
        dispatch.choose("bias_residual", "cpu", lambda *call: None)


def test_the_kernel_that_a_gpu_found_faster_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the measured size on, by default; what is asked for by name, or is alone there, stays."""
    monkeypatch.setattr(dispatch, "_refusal", lambda backend, device: missing.get(backend))
    monkeypatch.setattr(dispatch, "_left_out", lambda op, backend: None)
    monkeypatch.setattr(dispatch, "status", lambda backend: None)
    missing: dict[str, str] = {}

    def chosen(*shape: int) -> str:
        sample = torch.empty(shape, device="meta")
        return dispatch.choose("scheduler_step", "cuda", lambda *call: None, sample)

    assert dispatch.TRITON_FIRST["scheduler_step"].triton < dispatch.TRITON_FIRST["scheduler_step"].cuda
    if dispatch.wanted() is None:
        assert (chosen(8, 3, 512, 512), chosen(1, 4, 64, 64)) == ("triton", "cuda")
    with ops.use_backend("cuda"):
        assert chosen(8, 3, 512, 512) == "cuda"
    missing["triton"] = "no Triton here"
    if dispatch.wanted() is None:
        assert chosen(8, 3, 512, 512) == "cuda"
