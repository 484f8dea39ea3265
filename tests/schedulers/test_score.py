"""The schedulers of score models against diffusers and against diffusers with float64 tables."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from gate import SHAPES, check
from pairs import all_pairs, check_pairs, factors
from test_by_timestep import drawing_in, generator_of, lift, peer
from torch import Tensor

import difusores
from difusores.sampling import langevin

pytest.importorskip("diffusers")

COMMON: dict[str, list[Any]] = {
    "steps": [10, 2, 3, 5, 25, 50, 1000],
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "shape": SHAPES,
}
# Values for every option of the constructors and of what draws noise. A scheduler with another one fails.
OPTIONS: dict[str, list[Any]] = {
    "num_train_timesteps": [2000, 500],
    "snr": [0.15, 0.3],
    "sigma_min": [0.01, 0.1],
    "sigma_max": [1348.0, 50.0],
    "sampling_eps": [1e-5, 1e-3],
    "correct_steps": [1, 2],
    "beta_min": [0.1, 0.5],
    "beta_max": [20, 10.0],
    "s_noise": [1.007, 1.0],
    "s_churn": [80, 0, 3.0],
    "s_min": [0.05, 1.0],
    "s_max": [50, 10.0],
    "generator": ["one", "list", "global"],
}
GIVEN = ("model_output", "timestep", "sample", "score", "x", "t", "sigma")
VE = (
    factors(difusores.ScoreSdeVeScheduler, OPTIONS, ("__init__", "step_pred"), GIVEN)
    | {
        "set_eps": [None, 0.01],
        "set_range": [{}, {"sigma_min": 0.02, "sigma_max": 20.0}],
        "each": [False, True],
    }
    | COMMON
)
VP = (
    factors(
        difusores.ScoreSdeVpScheduler,
        OPTIONS | {"sampling_eps": [1e-3, 1e-2]},
        ("__init__", "step_pred"),
        GIVEN,
    )
    | {"each": [False, True]}
    | COMMON
)
KARRAS = (
    factors(
        difusores.KarrasVeScheduler,
        OPTIONS | {"sigma_min": [0.02, 0.1], "sigma_max": [100, 50.0]},
        ("__init__", "add_noise_to_input"),
        GIVEN,
    )
    | {"numbers": [False, True]}
    | COMMON
)
TABLES = {"ScoreSdeVeScheduler": VE, "ScoreSdeVpScheduler": VP, "KarrasVeScheduler": KARRAS}


@pytest.mark.parametrize("name", TABLES)
def test_the_combinations_hold_every_pair(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_pairs(name, TABLES[name], all_pairs(TABLES[name]), [], capsys)


def both(name: str, option: dict[str, Any]) -> tuple[Any, Any]:
    known = inspect.signature(getattr(difusores, name)).parameters
    arguments = {key: value for key, value in option.items() if key in known}
    return getattr(difusores, name)(**arguments), peer(name)(**arguments)


@contextmanager
def in_double(whether: bool) -> Iterator[None]:
    """Where the oracle makes a tensor in the default dtype."""
    torch.set_default_dtype(torch.float64 if whether else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def some(steps: Iterable[Any]) -> list[tuple[int, Any]]:
    """The steps and their numbers; of a long run the first ones, the last ones and some in between."""
    found = list(enumerate(steps))
    middle = len(found) // 2
    return found if len(found) <= 25 else [*found[:5], *found[middle : middle + 5], *found[-5:]]


def tensors(option: dict[str, Any], index: int, count: int) -> list[Tensor]:
    values = torch.Generator().manual_seed(index)
    return [torch.randn(option["shape"], generator=values).to(option["dtype"]) for _ in range(count)]


@pytest.mark.parametrize(("index", "option"), list(enumerate(all_pairs(VE))))
def test_the_variance_exploding_process(index: int, option: dict[str, Any]) -> None:
    name, dtype = "ScoreSdeVeScheduler", option["dtype"]
    ours, theirs = both(name, option)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(option["steps"], option["set_eps"])
        scheduler.set_sigmas(option["steps"], **option["set_range"])
    for key in ("timesteps", "sigmas", "discrete_sigmas"):
        assert getattr(ours, key).dtype is getattr(theirs, key).dtype
        torch.testing.assert_close(getattr(ours, key), getattr(theirs, key), rtol=1e-6, atol=0)
    ours.discrete_sigmas = theirs.discrete_sigmas
    oracle = lift(theirs)
    e, x = tensors(option, index, 2)
    for i, t in some(ours.timesteps):
        chosen: Any = t if i % 2 else float(t)
        if option["each"]:
            chosen = ours.timesteps[torch.arange(len(x)) * (i + 1) % len(ours.timesteps)]

        def predict(scheduler: Any, wide: torch.dtype, chosen: Any = chosen, i: int = i) -> Any:
            generator = generator_of(option, len(x), i)
            return scheduler.step_pred(e.to(wide), chosen, x.to(wide), generator, return_dict=False)

        def correct(scheduler: Any, wide: torch.dtype, i: int = i) -> Any:
            generator = generator_of(option, len(x), i)
            return scheduler.step_correct(e.to(wide), x.to(wide), generator, return_dict=False)

        for action, drawn in ((predict, dtype), (correct, torch.float32)):
            with drawing_in(name, drawn):
                their = action(theirs, dtype)
            with drawing_in(name, drawn, torch.float64), in_double(action is correct):
                exact = action(oracle, torch.float64)
            check(action(ours, dtype), their, exact, dtype)


@pytest.mark.parametrize(("index", "option"), list(enumerate(all_pairs(VP))))
def test_the_variance_preserving_process(index: int, option: dict[str, Any]) -> None:
    name, dtype = "ScoreSdeVpScheduler", option["dtype"]
    ours, theirs = both(name, option)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(option["steps"])
    assert torch.equal(ours.timesteps, theirs.timesteps)
    e, x = tensors(option, index, 2)
    for i, t in some(ours.timesteps):
        chosen = ours.timesteps[torch.arange(len(x)) * (i + 1) % len(ours.timesteps)] if option["each"] else t

        def step(scheduler: Any, wide: torch.dtype, t: Tensor, i: int = i) -> Any:
            return scheduler.step_pred(e.to(wide), x.to(wide), t, generator_of(option, len(x), i))

        with drawing_in(name, dtype):
            their, exact = step(theirs, dtype, chosen), step(theirs, torch.float64, chosen.double())
        check(step(ours, dtype, chosen), their, exact, dtype)


@pytest.mark.parametrize(("index", "option"), list(enumerate(all_pairs(KARRAS))))
def test_karras_ve(index: int, option: dict[str, Any]) -> None:
    name, dtype = "KarrasVeScheduler", option["dtype"]
    ours, theirs = both(name, option)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(option["steps"])
    assert torch.equal(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.schedule, theirs.schedule, rtol=1e-6, atol=0)
    e, x, other, slope = tensors(option, index, 4)
    levels = theirs.schedule.flip(0)
    for i, (sigma, after) in some(pairwise(levels)):
        # with tensors, sigma_hat is rounded to float32
        exactly = option["numbers"] or dtype is torch.float64
        numbers: list[Any] = [float(sigma), float(after)] if exactly else [sigma, after]

        def churn(scheduler: Any, wide: torch.dtype, level: Any, i: int = i) -> Any:
            return scheduler.add_noise_to_input(x.to(wide), level, generator_of(option, len(x), i))

        def step(scheduler: Any, wide: torch.dtype, *levels: Any) -> Any:
            found = scheduler.step(e.to(wide), *levels, x.to(wide))
            return found.prev_sample, found.derivative, found.pred_original_sample

        def correct(scheduler: Any, wide: torch.dtype, *levels: Any) -> Any:
            given = (t.to(wide) for t in (x, other, slope))
            found = scheduler.step_correct(e.to(wide), *levels, *given)
            return found.prev_sample, found.derivative, found.pred_original_sample

        with drawing_in(name, torch.float32):
            their, hat = churn(theirs, dtype, numbers[0])
        with drawing_in(name, torch.float32, torch.float64):
            exact, _ = churn(theirs, torch.float64, float(sigma))
        mine, our_hat = churn(ours, dtype, numbers[0])
        assert type(our_hat) is type(hat) and float(our_hat) == pytest.approx(float(hat))
        check((mine,), (their,), (exact,), dtype)
        for action in (step, correct):
            exact = action(theirs, torch.float64, float(sigma), float(after))
            check(action(ours, dtype, *numbers), action(theirs, dtype, *numbers), exact, dtype)


def test_places_are_found_in_float32() -> None:
    """The product of this time and 365 is below 364, and 364 in float32."""
    ours, theirs = difusores.ScoreSdeVeScheduler(), peer("ScoreSdeVeScheduler")()
    x = torch.ones(1, 2, 3)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(366)
        scheduler.set_sigmas(366)
    t = next(float(t) for t in ours.timesteps if float(t) == 0.9972602725028992)
    means = [s.step_pred(x, t, x).prev_sample_mean for s in (ours, theirs)]
    torch.testing.assert_close(*means, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(1, 3), (2, 3, 5), (1, 4, 64, 64), (3, 5, 129, 67)])
def test_the_corrector_is_the_same_by_every_way(shape: tuple[int, ...]) -> None:
    """Plain tensors go around PyTorch, others do not; sums in another order give other last bits."""
    e, x, z = torch.randn(3, shape[0], 2 * shape[1], *shape[2:]).split(shape[1], dim=2)[0].unbind()
    z = z.clone()
    norms = [float(t.double().flatten(1).norm(dim=1).mean()) for t in (z, e)]
    step = 2 * (0.15 * norms[0] / norms[1]) ** 2
    expected = (x.double() + step * e.double() + math.sqrt(2 * step) * z.double()).float()
    for way in (nullcontext(), difusores.use_backend("reference")):
        with way:
            result = langevin(e, x, z, 0.15)
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=2e-6)
            assert torch.equal(langevin(e, x, z, 0.15), result)
            assert torch.equal(langevin(torch.zeros_like(e), x, z, 0.15), x)
            unknown = e.index_fill(0, torch.tensor([0]), math.nan)
            assert langevin(unknown, x, z, 0.15).isnan().any(), "a score that is no number is not hidden"


def test_a_copy_knows_no_timestep_by_an_old_address() -> None:
    ve = difusores.ScoreSdeVeScheduler()
    x = torch.ones(1, 2, 3)
    ve.step_pred(x, ve.timesteps[3], x)
    twin = copy.deepcopy(ve)
    assert ve.__dict__["_host"].start == ve.timesteps.data_ptr() and twin.__dict__["_host"] is None
    results = [s.step_pred(x, s.timesteps[3], x).prev_sample_mean for s in (ve, twin)]
    assert torch.equal(*results)


def test_tuples_are_short() -> None:
    x = torch.ones(1, 2, 3)
    karras = difusores.KarrasVeScheduler()
    full = karras.step(x, 3.0, 2.0, x)
    assert [
        torch.equal(*p)
        for p in zip(karras.step(x, 3.0, 2.0, x, return_dict=False), full.values(), strict=False)
    ]
    assert len(karras.step(x, 3.0, 2.0, x, return_dict=False)) == 2
    assert len(karras.step_correct(x, 3.0, 2.0, x, x, x, return_dict=False)) == 2
    ve = difusores.ScoreSdeVeScheduler()
    assert list(ve.step_pred(x, 0.5, x)) == ["prev_sample", "prev_sample_mean"]
    assert list(ve.step_correct(x, x)) == ["prev_sample"]


def test_what_score_schedulers_refuse() -> None:
    x = torch.zeros(1, 2, 3)
    vp, karras = difusores.ScoreSdeVpScheduler(), difusores.KarrasVeScheduler()
    with pytest.raises(ValueError, match="call set_timesteps before step_pred"):
        vp.step_pred(x, x, torch.tensor(0.5))
    with pytest.raises(ValueError, match="call set_timesteps before add_noise_to_input"):
        karras.add_noise_to_input(x, 3.0)
    with pytest.raises(NotImplementedError):
        karras.add_noise(x, x, torch.tensor([0]))
    vp.set_timesteps(10)
    with pytest.raises(ValueError, match="t must be above 0"):
        vp.step_pred(x, x, torch.tensor(0.0))
    ve = difusores.ScoreSdeVeScheduler()
    with pytest.raises(IndexError, match=r"time 1\.5 is outside"):
        ve.step_pred(x, 1.5, x)
    for scheduler in (ve, vp):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            scheduler.set_timesteps(0)
    with pytest.raises(TypeError, match="knows no training steps"):
        len(karras)
    assert karras
    karras.set_timesteps(1)
    assert karras.schedule is not None and karras.schedule.tolist() == [10000.0]


def test_the_training_side_of_the_variance_exploding_process() -> None:
    x, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    ours, theirs = difusores.ScoreSdeVeScheduler(), peer("ScoreSdeVeScheduler")()
    places = torch.tensor([0, 1999])
    for dtype in (torch.float32, torch.float16):
        results = [s.add_noise(x.to(dtype), noise.to(dtype), places) for s in (ours, theirs)]
        assert results[0].dtype is results[1].dtype
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    expected = theirs.add_noise(x, None, places)
    torch.manual_seed(0)
    torch.testing.assert_close(ours.add_noise(x, None, places), expected, rtol=1e-5, atol=1e-5)
    t = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(ours.get_adjacent_sigma(places, t), theirs.get_adjacent_sigma(places, t))


def test_the_predictor_follows_the_marginals_of_gaussian_data() -> None:
    """Data of deviation 1: the sample at every level has the deviation sqrt(1 + sigma²)."""
    ve = difusores.ScoreSdeVeScheduler(sigma_max=50.0)
    ve.set_timesteps(400)
    ve.set_sigmas(400)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20000, generator=generator) * math.sqrt(1 + 50.0**2)
    for t, sigma in zip(ve.timesteps, ve.discrete_sigmas.flip(0), strict=True):
        x = ve.step_pred(-x / (1 + float(sigma) ** 2), t, x, generator).prev_sample
    assert float(x.std()) == pytest.approx(1.0, rel=0.03)
