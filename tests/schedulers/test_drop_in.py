"""What users of diffusers find on every class: methods, state in a run, copies, files, given grids."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_by_timestep import PEERS, peer
from torch import Tensor

import difusores

diffusers = pytest.importorskip("diffusers")

NAMES = [name for name in difusores.schedulers.__all__ if name.endswith("Scheduler")]
BROWNIAN = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}
# Their steps have other names or other arguments.
OTHER_LOOPS = {"KarrasVeScheduler", "RePaintScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler"}
STEPPED = [name for name in NAMES if name not in OTHER_LOOPS]
# Parts of a step of diffusers, which is one row here, and what is for code that a Hub repository holds.
PARTS = ("convert_model_output", "_update", "get_coefficients", "lagrange_", "register_for_auto_class")
# What a step of diffusers remembers there.
REMEMBERED = {
    *("model_outputs", "lower_order_nums", "this_order", "this_predictor_order", "this_corrector_order"),
    *("last_sample", "last_noise", "timestep_list", "sample", "prev_derivative", "dt", "derivatives", "ets"),
    *("cur_model_output", "cur_sample", "mid_point_sigma", "noise_sampler", "sigma_data"),
    *("one", "log_sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down"),
}
X = torch.randn(40, 2, 2, 3, 4, generator=torch.Generator().manual_seed(0))


def their_class(name: str) -> Any:
    if name in BROWNIAN:
        pytest.importorskip("torchsde", reason="diffusers has the class only where torchsde is installed")
    return peer(name) if name in PEERS else getattr(diffusers, name)


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    return getattr(difusores, name)(**options), their_class(name)(**options)


def parameters(function: Any) -> list[tuple[str, Any]]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        (p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind not in kinds
    ]


def step(scheduler: Any, t: Any, i: int) -> Tensor:
    options: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(i)
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(X[i], t)
    result: Tensor = scheduler.step(X[i + 1], t, X[i], **options, return_dict=False)[0]
    return result


@pytest.mark.parametrize("name", NAMES)
def test_methods_and_class_attributes_are_those_of_diffusers(name: str) -> None:
    ours, theirs = getattr(difusores, name), their_class(name)
    for key in dir(theirs):
        if key.startswith("_") or any(part in key for part in PARTS):
            continue
        assert hasattr(ours, key), key
        mine, their = inspect.getattr_static(ours, key), inspect.getattr_static(theirs, key)
        if isinstance(their, property):
            assert isinstance(mine, property), key
        elif not callable(getattr(theirs, key)):
            assert mine == their or key == "ignore_for_config", key
        elif key != "from_pretrained":
            assert parameters(getattr(ours, key)) == parameters(getattr(theirs, key)), key


def same_state(ours: Any, theirs: Any) -> None:
    for key, their in vars(theirs).items():
        if key.startswith("_") or key in REMEMBERED or callable(their):
            continue
        mine = ours.config[key] if key in ours.config else getattr(ours, key)
        if isinstance(their, Tensor):
            assert mine.dtype is their.dtype and mine.device == their.device, key
            torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-4 if key == "timesteps" else 1e-6)
        elif isinstance(their, np.ndarray):
            assert mine.tolist() == their.tolist(), key
        else:
            assert mine == their, key
    for key in ("step_index", "begin_index", "order", "num_inference_steps"):
        assert getattr(ours, key, None) == getattr(theirs, key, 1 if key == "order" else None), key


@pytest.mark.parametrize("name", STEPPED)
def test_the_state_through_a_run_is_that_of_diffusers(name: str) -> None:
    schedulers = pair(name)
    for steps in (9, 6):  # the first run is left in the middle
        for scheduler in schedulers:
            scheduler.set_timesteps(steps)
        same_state(*schedulers)
        calls = list(zip(*(scheduler.timesteps for scheduler in schedulers), strict=True))
        for i, times in enumerate(calls[: 3 if steps == 9 else None]):
            results = [step(s, t, i) for s, t in zip(schedulers, times, strict=True)]
            if name not in BROWNIAN:
                torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
            if i < len(calls) - 1:
                same_state(*schedulers)


CLONES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))]


@pytest.mark.parametrize("clone", CLONES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", STEPPED)
def test_a_copy_goes_on_in_the_middle_of_a_run(name: str, clone: Callable[[Any], Any]) -> None:
    if name in BROWNIAN:
        pytest.importorskip("torchsde", reason="Brownian noise is torchsde's")
    scheduler = getattr(difusores, name)()
    scheduler.set_timesteps(6)
    for i, t in enumerate(scheduler.timesteps[:3]):
        step(scheduler, t, i)
    twin = clone(scheduler)
    for i in range(3, len(scheduler.timesteps)):
        results = [step(s, s.timesteps[i], i) for s in (scheduler, twin)]
        assert torch.equal(*results)


FORMS: list[Callable[[Any], Any]] = [
    lambda t: t.clone(),
    float,
    int,
    lambda t: t.reshape(1),
    lambda t: t.double(),
]


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("form", FORMS, ids=["clone", "float", "int", "one element", "float64"])
def test_a_timestep_may_come_in_any_form(name: str, form: Callable[[Any], Any]) -> None:
    their_class(name)
    for begin in (0, 2):
        results = []
        for given in (lambda t: t, form):
            scheduler = getattr(difusores, name)(
                **({"noise_sampler_seed": 3} if name == "DPMSolverSDEScheduler" else {})
            )
            scheduler.set_timesteps(6)
            kind = float if given is int and scheduler.timesteps.is_floating_point() else given
            t = kind(scheduler.timesteps[begin])
            results.append(step(scheduler, t, 0))
        assert torch.equal(*results)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_comes_back_from_another_class(name: str) -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    configs = []
    for package in (difusores, diffusers):
        cls = getattr(difusores, name) if package is difusores else their_class(name)
        source = {**cls().config, "unknown": 3}
        there = package.DPMSolverMultistepScheduler.from_config(source)
        back = cls.from_config(there.config)
        configs += [
            {key: value for key, value in config.items() if key != "tau_func" and key[0] != "_"}
            for config in (there.config, back.config)
        ]
    assert configs[:2] == configs[2:] and configs[1]["unknown"] == 3


GIVEN: list[tuple[str, dict[str, Any], dict[str, list[float]]]] = [
    ("EulerDiscreteScheduler", {}, {"timesteps": [999, 900, 500, 3]}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, {"timesteps": [999, 500, 3]}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, {"timesteps": [700, 3]}),
    ("EulerDiscreteScheduler", {}, {"sigmas": [14.6, 7.0, 1.0, 0.1, 0.0]}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"sigmas": [0.1, 7.0, 500.0, 0.0]}),
    (
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        {"sigmas": [14.6, 0.1, 0.0]},
    ),
    ("HeunDiscreteScheduler", {}, {"timesteps": [999, 900, 500, 3]}),
    ("HeunDiscreteScheduler", {"timestep_spacing": "trailing"}, {"timesteps": [900, 3]}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, {"timesteps": [999, 900, 500, 3]}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {"timesteps": [900, 500]}),
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, {"timesteps": [999, 900, 500, 3]}),
]


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize(("name", "options", "given"), GIVEN, ids=str)
def test_given_timesteps_and_levels(
    name: str, options: dict[str, Any], given: dict[str, list[float]], form: Callable[[Any], Any]
) -> None:
    ours, theirs = pair(name, **options)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**{key: form(values) for key, values in given.items()})
    same_state(ours, theirs)
    for i, times in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        results = [step(s, t, i) for s, t in zip((ours, theirs), times, strict=True)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    plan = ours.plan(**{key: form(values) for key, values in given.items()})
    torch.testing.assert_close(plan.times(), ours.timesteps.to(plan.times().dtype))


def test_the_velocity_at_real_timesteps() -> None:
    """diffusers reads alphas_cumprod at the place of the timestep in the run."""
    scheduler = difusores.EulerDiscreteScheduler()
    whole = torch.tensor([900, 3])
    expected = scheduler.get_velocity(X[0], X[1], whole)
    torch.testing.assert_close(scheduler.get_velocity(X[0], X[1], whole.float()), expected)
    scheduler.set_timesteps(7)
    level = float(scheduler.sigmas[3])
    velocity = (X[1] - level * X[0]) / math.sqrt(level**2 + 1)
    torch.testing.assert_close(scheduler.get_velocity(X[0], X[1], scheduler.timesteps[3:4]), velocity)
    with pytest.raises(ValueError, match="a tensor of timesteps, got 3"):
        scheduler.get_velocity(X[0], X[1], 3)  # type: ignore[arg-type]


def test_an_old_name_of_an_option() -> None:
    for value in (False, True):
        with pytest.warns(FutureWarning, match="set_alpha_to_zero.* is deprecated"):
            ours, theirs = pair("DDIMInverseScheduler", set_alpha_to_zero=value)
        assert float(ours.initial_alpha_cumprod) == pytest.approx(float(theirs.initial_alpha_cumprod))
        assert ours.config.set_alpha_to_one is theirs.config.set_alpha_to_one is True
    with pytest.raises(TypeError, match="has no option nonsense"):
        difusores.DDIMInverseScheduler(nonsense=1)


def test_parts_of_pndm() -> None:
    whole, parts = difusores.PNDMScheduler(), difusores.PNDMScheduler()
    for scheduler in (whole, parts):
        scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match="call 1 of this run is a Runge-Kutta stage"):
        parts.step_plms(X[1], parts.timesteps[0], X[0])
    for i, t in enumerate(whole.timesteps):
        method = parts.step_prk if i < 12 else parts.step_plms
        assert torch.equal(method(X[i + 1], t, X[i])[0], step(whole, t, i))
    with pytest.raises(ValueError, match="no Runge-Kutta stage"):
        parts.step_prk(X[1], parts.timesteps[-1], X[0])


def test_coefficients_of_lms() -> None:
    pytest.importorskip("scipy", reason="diffusers integrates with it")
    ours, theirs = pair("LMSDiscreteScheduler")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    for order, t, current in ((1, 0, 0), (3, 4, 2), (4, 3, 1), (4, 5, 0)):
        expected = theirs.get_lms_coefficient(order, t, current)
        assert ours.get_lms_coefficient(order, t, current) == pytest.approx(expected, rel=1e-4)


def test_uploading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that huggingface_hub is given, and what it is told."""
    hub = pytest.importorskip("huggingface_hub")
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            seen.update(options)
            return type("Repository", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, folder_path: str, **options: Any) -> str:
            seen.update(options, files=sorted(path.name for path in Path(folder_path).iterdir()))
            return "the commit"

    monkeypatch.setattr(hub, "HfApi", Api)
    commit = difusores.DDIMScheduler().push_to_hub("mine", private=True, token="t", subfolder="scheduler")
    assert commit == "the commit"
    assert seen.pop("files") == ["scheduler_config.json"]
    assert seen == {
        "token": "t",
        "private": True,
        "exist_ok": True,
        "repo_id": "me/mine",
        "create_pr": False,
        "path_in_repo": "scheduler",
        "commit_message": "Upload DDIMScheduler",
    }
