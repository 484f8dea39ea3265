"""Schedulers whose step depends on its place in the run: every option crossed pairwise, against diffusers.

The oracle is diffusers itself, lifted to float64: the same code on float64 samples, with its noise levels
(which are float32) as float64. Both libraries get the same samples, outputs and generators at each step.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from gate import SHAPES, check, ulps_apart
from pairs import Conflict, all_pairs, check_pairs
from pairs import factors as factors_of
from torch import Tensor

import difusores
from difusores.schedulers.logsnr import LogSnrScheduler

diffusers = pytest.importorskip("diffusers")

TRAINED = torch.linspace(0.001, 0.05, 1000).tolist()
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
# Values for every option of a constructor. A scheduler with an option that is not listed here fails.
OPTIONS: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 997],
    "beta_start": [0.0001, 0.00085],
    "beta_end": [0.02, 0.012],
    "beta_schedule": SCHEDULES,
    "trained_betas": [None, TRAINED],
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "interpolation_type": ["linear", "log_linear"],
    "sigma_min": [None, 0.05],
    "sigma_max": [None, 60.0],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "timestep_type": ["discrete", "continuous"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "clip_sample": [False, True],
    "clip_sample_range": [1.0, 0.5],
    "grid": [None, "karras", "exponential", "beta", "lu", "flow"],
    "solver_order": [2, 1, 3],
    "predictor_order": [2, 1, 3, 4],
    "corrector_order": [2, 1, 3, 4],
    "tau_func": [None, partial(min, 0.7), partial(min, 0.0)],
    "lower_order_final": [True, False],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.9],
    "sample_max_value": [1.0, 1.5],
    "flow_shift": [1.0, 3.0],
    "use_dynamic_shifting": [False, True],
    "time_shift_type": ["exponential"],  # of most classes: others are refused
    "predict_x0": [True, False],
    "disable_corrector": [[], [0, 2]],
    "solver_p": [None],  # others are refused: the predictor is part of the step
    "shift_terminal": [None, 0.1],
    "euler_at_final": [False, True],
    "sigma_data": [0.5, 1.0],
    "sigma_schedule": ["karras", "exponential"],
    "rho": [7.0, 3.0],
    "noise_sampler_seed": [None, 5],
    "lambda_min_clipped": [-math.inf, -4.1],
    "variance_type": [None, "fixed_small"],
}
# What a class takes more or less of.
FLOWS = ["epsilon", "v_prediction", "sample", "flow_prediction"]
DPM: dict[str, list[Any]] = {
    "prediction_type": FLOWS,
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"],
    "solver_type": ["midpoint", "heun"],
    "variance_type": [None, "learned"],
}
EDM: dict[str, list[Any]] = {
    "sigma_min": [0.002, 0.3],
    "sigma_max": [80.0, 500],
    "prediction_type": ["epsilon", "v_prediction"],
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"],
    "solver_type": ["midpoint", "heun"],
}
OTHERS: dict[str, dict[str, list[Any]]] = {
    "EDMDPMSolverMultistepScheduler": EDM,
    "CosineDPMSolverMultistepScheduler": {**EDM, "solver_order": [2, 1]},
    "DPMSolverMultistepScheduler": DPM,
    # noise on the way to the noise: the deviation is the root of a negative number in diffusers
    "DPMSolverMultistepInverseScheduler": {**DPM, "algorithm_type": ["dpmsolver++", "dpmsolver"]},
    "DPMSolverSinglestepScheduler": {
        **DPM,
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver"],
    },
    "DEISMultistepScheduler": {
        "prediction_type": FLOWS,
        "algorithm_type": ["deis", "dpmsolver++"],
        "solver_type": ["logrho", "midpoint"],
    },
    "UniPCMultistepScheduler": {
        "prediction_type": FLOWS,
        "solver_order": [2, 1, 3, 4],
        "solver_type": ["bh2", "bh1", "midpoint"],
        "time_shift_type": ["exponential", "linear"],
    },
    "SASolverScheduler": {
        "prediction_type": FLOWS,
        "algorithm_type": ["data_prediction", "noise_prediction"],
    },
}
STEP_OPTIONS: dict[str, list[Any]] = {
    "s_churn": [0.0, 3.0, 1000.0],
    "s_tmin": [0.0, 0.5],
    "s_tmax": [math.inf, 5.0],
    "s_noise": [1.0, 1.01],
    "generator": ["one", "list", "global"],
    "order": [4, 1, 2, 3],
}
COMMON: dict[str, list[Any]] = {
    "steps": [10, 1, 2, 3, 5, 25, 50, 1000],
    "begin": ["start", "middle", "end"],
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "shape": SHAPES,
}
# Of a long run so many calls are compared, from where it begins.
LONGEST = 25
GIVEN = ("model_output", "timestep", "sample", "variance_noise")
GRIDS = {
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
}
# What diffusers does not implement.
WITHOUT_SAMPLE = {
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
}
# Whose sample is alpha * x0 + sigma * noise, of deviation 1 at all levels.
LOG_SNR = {
    name
    for name in vars(difusores.schedulers)
    if name.endswith("Scheduler") and issubclass(getattr(difusores.schedulers, name), LogSnrScheduler)
}
# Whose noise takes torchsde, in diffusers too; here both get the same in its place.
BROWNIAN = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}
MODULES = {
    "EulerDiscreteScheduler": "euler_discrete",
    "EulerAncestralDiscreteScheduler": "euler_ancestral_discrete",
    "HeunDiscreteScheduler": "heun_discrete",
    "LMSDiscreteScheduler": "lms_discrete",
    "KDPM2DiscreteScheduler": "k_dpm_2_discrete",
    "KDPM2AncestralDiscreteScheduler": "k_dpm_2_ancestral_discrete",
    "DEISMultistepScheduler": "deis_multistep",
    "UniPCMultistepScheduler": "unipc_multistep",
    "SASolverScheduler": "sasolver",
    "DPMSolverMultistepScheduler": "dpmsolver_multistep",
    "DPMSolverMultistepInverseScheduler": "dpmsolver_multistep_inverse",
    "DPMSolverSinglestepScheduler": "dpmsolver_singlestep",
    "EDMDPMSolverMultistepScheduler": "edm_dpmsolver_multistep",
    "CosineDPMSolverMultistepScheduler": "cosine_dpmsolver_multistep",
    "DPMSolverSDEScheduler": "dpmsolver_sde",
}


def factors(name: str) -> dict[str, list[Any]]:
    cls = getattr(difusores, name)
    values = OPTIONS | OTHERS.get(name, {}) | STEP_OPTIONS
    if name in WITHOUT_SAMPLE:
        values = values | {"prediction_type": ["epsilon", "v_prediction"]}
    grids = GRIDS.intersection(inspect.signature(cls.__init__).parameters)
    chosen = factors_of(cls, values, given=(*GIVEN, *GRIDS))
    if grids:
        chosen["grid"] = [kind for kind in OPTIONS["grid"] if kind is None or option_of(kind) in grids]
    return chosen | COMMON


def option_of(kind: str) -> str:
    return "use_lu_lambdas" if kind == "lu" else f"use_{kind}_sigmas"


OTHER_GRIDS = [kind for kind in OPTIONS["grid"] if kind != "flow"]
NOT_SPACED = [None, "lu", "flow"]
FLOW = ["flow_prediction"]
NO_NOISE = "diffusers has no noise of a flow"
LIMITED = "only a predicted x0 is limited: refused"
CONFLICTS = [
    Conflict("trained_betas", [TRAINED], "dtype", [torch.float16], "their levels of 400,000 overflow"),
    Conflict("trained_betas", [TRAINED], "num_train_timesteps", [997], "they are 1000 betas"),
    Conflict(
        "timestep_type", ["continuous"], "rescale_betas_zero_snr", [True], "the logarithm of 4096 is a level"
    ),
    Conflict("prediction_type", FLOW, "grid", OTHER_GRIDS, "there is no flow: refused"),
    Conflict("prediction_type", FLOW, "predict_x0", [False], NO_NOISE),
    Conflict("thresholding", [True], "predict_x0", [False], LIMITED),
    Conflict("thresholding", [True], "shape", SHAPES[:1], "diffusers limits x0 of three dimensions and more"),
    Conflict("shift_terminal", [0.1], "grid", OTHER_GRIDS, "no other levels are stretched: refused"),
    Conflict("shift_terminal", [0.1], "steps", [1], "diffusers stretches a level of 1 into NaN"),
    Conflict("use_dynamic_shifting", [True], "grid", OTHER_GRIDS, "no other levels are shifted: refused"),
    Conflict("sigma_min", [0.05], "grid", NOT_SPACED, "no levels lie between the two: refused"),
    Conflict("sigma_max", [60.0], "grid", NOT_SPACED, "no levels lie between the two: refused"),
    Conflict(
        "beta_schedule", ["squaredcos_cap_v2"], "dtype", [torch.float16], "it has no room for x0 at 1 / alpha"
    ),
]
"""Of every class that has both options; `test_where_diffusers_fails.py` and tests of refusals hold them."""
OF_DPM = [
    Conflict("variance_type", ["learned"], "prediction_type", FLOWS[1:], "diffusers splits noise alone"),
    Conflict(
        "variance_type", ["learned"], "shape", [SHAPES[0], SHAPES[3]], "diffusers splits three channels"
    ),
]
OF_NOISE = [
    Conflict("algorithm_type", ["dpmsolver", "sde-dpmsolver"], "final_sigmas_type", ["zero"], "refused"),
    Conflict("algorithm_type", ["dpmsolver", "sde-dpmsolver"], "prediction_type", FLOW, NO_NOISE),
    Conflict("algorithm_type", ["sde-dpmsolver"], "solver_order", [3], "diffusers has none"),
]
OWN_CONFLICTS: dict[str, list[Conflict]] = {
    "DPMSolverMultistepScheduler": [*OF_DPM, *OF_NOISE],
    "DPMSolverMultistepInverseScheduler": [*OF_DPM, OF_NOISE[1]],
    "DPMSolverSinglestepScheduler": [
        *OF_DPM,
        *OF_NOISE[:2],
        Conflict("algorithm_type", ["dpmsolver"], "thresholding", [True], "a NameError in diffusers"),
    ],
    "EDMDPMSolverMultistepScheduler": [
        Conflict("algorithm_type", ["sde-dpmsolver++"], "solver_order", [3], "refused")
    ],
    "SASolverScheduler": [
        Conflict("algorithm_type", ["noise_prediction"], "thresholding", [True], LIMITED),
        Conflict("algorithm_type", ["noise_prediction"], "prediction_type", FLOW, NO_NOISE),
    ],
    "UniPCMultistepScheduler": [
        Conflict(
            "lower_order_final", [False], "final_sigmas_type", ["zero"], "diffusers has NaN at the level 0"
        ),
    ],
}


def conflicts(name: str) -> list[Conflict]:
    return [*CONFLICTS, *OWN_CONFLICTS.get(name, [])]


def has_no_number(name: str, option: dict[str, Any], sigmas: Tensor, begin: int, i: int) -> bool:
    """Whether diffusers may divide 0 by 0 at step i, or take the root of a negative number."""
    if "Ancestral" in name:  # a grid that rises
        return bool(sigmas[i + 1] > sigmas[i])
    # differences over a step of length 0, or of what float32 leaves of it
    if (name in LOG_SNR or "DPMSolver" in name) and bool(((sigmas[1:] / sigmas[:-1] - 1).abs() < 1e-4).any()):
        return True
    if name != "UniPCMultistepScheduler" or i + 2 < len(sigmas):
        return False
    if sigmas[-1] == 0:
        return option["solver_type"] == "bh1" or not option["predict_x0"]
    order = min(option["solver_order"], i - begin + 1)
    return bool(sigmas[-1] == sigmas[-2]) and not option["lower_order_final"] and order > 2


def cancels(name: str, option: dict[str, Any]) -> bool:
    """Where the oracle is not good to 1e-6: for short steps the closed forms of order 4 lose ten digits.

    With diffusers' float32 tables they are off by 570, in float64 2e-6. In a run of predictions that are all
    1, which order 1 follows exactly, they are off by 1e-11 and ours by 1e-15.
    """
    highest = max(option.get("predictor_order", 0), option.get("corrector_order", 0))
    return name == "SASolverScheduler" and highest == 4 and option["steps"] == 1000


COMBINATIONS = [
    (name, i, option)
    for name in MODULES
    for i, option in enumerate(all_pairs(factors(name), conflicts(name)))
]


class _Lifted:
    """torch, but float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def lifted(name: str) -> Iterator[None]:
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "torch", _Lifted()))
        yield


def constructed(package: Any, name: str, option: dict[str, Any]) -> Any:
    known = inspect.signature(getattr(difusores, name).__init__).parameters
    arguments = {key: value for key, value in option.items() if key in known}
    if option.get("grid"):
        arguments[option_of(option["grid"])] = True
    cls = getattr(package, name)
    whole = cls.set_timesteps
    # what ours has no use for it takes from a configuration alone
    saved = package is difusores and str(option.get("variance_type")).startswith("fixed")
    # Some of diffusers begin with a run of all timesteps, which takes them most of a second.
    with mock.patch.object(cls, "set_timesteps", lambda scheduler, *_: whole(scheduler, 2)):
        return cls.from_config(arguments) if saved else cls(**arguments)


def generator_of(option: dict[str, Any], batch: int, seed: int) -> Any:
    kind = option.get("generator")
    torch.manual_seed(seed)
    if kind == "one":
        return torch.Generator().manual_seed(seed)
    if kind == "list":
        return [torch.Generator().manual_seed(seed + k) for k in range(batch)]
    return None


def begin_of(scheduler: Any, option: dict[str, Any]) -> int:
    """An index into timesteps at which a step begins."""
    steps = (len(scheduler.timesteps) + scheduler.order - 1) // scheduler.order
    return {"start": 0, "middle": steps // 2, "end": max(steps - 6, 0)}[option["begin"]] * scheduler.order


def step(scheduler: Any, option: dict[str, Any], e: Tensor, t: Tensor, x: Tensor, seed: int) -> Any:
    known = inspect.signature(scheduler.step).parameters
    arguments = {key: option[key] for key in STEP_OPTIONS if key in known and key != "generator"}
    torch.manual_seed(seed)
    if "generator" in known:
        arguments["generator"] = generator_of(option, len(x), seed)
    return scheduler.step(e, t, x, **arguments, return_dict=False)


@pytest.mark.parametrize("name", MODULES)
def test_the_combinations_hold_every_pair(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = [option for owner, _, option in COMBINATIONS if owner == name]
    check_pairs(name, factors(name), found, conflicts(name), capsys)


@pytest.mark.parametrize(
    ("name", "index", "option"), COMBINATIONS, ids=[f"{n}-{i}" for n, i, _ in COMBINATIONS]
)
def test_agrees_with_diffusers(name: str, index: int, option: dict[str, Any]) -> None:
    if name in BROWNIAN:
        pytest.importorskip("torchsde", reason="diffusers has the class only where torchsde is installed")
    ours, theirs = (constructed(package, name, option) for package in (difusores, diffusers))
    # leading timesteps leave out both ends
    steps = min(option["steps"], ours.config.num_train_timesteps - 1)
    shift = {"mu": 0.7} if option.get("use_dynamic_shifting") else {}
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps, **shift)
    # the ancestral midpoints of diffusers lose digits, up to NaN
    known = slice(None, None, 2 if name == "KDPM2AncestralDiscreteScheduler" else 1)
    torch.testing.assert_close(
        ours.timesteps[known].double(), theirs.timesteps[known].double(), rtol=1e-6, atol=1e-4
    )
    # diffusers' KDPM2 classes have float64 on some grids
    dtype = torch.float32 if name.startswith("KDPM2") else theirs.timesteps.dtype
    assert ours.timesteps.isfinite().all() and ours.timesteps.dtype is dtype
    assert ulps_apart(ours.sigmas, theirs.sigmas) <= 1
    assert torch.equal(torch.as_tensor(ours.init_noise_sigma), torch.as_tensor(theirs.init_noise_sigma))
    theirs.sigmas = ours.sigmas.clone()  # which may be an ulp from diffusers'; ours are those that are tried
    oracle = copy.deepcopy(theirs)
    lift_tables(oracle)
    dtype, shape = option["dtype"], option["shape"]
    values = torch.Generator().manual_seed(index)
    begin = begin_of(ours, option)
    seen = slice(begin, begin + LONGEST)
    times = zip(ours.timesteps[seen], theirs.timesteps[seen], strict=True)
    found = [i for i, t in enumerate(ours.timesteps) if t == ours.timesteps[begin]]
    if index % 2 or found[min(1, len(found) - 1)] != begin:
        for scheduler in (ours, theirs, oracle):
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            else:  # the inverse one of diffusers
                scheduler._step_index = begin
    for i, (t, their_t) in enumerate(times):
        level = 0.0 if name in LOG_SNR else float(theirs.sigmas[begin + i])
        x = (torch.randn(shape, generator=values) * math.sqrt(level**2 + 1)).to(dtype)
        channels = 2 * shape[1] if option.get("variance_type") == "learned" else shape[1]
        e = torch.randn((shape[0], channels, *shape[2:]), generator=values).to(dtype)
        scaled, expected = ours.scale_model_input(x, t), theirs.scale_model_input(x, their_t)
        assert scaled.dtype == expected.dtype
        torch.testing.assert_close(scaled, oracle.scale_model_input(x.double(), their_t).to(dtype))
        # the noise is drawn in the model output's dtype
        with (
            mock.patch("difusores.schedulers.base.draw_noise", drawn(dtype)),
            mock.patch("difusores.brownian.BrownianNoise", path(dtype)),
        ):
            mine = step(ours, option, e, t, x, i)
        with their_noise(name, dtype):
            their = step(theirs, option, e, their_t, x, i)
        with lifted(name), their_noise(name, dtype):
            exact = step(oracle, option, e.double(), their_t, x.double(), i)
        assert len(mine) == len(their)
        if has_no_number(name, option, theirs.sigmas, begin, begin + i) and not exact[0].isfinite().any():
            assert all(one.isfinite().all() for one in mine)
            continue
        check(mine, their, exact, dtype, place=i, within=1e-5 if cancels(name, option) else 1e-6)
    assert ours.step_index == theirs.step_index


def test_a_run_begins_at_its_first_timestep_though_others_are_equal() -> None:
    """diffusers begins at the second one, and its levels end before the run."""
    options = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    for name in ("KDPM2DiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        scheduler = getattr(difusores, name)(**options)
        results = []
        for begin in (None, 0):
            scheduler.set_timesteps(12)
            assert scheduler.timesteps.tolist().count(scheduler.timesteps[0]) > 1
            if begin is not None:
                scheduler.set_begin_index(begin)
            x = torch.ones(1, 2, 3)
            for t in scheduler.timesteps:
                x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
            results.append(x)
        assert torch.equal(*results) and results[0].isfinite().all()


def test_a_step_can_be_taken_again() -> None:
    """As pipelines of diffusers do that assign `_step_index`."""
    ours, theirs = difusores.EDMEulerScheduler(), diffusers.EDMEulerScheduler()
    values = torch.Generator().manual_seed(0)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    for t in ours.timesteps:
        x, e = torch.randn(2, 1, 2, 3, generator=values)
        for scheduler in (ours, theirs):
            scheduler.scale_model_input(x, t)
        results = []
        for _ in range(2):
            results = [scheduler.step(e, t, x)[0] for scheduler in (ours, theirs)]
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
            for scheduler in (ours, theirs):
                scheduler._step_index -= 1
        for scheduler in (ours, theirs):
            scheduler._step_index += 1
    assert ours.step_index == theirs.step_index == 6
    for index in (2, None, 4):
        for scheduler in (ours, theirs):
            scheduler._step_index = index
        t = ours.timesteps[3 if index is None else index]
        results = [scheduler.step(e, t, x)[0] for scheduler in (ours, theirs)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        assert ours.step_index == theirs.step_index


def lift_tables(oracle: Any) -> None:
    """The noise levels as float64, and what follows from them computed again."""
    sigmas = oracle.sigmas = oracle.sigmas.double()
    if not hasattr(oracle, "sigmas_interpol"):
        return
    single = torch.cat([sigmas[:1], sigmas[1::2]])[: len(oracle.timesteps) // 2 + 2]
    if hasattr(oracle, "sigmas_up"):
        after = torch.cat([single[1:], single.new_zeros(1)])
        up = (after**2 * (single**2 - after**2) / single**2) ** 0.5
        down = after**2 / single  # (after² - up²)^½, which cancels
        up[-1], down[-1] = 0.0, 0.0
        middle = (single.log().lerp(down.log(), 0.5)).exp()
        middle[-2:] = 0.0
        tables = {"sigmas_interpol": middle, "sigmas_up": up, "sigmas_down": down}
    else:
        tables = {"sigmas_interpol": single.log().lerp(single.roll(1).log(), 0.5).exp()}
    for key, table in tables.items():
        setattr(oracle, key, torch.cat([table[:1], table[1:].repeat_interleave(2), table[-1:]]))


def drawn(dtype: torch.dtype) -> Any:
    def draw(shape: Any, generator: Any, device: Any, _: Any, out: Any = None) -> Tensor:
        return NOISE.randn(shape, generator, dtype)

    return draw


def path(dtype: torch.dtype) -> Any:
    """In place of a Brownian path."""

    def begin(like: Tensor, *_: Any, **__: Any) -> Any:
        return lambda *levels: NOISE.randn(like.shape, None, dtype)

    return begin


def randn(shape: Any, generator: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(generator, list):
        return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in generator])
    return torch.randn(tuple(shape), generator=generator, dtype=dtype)


NOISE = SimpleNamespace(randn=randn)


@contextmanager
def their_noise(name: str, dtype: torch.dtype) -> Iterator[None]:
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    if hasattr(module, "BrownianTreeNoiseSampler"):
        with mock.patch.object(module, "BrownianTreeNoiseSampler", path(dtype)):
            yield
        return
    if not hasattr(module, "randn_tensor"):
        yield
        return

    def draw(shape: Any, generator: Any = None, device: Any = None, dtype_: Any = None, **_: Any) -> Tensor:
        return NOISE.randn(shape, generator, dtype)

    with mock.patch.object(module, "randn_tensor", lambda shape, generator=None, **_: draw(shape, generator)):
        yield
