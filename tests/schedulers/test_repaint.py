"""RePaintScheduler against diffusers and against diffusers with float64 tables."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from gate import SHAPES, check
from pairs import Conflict, all_pairs, check_pairs, factors
from test_by_timestep import drawing_in, generator_of, lift
from torch import Tensor

import difusores

diffusers = pytest.importorskip("diffusers")

NAME = "RePaintScheduler"
# Values for every option of the constructor, of set_timesteps and of step. Another one fails.
OPTIONS: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 250],
    "beta_start": [0.0001, 0.00085],
    "beta_end": [0.02, 0.012],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"],
    "trained_betas": [None, "array"],
    "eta": [0.0, 0.5, 1.0],
    "clip_sample": [True, False],
    "num_inference_steps": [10, 1, 2, 5, 25, 50, 1000],
    "jump_length": [10, 1, 3],
    "jump_n_sample": [10, 1, 2],
    "mask": ["hard", "soft", "broadcast"],
    "generator": ["one", "list", "global"],
}
TABLE = factors(
    difusores.RePaintScheduler,
    OPTIONS,
    ("__init__", "set_timesteps", "step"),
    given=("device", "model_output", "timestep", "sample", "original_image"),
) | {
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "shape": SHAPES[:3],
}
CONFLICTS = [Conflict("trained_betas", ["array"], "num_train_timesteps", [250], "they are 1000 betas")]
COMBINATIONS = all_pairs(TABLE, CONFLICTS)


def test_the_combinations_hold_every_pair(capsys: pytest.CaptureFixture[str]) -> None:
    check_pairs(NAME, TABLE, COMBINATIONS, CONFLICTS, capsys)


def both(option: dict[str, Any]) -> list[Any]:
    known = inspect.signature(difusores.RePaintScheduler).parameters
    arguments = {key: value for key, value in option.items() if key in known}
    if option["trained_betas"] is not None:
        arguments["trained_betas"] = np.linspace(0.001, 0.02, 1000, dtype=np.float32)
    schedulers = [package.RePaintScheduler(**arguments) for package in (difusores, diffusers)]
    for scheduler in schedulers:
        scheduler.set_timesteps(option["num_inference_steps"], option["jump_length"], option["jump_n_sample"])
    return schedulers


def mask_of(option: dict[str, Any], values: torch.Generator) -> Tensor:
    shape = option["shape"]
    if option["mask"] == "broadcast":
        shape = (1, 1, *shape[2:])
    mask = torch.rand(shape, generator=values)
    return (mask if option["mask"] == "soft" else mask.round()).to(option["dtype"])


@pytest.mark.parametrize(("index", "option"), list(enumerate(COMBINATIONS)))
def test_agrees_with_diffusers(index: int, option: dict[str, Any]) -> None:
    ours, theirs = both(option)
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.timesteps.dtype is theirs.timesteps.dtype
    assert ours.num_inference_steps == theirs.num_inference_steps
    oracle, dtype = lift(theirs), option["dtype"]
    values = torch.Generator().manual_seed(index)
    mask = mask_of(option, values)
    for i, t in enumerate(torch.unique(ours.timesteps).tolist()[:30]):
        e, x, image = (torch.randn(option["shape"], generator=values).to(dtype) for _ in range(3))

        def step(scheduler: Any, wide: torch.dtype, given: Any = (e, t, x, image, i)) -> Any:
            e, t, x, image, i = given
            tensors = [tensor.to(wide) for tensor in (x, image, mask)]
            generator = generator_of(option, len(x), i)
            return scheduler.step(e.to(wide), t, *tensors, generator=generator, return_dict=False)

        def undo(scheduler: Any, wide: torch.dtype, given: Any = (x, t, i)) -> Any:
            x, t, i = given
            return (scheduler.undo_step(x.to(wide), t, generator=generator_of(option, len(x), i)),)

        for action in (step, undo):
            with drawing_in(NAME, dtype):
                their, exact = action(theirs, dtype), action(oracle, torch.float64)
            check(action(ours, dtype), their, exact, dtype)


def test_what_repaint_refuses() -> None:
    ours, theirs = difusores.RePaintScheduler(), diffusers.RePaintScheduler()
    x = torch.zeros(1, 2, 3)
    for scheduler in (ours, theirs):
        with pytest.raises(NotImplementedError):
            scheduler.add_noise(x, x, torch.tensor([0]))
    for call in (lambda: ours.step(x, 5, x, x, x), lambda: ours.undo_step(x, 5)):
        with pytest.raises(ValueError, match="call set_timesteps"):
            call()
    for arguments in ((0,), (10, 0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            ours.set_timesteps(*arguments)
    ours.set_timesteps(2000)
    assert ours.num_inference_steps == 1000


def test_another_eta_may_be_assigned() -> None:
    results = []
    values = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    e, x, image, mask = values
    for package in (difusores, diffusers):
        scheduler = package.RePaintScheduler()
        scheduler.set_timesteps(10)
        scheduler.eta = 1.0
        results.append(scheduler.step(e, 500, x, image, mask, generator=torch.Generator().manual_seed(1))[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    ours = difusores.RePaintScheduler()
    assert ours.eta == 0.0 and ours.config.eta == 0.0


@pytest.mark.parametrize("wanted", ["sample", "mask"])
def test_gradients_pass(wanted: str) -> None:
    scheduler = difusores.RePaintScheduler()
    scheduler.set_timesteps(10)
    output, sample, image = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).unbind()
    given = {"sample": sample, "mask": torch.full((2, 1, 4, 4), 0.5)}
    given[wanted].requires_grad_()
    result = scheduler.step(
        output,
        scheduler.timesteps[2],
        original_image=image,
        generator=torch.Generator().manual_seed(2),
        **given,
    )
    result.prev_sample.sum().backward()
    assert given[wanted].grad.abs().sum() > 0
