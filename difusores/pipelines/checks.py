"""Checks of the numbers that calls of pipelines are given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_count(value: Any, name: str) -> int:
    """A whole number of 1 or more, 1 for None.

    Raises:
        ValueError: another one.
    """
    if value is None:
        return 1
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; it has to be a whole number, 1 or more")
    return int(value)


def check_numbers(lowest: float = -math.inf, **values: Any) -> None:
    """Raise ValueError for values that are no finite numbers, or lower; None is allowed."""
    for name, value in values.items():
        number = value is None or (isinstance(value, Real) and math.isfinite(value))
        if not number or (value is not None and value < lowest):
            least = "" if lowest == -math.inf else f", {lowest:g} or more"
            raise ValueError(f"{name} is {value!r}; it has to be a finite number{least}")


def as_number(value: Any, name: str) -> float | None:
    """A finite number, of a number or of a tensor with one and no dimension; None for None.

    Raises:
        ValueError: another value.
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    check_numbers(**{name: value})
    return None if value is None else float(value)


def check_steps(num_inference_steps: Any) -> None:
    """Raise ValueError for what is no number of steps; a scheduler says how many it has."""
    if not isinstance(num_inference_steps, Integral):
        raise ValueError(f"num_inference_steps is {num_inference_steps!r}; it has to be a whole number")


def check_finite(tensor: Any, name: str) -> None:
    """Raise ValueError for what is no tensor, or has a NaN or an infinity."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; needed is a tensor")
    if not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name}: {count} of {tensor.numel()} numbers are NaN or infinite")


def is_pair(value: Any) -> bool:
    """Whether it is two finite numbers."""
    if isinstance(value, (str, Tensor)) or not isinstance(value, Iterable):
        return False
    numbers = list(value)
    return len(numbers) == 2 and all(isinstance(n, Real) and math.isfinite(n) for n in numbers)
