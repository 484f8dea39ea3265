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
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from pairs import all_pairs
from torch import Tensor

import difusores

diffusers = pytest.importorskip("diffusers")

TRAINED = torch.linspace(0.001, 0.05, 1000).tolist()
OPTIONS: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 997],
    "beta_start": [0.0001, 0.00085],
    "beta_end": [0.02, 0.012],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [None, TRAINED],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"],
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
}
# What a class takes less of.
NARROWER: dict[str, dict[str, list[Any]]] = {
    "DDIMInverseScheduler": {"timestep_spacing": ["leading", "trailing"]},
    "UnCLIPScheduler": {
        "beta_schedule": ["squaredcos_cap_v2"],
        "variance_type": ["fixed_small_log", "learned_range"],
        "prediction_type": ["epsilon", "sample"],
        "steps": [2, 3, 10, 25],
    },
}
STEP_OPTIONS: dict[str, list[Any]] = {
    "eta": [0.0, 0.5, 1.0],
    "use_clipped_model_output": [False, True],
    "generator": ["one", "list", "global"],
}
COMMON: dict[str, list[Any]] = {
    "steps": [10, 1, 2, 5, 25],
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "shape": [(3, 4), (2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5)],
    "method": ["step"],
}
# What is given by the test itself.
GIVEN = {"self", "model_output", "timestep", "sample", "return_dict", "prev_timestep", "variance_noise"}
MODULES = {
    "DDIMInverseScheduler": "ddim_inverse",
    "DDIMParallelScheduler": "ddim_parallel",
    "DDPMParallelScheduler": "ddpm_parallel",
    "UnCLIPScheduler": "unclip",
}
BATCHED = {"DDIMParallelScheduler", "DDPMParallelScheduler"}


def factors(name: str) -> dict[str, list[Any]]:
    cls = getattr(difusores, name)
    options = [key for key in inspect.signature(cls.__init__).parameters if key != "self"]
    step = [key for key in inspect.signature(cls.step).parameters if key not in GIVEN]
    chosen = {key: OPTIONS[key] for key in options} | {key: STEP_OPTIONS[key] for key in step} | COMMON
    if name in BATCHED:
        chosen["method"] = ["step", "batch_step_no_noise"]
    return chosen | NARROWER.get(name, {})


COMBINATIONS = [(name, i, option) for name in MODULES for i, option in enumerate(all_pairs(factors(name)))]


def built(package: Any, name: str, option: dict[str, Any]) -> Any:
    known = inspect.signature(getattr(difusores, name).__init__).parameters
    arguments = {key: value for key, value in option.items() if key in known}
    if option.get("trained_betas") is not None:
        arguments["num_train_timesteps"] = 1000
    scheduler = getattr(package, name)(**arguments)
    scheduler.set_timesteps(option["steps"])
    return scheduler


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


@contextmanager
def drawing_in(name: str, dtype: torch.dtype) -> Iterator[None]:
    """The oracle is given float64 and has to draw the noise of `dtype`."""
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    if not hasattr(module, "randn_tensor"):
        yield
        return
    with mock.patch.object(
        module, "randn_tensor", lambda shape, generator=None, **_: randn(shape, generator, dtype)
    ):
        yield


def check(mine: Any, their: Any, exact: Any, dtype: torch.dtype) -> None:
    """The project's tolerance rule: twice the other library's error and 4 eps, and no less than 1e-5."""
    assert len(mine) == len(their) == len(exact)
    for one, other, right in zip(mine, their, exact, strict=True):
        assert one.dtype is other.dtype and one.shape == other.shape, (one.dtype, other.dtype)
        error, their_error = ((t.double() - right).abs().max().item() for t in (one, other))
        largest = max(1.0, right.abs().max().item())
        their_error = 0.0 if math.isnan(their_error) else their_error
        allowed = max(1e-5, 2 * their_error + 4 * torch.finfo(dtype).eps * largest)
        if dtype is torch.float64:
            allowed = 1e-9 * largest
        assert error <= allowed, (error, allowed)


@pytest.mark.parametrize("name", MODULES)
def test_the_combinations_hold_every_pair(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    count = sum(owner == name for owner, _, _ in COMBINATIONS)
    total = math.prod(len(values) for values in factors(name).values())
    with capsys.disabled():
        print(
            f"\n{name}: {count} combinations hold every pair of {len(factors(name))} options (of {total:.1e})"
        )


@pytest.mark.parametrize(
    ("name", "index", "option"), COMBINATIONS, ids=[f"{n}-{i}" for n, i, _ in COMBINATIONS]
)
def test_agrees_with_diffusers(name: str, index: int, option: dict[str, Any]) -> None:
    ours, theirs = (built(package, name, option) for package in (difusores, diffusers))
    assert ours.timesteps.dtype is theirs.timesteps.dtype and torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    oracle, dtype, shape = lift(theirs), option["dtype"], option["shape"]
    if option.get("thresholding") and len(shape) == 2:
        shape = (*shape, 5)  # diffusers' thresholding takes no less than three dimensions
    values = torch.Generator().manual_seed(index)
    times = ours.timesteps
    refused = None
    for i, t in enumerate(times):
        if t >= len(ours):
            refused = (IndexError, "outside the training steps")
        elif no_number(name, option, oracle, int(t)):
            refused = (ValueError, "zero signal-to-noise|predicted x0 does not tell")
        x = torch.randn(shape, generator=values).to(dtype)
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
            refused = None
            continue
        with drawing_in(name, dtype):
            their = step(theirs, option, e, chosen, x, i, before)
            exact = step(oracle, option, e.double(), chosen, x.double(), i, before)
        check(step(ours, option, e, chosen, x, i, before), their, exact, dtype)


def step(
    scheduler: Any, option: dict[str, Any], e: Tensor, t: Tensor, x: Tensor, seed: int, before: int | None
) -> Any:
    kept = {k: option[k] for k in ("eta", "use_clipped_model_output") if k in option}
    if option["method"] != "step":
        kept.pop("eta", None)
        return (scheduler.batch_step_no_noise(e, t, x, **kept),)
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
        return x * 0.5 + float(t) * 1e-4

    plan = scheduler.plan(5)
    assert torch.equal(plan.times().to(scheduler.timesteps.dtype), scheduler.timesteps)
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
