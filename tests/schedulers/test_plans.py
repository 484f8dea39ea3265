"""Plans of every class: the loop as one call, against the loop that users write by hand."""

from __future__ import annotations

import inspect
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

import difusores
from difusores.plan import Plan
from difusores.schedulers import SchedulerMixin

SHAPE = (2, 3, 4, 4)
STEPS = 7
NAMES = [
    name
    for name in difusores.schedulers.__all__
    if name.endswith("Scheduler") and hasattr(getattr(difusores.schedulers, name), "plan")
]


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x * (0.5 + torch.as_tensor(t, dtype=torch.float64).float() / 2000))


def by_hand(scheduler: Any, x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": generator} if "generator" in known else {}
    for i, t in enumerate(scheduler.timesteps):
        if "prev_timestep" in known:  # else the step is taken to be one training step long
            options["prev_timestep"] = scheduler.timesteps[i + 1] if i + 1 < STEPS else None
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, t), t, x, **options, return_dict=False)[0]
    return x


def first(scheduler: Any) -> Tensor:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    return noise * scheduler.plan(STEPS).init_noise_sigma


# In `step` their noise is of a Brownian path, in a plan it is drawn like that of all others.
BROWNIAN = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BROWNIAN])
def test_a_plan_gives_the_images_of_the_loop(name: str) -> None:
    scheduler = getattr(difusores, name)()
    scheduler.set_timesteps(STEPS)
    plan = scheduler.plan(STEPS)
    assert len(plan) == len(scheduler.timesteps)
    torch.testing.assert_close(plan.times().double(), scheduler.timesteps.double(), rtol=1e-6, atol=1e-4)
    assert plan.init_noise_sigma == pytest.approx(
        float(getattr(scheduler, "init_noise_sigma", 1.0)), rel=1e-6
    )
    x = first(scheduler)
    ours = plan.run(model, x, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(ours, by_hand(scheduler, x, 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_a_value(name: str) -> None:
    cls = getattr(difusores, name)
    plan = cls().plan(STEPS)
    assert plan == cls().plan(STEPS) and hash(plan) == hash(cls().plan(STEPS))
    assert plan != cls().plan(STEPS + 1)
    assert Plan.from_json(plan.to_json()) == plan
    assert len(str(plan).splitlines()) == len(plan) + 1


@pytest.mark.parametrize("name", NAMES)
def test_threads_share_a_plan(name: str) -> None:
    scheduler = getattr(difusores, name)()
    plan, x = scheduler.plan(STEPS), first(scheduler)
    alone = [plan.run(model, x, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    together: dict[int, Tensor] = {}
    barrier = Barrier(2)

    def work(k: int) -> None:
        barrier.wait()
        together[k] = plan.run(model, x, generator=torch.Generator().manual_seed(5 + k))

    threads = [Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[k], alone[k]) for k in range(2))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_scheduler_makes_the_same_plan(name: str, tmp_path: Any) -> None:
    cls: type[SchedulerMixin] = getattr(difusores, name)
    scheduler: Any = cls()
    scheduler.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).plan(STEPS) == scheduler.plan(STEPS)
