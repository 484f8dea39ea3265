"""A step is one op: no tensor arithmetic in the shells, no value read back, no memory but the results'."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from arithmetic import PACKAGE, SHELLS, computed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import difusores
from difusores import native
from difusores.schedulers import base, score
from difusores.schedulers.base import SchedulerMixin
from difusores.schedulers.flow import FlowScheduler

SHAPE = (2, 3, 4, 4)
# Why a class, or a method of it, is not one op.
EXEMPT = {
    "CosineDPMSolverMultistepScheduler": "its noise is a Brownian path, built by torchsde",
    "DPMSolverSDEScheduler": "its noise is a Brownian path, built by torchsde",
    "KarrasVeScheduler": "its step takes the levels as arguments",
    "RePaintScheduler": "a mask decides which pixels are kept",
    "ScoreSdeVeScheduler": "its predictor has its own name, its corrector's step is a ratio of norms",
    "ScoreSdeVpScheduler": "its predictor has a name of its own",
}
ALL = [name for name in difusores.schedulers.__all__ if name.endswith("Scheduler")]
NAMES = [name for name in ALL if name not in EXEMPT]
needs_kernels = pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or "")

COMPARES_PLAIN_VALUES = ("base.py", "old == new")  # in `_same`, which asks for their types first


@pytest.mark.parametrize("file", sorted(SHELLS.glob("*.py")), ids=lambda file: file.stem)
def test_a_shell_does_no_tensor_arithmetic(file: Path) -> None:
    found = computed(file.read_text(encoding="utf-8"))
    assert [at for at in found if (file.name, at[1]) != COMPARES_PLAIN_VALUES] == []


@pytest.mark.parametrize(
    "planted",
    [
        "return (x - e) / 0.7",
        "return x @ e.T",
        "return -x",
        "return x > n",
        "return x.square().cos()",
        "return x.mul_(2)",
        "return x.float() * n",
        "return abs(x)",
        "return torch.where(x, e, x)",
        "return self.sigmas[n] * 2",
        "return self.betas.cumprod(0)",
        "return [part + 1 for part in x.unbind()]",
        "x += 1",
        "y = x.to(e.device)\n        y *= n",
        "for part in x:\n            part / n",
        "(a, b), n = x.split(1), 3\n        return a + n",
        "return schedules.with_data(n) + 1",
        "return (lambda t: t + x)(n)",
    ],
)
def test_the_guard_objects_to_arithmetic(planted: str) -> None:
    step = "def step(self, x: Tensor, e: Tensor | None, n: int) -> Any"
    assert computed(f"class Planted:\n    {step}:\n        {planted}\n")


def test_the_guard_leaves_numbers_alone() -> None:
    source = """
def step(self, x: Tensor, n: int) -> Any:
    index = x.data_ptr() - self.timesteps.data_ptr()
    n += len(x) * 2 + float(x) + x.stride(0)
    return x.to(self.device), [t + 1 for t in x.tolist()], x is None, index // n
"""
    assert computed(source) == []


# Ops that leave numbers as they are, which a shell may ask for.
MOVES = frozenset(
    [
        "alias",
        "arange",
        "clone",
        "copy_",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "equal",
        "expand",
        "fill_",
        "flip",
        "full",
        "index",
        "is_pinned",
        "lift_fresh",
        "linspace",
        "new_empty",
        "normal_",
        "promote_types",
        "reshape",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
        "_local_scalar_dense",
        "_reshape_alias",
        "_to_copy",
        "_unsafe_view",
    ]
)


class Guard(TorchDispatchMode):
    """Objects to an op that computes where the innermost code of the package is a shell's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not name.startswith("difusores::") and name.removeprefix("aten::") not in MOVES:
            frame = sys._getframe(1)
            while frame is not None and not frame.f_code.co_filename.startswith(str(PACKAGE)):
                frame = frame.f_back  # type: ignore[assignment]
            if frame is not None and frame.f_code.co_filename.startswith(str(SHELLS)):
                raise AssertionError(f"{name} in {frame.f_code.co_filename}:{frame.f_lineno}")
        return func(*args, **(kwargs or {}))


def argument(scheduler: Any, method: str, parameter: str) -> Any:
    """A value for a parameter of a method; KeyError for one that is not known here."""
    times, x = scheduler.timesteps, torch.full(SHAPE, 0.5)
    given: dict[str, Any] = {
        **dict.fromkeys(("num_inference_steps", "begin_index"), 6 if method != "set_begin_index" else 0),
        **dict.fromkeys(("model_output", "score", "sample", "original_samples", "noise", "x"), x),
        **dict.fromkeys(("original_image", "sample_hat", "sample_prev", "derivative"), x),
        **dict.fromkeys(("sigma", "sigma_hat"), torch.tensor(1.5)),
        "mask": torch.ones(SHAPE[-1]),
        "order": 2,
        "current_order": 0,
        "mu": 0.5,
        "shift": 2.0,
        "sigma_prev": torch.tensor(1.0),
        "sigmas": np.array([1.0, 2.0]),
        "t": torch.tensor([0.9, 0.3]),
        "timestep": None if times is None else times[0],
        "timesteps": None if times is None else times[:2],
    }
    if method == "get_lms_coefficient":
        given["t"] = 2
    if method == "get_adjacent_sigma" or (type(scheduler).__name__, method) == (
        "ScoreSdeVeScheduler",
        "add_noise",
    ):
        given["timesteps"] = torch.tensor([0, 3])
    if method == "step_pred" and "score" not in inspect.signature(scheduler.step_pred).parameters:
        given["t"] = times[0]
    return given[parameter]


def public_methods(name: str) -> list[str]:
    cls = getattr(difusores, name)
    inherited = set(dir(SchedulerMixin))
    names = [key for key in dir(cls) if not key.startswith("_") and key not in inherited]
    return [key for key in names if inspect.isfunction(inspect.getattr_static(cls, key))] + ["_get_variance"]


# More ways than the defaults' that a class has: options of the constructor and of step.
WAYS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "FlowMatchEulerDiscreteScheduler": [
        ({"stochastic_sampling": stochastic}, {"per_token_timesteps": torch.rand(SHAPE[:2]) * 900})
        for stochastic in (False, True)
    ]
    + [({"shift_terminal": 0.1, "use_dynamic_shifting": True}, {})],
    "UniPCMultistepScheduler": [
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True, "shift_terminal": 0.1}, {})
    ],
    "DDPMScheduler": [({"variance_type": "learned_range"}, {})],
    "DDIMScheduler": [({"thresholding": True}, {"eta": 1.0, "variance_noise": torch.ones(SHAPE)})],
    "EDMEulerScheduler": [({"prediction_type": "v_prediction"}, {"pred_original_sample": torch.ones(SHAPE)})],
    "EulerDiscreteScheduler": [({"use_karras_sigmas": True}, {"s_churn": 3.0})],
    "DPMSolverMultistepScheduler": [({"variance_type": "learned", "thresholding": True}, {})],
}


@pytest.mark.parametrize("name", ALL)
def test_no_method_of_a_shell_computes_with_tensors(name: str) -> None:
    """set_timesteps and plan as well: what they compute, `schedules` and `solvers` do."""
    if name in ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"):
        pytest.importorskip("torchsde", reason="Brownian noise is torchsde's")
    for options, of_step in [({}, {}), *WAYS.get(name, [])]:
        shift = {"mu": 0.5} if options.get("use_dynamic_shifting") else {}
        with Guard():
            scheduler: Any = getattr(difusores, name)(**options)
            scheduler.set_timesteps(6, **shift)
        for method in public_methods(name):
            function = getattr(scheduler, method, None)
            if method == "_get_variance" and function is not None:
                with Guard():
                    t = int(scheduler.timesteps[2])
                    function(t, torch.ones(SHAPE)) if name.startswith("DDPM") else function(t, t - 100)
                continue
            if function is None or (method.startswith("stretch") and not scheduler.config.shift_terminal):
                continue
            parameters = inspect.signature(function).parameters.values()
            needed = [
                p.name
                for p in parameters
                if p.name in ("num_inference_steps", "noise")
                or (p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
            ]
            given = {key: argument(scheduler, method, key) for key in needed}
            if str(options.get("variance_type")).startswith("learned") and "model_output" in given:
                given["model_output"] = given["model_output"].repeat(1, 2, 1, 1)
            if method == "step" and "per_token_timesteps" in of_step:
                given |= {key: given[key].flatten(2) for key in ("sample", "model_output")}
            with Guard():
                try:
                    if method in ("step", "step_pred") and name not in EXEMPT:
                        for t in scheduler.timesteps[:5]:
                            function(**{**given, "timestep": t}, **of_step)
                        scheduler.set_timesteps(6, **shift)
                    else:
                        function(**given, **(shift if method in ("plan", "set_timesteps") else {}))
                except NotImplementedError:
                    assert (name, method) in {
                        (n, "add_noise") for n in ("KarrasVeScheduler", "RePaintScheduler")
                    }
                except ValueError:
                    # the first one for its corrector, the second one at a Runge-Kutta stage
                    refused = {("ScoreSdeVeScheduler", "plan"), ("PNDMScheduler", "step_plms")}
                    assert (name, method) in refused
            getattr(scheduler, "_restart", lambda: None)() if name != "PNDMScheduler" else None


def test_the_guard_objects_to_ops_that_compute() -> None:
    planted: dict[str, Any] = {}
    for source in ("x * 2", "x.square()", "0.3 - x", "torch.where(x > 0, x, x)", "x.norm()", "x.T @ x"):
        exec(compile(f"import torch\ndef step(x): return {source}", SHELLS / "planted.py", "exec"), planted)
        with Guard(), pytest.raises(AssertionError, match=r"aten::\w+ in .*planted.py:2"):
            planted["step"](torch.ones(3, 3))
    exec(
        compile("def step(x): return x.to(float).flip(0)[1:].expand(2, 3)", SHELLS / "planted.py", "exec"),
        planted,
    )
    with Guard():
        planted["step"](torch.ones(2, 3))


class Counting(TorchDispatchMode):
    """Counts ops, values read back, and tensors with memory of their own that no argument has.

    Values are read by operators, and by methods of tensors, of which those on the CPU are none. The noise
    levels of a scheduler may be read: they are on the host by contract.
    """

    METHODS = ("tolist", "numpy", "cpu", "__array__")
    VIEWS = frozenset({"aten::slice", "aten::select", "aten::unbind", "aten::alias", "aten::detach"})

    def __init__(self, scheduler: Any = None) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.reads = self.allocated = 0
        self.of_host = getattr(scheduler, "sigmas", None)
        self.watches = ExitStack()

    def __enter__(self) -> Counting:
        for name in self.METHODS:
            self.watches.enter_context(mock.patch.object(Tensor, name, self.reading(getattr(Tensor, name))))
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        self.watches.close()
        super().__exit__(*error)

    def reading(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(t: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.reads += t is not self.of_host
            return method(t, *args, **kwargs)

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        result = func(*args, **(kwargs or {}))
        if name in ("aten::_local_scalar_dense", "aten::item"):
            self.reads += 1
            return result
        made = [
            t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)
        ]
        given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
        places = {t.untyped_storage().data_ptr() for t in given}
        new = sum(t.untyped_storage().data_ptr() not in places for t in made)
        self.allocated += new if name != "aten::lift_fresh" else 1
        if name not in self.VIEWS and not (new and name.startswith(("aten::empty", "aten::new_empty"))):
            self.calls[name] += 1
        return result


# Options of the constructor, of those that a class has, and of its step.
SETS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    (
        {
            "prediction_type": "v_prediction",
            "use_karras_sigmas": True,
            "solver_order": 3,
            "predictor_order": 3,
            "corrector_order": 4,
            "clip_sample": False,
            "timestep_spacing": "trailing",
            "stochastic_sampling": True,
        },
        {"eta": 1.0, "s_churn": 3.0, "order": 2},
    ),
    (
        {"prediction_type": "sample", "variance_type": "learned_range", "final_sigmas_type": "sigma_min"},
        {"use_clipped_model_output": True, "s_noise": 1.01},
    ),
]
NOT_TAKEN = {
    "EDMDPMSolverMultistepScheduler": {"prediction_type": "epsilon"},
    "EDMEulerScheduler": {"prediction_type": "epsilon"},
    "EulerAncestralDiscreteScheduler": {"prediction_type": "epsilon"},
    "PNDMScheduler": {"prediction_type": "epsilon", "skip_prk_steps": True},
    "DDIMInverseScheduler": {"timestep_spacing": "leading", "prediction_type": "epsilon"},
    "LCMScheduler": {"timestep_spacing": "leading"},
    "TCDScheduler": {"timestep_spacing": "leading", "clip_sample": False},
}
"""What takes the place of values of `SETS` that a class does not take."""
STEPS = 20


class Loop:
    """The documented loop of a class, on the same noise and the same model outputs each time."""

    def __init__(self, name: str, options: dict[str, Any], of_step: dict[str, Any]) -> None:
        cls = getattr(difusores, name)
        instead = NOT_TAKEN.get(name, {}) if options else {}
        if name == "UnCLIPScheduler" and options.get("prediction_type") == "v_prediction":
            instead = {"prediction_type": "epsilon"}
        options = {
            key: value
            for key, value in {**options, **instead}.items()
            if key in inspect.signature(cls).parameters
        }
        self.scheduler = cls(**options)
        known = inspect.signature(self.scheduler.step).parameters
        self.of_step = {key: value for key, value in of_step.items() if key in known}
        if name == "FlowMatchEulerDiscreteScheduler":
            self.of_step = {}  # it takes no churn
        learned = options.get("variance_type") == "learned_range"
        values = torch.Generator().manual_seed(0)
        self.x, self.z = (torch.randn(SHAPE, generator=values) for _ in range(2))
        channels = SHAPE[1] * (2 if learned else 1)
        self.outputs = [torch.rand((2, channels, 4, 4), generator=values) for _ in range(3)]

    def run(self, look: Callable[[Callable[[], Any]], Any], foreign: bool = False) -> list[Tensor]:
        """All results. look: carries out a turn of the loop."""
        found: list[Tensor] = []
        self.scheduler.set_timesteps(STEPS)
        x = self.x
        times = [t.clone() if foreign else t for t in self.scheduler.timesteps]
        flow = isinstance(self.scheduler, FlowScheduler)  # whose input is not scaled
        for i, t in enumerate(times):

            def turn(x: Tensor = x, t: Tensor = t, i: int = i) -> Any:
                given = x if flow else self.scheduler.scale_model_input(x, t)
                e = self.outputs[i % 3]
                return given, self.scheduler.step(e, t, x, **self.of_step, return_dict=False)

            with mock.patch.object(base, "draw_noise", lambda *args, **kwargs: self.z):
                given, results = look(turn)
            found += [t.clone() for t in (given, *results)]
            x = results[0]
            del given, results
        return found

    def held(self) -> tuple[Tensor, ...]:
        run = getattr(self.scheduler, "_run", None)
        return () if run is None else run.slots


@needs_kernels
@pytest.mark.parametrize("chosen", range(len(SETS)), ids=("default", "second", "third"))
@pytest.mark.parametrize("name", NAMES)
def test_a_turn_of_the_loop_is_two_ops_and_no_memory_but_the_results(name: str, chosen: int) -> None:
    """By PyTorch's dispatcher and around it, with the same bits; and with timesteps of the caller's own."""
    loop = Loop(name, *SETS[chosen])
    loop.run(lambda turn: turn())  # rows are made at the first step on a grid

    def counted(turn: Callable[[], Any], reads: int = 0) -> Any:
        before = loop.held()
        with Counting(loop.scheduler) as mode:
            given, results = turn()
        old = {id(t) for t in (loop.x, loop.z, *loop.outputs, *before)}
        new = {id(t) for t in (given, *results, *loop.held())} - old
        assert mode.reads <= reads and mode.allocated <= len(new), (mode.reads, mode.allocated, mode.calls)
        assert sum(mode.calls.values()) <= 2 and "difusores::scheduler_step" in mode.calls, mode.calls
        return given, results

    by_dispatcher = loop.run(counted)
    own = loop.run(lambda turn: counted(turn, reads=1), foreign=True)
    assert all(torch.equal(*pair) for pair in zip(by_dispatcher, own, strict=True))

    places: set[int] = set()

    def around(turn: Callable[[], Any]) -> Any:
        def refused(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a step went by PyTorch's dispatcher")

        if chosen == 0:
            with mock.patch.object(base, "scheduler_step", refused):
                given, results = turn()
        else:
            given, results = turn()
        places.update(t.data_ptr() for t in results)
        return given, results

    directly = loop.run(around)
    assert all(torch.equal(*pair) for pair in zip(by_dispatcher, directly, strict=True))
    if chosen == 0:
        assert len(places) <= 12, len(places)


@needs_kernels
@pytest.mark.parametrize(
    "name", [name for name in ALL if name not in ("RePaintScheduler", *list(EXEMPT)[:2])]
)
def test_a_plan_allocates_as_much_for_many_steps_as_for_few(name: str) -> None:
    for options, _ in SETS:
        options = {**options, "correct_steps": 0}
        loop = Loop(name, options, {}) if name in NAMES else None
        cls = getattr(difusores, name)
        known = inspect.signature(cls).parameters
        scheduler = loop.scheduler if loop else cls(**{k: v for k, v in options.items() if k in known})
        e = loop.outputs[0] if loop else torch.rand(SHAPE)
        counts = []
        for steps in (STEPS, 2 * STEPS):
            plan = scheduler.plan(steps)
            with Counting(scheduler) as mode:
                plan.run(lambda given, time, e=e: e, torch.ones(SHAPE), generator=torch.Generator())
            assert mode.reads == 0
            counts.append((len(plan), mode.allocated, mode.calls))
        assert counts[0][1] == counts[1][1], counts
        more = counts[1][2] - counts[0][2]
        del more["aten::normal_"]
        assert sum(more.values()) <= 2 * (counts[1][0] - counts[0][0]), more


# Steps of other names or arguments: scheduler, model output, sample -> calls, each of which is a step.
OTHER_STEPS: dict[str, Callable[[Any, Tensor, Tensor], list[Callable[[], Any]]]] = {
    "ScoreSdeVeScheduler": lambda s, e, x: [lambda t=t: s.step_pred(e, t, x) for t in s.timesteps],
    "ScoreSdeVpScheduler": lambda s, e, x: [lambda t=t: s.step_pred(e, x, t) for t in s.timesteps],
    "KarrasVeScheduler": lambda s, e, x: [
        lambda: s.step(e, 1.5, 1.0, x),
        lambda: s.step_correct(e, 1.5, 1.0, x, x, e),
        lambda: s.add_noise_to_input(x, 1.0),
    ],
}


@needs_kernels
@pytest.mark.parametrize("name", OTHER_STEPS)
def test_a_step_of_another_name_is_one_op(name: str) -> None:
    scheduler = getattr(difusores, name)()
    scheduler.set_timesteps(6)
    if name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(6)
    x, e, z = (torch.randn(SHAPE) for _ in range(3))
    with (
        mock.patch.object(score, "draw_noise", lambda *args, **kwargs: z),
        mock.patch.object(score, "noise_of_the_host", lambda *args, **kwargs: z),
    ):
        for call in OTHER_STEPS[name](scheduler, e, x):
            call()
            with Counting(scheduler) as mode:
                call()
            assert mode.reads == 0
            assert sum(mode.calls.values()) <= 2 and "difusores::scheduler_step" in mode.calls, mode.calls


@pytest.mark.parametrize("name", NAMES)
def test_the_shell_is_thin(name: str) -> None:
    """No method of a class but its constructor, with its many options, is longer than 40 lines of code."""
    for method_name, method in vars(getattr(difusores, name)).items():
        if not inspect.isfunction(method) or method_name == "__init__":
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        body = [node for node in tree.body[0].body if not isinstance(node, ast.Expr)]  # type: ignore[attr-defined]
        lines = sum((node.end_lineno or 0) - node.lineno + 1 for node in body)
        assert lines <= 40, f"{name}.{method_name} has {lines} lines"


def negated(x: Tensor) -> Tensor:
    """x as PyTorch's public functions make a view whose memory holds the opposite."""
    view: Tensor = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 1, 1, 1)], ids=str)
def test_a_negated_view_is_read_as_its_numbers(shape: tuple[int, ...]) -> None:
    """What a slot keeps of it is read past PyTorch later."""
    scheduler, other = difusores.HeunDiscreteScheduler(), difusores.HeunDiscreteScheduler()
    x, outputs = torch.randn(shape), torch.randn(4, *shape)
    y = x.clone()
    for each in (scheduler, other):
        each.set_timesteps(3)
    for t, e in zip(scheduler.timesteps, outputs, strict=False):
        x = scheduler.step(e, t, negated(x), return_dict=False)[0]
        y = other.step(e, t, y, return_dict=False)[0]
        assert torch.equal(x, y)
        x = negated(x)
    plain, turned = (difusores.HeunDiscreteScheduler() for _ in range(2))
    x, results = torch.randn(shape), []
    for each, first in ((plain, x), (turned, negated(x))):
        each.set_timesteps(3)
        x1 = each.step(outputs[0], each.timesteps[0], first, return_dict=False)[0]
        results.append(each.step(outputs[1], each.timesteps[1], x1, return_dict=False)[0])
    assert torch.equal(*results)
