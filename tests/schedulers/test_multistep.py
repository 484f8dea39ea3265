"""PNDM and IPNDM against diffusers lifted to float64: every option crossed pairwise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gate import SHAPES, check
from pairs import Conflict, all_pairs, check_pairs, factors
from torch import Tensor

import difusores

diffusers = pytest.importorskip("diffusers")

TRAINED = torch.linspace(0.001, 0.05, 1000).tolist()
# Values for every option of the constructors. A scheduler with an option that is not listed here fails.
OPTIONS: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 997],
    "beta_start": [0.0001, 0.00085],
    "beta_end": [0.02, 0.012],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [None, TRAINED],
    "skip_prk_steps": [False, True],
    "set_alpha_to_one": [False, True],
    "prediction_type": ["epsilon", "v_prediction"],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "steps_offset": [0, 1],
}
RUN: dict[str, list[Any]] = {
    "steps": [10, 1, 2, 3, 4, 5, 25, 50, 1000],
    "begin": [0, 1, 0.5, 0.99],
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "shape": SHAPES,
}
GIVEN = ("model_output", "timestep", "sample")
PNDM = factors(difusores.PNDMScheduler, OPTIONS, given=GIVEN) | RUN
LEVELS = {"trained_betas": [None, torch.linspace(1, 0.01, 21).tolist()]}
IPNDM = factors(difusores.IPNDMScheduler, OPTIONS | LEVELS, given=GIVEN) | {"found": [True, False]} | RUN
CONFLICTS = [
    Conflict(
        "beta_schedule", ["squaredcos_cap_v2"], "dtype", [torch.float16], "it has no room for x0 at 1 / alpha"
    ),
    Conflict("trained_betas", [TRAINED], "num_train_timesteps", [997], "they are 1000 betas"),
    Conflict("steps", [1, 2, 3], "skip_prk_steps", [False], "Runge and Kutta take four: refused"),
    Conflict("steps", [1000], "steps_offset", [1], "no training step is above the last one"),
    Conflict("steps", [1000], "num_train_timesteps", [997], "there are fewer: refused"),
]


@pytest.mark.parametrize("name", ["PNDM", "IPNDM"])
def test_the_combinations_hold_every_pair(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table, conflicts = (PNDM, CONFLICTS) if name == "PNDM" else (IPNDM, [])
    check_pairs(name, table, all_pairs(table, conflicts), conflicts, capsys)


def compare(
    ours: Any, theirs: Any, oracle: Any, times: list[tuple[Tensor, Tensor]], option: dict[str, Any]
) -> None:
    """Step after step on the same random samples."""
    values = torch.Generator().manual_seed(option["steps"])
    dtype = option["dtype"]
    for i, (t, their_t) in enumerate(times):
        x, e = (torch.randn(option["shape"], generator=values).to(dtype) for _ in range(2))
        assert torch.equal(ours.scale_model_input(x, t), x)
        mine = ours.step(e, t, x, return_dict=False)
        their = theirs.step(e, their_t, x, return_dict=False)
        exact = oracle.step(e.double(), their_t, x.double(), return_dict=False)
        assert len(mine) == 1
        check(mine, their, exact, dtype, place=i)


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    ours, theirs = (getattr(package, name)(**options) for package in (difusores, diffusers))
    return ours, theirs


@pytest.mark.parametrize("option", all_pairs(PNDM, CONFLICTS), ids=str)
def test_pndm_agrees_with_diffusers(option: dict[str, Any]) -> None:
    ours, theirs = pair("PNDMScheduler", **{key: option[key] for key in PNDM if key not in RUN})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(option["steps"])
        assert scheduler.timesteps.dtype is torch.int64
    for key in ("timesteps", "prk_timesteps", "plms_timesteps"):
        assert getattr(ours, key).tolist() == getattr(theirs, key).tolist(), key
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    oracle = copy.deepcopy(theirs)
    oracle.alphas_cumprod = oracle.alphas_cumprod.double()
    oracle.final_alpha_cumprod = oracle.final_alpha_cumprod.double()
    begin = option["begin"]
    begin = begin if isinstance(begin, int) else int(len(ours.timesteps) * begin)
    times = list(zip(ours.timesteps[begin:], theirs.timesteps[begin:], strict=True))
    for _ in range(2):
        compare(ours, theirs, oracle, times[:40], option)
        assert ours.counter == theirs.counter
        plan = ours.plan(option["steps"], begin=begin) if times else None
        assert plan is None or [stage.time for stage in plan.stages] == [float(t) for t, _ in times]
        for scheduler in (ours, theirs, oracle):
            scheduler.set_timesteps(option["steps"])


@pytest.mark.parametrize("option", all_pairs(IPNDM), ids=str)
def test_ipndm_agrees_with_diffusers(option: dict[str, Any]) -> None:
    arguments = {key: option[key] for key in ("num_train_timesteps", "trained_betas")}
    ours, theirs = pair("IPNDMScheduler", **arguments)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(option["steps"])
    for key in ("timesteps", "betas", "alphas"):
        assert torch.equal(getattr(ours, key), getattr(theirs, key)), key
    assert ours.init_noise_sigma == theirs.init_noise_sigma and len(ours) == len(theirs)
    begin = option["begin"]
    begin = begin if isinstance(begin, int) else int(len(ours.timesteps) * begin)
    schedulers = (ours, theirs, copy.deepcopy(theirs))
    if not option["found"]:
        for scheduler in schedulers:
            scheduler.set_begin_index(begin)
    times = list(zip(ours.timesteps[begin:], theirs.timesteps[begin:], strict=True))[:40]
    compare(*schedulers, times, option)
    assert ours.step_index == theirs.step_index


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", ["PNDMScheduler", "IPNDMScheduler"])
def test_a_plan_samples_like_the_steps(name: str, skip: bool) -> None:
    scheduler = getattr(difusores, name)(**({"skip_prk_steps": skip} if name == "PNDMScheduler" else {}))
    scheduler.set_timesteps(7)
    x = start = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(x * 0.3 + float(t) / 1000, t, x).prev_sample
    result = scheduler.plan(7).run(lambda x, t: x * 0.3 + float(t) / 1000, start)
    torch.testing.assert_close(result, x, rtol=1e-12, atol=1e-12)


def test_bad_requests() -> None:
    x = torch.ones(1, 2)
    for steps in (1, 2, 3):
        ours, theirs = pair("PNDMScheduler")
        with pytest.raises(ValueError, match=r"from 4 on.*skip_prk_steps=True"):
            ours.set_timesteps(steps)
        with pytest.raises(ValueError):
            theirs.set_timesteps(steps)
    with pytest.raises(ValueError, match="set_timesteps"):
        difusores.PNDMScheduler().step(x, 3, x)
    scheduler = difusores.PNDMScheduler(prediction_type="sample", skip_prk_steps=True)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="'epsilon' or 'v_prediction', got 'sample'"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="from 1 on, got 0"):
        difusores.IPNDMScheduler().set_timesteps(0)


def test_pure_noise_says_nothing_about_the_image() -> None:
    scheduler = difusores.IPNDMScheduler()
    scheduler.set_timesteps(10)
    x = torch.randn(2, 5, dtype=torch.float64)
    result = scheduler.step(torch.full_like(x, 1e30), scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(result, x * scheduler.betas[1].double())
