"""What holds the Triton kernels to tests/triton_budget.json, which `make cuda-check` does."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from cuda_budget import violations

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_budget

BUDGET = json.loads(triton_budget.BUDGET.read_text(encoding="utf-8"))
# ptxas for sm_100 keeps this launch at 80 registers and one value, written once and read once, on the stack.
SPILLS = {("sm_100", "group_norm_silu 2x640x32x32 block"): 2}


def test_the_budget_covers_every_architecture_and_case() -> None:
    assert list(BUDGET) == [f"sm_{architecture}" for architecture in triton_budget.ARCHITECTURES]
    for architecture, launches in BUDGET.items():
        assert {name.split(", launch")[0] for name in launches} == set(triton_budget.CASES)
        for name, usage in launches.items():
            assert usage["spills"] == SPILLS.get((architecture, name), 0), (architecture, name)
            assert usage["wide_loads"] > 0, (architecture, name)
            if "float32" not in name:  # whose products are in fp32, not on matrix units
                assert usage.get("matrix", 1) > 0, (architecture, name)


def test_fewer_matrix_instructions_than_the_budget_are_named() -> None:
    budget = BUDGET["sm_80"]
    name = "attention 4096 of 40"
    measured = {**budget, name: {**budget[name], "matrix": 0}}
    (sentence,) = violations(budget, measured)
    assert sentence.startswith(f"{name}: 0 matrix")
