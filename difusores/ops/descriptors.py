"""Whether Triton's kernels can read and write tensors through tensor descriptors: one rule for all of them.

From sm_90 on an engine of its own (TMA) copies boxes of a tensor. It asks for rows whose elements lie side by
side, that begin at multiples of 16 bytes, and of which none is there twice. No GPU has run such a kernel of
ours, so they answer only to `use_backend("triton_tma")`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from difusores.ops.dispatch import interpreted

DESCRIBED = ", bool described=False"
"""The last argument in the schema of such a kernel: whether to use descriptors, where tensors fit them."""


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _generation(device: torch.device) -> int:
    return _capability(device)[0]


_generation._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _in_rows(t: Tensor) -> bool:
    count = 16 // t.element_size()
    *steps, element = t.stride()
    if element != 1 or any(
        step % count or step == 0 for step, size in zip(steps, t.shape, strict=False) if size > 1
    ):
        return False
    return torch.compiler.is_compiling() or t.storage_offset() % count == 0  # Dynamo cannot trace the offset


def refused(**tensors: Tensor) -> str | None:
    """Why some of these cannot be described, as far as a call shows it beforehand; None if all can."""
    for name, t in tensors.items():
        if not _in_rows(t):
            return (
                "tensor descriptors need rows at multiples of 16 bytes with their elements side by side, "
                f"expanded in no dimension, not {name} with strides {t.stride()}"
            )
    if not interpreted() and (generation := _generation(next(iter(tensors.values())).device)) < 9:
        return f"tensor descriptors need a GPU of sm_90 or newer, this is of sm_{generation}x"
    return None


def fit(*tensors: Tensor) -> bool:
    """Whether all of these can be described; if not, a launch takes pointers, with the same result.

    What `refused` says, and what a call does not show before it is made: the address under a graph, the
    gradient that autograd gives.
    """
    return all(_in_rows(t) and t.numel() > 0 and t.data_ptr() % 16 == 0 for t in tensors)
