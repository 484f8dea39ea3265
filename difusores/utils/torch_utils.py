"""Noise for loops of one's own, under the name that diffusers has for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difusores.sampling import Generators, draw_noise


def randn_tensor(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> Tensor:
    """Standard normal noise, see `difusores.sampling.draw_noise`.

    Args:
        device, dtype: the CPU and torch's default if None.
        layout: `torch.strided`, or None for it.

    Raises:
        ValueError: another layout, or generators that do not fit.
    """
    if layout not in (None, torch.strided):
        raise ValueError(f"layout is {layout}; noise is torch.strided")
    place, kind = torch.device(device or "cpu"), dtype or torch.get_default_dtype()
    return draw_noise(tuple(shape), generator, place, kind)
