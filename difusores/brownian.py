"""Noise that is the path of one Brownian motion over noise levels, whatever the steps; through torchsde."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DIGITS = 6
"""Decimal places to which levels are told apart."""


class BrownianPath(NamedTuple):
    """Which Brownian path the noise of a run is of.

    Attributes:
        lowest, highest: the range of levels, on which the path depends.
        seed: one for the whole batch, or one per image. None: the initial seeds of the run's generators, or
            without any one that is drawn from torch's global generator.
    """

    lowest: float
    highest: float
    seed: int | tuple[int, ...] | None = None

    def begin(
        self, like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> BrownianNoise:
        """The path itself; arguments and Raises: as `BrownianNoise`."""
        seed: int | Sequence[int] | None = self.seed
        if seed is None and isinstance(generator, torch.Generator):
            seed = generator.initial_seed()
        elif seed is None and isinstance(generator, Sequence):
            seed = [one.initial_seed() for one in generator]
        return BrownianNoise(like, self.lowest, self.highest, seed)


class BrownianNoise:
    """The increments of Brownian paths between noise levels, divided by their deviations.

    Two grids over the same range get noise of the same path (Kidger et al. 2021, "Efficient and accurate
    gradients for neural SDEs", section 4). The numbers are those of diffusers for the same seeds.
    """

    def __init__(self, like: Tensor, lowest: float, highest: float, seed: int | Sequence[int] | None) -> None:
        """Begin the paths.

        Args:
            like: [B, ...], whose shape, dtype and device the noise has.
            lowest, highest: the range of levels; beyond it the noise is that at its ends.
            seed: one for the whole batch, or one per image; None draws one from torch's global generator.

        Raises:
            ImportError: torchsde is missing.
            ValueError: as many seeds as there are not images.
        """
        try:
            import torchsde
        except ImportError as error:
            raise ImportError("Brownian noise needs torchsde: pip install torchsde") from error
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, [], device="cpu"))
        self.batched = isinstance(seed, Sequence)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed]
        if self.batched and len(seeds) != len(like):
            raise ValueError(f"one seed per image: {len(like)} images, {len(seeds)} seeds")
        # of no memory but one number
        shape_and_kind = torch.empty((), dtype=like.dtype, device=like.device).expand(like.shape)
        self.made_of = shape_and_kind, lowest, highest, seed
        ends = sorted(torch.tensor([lowest, highest], dtype=torch.float32, device="cpu").tolist())
        self.ends = [round(end, DIGITS) for end in ends]
        self.paths = [
            torchsde.BrownianInterval(
                t0=ends[0],
                t1=ends[1],
                size=like.shape[1:] if self.batched else like.shape,
                dtype=like.dtype,
                device=like.device,
                entropy=one,
                tol=10.0**-DIGITS,
                pool_size=24,
                halfway_tree=True,
            )
            for one in seeds
        ]

    def __reduce__(self) -> tuple[type[BrownianNoise], tuple[Any, ...]]:
        # torchsde's trees cannot be copied; the same seeds grow the same ones
        return type(self), self.made_of

    def __call__(self, start: float | Tensor, end: float | Tensor) -> Tensor:
        """Standard normal noise of the step from one noise level to another, in float32."""
        start, end = (torch.as_tensor(v, dtype=torch.float32, device="cpu") for v in (start, end))
        low, high, sign = (start, end, 1.0) if start < end else (end, start, -1.0)
        # torchsde rounds its ends, warns of levels that lie beyond them then, and takes the ends
        asked = [min(max(float(level), self.ends[0]), self.ends[1]) for level in (low, high)]
        length = (end - start).abs()
        if round(asked[0], DIGITS) == round(asked[1], DIGITS):
            # a step of no length, which torchsde would halve without end, has no noise
            asked[1], length = asked[0], length.clamp(min=1)
        increments = torch.stack([path(*asked) for path in self.paths]) * sign
        noise = increments / length.sqrt()
        return noise if self.batched else noise[0]


def brownian_span(level: float, after: float, halfway: bool) -> tuple[float, float]:
    """`level`, and `after` or the geometric mean of the two, as diffusers rounds them on the way to noise.

    In float32, through logarithms: noise at the exact levels differs by more than rounding errors.
    """
    start, end = torch.tensor([level, after], dtype=torch.float32, device="cpu").log().neg().unbind()
    if halfway:
        end = start + (end - start) * 0.5
    return float(start.neg().exp()), float(end.neg().exp())
