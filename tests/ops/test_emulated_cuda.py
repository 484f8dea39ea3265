"""The CUDA kernels' own source, executed on the CPU, against the float64 oracle of the ops' tests.

The tests are those of test_scheduler_step.py and test_group_norm_silu.py; the op's call is carried out by the
emulation, under three schedules which must agree in every bit.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import emulated
import pytest
import torch

from difusores import native, ops
from difusores.ops.scheduler_step import PX, ROW, W

pytestmark = [
    pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or ""),
    pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or ""),
]


def suite(op: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"suite_of_{op}", Path(__file__).with_name(f"test_{op}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which the emulated kernels answer: what is registered for the CPU is replaced."""
    for op, run in emulated.OPS.items():
        monkeypatch.setattr(importlib.import_module(f"difusores.ops.{op}"), "_OP", run)
    return "cpu"


class TestSchedulerStep:
    of = suite("scheduler_step")
    test_against_the_oracle = staticmethod(of.test_against_the_oracle)
    test_dynamic_threshold = staticmethod(of.test_dynamic_threshold)
    test_mixed_dtypes_and_model_input = staticmethod(of.test_mixed_dtypes_and_model_input)
    test_a_table_and_a_counter = staticmethod(of.test_a_table_and_a_counter)
    test_layouts = staticmethod(of.test_layouts)
    test_bitwise = staticmethod(of.test_bitwise)
    test_churn_of_a_sample_that_is_not_read = staticmethod(of.test_churn_of_a_sample_that_is_not_read)
    test_philox_noise = staticmethod(of.test_philox_noise)
    test_nan_passes_through = staticmethod(of.test_nan_passes_through)

    @pytest.mark.parametrize("missing", ["noise", "s0", "s4"])
    def test_an_operand_that_is_not_there_is_nan(self, missing: str) -> None:
        """The row may be in device memory, where the host cannot check it without waiting."""
        row, x = torch.zeros(2, ROW, dtype=torch.float64), torch.randn(2, 3, 5, 5)
        (
            row[:, PX],
            row[:, W + 1],
            row[1, W + ("x0", "xh", "e", "noise", "s0", "", "", "", "s4").index(missing)],
        ) = (
            *(1, 1),
            0.5,
        )
        for index, is_nan in ((0, False), (1, True)):
            (y,) = ops.scheduler_step(row, x, [x], step=torch.tensor([index]))
            assert torch.isnan(y).all() if is_nan else torch.equal(y, x)

    @pytest.mark.parametrize("index", [-1, 2, 2**40])
    def test_a_counter_outside_the_table_gives_nan(self, index: int) -> None:
        table, x = torch.zeros(2, ROW, dtype=torch.float64), torch.randn(1, 4, 8, 8)
        results = ops.scheduler_step(table, x, [x], outputs=("y", "x0", "m"), step=torch.tensor([index]))
        assert all(torch.isnan(t).all() for t in results)
