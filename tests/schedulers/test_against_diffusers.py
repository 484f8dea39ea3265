"""Every option of every scheduler, crossed pairwise, against diffusers and against a float64 oracle.

The oracle is written here from the papers' equations. Both libraries get the same samples, model outputs and
generators at each step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from pairs import all_pairs
from torch import Tensor

import difusores

diffusers = pytest.importorskip("diffusers")

TRAINED = torch.linspace(0.001, 0.05, 1000).tolist()

# Values for every option of a constructor. A scheduler with an option that is not listed here fails.
OPTIONS: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 50, 997],
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
    "set_alpha_to_one": [True, False],
    "steps_offset": [0, 1],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.9],
    "clip_sample_range": [1.0, 0.5],
    "sample_max_value": [1.0, 1.5],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "rescale_betas_zero_snr": [False, True],
}
STEP_OPTIONS: dict[str, list[Any]] = {
    "eta": [0.0, 0.5, 1.0],
    "use_clipped_model_output": [False, True],
    "generator": ["one", "list", "global"],
    "variance_noise": [False, True],
}
COMMON: dict[str, list[Any]] = {
    "steps": [1, 2, 5, 10, 25, 50, 61, 1000],
    "dtype": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "shape": [(3, 4), (2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5)],
    "layout": ["contiguous", "strided", "transposed"],
}
PLACES = (0.99, 0.8, 0.42, 0.4, 0.06)
"""Timesteps of a caller's own, as shares of the training steps: `set_timesteps` takes them for a number."""
NOT_OPTIONS = {"self", "model_output", "timestep", "sample", "return_dict"}


def factors(name: str) -> dict[str, list[Any]]:
    cls = getattr(difusores, name)
    options = [key for key in inspect.signature(cls.__init__).parameters if key not in NOT_OPTIONS]
    step_options = [key for key in inspect.signature(cls.step).parameters if key not in NOT_OPTIONS]
    beta_schedules = EXTRA_BETA_SCHEDULES[name]
    chosen = {key: OPTIONS[key] for key in options} | {key: STEP_OPTIONS[key] for key in step_options}
    chosen |= {"beta_schedule": OPTIONS["beta_schedule"] + beta_schedules} | COMMON
    if "timesteps" in inspect.signature(cls.set_timesteps).parameters:
        chosen["steps"] = [*COMMON["steps"], PLACES]
    return chosen


EXTRA_BETA_SCHEDULES = {"DDPMScheduler": ["sigmoid", "laplace"], "DDIMScheduler": []}


@dataclass
class Case:
    """One step as the oracle sees it: float64 tensors, alphas_cumprod at t and before it."""

    option: dict[str, Any]
    a: float
    before: float
    t: int
    x: Tensor
    e: Tensor
    v: Tensor | None
    z: Tensor


def predicted(case: Case) -> tuple[Tensor, Tensor]:
    """x0 limited and unlimited: Ho et al. 2020 eq. 15; Salimans & Ho 2022; Saharia et al. 2022, 2.3."""
    kind, a = case.option["prediction_type"], case.a
    if kind == "epsilon":
        raw = (case.x - math.sqrt(1 - a) * case.e) / math.sqrt(a)
    elif kind == "sample":
        raw = case.e
    else:
        raw = math.sqrt(a) * case.x - math.sqrt(1 - a) * case.e
    x0 = raw
    if case.option["thresholding"]:
        # the library rounds x0 to the sample's dtype before it takes the quantile
        magnitudes = raw.to(case.option["dtype"]).double().abs().flatten(1).sort().values.clamp(max=1e300)
        place = case.option["dynamic_thresholding_ratio"] * (magnitudes.shape[1] - 1)
        low, high = magnitudes[:, math.floor(place)], magnitudes[:, math.ceil(place)]
        s = low + (place - math.floor(place)) * (high - low)
        s = s.clamp(min=1).clamp(max=case.option["sample_max_value"]).view(-1, *[1] * (raw.ndim - 1))
        x0 = torch.minimum(torch.maximum(raw, -s), s) / s
    elif case.option["clip_sample"]:
        x0 = raw.clamp(-case.option["clip_sample_range"], case.option["clip_sample_range"])
    return x0, raw


def ddpm_oracle(case: Case) -> tuple[Tensor, Tensor]:
    """Ho et al. 2020 eqs. 6 and 7; variances of section 3.2 and of Nichol & Dhariwal 2021, eq. 15."""
    x0, _ = predicted(case)
    alpha = case.a / case.before
    beta = 1 - alpha
    posterior = beta * (1 - case.before) / (1 - case.a)
    mean = (math.sqrt(case.before) * beta * x0 + math.sqrt(alpha) * (1 - case.before) * case.x) / (1 - case.a)
    if case.t == 0:
        return mean, x0
    variance: Tensor | float
    kind = case.option["variance_type"]
    if kind == "learned":
        assert case.v is not None
        variance = case.v
    elif kind == "learned_range":
        assert case.v is not None
        share = (case.v + 1) / 2
        variance = torch.exp(share * math.log(beta) + (1 - share) * math.log(max(posterior, 1e-20)))
    else:
        variance = max(posterior, 1e-20) if "small" in kind else beta
    return mean + torch.as_tensor(variance, dtype=torch.float64).sqrt() * case.z, x0


def ddim_oracle(case: Case) -> tuple[Tensor, Tensor]:
    """Song et al. 2021 eqs. 12 and 16."""
    x0, raw = predicted(case)
    source = x0 if case.option["use_clipped_model_output"] else raw
    if case.option["prediction_type"] == "epsilon" and not case.option["use_clipped_model_output"]:
        epsilon = case.e
    else:
        epsilon = (case.x - math.sqrt(case.a) * source) / math.sqrt(1 - case.a)
    sigma2 = case.option["eta"] ** 2 * (1 - case.before) / (1 - case.a) * (1 - case.a / case.before)
    direction = math.sqrt(max(1 - case.before - sigma2, 0.0)) * epsilon
    return math.sqrt(case.before) * x0 + direction + math.sqrt(max(sigma2, 0.0)) * case.z, x0


ORACLES: dict[str, Callable[[Case], tuple[Tensor, Tensor]]] = {
    "DDPMScheduler": ddpm_oracle,
    "DDIMScheduler": ddim_oracle,
}
# Here the float stride of diffusers leaves one timestep too many, -1, which is none.
LONGER = {"num_train_timesteps": 1000, "timestep_spacing": "trailing", "steps": 61}


def combinations_of(name: str) -> list[dict[str, Any]]:
    found = all_pairs(factors(name))
    return [*found, {**found[0], **LONGER}]


COMBINATIONS = [
    (name, index, option) for name in ORACLES for index, option in enumerate(combinations_of(name))
]


@pytest.mark.parametrize("name", ORACLES)
def test_the_combinations_hold_every_pair(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = [option for owner, _, option in COMBINATIONS if owner == name]
    table = factors(name)
    for one, other in combinations(table, 2):
        held = {(repr(option[one]), repr(option[other])) for option in found}
        assert len(held) == len(table[one]) * len(table[other]), (one, other)
    with capsys.disabled():
        total = math.prod(len(values) for values in table.values())
        print(f"\n{name}: {len(found)} combinations hold every pair of {len(table)} options (of {total:.1e})")


def arrange(values: Tensor, layout: str) -> Tensor:
    """The same values, laid out differently in memory."""
    if layout == "strided":
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), float("nan"))
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "transposed":
        return values.transpose(1, -1).contiguous().transpose(1, -1)
    return values.contiguous()


def generators(kind: str, batch: int, seed: int) -> Any:
    if kind == "list":
        return [torch.Generator().manual_seed(seed + k) for k in range(batch)]
    if kind == "one":
        return torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    return None


def states(kind: str, source: Any) -> Tensor:
    if kind == "list":
        return torch.stack([generator.get_state() for generator in source])
    return torch.get_rng_state() if source is None else source.get_state()


def noise_of(kind: str, shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    source = generators(kind, shape[0], seed)
    if kind == "list":
        return torch.cat([torch.randn((1, *shape[1:]), generator=one, dtype=dtype) for one in source])
    return torch.randn(shape, generator=source, dtype=dtype)


def lift(scheduler: Any) -> Any:
    """diffusers with float64 coefficients."""
    for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "one"):
        if name in vars(scheduler):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def error(result: Tensor, expected: Tensor) -> float:
    return (result.double() - expected).abs().max().item()


def known_failure(option: dict[str, Any], name: str, a: float, t: int) -> str | None:
    """The listed cases in which diffusers has no usable number and this library has one."""
    if option["thresholding"] and len(option["shape"]) == 2:
        return "thresholding of rank 2 is a TypeError"
    if option["thresholding"] and option["dtype"] is torch.float16 and a < 1e-9:
        return "x0 overflows, and the quantile of infinities is not a number"
    if name == "DDPMScheduler" and option["variance_type"] == "fixed_large_log" and t > 0:
        return "fixed_large_log takes the root of a logarithm"
    if name == "DDIMScheduler" and option["eta"] == 1 and a == 0:
        return "at a zero signal-to-noise ratio 1 - a_before - sigma**2 may be rounded to less than 0"
    return None


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
@pytest.mark.parametrize(("name", "option"), [pytest.param(n, o, id=f"{n}-{i}") for n, i, o in COMBINATIONS])
def test_a_step_is_that_of_diffusers_and_of_the_papers(name: str, option: dict[str, Any]) -> None:
    keys = [key for key in inspect.signature(getattr(difusores, name).__init__).parameters if key in OPTIONS]
    config = {key: option[key] for key in keys}
    total, steps = option["num_train_timesteps"], option["steps"]
    given = {"num_inference_steps": steps}
    if steps is PLACES:
        given = {"timesteps": [int(place * total) for place in PLACES]}
        steps = len(PLACES)
    if config["trained_betas"] is not None:
        config["trained_betas"] = TRAINED[:total]
    ours, theirs = getattr(difusores, name)(**config), getattr(diffusers, name)(**config)
    if steps > total:
        for scheduler in (ours, theirs):
            with pytest.raises(ValueError):
                scheduler.set_timesteps(steps)
        return
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**given)
    assert len(ours.timesteps) == steps
    if option.items() >= LONGER.items():
        assert theirs.timesteps[steps:].tolist() == [-1]
        theirs.timesteps = theirs.timesteps[:steps]
    assert torch.equal(ours.timesteps, theirs.timesteps)
    table = theirs.alphas_cumprod.double().tolist()
    final = float(getattr(theirs, "final_alpha_cumprod", 1.0))
    if option["dtype"] is torch.float64:
        lift(theirs)
    times = theirs.timesteps.tolist()
    following = dict(pairwise([*times, -1]))
    seen = times if len(times) <= 50 else [*times[:4], *times[400:403], *times[-4:]]
    for t in seen:
        before = following[t] if name == "DDPMScheduler" else t - total // steps
        index = times.index(t)
        arguments = step_arguments(name, option, t, seed=t)
        if t == total:
            for scheduler in (ours, theirs):
                with pytest.raises(IndexError):
                    scheduler.step(*arguments)
            continue
        if table[t] == 0 and option["prediction_type"] == "epsilon":
            with pytest.raises(ValueError, match="predicted noise does not tell x0"):
                ours.step(*arguments)
            continue
        before_a = table[before] if before >= 0 else final
        compare(name, option, ours, theirs, index, t, table[t], before_a)


def step_arguments(name: str, option: dict[str, Any], t: int, seed: int) -> tuple[Tensor, int, Tensor]:
    values = torch.Generator().manual_seed(1000 + seed)
    shape, dtype = option["shape"], option["dtype"]
    sample = torch.randn(shape, generator=values, dtype=torch.float64)
    output = torch.randn(shape, generator=values, dtype=torch.float64)
    if option.get("variance_type") in ("learned", "learned_range"):
        learned = torch.rand(shape, generator=values, dtype=torch.float64)
        if option["variance_type"] == "learned_range":
            learned = 2 * learned - 1
        output = torch.cat([output, learned], dim=1)
    return arrange(output.to(dtype), option["layout"]), t, arrange(sample.to(dtype), option["layout"])


def compare(
    name: str, option: dict[str, Any], ours: Any, theirs: Any, index: int, t: int, a: float, before: float
) -> None:
    output, _, sample = step_arguments(name, option, t, seed=t)
    copies = output.clone(), sample.clone()
    channels, given = sample.shape[1], bool(option.get("variance_noise"))
    kind = "given" if given else option["generator"]
    z = noise_of(option["generator"], sample.shape, sample.dtype, seed=t)
    extra = {key: option[key] for key in ("eta", "use_clipped_model_output") if key in option}
    draws = not given and (t > 0 if name == "DDPMScheduler" else option["eta"] > 0)

    def step(scheduler: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
        source = generators(kind, sample.shape[0], seed=t)
        fresh = states(kind, source)
        noise = {"variance_noise": z} if given else {"generator": source}
        result = scheduler.step(
            output, scheduler.timesteps[index], sample, **extra, **noise, return_dict=False
        )
        assert torch.equal(fresh, states(kind, source)) != draws
        return result, states(kind, source)

    learned = output[:, channels:].double() if output.shape[1] == 2 * channels else None
    case = Case(option, a, before, t, sample.double(), output[:, :channels].double(), learned, z.double())
    expected = ORACLES[name](case)
    results, after = step(ours)
    assert all(torch.equal(now, then) for now, then in zip((output, sample), copies, strict=True))
    failure = known_failure(option, name, a, t)
    references: tuple[Tensor, ...] = ()
    try:
        references, their_after = step(theirs)
        assert torch.equal(after, their_after)
    except TypeError:
        assert failure is not None
    for k, (result, oracle) in enumerate(zip(results, expected, strict=True)):
        assert result.dtype is sample.dtype and result.shape == sample.shape
        scale = max(1.0, oracle.abs().max().item())
        own = error(references[k], oracle) if references else 0.0
        if not math.isfinite(own):
            assert failure is not None
            own = 0.0
        elif sample.dtype is torch.float64 and references:
            assert error(result, references[k]) <= 1e-6 * scale
        if sample.dtype is torch.float64:
            assert error(result, oracle) <= 1e-12 * scale
        elif sample.dtype is torch.float32:
            assert error(result, oracle) <= max(1e-5, 2 * own)
        else:
            assert error(result, oracle) <= 2 * own + 4 * torch.finfo(sample.dtype).eps * scale
