"""What nvcc makes of the CUDA kernels, held to a budget: registers, stack, spills, shared memory, accesses.

`make cuda-check` compiles every kernel for every architecture, or for those of `ARCHITECTURES="80 90a"`, and
compares with cuda_budget.json, which was measured with nvcc 13.0. No GPU is needed. `python
tests/cuda_budget.py --write` writes the budget anew after a change that is meant: read its diff. `--loops
scheduler_step` lists the loops of the kernels so named, with how many instructions of which kind each has.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUDGET = Path(__file__).with_name("cuda_budget.json")
ARCHITECTURES = ("75", "80", "86", "89", "90a", "100a", "120")
FLAGS = ("-std=c++20", "-O3", "--Werror=all-warnings")

Usage = dict[str, Any]  # a spill or a stack has its "reason" beside it
AT_MOST = ("registers", "stack", "spills", "shared")
AT_LEAST = ("wide_loads", "wide_stores", "matrix", "wide_copies", "box_loads", "box_stores")
# A spill is a load or store of local memory; a wide access one of 128 bits of global memory; a wide copy
# one of 128 bits from there to shared memory.
INSTRUCTIONS = {
    "spills": r"LDL|STL",
    "wide_loads": r"LDG\.\S*128",
    "wide_stores": r"STG\.\S*128",
    "matrix": r"HMMA|HGMMA\S*",
    "wide_copies": r"LDGSTS\.\S*128",
}


GLOBAL = {
    "loads": r"LDG\.\S*",
    "copies": r"LDGSTS\S*",
    "stores": r"STG\.\S*",
    "matrix": INSTRUCTIONS["matrix"],
}


def why_not() -> str | None:
    """None if the kernels can be compiled and looked at here, else the reason in words."""
    if shutil.which("nvcc") is None:
        return "needs nvcc"
    return None if cuobjdump() else "needs cuobjdump, which the Python package triton brings"


def cuobjdump() -> Path | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    program = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return program if program.is_file() else None


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def output_of(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def short_name(symbol: str) -> str:
    return shortened(output_of("c++filt", symbol).strip())


def shortened(name: str) -> str:
    """A kernel's demangled name with its template arguments, without namespaces and parameters."""
    bare = re.sub(r"\(difusores::[\w:]+\)", "", name)  # of an enumerator
    return bare.replace("difusores::cuda::", "").split("(")[0].removeprefix("void ")


def compiled(source: Path, architecture: str, cubin: Path) -> Path:
    output_of("nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", "-cubin", f"-arch=sm_{architecture}", source, "-o", cubin)
    return cubin


def usage_of(source: Path, architecture: str) -> dict[str, Usage]:
    """Compiles a file and reads each kernel's resources and instructions from the result."""
    with tempfile.TemporaryDirectory() as folder:
        usages = inspected(compiled(source, architecture, Path(folder) / "kernels.cubin"), INSTRUCTIONS)
    for usage in usages.values():
        for rare in ("matrix", "wide_copies"):  # of which most kernels have none
            if not usage[rare]:
                del usage[rare]
    return usages


def inspected(cubin: Path, instructions: dict[str, str]) -> dict[str, Usage]:
    """Each kernel's resources, and how many instructions it has of those named."""
    program = cuobjdump()
    assert program is not None, why_not()
    resources, listing = output_of(program, "-res-usage", cubin), output_of(program, "-sass", cubin)
    usages: dict[str, Usage] = {}
    for symbol, line in re.findall(r"Function (\w+):\n(.*)", resources):
        found = dict(re.findall(r"(\w+):(\d+)", line))
        usages[symbol] = {
            "registers": int(found["REG"]),
            "stack": int(found["STACK"]),
            "shared": int(found["SHARED"]),
        }
    for part in listing.split("Function : ")[1:]:
        symbol, body = part.split("\n", 1)
        for name, pattern in instructions.items():
            usages[symbol.strip()][name] = len(re.findall(rf"\b(?:{pattern})\b", body))
    return usages


def loops_of(body: str) -> list[dict[str, int]]:
    """The loops in a kernel's disassembly, from a branch's target to the branch back, in order of their ends.

    An outer loop counts what is in its inner ones. The branch to itself behind a kernel's end is no loop.
    """
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?;)", body)]
    found: list[dict[str, int]] = []
    for end, text in lines:
        branch = re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", text)
        if branch is None or int(branch[1], 16) >= end:
            continue
        inside = [one for at, one in lines if int(branch[1], 16) <= at <= end]
        kinds = {name: sum(bool(re.search(rf"\b{p}\b", one)) for one in inside) for name, p in GLOBAL.items()}
        found.append({"instructions": len(inside), **kinds})
    return found


def print_loops(kernel: str, architecture: str) -> None:
    program = cuobjdump()
    assert program is not None, why_not()
    source = max((s for s in sources() if kernel.startswith(s.stem)), key=lambda s: len(s.stem), default=None)
    if source is None:
        raise SystemExit(
            f"no kernel is named {kernel}: names begin with {', '.join(s.stem for s in sources())}"
        )
    with tempfile.TemporaryDirectory() as folder:
        listing = output_of(program, "-sass", compiled(source, architecture, Path(folder) / "kernels.cubin"))
    for part in listing.split("Function : ")[1:]:
        symbol, body = part.split("\n", 1)
        if short_name(symbol.strip()).startswith(kernel):
            print(f"{short_name(symbol.strip())}, sm_{architecture}")
            for loop in loops_of(body):
                print("  a loop:", ", ".join(f"{count} {name}" for name, count in loop.items()))


def violations(budget: dict[str, Usage], measured: dict[str, Usage]) -> list[str]:
    """A sentence for each kernel that is missing, unknown, or outside its budget."""
    found = [f"{name} has no budget" for name in sorted(set(measured) - set(budget))]
    found += [f"{name} has a budget and is not compiled" for name in sorted(set(budget) - set(measured))]
    for name in sorted(set(budget) & set(measured)):
        for what in (k for k in (*AT_MOST, *AT_LEAST) if k in budget[name]):
            ours, limit = measured[name].get(what, 0), budget[name][what]
            if ours > limit if what in AT_MOST else ours < limit:
                bound = "at most" if what in AT_MOST else "at least"
                found.append(f"{name}: {ours} {what.replace('_', ' ')}, the budget says {bound} {limit}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--write", action="store_true", help="make what is measured of all the budget")
    parser.add_argument(
        "--loops", metavar="KERNEL", help="only list the loops of kernels whose names begin so"
    )
    arguments = parser.parse_args()
    write, architectures = arguments.write, ARCHITECTURES if arguments.write else arguments.architecture
    reason = why_not()
    if reason is not None:
        raise SystemExit(f"the CUDA kernels cannot be checked here: {reason}")
    if arguments.loops:
        for architecture in arguments.architecture:
            print_loops(arguments.loops, architecture)
        return 0
    measured: dict[str, dict[str, Usage]] = {}
    broken = 0
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    for architecture in architectures:
        usages = measured.setdefault(f"sm_{architecture}", {})
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # of processes of nvcc
            for of_file in pool.map(usage_of, sources(), [architecture] * len(sources())):
                usages |= {short_name(symbol): usage for symbol, usage in of_file.items()}
        print(f"sm_{architecture}: {len(usages)} kernels", flush=True)
        for name, usage in usages.items():
            if usage["stack"] or usage["spills"]:
                usage["reason"] = budget[f"sm_{architecture}"].get(name, {}).get("reason", "")
        for sentence in [] if write else violations(budget[f"sm_{architecture}"], usages):
            print(f"  {sentence}")
            broken += 1
    if write:
        lines = (
            f"{json.dumps(name)}: {{\n"
            + ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(usages[kernel])}" for kernel in sorted(usages))
            + "\n}"
            for name, usages in measured.items()
        )
        BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
