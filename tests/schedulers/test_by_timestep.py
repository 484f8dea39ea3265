"""Schedulers whose step depends on the timestep, or has parts of its own: options crossed, against diffusers.

The oracle is diffusers itself with its tables, which are float32, as float64. Both libraries get the same
samples, outputs and generators at each step.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gate import SHAPES, check
from pairs import Conflict, all_pairs, check_pairs
from pairs import factors as factors_of
from torch import Tensor

import difusores
from difusores import solvers
from difusores.ops.scheduler_step import COLUMNS, MODE, W
from difusores.solvers import Prediction

diffusers = pytest.importorskip("diffusers")

TRAINED = torch.linspace(0.001, 0.05, 1000).tolist()
OPTIONS: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 997],
    "beta_start": [0.0001, 0.00085],
    "beta_end": [0.02, 0.012],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [None, TRAINED],
    "variance_type": [
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned",
        "learned_range",
    ],
    "clip_sample": [True, False],
    "clip_sample_range": [1.0, 0.5],
    "set_alpha_to_one": [True, False],
    "steps_offset": [0, 1],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.9],
    "sample_max_value": [1.0, 1.5],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "rescale_betas_zero_snr": [False, True],
    "original_inference_steps": [50, 100],
    "timestep_scaling": [10.0, 1.0],
    "sigma_min": [0.002, 0.01],
    "sigma_max": [80.0, 50.0],
    "sigma_data": [0.5, 1.0],
    "s_noise": [1.0, 1.1],
    "rho": [7.0, 5.0],
    "clip_denoised": [True, False],
    "sigma_schedule": ["karras", "exponential"],
    "final_sigmas_type": ["zero", "sigma_min"],
}
DISTILLED: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 997],
    "beta_schedule": ["scaled_linear", "linear", "squaredcos_cap_v2"],
    "set": [
        {"num_inference_steps": 4},
        {"num_inference_steps": 1},
        {"num_inference_steps": 50},
        {"num_inference_steps": 997, "original_inference_steps": 997},
        {"num_inference_steps": 8, "strength": 0.45},
        {"num_inference_steps": 7, "original_inference_steps": 20},
        {"num_inference_steps": 7, "original_inference_steps": 100, "strength": 0.5},
        {"timesteps": [979, 700, 259, 19]},
        {"timesteps": [979, 700, 259, 19], "strength": 0.45},
    ],
    "begin": [0, 0.5, 0.98],
}
# What a class takes less of.
NARROWER: dict[str, dict[str, list[Any]]] = {
    "DDIMInverseScheduler": {"timestep_spacing": ["leading", "trailing"]},
    "UnCLIPScheduler": {
        "beta_schedule": ["squaredcos_cap_v2"],
        "variance_type": ["fixed_small_log", "learned_range"],
        "prediction_type": ["epsilon", "sample"],
        "steps": [2, 3, 10, 25, 50, 1000],
    },
    "LCMScheduler": DISTILLED,
    "TCDScheduler": {**DISTILLED, "eta": [0.3, 0.0, 0.7, 1.0]},
    "CMStochasticIterativeScheduler": {
        "num_train_timesteps": [40, 1000],
        "set": [{"num_inference_steps": n} for n in (1, 2, 7, 40, 1000)] + [{"timesteps": [22, 5, 0]}],
        "begin": [0, 0.5, 0.98],
    },
    "EDMEulerScheduler": {
        "prediction_type": ["epsilon", "v_prediction"],
        "begin": [0, 0.5, 0.98],
    },
}
STEP_OPTIONS: dict[str, list[Any]] = {
    "eta": [0.0, 0.5, 1.0],
    "use_clipped_model_output": [False, True],
    "s_churn": [0.0, 3.0, 1000.0],
    "s_tmin": [0.0, 0.5],
    "s_tmax": [math.inf, 5.0],
    "s_noise": [1.0, 1.01],
    "pred_original_sample": [None, "given"],
    "generator": ["one", "list", "global"],
}
COMMON: dict[str, list[Any]] = {
    "steps": [10, 1, 2, 5, 25, 50, 1000],
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "shape": SHAPES,
    "method": ["step"],
}
# What is given by the test itself.
GIVEN = ("model_output", "timestep", "sample", "prev_timestep", "variance_noise")
GRIDS: dict[str, dict[str, Any]] = {
    "DDPMParallelScheduler": {"timesteps": [990, 800, 420, 400, 60]},
    "EDMEulerScheduler": {"num_inference_steps": 4, "sigmas": torch.tensor([0.0, 0.3, 0.6, 1.0])},
}
"""Grids of a caller's own, in place of a number of steps."""
CONFLICTS = [
    Conflict(
        "sigma_schedule",
        ["exponential"],
        "steps",
        [GRIDS["EDMEulerScheduler"]],
        "diffusers does not read the places",
    ),
    Conflict("trained_betas", [TRAINED], "num_train_timesteps", [997], "they are 1000 betas"),
    Conflict("thresholding", [True], "shape", SHAPES[:1], "diffusers limits x0 of three dimensions and more"),
]
MODULES = {
    "DDIMInverseScheduler": "ddim_inverse",
    "DDIMParallelScheduler": "ddim_parallel",
    "DDPMParallelScheduler": "ddpm_parallel",
    "UnCLIPScheduler": "unclip",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "CMStochasticIterativeScheduler": "consistency_models",
    "EDMEulerScheduler": "edm_euler",
}
# Classes with tests of their own, but for what all of them share.
PEERS = MODULES | {
    "RePaintScheduler": "repaint",
    "ScoreSdeVeScheduler": "sde_ve",
    "ScoreSdeVpScheduler": "deprecated/sde_vp",
    "KarrasVeScheduler": "deprecated/karras_ve",
}
INDEXED = {"LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler", "EDMEulerScheduler"}
BATCHED = {"DDIMParallelScheduler", "DDPMParallelScheduler"}


def factors(name: str) -> dict[str, list[Any]]:
    cls = getattr(difusores, name)
    own = NARROWER.get(name, {})
    chosen = factors_of(cls, OPTIONS | STEP_OPTIONS, given=GIVEN) | COMMON
    if name in GRIDS:
        chosen["steps"] = [*COMMON["steps"], GRIDS[name]]
    if name in BATCHED:
        chosen["method"] = ["step", "batch_step_no_noise"]
    return chosen | own


COMBINATIONS = [
    (name, i, option) for name in MODULES for i, option in enumerate(all_pairs(factors(name), CONFLICTS))
]


def built(package: Any, name: str, option: dict[str, Any]) -> Any:
    known = inspect.signature(getattr(difusores, name).__init__).parameters
    arguments = {key: value for key, value in option.items() if key in known}
    cls = getattr(package, name)
    # what they have no use for is taken from a configuration alone
    saved = package is difusores and name in ("LCMScheduler", "TCDScheduler")
    scheduler = cls.from_config(arguments) if saved else cls(**arguments)
    steps = option["steps"]
    number = steps if isinstance(steps, dict) else {"num_inference_steps": steps}
    given = dict(option.get("set", number))
    if given.get("num_inference_steps", 0) > scheduler.config.num_train_timesteps:
        given["num_inference_steps"] = scheduler.config.num_train_timesteps
    scheduler.set_timesteps(**given)
    return scheduler


def looked_at(count: int, begin: int, name: str) -> range | list[int]:
    """The steps that are compared: those of a run from where it begins, or some of a long one's."""
    if name in INDEXED:
        return range(begin, min(count, begin + 25))
    middle = count // 2
    few = [*range(5), *range(middle, middle + 5), *range(count - 5, count)]
    return few if count > 50 else range(count)


def peer(name: str) -> Any:
    """The class of the same name in diffusers, some of which its top level does not have."""
    folder, _, file = PEERS[name].rpartition("/")
    path = f"diffusers.schedulers.{folder}{'.' if folder else ''}scheduling_{file}"
    return getattr(importlib.import_module(path), name)


def lift(scheduler: Any) -> Any:
    """A copy whose tables are float64."""
    oracle = copy.deepcopy(scheduler)
    for key, value in vars(oracle).items():
        if isinstance(value, Tensor) and value.dtype is torch.float32 and key != "timesteps":
            setattr(oracle, key, value.double())
    return oracle


def generator_of(option: dict[str, Any], batch: int, seed: int) -> Any:
    torch.manual_seed(seed)
    if option.get("generator") == "list":
        return [torch.Generator().manual_seed(seed + k) for k in range(batch)]
    return torch.Generator().manual_seed(seed) if option.get("generator") == "one" else None


def randn(shape: Any, generator: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(generator, list):
        return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in generator])
    return torch.randn(tuple(shape), generator=generator, dtype=dtype)


class _Lifted:
    """torch, but float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def lifted(name: str) -> Iterator[None]:
    """Where the oracle casts to float32."""
    module = importlib.import_module(peer(name).__module__)
    with mock.patch.object(module, "torch", _Lifted()) if name == "EDMEulerScheduler" else nullcontext():
        yield


@contextmanager
def drawing_in(name: str, dtype: torch.dtype, given: torch.dtype | None = None) -> Iterator[None]:
    """The oracle is given float64 and has to draw the noise of `dtype`, which it gets as `given`."""
    module = importlib.import_module(peer(name).__module__)
    if not hasattr(module, "randn_tensor"):
        yield
        return
    with mock.patch.object(
        module,
        "randn_tensor",
        lambda shape, generator=None, **_: randn(shape, generator, dtype).to(given or dtype),
    ):
        yield


@pytest.mark.parametrize("name", MODULES)
def test_the_combinations_hold_every_pair(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = [option for owner, _, option in COMBINATIONS if owner == name]
    check_pairs(name, factors(name), found, CONFLICTS, capsys)


@pytest.mark.parametrize(
    ("name", "index", "option"), COMBINATIONS, ids=[f"{n}-{i}" for n, i, _ in COMBINATIONS]
)
def test_agrees_with_diffusers(name: str, index: int, option: dict[str, Any]) -> None:
    ours, theirs = (built(package, name, option) for package in (difusores, diffusers))
    assert ours.timesteps.dtype is theirs.timesteps.dtype and torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    oracle, dtype, shape = lift(theirs), option["dtype"], option["shape"]
    if option.get("variance_type") == "fixed_large_log":  # the root of a logarithm there, NaN
        oracle.variance_type = "fixed_large"
        oracle.register_to_config(variance_type="fixed_large")
    values = torch.Generator().manual_seed(index)
    times = ours.timesteps
    assert hasattr(ours, "sigmas") == hasattr(theirs, "sigmas")
    if hasattr(ours, "sigmas"):
        assert torch.equal(ours.sigmas, theirs.sigmas)
    begin = int(len(times) * option.get("begin", 0))
    if "begin" in option and index % 2:
        for scheduler in (ours, theirs, oracle):
            scheduler.set_begin_index(begin)
    refused = None
    for i in looked_at(len(times), begin, name):
        t = times[i]
        if name in INDEXED:
            scaled = [s.scale_model_input(torch.ones(shape, dtype=dtype), t) for s in (ours, theirs)]
            assert scaled[0].dtype is scaled[1].dtype
            torch.testing.assert_close(scaled[0], scaled[1])
        if t >= len(ours) and "sigma_max" not in option:
            refused = (IndexError, "outside the training steps")
        elif no_number(name, option, oracle, int(t)):
            refused = (ValueError, "zero signal-to-noise|predicted x0 does not tell")
        level = float(ours.sigmas[i]) if hasattr(ours, "sigmas") else 0.0
        x = (torch.randn(shape, generator=values) * math.sqrt(level**2 + 1)).to(dtype)
        e = torch.randn((shape[0], shape[1] * channels(option), *shape[2:]), generator=values)
        e = (e.clamp(0.01, 1) if option.get("variance_type") == "learned" else e.clamp(-3, 3)).to(dtype)

        chosen = t
        if option["method"] != "step":
            chosen = times[torch.randint(i, len(times), shape[:1], generator=values)]
            chosen[0] = t
        before = None if i + 1 == len(times) or index % 2 else int(times[i + 1])
        if refused:
            with pytest.raises(refused[0], match=refused[1]):
                step(ours, option, e, chosen, x, i, before)
            if name in INDEXED:
                return
            refused = None
            continue
        with drawing_in(name, dtype):
            their = step(theirs, option, e, chosen, x, i, before)
        with drawing_in(name, dtype), lifted(name):
            # numbers: with a tensor diffusers computes what depends on the timestep in float32
            exact_t = int(t) if name in INDEXED and not t.is_floating_point() else chosen
            exact = step(oracle, option, e.double(), exact_t, x.double(), i, before)
        mine = step(ours, option, e, chosen, x, i, before)
        check(mine, their, exact, dtype, place=i)
    if name in INDEXED:
        assert ours.step_index == theirs.step_index and ours.begin_index == theirs.begin_index


def step(
    scheduler: Any, option: dict[str, Any], e: Tensor, t: Tensor, x: Tensor, seed: int, before: int | None
) -> Any:
    known = inspect.signature(getattr(scheduler, option["method"])).parameters
    kept = {k: option[k] for k in STEP_OPTIONS if k in option and k in known}
    if option["method"] != "step":
        kept.pop("eta", None)
        return (scheduler.batch_step_no_noise(e, t, x, **kept),)
    if kept.get("pred_original_sample"):
        kept["pred_original_sample"] = e * 0.5
    if type(scheduler).__name__ == "UnCLIPScheduler":
        kept["prev_timestep"] = before
    if "generator" in option:
        kept["generator"] = generator_of(option, len(x), seed)
    return scheduler.step(e, t, x, **kept, return_dict=False)


def channels(option: dict[str, Any]) -> int:
    return 2 if str(option.get("variance_type")).startswith("learned") else 1


def no_number(name: str, option: dict[str, Any], oracle: Any, t: int) -> bool:
    """Where diffusers divides by zero."""
    if name == "DDIMInverseScheduler":
        first = t < len(oracle) // option["steps"] and option["set_alpha_to_one"]
        return bool(first and option["prediction_type"] == "sample")
    if not hasattr(oracle, "alphas_cumprod"):
        return False
    return bool(oracle.alphas_cumprod[t] == 0 and option["prediction_type"] == "epsilon")


def run(scheduler: Any, model: Callable[[Tensor, Any], Tensor], x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    known = inspect.signature(scheduler.step).parameters
    times = scheduler.timesteps.tolist()
    for i, t in enumerate(scheduler.timesteps):
        given: dict[str, Any] = {"generator": generator} if "generator" in known else {}
        if "prev_timestep" in known and i + 1 < len(times):
            given["prev_timestep"] = times[i + 1]
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(scaled, t), t, x, **given, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", MODULES)
def test_a_plan_is_the_loop_of_steps(name: str) -> None:
    scheduler = getattr(difusores, name)()
    scheduler.set_timesteps(5)
    x = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5 + float(t.float()) * 1e-4

    plan = scheduler.plan(5)
    assert torch.equal(plan.times(), scheduler.timesteps.to(plan.times().dtype))
    expected = run(scheduler, model, x)
    result = plan.run(model, x, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_a_batch_takes_one_timestep_or_one_per_image() -> None:
    for name in sorted(BATCHED):
        scheduler = getattr(difusores, name)()
        scheduler.set_timesteps(10)
        x = torch.randn((4, 3, 4), generator=torch.Generator().manual_seed(1))
        alone = scheduler.batch_step_no_noise(x, torch.tensor([500]), x)
        assert torch.equal(alone, scheduler.batch_step_no_noise(x, torch.tensor([500] * 4), x))
        with pytest.raises(ValueError, match="4 images, 3 timesteps"):
            scheduler.batch_step_no_noise(x, torch.tensor([500] * 3), x)
    scheduler = difusores.DDIMParallelScheduler()
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.batch_step_no_noise(x, torch.tensor([500]), x)
    with pytest.raises(ValueError, match=r"eta must be 0, got 0\.5"):
        scheduler.batch_step_no_noise(x, torch.tensor([500]), x, eta=0.5)


def test_what_the_variance_of_the_parallel_ddim_is_read_for() -> None:
    ours, theirs = difusores.DDIMParallelScheduler(), diffusers.DDIMParallelScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(50)
    for given in ((999,), (999, 979), (5, -1)):
        torch.testing.assert_close(
            ours._get_variance(*given), theirs._get_variance(*given), rtol=1e-4, atol=1e-6
        )


def test_unclip_refuses_what_it_has_no_formula_for() -> None:
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="squaredcos_cap_v2"):
        difusores.UnCLIPScheduler(beta_schedule="linear")
    with pytest.raises(ValueError, match="at least 2"):
        difusores.UnCLIPScheduler().set_timesteps(1)
    for options in ({"variance_type": "fixed_large"}, {"prediction_type": "v_prediction"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            difusores.UnCLIPScheduler(**options).step(x, 5, x)


METHODS = ("__init__", "set_timesteps", "scale_model_input", "step", "add_noise", "get_velocity")


@pytest.mark.parametrize("name", PEERS)
def test_signatures_are_those_of_diffusers(name: str) -> None:
    ours, theirs = getattr(difusores, name), peer(name)
    for method in sorted({*METHODS, *(key for key in vars(theirs) if not key.startswith("_"))}):
        if not callable(getattr(theirs, method, None)):
            continue
        read = [
            [
                (p.name, p.default)
                for p in inspect.signature(getattr(owner, method)).parameters.values()
                if p.kind is not p.VAR_KEYWORD
            ]
            for owner in (ours, theirs)
        ]
        assert read[0] == read[1], method


@pytest.mark.parametrize("name", PEERS)
def test_a_new_scheduler_has_the_state_of_diffusers(name: str) -> None:
    ours, theirs = getattr(difusores, name)(), peer(name)()
    for key, their in vars(theirs).items():
        if key.startswith("_") or key == "one":
            continue
        mine = getattr(ours, key)
        if isinstance(their, Tensor):
            assert mine.dtype is their.dtype, key
            torch.testing.assert_close(mine, their, rtol=1e-6, atol=0)
        else:
            assert mine == their, key
    assert getattr(ours, "init_noise_sigma", None) == getattr(theirs, "init_noise_sigma", None)
    assert ours.order == getattr(theirs, "order", 1)
    assert set(ours._compatibles) == set(theirs._compatibles) and name in {
        c.__name__ for c in ours.compatibles
    }


@pytest.mark.parametrize("name", PEERS)
def test_files_cross_the_border_in_both_directions(name: str, tmp_path: Path) -> None:
    for one, other in ((getattr(difusores, name), peer(name)), (peer(name), getattr(difusores, name))):
        key = "s_churn" if name == "KarrasVeScheduler" else "num_train_timesteps"
        one(**{key: 60}).save_pretrained(tmp_path)
        there = other.from_pretrained(tmp_path)
        assert there.config[key] == 60
        here = one.from_config(there.config)
        assert {k: v for k, v in here.config.items() if k[0] != "_"} == {
            k: v for k, v in there.config.items() if k[0] != "_"
        }


@pytest.mark.parametrize("name", MODULES)
def test_what_a_step_returns_has_names(name: str) -> None:
    scheduler, their = getattr(difusores, name)(), peer(name)()
    x = torch.full((1, 3, 4), 0.25)
    for s in (scheduler, their):
        s.set_timesteps(4)
    t = scheduler.timesteps[1]
    results = [s.step(x, t, x) for s in (scheduler, their)]
    assert type(results[0]).__name__ == type(results[1]).__name__ and list(results[0]) == list(results[1])


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_distilled_timesteps_that_there_are_none_of(name: str) -> None:
    ours, theirs = getattr(difusores, name)(), peer(name)()
    bad: list[dict[str, Any]] = [
        {},
        {"num_inference_steps": 4, "timesteps": [3]},
        {"num_inference_steps": 51},
        {"num_inference_steps": 1001},
        {"num_inference_steps": 20, "strength": 0.2},
        {"timesteps": [3, 4]},
        {"timesteps": [1000, 4]},
    ]
    for arguments in bad:
        for scheduler in (ours, theirs):
            with pytest.raises(ValueError):
                scheduler.set_timesteps(**arguments)
    for arguments in ({"num_inference_steps": 0}, {"timesteps": [4, -1]}, {"timesteps": []}):
        with pytest.raises(ValueError, match=r"num_inference_steps must be|timesteps must"):
            ours.set_timesteps(**arguments)
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="call set_timesteps"):
        ours.step(x, 3, x)
    for scheduler in (ours, theirs):
        assert int(scheduler.previous_timestep(7)) == 6
        scheduler.set_timesteps(4)
        assert [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps] == [759, 499, 259, -1]


def test_teachers_of_more_steps_than_training_has() -> None:
    with pytest.raises(ValueError, match="original_inference_steps must be from 1 to 1000"):
        difusores.LCMScheduler().set_timesteps(4, original_inference_steps=1001)
    with pytest.raises(ValueError, match="original_inference_steps must be from 1 to 40"):
        difusores.TCDScheduler(num_train_timesteps=40).set_timesteps(4)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_the_noise_of_distilled_models_has_the_dtype_of_the_result(name: str) -> None:
    e, x = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    ours, theirs = getattr(difusores, name)(), peer(name)()
    drawn: list[torch.dtype] = []

    def draw(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        drawn.append(dtype)
        return torch.zeros(shape, dtype=dtype)

    module = importlib.import_module(type(theirs).__module__)
    for first, second in ((torch.float16, torch.float32), (torch.float32, torch.bfloat16)):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(4)
            ours_draw = mock.patch("difusores.schedulers.base.draw_noise", draw)
            with ours_draw, mock.patch.object(module, "randn_tensor", draw):
                result = scheduler.step(e.to(first), 999, x.to(second))[0]
            assert result.dtype is torch.float32
    assert drawn == [torch.float32] * 4

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5

    plan, half = ours.plan(2), torch.bfloat16
    expected = x
    generator = torch.Generator().manual_seed(0)
    ours.set_timesteps(2)
    for t in ours.timesteps:
        expected = ours.step(model(expected.to(half), t), t, expected, generator=generator)[0]
    result = plan.run(model, x, generator=torch.Generator().manual_seed(0), model_dtype=half)
    torch.testing.assert_close(result, expected)


def test_tcd_takes_a_part_as_eta() -> None:
    scheduler = difusores.TCDScheduler()
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 2, 3)
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"eta must be from 0 to 1, got {eta}"):
            scheduler.step(x, 999, x, eta=eta)


def test_lcm_cannot_begin_where_predicted_noise_tells_nothing() -> None:
    scheduler = difusores.LCMScheduler(rescale_betas_zero_snr=True)
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="zero signal-to-noise ratio"):
        scheduler.step(x, 999, x)
    scheduler.set_begin_index(1)
    scheduler.set_timesteps(4)
    assert scheduler.step(x, 759, x)[0].isfinite().all()


def test_consistency_levels_that_there_are_none_of() -> None:
    scheduler = difusores.CMStochasticIterativeScheduler()
    for arguments in (
        {},
        {"num_inference_steps": 4, "timesteps": [3]},
        {"timesteps": [40]},
        {"num_inference_steps": 41},
    ):
        with pytest.raises(ValueError):
            scheduler.set_timesteps(**arguments)
    with pytest.raises(ValueError, match="num_train_timesteps must be at least 2"):
        difusores.CMStochasticIterativeScheduler(num_train_timesteps=1).set_timesteps(1)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="real numbers"):
        scheduler.step(torch.zeros(1, 2), 0, torch.zeros(1, 2))


def test_the_scalings_of_consistency_models() -> None:
    ours, theirs = difusores.CMStochasticIterativeScheduler(), diffusers.CMStochasticIterativeScheduler()
    sigma = torch.tensor([0.002, 1.0, 80.0])
    for method in ("get_scalings", "get_scalings_for_boundary_condition"):
        for one, other in zip(getattr(ours, method)(sigma), getattr(theirs, method)(sigma), strict=True):
            torch.testing.assert_close(one, other)
    assert ours.sigma_to_t(3.0) == theirs.sigma_to_t(3.0)
    mine, their = difusores.LCMScheduler(), diffusers.LCMScheduler()
    method = "get_scalings_for_boundary_condition_discrete"
    assert getattr(mine, method)(7) == pytest.approx(getattr(their, method)(7))


@pytest.mark.parametrize("name", [name for name in MODULES if hasattr(peer(name), "add_noise")])
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
def test_the_training_side(name: str, method: str) -> None:
    ours, theirs = getattr(difusores, name)(), peer(name)()
    if not hasattr(theirs, method):
        return
    x, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    times = ours.timesteps[[2, 0]]
    torch.testing.assert_close(
        getattr(ours, method)(x, noise, times), getattr(theirs, method)(x, noise, times), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_preconditioning_of_edm(kind: str) -> None:
    ours, theirs = (p.EDMEulerScheduler(prediction_type=kind) for p in (difusores, diffusers))
    x, e = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    for sigma in (0.7, torch.tensor(3.0), torch.tensor([0.1, 1.0, 9.0])[:, None, None]):
        pairs = [
            [
                s.precondition_inputs(x, sigma),
                s.precondition_outputs(x, e, sigma),
                s.precondition_noise(sigma),
                torch.as_tensor(s._get_conditioning_c_in(sigma)),
            ]
            for s in (ours, theirs)
        ]
        torch.testing.assert_close(*pairs)


def test_edm_levels_by_their_places() -> None:
    places = torch.tensor([0.0, 0.25, 0.9], dtype=torch.float64)
    ours, theirs = difusores.EDMEulerScheduler(), diffusers.EDMEulerScheduler()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=places)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
    ours.set_timesteps(sigmas=places.tolist())
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    even = difusores.EDMEulerScheduler(sigma_schedule="exponential")
    even.set_timesteps(sigmas=[0.0, 0.75])
    assert even.sigmas.tolist() == pytest.approx([80.0, 80 * (0.002 / 80) ** 0.75, 0.0], rel=1e-6)


def test_what_edm_refuses() -> None:
    scheduler = difusores.EDMEulerScheduler()
    with pytest.raises(ValueError, match=r"from 0 for sigma_max to 1 .* got \[80\.0, 1\.0\]"):
        scheduler.set_timesteps(sigmas=[80.0, 1.0])
    for steps in (None, 0):
        with pytest.raises(ValueError, match=f"at least 1, got {steps}"):
            scheduler.set_timesteps(steps)
    for name in ("sigma_schedule", "final_sigmas_type"):
        with pytest.raises(ValueError, match=f"{name} must be .* got 'none'"):
            difusores.EDMEulerScheduler(**{name: "none"})
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="real numbers"):
        scheduler.step(x, 3, x)
    other = difusores.EDMEulerScheduler(prediction_type="sample")
    other.set_timesteps(4)
    with pytest.raises(ValueError, match="'epsilon' or 'v_prediction', got 'sample'"):
        other.step(x, other.timesteps[0], x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_reads_the_model_at_the_level_that_churn_leads_to(kind: str) -> None:
    x, e = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    results = []
    for package in (difusores, diffusers):
        scheduler = package.EDMEulerScheduler(prediction_type=kind)
        scheduler.set_timesteps(5)
        t = scheduler.timesteps[3]
        scheduler.scale_model_input(x, t)
        generator = torch.Generator().manual_seed(1)
        results.append(scheduler.step(e, t, x, s_churn=100.0, generator=generator, return_dict=False))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_draws_no_noise() -> None:
    stages = difusores.TCDScheduler().plan(4, eta=0.0).stages
    assert all(stage.noise is None and stage.row[W + COLUMNS.index("z")] == 0 for stage in stages)
    for kind in ("learned", "learned_range"):
        (stage,) = solvers.ddpm([0.9, 0.5], [(1, 0)], Prediction(), variance_type=kind, noise=False)
        assert stage.noise is None and stage.row[MODE] == 0 and stage.row[W + COLUMNS.index("z")] == 0


def test_edm_gives_back_the_image_that_it_was_given() -> None:
    x, known = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    results = []
    for package in (difusores, diffusers):
        scheduler = package.EDMEulerScheduler()
        scheduler.set_timesteps(5)
        t = scheduler.timesteps[3]
        scheduler.scale_model_input(x, t)
        results.append(scheduler.step(x.half(), t, x, pred_original_sample=known))
    assert results[0].pred_original_sample is known
    assert results[0].prev_sample.dtype is results[1].prev_sample.dtype is torch.float16
    torch.testing.assert_close(results[0].prev_sample, results[1].prev_sample, rtol=1e-3, atol=1e-3)
