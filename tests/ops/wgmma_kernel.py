"""Attention with the products of sm_90, against the float64 oracle and its twin. Run by test_attention.py.

Nothing emulates these instructions, so only such a GPU can say whether the kernel is right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_attention import exact, heads

from difusores import ops

# B, H, L, S, D: every width, so every swizzle; one tile and several, one key, one query, edges of both
SIZES = [
    *((1, 1, 128, 128, d) for d in (64, 80, 96, 128, 160)),
    *((2, 3, 300, 333, d) for d in (64, 80, 96, 128, 160)),
    *((1, 2, 1, 1, 64), (1, 1, 129, 77, 128), (2, 10, 4096, 4096, 64), (2, 8, 1024, 1024, 80)),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_oracle_and_its_twin(size: Any, dtype: torch.dtype, check: Any) -> None:
    b, h, length, keys, d = size
    with torch.device("cuda"):
        q, k, v = (heads(b, h, n, d, dtype) for n in (length, keys, keys))
    for scale in (d**-0.5, -0.3):
        with ops.use_backend("wgmma"):
            got, again = (ops.attention(q, k, v, scale=scale) for _ in "12")
            alone = ops.attention(*(t[-1:, -1:] for t in (q, k, v)), scale=scale)
        assert torch.equal(got, again) and torch.equal(got[-1:, -1:], alone)
        with ops.use_backend("cuda"):
            twin = ops.attention(q, k, v, scale=scale)
        part = [t[-1:, -1:] for t in (q, k, v)]
        oracle = exact(*part, None, scale)
        check(alone, F.scaled_dot_product_attention(*part, scale=scale), oracle)
        torch.testing.assert_close(got, twin, rtol=1e-2, atol=1e-2)
