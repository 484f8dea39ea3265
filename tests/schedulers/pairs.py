"""Pairwise testing: few combinations of options that hold every pair of values which go together."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import pytest

Table = Mapping[str, Sequence[Any]]
Place = tuple[str, int]
"""An option and which of its values."""


class Conflict(NamedTuple):
    """Values of two options that do not go together, and why."""

    one: str
    ones: Sequence[Any]
    other: str
    others: Sequence[Any]
    reason: str


def factors(
    cls: Any, values: Table, methods: Iterable[str] = ("__init__", "step"), given: Iterable[str] = ()
) -> dict[str, list[Any]]:
    """The values of all parameters of these methods, as their signatures have them.

    given: parameters that the test itself gives. One that is neither there nor in `values` is a KeyError.
    """
    left_out = {"self", "return_dict", "kwargs", *given}
    names = (name for method in methods for name in inspect.signature(getattr(cls, method)).parameters)
    return {name: list(values[name]) for name in names if name not in left_out}


def all_pairs(table: Table, conflicts: Sequence[Conflict] = ()) -> list[dict[str, Any]]:
    """Few combinations that hold every pair of values of every two options but those in conflict (greedy)."""
    rules, found = _Rules(table, conflicts), []
    open_pairs = {frozenset(pair) for pair in rules.pairs() if not rules.bar(pair)}
    while open_pairs:
        chosen = sorted(min(open_pairs, key=sorted))
        while len(chosen) < len(table):
            fits = rules.fitting(chosen)
            # an option of which only one value is left comes first, so that none is left without
            name = min(fits, key=lambda name: len(fits[name]) > 1)
            places = [place for place in fits[name] if not rules.bar((*chosen, place))]
            gain = [sum(frozenset((place, held)) in open_pairs for held in chosen) for place in places]
            chosen.append(places[gain.index(max(gain))])
        open_pairs -= {frozenset(pair) for pair in combinations(chosen, 2)}
        found.append({name: table[name][dict(chosen)[name]] for name in table})
    return found


class _Rules:
    """Which places go together."""

    def __init__(self, table: Table, conflicts: Sequence[Conflict]) -> None:
        self.places: dict[str, list[Place]] = {
            name: [(name, k) for k in range(len(table[name]))] for name in table
        }
        self.against: dict[Place, set[Place]] = {}
        for one, ones, other, others, _ in conflicts:
            for first in self.places.get(one, []):
                for second in self.places.get(other, []):
                    if table[one][first[1]] in ones and table[other][second[1]] in others:
                        self.against.setdefault(first, set()).add(second)
                        self.against.setdefault(second, set()).add(first)

    def pairs(self) -> Iterable[tuple[Place, Place]]:
        for one, other in combinations(self.places.values(), 2):
            yield from ((first, second) for first in one for second in other)

    def _barred(self, chosen: Iterable[Place]) -> set[Place]:
        return set().union(*(self.against.get(place, ()) for place in chosen))

    def fitting(self, chosen: Sequence[Place]) -> dict[str, list[Place]]:
        """The places that are left of every option that is not chosen."""
        barred, taken = self._barred(chosen), {name for name, _ in chosen}
        return {
            name: [place for place in places if place not in barred]
            for name, places in self.places.items()
            if name not in taken
        }

    def bar(self, chosen: Sequence[Place]) -> bool:
        """Whether these places are in conflict, or leave no value of some other option."""
        barred = self._barred(chosen)
        if not barred:
            return False
        return any(place in barred for place in chosen) or not all(self.fitting(chosen).values())


def check_pairs(
    title: str,
    table: Table,
    found: Sequence[Mapping[str, Any]],
    conflicts: Sequence[Conflict],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every pair of values is in a combination, but for those in conflict, which are in none.

    Two conflicts may leave a third option without any value: such a pair is in none either.
    """
    rules, run = _Rules(table, conflicts), set()
    for option in found:
        places = [(name, list(table[name]).index(option[name])) for name in table]
        run |= {frozenset(pair) for pair in combinations(places, 2)}
    barred = {frozenset(pair) for pair in rules.pairs() if rules.bar(pair)}
    every = {frozenset(pair) for pair in rules.pairs()}
    assert every - barred == run, ((every - barred) ^ run, title)
    with capsys.disabled():
        size = math.prod(len(values) for values in table.values())
        print(
            f"\n{title}: {len(found)} combinations hold {len(run)} of {len(every)} pairs of values of "
            f"{len(table)} options (of {size:.1e}); the other {len(barred)} are in conflict"
        )
