"""What every test runs under (determinism, memory full of NaN, fixed seeds), and what CI may skip."""

from __future__ import annotations

import gc
import os
import random
import re
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
import torch
from tape import TapeRecorder

from difusores import cuda_graph, graphs, native

# The only reasons to skip a test where CI=true: what the machine is or was told, not what the set-up forgot.
ALLOWED_SKIPS = re.compile(
    "|".join(
        [
            "needs AVX-512",
            "no CUDA device was found",
            "switched off by DIFUSORES_DISABLE=1",
            "needs nvcc",
            "needs an x86-64 processor",
        ]
    )
)


gc.disable()  # while tests are collected, of which all is kept: a sixth of that time


def pytest_configure() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # they share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    if not torch.accelerator.is_available():
        # PyTorch's own writes down the stack for each kind of device that might yet come: milliseconds.
        torch.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which determinism asks for on a GPU
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if native.status("cpu") is None:
        from difusores import _C

        _C.poison_outputs(True)  # the memory of a step's results, which is not PyTorch's


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: one that is begun last has the other processes wait."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    gc.freeze()  # what the modules of PyTorch and of the tests hold is not looked through again and again
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or extensions report leaks


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Lets CUDA graphs be captured on the CPU, on a tape; how many have been."""
    if (missing := native.status("cpu")) is not None:
        pytest.skip(f"the step's reference reads its row on the host, which no graph holds: {missing}")
    monkeypatch.setattr(graphs, "Recorder", TapeRecorder)
    monkeypatch.setattr(graphs, "refusal", lambda device: None)
    monkeypatch.setattr(cuda_graph, "refusal", lambda device: None)
    monkeypatch.setattr(TapeRecorder, "captures", 0)
    return lambda: TapeRecorder.captures


def _refuse_unexpected_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not ALLOWED_SKIPS.search(reason):
        report.outcome = "failed"
        report.longrepr = f"CI may not skip this ({reason}); the allowed reasons stand in tests/conftest.py"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_unexpected_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: Any) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_unexpected_skip(report)
    return report
