"""What callers do to a scheduler: edited state, other defaults of torch, shapes that broadcast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import difusores
from difusores import DDIMScheduler, DDPMScheduler
from difusores.plan import Plan, Stage, make_row

diffusers = pytest.importorskip("diffusers")

SCHEDULERS = [DDPMScheduler, DDIMScheduler]
NAMES = [cls.__name__ for cls in SCHEDULERS]
SHAPE = (2, 3, 4, 4)


def pair(batch: int = 2) -> tuple[Tensor, Tensor]:
    values = torch.Generator().manual_seed(5)
    shape = (batch, *SHAPE[1:])
    return torch.randn(shape, generator=values), torch.randn(shape, generator=values)


def both(name: str, **options: Any) -> tuple[Any, Any]:
    schedulers = getattr(difusores, name)(**options), getattr(diffusers, name)(**options)
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
    return schedulers


def assert_same_step(schedulers: tuple[Any, Any], t: Any, e: Tensor, x: Tensor, **options: Any) -> None:
    results = [
        s.step(e, t, x, generator=torch.Generator().manual_seed(3), return_dict=False, **options)[0]
        for s in schedulers
    ]
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("cls", SCHEDULERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
        {"trained_betas": tuple(k / 1000 for k in range(1, 101)), "num_train_timesteps": 100},
    ],
    ids=str,
)
def test_a_default_device_changes_nothing(cls: type[Any], options: dict[str, Any]) -> None:
    e, x = pair()
    usual = cls(**options)
    with torch.device("meta"):
        scheduler = cls(**options)
        for one in (usual, scheduler):
            one.set_timesteps(10)
        steps = [one.step(e, 0, x)[1] for one in (usual, scheduler)]
        plan = scheduler.plan(10)
        table, times = plan.table(), plan.times()
        image = plan.run(lambda x, t: x, x, generator=torch.Generator().manual_seed(0), guidance=[1.0])
    wanted = cls(**options)
    wanted.set_timesteps(10)
    for step in (*steps, usual.step(e, 0, x)[1]):
        assert torch.equal(step, wanted.step(e, 0, x)[1])
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        assert torch.equal(getattr(scheduler, name), getattr(wanted, name))
    assert plan == wanted.plan(10)
    assert torch.equal(table, plan.table()) and torch.equal(times, plan.times())
    expected = plan.run(lambda x, t: x, x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(image, expected)


def test_a_default_device_changes_no_variance() -> None:
    with torch.device("meta"):
        variances = DDIMScheduler()._get_variance(999, 979), DDPMScheduler()._get_variance(999)
    assert [v.device.type for v in variances] == ["cpu", "cpu"]


def test_times_keep_their_digits_whatever_the_default_dtype(bfloat16_by_default: None) -> None:
    row = make_row((1.0, 0.0), {"x0": 1.0})
    plan = Plan("any", (Stage(998.5625, row),), "epsilon", (0.1,), continuous=True)
    assert plan.times().tolist() == [998.5625] and plan.times().dtype is torch.float32


def test_the_default_dtype_changes_no_table(bfloat16_by_default: None) -> None:
    betas = [0.001 * k for k in range(1, 11)]
    for cls in SCHEDULERS:
        table = cls(trained_betas=betas, num_train_timesteps=10).betas
        assert torch.equal(table, torch.tensor(betas, dtype=torch.float32))
    ours = DDIMScheduler()._get_variance(999, 979)
    assert ours.dtype is torch.float32
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(ours, diffusers.DDIMScheduler()._get_variance(999, 979), atol=1e-6, rtol=1e-4)


def test_an_assigned_variance_type_is_followed() -> None:
    e, x = pair()
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(10)
    assert scheduler.variance_type == "fixed_small"
    wanted = DDPMScheduler(variance_type="fixed_large")
    wanted.set_timesteps(10)
    for s in (scheduler, wanted):
        torch.manual_seed(0)
        s.small = s.step(e, 900, x)[0]
    assert not torch.equal(scheduler.small, wanted.small)
    scheduler.variance_type = "fixed_large"
    torch.manual_seed(0)
    assert torch.equal(scheduler.step(e, 900, x)[0], wanted.small)
    assert scheduler.plan(10) == wanted.plan(10)
    scheduler.variance_type = "learned_range"
    assert_same_step(
        (scheduler, both("DDPMScheduler", variance_type="learned_range")[1]),
        900,
        torch.cat((e, x.tanh()), dim=1),
        x,
    )


@pytest.mark.parametrize("t", [900, 100, 0])
@pytest.mark.parametrize("kind", difusores.solvers.VARIANCE_TYPES)
def test_the_variance_of_ddpm_as_other_pipelines_read_it(kind: str, t: int) -> None:
    _, v = pair()
    for given in ({"variance_type": kind}, {}):
        ours, theirs = both("DDPMScheduler", **({} if given else {"variance_type": kind}))
        for time in (t, torch.tensor(t)):
            results = [s._get_variance(time, predicted_variance=v, **given) for s in (ours, theirs)]
            assert results[0].dtype is torch.float32
            torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("assign", [list, tuple, np.array, lambda v: np.array(v, float), torch.tensor])
def test_assigned_timesteps_may_come_in_any_form(name: str, assign: Callable[[Any], Any]) -> None:
    e, x = pair()
    ours, theirs = both(name)
    ours.timesteps, theirs.timesteps = assign([900, 800, 300]), torch.tensor([900, 800, 300])
    for t in (900, 800, 300):
        assert_same_step((ours, theirs), t, e, x)
    for mine, t in zip(ours.timesteps, theirs.timesteps, strict=True):
        assert isinstance(mine, Tensor)
        assert torch.equal(ours.step(e, mine, x)[1], ours.step(e, int(t), x)[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("assign", [list, np.array])
def test_an_assigned_table_may_come_in_any_form(name: str, assign: Callable[[Any], Any]) -> None:
    e, x = pair()
    ours, theirs = both(name)
    table = theirs.alphas_cumprod**2
    ours.alphas_cumprod, theirs.alphas_cumprod = assign(table.tolist()), table
    assert_same_step((ours, theirs), 500, e, x)
    noisy = [s.add_noise(x, e, torch.tensor([900, 1])) for s in (ours, theirs)]
    torch.testing.assert_close(*noisy)


@pytest.mark.parametrize("name", NAMES)
def test_floating_timesteps_are_training_steps_nevertheless(name: str) -> None:
    e, x = pair()
    ours, theirs = both(name)
    ours.timesteps = ours.timesteps.float()
    for k in (0, 4, 9):
        assert_same_step((ours, theirs), int(theirs.timesteps[k]), e, x)
        assert torch.equal(
            ours.step(e, ours.timesteps[k], x)[1], ours.step(e, int(theirs.timesteps[k]), x)[1]
        )


@pytest.mark.parametrize("final", [1.0, 0.99995, np.float32(0.99995), torch.tensor(0.99995)])
def test_the_final_alpha_may_be_a_number(final: Any) -> None:
    e, x = pair()
    schedulers = both("DDIMScheduler", set_alpha_to_one=False)
    for scheduler in schedulers:
        scheduler.final_alpha_cumprod = final if isinstance(final, Tensor) else torch.tensor(float(final))
    schedulers[0].final_alpha_cumprod = final
    assert_same_step(schedulers, 0, e, x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inference", [False, True])
def test_tables_edited_in_place_are_used_at_once(name: str, inference: bool) -> None:
    e, x = pair()
    with torch.inference_mode(inference):
        schedulers = both(name, clip_sample=False)
    noisy = [s.add_noise(x, e, torch.tensor([900, 1])) for s in schedulers]
    torch.testing.assert_close(*noisy)
    assert_same_step(schedulers, 900, e, x)
    plan = schedulers[0].plan(10)
    with torch.inference_mode(inference):
        for scheduler in schedulers:
            scheduler.alphas_cumprod[900] = 0.001
    noisy = [s.add_noise(x, e, torch.tensor([900, 1])) for s in schedulers]
    torch.testing.assert_close(*noisy)
    assert schedulers[0].plan(10) != plan
    assert_same_step(schedulers, 900, e, x)


def test_a_negative_eta_shrinks_the_noise_and_draws_none() -> None:
    e, x = pair()
    schedulers = both("DDIMScheduler")
    for eta in (-0.5, -1.0):
        assert_same_step(schedulers, 500, e, x, eta=eta)
        state = torch.get_rng_state()
        schedulers[0].step(e, 500, x, eta=eta)
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"thresholding": True}], ids=str)
def test_a_batch_of_one_goes_with_every_batch(name: str, options: dict[str, Any]) -> None:
    e, x = pair(3)
    schedulers = both(name, **options)
    extra: dict[str, Any] = {"eta": 1.0} if name == "DDIMScheduler" else {}
    assert_same_step(schedulers, 500, e[:1], x, **extra)
    assert_same_step(schedulers, 500, e, x[:1], **extra)
    if name == "DDIMScheduler":
        results = [s.step(e, 500, x, eta=1.0, variance_noise=x[:1])[0] for s in schedulers]
        torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_a_batch_of_one_goes_with_every_batch_where_the_variance_is_learned() -> None:
    e, x = pair(3)
    schedulers = both("DDPMScheduler", variance_type="learned_range")
    output = torch.cat((e, x.tanh()), dim=1)
    assert_same_step(schedulers, 500, output[:1], x)
    assert_same_step(schedulers, 500, output, x[:1])


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_do_not_go_together_are_named(name: str) -> None:
    e, x = pair(3)
    ours, _ = both(name)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(3, 3, 4, 4\)|\(3, 3, 4, 4\).*\(2, 3, 4, 4\)"):
        ours.step(e[:2], 500, x)


def test_an_eta_of_any_kind_is_one_row() -> None:
    e, x = pair()
    schedulers = both("DDIMScheduler")
    for _ in range(3):
        for eta in (torch.tensor(0.5), np.float32(0.5), 0.5):
            assert_same_step(schedulers, 500, e, x, eta=eta)
    assert len(schedulers[0]._rows) == 1


def test_the_rows_of_ever_new_arguments_are_not_all_kept() -> None:
    e, x = pair(1)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    for k in range(5000):
        scheduler.step(e, 500, x, eta=k / 5000, variance_noise=e)
    assert len(scheduler._rows) <= 4096
