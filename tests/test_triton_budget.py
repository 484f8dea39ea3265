"""What Triton makes of its kernels stays within tests/triton_budget.json, for two of the architectures."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from cuda_budget import violations

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_budget

BUDGET = json.loads(triton_budget.BUDGET.read_text(encoding="utf-8"))
# Every op, every layout and both of a norm's launches; `make cuda-check` compiles the rest.
CASES = [
    "group_norm_silu 2x320x64x64",
    "group_norm_silu 2x320x64x64 channels_last",
    "layer_norm 2x4096x320 residual",
    "geglu 2x4096x2560",
    "linear 2x4096x320 residual",
    "linear 2x4096x320 geglu",
    "scheduler_step guided",
    "attention 4096 of 40",
]
# ptxas for sm_100 keeps this launch at 80 registers and one value, written once and read once, on the stack.
SPILLS = {("sm_100", "group_norm_silu 2x640x32x32 block"): 2}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_keep_their_budget(architecture: int) -> None:
    measured = {}
    for name in CASES:
        measured |= triton_budget.usages(name, architecture)
    budget = BUDGET[f"sm_{architecture}"]
    assert len(measured) == len(CASES) + 1
    assert violations({name: budget[name] for name in measured}, measured) == []


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
