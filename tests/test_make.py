"""The Makefile's set-up, with programs of a line in place of Python and pip."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Answers for its version, its modules and `-m venv .venv`; installing says so, and may fail to compile.
PYTHON = """#!/bin/bash
case "$*" in
  *--version) ;;
  *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "made with $(basename "$0")" ;;
  *"import ensurepip"*) [ ! -e no_venv ] ;;
  *sys.exit*) ;;
  *version_info*) echo VERSION ;;
  *--editable*)
    echo installed
    if [ -e no_compiler ]; then echo "no compiler" > difusores/_build_reason.txt
    else rm -f difusores/_build_reason.txt; fi ;;
  *pytest*) echo tested ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "difusores").mkdir()
    (tmp_path / "bin").mkdir()
    for version in ("3.11", "3.12"):
        program = tmp_path / "bin" / f"python{version}"
        program.write_text(PYTHON.replace("VERSION", version))
        program.chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{checkout / 'bin'}:/usr/bin:/bin"}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True, timeout=60
    )


def test_setup_is_done_once(checkout: Path) -> None:
    first, second = make(checkout, "setup"), make(checkout, "setup")
    assert first.returncode == 0 and "made with python3.11" in first.stdout and "installed" in first.stdout
    assert second.returncode == 0 and "installed" not in second.stdout


def test_a_compiler_that_comes_later_is_used(checkout: Path) -> None:
    (checkout / "no_compiler").touch()
    assert "Installed as pure Python, which is slower: no compiler" in make(checkout, "setup").stdout
    (checkout / "no_compiler").unlink()
    assert "installed" in make(checkout, "setup").stdout
    assert "installed" not in make(checkout, "setup").stdout


def test_the_suite_needs_a_compiler_and_the_demo_does_not(checkout: Path) -> None:
    (checkout / "no_compiler").touch()
    done = make(checkout, "test")
    assert done.returncode != 0 and "The tests need the compiled package: no compiler" in done.stderr
    assert "tested" not in done.stdout
    assert make(checkout, "demo").returncode == 0
    assert "tested" in make(checkout, "test-core").stdout
    (checkout / "no_compiler").unlink()
    assert "tested" in make(checkout, "test").stdout


def test_an_interpreter_asked_for_by_name_is_taken(checkout: Path) -> None:
    make(checkout, "setup")
    other = make(checkout, "PYTHON=python3.12", "setup")
    assert "made with python3.12" in other.stdout and "installed" in other.stdout
    assert "made with" not in make(checkout, "PYTHON=python3.12", "setup").stdout
    assert "made with" not in make(checkout, "setup").stdout  # not asked for: what is there stays


def test_what_is_wrong_with_the_interpreter_is_said(checkout: Path) -> None:
    done = make(checkout, "PYTHON=python3.99", "setup")
    assert done.returncode != 0 and "python3.99 does not run" in done.stderr
    (checkout / "no_venv").touch()
    done = make(checkout, "PYTHON=python3.12", "setup")
    assert "apt install python3.12-venv" in done.stderr
