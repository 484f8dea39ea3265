"""Names and options of what `accelerate(approximate=...)` allows: faster, and not the same image.

    approximate=("int8", "feature_cache")                         with the options' own values
    approximate={"feature_cache": {"interval": 2, "depth": 2}}    with others

docs/approximate.md says what each does and how far it moves images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Int8:
    """Convolutions and linear layers of a UNet in 8 bits, once `calibrate` has seen their inputs."""


@dataclass(frozen=True)
class FeatureCache:
    """Deep features of a UNet from an earlier step.

    Attributes:
        interval: every so many steps all is computed; from 2.
        depth: layers on the way up at full resolution, and those that they read on the way down, which are
            computed in every step; from 1.
    """

    interval: int = 3
    depth: int = 1

    def __post_init__(self) -> None:
        for name, least in (("interval", 2), ("depth", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} of feature_cache is {value!r}; allowed are integers from {least}")


@dataclass(frozen=True)
class TokenMerging:
    """Self-attention at full resolution over fewer tokens.

    Attributes:
        ratio: share of the tokens that are merged into others; above 0, at most 0.75.
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 0.75:
            raise ValueError(
                f"ratio of token_merging is {self.ratio!r}; allowed are numbers above 0, up to 0.75"
            )


@dataclass(frozen=True)
class PartialGuidance:
    """Guidance in a part of a pipeline's steps.

    Attributes:
        interval: shares of the run between which there is guidance.
    """

    interval: tuple[float, float] = (0.0, 0.6)

    def __post_init__(self) -> None:
        first, last = self.interval if len(self.interval) == 2 else (1.0, 0.0)
        if not 0 <= first <= last <= 1:
            raise ValueError(
                f"interval of partial_guidance is {self.interval!r}; needed are two shares, "
                "0 <= first <= last <= 1"
            )


KINDS: dict[str, type[Any]] = {
    "int8": Int8,
    "feature_cache": FeatureCache,
    "token_merging": TokenMerging,
    "partial_guidance": PartialGuidance,
}
Approximations = tuple[tuple[str, Any], ...]  # name and options, in the order of KINDS


def parse(given: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> Approximations:
    """What `accelerate` was given as `approximate`.

    Raises:
        ValueError: a name, an option or its value is none of those above.
    """
    allowed = ", ".join(map(repr, KINDS))
    if isinstance(given, str):
        raise ValueError(f"approximate is the text {given!r}; needed is a tuple of names, among {allowed}")
    options = dict(given) if isinstance(given, Mapping) else {name: {} for name in given}
    unknown = [name for name in options if name not in KINDS]
    if unknown:
        raise ValueError(f"approximate has {', '.join(map(repr, unknown))}; allowed are {allowed}")
    for name, values in options.items():
        known = [field.name for field in fields(KINDS[name])]
        for option in values:
            if option not in known:
                raise ValueError(
                    f"approximate has option {option!r} for {name!r}; "
                    f"allowed are {', '.join(map(repr, known)) or 'none'}"
                )
    return tuple((name, kind(**options[name])) for name, kind in KINDS.items() if name in options)
