"""No option is ignored: each one of every class, changed, changes a run, is refused, or stands in a list."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import difusores

NAMES = [name for name in difusores.schedulers.__all__ if name.endswith("Scheduler")]
SHAPE = (2, 4, 4, 4)

OTHER: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (500,),
    "beta_start": (0.002,),
    "beta_end": (0.03,),
    "beta_schedule": ("scaled_linear",),
    "trained_betas": ([0.001 + 0.0001 * i for i in range(100)],),
    "prediction_type": ("v_prediction", "epsilon"),
    "solver_type": ("heun", "midpoint", "bh1"),
    "algorithm_type": ("dpmsolver", "sde-dpmsolver++", "noise_prediction"),
    "timestep_spacing": ("leading", "trailing"),
    "timestep_type": ("continuous",),
    "variance_type": ("fixed_large", "nonsense"),
    "interpolation_type": ("log_linear",),
    "final_sigmas_type": ("sigma_min",),
    "time_shift_type": ("linear", "nonsense"),
    "sigma_schedule": ("exponential",),
    "disable_corrector": ([1],),
    "lambda_min_clipped": (-3.0,),
    "dynamic_thresholding_ratio": (0.5,),
    "sampling_eps": (0.1,),
    "noise_sampler_seed": (7,),
    "s_noise": (2.0,),
    "s_churn": (1.0,),
    "s_max": (1.0,),
    "tau_func": (lambda t: 0.5,),
}
"""Values besides the default. Others are negated, one more, or 0.7 for None."""

WITH: dict[str, dict[str, Any]] = {
    "thresholding": {"sample_max_value": 4.0},
    "dynamic_thresholding_ratio": {"thresholding": True, "sample_max_value": 4.0},
    "sample_max_value": {"thresholding": True},
    "clip_sample_range": {"clip_sample": True},
    "flow_shift": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "steps_offset": {"timestep_spacing": "leading"},
    "lower_order_final": {"final_sigmas_type": "sigma_min"},
    "euler_at_final": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "sigma_min": {"use_karras_sigmas": True},
    "sigma_max": {"use_karras_sigmas": True},
    "rho": {"sigma_schedule": "karras"},
    "timestep_type": {"prediction_type": "v_prediction"},
}
"""What an option counts with; of these, what the class has."""

FOREIGN = "another class's name for it in saved configurations, which stands for the default"
PIPELINES = "for pipelines, which read it: the scheduler itself has no use for it"
LEVELS = "how many levels there are before set_timesteps chooses some"
COMMON = ("set_alpha_to_one", "steps_offset", "timestep_spacing")
LIMITS = (
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
)
SHIFTS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
LAST = "the last step has no length, or leads to 0, where the order is 1 in any case"
LISTED = {
    **{(name, "solver_type"): FOREIGN for name in NAMES},
    **{(name, "algorithm_type"): FOREIGN for name in NAMES},
    **{("FlowMatchEulerDiscreteScheduler", option): PIPELINES for option in SHIFTS},
    ("FlowMatchEulerDiscreteScheduler", "time_shift_type"): "counts with mu",
    ("UniPCMultistepScheduler", "time_shift_type"): "counts with mu",
    ("ScoreSdeVeScheduler", "correct_steps"): PIPELINES,
    ("EDMDPMSolverMultistepScheduler", "euler_at_final"): LAST,
    ("CosineDPMSolverMultistepScheduler", "euler_at_final"): LAST,
    ("CosineDPMSolverMultistepScheduler", "lower_order_final"): LAST,
    **{(f"{name}Scheduler", "num_train_timesteps"): LEVELS for name in (
        "EDMEuler", "EDMDPMSolverMultistep", "CosineDPMSolverMultistep", "IPNDM", "ScoreSdeVe",
        "ScoreSdeVp")},
}  # fmt: skip
"""Options without effect in these runs, and why."""
SAVED = [
    *(("LCMScheduler", option) for option in COMMON),
    *(("TCDScheduler", option) for option in (*COMMON, *LIMITS, "timestep_scaling")),
    *((name, "variance_type") for name in NAMES if "DPMSolverM" in name or "SASolver" in name),
]
"""In files of diffusers, which takes them and never reads them."""


def run(name: str, options: dict[str, Any]) -> list[Tensor]:
    """Everything that a run of a class gives out: samples, inputs of the model, times."""
    scheduler: Any = getattr(difusores, name)(**options)
    torch.manual_seed(0)
    x, outputs = torch.randn(SHAPE), torch.randn(40, *SHAPE) * 1.5
    scheduler.set_timesteps(6)
    if name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(6)
        times = scheduler.timesteps
        found = [times, scheduler.step_correct(outputs[0], x, return_dict=False)[0]]
        return [*found, *(scheduler.step_pred(outputs[1], t, x, return_dict=False)[0] for t in times)]
    if name in ("ScoreSdeVpScheduler", "KarrasVeScheduler"):
        plan = scheduler.plan(6)
        return [plan.run(lambda given, time: outputs[0], x), plan.table()]
    found = [scheduler.timesteps, torch.as_tensor(getattr(scheduler, "init_noise_sigma", 1.0))]
    more = (x, torch.tensor([1.0, 0.0, 1.0, 0.0])) if name == "RePaintScheduler" else ()
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            found.append(scheduler.scale_model_input(x, t))
        x = scheduler.step(outputs[i % 40], t, x, *more, return_dict=False)[0]
        found.append(x)
    return found


def others(parameter: inspect.Parameter) -> tuple[Any, ...]:
    default = parameter.default
    if parameter.name in OTHER:
        return tuple(value for value in OTHER[parameter.name] if value != default)
    if isinstance(default, bool) or default is None:
        return (True,) if parameter.name.startswith("use_") else (0.7,) if default is None else (not default,)
    return (default + 1,)


@pytest.mark.parametrize("name", NAMES)
def test_no_option_is_ignored(name: str) -> None:
    parameters = inspect.signature(getattr(difusores, name).__init__).parameters
    ignored = []
    logging.disable(logging.CRITICAL)
    try:
        for parameter in list(parameters.values())[1:]:
            option = parameter.name
            if parameter.kind is parameter.VAR_KEYWORD or (name, option) in SAVED:
                continue
            context = {key: value for key, value in WITH.get(option, {}).items() if key in parameters}
            if (name, option) == ("EDMDPMSolverMultistepScheduler", "lower_order_final"):
                context["solver_order"] = 3  # which the last step but one has too
            base = run(name, context)
            for value in others(parameter):
                try:
                    changed = run(name, {**context, option: value})
                except (ValueError, NotImplementedError, ImportError):
                    continue
                pairs = zip(base, changed, strict=False)
                if len(base) == len(changed) and all(torch.equal(a, b) for a, b in pairs):
                    ignored.append(option)
    finally:
        logging.disable(logging.NOTSET)
    assert [option for option in ignored if (name, option) not in LISTED] == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("UniPCMultistep", {"sigma_min": 0.5}, "sigma_min=0.5 .* use_karras_sigmas"),
        ("EulerDiscrete", {"sigma_max": 5.0}, "sigma_max=5.0 need use_karras_sigmas"),
        ("UniPCMultistep", {"sigma_max": 5.0, "use_flow_sigmas": True}, "sigma_max=5.0 need"),
        ("UniPCMultistep", {"use_dynamic_shifting": True}, "use_dynamic_shifting=True needs use_flow_sigmas"),
        ("DPMSolverSinglestep", {"use_dynamic_shifting": True}, "needs use_flow_sigmas=True"),
        ("DEISMultistep", {"time_shift_type": "linear"}, "must be one of exponential, got 'linear'"),
        ("DPMSolverMultistep", {"time_shift_type": "nonsense"}, "must be one of exponential, got 'nonsense'"),
        ("DPMSolverMultistepInverse", {"variance_type": "nonsense"}, "variance_type must be one of None"),
        ("SASolver", {"variance_type": "nonsense"}, "variance_type must be one of None"),
        ("LCM", {"timestep_spacing": "nonsense"}, "timestep_spacing must be 'leading' or"),
        ("TCD", {"timestep_spacing": "nonsense"}, "timestep_spacing must be 'leading' or"),
    ],
)
def test_what_would_have_no_effect_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        shift = {"mu": 1.3} if "use_dynamic_shifting" in options else {}
        getattr(difusores, f"{name}Scheduler")(**options).set_timesteps(4, **shift)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("UniPCMultistep", {"sigma_min": 0.5, "sigma_max": 5.0}),
        ("EulerDiscrete", {"sigma_min": 0.5, "sigma_max": 5.0}),
        ("UniPCMultistep", {"use_dynamic_shifting": True}),
        ("DPMSolverSinglestep", {"use_dynamic_shifting": True}),
    ],
)
def test_what_has_no_effect_in_a_configuration_is_told(
    name: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A file that diffusers wrote loads, and gives what it gives there: the run without the options."""
    cls = getattr(difusores, f"{name}Scheduler")
    scheduler = cls.from_config({**cls().config, "_use_default_values": [], **options})
    assert f"{name}Scheduler: {next(iter(options))}" in caplog.text and "need" in caplog.text
    assert scheduler.config[next(iter(options))] == options[next(iter(options))]
    for each in (scheduler, plain := cls()):
        each.set_timesteps(6)
    assert torch.equal(scheduler.sigmas, plain.sigmas)
    with pytest.raises(ValueError, match="need"):
        cls(**options)


@pytest.mark.parametrize(
    ("name", "option"), [pair for pair in SAVED if not pair[0].startswith(("EDM", "Cosine"))], ids=str
)
def test_what_diffusers_never_reads_is_refused_and_told_where_a_configuration_holds_it(
    name: str, option: str, caplog: pytest.LogCaptureFixture
) -> None:
    cls = getattr(difusores, name)
    other = others(inspect.signature(cls.__init__).parameters[option])[0]
    words = f"without effect, as in diffusers, and only for saved configurations: {option}={other!r}"
    with pytest.raises(ValueError, match=re.escape(words)):
        cls(**{option: other})
    caplog.set_level(logging.INFO, logger="difusores")
    loaded = cls.from_config({**cls().config, "_use_default_values": [], option: other})
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", f"{name}: {words}")]
    assert loaded.config[option] == other
    for each in (loaded, plain := cls()):
        each.set_timesteps(4)
    assert torch.equal(loaded.timesteps, plain.timesteps)


@pytest.mark.parametrize("option", [{"s_churn": 0.1}, {"s_tmin": 0.1}, {"s_tmax": 1.0}, {"s_noise": 1.1}])
def test_flow_matching_takes_no_churn(option: dict[str, float]) -> None:
    scheduler = difusores.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=f"adds no churn, got .*{next(iter(option))}=[01].1?"):
        scheduler.step(x, scheduler.timesteps[0], x, **option)


def test_the_list_of_classes_in_the_documents() -> None:
    """Each class's row names its options and what `set_timesteps` and `step` take besides the usual."""
    text = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text(encoding="utf-8")
    section = text.split("## The classes")[1].split("\n## ")[0]
    short = {
        name: options.replace("\n", " ").split(", ")
        for name, options in re.findall(r"\*(\w+)\*:\s+([a-z_,\s]+)\.", section)
    }
    usual = {"num_inference_steps", "device", "model_output", "timestep", "sample", "return_dict", "kwargs"}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line
    ]
    assert sorted(f"{name}Scheduler" for name, *_ in rows[2:]) == sorted(NAMES)
    for name, *cells in rows[2:]:
        cls = getattr(difusores, f"{name}Scheduler")
        for cell, method in zip(cells, ("__init__", "set_timesteps", "step"), strict=True):
            said = [x for word in cell.split(", ") if word for x in short.get(word.strip("*"), [word])]
            function = getattr(cls, method, None)
            taken = list(inspect.signature(function).parameters)[1:] if function else []
            assert sorted(said) == sorted(set(taken) - usual), f"{name}.{method}"
