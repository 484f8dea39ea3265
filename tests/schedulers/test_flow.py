"""Schedulers of flow models against diffusers lifted to float64: every option crossed pairwise."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from gate import SHAPES, check, ulps_apart
from pairs import Conflict, all_pairs, check_pairs, factors
from torch import Tensor

import difusores

diffusers = pytest.importorskip("diffusers")

EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
MODULES = {EULER: "flow_match_euler_discrete", HEUN: "flow_match_heun_discrete"}
# Values for every option of the constructors and of step. A scheduler with another one fails.
OPTIONS: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 997],
    "shift": [1.0, 3.0, 0.4],
    "use_dynamic_shifting": [False, True],
    "invert_sigmas": [False, True],
    "shift_terminal": [None, 0.0, 0.1],
    "time_shift_type": ["exponential", "linear"],
    "stochastic_sampling": [False, True],
    # for pipelines, which read them
    "base_shift": [0.5],
    "max_shift": [1.15],
    "base_image_seq_len": [256],
    "max_image_seq_len": [4096],
    "s_churn": [0.0, 3.0, 1000.0],
    "s_tmin": [0.0, 0.5],
    "s_tmax": [math.inf, 0.8],
    "s_noise": [1.0, 1.01],
    "generator": ["one", "list", "global"],
}
NO_CHURN: dict[str, list[Any]] = {"s_churn": [0.0], "s_tmin": [0.0], "s_tmax": [math.inf], "s_noise": [1.0]}
RUN: dict[str, list[Any]] = {
    "steps": [10, 1, 2, 3, 5, 25, 50, 1000],
    "begin": [0, 0.5, 0.98],
    "found": [True, False],
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "shape": SHAPES,
}
SET: dict[str, list[Any]] = {
    "grid": [None, "karras", "exponential", "beta"],
    "mu": [0.7, 1.15],
    "given": ["steps", "sigmas", "timesteps", "both", "all"],
}
GRIDS = [f"use_{kind}_sigmas" for kind in SET["grid"][1:]]
GIVEN = ("model_output", "timestep", "sample", "per_token_timesteps", *GRIDS)
TABLES = {
    EULER: factors(difusores.FlowMatchEulerDiscreteScheduler, OPTIONS | NO_CHURN, given=GIVEN) | SET | RUN,
    HEUN: factors(difusores.FlowMatchHeunDiscreteScheduler, OPTIONS, given=GIVEN) | RUN,
}
CONFLICTS = {
    EULER: [Conflict("shift_terminal", [0.1], "steps", [1], "diffusers stretches a level of 1 into NaN")],
    HEUN: [],
}
COMBINATIONS = [
    (name, i, option) for name in MODULES for i, option in enumerate(all_pairs(TABLES[name], CONFLICTS[name]))
]


@pytest.mark.parametrize("name", MODULES)
def test_the_combinations_hold_every_pair(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = [option for owner, _, option in COMBINATIONS if owner == name]
    check_pairs(name, TABLES[name], found, CONFLICTS[name], capsys)


def constructed(package: Any, name: str, option: dict[str, Any]) -> Any:
    known = inspect.signature(getattr(difusores, name).__init__).parameters
    arguments = {key: value for key, value in option.items() if key in known}
    if option.get("grid"):
        arguments[f"use_{option['grid']}_sigmas"] = True
    return getattr(package, name)(**arguments)


def arguments_of(name: str, option: dict[str, Any]) -> dict[str, Any]:
    """Of set_timesteps."""
    steps = option["steps"]
    if name == HEUN:
        return {"num_inference_steps": steps}
    chosen: dict[str, Any] = {"mu": option["mu"]}
    if option["given"] in ("steps", "all"):
        chosen["num_inference_steps"] = steps
    if option["given"] in ("sigmas", "both", "all"):
        chosen["sigmas"] = np.linspace(1.0, 0.1, steps).tolist()
    if option["given"] in ("timesteps", "both", "all"):
        chosen["timesteps"] = np.linspace(900.0, 50.0, steps).tolist()
    return chosen


def randn(shape: Any, generator: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(generator, list):
        return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in generator])
    return torch.randn(tuple(shape), generator=generator, dtype=dtype)


def generator_of(option: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    if option["generator"] == "list":
        return [torch.Generator().manual_seed(seed + k) for k in range(option["shape"][0])]
    return torch.Generator().manual_seed(seed) if option["generator"] == "one" else None


class Lifted:
    """torch, but float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def one_step(
    name: str, scheduler: Any, option: dict[str, Any], e: Tensor, t: Tensor, x: Tensor, seed: int
) -> Tensor:
    """A step; of diffusers with the noise that both libraries draw, in the dtype that it has there."""
    extra = {key: option[key] for key in ("s_churn", "s_tmin", "s_tmax", "s_noise") if key in option}
    module = f"diffusers.schedulers.scheduling_{MODULES[name]}"
    drawn = torch.float32 if name == EULER else option["dtype"]

    def noise(shape: Any, generator: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        if x.dtype == option["dtype"]:
            # diffusers computes in float32
            assert dtype is drawn or option["dtype"] is torch.float64
        return randn(shape, generator, drawn)

    with ExitStack() as stack:
        if type(scheduler).__module__.startswith("diffusers"):
            stack.enter_context(mock.patch(f"{module}.randn_tensor", noise))
            if x.dtype is torch.float64:
                stack.enter_context(mock.patch(f"{module}.torch", Lifted()))
        result = scheduler.step(e, t, x, **extra, generator=generator_of(option, seed), return_dict=False)
    assert len(result) == 1
    return result[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "index", "option"), COMBINATIONS, ids=[f"{name}-{i}" for name, i, _ in COMBINATIONS]
)
def test_agrees_with_diffusers(name: str, index: int, option: dict[str, Any]) -> None:
    ours, theirs = (constructed(package, name, option) for package in (difusores, diffusers))
    for key in ("timesteps", "sigmas"):
        assert torch.equal(getattr(ours, key), getattr(theirs, key)), key
    assert (ours.sigma_min, ours.sigma_max) == (theirs.sigma_min, theirs.sigma_max)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**arguments_of(name, option))
    for key in ("timesteps", "sigmas"):
        mine, their = getattr(ours, key), getattr(theirs, key)
        assert mine.dtype is their.dtype is torch.float32
        assert ulps_apart(mine, their) <= 1
    assert ours.num_inference_steps == theirs.num_inference_steps == option["steps"]
    theirs.sigmas = ours.sigmas.clone()  # which may be an ulp from diffusers'; ours are those that are tried
    oracle = copy.deepcopy(theirs)
    oracle.sigmas = oracle.sigmas.double()
    dtype, shape = option["dtype"], option["shape"]
    begin = int(option["steps"] * option["begin"]) * ours.order if option["begin"] else 0
    if not option["found"] or len(set(theirs.timesteps.tolist())) * ours.order < len(theirs.timesteps):
        for scheduler in (ours, theirs, oracle):
            scheduler.set_begin_index(begin)
    values = torch.Generator().manual_seed(index)
    x, noise = (torch.randn(shape, generator=values).to(dtype) for _ in range(2))
    times = theirs.timesteps[begin : begin + 1] if name == EULER else theirs.timesteps[begin]
    mixed, their_mixed = (scheduler.scale_noise(x, times, noise) for scheduler in (ours, theirs))
    exact = oracle.scale_noise(x.double(), times, noise.double())
    assert mixed.dtype is their_mixed.dtype is dtype
    torch.testing.assert_close(mixed, exact.to(dtype))
    seen = slice(begin, begin + 25)  # of a long run
    for i, (t, their_t) in enumerate(zip(ours.timesteps[seen], theirs.timesteps[seen], strict=True)):
        x, e = (torch.randn(shape, generator=values).to(dtype) for _ in range(2))
        mine = one_step(name, ours, option, e, t, x, i)
        their = one_step(name, theirs, option, e, their_t, x, i)
        right = one_step(name, oracle, option, e.double(), their_t, x.double(), i)
        check((mine,), (their,), (right,), dtype, place=i)
        assert getattr(ours, "state_in_first_order", None) == getattr(theirs, "state_in_first_order", None)
    assert ours.step_index == theirs.step_index


@pytest.mark.parametrize("name", MODULES)
def test_a_plan_samples_like_the_steps(name: str) -> None:
    scheduler = getattr(difusores, name)(shift=2.0)
    scheduler.set_timesteps(7)
    start = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for begin in (0, 2):
        x = start
        scheduler.set_timesteps(7)
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(x * 0.3 + float(t) / 1000, t, x).prev_sample
        plan = scheduler.plan(7, begin=begin)
        result = plan.run(lambda x, t: x * 0.3 + float(t) / 1000, start)
        torch.testing.assert_close(result, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_a_flow_between_two_points_is_followed_exactly(name: str) -> None:
    scheduler = getattr(difusores, name)()
    x0, noise = (
        torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(2)
    )
    assert torch.allclose(scheduler.plan(5).run(lambda x, t: noise - x0, noise), x0, atol=1e-12)


def test_inverted_levels_lead_to_the_noise() -> None:
    scheduler = difusores.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    x0, noise = torch.randn(2, 2, 3, dtype=torch.float64)
    assert torch.allclose(scheduler.plan(5).run(lambda x, t: noise - x0, x0), noise, atol=1e-6)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_at_levels_of_their_own(stochastic: bool, dtype: torch.dtype) -> None:
    values = torch.Generator().manual_seed(3)
    ours, theirs = (
        getattr(package, EULER)(stochastic_sampling=stochastic) for package in (difusores, diffusers)
    )
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    for t, their_t in zip(ours.timesteps, theirs.timesteps, strict=True):
        x, e = (torch.randn(2, 4, 3, generator=values).to(dtype) for _ in range(2))
        tokens = torch.minimum(torch.rand(2, 4, generator=values) * 1000, t)
        tokens[0, 0] = t
        mine, their = (
            scheduler.step(
                e, time, x, per_token_timesteps=tokens, generator=torch.Generator().manual_seed(5)
            ).prev_sample
            for scheduler, time in ((ours, t), (theirs, their_t))
        )
        assert mine.dtype is their.dtype
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5)
    assert ours.step_index == theirs.step_index == 6


def test_the_shift_can_be_changed() -> None:
    ours, theirs = (getattr(package, EULER)(shift=3.0) for package in (difusores, diffusers))
    for scheduler in (ours, theirs):
        scheduler.set_shift(1.5)
        scheduler.set_timesteps(8)
        assert scheduler.shift == 1.5
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-7, atol=0)
    levels = torch.tensor([0.9, 0.5, 0.2])
    torch.testing.assert_close(ours.time_shift(0.7, 2.0, levels), theirs.time_shift(0.7, 2.0, levels))


def test_bad_requests(caplog: pytest.LogCaptureFixture) -> None:
    Euler = difusores.FlowMatchEulerDiscreteScheduler
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"only one of.*karras_sigmas and .*|only one of.*karras and"):
        Euler(use_karras_sigmas=True, use_beta_sigmas=True)
    with pytest.raises(ValueError, match="'exponential' or 'linear', got 'cubic'"):
        Euler(time_shift_type="cubic")
    with pytest.raises(ValueError, match="shift must be above 0, got 0"):
        Euler(shift=0)
    for arguments in (
        {},
        {"num_inference_steps": 3, "sigmas": [1.0]},
        {"sigmas": [1.0], "timesteps": [1, 2]},
    ):
        with pytest.raises(ValueError, match="agree on the number of steps, got"):
            Euler().set_timesteps(**arguments)
    for scheduler in (Euler(), difusores.FlowMatchHeunDiscreteScheduler()):
        with pytest.raises(ValueError, match="from 1 on, got 0"):
            scheduler.set_timesteps(0)
        scheduler.set_timesteps(2)
        with pytest.raises(ValueError, match="integer"):
            scheduler.step(x, 1000, x)
        with pytest.raises(IndexError, match="not one of timesteps"):
            scheduler.step(x, 3.25, x)
    with pytest.raises(ValueError, match="empty"):
        Euler().set_timesteps(sigmas=[])
    with pytest.raises(ValueError, match="needs mu"):
        Euler(use_dynamic_shifting=True).set_timesteps(3)
    with pytest.raises(ValueError, match="mu must be above 0"):
        Euler(use_dynamic_shifting=True, time_shift_type="linear").set_timesteps(3, mu=-1.0)
    with pytest.raises(ValueError, match="shift_terminal must lie from 0 to below 1, got 1"):
        Euler(shift_terminal=1.0).set_timesteps(3)
    with pytest.raises(ValueError, match="lowest level above 0, got 0"):
        Euler(use_exponential_sigmas=True).set_timesteps(sigmas=[1.0, 0.0])
    scheduler = Euler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"adds no churn, got s_churn=0\.5.*stochastic_sampling=True"):
        scheduler.step(x, scheduler.timesteps[0], x, s_churn=0.5)
    with pytest.raises(ValueError, match="needs the noise"):
        scheduler.scale_noise(x, scheduler.timesteps[:1])
    with caplog.at_level(logging.WARNING, logger="difusores"):
        scheduler.set_timesteps(timesteps=[900.0, 100.0])
    assert "timesteps without sigmas" in caplog.text
    with pytest.raises(ValueError, match="within a step of two"):
        difusores.FlowMatchHeunDiscreteScheduler().plan(3, begin=1)


def test_one_step_from_pure_noise_cannot_be_stretched() -> None:
    for inverted in (False, True):
        options = {"shift_terminal": 0.1, "invert_sigmas": inverted}
        ours, theirs = (getattr(package, EULER)(**options) for package in (difusores, diffusers))
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(1)
        assert theirs.sigmas.isnan().any()
        assert ours.sigmas.tolist() == ([0.0, 1.0] if inverted else [1.0, 0.0])


def test_a_level_of_zero_can_be_shifted() -> None:
    scheduler = difusores.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.0], mu=0.0)
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0, 0.0]
