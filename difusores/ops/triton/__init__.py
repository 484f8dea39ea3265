"""The Triton kernels, one file per op. `difusores.ops` imports a file when its kernel is first called.

Each file has `launch`, the implementation of the registered op `difusores::<op>_triton`. Nothing is tuned at
run time: a launch depends on shapes, dtypes and strides alone, and so do the bits of its result.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from difusores.ops.dispatch import interpreted

INTERPRETED = interpreted()
"""Whether the kernels run in Triton's interpreter, whose `tl.dot` multiplies the bits of bf16 as integers."""


def run(kernel: Any, programs: int, like: Tensor, *args: Any, **constants: Any) -> None:
    """Launch `programs` programs of a kernel on the device of `like`, on its current stream.

    Args:
        args: the kernel's arguments.
        constants: its compile-time constants and Triton's options (num_warps, num_stages).
    """
    if programs == 0:
        return
    elsewhere = like.is_cuda and like.get_device() != torch.cuda.current_device()
    with torch.cuda.device(like.device) if elsewhere else nullcontext():
        kernel[(programs,)](*args, **constants, enable_fp_fusion=True)


def descriptor(t: Tensor, *box: int) -> Any:
    """A tensor descriptor: t as it lies in memory, and the size of the boxes in which a kernel copies it.

    From sm_90 on an engine of its own copies a box, at the word of one thread; it reads zeros outside the
    tensor and writes nothing there. For older GPUs Triton makes loads and stores of it. It goes to the kernel
    by value, 128 bytes with the tensor's address in them, which a CUDA graph keeps as it keeps any address.
    Made by the kernel, it would take memory from `triton.set_allocator`, the process's, at every launch.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor  # not in triton 3.3

    steps = [step if size > 1 else 16 for step, size in zip(t.stride(), t.shape, strict=True)]
    return TensorDescriptor(t, [*t.shape], [*steps[:-1], 1], [*box])


def power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def alignment(*counts: int) -> int:
    """The largest power of two up to 16 that divides every count.

    Kernels take counts that decide how wide a load can be divided by it, and multiply again by this constant:
    the compiler looks at the divisors of constants, but of an argument it only asks whether 16 is one.
    """
    together = 16
    for n in counts:
        together = min(together, n & -n) if n else together
    return together
