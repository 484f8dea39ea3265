"""Timesteps, noise levels and ranges that `set_timesteps` is given, crossed with what they meet.

The same step, oracle and gate as the crossing of options in test_indexed, whose grids are chosen by number.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from gate import check
from pairs import Conflict, all_pairs, check_pairs
from test_indexed import LOG_SNR, constructed, drawn, lift_tables, lifted, step, their_noise

import difusores

diffusers = pytest.importorskip("diffusers")

TIMES, LEVELS, FLOW = [999, 900, 500, 300, 3], [14.6, 7.0, 1.0, 0.1, 0.03, 0.0], [1.0, 0.8, 0.5, 0.3, 0.1]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
RANGE = {"num_inference_steps": 6, "num_train_timesteps": 500}
ANYWHERE: dict[str, list[Any]] = {"dtype": DTYPES, "begin": [0, 2], "prediction_type": PREDICTIONS}
DPM: dict[str, list[Any]] = {
    **ANYWHERE,
    "given": [{"timesteps": TIMES}],
    "solver_order": [2, 3],
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver"],
    "solver_type": ["midpoint", "heun"],
    "final_sigmas_type": ["zero", "sigma_min"],
    "rescale_betas_zero_snr": [False, True],
    "euler_at_final": [False, True],
    "lower_order_final": [True],
}
SHIFTED: dict[str, list[Any]] = {
    **ANYWHERE,
    "prediction_type": ["flow_prediction"],
    "use_flow_sigmas": [True],
    "use_dynamic_shifting": [True],
    "given": [{"num_inference_steps": 5, "mu": 0.7}, {"num_inference_steps": 6, "mu": 1.3}],
    "solver_order": [1, 2, 3],
    "lower_order_final": [True],
}
TABLES: dict[str, dict[str, list[Any]]] = {
    "DPMSolverMultistepScheduler, shifted": {**SHIFTED, "solver_type": ["midpoint", "heun"]},
    "DPMSolverSinglestepScheduler, shifted": {**SHIFTED, "solver_type": ["midpoint", "heun"]},
    "DEISMultistepScheduler, shifted": SHIFTED,
    "EulerDiscreteScheduler": {
        **ANYWHERE,
        "given": [{"timesteps": TIMES}, {"sigmas": LEVELS}],
        "final_sigmas_type": ["zero", "sigma_min"],
        "interpolation_type": ["linear", "log_linear"],
        "timestep_spacing": ["linspace", "trailing"],
        "rescale_betas_zero_snr": [False, True],
    },
    "HeunDiscreteScheduler": {
        **ANYWHERE,
        "given": [{"timesteps": TIMES}, RANGE],
        "timestep_spacing": ["linspace", "leading"],
    },
    "KDPM2DiscreteScheduler": {**ANYWHERE, "prediction_type": PREDICTIONS[:2], "given": [RANGE]},
    "KDPM2AncestralDiscreteScheduler": {**ANYWHERE, "prediction_type": PREDICTIONS[:2], "given": [RANGE]},
    "DPMSolverMultistepScheduler": DPM,
    "DPMSolverSinglestepScheduler": {
        key: values for key, values in DPM.items() if key not in ("rescale_betas_zero_snr", "euler_at_final")
    },
    "UniPCMultistepScheduler": {
        **ANYWHERE,
        "prediction_type": ["flow_prediction"],
        "use_flow_sigmas": [True],
        "given": [{"sigmas": FLOW}, {"sigmas": FLOW, "mu": 0.7}],
        "use_dynamic_shifting": [False, True],
        "solver_order": [1, 2, 3],
        "solver_type": ["bh1", "bh2"],
        "final_sigmas_type": ["zero", "sigma_min"],
        "flow_shift": [1.0, 3.0],
    },
}
CONFLICTS = [
    Conflict("algorithm_type", ["dpmsolver"], "final_sigmas_type", ["zero"], "both refuse: no end"),
    Conflict("use_dynamic_shifting", [True], "given", [{"sigmas": FLOW}], "mu is asked for"),
    Conflict("use_dynamic_shifting", [False], "given", [{"sigmas": FLOW, "mu": 0.7}], "mu is not read"),
]
COMBINATIONS = {name: all_pairs(table, CONFLICTS) for name, table in TABLES.items()}
OF_STEP = {"generator": "one", "s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0, "order": 4}


def test_what_set_timesteps_takes_is_crossed(capsys: pytest.CaptureFixture[str]) -> None:
    """All its parameters but the number of steps; those of some classes are crossed in other files."""
    by_timestep = {"LCM", "TCD", "CMStochasticIterative", "DDPM", "DDPMParallel", "EDMEuler"}
    elsewhere = {"FlowMatchEulerDiscrete", *by_timestep, *ONLY_GRIDS}
    for name in (name for name in difusores.schedulers.__all__ if name.endswith("Scheduler")):
        taken = set(inspect.signature(getattr(difusores, name).set_timesteps).parameters)
        taken &= {"timesteps", "sigmas", "mu", "num_train_timesteps"}
        if taken and name.removesuffix("Scheduler") not in elsewhere:
            tables = (table for title, table in TABLES.items() if title.split(",")[0] == name)
            held = {key for table in tables for given in table["given"] for key in given}
            assert taken <= held, (name, taken - held)
    for title, table in TABLES.items():
        check_pairs(title, table, COMBINATIONS[title], CONFLICTS, capsys)


ONLY_GRIDS: dict[str, list[dict[str, Any]]] = {
    "DPMSolverSDE": [RANGE, {"num_inference_steps": 6}],
}
"""A class whose steps are crossed elsewhere, on the grids of a number."""


@pytest.mark.parametrize(
    ("name", "given"), [(name, given) for name, cases in ONLY_GRIDS.items() for given in cases], ids=str
)
def test_given_grids(name: str, given: dict[str, Any]) -> None:
    if name == "DPMSolverSDE":
        pytest.importorskip("torchsde", reason="diffusers has the class only where torchsde is installed")
    ours, theirs = (getattr(package, f"{name}Scheduler")() for package in (difusores, diffusers))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**given)
    for grid in ("timesteps", "sigmas"):
        mine, right = getattr(ours, grid), getattr(theirs, grid)
        torch.testing.assert_close(mine, right.to(mine), rtol=2e-6, atol=0)


@pytest.mark.parametrize("title", TABLES)
def test_each_step_on_a_given_grid(title: str) -> None:
    """A float64 oracle, diffusers and ours from the same samples, with our noise levels."""
    name = title.split(",")[0]
    for option in COMBINATIONS[title]:
        ours, theirs = (constructed(package, name, option) for package in (difusores, diffusers))
        ours.set_timesteps(**option["given"])
        theirs.set_timesteps(
            **{
                key: np.array(value) if key == "sigmas" and name.startswith("UniPC") else value
                for key, value in option["given"].items()
            }
        )
        grids = ((s.timesteps.double(), s.sigmas.double()) for s in (ours, theirs))
        for mine, right in zip(*grids, strict=True):
            torch.testing.assert_close(mine, right, rtol=2e-6, atol=1e-4, msg=f"{name} {option}")
        theirs.sigmas = ours.sigmas.clone()
        oracle = copy.deepcopy(theirs)
        lift_tables(oracle)
        begin, dtype = option["begin"] * ours.order, option["dtype"]
        for scheduler in (ours, theirs, oracle) if begin else ():
            scheduler.set_begin_index(begin)
        values = torch.Generator().manual_seed(0)
        for i in range(begin, len(ours.timesteps)):
            level = 0.0 if name in LOG_SNR else float(ours.sigmas[i])
            x, e = (torch.randn(2, 3, 10, 20, generator=values) for _ in range(2))
            x, e = (x * math.sqrt(1 + level**2)).to(dtype), e.to(dtype)
            t, told = ours.timesteps[i], theirs.timesteps[i]
            for scheduler, time, sample in ((ours, t, x), (theirs, told, x), (oracle, told, x.double())):
                scheduler.scale_model_input(sample, time)
            with mock.patch("difusores.schedulers.base.draw_noise", drawn(dtype)):
                mine = step(ours, OF_STEP, e, t, x, i)
            with their_noise(name, dtype):
                right = step(theirs, OF_STEP, e, told, x, i)
                with lifted(name):
                    exact = step(oracle, OF_STEP, e.double(), told, x.double(), i)
            if exact[0].isfinite().all():
                check(mine, right, exact, dtype, place=(option, i))
