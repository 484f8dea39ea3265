"""A recorder of PyTorch's operators that stands in for CUDA graphs where there is no GPU.

`Tape` is as strict as a capture: it keeps every operator with the addresses of its tensors, runs them again
in the same memory, and refuses operators that read a value back or draw random numbers. What passes it has
fixed addresses and nothing that only the host knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = ("_local_scalar_dense", "item", "normal_", "randn", "nonzero", "is_nonzero", "equal")


class Tape(TorchDispatchMode):
    """Operators with their tensors, to be run again where they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in FORBIDDEN:
            raise RuntimeError(f"operation {name} is not permitted while a stream is captured")
        given = pytree.tree_map_only(
            Tensor, Tensor.detach, (args, kwargs or {})
        )  # some change shape in place
        out = func(*args, **(kwargs or {}))
        if not func.is_view and name not in ("squeeze_", "unsqueeze_"):
            self.calls.append((func, *given, [t.detach() for t in tensors_of(out)]))
        return out

    def replay(self) -> None:
        if torch._C._len_torch_dispatch_stack():
            raise RuntimeError("a graph is launched within a capture")
        for func, args, kwargs, written in self.calls:
            for place, new in zip(written, tensors_of(func(*args, **kwargs)), strict=True):
                if place.data_ptr() != new.data_ptr():
                    place.copy_(new)


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


class TapeRecorder:
    """In the place of `graphs.Recorder`."""

    captures = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        TapeRecorder.captures += 1
        if torch._C._len_torch_dispatch_stack():
            raise RuntimeError("a capture is under way")
        with Tape() as tape:
            result = function()
        # a capture runs nothing: what the results hold comes from replays alone
        pytree.tree_map_only(Tensor, lambda t: t.fill_(float("nan")), result)
        return tape.replay, result

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def wait(self) -> None:
        pass
