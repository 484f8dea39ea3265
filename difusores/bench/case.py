"""One op at one shape: what is timed, what is right, what any implementation has to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
KERNELS = ("cuda", "triton")


@dataclass
class Case:
    """One op at one shape. A result is a tensor or a tuple of them.

    Attributes:
        op: its name in the benchmark.
        label: shape and layout in words.
        formula: as PyTorch computes it without us, of the operands; what `torch.compile` is given.
        operands: tensors on the device.
        ours: the same by the op's public function, under whichever backend is asked for.
        bytes, flops: what any implementation has to move and, for matrix products alone, to compute.
        peers: other libraries' ways, by name.
        grads: gradients of the results. Where there are any, every way is followed by its backward pass, and
            the gradients of the operands are the result.
        view: the part of a result that is compared.
        exact: `view` of the right result, of the operands in float64; by `standard` if None.
        numbers: `formula` with the random numbers that ours has, where it draws its own: then results of
            `formula` are not compared, and this one's error sets the tolerance.
        registered: the op by whose name its backends are known, if that is another.
        kernels: the backends that are timed.
    """

    op: str
    label: str
    formula: Callable[..., Any]
    operands: tuple[Tensor, ...]
    ours: Call
    bytes: int
    flops: int = 0
    peers: Mapping[str, Call] = field(default_factory=dict)
    grads: tuple[Tensor, ...] = ()
    view: Callable[[Any], Any] = field(default=lambda result: result)
    exact: Callable[..., Any] | None = None
    numbers: Callable[..., Any] | None = None
    registered: str = ""
    kernels: tuple[str, ...] = KERNELS

    def __post_init__(self) -> None:
        self.registered = self.registered or self.op
        for t in self.operands if self.grads else ():
            t.requires_grad_()

    @property
    def standard(self) -> Callable[..., Any]:
        """What a result is compared with."""
        return self.numbers or self.formula

    def whole(self, call: Call) -> Call:
        """A way with its backward pass, where gradients are wanted."""
        return with_gradients(call, self.operands, self.grads) if self.grads else call

    def oracle(self) -> Any:
        """The right result in float64, as `view` shows it."""
        operands = [t.detach().double() for t in self.operands]
        if self.exact is not None:
            return self.exact(*operands)
        if not self.grads:
            return self.view(self.standard(*operands))
        for t in operands:
            t.requires_grad_()
        grads = [g.double() for g in self.grads]
        return self.view(with_gradients(lambda: self.standard(*operands), operands, grads)())


def with_gradients(call: Call, operands: Sequence[Tensor], grads: Sequence[Tensor]) -> Call:
    def way() -> tuple[Tensor, ...]:
        # Autograd's own thread for a GPU would not know which backend this one asked for.
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            result = call()
            results = (result,) if isinstance(result, Tensor) else result
            return torch.autograd.grad(results, operands, grads)

    return way


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def shape_of(t: Tensor) -> str:
    return "x".join(map(str, t.shape))
