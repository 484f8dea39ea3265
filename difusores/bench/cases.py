"""What is timed on a GPU: for each op the shapes of real networks, the ways to compute it, the exact result.

Shapes are those of Stable Diffusion 1.5 (64x64 latents, two images), Stable Diffusion XL (128x128) and of
their decoder. Inputs are normal random numbers, never zeros, which run faster than data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from difusores import ops
from difusores.ops.dispatch import wanted
from difusores.plan import make_row

Call = Callable[[], Any]
LAST = torch.channels_last
CHECKED = 256  # queries of each head whose attention is computed in float64


@dataclass
class Case:
    """One op at one shape.

    Attributes:
        op: its name.
        label: shape and layout in words.
        eager: as PyTorch computes it without us; what `torch.compile` is given.
        ours: the same by the op's public function, under whichever backend is asked for.
        oracle: the result of `view` in float64.
        view: the part of a result that is compared.
        peers: other libraries' ways, by name.
        bytes, flops: what any implementation has to move and, for matrix products alone, to compute.
    """

    op: str
    label: str
    eager: Call
    ours: Call
    oracle: Call
    bytes: int
    flops: int = 0
    view: Callable[[Any], Tensor] = field(default=lambda t: t)
    peers: Mapping[str, Call] = field(default_factory=dict)


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
OPS = ("attention", "group_norm_silu", "layer_norm", "geglu", "linear", "bias_residual", "scheduler_step")


def cases(op: str, dtype: torch.dtype, device: torch.device, quick: bool = False) -> Iterator[Case]:
    """The cases of an op, made one after the other; quick: the first two shapes."""
    of = {
        "attention": (attention, ATTENTION),
        "group_norm_silu": (group_norm_silu, GROUP_NORM),
        "layer_norm": (layer_norm, TOKENS),
        "geglu": (geglu, TOKENS),
        "linear": (linear, TOKENS),
        "bias_residual": (bias_residual, GROUP_NORM),
        "scheduler_step": (scheduler_step, LATENTS),
    }
    make, shapes = of[op]
    for shape in shapes[: 2 if quick else None]:
        yield from make(shape, dtype, device)


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def shape_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def attention(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    images, heads, queries, keys, width = shape
    q, k, v = (
        torch.randn(images, rows, heads, width, device=device, dtype=dtype).transpose(1, 2)
        for rows in (queries, keys, keys)
    )
    rows = torch.linspace(0, queries - 1, min(queries, CHECKED), device=device).long()

    def backend(which: SDPBackend) -> Call:
        def call() -> Tensor:
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    def oracle() -> Tensor:
        weights = torch.softmax(q[:, :, rows].double() @ k.double().transpose(-1, -2) * width**-0.5, dim=-1)
        return weights @ v.double()

    peers = {
        "sdpa flash": backend(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": backend(SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": backend(SDPBackend.EFFICIENT_ATTENTION),
    }
    if find_spec("xformers") is not None:
        from xformers.ops import memory_efficient_attention

        by_rows = [t.transpose(1, 2) for t in (q, k, v)]
        peers["xformers"] = lambda: memory_efficient_attention(*by_rows).transpose(1, 2)
    if find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_func

        of_flash = [t.transpose(1, 2) for t in (q, k, v)]
        peers["flash-attn"] = lambda: flash_attn_func(*of_flash).transpose(1, 2)
    # DIFUSORES_BACKEND=wgmma: no GPU has run it, and a fault would end the run of all.
    if wanted() == "wgmma":
        peers["difusores wgmma"] = lambda: ops.attention(q, k, v)
    yield Case(
        "attention",
        shape_of(shape),
        eager=lambda: F.scaled_dot_product_attention(q, k, v),
        ours=lambda: ops.attention(q, k, v),
        oracle=oracle,
        view=lambda t: t[:, :, rows],
        peers=peers,
        bytes=size(q, k, v, q),
        flops=4 * images * heads * queries * keys * width,
    )


def group_norm_silu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for layout in (torch.contiguous_format, LAST):
        x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout)
        weight, bias = torch.randn(2, shape[1], device=device, dtype=dtype)
        case = norm_case(x, weight, bias)
        if layout is LAST:
            case.label += " channels_last"
            if find_spec("apex") is not None:
                from apex.contrib.group_norm import GroupNorm

                norm = GroupNorm(32, shape[1], act="silu", device=device, dtype=dtype)
                norm.load_state_dict({"weight": weight, "bias": bias})
                case.peers = {"apex": partial(norm, x)}
        yield case


def norm_case(x: Tensor, weight: Tensor, bias: Tensor) -> Case:
    def eager(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
        return F.silu(F.group_norm(x, 32, weight, bias))

    return Case(
        "group_norm_silu",
        shape_of(tuple(x.shape)),
        eager=eager,
        ours=lambda: ops.group_norm_silu(x, 32, weight, bias),
        oracle=lambda: eager(x.double(), weight.double(), bias.double()),
        bytes=size(x, x),
    )


def layer_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """With a residual and the sum kept, as every transformer block has it; the sum is compared too."""
    x, residual = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    weight, bias = torch.randn(2, shape[-1], device=device, dtype=dtype)

    def eager(x: Tensor = x, r: Tensor = residual, w: Tensor = weight, b: Tensor = bias) -> Any:
        h = x + r
        return F.layer_norm(h, h.shape[-1:], w, b), h

    yield Case(
        "layer_norm",
        f"{shape_of(shape)} + residual",
        eager=eager,
        ours=lambda: ops.layer_norm(x, weight, bias, residual=residual, return_sum=True),
        oracle=lambda: torch.stack(eager(*(t.double() for t in (x, residual, weight, bias)))),
        view=lambda pair: torch.stack(tuple(pair)),
        bytes=size(x, x, x, x),
    )


def geglu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    both = torch.randn(*shape[:-1], 8 * shape[-1], device=device, dtype=dtype)

    def eager(both: Tensor = both) -> Tensor:
        x, gate = both.chunk(2, dim=-1)
        return x * F.gelu(gate)

    yield Case(
        "geglu",
        shape_of(tuple(both.shape)),
        eager=eager,
        ours=lambda: ops.geglu(both),
        oracle=lambda: eager(both.double()),
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
    def eager(x: Tensor = x, w: Tensor = weight, b: Tensor = bias, r: Tensor = residual) -> Tensor:
        both = F.linear(x, w, b)
        if not geglu:
            return both + r
        value, gate = both.chunk(2, dim=-1)
        return value * F.gelu(gate)

    added = None if geglu else residual
    two = {"F.linear, our geglu": lambda: ops.geglu(F.linear(x, weight, bias))} if geglu else {}
    return Case(
        "linear",
        f"{shape_of(tuple(x.shape))} to {residual.shape[-1]} {'geglu' if geglu else '+ residual'}",
        eager=eager,
        ours=lambda: ops.linear(x, weight, bias, residual=added, geglu=geglu),
        oracle=lambda: eager(*(t.double() for t in (x, weight, bias, residual))),
        peers=two,
        bytes=size(x, weight, bias, residual) + (0 if geglu else size(residual)),
        flops=2 * x.numel() * len(weight),
    )


def bias_residual(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """What follows a convolution without bias; channels_last, in which they are fastest."""
    x, residual = (
        torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=LAST) for _ in "12"
    )
    bias = torch.randn(shape[1], device=device, dtype=dtype)

    def eager(x: Tensor = x, r: Tensor = residual, b: Tensor = bias) -> Tensor:
        return x + b[:, None, None] + r

    yield Case(
        "bias_residual",
        f"{shape_of(shape)} channels_last",
        eager=eager,
        ours=lambda: ops.bias_residual(x, bias, residual=residual),
        oracle=lambda: eager(x.double(), residual.double(), bias.double()),
        bytes=size(x, x, x),
    )


def scheduler_step(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """A guided step of DDIM: sample in fp32, both model outputs in `dtype`, row and counter on the device."""
    x = torch.randn(shape, device=device)
    conditional, unconditional = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    alpha, sigma, guidance = 0.8, 0.6, 7.5
    row = list(make_row((1 / alpha, -sigma / alpha), {"x0": 0.9, "e": 0.4}, clip=(-1.0, 1.0)))
    row[:2] = guidance, 1 - guidance
    table = torch.tensor([row], dtype=torch.float64, device=device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)

    def eager(x: Tensor = x, c: Tensor = conditional, u: Tensor = unconditional) -> Tensor:
        e = u + guidance * (c - u)
        x0 = ((x - sigma * e) / alpha).clamp(-1, 1)
        return 0.9 * x0 + 0.4 * e

    yield Case(
        "scheduler_step",
        f"{shape_of(shape)} guided",
        eager=eager,
        ours=lambda: ops.scheduler_step(table, x, [conditional, unconditional], step=counter)[0],
        oracle=lambda: eager(x.double(), conditional.double(), unconditional.double()),
        bytes=size(x, conditional, unconditional, x),
    )
