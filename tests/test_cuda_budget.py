"""What holds the CUDA kernels to tests/cuda_budget.json, which `make cuda-check` does, and their bindings."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path

import cuda_budget
import pybind11
import pytest
import torch

BUDGET = json.loads(cuda_budget.BUDGET.read_text(encoding="utf-8"))


def test_the_budget_covers_every_architecture() -> None:
    assert list(BUDGET) == [f"sm_{architecture}" for architecture in cuda_budget.ARCHITECTURES]
    for kernels in BUDGET.values():
        assert set(kernels) == set(BUDGET["sm_80"])
        for usage in kernels.values():
            assert usage["stack"] == usage["spills"] == 0 or usage["reason"], "spills need a reason"


def test_a_kernel_outside_its_budget_is_named() -> None:
    budget = BUDGET["sm_80"]
    name = next(iter(budget))
    for what, by in (("registers", 1), ("spills", 1), ("stack", 8), ("shared", 4), ("wide_loads", -1)):
        measured = {**budget, name: {**budget[name], what: budget[name][what] + by}}
        (sentence,) = cuda_budget.violations(budget, measured)
        assert sentence.startswith(f"{name}: ") and what.split("_")[-1] in sentence
    assert cuda_budget.violations(budget, {}) and cuda_budget.violations({}, budget)


def test_the_loops_of_a_kernel_are_found() -> None:
    body = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0000000402047981 */
                                                                     /* 0x000ea2000c1e1d00 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R9], [R2.64] ;
        /*0020*/                   HMMA.16816.F32 R4, R4, R8, RZ ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/               @P1 BRA P2, 0x0 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
    """
    assert cuda_budget.loops_of(body) == [
        {"instructions": 2, "loads": 0, "copies": 0, "stores": 0, "matrix": 1},
        {"instructions": 6, "loads": 1, "copies": 1, "stores": 1, "matrix": 1},
    ]


@pytest.mark.slow
@pytest.mark.skipif(cuda_budget.why_not() is not None, reason=cuda_budget.why_not() or "")
def test_the_bindings_compile_beside_this_torch(tmp_path: Path) -> None:
    """A torch without CUDA too: the stable ABI declares what the binding calls."""
    folders = [Path(torch.__file__).parent / "include", pybind11.get_include(), sysconfig.get_path("include")]
    names = ("DIFUSORES_CUDA_COMPILER", "DIFUSORES_CUDA_ARCHITECTURES", "DIFUSORES_TORCH_VERSION")
    csrc = cuda_budget.ROOT / "csrc"
    sources = [csrc / "bindings_cuda.cpp", *sorted((csrc / "bindings_cuda").glob("*.cpp"))]
    assert len(sources) > 1
    together = tmp_path / "bindings.cpp"  # as CMake compiles them: the headers take most of the time
    together.write_text("".join(f'#include "{source}"\n' for source in sources), encoding="utf-8")
    done = subprocess.run(
        [
            *("nvcc", "-std=c++20", "-O0", "-Xcompiler=-fPIC", f"-I{csrc}"),
            *(part for folder in folders for part in ("-isystem", str(folder))),
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            *(f'-D{name}=""' for name in names),
            *("-c", together),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
