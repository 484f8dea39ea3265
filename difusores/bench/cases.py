"""What is timed on a GPU: for each op the shapes of real networks, the ways to compute it, the exact result.

Shapes are those of Stable Diffusion 1.5 (64x64 latents, two images), Stable Diffusion XL (128x128) and of
their decoder. Inputs are normal random numbers, never zeros, which run faster than data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from difusores import ops
from difusores.bench.attention import attention, attention_gradients, attention_wgmma
from difusores.bench.case import Call, Case, shape_of, size
from difusores.ops.attention import _WGMMA_HEADS, _WIDEST_GRADIENT
from difusores.ops.scheduler_step import DRAW, philox_normal
from difusores.plan import make_row

LAST = torch.channels_last

ATTENTION = (  # images, heads, queries, keys, width
    (2, 8, 4096, 4096, 40),
    (2, 8, 4096, 77, 40),
    (2, 8, 1024, 1024, 80),
    (2, 8, 1024, 77, 80),
    (2, 8, 256, 256, 160),
    (2, 8, 256, 77, 160),
    (2, 8, 64, 64, 160),
    (2, 10, 4096, 4096, 64),
    (2, 10, 4096, 77, 64),
    (2, 20, 1024, 1024, 64),
    (2, 20, 1024, 77, 64),
    (2, 8, 4096, 4096, 128),
    (1, 1, 4096, 4096, 512),
)
GROUP_NORM = (
    (2, 320, 64, 64),
    (2, 960, 64, 64),
    (2, 640, 32, 32),
    (2, 1920, 32, 32),
    (2, 1280, 16, 16),
    (2, 2560, 8, 8),
    (2, 320, 128, 128),
    (1, 512, 64, 64),
    (1, 512, 256, 256),
    (1, 128, 512, 512),
)
TOKENS = ((2, 4096, 320), (2, 1024, 640), (2, 256, 1280), (2, 4096, 640), (2, 1024, 1280))
LATENTS = ((1, 4, 64, 64), (2, 4, 128, 128), (8, 3, 512, 512))
TMA = "triton_tma"
OPS = (
    "attention",
    "attention_gradients",
    "group_norm_silu",
    "group_norm_silu_backward",
    "layer_norm",
    "geglu",
    "linear",
    "bias_residual",
    "scheduler_step",
    "guidance_rescale",
    # Last: no GPU has run these, and a fault ends the run.
    "attention_triton_tma",
    "attention_gradients_triton_tma",
    "linear_triton_tma",
    "attention_wgmma",
)


def cases(op: str, dtype: torch.dtype, device: torch.device, quick: bool = False) -> Iterator[Case]:
    """The cases of an op, made one after the other; quick: the first two shapes."""
    of = {
        "attention": (attention, ATTENTION),
        "attention_gradients": (attention_gradients, [s for s in ATTENTION if s[4] <= _WIDEST_GRADIENT]),
        "attention_wgmma": (attention_wgmma, [s for s in ATTENTION if s[4] in _WGMMA_HEADS]),
        "group_norm_silu": (group_norm_silu, GROUP_NORM),
        "group_norm_silu_backward": (group_norm_silu_backward, GROUP_NORM),
        "layer_norm": (layer_norm, TOKENS),
        "geglu": (geglu, TOKENS),
        "linear": (linear, TOKENS),
        "bias_residual": (bias_residual, GROUP_NORM),
        "scheduler_step": (scheduler_step, LATENTS),
        "guidance_rescale": (guidance_rescale, LATENTS),
    }
    make, shapes = of[op.removesuffix(f"_{TMA}")]
    if op.endswith(TMA):
        make = partial(of_descriptors, make)
    for shape in shapes[: 2 if quick else None]:
        yield from make(shape, dtype, device)


def of_descriptors(
    make: Callable[..., Iterator[Case]], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """The cases of an op, for its kernels with tensor descriptors, which answer by their name alone."""
    for case in make(shape, dtype, device):
        yield replace(case, op=f"{case.op}_{TMA}", registered=case.registered, kernels=(TMA,))


def group_norm_silu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """By itself, and with all that it takes: time embedding and residual before, scale and shift after."""
    images, channels = shape[:2]
    for layout in (torch.contiguous_format, LAST):
        words = " channels_last" if layout is LAST else ""
        x, residual = (
            torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout) for _ in range(2)
        )
        weight, bias = (torch.randn(channels, device=device, dtype=dtype) for _ in range(2))
        yield Case(
            "group_norm_silu",
            shape_of(x) + words,
            plain_norm,
            (x, weight, bias),
            ours=partial(ops.group_norm_silu, x, 32, weight, bias),
            peers=apex_group_norm(x, weight, bias) if layout is LAST else {},
            bytes=size(x, x),
        )
        rows = tuple(torch.randn(images, channels, device=device, dtype=dtype) for _ in range(3))
        yield norm_with_all(words, (x, weight, bias, residual, *rows))


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias))


def norm_with_all(words: str, operands: tuple[Tensor, ...]) -> Case:
    def formula(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, add: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = x + add[:, :, None, None] + residual
        y = F.group_norm(h, 32, weight, bias)
        return F.silu(y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]), h

    def ours() -> Any:
        x, weight, bias, residual, add, scale, shift = operands
        more: dict[str, Any] = {"scale": scale, "shift": shift, "add": add, "residual": residual}
        return ops.group_norm_silu(x, 32, weight, bias, **more, return_sum=True)

    x = operands[0]
    return Case(
        "group_norm_silu",
        f"{shape_of(x)}{words} + add + residual, scale-shift",
        formula,
        operands,
        ours=ours,
        bytes=size(x, x, x, x),
    )


def group_norm_silu_backward(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Forward and backward, which reads the gradients of its results and what the forward read."""
    for case in group_norm_silu(shape, dtype, device):
        x = case.operands[0]
        grads = tuple(torch.randn_like(x) for _ in range(1 if case.formula is plain_norm else 2))
        moved = size(x, x, x) if case.formula is plain_norm else size(x, x, x, x, x)
        yield replace(case, op="group_norm_silu_backward", grads=grads, bytes=case.bytes + moved)


def apex_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Call]:
    @cache
    def norm() -> nn.Module:
        from apex.contrib.group_norm import GroupNorm

        made: nn.Module = GroupNorm(32, x.shape[1], act="silu", device=x.device, dtype=x.dtype)
        return made

    parameters = {"weight": weight, "bias": bias}
    if find_spec("apex") is None:
        return {}
    return {"apex": lambda: functional_call(norm(), parameters, (x,))}


def layer_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """With a residual and the sum kept, as every transformer block has it."""
    x, residual = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    weight, bias = torch.randn(2, shape[-1], device=device, dtype=dtype)

    def formula(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return F.layer_norm(h, h.shape[-1:], w, b), h

    def apex() -> tuple[Tensor, Tensor]:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        h = x + residual
        return fused_layer_norm_affine(h, weight, bias, h.shape[-1:], 1e-5), h

    yield Case(
        "layer_norm",
        f"{shape_of(x)} + residual",
        formula,
        (x, residual, weight, bias),
        ours=lambda: ops.layer_norm(x, weight, bias, residual=residual, return_sum=True),
        peers={} if find_spec("apex") is None else {"apex": apex},
        bytes=size(x, x, x, x),
    )


def geglu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    both = torch.randn(*shape[:-1], 8 * shape[-1], device=device, dtype=dtype)

    def formula(both: Tensor) -> Tensor:
        x, gate = both.chunk(2, dim=-1)
        return x * F.gelu(gate)

    yield Case(
        "geglu",
        shape_of(both),
        formula,
        (both,),
        ours=lambda: ops.geglu(both),
        bytes=size(both) * 3 // 2,
    )


def linear(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """A feed-forward's first product with GEGLU; its last one, and an attention's, with the residual."""
    width = shape[-1]
    for depth, out, geglu in ((width, 4 * width, True), (4 * width, width, False), (width, width, False)):
        x = torch.randn(*shape[:-1], depth, device=device, dtype=dtype)
        weight = torch.randn(out * (1 + geglu), depth, device=device, dtype=dtype) / depth**0.5
        bias = torch.randn(len(weight), device=device, dtype=dtype)
        yield linear_case(x, weight, bias, torch.randn(*shape[:-1], out, device=device, dtype=dtype), geglu)


def linear_case(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, geglu: bool) -> Case:
    def formula(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        both = F.linear(x, w, b)
        if not geglu:
            return both + r
        value, gate = both.chunk(2, dim=-1)
        return value * F.gelu(gate)

    added = None if geglu else residual
    two = {"F.linear, our geglu": lambda: ops.geglu(F.linear(x, weight, bias))} if geglu else {}
    return Case(
        "linear",
        f"{shape_of(x)} to {residual.shape[-1]} {'geglu' if geglu else '+ residual'}",
        formula,
        (x, weight, bias, residual),
        ours=lambda: ops.linear(x, weight, bias, residual=added, geglu=geglu),
        peers=two,
        bytes=size(x, weight, bias, residual) + (0 if geglu else size(residual)),
        flops=2 * x.numel() * len(weight),
        kernels=("triton",),
    )


def bias_residual(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """What follows a convolution without bias; channels_last, in which they are fastest."""
    x, residual = (
        torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=LAST) for _ in "12"
    )
    bias = torch.randn(shape[1], device=device, dtype=dtype)

    def formula(x: Tensor, r: Tensor, b: Tensor) -> Tensor:
        return x + b[:, None, None] + r

    yield Case(
        "bias_residual",
        f"{shape_of(x)} channels_last",
        formula,
        (x, residual, bias),
        ours=lambda: ops.bias_residual(x, bias, residual=residual),
        bytes=size(x, x, x),
    )


ALPHA, SIGMA, GUIDANCE = 0.8, 0.6, 7.5
DRAWN = 3  # the number of the step's draw


def scheduler_step(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Guided steps: sample in fp32, both model outputs in `dtype`, row and counter on the device.

    DDIM's; and an ancestral one, which draws its noise and writes the next input of the model twice too.
    """
    x = torch.randn(shape, device=device)
    conditional, unconditional = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    operands, both = (x, conditional, unconditional), [conditional, unconditional]
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    ddim, ancestral = (table({"x0": 0.9, "e": 0.4, "z": z}, device) for z in (0.0, 0.3))
    yield Case(
        "scheduler_step",
        f"{shape_of(x)} guided",
        guided,
        operands,
        ours=lambda: ops.scheduler_step(ddim, x, both, step=counter)[0],
        bytes=size(*operands, x),
    )
    seeds = torch.arange(len(x), device=device)
    more: dict[str, Any] = {"outputs": ("y", "m"), "model_dtype": dtype, "model_repeats": 2}

    def noisy(z: Tensor, x: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        y = guided(x, c, u) + 0.3 * z
        return y, torch.cat([y, y]).to(c.dtype)

    yield Case(
        "scheduler_step",
        f"{shape_of(x)} guided, noise, next input twice",
        lambda x, c, u: noisy(torch.randn_like(x), x, c, u),
        operands,
        ours=lambda: ops.scheduler_step(ancestral, x, both, step=counter, seeds=seeds, **more),
        numbers=lambda x, c, u: noisy(philox_normal(seeds, x.shape, DRAWN, x.dtype), x, c, u),
        bytes=size(*operands, x, *both),
    )


def guidance_rescale(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Two outputs of a model in `dtype`, halves of one tensor; row and counter on the device."""
    unconditional, conditional = torch.randn(2, *shape, device=device).to(dtype)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    row = table({"x0": 1.0}, device)
    axes = list(range(1, len(shape)))

    def formula(c: Tensor, u: Tensor) -> Tensor:
        return 0.7 * c.std(axes) / mixed(c, u).std(axes) + 0.3

    yield Case(
        "guidance_rescale",
        shape_of(conditional),
        formula,
        (conditional, unconditional),
        ours=lambda: ops.guidance_rescale(
            row, (conditional, unconditional), 0.7, conditional=0, step=counter
        ),
        bytes=size(conditional, unconditional),
    )


def mixed(c: Tensor, u: Tensor) -> Tensor:
    return u + GUIDANCE * (c - u)


def table(weights: dict[str, float], device: torch.device) -> Tensor:
    """One row, of the weights of the next sample."""
    row = list(make_row((1 / ALPHA, -SIGMA / ALPHA), weights, clip=(-1.0, 1.0)))
    row[:2] = GUIDANCE, 1 - GUIDANCE
    row[DRAW] = DRAWN
    return torch.tensor([row], dtype=torch.float64, device=device)


def guided(x: Tensor, c: Tensor, u: Tensor) -> Tensor:
    e = mixed(c, u)
    x0 = ((x - SIGMA * e) / ALPHA).clamp(-1, 1)
    return 0.9 * x0 + 0.4 * e
