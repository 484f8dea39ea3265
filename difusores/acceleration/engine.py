"""`accelerate` and `restore`: which layers of which models are replaced, and the report about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import nn

from difusores.acceleration import feature_cache, heap, products
from difusores.acceleration.approximations import Approximations, parse
from difusores.acceleration.cuda_blocks import CudaTimeProjections
from difusores.acceleration.layers import ConvForward, LayerForward, LinearForward
from difusores.acceleration.network import NetworkForward
from difusores.acceleration.norms import join_last_activation
from difusores.acceleration.report import Report, size
from difusores.acceleration.session import DTYPES, SESSION, Forward, Session
from difusores.acceleration.table import KEEPS_DTYPE, OURS, THEIRS, replacement
from difusores.acceleration.times import TimeProjections
from difusores.acceleration.transformer import AttentionForward
from difusores.ops.dispatch import BackendUnavailable, availability
from difusores.ops.gemm_conv import NEEDS_PAIRS, multiplies_pairs

BUDGETS = {"lean": 0.0, "balanced": 1.2, "fast": 2.5}  # of the model's size
MEMORY_FORMATS = ("auto",)
ENDS = ("conv_in", "conv_out")  # of a UNet: never in 8 bits
GUIDANCE = "_guidance_limits"  # attribute of pipelines: shares of a run outside which there is no guidance


def accelerate(
    model_or_pipe: Any,
    *,
    dtype: torch.dtype | str | None = None,
    memory_format: str = "auto",
    memory: str = "balanced",
    approximate: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
    invariant: bool = False,
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
        memory: on a CPU, prepared weights take nothing ("lean": each call prepares what it needs), at most
            1.2 ("balanced") or 2.5 ("fast") times the model's size. On a GPU parameters are laid side by
            side and nothing is kept twice.
        approximate: what may change the image, by name; nothing if left out. On a CPU: "int8",
            "feature_cache" and "token_merging" for UNets, "partial_guidance" for pipelines of this package;
            a mapping gives options too, as {"feature_cache": {"interval": 2}} (docs/approximate.md).
        invariant: on a CPU, use only what gives an image the same bits in any batch and with any number of
            threads: the package's own product in place of oneDNN's and MKL's, in bfloat16 on processors with
            products of its pairs. The report says of which layers that is true.

    Returns:
        The report: what was replaced, how, and why the rest was not. A second call with the same arguments
        changes nothing; with others, it begins anew.

    Raises:
        TypeError: no model or pipeline of either package.
        ValueError: an argument has another value, the model is in training mode, on another kind of device or
            on several, or an approximation is not for it.
        BackendUnavailable: invariant, without the compiled module or, in bfloat16, without the instructions.
    """
    dtype = _check_arguments(dtype, memory_format, memory)
    allowed = parse(approximate)
    if invariant and "int8" in dict(allowed):
        raise ValueError("invariant=True and int8 exclude each other: its products are oneDNN's")
    models = _models(model_or_pipe)
    devices = {
        name: _check_model(name or type(model).__name__, model, dtype, invariant)
        for name, model in models.items()
    }
    of_unets = _check_approximations(model_or_pipe, models, devices, allowed)
    reason = availability()["gemm_conv"]["cpu"] if invariant else None
    given = {p.dtype for model in models.values() for p in model.parameters()} | {dtype}
    if invariant and reason is None and torch.bfloat16 in given and not multiplies_pairs():
        reason = NEEDS_PAIRS
    if reason is not None:
        raise BackendUnavailable(f"invariant=True needs the package's own kernels: {reason}")
    notes: list[str] = []
    for name, model in models.items():
        options = of_unets if is_unet(model) else ()
        on_gpu = devices[name] == "cuda"
        reason = install(model, devices[name], on_gpu, dtype, memory_format, memory, options, invariant)
        if reason is not None and reason not in notes:
            notes.append(reason)
    model_or_pipe.__dict__.pop(GUIDANCE, None)
    guidance = dict(allowed).get("partial_guidance")
    if guidance is not None:
        model_or_pipe.__dict__[GUIDANCE] = guidance.interval
    return Report(models, notes)


def calibrate(model_or_pipe: Any, run: Callable[[], object]) -> Report:
    """Show layers that may be in 8 bits what goes through them; after it they compute in 8 bits.

    Args:
        model_or_pipe: what was accelerated with approximate=("int8",).
        run: calls it on typical inputs, as `lambda: pipe(prompts, num_inference_steps=20)`: the least and
            greatest inputs of each layer count, in all steps. Layers that it does not reach stay exact.
            Another call adds to what was seen.

    Returns:
        The report.

    Raises:
        TypeError: no model or pipeline of either package.
        ValueError: nothing was accelerated with "int8", or `run` reached no layer.
    """
    models = _models(model_or_pipe)
    sessions: list[Session] = [m.__dict__[SESSION] for m in models.values() if SESSION in m.__dict__]
    sessions = [session for session in sessions if "int8" in session.approximate]
    if not sessions:
        raise ValueError('calibrate needs accelerate(..., approximate=("int8",)) first')
    for session in sessions:
        session.calibrating = True
    try:
        run()
    finally:
        for session in sessions:
            session.calibrating = False
    forwards = [m.__dict__.get("forward") for model in models.values() for m in model.modules()]
    for forward in forwards:
        if isinstance(forward, AttentionForward):
            forward.prompts.clear()  # made by exact layers
    if not any(isinstance(f, LayerForward) and f.quantized and f.quantized.ready for f in forwards):
        raise ValueError("run() reached no layer that may be in 8 bits")
    return Report(models)


def install(
    model: nn.Module,
    device: str,
    cuda: bool,
    dtype: torch.dtype | None = None,
    memory_format: str = "auto",
    memory: str = "balanced",
    approximate: Approximations = (),
    invariant: bool = False,
) -> str | None:
    """Put the replacements into one model; returns what could not be had, in words, or None.

    Args:
        device: type of the device on which its parameters are.
        cuda: use the replacements for a GPU, wherever the parameters are; else those for a CPU.
        approximate: approximations of a UNet.
    """
    settings = (device, cuda, dtype, memory_format, memory, approximate, invariant)
    session = model.__dict__.get(SESSION)
    if session is not None and session.settings != settings:
        restore(model)
        session = None
    if session is None:
        of_images = dtype if dtype is torch.float32 or products.fast_bfloat16_convolution() else None
        budget = int(BUDGETS[memory] * size(model))
        session = Session(settings, dtype, of_images, budget, device, cuda, dict(approximate), invariant)
        session.times = CudaTimeProjections(session) if cuda else TimeProjections(session)
        model.__dict__[SESSION] = session
    reason = None if cuda else heap.keep(session)
    for name, module in model.named_modules():
        kind, refused = replacement(module, cuda)
        if kind is None or refused is not None:
            continue
        if issubclass(kind, (LinearForward, ConvForward)):
            keeps = any(part in name for part in KEEPS_DTYPE)
            forward = module.__dict__["forward"] = kind(module, session, keeps)
            if "int8" in session.approximate and not keeps and name not in ENDS:
                forward.allow_int8()
        else:
            module.__dict__["forward"] = kind(module, session)
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), NetworkForward):
            join_last_activation(module, session)
    if "feature_cache" in session.approximate:
        feature_cache.install(model, session, session.approximate["feature_cache"].depth)
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
    model_or_pipe.__dict__.pop(GUIDANCE, None)


def is_unet(model: nn.Module) -> bool:
    """Whether it is a network that goes down and up again, of either package."""
    return hasattr(model, "down_blocks") and hasattr(model, "up_blocks")


def _check_approximations(
    given: Any, models: Mapping[str, nn.Module], devices: Mapping[str, str], allowed: Approximations
) -> Approximations:
    """Those for UNets; refuses what is not for these models."""
    of_unets = tuple(entry for entry in allowed if entry[0] != "partial_guidance")
    if of_unets and not any(map(is_unet, models.values())):
        names = ", ".join(repr(name) for name, _ in of_unets)
        raise ValueError(f"approximate has {names}, for UNets; {type(given).__name__} has none")
    if "int8" in dict(allowed) and not torch.backends.mkldnn.is_available():
        raise ValueError("approximate has 'int8', which needs a torch with oneDNN")
    if allowed and "cuda" in devices.values():
        raise ValueError(
            f"approximate is {[name for name, _ in allowed]}, and the model is on a GPU; allowed is ()"
        )
    takes = (
        hasattr(type(given), GUIDANCE) and "guidance_interval" in signature(type(given).__call__).parameters
    )
    if len(of_unets) < len(allowed) and not takes:
        raise ValueError(
            "approximate has 'partial_guidance', for this package's pipelines that take guidance_interval; "
            f"got {type(given).__module__}.{type(given).__name__}"
        )
    return of_unets


def _check_arguments(dtype: torch.dtype | str | None, memory_format: str, memory: str) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = {str(t).removeprefix("torch."): t for t in DTYPES}.get(dtype, dtype)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are None, float32 and bfloat16")
    if memory_format not in MEMORY_FORMATS:
        raise ValueError(f"memory_format is {memory_format!r}; allowed is 'auto'")
    if memory not in BUDGETS:
        raise ValueError(f"memory is {memory!r}; allowed are {', '.join(map(repr, BUDGETS))}")
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


def _check_model(name: str, model: nn.Module, dtype: torch.dtype | None, invariant: bool) -> str:
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
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | ({dtype} - {None})
    if invariant and (device == "cuda" or dtypes - set(DTYPES)):
        found = ", ".join(sorted(str(t).removeprefix("torch.") for t in dtypes))
        raise ValueError(
            f"invariant=True is for float32 and bfloat16 on a CPU; {name} is on {device} in {found}"
        )
    return device
