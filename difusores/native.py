"""Loads the compiled modules if they are there, and keeps the reason in words if they are not.

Importing this module loads nothing and never raises. A missing or broken compiled module costs speed, not the
import. `python -m difusores doctor` prints the reason; a request for that backend by name raises with it.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

MODULES = {"cpu": "_C", "cuda": "_cuda"}  # backend -> the compiled module that registers its kernels
ISA_LEVELS = ("base", "avx2", "avx512", "avx512_bf16", "amx")


@dataclass(frozen=True)
class Status:
    """What was found when the compiled modules were loaded.

    reasons: backend name -> None where its module is loaded, else why not, in words.
    builds: backend name -> `build_info()` of its module (compiler, torch, ISA levels or architectures …)
        where that could be imported.
    """

    reasons: Mapping[str, str | None]
    builds: Mapping[str, Mapping[str, Any]]


_lock = threading.Lock()
_status: Status | None = None


def load() -> Status:
    """Load the compiled modules, once per process; safe to call from several threads.

    Raises ValueError if DIFUSORES_DISABLE or DIFUSORES_ISA holds a value that means nothing.
    """
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _load()
    return _status


def status(backend: str) -> str | None:
    """None if the compiled module of `backend` ("cpu" or "cuda") is loaded, else the reason why it is not."""
    reasons = load().reasons
    if backend not in reasons:
        raise ValueError(f"backend {backend!r} has no compiled module; allowed: {', '.join(reasons)}")
    return reasons[backend]


def build_info(backend: str = "cpu") -> dict[str, Any]:
    """What a backend's module was built from and what it found at run time; empty if it is not loaded."""
    return dict(load().builds.get(backend, {}))


def environment_errors() -> list[str]:
    """One sentence for each environment variable read here that holds a value which means nothing."""
    errors = []
    disable = os.environ.get("DIFUSORES_DISABLE", "")
    if disable not in ("", "0", "1"):
        errors.append(f"DIFUSORES_DISABLE={disable!r} means nothing; allowed: 0, 1")
    isa = os.environ.get("DIFUSORES_ISA", "")
    if isa not in ("", *ISA_LEVELS):
        errors.append(f"DIFUSORES_ISA={isa!r} means nothing; allowed: {', '.join(ISA_LEVELS)}")
    return errors


def _load() -> Status:
    errors = environment_errors()
    if errors:
        raise ValueError("; ".join(errors))
    reasons = {backend: _load_module(module) for backend, module in MODULES.items()}
    imported = {backend: sys.modules.get(f"difusores.{module}") for backend, module in MODULES.items()}
    return Status(reasons, {name: module.build_info() for name, module in imported.items() if module})


def _load_module(name: str) -> str | None:
    """Import difusores.<name>; None, or why it cannot be used."""
    if os.environ.get("DIFUSORES_DISABLE") == "1":
        return "switched off by DIFUSORES_DISABLE=1"
    folder = Path(__file__).parent
    if PathFinder.find_spec(f"difusores.{name}", [str(folder)]) is None:
        return _why_missing(folder, name)
    try:
        import torch  # its libraries must be in the process before the module that links to them
    except Exception as error:
        return f"torch cannot be imported: {one_line(error)}"
    try:
        importlib.import_module(f"difusores.{name}")
    except Exception as error:
        if torch.version.cuda is None and "undefined symbol: aoti_torch" in str(error):
            return (
                f"built, but this torch ({torch.__version__}) has no CUDA, whose functions the module calls"
            )
        return f"broken: {one_line(error)}"
    if name == MODULES["cuda"] and not torch.cuda.is_available():
        return "no CUDA device was found"
    return None


def _why_missing(folder: Path, name: str) -> str:
    others = sorted(file.name for file in folder.glob(f"{name}.*.so"))
    if others:
        return f"built for another Python: {', '.join(others)} (this is {sys.implementation.cache_tag})"
    if name == MODULES["cuda"]:
        return "not built: it needs nvcc and a CUDA build of torch"
    reason = folder / "_build_reason.txt"  # written by setup.py when it could not compile
    if reason.is_file():
        return f"not built: {reason.read_text(encoding='utf-8').strip()}"
    return "not built"


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
