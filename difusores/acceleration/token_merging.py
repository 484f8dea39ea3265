"""Token merging: self-attention over fewer tokens (approximate).

Bolya & Hoffman 2023, "Token Merging for Fast Stable Diffusion". Of each 2x2 tokens of an image the first is a
destination. The share of all tokens that is most like a destination (cosine) is averaged into it; attention
sees what is left, and each merged token gets its destination's result. Nothing is drawn at random, so the
same image gives the same bits. At full resolution only, where attention costs most.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=16)
def _places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens that are destinations, and of the others."""
    grid = torch.zeros(height, width, dtype=torch.bool)
    grid[::2, ::2] = True
    flat = grid.flatten()
    return flat.nonzero().flatten(), (~flat).nonzero().flatten()


class Merging:
    """How the tokens of some images are merged.

    Args:
        tokens: [N, H * W, C], by whose likeness.
        size: (H, W).
        ratio: share of the tokens that go.
    """

    def __init__(self, tokens: Tensor, size: tuple[int, int], ratio: float) -> None:
        self.kept_at, self.others_at = _places(*size)
        count = min(int(tokens.shape[1] * ratio), len(self.others_at))
        unit = F.normalize(tokens, dim=-1)
        likeness = unit[:, self.others_at] @ unit[:, self.kept_at].transpose(1, 2)
        best, nearest = likeness.max(dim=-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        self.merged, self.left = order[:, :count], order[:, count:]
        self.into = nearest.gather(1, self.merged)

    def merge(self, tokens: Tensor) -> Tensor:
        """[N, H * W, C] -> [N, fewer, C]: those left, then the destinations."""
        others = tokens[:, self.others_at]
        sums = tokens[:, self.kept_at]
        n, places, width = sums.shape
        rows = (self.into + places * torch.arange(n)[:, None]).flatten()
        sums = sums.flatten(0, 1).index_add(0, rows, _rows(others, self.merged).flatten(0, 1))
        counts = torch.ones(n * places, dtype=sums.dtype).index_add(0, rows, sums.new_ones(len(rows)))
        means = (sums / counts[:, None]).view(n, places, width)
        return torch.cat((_rows(others, self.left), means), dim=1)

    def spread(self, tokens: Tensor) -> Tensor:
        """[N, fewer, C] -> [N, H * W, C]."""
        n, _, width = tokens.shape
        left, means = tokens.split((self.left.shape[1], len(self.kept_at)), dim=1)
        others = tokens.new_empty(n, len(self.others_at), width)
        others.scatter_(1, self.left[:, :, None].expand(-1, -1, width), left)
        others.scatter_(1, self.merged[:, :, None].expand(-1, -1, width), _rows(means, self.into))
        out = tokens.new_empty(n, len(self.kept_at) + len(self.others_at), width)
        out[:, self.kept_at], out[:, self.others_at] = means, others
        return out


def _rows(tokens: Tensor, numbers: Tensor) -> Tensor:
    """tokens [N, L, C] at numbers [N, R] -> [N, R, C]."""
    return tokens.gather(1, numbers[:, :, None].expand(-1, -1, tokens.shape[-1]))
