"""A step is one op: no tensor arithmetic in the shells, no value read back, no memory but the results'."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import difusores
from difusores import native
from difusores.schedulers import base, score

FOLDER = Path(base.__file__).parent
SHAPE = (2, 3, 4, 4)
ALLOCATES = {"aten::empty_like", "aten::empty", "aten::empty_strided", "aten::new_empty"}
# Why a class, or a method of it, is not one op.
EXEMPT = {
    "CosineDPMSolverMultistepScheduler": "its noise is a Brownian path, built by torchsde",
    "DPMSolverSDEScheduler": "its noise is a Brownian path, built by torchsde",
    "KarrasVeScheduler": "its step takes the levels as arguments",
    "RePaintScheduler": "a mask decides which pixels are kept",
    "ScoreSdeVeScheduler": "its predictor has its own name, its corrector's step is a ratio of norms",
    "ScoreSdeVpScheduler": "its predictor has a name of its own",
}
NAMES = [
    name
    for name in difusores.schedulers.__all__
    if name.endswith("Scheduler")
    and hasattr(getattr(difusores.schedulers, name), "step")
    and name not in EXEMPT
]
# What a shell may ask of torch: to hold numbers, to name types and devices.
ALLOWED = frozenset(
    [
        "Generator",
        "Size",
        "Tensor",
        "arange",
        "as_tensor",
        "bool",
        "broadcast_shapes",
        "device",
        "dtype",
        "empty_like",
        "equal",
        "finfo",
        "float",
        "float16",
        "float32",
        "float64",
        "from_numpy",
        "full",
        "inference_mode",
        "int32",
        "int64",
        "linspace",
        "long",
        "no_grad",
        "promote_types",
        "tensor",
    ]
)
ARITHMETIC = frozenset(
    [
        "add",
        "add_",
        "addcmul",
        "clamp",
        "clamp_",
        "cumprod",
        "cumsum",
        "div",
        "div_",
        "exp",
        "lerp",
        "log",
        "matmul",
        "maximum",
        "mean",
        "minimum",
        "mul",
        "mul_",
        "norm",
        "pow",
        "quantile",
        "rsqrt",
        "sqrt",
        "sub",
        "sub_",
        "sum",
        "where",
    ]
)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_a_shell_does_no_tensor_arithmetic(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr in ALLOWED, f"{file.name}:{node.lineno}: torch.{node.attr}"
        elif not (
            isinstance(node.value, ast.Name) and node.value.id in ("math", "np", "schedules", "solvers")
        ):
            assert node.attr not in ARITHMETIC, f"{file.name}:{node.lineno}: .{node.attr}"


class Counting(TorchDispatchMode):
    """Counts the ops of a step; reading a value back is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::item"), "a value was read back"
        self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or "")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_one_op(name: str) -> None:
    scheduler = getattr(difusores, name)()
    scheduler.set_timesteps(6)
    scheduler.__dict__["is_scale_input_called"] = True
    generator = torch.Generator().manual_seed(0)
    x, e, z = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}

    def draw(*args: Any, **kwargs: Any) -> Tensor:
        return z

    def loop(mode: Counting | None) -> None:
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            if mode is not None:
                mode.calls.clear()
                with mode:
                    result = scheduler.step(e, t, x, **options, return_dict=False)
                check(mode.calls, result)
            else:
                scheduler.step(e, t, x, **options, return_dict=False)

    def check(calls: Counter[str], result: tuple[Tensor, ...]) -> None:
        run = getattr(scheduler, "_run", None)
        slots = scheduler.__dict__.get("_slots", ()) if run is None else run.slots
        old = {id(t) for t in (x, z, e)}
        returned = {id(t) for t in result}
        new = returned | {id(t) for t in slots if id(t) not in old}
        memory = sum(count for op, count in calls.items() if op in ALLOCATES)
        assert memory <= len(new), calls
        others = {op: count for op, count in calls.items() if op not in ALLOCATES}
        assert sum(others.values()) <= 2 and "difusores::scheduler_step" in others, calls

    with mock.patch.object(base, "draw_noise", draw):
        loop(None)
        loop(Counting())


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


@pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or "")
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
            with Counting() as mode:
                call()
            others = {op: count for op, count in mode.calls.items() if op not in ALLOCATES}
            assert sum(others.values()) <= 2 and "difusores::scheduler_step" in others, mode.calls


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


def test_a_negated_view_is_read_as_its_numbers() -> None:
    """Its memory holds the opposite; what a slot keeps of it is read past PyTorch later."""
    scheduler, other = difusores.HeunDiscreteScheduler(), difusores.HeunDiscreteScheduler()
    x, outputs = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 4, 8, 8)
    y = x.clone()
    for each in (scheduler, other):
        each.set_timesteps(3)
    for t, e in zip(scheduler.timesteps, outputs, strict=False):
        x = scheduler.step(e, t, torch._neg_view(-x), return_dict=False)[0]
        y = other.step(e, t, y, return_dict=False)[0]
        assert torch.equal(x, y)
        x = torch._neg_view(-x)
    plain, negated = (difusores.HeunDiscreteScheduler() for _ in range(2))
    x, results = torch.randn(1, 4, 8, 8), []
    for each, first in ((plain, x), (negated, torch._neg_view(-x))):
        each.set_timesteps(3)
        x1 = each.step(outputs[0], each.timesteps[0], first, return_dict=False)[0]
        results.append(each.step(outputs[1], each.timesteps[1], x1, return_dict=False)[0])
    assert torch.equal(*results)
