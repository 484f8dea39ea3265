"""What the processor can multiply and add, measured by peak.cpp, to which the networks' figures are compared.

python benchmarks/peak.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch


def fma_peak(threads: int) -> dict[str, int]:
    """GFLOP/s of fused multiply-adds in "fp32" and "bf16"; empty without a C++ compiler.

    A precision is left out where the processor, or the compiler, has no instruction for it. With AMX, "bf16"
    is that of its tiles.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/peak"
        source = str(Path(__file__).with_name("peak.cpp"))
        command = [compiler, "-std=c++17", "-O3", "-march=native", "-pthread", source, "-o", program]
        if subprocess.run(command, capture_output=True).returncode:
            return {}
        found = {}
        for precision in ("fp32", "bf16"):
            done = subprocess.run([program, precision, str(threads)], capture_output=True, text=True)
            if done.returncode == 0 and int(done.stdout) > 0:
                found[precision] = int(done.stdout)
        return found


if __name__ == "__main__":
    print(fma_peak(torch.get_num_threads()))
