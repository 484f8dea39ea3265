"""`accelerate` and `restore`: which layers of which models are replaced, and the report about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from difusores.acceleration import heap, layers
from difusores.acceleration.cuda_blocks import TimeProjections
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
    """Make a model, or the models of a pipeline, faster on a CPU or GPU, with the same parameters and images.

    Blocks get a `forward` of their own; classes, parameters and the state dict stay what they are. Weights
    are prepared at their first use, and again when they have changed. Where gradients are recorded, in
    training mode, under torch.compile or on another device the classes' own forwards answer.

    Args:
        model_or_pipe: a model or pipeline of this package or of diffusers, in evaluation mode, on the CPU or
            one CUDA device: what is done is for the device where the parameters are now.
        dtype: None computes in the parameters' dtype; on a CPU "bfloat16" rounds inside, with float32
            parameters too: everything where the processor has AMX, else matrix products and attention alone.
        memory_format: "auto": channels_last within; results in the layout in which the input came. On a GPU
            the weights of convolutions take that memory format too, until `restore`.
        memory: on a CPU, prepared weights take at most 1.2 ("balanced") or 2.5 ("fast") times the model's
            size. On a GPU parameters are laid side by side and nothing is kept twice.
        approximate: names of approximations to allow. This version has none.

    Returns:
        The report: what was replaced, how, and why the rest was not. A second call with the same arguments
        changes nothing; with others, it begins anew.

    Raises:
        TypeError: no model or pipeline of either package.
        ValueError: an argument has another value, the model is in training mode, on another kind of device or
            on several.
    """
    dtype = _check_arguments(dtype, memory_format, memory, approximate)
    models = _models(model_or_pipe)
    devices = {
        name: _check_model(name or type(model).__name__, model, dtype) for name, model in models.items()
    }
    notes: list[str] = []
    for name, model in models.items():
        reason = install(model, devices[name], devices[name] == "cuda", dtype, memory_format, memory)
        if reason is not None and reason not in notes:
            notes.append(reason)
    return Report(models, notes)


def install(
    model: nn.Module,
    device: str,
    cuda: bool,
    dtype: torch.dtype | None = None,
    memory_format: str = "auto",
    memory: str = "balanced",
) -> str | None:
    """Put the replacements into one model; returns what could not be had, in words, or None.

    Args:
        device: type of the device on which its parameters are.
        cuda: use the replacements for a GPU, wherever the parameters are; else those for a CPU.
    """
    settings = (device, cuda, dtype, memory_format, memory)
    session = model.__dict__.get(SESSION)
    if session is not None and session.settings != settings:
        restore(model)
        session = None
    if session is None:
        of_images = dtype if dtype is torch.float32 or layers.fast_bfloat16_convolution() else None
        budget = int(BUDGETS[memory] * size(model))
        session = Session(settings, dtype, of_images, budget, device, cuda)
        session.times = TimeProjections(session) if cuda else None
        model.__dict__[SESSION] = session
    reason = None if cuda else heap.keep(session)
    for name, module in model.named_modules():
        kind, refused = replacement(module, cuda)
        if kind is None or refused is not None:
            continue
        if issubclass(kind, (LinearForward, ConvForward)):
            module.__dict__["forward"] = kind(module, session, any(part in name for part in KEEPS_DTYPE))
        else:
            module.__dict__["forward"] = kind(module, session)
    return reason if reason is None else f"freed memory goes back to the system: {reason}"


def restore(model_or_pipe: Any) -> None:
    """Take back what `accelerate` did: the classes' own forwards answer again, bit for bit as before.

    Raises:
        TypeError: no model or pipeline of either package.
    """
    for model in _models(model_or_pipe).values():
        for module in model.modules():
            forward = module.__dict__.get("forward")
            if isinstance(forward, Forward):
                forward.release()
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


def _check_model(name: str, model: nn.Module, dtype: torch.dtype | None) -> str:
    """The type of the device on which the model is."""
    if model.training:
        raise ValueError(f"{name} is in training mode: call eval() before accelerate")
    devices = {p.device for p in model.parameters()} or {torch.device("cpu")}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(
            f"{name} has parameters on {', '.join(sorted(map(str, devices)))}; "
            "accelerate is for the CPU or one CUDA device"
        )
    device = next(iter(devices)).type
    if device == "cuda" and dtype is not None:
        raise ValueError(
            f"dtype is {dtype}, and {name} is on a GPU, where its parameters' dtype decides; allowed is None"
        )
    return device
