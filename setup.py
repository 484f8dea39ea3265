"""Packaging only: one build command that hands all compiling to CMakeLists.txt.

Where this machine lacks something (a compiler, Python's headers …) the install is pure Python and keeps the
reason; an error while compiling with everything there stops the install.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def missing_requirement() -> str | None:
    """What compiling needs and this environment lacks, in words, or None; the compiler is CMake's to find."""
    for module in ("torch", "pybind11"):
        if find_spec(module) is None:
            return f"the Python package {module!r}, which the build needs, is not installed"
    for program in ("cmake", "ninja"):
        if find_program(program) is None:
            return f"the program {program!r}, which the build needs, is not installed (pip install {program})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return f"Python's headers are not installed (apt install python{sysconfig.get_python_version()}-dev)"
    return None


def find_program(name: str) -> str | None:
    """The program of this environment (pip puts it beside the interpreter), else the one on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def run_cmake(*arguments: str | Path) -> None:
    if subprocess.run([find_program("cmake"), *arguments]).returncode != 0:
        raise SystemExit("difusores: compiling failed; the messages above say where")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        package = ROOT / "difusores" if self.editable_mode else module.parent
        reason_file = package / "_build_reason.txt"
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        reason = missing_requirement() or self.configure(build_dir)
        if reason is None:
            run_cmake("--build", build_dir)
        # Removed and not overwritten: a running process keeps the file that it has mapped.
        stale = [file for folder in {module.parent, package} for file in folder.glob("_cuda*.so")]
        for old in (module, package / module.name, reason_file, *stale):
            old.unlink(missing_ok=True)
        if reason is None:
            run_cmake("--install", build_dir, "--prefix", module.parent)
            for extra in module.parent.glob("_cuda*.so"):  # setuptools copies only what it was told of
                if package != module.parent:
                    shutil.copy2(extra, package)
        else:
            print(f"difusores: installing as pure Python: {reason}", file=sys.stderr)
            package.mkdir(parents=True, exist_ok=True)
            reason_file.write_text(reason + "\n", encoding="utf-8")

    def configure(self, build_dir: Path) -> str | None:
        """Configure CMake; returns why nothing can be compiled here, or None. A fault of our own raises."""
        torch = Path(find_spec("torch").origin).parent
        run_cmake(
            *("-S", ROOT, "-B", build_dir, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={Path(find_spec('pybind11').origin).parent / 'share' / 'cmake' / 'pybind11'}",
            f"-DTORCH_DIR={torch}",
            f"-DTORCH_VERSION={version('torch')}",
            # pip install . --config-settings=--global-option=build_ext
            #               --config-settings=--global-option=--define=DIFUSORES_CUDA=ON
            *(f"-D{name}" for name, _ in self.define or ()),
        )
        no_compiler = build_dir / "no_compiler.txt"
        return no_compiler.read_text(encoding="utf-8").strip() if no_compiler.is_file() else None


# Optional, so that setuptools accepts a build that made no file; it swallows no failure raised above.
setup(
    ext_modules=[Extension("difusores._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
