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
# With descriptors barriers have addresses too, beside 255 registers and beside 80 that ptxas set itself.
SPILLS = {
    ("sm_100", "group_norm_silu 2x640x32x32 block"): 2,
    ("sm_100", "attention 4096 of 40 descriptors"): 6,
    ("sm_120", "attention_gradients 4096 of 40 descriptors, launch 2"): 62,
}


def test_the_budget_covers_every_architecture_and_case() -> None:
    assert list(BUDGET) == [f"sm_{architecture}" for architecture in triton_budget.ARCHITECTURES]
    for architecture, launches in BUDGET.items():
        assert {name.split(", launch")[0] for name in launches} == set(triton_budget.CASES)
        for name, usage in launches.items():
            if "descriptors" in name and architecture in ("sm_80", "sm_89"):
                assert usage["box_loads"] == 0  # compiled to narrow pointers, which no call gets
                continue
            assert usage["spills"] == SPILLS.get((architecture, name), 0), (architecture, name)
            if "descriptors" in name:
                assert usage["box_loads"] > 0 and usage["box_stores"] > 0, (architecture, name)
            else:
                assert usage["wide_loads"] > 0, (architecture, name)
            if "float32" not in name:  # whose products are in fp32, not on matrix units
                assert usage.get("matrix", 1) > 0, (architecture, name)


def test_fewer_matrix_instructions_than_the_budget_are_named() -> None:
    budget = BUDGET["sm_80"]
    name = "attention 4096 of 40"
    measured = {**budget, name: {**budget[name], "matrix": 0}}
    (sentence,) = violations(budget, measured)
    assert sentence.startswith(f"{name}: 0 matrix")
