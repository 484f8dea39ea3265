"""The list of what diffusers 0.42 crashes at, makes NaN of or ignores, and what comes out here."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import difusores

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 3, 4, 4)
NAN = math.nan
Call = Callable[[Any], Any]


class Case(NamedTuple):
    """One way to use some classes.

    Attributes:
        what: in words.
        names: of the classes, without "Scheduler".
        options: of the constructor.
        call: what is done with the scheduler; it may return a tensor.
        theirs: what diffusers does: the exception that it raises, NAN for a tensor that is not finite, None
            where it goes on as if nothing were wrong.
        ours: words of our ValueError (IndexError at a place where there is no step), or what is right, as a
            function of the scheduler. None: any finite number; a test of its own has the right one.
    """

    what: str
    names: str
    options: dict[str, Any]
    call: Call
    theirs: type[BaseException] | float | None
    ours: str | Callable[[Any], Tensor] | None


def tensors(channels: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A sample and what a model says of it."""
    values = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, generator=values, dtype=torch.float64)
    e = torch.randn((2, channels, 4, 4), generator=values, dtype=torch.float64)
    return x.to(dtype), e.to(dtype)


def scaled(scheduler: Any, x: Tensor, t: Any) -> None:
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, t)


def grid(steps: int | None = 10, **arguments: Any) -> Call:
    return lambda scheduler: scheduler.set_timesteps(steps, **arguments)


def one_step(
    at: int = 0,
    steps: int | None = 10,
    channels: int = 3,
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, ...] = SHAPE,
    t: Any = None,
    **arguments: Any,
) -> Call:
    """The step at timestep `at` of a run that begins there."""

    def call(scheduler: Any) -> Tensor:
        if steps is not None:
            scheduler.set_timesteps(steps)
        if at and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(at)
        place = scheduler.timesteps[at] if t is None else t
        x, e = tensors(channels, dtype)
        if shape != SHAPE:
            x, e = (tensor.flatten()[: math.prod(shape)].reshape(shape) for tensor in (x, e))
        scaled(scheduler, x, place)
        return scheduler.step(e, place, x, **arguments)[0]  # type: ignore[no-any-return]

    return call


def loop(steps: int = 20, beyond: int = 0, last: bool = False) -> Call:
    """A whole run and some steps more; `last`: what the last step changes."""

    def call(scheduler: Any) -> Tensor:
        scheduler.set_timesteps(steps)
        x = before = tensors()[0]
        for t in [*scheduler.timesteps, *[scheduler.timesteps[-1]] * beyond]:
            scaled(scheduler, x, t)
            before, x = x, scheduler.step(torch.tanh(x), t, x, return_dict=False)[0]
        return x - before if last else x

    return call


def nothing(_: Any) -> Tensor:
    return torch.zeros(SHAPE, dtype=torch.float64)


def clean_image(scheduler: Any) -> Tensor:
    """x0 at the last timestep, from predicted noise."""
    x, e = tensors()
    level = float(scheduler.sigmas[-2])
    return x * math.sqrt(level**2 + 1) - level * e


def like_the_largest_variance(_: Any) -> Tensor:
    torch.manual_seed(0)
    return one_step()(diffusers.DDPMScheduler(variance_type="fixed_large"))  # type: ignore[no-any-return]


def limited_noise(scheduler: Any) -> Tensor:
    """A first-order step with the noise of the limited x0."""
    x, e = tensors()
    levels = [float(sigma) for sigma in scheduler.sigmas[:2]]
    (a, s), (b, r) = [(1 / math.sqrt(v * v + 1), v / math.sqrt(v * v + 1)) for v in levels]
    x0 = ((x - s * e) / a).clamp(-1, 1)
    return b * x0 + r * (x - a * x0) / s


def without_the_variance(scheduler: Any) -> Tensor:
    """The step of diffusers on the half of the channels that is no variance."""
    x, e = tensors(6)
    other = diffusers.SASolverScheduler()
    other.set_timesteps(10)
    other.set_begin_index(4)
    torch.manual_seed(0)
    return other.step(e[:, :3], other.timesteps[4], x)[0]  # type: ignore[no-any-return]


def in_three_dimensions(scheduler: Any) -> Tensor:
    """The same numbers as an image of one column, which diffusers takes."""
    other = getattr(diffusers, type(scheduler).__name__)(thresholding=True)
    torch.manual_seed(0)
    return one_step(shape=(2, 4, 1))(other)[..., 0]  # type: ignore[no-any-return]


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
LOWEST = {"final_sigmas_type": "sigma_min"}
AT_ONE_LEVEL = {**LOWEST, "solver_order": 3, "lower_order_final": False}
INDEXED = (
    "IPNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete DPMSolverMultistep DPMSolverMultistepInverse "
    "DPMSolverSinglestep DEISMultistep EDMEuler EDMDPMSolverMultistep CMStochasticIterative "
    "FlowMatchEulerDiscrete"
)
TABLED = (
    "LMSDiscrete EulerDiscrete EulerAncestralDiscrete KDPM2Discrete KDPM2AncestralDiscrete UniPCMultistep "
    "DPMSolverMultistep DPMSolverMultistepInverse DEISMultistep SASolver UnCLIP"
)

CASES = [
    # No signal at the first timestep: predicted noise does not tell x0.
    Case(
        "no signal",
        "DDPM DDIM DDPMParallel DDIMParallel",
        {**ZERO_SNR, "clip_sample": False},
        one_step(),
        NAN,
        "zero signal-to-noise ratio.*'v_prediction' or 'sample'",
    ),
    Case(
        "no signal, clipped in float16",
        "DDPM DDIM DDPMParallel DDIMParallel",
        ZERO_SNR,
        one_step(dtype=torch.float16),
        None,
        "zero signal-to-noise ratio",
    ),
    Case(
        "no signal",
        "LCM TCD",
        {"rescale_betas_zero_snr": True},
        one_step(steps=4),
        NAN,
        "zero signal-to-noise ratio",
    ),
    Case(
        "no noise",
        "DDIMInverse",
        {"prediction_type": "sample"},
        one_step(),
        NAN,
        "predicted x0 does not tell the noise",
    ),
    Case(
        "no noise in the betas",
        "DDPM DDIM",
        {"trained_betas": [0.0, 0.1, 0.2], "num_train_timesteps": 3},
        one_step(at=2, steps=3),
        NAN,
        "alphas_cumprod has to lie in",
    ),
    # Steps of no length and to sigma = 0.
    Case(
        "last step at one level",
        "DPMSolverMultistep",
        {**AT_ONE_LEVEL, "use_karras_sigmas": True},
        loop(last=True),
        NAN,
        nothing,
    ),
    Case(
        "last step at one level",
        "DPMSolverMultistep",
        {**AT_ONE_LEVEL, "use_exponential_sigmas": True},
        loop(last=True),
        NAN,
        nothing,
    ),
    Case(
        "last step at one level",
        "UniPCMultistep",
        {**AT_ONE_LEVEL, "use_karras_sigmas": True, "disable_corrector": [18]},
        loop(last=True),
        NAN,
        nothing,
    ),
    Case(
        "equal timesteps",
        "DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep",
        {"num_train_timesteps": 20, "solver_order": 3, "solver_type": "heun"},
        loop(),
        NAN,
        None,
    ),
    Case(
        "last step at one level",
        "CosineDPMSolverMultistep",
        LOWEST,
        loop(10, last=True),
        RecursionError,
        nothing,
    ),
    Case("to sigma = 0", "UniPCMultistep", {"solver_type": "bh1"}, one_step(at=9), NAN, clean_image),
    Case("to sigma = 0", "UniPCMultistep", {"predict_x0": False}, one_step(at=9), NAN, clean_image),
    Case(
        "to sigma = 0",
        "KarrasVe",
        {},
        lambda s: s.step_correct(2 * ones(), 0.02, 0.0, ones(), ones(), -2 * ones()).prev_sample,
        NAN,
        lambda _: ones() + 0.04,
    ),
    Case(
        "a score of zero",
        "ScoreSdeVe",
        {},
        lambda s: s.step_correct(0 * ones(), ones()).prev_sample,
        NAN,
        lambda _: ones(),
    ),
    # Orders.
    Case(
        "third order with noise",
        "DPMSolverMultistep",
        {"algorithm_type": "sde-dpmsolver", "solver_order": 3, **LOWEST},
        loop(),
        UnboundLocalError,
        None,
    ),  # test_dpm: a_step_is_exact_where_the_model_is_linear_in_lambda
    Case(
        "third order with noise",
        "EDMDPMSolverMultistep",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        loop(),
        UnboundLocalError,
        "solver_order must be 1 or 2 with .*got 3",
    ),
    Case(
        "third order with noise",
        "CosineDPMSolverMultistep",
        {"solver_order": 3},
        loop(5),
        UnboundLocalError,
        "solver_order must be 1 or 2 with .*got 3",
    ),
    Case(
        "fourth order is third",
        "DPMSolverMultistep DPMSolverMultistepInverse DEISMultistep EDMDPMSolverMultistep",
        {"solver_order": 4},
        loop(),
        None,
        "solver_order must be 1,? (2,)?.*got 4",
    ),
    Case(
        "no order",
        "DPMSolverMultistep DPMSolverMultistepInverse DEISMultistep UniPCMultistep EDMDPMSolverMultistep",
        {"solver_order": 0},
        loop(),
        IndexError,
        "solver_order must be .*got 0",
    ),
    Case(
        "no order",
        "DPMSolverSinglestep",
        {"solver_order": 0},
        loop(),
        UnboundLocalError,
        "solver_order must be .*got 0",
    ),
    Case("orders that there are none of", "LMSDiscrete", {}, one_step(order=9), None, "from 1 to 6, got 9"),
    Case(
        "orders that there are none of",
        "SASolver",
        {"predictor_order": 5},
        one_step(),
        None,
        "predictor_order must be .*got 5",
    ),
    Case(
        "orders that there are none of",
        "SASolver",
        {"corrector_order": 0},
        loop(),
        AssertionError,
        "corrector_order must be .*got 0",
    ),
    Case(
        "second order to sigma = 0",
        "UniPCMultistep",
        {"lower_order_final": False},
        loop(),
        NAN,
        "no finite step to sigma = 0",
    ),
    # Noise.
    Case(
        "the root of a logarithm",
        "DDPM",
        {"variance_type": "fixed_large_log"},
        one_step(),
        NAN,
        like_the_largest_variance,
    ),
    Case("more noise than fits", "DDIM", {}, one_step(eta=3.0), NAN, r"eta = 3\.0"),
    Case(
        "a variance of no kind",
        "DDPM DDPMParallel",
        {"variance_type": "small"},
        one_step(),
        None,
        "variance_type must be one of .*got 'small'",
    ),
    Case(
        "noise on the way to more of it",
        "DPMSolverMultistepInverse",
        {"algorithm_type": "sde-dpmsolver++"},
        loop(),
        NAN,
        "removes noise, and this step leads from less to more",
    ),
    Case(
        "three generators for two images",
        "DDPM DDPMParallel EulerAncestralDiscrete SASolver LCM TCD CMStochasticIterative UnCLIP",
        {},
        one_step(generator=[torch.Generator() for _ in range(3)]),
        None,
        "one per image: 2 images, 3 generators",
    ),
    Case(
        "three generators for two images",
        "CosineDPMSolverMultistep",
        {},
        one_step(generator=[torch.Generator() for _ in range(3)]),
        AssertionError,
        "one seed per image: 2 images, 3 seeds",
    ),
    Case(
        "churn where there is none",
        "FlowMatchEulerDiscrete",
        {},
        one_step(s_churn=0.5),
        None,
        "adds no churn, got s_churn=0.5",
    ),
    Case(
        "a learned variance",
        "SASolver",
        {"variance_type": "learned_range"},
        one_step(at=4, channels=6),
        RuntimeError,
        without_the_variance,
    ),
    # Thresholds.
    Case(
        "limits of predicted noise",
        "SASolver",
        {"algorithm_type": "noise_prediction", "thresholding": True, "tau_func": lambda t: 0.0},
        one_step(),
        RuntimeError,
        limited_noise,
    ),
    Case(
        "limits of predicted noise",
        "DPMSolverSinglestep",
        {"algorithm_type": "dpmsolver", "thresholding": True, **LOWEST},
        one_step(),
        RuntimeError,
        limited_noise,
    ),
    Case(
        "limits that are not used",
        "UniPCMultistep",
        {"thresholding": True, "predict_x0": False},
        one_step(),
        None,
        "thresholding needs predict_x0=True",
    ),
    Case(
        "limits in two dimensions",
        "DDPM DDIM DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep DEISMultistep "
        "UniPCMultistep SASolver DDPMParallel DDIMParallel EDMDPMSolverMultistep",
        {"thresholding": True},
        one_step(shape=(2, 4)),
        TypeError,
        in_three_dimensions,
    ),
    # Grids.
    Case("fewer steps than Runge and Kutta's", "PNDM", {}, grid(3), ValueError, "from 4 on, got 3"),
    Case("one step between two", "UnCLIP", {}, grid(1), ZeroDivisionError, "at least 2"),
    Case(
        "no steps",
        "DDPM DDIM DDIMInverse PNDM LCM TCD CMStochasticIterative DDPMParallel DDIMParallel",
        {},
        grid(0),
        ZeroDivisionError,
        "num_inference_steps must be from 1 .*got 0",
    ),
    Case("no steps", "HeunDiscrete DPMSolverSinglestep", {}, grid(0), TypeError, "from 1 .*got 0"),
    Case(
        "no steps",
        f"IPNDM EDMEuler EDMDPMSolverMultistep CosineDPMSolverMultistep {TABLED}",
        {},
        grid(0),
        None,
        "num_inference_steps must be (from 1|at least [12])",
    ),
    Case(
        "more steps than training has",
        f"PNDM HeunDiscrete DPMSolverSDE DPMSolverSinglestep {TABLED}",
        {},
        grid(1001),
        None,
        "from 1 to 1000.*got 1001",
    ),
    Case(
        "trailing steps, of which diffusers has one more, at -1",
        "DDPM DDIM EulerDiscrete LMSDiscrete",
        {"timestep_spacing": "trailing"},
        lambda s: s.set_timesteps(61) or s.timesteps.double(),
        None,
        lambda _: torch.tensor([round(1000 - k * 1000 / 61) - 1 for k in range(61)]),
    ),
    Case(
        "trailing steps of solvers that end beside the image, of which diffusers has one more, at -1",
        "DPMSolverMultistep UniPCMultistep DEISMultistep SASolver",
        {"timestep_spacing": "trailing"},
        lambda s: s.set_timesteps(61) or s.timesteps.double(),
        None,
        lambda _: torch.tensor([round(1000 - k * 1000 / 61) - 1 for k in range(61)]),
    ),
    Case(
        "a table of another length",
        "DDIM EulerDiscrete LMSDiscrete UniPCMultistep DPMSolverMultistep",
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 5},
        lambda s: None,
        None,
        "trained_betas has 3 values, and num_train_timesteps is 5",
    ),
    Case(
        "timesteps that rise",
        "EulerDiscrete",
        {},
        lambda s: s.set_timesteps(timesteps=[1, 500, 900]),
        None,
        "timesteps must descend within 999 to 0, got",
    ),
    Case(
        "timesteps beyond training",
        "EulerDiscrete",
        {},
        lambda s: s.set_timesteps(timesteps=[1200, 500]),
        None,
        "timesteps must descend within 999 to 0, got",
    ),
    Case(
        "churn below nothing",
        "EulerDiscrete FlowMatchHeunDiscrete",
        {},
        lambda s: (
            s.set_timesteps(4) or s.step(ones(), s.timesteps[0], ones(), s_churn=-0.1, return_dict=False)[0]
        ),
        None,
        "s_churn must not be below 0, got -0.1",
    ),
    Case(
        "a beginning before the first step",
        "DPMSolverMultistep UniPCMultistep",
        {},
        lambda s: (
            s.set_timesteps(4)
            or s.set_begin_index(-1)
            or s.step(ones(), s.timesteps[0], ones(), return_dict=False)[0]
        ),
        NAN,
        "begin_index is -1, and there are 4 timesteps",
    ),
    Case(
        "a shift that nothing takes",
        "DPMSolverMultistep DPMSolverSinglestep DEISMultistep",
        {},
        grid(4, mu=1.0),
        AssertionError,
        "mu needs use_flow_sigmas",
    ),
    Case(
        "flows without their levels",
        "DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep DEISMultistep UniPCMultistep "
        "SASolver",
        {"prediction_type": "flow_prediction"},
        one_step(),
        None,
        "'flow_prediction' is for .*use_flow_sigmas",
    ),
    Case(
        "one step to a level above 0",
        "FlowMatchEulerDiscrete",
        {"shift_terminal": 0.1},
        lambda s: s.set_timesteps(1) or s.sigmas,
        NAN,
        lambda _: torch.tensor([1.0, 0.0]),
    ),
    Case(
        "levels that differ by less than float32",
        "KDPM2AncestralDiscrete",
        {"beta_schedule": "squaredcos_cap_v2"},
        lambda s: s.set_timesteps(2) or s.timesteps,
        NAN,
        lambda _: torch.tensor([999.0, 0.0, 0.0]),
    ),
    Case(
        "a model that predicts the image",
        "EulerAncestralDiscrete",
        {"prediction_type": "sample"},
        one_step(9),
        NotImplementedError,
        lambda _: tensors()[1],
    ),
    Case(
        "a model that predicts the image",
        "KDPM2Discrete KDPM2AncestralDiscrete",
        {"prediction_type": "sample"},
        one_step(18),
        NotImplementedError,
        lambda _: tensors()[1],
    ),
    Case(
        "no signal in the betas",
        "EulerDiscrete LMSDiscrete KDPM2Discrete UniPCMultistep DPMSolverMultistep",
        {"trained_betas": [0.1, 0.1, 1.0], "num_train_timesteps": 3, "timestep_spacing": "trailing"},
        one_step(steps=3),
        NAN,
        "not finite|zero signal-to-noise ratio",
    ),
    Case(
        "times of no kind",
        "EulerDiscrete",
        {"timestep_type": "whole"},
        one_step(),
        None,
        "timestep_type must be .*got 'whole'",
    ),
    Case(
        "levels for their places",
        "EDMEuler",
        {},
        lambda s: s.set_timesteps(sigmas=torch.tensor([80.0, 1.0])),
        None,
        "sigmas are places of levels",
    ),
    Case(
        "an end at pure noise",
        "FlowMatchEulerDiscrete",
        {"shift_terminal": 1.0},
        grid(4),
        None,
        "shift_terminal must lie from 0 to below 1",
    ),
    Case(
        "jumps over nothing",
        "RePaint",
        {},
        grid(10, jump_length=0),
        ValueError,
        "jump_length must be at least 1",
    ),
    # Places.
    Case("beyond the end", INDEXED, {}, loop(3, beyond=1), IndexError, "the run is over: it has 3 timesteps"),
    Case("beyond the end", "CosineDPMSolverMultistep", {}, loop(3, beyond=1), IndexError, "the run is over"),
    Case(
        "beyond the end", "UniPCMultistep SASolver", {}, loop(3, beyond=1), AssertionError, "the run is over"
    ),
    Case("beyond the end", "LCM TCD", {}, loop(3, beyond=1), None, "the run is over"),
    Case(
        "beyond the end",
        "HeunDiscrete FlowMatchHeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete",
        {},
        loop(3, beyond=1),
        NAN,
        "the run is over: it has 5 timesteps",
    ),
    Case(
        "before set_timesteps",
        "DDIMInverse PNDM",
        {},
        one_step(3, steps=None),
        TypeError,
        "call set_timesteps",
    ),
    Case(
        "before set_timesteps",
        "CMStochasticIterative FlowMatchEulerDiscrete",
        {},
        one_step(3, steps=None),
        None,
        "call set_timesteps",
    ),
    Case(
        "no timestep of the run",
        "LCM TCD EDMEuler CMStochasticIterative",
        {},
        one_step(t=333.0),
        IndexError,
        "timestep 333.0 is not one of timesteps",
    ),
    Case(
        "no timestep of the run",
        "DDPM DDPMParallel",
        {},
        one_step(t=333),
        IndexError,
        "timestep 333 is not one of",
    ),
    Case(
        "begun in the middle of a step",
        "HeunDiscrete FlowMatchHeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete",
        {},
        one_step(1),
        None,
        "cannot begin at index 1, within a step of two",
    ),
    Case("begun in the middle of a step", "DPMSolverSDE", {}, one_step(1), NAN, "cannot begin at index 1"),
]
BROWNIAN = ("CosineDPMSolverMultistep", "DPMSolverSDE")
DEPRECATED = {"KarrasVe": "deprecated.scheduling_karras_ve"}
SINGLE = [(case, name) for case in CASES for name in case.names.split()]


def ones() -> Tensor:
    return torch.ones(1, 2, 3)


def peer(name: str) -> Any:
    module = DEPRECATED.get(name)
    place = diffusers if module is None else importlib.import_module(f"diffusers.schedulers.{module}")
    return getattr(place, f"{name}Scheduler")


@pytest.mark.parametrize(("case", "name"), SINGLE, ids=[f"{name}: {case.what}" for case, name in SINGLE])
def test_where_diffusers_fails(case: Case, name: str) -> None:
    if name in BROWNIAN:
        pytest.importorskip("torchsde", reason="diffusers has the class only where torchsde is installed")

    def outcome(cls: Any) -> Any:
        torch.manual_seed(0)
        return case.call(cls(**case.options))

    if isinstance(case.theirs, type):
        with pytest.raises(case.theirs):
            outcome(peer(name))
    else:
        result = outcome(peer(name))
        if isinstance(result, Tensor):
            assert bool(result.isfinite().all()) == (case.theirs is None)
        theirs = result
    cls = getattr(difusores, f"{name}Scheduler")
    if isinstance(case.ours, str):
        with pytest.raises((ValueError, IndexError), match=case.ours):
            outcome(cls)
        return
    scheduler = cls(**case.options)
    torch.manual_seed(0)
    result = case.call(scheduler)
    assert result.isfinite().all()
    if case.ours is not None:
        right = case.ours(scheduler)
        torch.testing.assert_close(result, right.to(result.dtype), rtol=1e-5, atol=1e-5)
        assert case.theirs is not None or theirs.shape != result.shape or not torch.allclose(theirs, result)
