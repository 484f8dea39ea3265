"""What the compiler makes of a kernel by pointers and by tensor descriptors, side by side: counts, not times.

`python benchmarks/triton_descriptors.py` compiles launches of tests/triton_budget.py with descriptors, their
twins by pointers, and two kernels without products both ways, for sm_90 or `--architecture 100`; no GPU is
needed. It counts registers of a thread, bytes of shared memory of a block, and instructions, in all and in
the loop with products: those that compute addresses and predicates, loads and stores, wide ones of 128 bits,
copies (`LDGSTS`), boxes (`UTMALDG`, `UTMASTG`) and accesses of shared memory.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cuda_budget import cuobjdump, output_of
from triton_budget import CASES, Target, launches, meta

from difusores.ops.triton import descriptor
from difusores.ops.triton.geglu import geglu
from difusores.ops.triton.layer_norm import layer_norm

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+ )?([A-Z]\S*).*?);")
KINDS = {
    "products": r"HMMA|HGMMA|UTC\w*MMA",
    "addresses": r"U?IMAD|U?IADD|U?LEA|VIADD|U?ISETP|U?LOP3|U?SEL|U?PLOP3",
    "loads": r"LDG\.",
    "wide": r"LDG\.\S*128|LDGSTS\.\S*128",
    "copies": r"LDGSTS",
    "stores": r"STG",
    "boxes": r"UTMALDG|UTMASTG",
    "shared accesses": r"LDS|STS",
}


@triton.jit
def geglu_by_boxes(x_box, y_box, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """difusores/ops/triton/geglu.py with descriptors, to be counted and nothing else."""
    blocks = tl.cdiv(columns, COLUMNS)
    row, column = tl.program_id(0) // blocks * ROWS, tl.program_id(0) % blocks * COLUMNS
    value = x_box.load([row, column]).to(tl.float32)
    gate = x_box.load([row, columns + column]).to(tl.float32)
    gelu = gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))
    y_box.store([row, column], (value * gelu).to(y_box.dtype))


@triton.jit
def layer_norm_by_boxes(x_box, y_box, rows, columns, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """difusores/ops/triton/layer_norm.py by itself with descriptors, likewise."""
    row = tl.program_id(0) * ROWS
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row + tl.arange(0, ROWS) < rows)[:, None] & (column < columns)
    h = x_box.load([row, 0]).to(tl.float32)
    pivot = tl.sum(tl.where(column == 0, h, 0.0), axis=1)
    h = tl.where(inside, h - pivot[:, None], 0.0)
    mean = tl.sum(h, axis=1) / columns
    h = tl.where(inside, h - mean[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, axis=1) / columns + eps))
    y_box.store([row, 0], (h * rstd[:, None]).to(y_box.dtype))


def elementwise() -> dict[str, Callable[[], Any]]:
    x, y = meta(8192, 2560), meta(8192, 1280)
    tile: dict[str, Any] = {"ROWS": 4, "COLUMNS": 256, "num_warps": 4, "grid": (1,), "enable_fp_fusion": True}
    boxes = (descriptor(x, 4, 256), descriptor(y, 4, 256))
    z = meta(8192, 320)
    row: dict[str, Any] = {**tile, "COLUMNS": 512}
    rows = (descriptor(z, 4, 512), descriptor(z, 4, 512))
    plain = (z, None, None, None, None, z, None, 8192, 320, 320, 0, 1e-5)
    return {
        "layer_norm 2x4096x320": lambda: layer_norm.warmup(*plain, **row),
        "layer_norm 2x4096x320 descriptors": lambda: layer_norm_by_boxes.warmup(
            *rows, 8192, 320, 1e-5, **row
        ),
        "geglu 2x4096x2560": lambda: geglu.warmup(x, y, 8192, 1280, 2560, TANH=False, **tile),
        "geglu 2x4096x2560 descriptors": lambda: geglu_by_boxes.warmup(*boxes, 1280, **tile),
    }


def counted(instructions: list[tuple[int, str, str]]) -> dict[str, int]:
    return {kind: sum(bool(re.match(p, name)) for *_, name in instructions) for kind, p in KINDS.items()}


def counts(kernel: Any) -> dict[str, Any]:
    program = cuobjdump()
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        resources, listing = output_of(program, "-res-usage", cubin), output_of(program, "-sass", cubin)
    found = [(int(at, 16), text, name) for at, text, name in INSTRUCTION.findall(listing)]
    loops = []
    last = max(
        at for at, _, name in found if name == "EXIT"
    )  # behind it is what waits for copies, out of line
    for end, text, name in found:
        if end > last:
            break
        target = re.search(r"0x([0-9a-f]+)$", text.strip()) if name.startswith("BRA") else None
        if target and int(target[1], 16) < end:
            loops.append([one for one in found if int(target[1], 16) <= one[0] <= end])
    loops = [loop for loop in loops if counted(loop)["products"]]
    loop = min(loops, key=len) if loops else []
    registers = re.search(r"REG:(\d+)", resources)
    assert registers is not None
    whole = {"registers": int(registers[1]), "bytes": kernel.metadata.shared, "all": len(found)}
    return whole | counted(found) | {f"loop {k}": n for k, n in ({"all": len(loop)} | counted(loop)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--case", default="", help="only cases whose name begins so")
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}, sm_{arguments.architecture}")
    triton.runtime.driver.set_active(Target(arguments.architecture))
    compiled: dict[str, Callable[[], Any]] = elementwise()
    for name in CASES:
        if name.endswith(" descriptors"):
            for twin in (name.removesuffix(" descriptors"), name):
                op, call = CASES[twin]
                for k, launch in enumerate(launches(op, call)):
                    compiled[f"{twin}, launch {k + 1}"] = launch
    for name, launch in compiled.items():
        if name.startswith(arguments.case):
            print(
                f"{name}: {', '.join(f'{n} {what}' for what, n in counts(launch()).items() if n)}", flush=True
            )


if __name__ == "__main__":
    main()
