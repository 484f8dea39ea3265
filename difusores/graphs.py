"""CUDA graphs: a function of tensors is captured once and replayed with other values in the same memory.

The first call with inputs of a kind runs as it is, which its caller gets, and is then captured; later calls
copy their inputs into the memory that the graph reads, launch it, and copy its results out. A graph holds
addresses and what Python decided while it was captured, so graphs are found by everything that can decide:
shapes, layouts, dtypes, constants, settings of PyTorch, and the `decisions` of the modules.

Graphs belong to a model: at most `KEPT` of each, the oldest use goes first, and all go with the model. They
share one pool of memory, as large as the largest of them needs.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from difusores.native import one_line
from difusores.ops.dispatch import wanted

KEPT = 8
"""How many graphs of a model are kept."""

_capturing: ContextVar[object | None] = ContextVar("difusores_capturing", default=None)
_one_at_a_time = threading.Lock()  # there is one stream for captures
_streams: dict[torch.device, torch.cuda.Stream] = {}


def capturing() -> object | None:
    """What stands for the capture that is under way in this thread; None if there is none.

    A cache of what was computed from a call's inputs keeps it with an entry, and uses the entry only where it
    is the same again: a graph would read what was computed before it, whatever its inputs are at a replay.
    """
    token = _capturing.get()
    if token is None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return object()  # somebody else's, of which nothing is known
    return token


def refusal(device: torch.device) -> str | None:
    """Why nothing on this device can be captured, or None."""
    return None if device.type == "cuda" else f"a CUDA graph needs tensors on a CUDA device, not on {device}"


class Recorder:
    """Captures on one device, in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What replays the function's launches, and what it returned, whose memory a replay writes."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), _one_at_a_time:
            stream = torch.cuda.current_stream()
            if self.device not in _streams:
                _streams[self.device] = torch.cuda.Stream()
            side = _streams[self.device]
            capture = torch.cuda.graph(graph, self.pool, side, capture_error_mode="thread_local")
            try:
                with capture:
                    result = function()
            except RuntimeError:  # after which PyTorch stays on its stream, and in this pool
                torch.cuda.set_stream(stream)
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                self.pool = torch.cuda.graph_pool_handle()
                raise
        return graph.replay, result

    @contextmanager
    def turn(self) -> Iterator[None]:
        """For a replay: those before it are over, on whatever streams they are."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            yield
            self.done.record(stream)

    def wait(self) -> None:
        """Until all replays are over, so that their memory can be given back."""
        self.done.synchronize()


class Graph:
    """A captured function.

    Attributes:
        result: what the function returned before it was captured.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], recorder: Recorder) -> None:
        self.recorder = recorder
        self.inputs = [t.to(recorder.device, copy=True) for t in inputs]
        self.result = copied(function(*self.inputs))
        token = _capturing.set(object())
        try:
            self._replay, self._outputs = recorder.capture(lambda: function(*self.inputs))
        except RuntimeError as error:
            raise RuntimeError(
                "this cannot be captured as a CUDA graph: does the model read values back, or make tensors "
                f"of Python numbers? {one_line(error.__context__ or error)}"
            ) from error
        finally:
            _capturing.reset(token)

    def replay(self, inputs: Sequence[Tensor], before: Callable[[], None] | None = None) -> Any:
        """The function's result for these inputs; before: called when no other replay is under way."""
        with self.recorder.turn():
            if self.inputs:
                torch._foreach_copy_(self.inputs, list(inputs), non_blocking=True)
            if before is not None:
                before()
            self._replay()
            return copied(self._outputs)


class Graphs:
    """The graphs of one model. Use them with `lock` held."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.graphs: OrderedDict[Hashable, Any] = OrderedDict()
        self.recorders: dict[torch.device, Recorder] = {}

    def find(self, key: Hashable) -> Any:
        """What was kept under a key, or None."""
        if key in self.graphs:
            self.graphs.move_to_end(key)
        return self.graphs.get(key)

    def keep(self, key: Hashable, graph: Any) -> None:
        self.graphs[key] = graph
        if len(self.graphs) > KEPT:
            self._wait()
            self.graphs.popitem(last=False)

    def recorder(self, device: torch.device) -> Recorder:
        if device not in self.recorders:
            self.recorders[device] = Recorder(device)
        return self.recorders[device]

    def clear(self) -> None:
        self._wait()
        self.graphs.clear()
        self.recorders.clear()  # a pool is not used again after its last graph

    def _wait(self) -> None:
        for recorder in self.recorders.values():
            recorder.wait()


_of_models: WeakKeyDictionary[Any, Graphs] = WeakKeyDictionary()
_lock = threading.Lock()


def graphs_of(model: Callable[..., Any]) -> Graphs:
    """The graphs of a model, kept as long as it lives: of a method, those of its object."""
    owner = model.__self__ if isinstance(model, MethodType) else model
    with _lock:
        return _of_models.setdefault(owner, Graphs())


def forget_graphs(model: Callable[..., Any]) -> None:
    """Give the memory of a model's graphs back."""
    graphs = graphs_of(model)
    with graphs.lock:
        graphs.clear()


def copied(result: Any) -> Any:
    """A result with new tensors."""
    return pytree.tree_map_only(Tensor, torch.clone, result)


def settings() -> tuple[Hashable, ...]:
    """What decides, beside the arguments, which kernels PyTorch and this package launch."""
    return (
        wanted(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    )


def described(t: Tensor) -> tuple[Hashable, ...]:
    """What a graph takes as given of a tensor."""
    return t.shape, t.stride(), t.dtype, t.device


def decisions(model: Any) -> tuple[Hashable, ...]:
    """What a graph takes as given of the modules that a function knows.

    Where parameters and buffers lie, what kinds of modules there are, their mode, and what stands in the
    place of their `forward`, at their hooks and as diffusers' processor of attention. An object there that
    has `decisions` says itself what can change in it. New values in the same memory change nothing of this.
    """
    found: list[Any] = [getattr(model, "__func__", None)]
    stack: list[nn.Module | None] = [*_modules_of(model)]
    while stack:  # a thousand modules, before each run: through their dictionaries
        module = stack.pop()
        if module is None:
            continue
        state = module.__dict__
        found += (type(module), module.training)
        found += [t.data_ptr() for t in state["_parameters"].values() if t is not None]
        found += [t.data_ptr() for t in state["_buffers"].values() if t is not None]
        stack += state["_modules"].values()
        if "forward" in state or "processor" in state:
            found += [_decision(state[name]) for name in ("forward", "processor") if name in state]
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            hooks = (*state["_forward_pre_hooks"].values(), *state["_forward_hooks"].values())
            found += filter(None, map(_decision, hooks))
        if "scaling" in state:  # of a layer of peft
            found += [repr(state.get(name)) for name in ("scaling", "_active_adapter", "_disable_adapters")]
    return tuple(found)


def _decision(thing: Any) -> Hashable:
    """What decides about a forward or a hook; None where it says that it does nothing."""
    own = getattr(thing, "decisions", None)
    said = (id(thing),) if own is None else own()
    return (type(thing), *said) if said else None


def _modules_of(model: Any, depth: int = 3) -> list[nn.Module]:
    """A module, or those that a function, method or partial refers to."""
    if isinstance(model, nn.Module):
        return [model]
    parts: tuple[Any, ...] = ()
    if isinstance(model, MethodType):
        parts = (model.__self__, model.__func__)
    elif isinstance(model, functools.partial):
        parts = (model.func, *model.args, *model.keywords.values())
    elif isinstance(model, FunctionType):
        seen = inspect.getclosurevars(model)
        parts = (*seen.nonlocals.values(), *seen.globals.values())
    return [module for part in parts for module in _modules_of(part, depth - 1)] if depth else []
