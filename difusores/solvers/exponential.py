"""Integrals of exponentials and polynomials, from which the solvers in log-SNR take their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def exponential_moments(rate: float, count: int) -> list[float]:
    """The integrals over [0, 1] of θ^k e^(rate θ), k = 0 ... count - 1."""
    if abs(rate) < 2:  # the recurrence below divides by the rate
        return [
            math.fsum(rate**j / (math.factorial(j) * (j + k + 1)) for j in range(32)) for k in range(count)
        ]
    found = [math.expm1(rate) / rate]
    for k in range(1, count):
        found.append((math.exp(rate) - k * found[-1]) / rate)
    return found


def distinct(places: Sequence[float]) -> int:
    """How many of the first places differ: a grid of many steps repeats timesteps, of which one is enough."""
    count = 0
    while count < len(places) and places[count] not in places[:count]:
        count += 1
    return count


def lagrange_exponentials(nodes: Sequence[float], length: float, rate: float) -> list[float]:
    """The integrals from 0 to length of ℓ(w) e^(rate w), one for each node, where ℓ is 1 and 0 at the others.

    Args:
        nodes: distinct.
        length: may be negative.
    """
    moments = exponential_moments(rate * length, len(nodes))
    powers = [length ** (k + 1) * moment for k, moment in enumerate(moments)]
    found = []
    for k, node in enumerate(nodes):
        others = [other for j, other in enumerate(nodes) if j != k]
        polynomial = np.polynomial.polynomial.polyfromroots(others).tolist()
        scale = math.prod(node - other for other in others)
        found.append(math.fsum(c * power for c, power in zip(polynomial, powers, strict=True)) / scale)
    return found
