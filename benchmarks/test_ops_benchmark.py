"""Single operations beside eager PyTorch, by pytest-benchmark.

    pytest benchmarks/test_ops_benchmark.py [--benchmark-json FILE] [--benchmark-compare]

Each result is held to the project's one rule of tolerance (docs/design.md, section 5) before it is timed;
Winograd's convolution to its own bound. Shapes are Stable Diffusion's at 512x512 pixels and ddpm-cat-256's.
bench_ops.py and bench_attention.py time more shapes, interleaved and beside more peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_ops import checked, distance
from torch import Tensor

from difusores import ops
from difusores.plan import make_row

pytest.importorskip("pytest_benchmark")
LAST = torch.channels_last
Case = tuple[Callable[[], Tensor], Callable[[], Tensor], Tensor]  # ours, eager, the float64 result


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def attention(dtype: torch.dtype, *shape: int) -> Case:
    """shape: images, heads, queries, keys, width."""
    images, heads, queries, keys, width = shape
    q, k, v = (torch.randn(images, heads, rows, width).to(dtype) for rows in (queries, keys, keys))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return lambda: ops.attention(q, k, v), lambda: F.scaled_dot_product_attention(q, k, v), exact


def group_norm_silu(dtype: torch.dtype, *shape: int) -> Case:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAST)
    weight, bias = torch.randn(2, shape[1]).to(dtype)

    def eager(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
        return F.silu(F.group_norm(x, 32, weight, bias))

    def ours() -> Tensor:
        return ops.group_norm_silu(x, 32, weight, bias)  # type: ignore[return-value]

    return ours, eager, eager(x.double(), weight.double(), bias.double())


def layer_norm(dtype: torch.dtype, *shape: int) -> Case:
    x, weight, bias = torch.randn(shape).to(dtype), *torch.randn(2, shape[-1]).to(dtype)

    def eager(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    def ours() -> Tensor:
        return ops.layer_norm(x, weight, bias)  # type: ignore[return-value]

    return ours, eager, eager(x.double(), weight.double(), bias.double())


def geglu(dtype: torch.dtype, *shape: int) -> Case:
    both = torch.randn(shape).to(dtype)

    def eager(both: Tensor = both) -> Tensor:
        x, gate = both.chunk(2, dim=-1)
        return x * F.gelu(gate)

    return lambda: ops.geglu(both), eager, eager(both.double())


def scheduler_step(dtype: torch.dtype, *shape: int) -> Case:
    x, e = torch.randn(2, *shape).to(dtype)
    row = torch.tensor(make_row((1.2, -0.7), {"x0": 0.9, "e": 0.4}, clip=(-1.0, 1.0)), dtype=torch.float64)

    def eager(x: Tensor = x, e: Tensor = e) -> Tensor:
        return 0.9 * (1.2 * x - 0.7 * e).clamp(-1, 1) + 0.4 * e

    return lambda: ops.scheduler_step(row, x, [e])[0], eager, eager(x.double(), e.double())


def winograd_conv(dtype: torch.dtype, *shape: int) -> Case:
    """shape: images, channels in and out, height, width."""
    n, c, o, h, w = shape
    x = torch.randn(n, c, h, w).contiguous(memory_format=LAST)
    weight, bias = torch.randn(o, c, 3, 3) / (3 * c**0.5), torch.randn(o)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    return lambda: ops.winograd_conv(x, weight, bias), lambda: F.conv2d(x, weight, bias, padding=1), exact


BOTH = (torch.float32, torch.bfloat16)
CASES: list[tuple[Callable[..., Case], torch.dtype, tuple[int, ...]]] = [
    *(
        (attention, dtype, shape)
        for shape in ((2, 8, 1024, 1024, 80), (2, 8, 4096, 77, 40))
        for dtype in BOTH
    ),
    *((group_norm_silu, dtype, shape) for shape in ((2, 320, 64, 64), (1, 128, 256, 256)) for dtype in BOTH),
    *((layer_norm, dtype, (2, 4096, 320)) for dtype in BOTH),
    *((geglu, dtype, (2, 4096, 2560)) for dtype in BOTH),
    *((scheduler_step, torch.float32, shape) for shape in ((1, 4, 64, 64), (8, 3, 512, 512))),
    *((winograd_conv, torch.float32, shape) for shape in ((2, 320, 320, 64, 64), (1, 256, 256, 64, 64))),
]


def label(case: tuple[Any, ...]) -> str:
    make, dtype, shape = case
    return f"{make.__name__} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("contestant", ["difusores", "eager"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_op(benchmark: Any, case: tuple[Any, ...], contestant: str) -> None:
    make, dtype, shape = case
    ours, eager, exact = make(dtype, *shape)
    if make is winograd_conv:
        assert distance(ours(), exact) <= 1e-5
    else:
        checked(ours(), eager(), exact, label(case))
    benchmark.group = label(case)
    benchmark(ours if contestant == "difusores" else eager)
