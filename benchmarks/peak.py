"""What the processor can multiply and add, measured by peak.cpp, to which the networks' figures are compared.

python benchmarks/peak.py
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def _compiled(folder: str, *flags: str) -> str | None:
    """peak.cpp as a program or, by the flags, a library; None without a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    made, source = f"{folder}/peak", str(Path(__file__).with_name("peak.cpp"))
    command = [compiler, "-std=c++17", "-O3", "-march=native", "-pthread", *flags, source, "-o", made]
    return None if subprocess.run(command, capture_output=True).returncode else made


def fma_peak(threads: int) -> dict[str, int]:
    """GFLOP/s of fused multiply-adds in "fp32" and "bf16"; empty without a C++ compiler.

    The fastest of five rounds. A precision is left out where the processor, or the compiler, has no
    instruction for it. With AMX, "bf16" is that of its tiles.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = _compiled(folder)
        found = {}
        for precision in ("fp32", "bf16") if program else ():
            done = subprocess.run([program, precision, str(threads)], capture_output=True, text=True)
            if done.returncode == 0 and int(done.stdout) > 0:
                found[precision] = int(done.stdout)
        return found


def fma_round(threads: int, precision: str = "fp32") -> Callable[[], float]:
    """A call that multiplies and adds for about 10 ms and returns its operations: to take turns with.

    It returns 0 for a precision, "fp32" or "bf16", of which the processor has no instruction.

    Raises:
        RuntimeError: no C++ compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = _compiled(folder, "-shared", "-fPIC")
        if library is None:
            raise RuntimeError("the peak is measured by peak.cpp, and there is no C++ compiler")
        together = getattr(ctypes.CDLL(library), f"{precision}_together")
    together.restype = ctypes.c_double
    return lambda: float(together(threads))


if __name__ == "__main__":
    print(fma_peak(torch.get_num_threads()))
