"""Pairwise testing: few combinations of options that hold every pair of values."""

from __future__ import annotations

from itertools import combinations
from typing import Any


def all_pairs(factors: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Few combinations that hold every pair of values of every two factors (greedy)."""
    names = list(factors)
    values = {(name, k) for name in names for k in range(len(factors[name]))}
    open_pairs = {frozenset(pair) for pair in combinations(values, 2) if len({name for name, _ in pair}) == 2}
    found = []
    while open_pairs:
        chosen = sorted(min(open_pairs, key=sorted))
        for name in names:
            if name not in dict(chosen):
                gain = [
                    sum(frozenset([(name, k), c]) in open_pairs for c in chosen)
                    for k in range(len(factors[name]))
                ]
                chosen.append((name, gain.index(max(gain))))
        open_pairs -= {frozenset(pair) for pair in combinations(chosen, 2)}
        found.append({name: factors[name][k] for name, k in chosen})
    return found
