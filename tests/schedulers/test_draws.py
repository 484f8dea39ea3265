"""Noise is drawn as diffusers draws it: the same numbers in the same dtype, and as many of them.

A draw in another dtype would make another image of every seed. The crossings of options put one noise in
place of both libraries' draws; here each draws its own.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch

import difusores

diffusers = pytest.importorskip("diffusers")

SHAPE, STEPS = (2, 3, 6, 5), 3
# RePaint and the loops of score.py take other arguments; the Brownian classes' noise is torchsde's
ELSEWHERE = ("RePaint", "KarrasVe", "ScoreSde", "DPMSolverSDE", "Cosine")
NAMES = [
    name
    for name in difusores.schedulers.__all__
    if name.endswith("Scheduler")
    and not name.startswith(ELSEWHERE)
    and "generator" in inspect.signature(getattr(difusores, name).step).parameters
]
SDE = {"algorithm_type": "sde-dpmsolver++"}
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DDIMScheduler": ({}, {"eta": 1.0}),
    "DDIMParallelScheduler": ({}, {"eta": 1.0}),
    "DDPMScheduler": ({"variance_type": "learned_range"}, {}),
    "EulerDiscreteScheduler": ({}, {"s_churn": 3.0}),
    "EDMEulerScheduler": ({}, {"s_churn": 3.0}),
    "FlowMatchEulerDiscreteScheduler": ({"stochastic_sampling": True}, {}),
    "FlowMatchHeunDiscreteScheduler": ({}, {"s_churn": 3.0}),
    "TCDScheduler": ({}, {"eta": 0.3}),
    "DPMSolverMultistepScheduler": (SDE, {}),
    "DPMSolverSinglestepScheduler": (SDE, {}),
    "EDMDPMSolverMultistepScheduler": (SDE, {}),
    "DPMSolverMultistepInverseScheduler": ({**SDE, "use_flow_sigmas": True}, {}),
}
"""What makes a class draw: options of the constructor and of step."""


def run(
    scheduler: Any, kind: str, dtype: torch.dtype, of_x: torch.dtype, learned: bool, **options: Any
) -> Any:
    """The samples of a few steps, each from a given one, and what the generators are at afterwards."""
    scheduler.set_timesteps(STEPS)
    generators = [
        torch.Generator().manual_seed(7 + image) for image in range(SHAPE[0] if kind == "list" else 1)
    ]
    values, samples = torch.Generator().manual_seed(1), []
    for i, t in enumerate(scheduler.timesteps):
        level = min(float(scheduler.sigmas[i]), 20.0) if hasattr(scheduler, "sigmas") else 0.0
        x = (torch.randn(SHAPE, generator=values) * math.sqrt(1 + level**2)).to(of_x)
        e = (
            torch.randn(SHAPE[0], SHAPE[1] * (1 + learned), *SHAPE[2:], generator=values)
            .clamp(-0.9, 0.9)
            .to(dtype)
        )
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        generator = generators if kind == "list" else generators[0]
        samples.append(scheduler.step(e, t, x, generator=generator, return_dict=False, **options)[0])
    return samples, [generator.get_state() for generator in generators]


@pytest.mark.parametrize("name", NAMES)
def test_noise_has_the_dtype_and_the_numbers_of_diffusers(name: str) -> None:
    of_class, of_step = MORE.get(name, ({}, {}))
    learned = "variance_type" in of_class
    made = [getattr(package, name)(**of_class) for package in (difusores, diffusers)]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for of_x in {dtype, torch.float32}:
            for kind in ("one", "list"):
                found = [
                    run(copy.deepcopy(scheduler), kind, dtype, of_x, learned, **of_step) for scheduler in made
                ]
                (ours, after), (theirs, after_theirs) = found
                assert all(map(torch.equal, after, after_theirs)), (dtype, of_x, kind)
                eps = max(torch.finfo(dtype).eps, torch.finfo(of_x).eps)
                for mine, right in zip(ours, theirs, strict=True):
                    assert mine.dtype is right.dtype
                    atol = (8 * eps + 1e-5) * max(1.0, float(right.abs().max()))
                    torch.testing.assert_close(mine, right, rtol=0, atol=atol)
