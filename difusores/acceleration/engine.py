"""`accelerate` and `restore`: which layers of which models are replaced, and the report about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from difusores.acceleration import heap, layers
from difusores.acceleration.layers import ConvForward, LinearForward
from difusores.acceleration.report import Report, size
from difusores.acceleration.session import DTYPES, SESSION, Forward, Session
from difusores.acceleration.table import KEEPS_DTYPE, OURS, THEIRS, replacement

BUDGETS = {"balanced": 1.2, "fast": 2.5}  # of the model's size
MEMORY_FORMATS = ("auto",)


def accelerate(
    model_or_pipe: Any,
    *,
    dtype: torch.dtype | str | None = None,
    memory_format: str = "auto",
    memory: str = "balanced",
    approximate: Sequence[str] = (),
) -> Report:
    """Make a model, or the models of a pipeline, faster on a CPU, with the same parameters and images.

    Blocks get a `forward` of their own; classes, parameters and the state dict stay what they are. Weights
    are prepared at their first use, and again when they have changed. Where gradients are recorded, in
    training mode, under torch.compile or on another device the classes' own forwards answer.

    Args:
        model_or_pipe: a model or pipeline of this package or of diffusers, in evaluation mode, on the CPU.
        dtype: None computes in the parameters' dtype; "bfloat16" rounds inside, with float32 parameters too:
            everything where the processor has AMX, else matrix products and attention alone.
        memory_format: "auto": channels_last within; results in the layout in which the input came.
        memory: prepared weights take at most 1.2 ("balanced") or 2.5 ("fast") times the model's size.
        approximate: names of approximations to allow. This version has none.

    Returns:
        The report: what was replaced, how, and why the rest was not. A second call with the same arguments
        changes nothing; with others, it begins anew.

    Raises:
        TypeError: no model or pipeline of either package.
        ValueError: an argument has another value, the model is in training mode or not on the CPU.
    """
    dtype = _check_arguments(dtype, memory_format, memory, approximate)
    models = _models(model_or_pipe)
    for name, model in models.items():
        _check_model(name or type(model).__name__, model)
    notes = []
    for model in models.values():
        settings = (dtype, memory_format, memory)
        session = model.__dict__.get(SESSION)
        if session is not None and session.settings != settings:
            restore(model)
            session = None
        if session is None:
            of_images = dtype if dtype is torch.float32 or layers.fast_bfloat16_convolution() else None
            session = Session(settings, dtype, of_images, int(BUDGETS[memory] * size(model)))
            model.__dict__[SESSION] = session
        reason = heap.keep(session)
        if reason is not None and reason not in notes:
            notes.append(f"freed memory goes back to the system: {reason}")
        _install(model, session)
    return Report(models, notes)


def restore(model_or_pipe: Any) -> None:
    """Take back what `accelerate` did: the classes' own forwards answer again, bit for bit as before.

    Raises:
        TypeError: no model or pipeline of either package.
    """
    for model in _models(model_or_pipe).values():
        for module in model.modules():
            if isinstance(module.__dict__.get("forward"), Forward):
                del module.__dict__["forward"]
        session = model.__dict__.pop(SESSION, None)
        if session is not None:
            heap.release(session)


def _check_arguments(
    dtype: torch.dtype | str | None, memory_format: str, memory: str, approximate: Sequence[str]
) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = {str(t).removeprefix("torch."): t for t in DTYPES}.get(dtype, dtype)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are None, float32 and bfloat16")
    if memory_format not in MEMORY_FORMATS:
        raise ValueError(f"memory_format is {memory_format!r}; allowed is 'auto'")
    if memory not in BUDGETS:
        raise ValueError(f"memory is {memory!r}; allowed are {', '.join(map(repr, BUDGETS))}")
    if isinstance(approximate, str) or approximate:
        names = [approximate] if isinstance(approximate, str) else approximate
        raise ValueError(f"approximate has {', '.join(map(repr, names))}; this version has no approximation")
    return dtype


def _models(given: Any) -> dict[str, nn.Module]:
    def known(thing: object) -> bool:
        return isinstance(thing, nn.Module) and any(
            base.__module__.startswith((OURS, THEIRS)) for base in type(thing).__mro__
        )

    if known(given):
        return {"": given}
    components = getattr(given, "components", None)
    found = {}
    if isinstance(components, Mapping):
        found = {name: part for name, part in components.items() if known(part)}
    if not found:
        raise TypeError(
            "accelerate and restore take models and pipelines of difusores and diffusers, "
            f"got {type(given).__name__}"
        )
    return found


def _check_model(name: str, model: nn.Module) -> None:
    if model.training:
        raise ValueError(f"{name} is in training mode: call eval() before accelerate")
    devices = sorted({str(p.device) for p in model.parameters()} - {"cpu"})
    if devices:
        raise ValueError(f"{name} has parameters on {', '.join(devices)}; accelerate is for the CPU")


def _install(model: nn.Module, session: Session) -> None:
    for name, module in model.named_modules():
        kind, reason = replacement(module)
        if kind is None or reason is not None:
            continue
        if issubclass(kind, (LinearForward, ConvForward)):
            module.__dict__["forward"] = kind(module, session, any(part in name for part in KEEPS_DTYPE))
        else:
            module.__dict__["forward"] = kind(module, session)
