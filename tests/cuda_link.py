"""Links the whole `_cuda` module to the CUDA build of a torch that is not installed. Needs nvcc, not a GPU.

`make cuda-link` downloads torch 2.14.1 (0.5 GB, without the packages that it needs), takes its headers and
libraries, builds the module for every card, or for `ARCHITECTURES="80 90a"`, and looks up every symbol that
the module leaves to others: in torch, the interpreter and the libraries of the system that are loaded with
them. After `rm -r build/cuda-link` it tells how long the build takes.
CUDA's runtime is linked statically. A symbol that nobody has is an error, and one that only the driver has:
the module is to load on a machine without a driver.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

from cuda_budget import ARCHITECTURES, ROOT, output_of

TORCH = "2.14.1"
LIBRARIES = ("libc10.so", "libtorch_cpu.so", "libtorch_cuda.so")
DRIVER, NOWHERE = "the driver alone", "nowhere"


def torch_folder(version: str) -> Path:
    """Where headers and libraries of that torch are, after they have been downloaded."""
    folder = ROOT / "build" / f"torch-{version}"
    complete = folder / "complete"
    if not complete.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"Downloading torch {version} …", flush=True)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet")
        output_of(*pip, "--no-deps", "--only-binary=:all:", "--dest", folder, f"torch=={version}")
        (wheel,) = folder.glob("torch-*.whl")
        libraries = [f"torch/lib/{name}" for name in LIBRARIES]
        with zipfile.ZipFile(wheel) as packed:
            names = packed.namelist()
            if not set(libraries) <= set(names):
                raise SystemExit(f"{wheel.name}, which pip chose, is no CUDA build of torch for Linux")
            headers = [name for name in names if name.startswith("torch/include/")]
            packed.extractall(folder, headers + libraries)
        wheel.unlink()
        complete.touch()
    return folder / "torch"


def build(torch: Path, version: str, architectures: list[str]) -> Path:
    """The linked module; without architectures for those of CMakeLists.txt."""
    target = ROOT / "build" / "cuda-link"
    scripts = Path(sysconfig.get_path("scripts"))
    pybind11 = find_spec("pybind11")
    assert pybind11 is not None and pybind11.origin is not None
    options = {
        "CMAKE_MAKE_PROGRAM": scripts / "ninja",
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": Path(pybind11.origin).parent / "share" / "cmake" / "pybind11",
        "TORCH_DIR": torch,
        "TORCH_VERSION": version,
        "DIFUSORES_CUDA": "ON",
        "DIFUSORES_CUDA_ARCHITECTURES": ";".join(f"{name}-real" for name in architectures) or "AUTO",
    }
    defined = (f"-D{name}={value}" for name, value in options.items())
    cmake = scripts / "cmake"
    configured = subprocess.run([cmake, "-S", ROOT, "-B", target, "-G", "Ninja", *defined]).returncode == 0
    before, start = os.times(), time.perf_counter()
    if not configured or subprocess.run([cmake, "--build", target, "--target", "_cuda"]).returncode != 0:
        raise SystemExit("the module could not be built: the messages above say where")
    after, seconds = os.times(), time.perf_counter() - start
    of_processor = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"built in {seconds:.0f} s, {of_processor:.0f} s of processor time on {os.cpu_count()} cores")
    (module,) = target.glob("_cuda*.so")
    return module


def loaded_with(program: Path, folder: Path) -> list[Path]:
    """The libraries that the loader takes for a program or library, those of `folder` first."""
    listing = output_of("env", f"LD_LIBRARY_PATH={folder}", "ldd", program)
    return [Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(", listing, re.MULTILINE)]


def needed(listing: str) -> set[str]:
    """Symbols that a listing of `nm -D -P --undefined-only` cannot do without: not the weak ones."""
    return {fields[0] for fields in map(str.split, listing.splitlines()) if fields[1] == "U"}


def provided(listing: str) -> set[str]:
    """Symbols of a listing of `nm -D -P --defined-only`, with version, and without a default one."""
    names = [line.split()[0] for line in listing.splitlines()]
    return {name.replace("@@", "@") for name in names} | {name.split("@@")[0] for name in names}


def found_in(symbols: set[str], libraries: dict[str, set[str]]) -> dict[str, list[str]]:
    """The symbols by the first library that has them, else as the driver's or nobody's."""
    result: dict[str, list[str]] = {}
    for symbol in sorted(symbols):
        owner = next((name for name, has in libraries.items() if symbol in has), None)
        unknown = DRIVER if re.match("cu[A-Z]", symbol) else NOWHERE  # the runtime's are named cudaX
        result.setdefault(owner or unknown, []).append(symbol)
    return result


def report(module: Path, torch: Path) -> bool:
    """Prints who has the module's symbols; whether it can be loaded beside that torch, driver or not."""
    python = Path(sys.executable).resolve()
    paths = [python, *(path for loaded in (python, module) for path in loaded_with(loaded, torch / "lib"))]
    libraries = {path.name: provided(output_of("nm", "-D", "-P", "--defined-only", path)) for path in paths}
    found = found_in(needed(output_of("nm", "-D", "-P", "--undefined-only", module)), libraries)
    for owner in (*sorted(set(libraries) & set(found)), DRIVER, NOWHERE):
        symbols = found.get(owner, [])
        all_named = owner in (DRIVER, NOWHERE) or len(symbols) <= 3
        print(f"  {len(symbols):4d} in {owner}", *(symbols if all_named else ()))
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    asked = sorted(set(re.findall(r'"(cu[A-Z]\w+)"', sources)))
    print(f"  asked of the driver by name, when first used: {', '.join(asked) or 'nothing'}")
    return not (found.get(DRIVER) or found.get(NOWHERE))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", default=TORCH, metavar="VERSION", help=f"default: {TORCH}")
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=[])
    arguments = parser.parse_args()
    for program in ("nvcc", "nm", "ldd"):
        if shutil.which(program) is None:
            raise SystemExit(f"the module cannot be linked here: needs {program}")
    torch = torch_folder(arguments.torch)
    module = build(torch, arguments.torch, arguments.architecture)
    size = module.stat().st_size / 1e6
    print(f"{module.name}, {size:.1f} MB, linked to torch {arguments.torch}, needs symbols:")
    return 0 if report(module, torch) else 1


if __name__ == "__main__":
    sys.exit(main())
