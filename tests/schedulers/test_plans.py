"""Plans of every class: the loop as one call, against the loop that users write by hand."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections import Counter
from dataclasses import replace
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import difusores
from difusores import native
from difusores.plan import Noise, Plan, Stage

SHAPE = (2, 3, 4, 4)
STEPS = 7
NAMES = [
    name
    for name in difusores.schedulers.__all__
    if name.endswith("Scheduler") and hasattr(getattr(difusores.schedulers, name), "plan")
]

# Options without which there is no plan, or whose loop has noise that no generator decides.
OPTIONS: dict[str, dict[str, Any]] = {
    "DPMSolverSDEScheduler": {"noise_sampler_seed": 8},
    "ScoreSdeVeScheduler": {"correct_steps": 0},
}
SCORE = ["KarrasVeScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler"]
BROWNIAN = ["CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"]


def made(name: str) -> Any:
    return getattr(difusores, name)(**OPTIONS.get(name, {}))


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x * (0.5 + torch.as_tensor(t, dtype=torch.float64).float() / 2000))


def by_hand(scheduler: Any, x: Tensor, seed: int | None) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
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


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SCORE])
def test_a_plan_gives_the_images_of_the_loop(name: str) -> None:
    scheduler = made(name)
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
    plan, again = made(name).plan(STEPS), made(name).plan(STEPS)
    assert plan == again and hash(plan) == hash(again) and len({plan, again}) == 1
    # the bits, where == takes -0 for 0 and 1 for True
    assert plan.to_json() == again.to_json() and repr(plan) == repr(again)
    assert torch.equal(plan.table().view(torch.int64), again.table().view(torch.int64))
    assert plan != made(name).plan(STEPS + 1)
    read = Plan.from_json(plan.to_json())
    assert read == plan and hash(read) == hash(plan) and read.to_json() == plan.to_json()
    json.loads(plan.to_json(), parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert len(str(plan).splitlines()) == len(plan) + 1
    for row, stage in zip(str(plan).splitlines()[1:], plan.stages, strict=True):
        assert f"t = {stage.time:<10.6g}" in row and ("draws" in row) == (stage.noise is not None)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_plan_can_be_changed(name: str) -> None:
    plan = made(name).plan(STEPS)
    before = plan.to_json()
    for value in (plan, *plan.stages):
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, None)
            assert_immutable(getattr(value, field.name))
    plan.table().zero_()
    plan.run(model, first(made(name)), generator=torch.Generator().manual_seed(0))
    assert plan.to_json() == before


def assert_immutable(value: Any) -> None:
    if isinstance(value, tuple):
        for part in value:
            assert_immutable(part)
    else:
        assert value is None or type(value) in (bool, int, float, str, Stage), type(value)


@pytest.mark.parametrize("name", NAMES)
def test_threads_share_a_plan(name: str) -> None:
    scheduler = made(name)
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
    scheduler = made(name)
    scheduler.save_pretrained(tmp_path)
    read = type(scheduler).from_pretrained(tmp_path).plan(STEPS)
    assert read == scheduler.plan(STEPS) and read.to_json() == scheduler.plan(STEPS).to_json()


def predicted(scheduler: Any, x: Tensor, generator: torch.Generator, begin: int) -> Tensor:
    """The loop of diffusers' ScoreSdeVePipeline, without its corrector; that for ScoreSdeVp is the same."""
    mean, levels = x, scheduler.sigmas
    for i, t in list(enumerate(scheduler.timesteps))[begin:]:
        if levels is None:
            x, mean = scheduler.step_pred(model(x, t), x, t, generator)
        else:
            x, mean = scheduler.step_pred(model(x, levels[i]), t, x, generator, return_dict=False)
    return mean


def corrected(scheduler: Any, x: Tensor, generator: torch.Generator, begin: int) -> Tensor:
    """The loop of diffusers' KarrasVePipeline."""
    for t in scheduler.timesteps[begin:]:
        sigma, after = scheduler.schedule[t], scheduler.schedule[t - 1] if t > 0 else 0
        raised, hat = scheduler.add_noise_to_input(x, sigma, generator)
        step = scheduler.step(model(raised, hat), hat, after, raised)
        x = step.prev_sample
        if after != 0:
            slope = step.derivative
            x = scheduler.step_correct(model(x, after), hat, after, raised, x, slope).prev_sample
    return x


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("steps", [1, 2, STEPS])
@pytest.mark.parametrize("name", SCORE)
def test_the_plan_of_a_score_model_gives_the_images_of_its_loop(name: str, steps: int, begin: int) -> None:
    if begin >= steps:
        begin = steps - 1
    scheduler = made(name)
    scheduler.set_timesteps(steps)
    if name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(steps)
    loop = corrected if name == "KarrasVeScheduler" else predicted
    plan = scheduler.plan(steps, begin=begin)
    if begin == 0:
        assert plan.init_noise_sigma == scheduler.config.get("sigma_max", 1.0)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * plan.init_noise_sigma
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    with torch.no_grad():
        expected = loop(scheduler, x, generators[0], begin)
    result = plan.run(model, x, generator=generators[1])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-6 * float(x.abs().max()))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_the_range_of_a_score_models_plan_may_be_given() -> None:
    scheduler = made("ScoreSdeVeScheduler")
    scheduler.set_timesteps(STEPS, 0.01)
    scheduler.set_sigmas(STEPS, 0.1, 20.0)
    plan = scheduler.plan(STEPS, sampling_eps=0.01, sigma_min=0.1, sigma_max=20.0)
    x = 20 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    expected = predicted(scheduler, x, torch.Generator().manual_seed(4), 0)
    result = plan.run(model, x, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


def test_runs_that_are_no_list_of_rows_have_no_plan() -> None:
    with pytest.raises(ValueError, match="correct_steps=1 has no plan: how far the corrector goes"):
        difusores.ScoreSdeVeScheduler().plan(STEPS)
    assert not hasattr(difusores.RePaintScheduler, "plan")
    for name in SCORE:
        with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
            made(name).plan(0)


class TestBrownianPaths:
    @pytest.fixture(params=BROWNIAN)
    def scheduler(self, request: pytest.FixtureRequest) -> Any:
        pytest.importorskip("torchsde", reason="Brownian noise is torchsde's")
        return made(request.param)

    def test_a_run_begun_late_follows_the_path_of_the_loop(self, scheduler: Any) -> None:
        scheduler.set_timesteps(STEPS)
        x, begin = first(scheduler) / 10, 4
        scheduler.set_begin_index(begin)
        generators = [torch.Generator().manual_seed(k) for k in (1, 2)]
        known = inspect.signature(scheduler.step).parameters
        options = {"generator": generators} if "generator" in known else {}
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **options)[0]
        ours = scheduler.plan(STEPS, begin=begin).run(model, first(scheduler) / 10, generator=generators)
        torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)

    def test_the_seed_is_the_generators_or_the_global_one(self, scheduler: Any) -> None:
        scheduler = type(scheduler)()
        plan, x = scheduler.plan(STEPS), first(scheduler)
        assert plan.path is not None and plan.path.seed is None

        def run(seed: int) -> Tensor:
            return plan.run(model, x, generator=torch.Generator().manual_seed(seed))

        assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
        scheduler.set_timesteps(STEPS)
        torch.manual_seed(5)
        expected = by_hand(scheduler, x, None)
        torch.manual_seed(5)
        torch.testing.assert_close(plan.run(model, x), expected, rtol=1e-5, atol=1e-5)
        both = plan.run(model, x, generator=[torch.Generator().manual_seed(k) for k in (1, 2)])
        alone = plan.run(model, x[1:], generator=[torch.Generator().manual_seed(2)])
        torch.testing.assert_close(both[1:], alone)
        with pytest.raises(ValueError, match="2 images, 3 seeds"):
            plan.run(model, x, generator=[torch.Generator()] * 3)

    @pytest.mark.parametrize("seed", [np.int64(5), [np.int64(5), 6], 5])
    def test_seeds_of_every_kind_are_saved(self, seed: Any) -> None:
        pytest.importorskip("torchsde", reason="Brownian noise is torchsde's")
        scheduler = difusores.DPMSolverSDEScheduler(noise_sampler_seed=seed)
        scheduler.set_timesteps(STEPS)
        plan, x = scheduler.plan(STEPS), first(scheduler)
        assert Plan.from_json(plan.to_json()) == plan and hash(plan) == hash(scheduler.plan(STEPS))
        torch.testing.assert_close(plan.run(model, x), by_hand(scheduler, x, 0), rtol=1e-5, atol=1e-5)

    def test_two_grids_follow_one_path(self, scheduler: Any) -> None:
        """Seeds apart the images differ by the noise, steps apart by less: the path is the same."""
        plans = [scheduler.plan(steps) for steps in (200, 400)]
        x = first(scheduler)
        plans = [replace(plan, path=plan.path._replace(seed=None)) for plan in plans]
        results = [
            plan.run(lambda x, t: 0 * x, x, generator=torch.Generator().manual_seed(seed))
            for plan, seed in ((plans[0], 1), (plans[1], 1), (plans[1], 2))
        ]
        same, other = ((result - results[1]).std() for result in (results[0], results[2]))
        assert same < other / 5, (same, other)

    def test_independent_noise_only_where_it_is_exact(self, scheduler: Any) -> None:
        plan, x = scheduler.plan(STEPS), first(scheduler)
        if type(scheduler).__name__ == "DPMSolverSDEScheduler":
            with pytest.raises(ValueError, match="parts of a Brownian path that overlap"):
                plan.run(model, x, noise="philox", seeds=[1, 2])
            return
        together = plan.run(model, x, noise="philox", seeds=[1, 2])
        alone = plan.run(model, x[1:], noise="philox", seeds=[2])
        assert torch.equal(together[1:], alone)

    def test_torchsde_has_nothing_to_warn_of(self, scheduler: Any, recwarn: pytest.WarningsRecorder) -> None:
        for steps in (*range(1, 20), 200):
            noise = scheduler.plan(steps).path.begin(torch.zeros(1, 1))
            for stage in scheduler.plan(steps).stages:
                if stage.noise is not None:
                    assert noise(*stage.noise.span).isfinite().all()
        assert [str(w.message) for w in recwarn if "Should have" in str(w.message)] == []

    def test_without_torchsde_the_missing_package_is_named(
        self, scheduler: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torchsde", None)
        with pytest.raises(ImportError, match="pip install torchsde"):
            scheduler.plan(STEPS).run(model, first(scheduler))

    def test_a_path_needs_spans(self, scheduler: Any) -> None:
        plan = scheduler.plan(STEPS)
        assert "noise of a Brownian path over" in str(plan) and " from " in str(plan)
        stages = tuple(replace(stage, noise=Noise()) for stage in plan.stages)
        with pytest.raises(ValueError, match="needs a span"):
            replace(plan, stages=stages)
        assert len(replace(plan, stages=stages, path=None)) == len(plan)


class Counting(TorchDispatchMode):
    """Ops by name, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.name() != "aten::split.Tensor":
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or "")
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_a_guided_step_is_one_op_and_with_its_rescale_two(name: str) -> None:
    """However many steps: what a run does once beside them does not grow."""
    output = torch.randn(2 * SHAPE[0], *SHAPE[1:])
    for rescale in (0.0, 0.7):
        counts = []
        for steps in (STEPS, STEPS + 4):
            plan = made(name).plan(steps)
            with Counting() as counting:
                plan.run(lambda x, t: output, torch.randn(SHAPE), guidance=(2.0, -1.0), rescale=rescale)
            counts.append((len(plan), counting.calls))
        (few, before), (many, after) = counts
        grown = after - before
        expected = {"difusores::scheduler_step": many - few}
        if rescale:
            expected["difusores::guidance_rescale"] = many - few
        assert grown == expected


def test_what_a_plan_refuses_of_a_rescale() -> None:
    plan, x = made("DDIMScheduler").plan(STEPS), torch.randn(SHAPE)
    with pytest.raises(ValueError, match="conditional is 2; there are 2 guidance weights"):
        plan.run(model, x, guidance=(2.0, -1.0), conditional=2)
    with pytest.raises(ValueError, match=r"share is 1\.5; needed is a number from 0 to 1"):
        plan.run(model, x, guidance=(2.0, -1.0), rescale=1.5)
