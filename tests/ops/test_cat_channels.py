"""cat_channels against torch.cat: the same bits, strides and gradients."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch
from torch import Tensor

from difusores import ops
from difusores.ops import dispatch

SHAPES = [(2, 3, 5, 7, 9), (1, 2, 4, 6, 2), (3, 64, 1, 4, 4), (1, 5, 5, 1, 1), (2, 4, 0, 3, 3)]


def pair(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    n, c, d, h, w = shape
    x, y = ((100 * torch.randn(n, k, h, w)).to(dtype).to(memory_format=layout) for k in (c, d))
    return x, y


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """The kernel, for images of any size, which counts its calls."""
    reason = dispatch.status("cpu")
    if reason is not None:
        pytest.skip(reason)
    module = sys.modules["difusores.ops.cat_channels"]  # under whose name the package has the function
    spy = mock.Mock(side_effect=torch.ops.difusores.cat_channels.default)
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "_OP", spy)
    return spy


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_and_strides(
    kernel: mock.Mock, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x, y = pair(shape, dtype, layout)
    want = torch.cat((x, y), dim=1)
    got = ops.cat_channels(x, y)
    assert kernel.call_count == 1
    assert torch.equal(got, want) and got.is_contiguous(memory_format=layout) and got.dtype is dtype


def test_others_are_pytorchs(kernel: mock.Mock) -> None:
    x, y = pair((2, 3, 5, 7, 9), torch.float32, torch.channels_last)
    others = [
        (x, y.contiguous()),
        (x, y.double()),
        (x[:, :, ::2], y[:, :, ::2]),
        (x.requires_grad_(), y),
    ]
    for pair_ in others:
        got, want = ops.cat_channels(*pair_), torch.cat(pair_, dim=1)
        assert torch.equal(got, want) and got.stride() == want.stride() and got.dtype is want.dtype
    assert kernel.call_count == 0
    ops.cat_channels(x, y).square().sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 2 * x)
    for bad in (y[:1], y[:, :, :3], y[..., :4], y[0]):
        with pytest.raises(RuntimeError):
            ops.cat_channels(x.detach(), bad)


def test_large_images_go_to_the_kernel() -> None:
    x, y = pair((1, 96, 32, 90, 92), torch.float32, torch.channels_last)
    assert torch.equal(ops.cat_channels(x, y), torch.cat((x, y), dim=1))
    with ops.use_backend("reference"):
        assert torch.equal(ops.cat_channels(x, y), torch.cat((x, y), dim=1))


def test_registration() -> None:
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.library.opcheck(
            torch.ops.difusores.cat_channels.default,
            pair((2, 3, 5, 7, 9), torch.float32, layout),
            test_utils=("test_schema", "test_faketensor"),
        )
