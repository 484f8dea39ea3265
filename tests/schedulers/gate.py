"""How close a step has to come to a float64 oracle, beside diffusers on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from difusores import native

SHAPES = [(3, 40), (2, 3, 50), (2, 3, 10, 20), (1, 2, 3, 10, 20)]
"""Of a hundred numbers and more: the largest error of a dozen would be chance, in diffusers as here."""


def ulps_apart(one: Tensor, other: Tensor) -> int:
    """The most float32 numbers from a value of `one` to that of `other`, both above 0 or 0."""
    assert one.shape == other.shape and one.dtype is other.dtype is torch.float32
    return int((one.view(torch.int32).long() - other.view(torch.int32).long()).abs().max())


def check(
    mine: Sequence[Tensor],
    their: Sequence[Tensor],
    exact: Sequence[Tensor],
    dtype: torch.dtype,
    place: object = "",
    within: float = 1e-6,
) -> None:
    """float32: within 1e-5, or twice diffusers' largest error, and half an eps of the largest value where the
    compiled kernel is missing. float64: within 1e-9 of the largest value or
    twice diffusers' error, and `within`.

    Half precision, and where diffusers has no number: the rule of every kernel, twice the other's error and
    4 eps; what overflows has to overflow alike.
    """
    assert len(mine) == len(their) == len(exact)
    for one, other, right in zip(mine, their, exact, strict=True):
        assert one.dtype is other.dtype or dtype is torch.float64, (one.dtype, other.dtype)
        assert one.shape == other.shape == right.shape
        right = right.double()
        if one.dtype is torch.float16:
            beyond = right.abs() > torch.finfo(one.dtype).max
            assert torch.equal(one[beyond], right[beyond].to(one.dtype)), place
            one, other, right = (t.masked_fill(beyond, 0.0) for t in (one, other, right))
        error, worst = ((t.double() - right).abs().max().item() for t in (one, other))
        largest = right.abs().max().item()
        of_kernels = 4 * torch.finfo(one.dtype).eps * max(1.0, largest)
        if dtype is torch.float64:
            worst = math.inf if math.isnan(worst) else worst
            allowed = min(within, max(1e-9 * max(1.0, largest), 2 * worst))
        elif math.isnan(worst):
            allowed = of_kernels
        elif one.dtype is torch.float32:
            # PyTorch rounds products and sums where the compiled kernel does not
            rounding = 0.0 if native.status("cpu") is None else 0.5 * torch.finfo(one.dtype).eps * largest
            allowed = max(1e-5, 2 * worst + rounding)
        else:
            allowed = 2 * worst + of_kernels
        assert error <= allowed, (place, f"{error / allowed:.3f} of what is allowed", error, worst, largest)
