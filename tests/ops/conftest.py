"""The project's one tolerance rule, and the backends that each op's tests run over."""

from __future__ import annotations

from collections.abc import Callable, Generator

import pytest
import torch
from torch import Tensor

from difusores.ops.dispatch import _OPS, interpreted, status

Check = Callable[[Tensor, Tensor, Tensor], None]


def _obeys_the_rule(result: Tensor, eager: Tensor, oracle: Tensor) -> None:
    """err(result) <= 2 err(eager, same dtype) + 4 eps max|oracle|, in max-abs and in RMS, against a
    float64 oracle.
    """
    assert result.dtype is eager.dtype and oracle.dtype is torch.float64
    assert result.shape == oracle.shape
    finite = torch.isfinite(oracle)
    assert torch.equal(torch.isnan(result), torch.isnan(eager)), "NaN where eager has none, or the reverse"
    if not finite.any():
        return
    floor = 4 * torch.finfo(result.dtype).eps * oracle[finite].abs().max()
    ours = (result.double() - oracle)[finite]
    theirs = (eager.double() - oracle)[finite]
    assert ours.abs().max() <= 2 * theirs.abs().max() + floor
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + floor


@pytest.fixture
def check() -> Check:
    return _obeys_the_rule


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Generator[None, None, None]:
    """Where the backend is for a GPU, the tests' tensors are there; the interpreter has them on the CPU."""
    call = getattr(request.node, "callspec", None)
    on_gpu = call is not None and call.params.get("backend") in ("cuda", "triton")
    if not on_gpu or interpreted():
        yield
        return
    with torch.device("cuda"):
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`: every backend of the op that the module names in OP; skipped where this process lacks it."""
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OP"):
        cases = []
        for name in _OPS[metafunc.module.OP]:
            if name in (
                "wgmma",
                "triton_tma",
            ):  # in processes of their own: test_attention.py, test_triton.py
                continue
            reason = status(name)
            marks = () if reason is None else pytest.mark.skip(reason=reason)
            cases.append(pytest.param(name, marks=marks))
        metafunc.parametrize("backend", cases)
