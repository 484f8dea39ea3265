"""Noise that is the path of one Brownian motion over noise levels, whatever the steps; through torchsde."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
        ends = sorted(torch.tensor([lowest, highest], dtype=torch.float32, device="cpu").unbind())
        self.paths = [
            torchsde.BrownianInterval(
                t0=ends[0],
                t1=ends[1],
                size=like.shape[1:] if self.batched else like.shape,
                dtype=like.dtype,
                device=like.device,
                entropy=one,
                tol=1e-6,
                pool_size=24,
                halfway_tree=True,
            )
            for one in seeds
        ]

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        """Standard normal noise of the step from one noise level, 0-dim float32, to another."""
        low, high, sign = (start, end, 1.0) if start < end else (end, start, -1.0)
        increments = torch.stack([path(low, high) for path in self.paths]) * sign
        noise = increments / (end - start).abs().sqrt()
        return noise if self.batched else noise[0]


def brownian_levels(level: Tensor, after: Tensor, halfway: bool) -> tuple[Tensor, Tensor]:
    """`level`, and `after` or the geometric mean of the two, as diffusers rounds them on the way to noise.

    In float32, through logarithms: noise at the exact levels differs by more than rounding errors.
    """
    start, end = level.log().neg(), after.log().neg()
    if halfway:
        end = start + (end - start) * 0.5
    return start.neg().exp(), end.neg().exp()
