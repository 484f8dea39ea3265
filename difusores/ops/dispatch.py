"""Which implementation of an op answers: the schema library, the order of preference, and `use_backend`.

PyTorch's dispatcher does the dispatching. This file declares the schemas' library and decides, per call,
between the registered op (which runs the kernel of the tensors' device) and the reference as plain Python.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from difusores import native

LIBRARY = torch.library.Library("difusores", "DEF")

BACKENDS = ("cuda", "cpu", "torch", "triton", "triton_tma", "wgmma", "reference")
"""Every backend name, in order of preference; `torch` is an op of PyTorch's own for the same thing.

It stands before `triton` because PyTorch's fused attention is faster than our Triton kernel at most shapes.
`wgmma`, attention with the matrix products of sm_90, and `triton_tma`, the Triton kernels of attention and
`linear` with tensor descriptors, answer only when asked for: no GPU has run them.
"""


class Measured(NamedTuple):
    """What a GPU said of two kernels of ours, microseconds of a call within a CUDA graph."""

    elements: int  # of the call's first tensor, from which on the device and not the host sets the pace
    cuda: float
    triton: float
    at: str


TRITON_FIRST = {
    "scheduler_step": Measured(1 << 20, 54.9, 20.9, "8x3x512x512, NVIDIA H200, 2026-11-28"),
}
"""Ops of which a GPU found our Triton kernel faster than our CUDA one, until it has timed the latter again.

Below that size, and for norms, where the difference is 10 us at most, the CUDA kernel stays: a launch through
Triton takes the host 60 to 100 us more. A graph, which pays no launches, has the bits of the calls without it
and hence the same kernels.
"""

_DEVICES: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "triton_tma": ("cuda",),
    "wgmma": ("cuda",),
    "cpu": ("cpu",),
}
_TRITON = {
    "triton": (3, 3),
    "triton_tma": (3, 5),
}  # the oldest versions; 3.4 cannot compile all of the latter
_OPS: dict[str, tuple[str, ...]] = {}
_LAUNCHES: dict[Any, Callable[..., Any]] = {}  # op -> the Python function that implements it
_wanted: ContextVar[str | None] = ContextVar("difusores_backend", default=None)
_functorch_level = torch._C._functorch.maybe_current_level  # finding it takes as long as asking


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot take the call; the message says why."""


def register(op: str, *backends: str) -> None:
    """Declare which backends implement `op`, besides the reference, which every op has."""
    _OPS[op] = (*(name for name in BACKENDS if name in backends), "reference")


def register_triton(op: str, signature: str, *, in_place: bool = False) -> Any:
    """Declare `<op>_triton`, the op whose implementation is `launch` of difusores/ops/triton/<op>.py.

    in_place: `<op>_triton_` and `launch_in_place` instead, for an op that overwrites its first tensor.

    It is an op of its own, so that a compiled module which answers for the same device does not swallow a
    call meant for Triton. Its file, and Triton with it, is imported at the first call.
    """
    name = f"{op}_triton_" if in_place else f"{op}_triton"
    LIBRARY.define(name + signature)

    def launch(*call: Any) -> Any:
        module = import_module(f"difusores.ops.triton.{op}")
        return (module.launch_in_place if in_place else module.launch)(*call)

    LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    declared = getattr(torch.ops.difusores, name).default
    _LAUNCHES[declared] = launch
    return declared


def interpreted() -> bool:
    """Whether Triton was told to interpret its kernels, which then run on CPU tensors too, very slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_status(backend: str = "triton") -> str | None:
    if os.environ.get("DIFUSORES_DISABLE") == "1":
        return "switched off by DIFUSORES_DISABLE=1"
    if find_spec("triton") is None:
        return "triton is not installed"
    oldest = _TRITON[backend]
    if tuple(map(int, version("triton").split(".")[:2])) < oldest:
        return f"triton {version('triton')} is older than {'.'.join(map(str, oldest))}"
    if not interpreted() and not torch.cuda.is_available():
        return "no CUDA device was found"
    return None


def status(backend: str) -> str | None:
    """None if the backend can be used in this process, else the reason. ValueError for an unknown name."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; the backends are {', '.join(sorted(BACKENDS))}")
    if backend in ("cpu", "cuda", "wgmma"):
        return native.status("cpu" if backend == "cpu" else "cuda")
    return _triton_status(backend) if backend in _TRITON else None


def availability() -> dict[str, dict[str, str | None]]:
    """For every op and backend: None if it is available, else the reason in words."""
    table: dict[str, dict[str, str | None]] = {}
    for op, backends in _OPS.items():
        table[op] = {
            name: status(name) or _left_out(op, name)
            if name in backends
            else f"{op} has no {name} kernel in this version"
            for name in BACKENDS
        }
    return table


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend by name within a `with` block, in this thread or task only.

    Args:
        name: "reference", "cpu", "triton", "cuda", "torch" (attention through
            `scaled_dot_product_attention`), or what no GPU has run yet: "wgmma" (attention on sm_90) and
            "triton_tma" (attention and `linear` with tensor descriptors, from sm_90 on).

    An op that has this backend uses it and raises `BackendUnavailable` for a call that it does not take; an
    op that has no such kernel at all keeps its default. The environment variable DIFUSORES_BACKEND does the
    same for a process. Under `torch.compile` a graph keeps the backend that was in force when it was traced.

    Raises:
        ValueError: unknown name.
        BackendUnavailable: the backend cannot be used in this process; the message says why.
    """
    reason = status(name)
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} is not available: {reason}")
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def _from_environment() -> str | None:
    if os.environ.get("DIFUSORES_ISA") and os.environ.get("DIFUSORES_DISABLE") != "1":
        reason = native.status("cpu")
        if reason is not None:
            raise BackendUnavailable(
                f"DIFUSORES_ISA={os.environ['DIFUSORES_ISA']} cannot be honoured: {reason}"
            )
    name = os.environ.get("DIFUSORES_BACKEND") or None
    if name is not None:
        reason = status(name)
        if reason is not None:
            raise BackendUnavailable(f"DIFUSORES_BACKEND={name} cannot be honoured: {reason}")
    return name


_environment: list[str | None] = []


def wanted() -> str | None:
    """The backend asked for by name, through `use_backend` or DIFUSORES_BACKEND; None if none was."""
    name = _wanted.get()
    if name is not None:
        return name
    if not _environment:
        _environment.append(_from_environment())
    return _environment[0]


# Dynamo cannot trace a ContextVar: a compiled graph keeps the backend that was in force when it was traced.
wanted._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(op: str, device: str, supports: Callable[..., str | None], *call: Any) -> str:
    """The backend that answers this call.

    Args:
        op: the op's name, as given to `register`.
        device: device type of the tensors.
        supports: `supports(backend, *call)` -> None or the reason why that backend does not take the call.
        call: what `supports` takes; of the ops in TRITON_FIRST, a tensor as large as the op's work first.
    """
    name = wanted()
    backends = _OPS[op]
    if name is not None and name in backends:
        by_name = "cuda" if name in _TRITON and interpreted() else device
        reason = _refusal(name, by_name) or _left_out(op, name)
        if reason is None and name != "reference":
            reason = supports(name, *call)
        if reason is not None:
            raise BackendUnavailable(f"{op}: backend {name!r} was asked for, but {reason}")
        return name
    measured = TRITON_FIRST.get(op)
    if measured is not None and call[0].numel() >= measured.elements:
        backends = ("triton", *(name for name in backends if name != "triton"))
    for candidate in backends:
        if candidate == "reference":
            break
        if _refusal(candidate, device) or _left_out(op, candidate):
            continue
        if supports(candidate, *call) is None:
            return candidate
    return "reference"


def _refusal(backend: str, device: str) -> str | None:
    devices = _DEVICES.get(backend)
    if devices is not None and device not in devices:
        return f"the tensors are on {device!r}"
    if devices is not None and transformed():
        return "a kernel cannot be seen through by torch.func transforms and forward-mode derivatives"
    return status(backend)


_HAS: dict[tuple[str, str], bool] = {}  # whether a compiled module registered a kernel of an op


def _left_out(op: str, backend: str) -> str | None:
    """Why the compiled module of a backend has no kernel of an op that it should have, or None.

    The reference, which is registered for every device, would answer in its place without a word.
    """
    module = native.MODULES.get(backend)
    if module is None:
        return None
    if (op, backend) not in _HAS:
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"difusores::{op}", backend.upper())
        _HAS[op, backend] = has
    return None if _HAS[op, backend] else f"difusores.{module} was built without {op}"


_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]
_left_out._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode derivative is under way: only the reference follows."""
    return _functorch_level() is not None or forward_ad._current_level >= 0


def below_autograd(op: Callable[..., Any], *call: Any) -> Any:
    """Call a registered op without its autograd layer, which costs time even where it records nothing."""
    if torch.compiler.is_compiling():  # a graph has no such layer, and Dynamo cannot trace the guard
        return op(*call)
    launch = _LAUNCHES.get(op)
    if (
        launch is not None  # through the dispatcher and back to Python takes as long as the launch
        and call[0].is_cuda
        and type(call[0]) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()  # modes want to see the op
        and not torch._C._len_torch_function_stack()
    ):
        return launch(*call)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*call)


def watchers() -> tuple[Any, ...]:
    """Who would miss a call that goes around PyTorch's dispatcher, as the compiled module's `watch` takes it.

    The backend asked for; that of the environment, once it was looked at; what answers None, False or 0 where
    no transform, mode, profiler or tracer is at work; the module that counts levels of forward-mode
    derivatives.
    """
    questions = (
        torch._C._functorch.maybe_current_level,
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._autograd._profiler_enabled,
        torch._C._is_tracing,
    )
    return _wanted, _environment, questions, forward_ad


def straight_to_cpu(*tensors: torch.Tensor | None) -> bool:
    """Whether a call may go to the CPU kernel unseen, whose own checks cost less than Python's.

    All tensors are on the CPU, none needs a gradient, and nobody asked for another backend.
    """
    if torch.compiler.is_compiling() or wanted() not in (None, "cpu"):
        return False
    if native.status("cpu") is not None or transformed():
        return False
    records = torch.is_grad_enabled()
    for t in tensors:  # noqa: SIM110  (a generator takes twice as long)
        if t is not None and (not t.is_cpu or (records and t.requires_grad)):
            return False
    return True


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to see a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
