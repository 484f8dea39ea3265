"""What code written for diffusers may rely on besides the numbers of a step."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import difusores
from difusores import DDIMScheduler, DDPMScheduler

SCHEDULERS = [DDPMScheduler, DDIMScheduler]
NAMES = [cls.__name__ for cls in SCHEDULERS]
SHAPE = (2, 3, 4, 4)


@pytest.fixture
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


def pair() -> tuple[Tensor, Tensor]:
    values = torch.Generator().manual_seed(5)
    return torch.randn(SHAPE, generator=values), torch.randn(SHAPE, generator=values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["__init__", "step", "set_timesteps", "add_noise", "get_velocity"])
def test_signatures_are_those_of_diffusers(name: str, method: str, diffusers: Any) -> None:
    def read(package: Any) -> list[tuple[str, Any]]:
        function = getattr(getattr(package, name), method)
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    ours, theirs = read(difusores), read(diffusers)
    assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_a_new_scheduler_has_the_state_of_diffusers(name: str, diffusers: Any) -> None:
    for options in ({}, {"beta_schedule": "scaled_linear", "num_train_timesteps": 50}):
        ours, theirs = (getattr(package, name)(**options) for package in (difusores, diffusers))
        for key in ("betas", "alphas", "alphas_cumprod", "timesteps"):
            mine, their = getattr(ours, key), getattr(theirs, key)
            assert mine.dtype == their.dtype and torch.equal(mine, their), key
        assert (ours.order, ours.init_noise_sigma, len(ours)) == (
            theirs.order,
            theirs.init_noise_sigma,
            len(theirs),
        )
        assert ours.num_inference_steps is None and not hasattr(ours, "sigmas")
        assert ours.config_name == theirs.config_name
        sample = torch.ones(2)
        assert ours.scale_model_input(sample, 3) is sample
    assert name in {cls.__name__ for cls in ours.compatibles}
    assert all(isinstance(cls, type) for cls in ours.compatibles)
    assert set(ours._compatibles) == set(theirs._compatibles)


@pytest.mark.parametrize("name", NAMES)
def test_files_cross_the_border_in_both_directions(
    name: str, diffusers: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed: dict[str, Any] = {
        "beta_end": 0.012,
        "trained_betas": np.linspace(0.001, 0.02, 10),
        "num_train_timesteps": 10,
        "prediction_type": "v_prediction",
        "clip_sample_range": 2.0,
    }
    mine, their = getattr(difusores, name), getattr(diffusers, name)
    mine(**changed).save_pretrained(tmp_path / "ours")
    their(**changed).save_pretrained(tmp_path / "theirs")
    texts = [(tmp_path / who / "scheduler_config.json").read_text() for who in ("ours", "theirs")]
    contents = [json.loads(text) for text in texts]
    assert contents[1].pop("_diffusers_version").startswith("0.42.")
    assert contents[0].pop("_diffusers_version").startswith("0.42.")
    assert contents[0] == contents[1] and texts[0].splitlines()[:1] == texts[1].splitlines()[:1]
    with caplog.at_level(logging.WARNING):
        here = mine.from_pretrained(tmp_path, subfolder="theirs")
        there = their.from_pretrained(tmp_path, subfolder="ours")
    assert not caplog.records
    for key, value in contents[0].items():
        if not key.startswith("_"):
            assert here.config[key] == there.config[key] == value
    assert torch.equal(here.betas, there.betas)


def test_the_config_of_a_scheduler_of_diffusers_is_taken_over(diffusers: Any) -> None:
    theirs = diffusers.DDIMScheduler(beta_end=0.03, set_alpha_to_one=False, timestep_spacing="trailing")
    ours = DDPMScheduler.from_config(theirs.config)
    assert ours.config.beta_end == 0.03 and ours.config.timestep_spacing == "trailing"
    assert DDIMScheduler.from_config(ours.config).config.set_alpha_to_one is False
    back = diffusers.DDIMScheduler.from_config(ours.config)
    assert dict(back.config).items() >= {"set_alpha_to_one": False, "beta_end": 0.03}.items()
    euler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    assert diffusers.EulerDiscreteScheduler.from_config(
        DDIMScheduler.from_config(euler.config).config
    ).config.use_karras_sigmas


def test_unpassed_defaults_are_not_taken_over() -> None:
    ddim = DDIMScheduler(clip_sample=False)
    ddpm, unused = DDPMScheduler.from_config(ddim.config, return_unused_kwargs=True, beta_end=0.5, foreign=1)
    assert ddpm.config.clip_sample is False and ddpm.config.beta_end == 0.5
    assert "foreign" in unused and "foreign" not in ddpm.config


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_config_keys_off_the_object_warn(cls: type[Any]) -> None:
    with pytest.warns(FutureWarning, match="beta_start"):
        assert cls().beta_start == 0.0001
    with pytest.raises(AttributeError, match="nonsense"):
        _ = cls().nonsense


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_a_replaced_configuration_is_used_at_once(cls: type[Any]) -> None:
    scheduler = cls()
    scheduler.set_timesteps(10)
    e, x = pair()
    t = scheduler.timesteps[3]
    clipped = scheduler.step(e, t, x).pred_original_sample
    scheduler._internal_dict = type(scheduler.config)({**scheduler.config, "clip_sample": False})
    free = scheduler.step(e, t, x).pred_original_sample
    assert clipped.abs().max() == 1 and free.abs().max() > 1
    assert torch.equal(free.clamp(-1, 1), clipped)
    scheduler._internal_dict = type(scheduler.config)({**scheduler.config, "steps_offset": 1})
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == list(range(901, 0, -100))


def test_assigned_timesteps_and_tables_are_used_at_once(diffusers: Any) -> None:
    e, x = pair()
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()

    def same(t: Any) -> bool:
        steps = [s.step(e, t, x, generator=torch.Generator().manual_seed(1))[0] for s in (ours, theirs)]
        return torch.allclose(*steps, atol=1e-5)

    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    assert same(900)
    for scheduler in (ours, theirs):
        scheduler.timesteps = torch.tensor([900, 500, 0])
    assert same(900) and same(ours.timesteps[1])
    for scheduler in (ours, theirs):
        scheduler.timesteps[1] = 250
    assert same(900) and same(ours.timesteps[1]) and int(ours.previous_timestep(900)) == 250
    for scheduler in (ours, theirs):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    assert same(900) and same(250)


def test_the_arguments_of_a_step_choose_its_row(diffusers: Any) -> None:
    e, x = pair()
    schedulers = DDIMScheduler(), diffusers.DDIMScheduler()
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
    for eta in (0.0, 0.5, 0.0, 1.0):
        for clipped in (False, True):
            results = [
                s.step(e, 500, x, eta, clipped, torch.Generator().manual_seed(0), return_dict=False)[0]
                for s in schedulers
            ]
            torch.testing.assert_close(*results, atol=1e-5, rtol=0)


class NoHostReads(TorchDispatchMode):
    """Fails where a value of a tensor would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), (
            func
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_a_step_reads_no_timestep_from_the_device(cls: type[Any]) -> None:
    scheduler = cls()
    scheduler.set_timesteps(25)
    e, x = pair()
    expected = [scheduler.step(e, int(t), x)[1] for t in scheduler.timesteps]
    scheduler.set_timesteps(25)
    original, grid = Tensor.tolist, scheduler.timesteps

    def refuse(self: Tensor) -> Any:
        assert self is not grid, "timesteps were read back"
        return original(self)

    with NoHostReads(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "tolist", refuse)
        steps = [scheduler.step(e, t, x)[1] for t in scheduler.timesteps]
        steps_of_slice = [scheduler.step(e, t, x)[1] for t in scheduler.timesteps[20:]]
    for result, wanted in zip([*steps, *steps_of_slice], [*expected, *expected[20:]], strict=True):
        assert torch.equal(result, wanted)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        scheduler.step(e, scheduler.timesteps[0].clone(), x)


@pytest.mark.parametrize("cls", SCHEDULERS)
@pytest.mark.parametrize(
    "disguise",
    [int, float, np.int64, torch.clone, lambda t: t.reshape(1), lambda t: t.float(), lambda t: t.expand(1)],
)
def test_a_timestep_may_come_in_any_form(cls: type[Any], disguise: Callable[[Any], Any]) -> None:
    scheduler = cls()
    scheduler.set_timesteps(10)
    e, x = pair()
    wanted = scheduler.step(e, scheduler.timesteps[4], x)[1]
    assert torch.equal(scheduler.step(e, disguise(scheduler.timesteps[4]), x)[1], wanted)
    with pytest.raises(ValueError, match="one timestep"):
        scheduler.step(e, scheduler.timesteps[2:4], x)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_timesteps_may_be_strided_or_made_in_inference_mode(cls: type[Any]) -> None:
    e, x = pair()
    scheduler = cls()
    scheduler.set_timesteps(10)
    wanted = scheduler.step(e, 500, x)[1]
    every = torch.arange(950, -1, -50)
    scheduler.timesteps = every[1::2]
    assert torch.equal(scheduler.step(e, scheduler.timesteps[4], x)[1], wanted)
    if cls is DDIMScheduler:
        # lies between two elements of timesteps, and is none of them
        assert torch.equal(scheduler.step(e, every[10], x)[1], scheduler.step(e, 450, x)[1])
    with torch.inference_mode():
        scheduler.set_timesteps(10)
        assert torch.equal(scheduler.step(e, scheduler.timesteps[4], x)[1], wanted)
    assert torch.equal(scheduler.step(e, scheduler.timesteps[4], x)[1], wanted)


@pytest.mark.parametrize("cls", SCHEDULERS)
@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_steps_like_the_original(cls: type[Any], clone: Callable[[Any], Any]) -> None:
    scheduler = cls(beta_end=0.03)
    scheduler.set_timesteps(10)
    # gives the tensor the version number that a copy of it has
    scheduler.timesteps.add_(0)
    e, x = pair()
    wanted = scheduler.step(e, scheduler.timesteps[1], x)[1]
    twin = clone(scheduler)
    scheduler.set_timesteps(20)
    for _ in range(2):
        with NoHostReads():
            result = twin.step(e, twin.timesteps[1], x)[1]
        assert torch.equal(result, wanted)
    assert twin.config == scheduler.config and repr(twin) == repr(scheduler)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_what_a_step_returns(cls: type[Any]) -> None:
    scheduler = cls()
    scheduler.set_timesteps(10)
    e, x = pair()
    output = scheduler.step(e, 0, x)
    assert type(output).__name__ == f"{cls.__name__}Output" and list(output) == [
        "prev_sample",
        "pred_original_sample",
    ]
    previous, original = scheduler.step(e, 0, x, return_dict=False)
    assert torch.equal(output.prev_sample, previous) and torch.equal(output["pred_original_sample"], original)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_mixed_dtypes_are_promoted_as_in_diffusers(cls: type[Any], diffusers: Any) -> None:
    theirs = getattr(diffusers, cls.__name__)()
    ours = cls()
    e, x = pair()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    for one, other in (
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float64),
    ):
        results = [s.step(e.to(one), 0, x.to(other))[0] for s in (ours, theirs)]
        assert results[0].dtype is results[1].dtype
        torch.testing.assert_close(*results, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_gradients_flow_through_a_step(cls: type[Any]) -> None:
    scheduler = cls(clip_sample=False)
    scheduler.set_timesteps(10)
    e, x = (tensor.requires_grad_() for tensor in pair())
    scheduler.step(e, 500, x).prev_sample.sum().backward()
    (row,) = (cached.row for cached in scheduler._rows.values())
    assert e.grad is not None and x.grad is not None
    direct = row[12 + 2] + row[12] * row[5], row[12 + 1] + row[12] * row[4]
    for tensor, slope in zip((e, x), direct, strict=True):
        torch.testing.assert_close(tensor.grad, torch.full(SHAPE, float(slope)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", SCHEDULERS)
@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_training_side(cls: type[Any], method: str, dtype: torch.dtype, diffusers: Any) -> None:
    noise, x = (tensor.to(dtype) for tensor in pair())
    times = torch.tensor([3, 998])
    ours, theirs = cls(), getattr(diffusers, cls.__name__)()
    a = theirs.alphas_cumprod.double()[times].view(-1, 1, 1, 1)
    alpha, sigma = a.sqrt(), (1 - a).sqrt()
    first, second = (x.double(), noise.double()) if method == "add_noise" else (noise.double(), -x.double())
    oracle = alpha * first + sigma * second
    own = (getattr(theirs, method)(x, noise, times).double() - oracle).abs().max()
    result = getattr(ours, method)(x, noise, times)
    assert result.dtype is dtype
    limit = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2 * float(own))
    assert (result.double() - oracle).abs().max() <= limit
    for shared in (times[:1], times[0]):
        torch.testing.assert_close(getattr(ours, method)(x, noise, shared)[0], result[0])


def test_previous_timestep(diffusers: Any) -> None:
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    assert ours.previous_timestep(7) == theirs.previous_timestep(7) == 6
    for arguments in ({"num_inference_steps": 7}, {"timesteps": [900, 500, 3]}):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(**arguments)
        for t in ours.timesteps:
            assert int(ours.previous_timestep(t)) == int(theirs.previous_timestep(t))
        for scheduler in (ours, theirs):
            with pytest.raises(IndexError):
                scheduler.previous_timestep(1)
    assert ours.custom_timesteps is True and ours.timesteps.tolist() == [900, 500, 3]


def test_custom_timesteps_step_as_in_diffusers(diffusers: Any) -> None:
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    e, x = pair()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[900, 500, 3])
    for t in (900, 500, 3):
        results = [s.step(e, t, x, generator=torch.Generator().manual_seed(t))[0] for s in (ours, theirs)]
        torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_steps_before_set_timesteps(diffusers: Any) -> None:
    e, x = (tensor.double() for tensor in pair())
    with pytest.raises(ValueError, match="set_timesteps"):
        DDIMScheduler().step(e, 5, x)
    ours, theirs = DDPMScheduler(), diffusers.DDPMScheduler()
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    results = [s.step(e, 5, x, generator=torch.Generator().manual_seed(0))[0] for s in (ours, theirs)]
    torch.testing.assert_close(*results, atol=1e-10, rtol=0)


def test_the_variance_that_editing_pipelines_read(diffusers: Any) -> None:
    for t, before in ((999, 979), (19, -1)):
        results = [package.DDIMScheduler()._get_variance(t, before) for package in (difusores, diffusers)]
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("package", ["difusores", "diffusers"])
def test_bad_requests_raise_the_same_errors(package: str) -> None:
    module = pytest.importorskip(package)
    e, x = pair()
    for name in NAMES:
        scheduler = getattr(module, name)()
        with pytest.raises(NotImplementedError):
            getattr(module, name)(beta_schedule="cubic")
        with pytest.raises(ValueError):
            scheduler.set_timesteps(1001)
        with pytest.raises(ValueError):
            getattr(module, name)(timestep_spacing="middle").set_timesteps(5)
        with pytest.raises(TypeError):
            getattr(module, name)(nonsense=1)
        wrong = getattr(module, name)(prediction_type="score")
        wrong.set_timesteps(5)
        with pytest.raises(ValueError):
            wrong.step(e, 0, x)
    ddpm, ddim = module.DDPMScheduler(), module.DDIMScheduler()
    for timesteps in ([1000, 3], [5, 5], [3, 4]):
        with pytest.raises(ValueError):
            ddpm.set_timesteps(timesteps=timesteps)
    with pytest.raises(ValueError):
        ddpm.set_timesteps(5, timesteps=[3])
    ddim.set_timesteps(5)
    with pytest.raises(ValueError):
        ddim.step(e, 800, x, eta=1.0, generator=torch.Generator(), variance_noise=x)


def test_full_noise_has_a_number() -> None:
    """1 - a_before - sigma**2 is 0, and on some processors rounded to less: then diffusers has NaN."""
    e, x = pair()
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    for cls in SCHEDULERS:
        scheduler = cls(**zero, prediction_type="v_prediction")
        scheduler.set_timesteps(10)
        full = {"eta": 1.0} if cls is DDIMScheduler else {}
        assert scheduler.step(e, 999, x, **full)[0].isfinite().all()


def test_counts_out_of_range_are_named() -> None:
    for scheduler in (DDPMScheduler(), DDIMScheduler()):
        for ask in (scheduler.set_timesteps, scheduler.plan):
            for steps in (0, -3, 1001):
                with pytest.raises(ValueError, match=f"from 1 to 1000.*got {steps}"):
                    ask(steps)
    for wrong in ({}, {"num_inference_steps": 5, "timesteps": [3]}):
        with pytest.raises(ValueError, match="exactly one"):
            DDPMScheduler().plan(**wrong)


def test_a_learned_variance_needs_twice_the_channels() -> None:
    scheduler = DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(10)
    e, x = pair()
    with pytest.raises(ValueError, match="variance"):
        scheduler.step(e, 900, x)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_threads_that_share_a_scheduler_get_what_they_get_alone(cls: type[Any]) -> None:
    scheduler = cls()
    scheduler.set_timesteps(50)

    def sample(seed: int, barrier: Barrier | None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(SHAPE, generator=generator)
        if barrier is not None:
            barrier.wait()
        for t in scheduler.timesteps:
            extra = {"eta": 0.5} if cls is DDIMScheduler else {}
            x = scheduler.step(x * 0.1, t, x, generator=generator, return_dict=False, **extra)[0]
        return x

    alone = [sample(seed, None) for seed in range(4)]
    scheduler.set_timesteps(50)
    barrier, together = Barrier(4), dict[int, Tensor]()
    threads = [
        Thread(target=lambda seed=seed: together.update({seed: sample(seed, barrier)})) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[seed], together[seed]) for seed in range(4))
