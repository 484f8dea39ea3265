"""The state of a run in one file, written atomically, and the pipeline folder made from it."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAME = re.compile(r"step-(\d+)\.pt")


def rng_state() -> dict[str, Any]:
    """The state of the global generators of Python, numpy and torch (CPU and this process's GPU)."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first. What a killed process left unfinished is not among them."""
    found = [path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` to folder/step-<step>.pt, whole or not at all; then delete all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    for remains in folder.glob("*.tmp"):
        remains.unlink()
    path = folder / f"step-{step:08d}.pt"
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # or a power failure could leave the name without the content
    os.replace(unfinished, path)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_latest(folder: Path) -> dict[str, Any]:
    """The state in the newest checkpoint of `folder`, on the CPU.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged; the message says what to do.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"there is no checkpoint in {folder}; is this the --out folder of a run?")
    try:
        state: dict[str, Any] = torch.load(found[-1], map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load has no one exception for a file that is not whole
        remedy = f"delete it to go on from {found[-2].name}" if found[:-1] else "there is no older one"
        raise ValueError(f"{found[-1]} is damaged ({type(error).__name__}); {remedy}") from error
    return state


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder beside `folder`, then put it in its place."""
    fresh, old = (folder.with_name(f".{folder.name}-{word}") for word in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
