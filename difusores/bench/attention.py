"""Attention on a GPU and its gradients, beside PyTorch's ways, xformers' and flash-attn's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from difusores import ops
from difusores.bench.case import Call, Case, size
from difusores.ops.attention import _has_gradients
from difusores.ops.dispatch import BackendUnavailable, wanted

CHECKED = 256  # queries of each head whose attention is computed in float64


def heads(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """[B, H, rows, D] in memory [B, rows, H, D], as a projection leaves it."""
    images, count, rows, width = shape
    return torch.randn(images, rows, count, width, device=like.device, dtype=like.dtype).transpose(1, 2)


def attention(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    images, count, queries, keys, width = shape
    like = torch.empty(0, dtype=dtype, device=device)
    q, k, v = (heads((images, count, rows, width), like) for rows in (queries, keys, keys))
    rows = torch.linspace(0, queries - 1, min(queries, CHECKED), device=device).long()

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q[:, :, rows] @ k.transpose(-1, -2) * width**-0.5, dim=-1) @ v

    yield Case(
        "attention",
        "x".join(map(str, shape)),
        formula,
        (q, k, v),
        ours=lambda: ops.attention(q, k, v),
        exact=exact,
        view=lambda t: t[:, :, rows],
        peers=peers(q, k, v),
        bytes=size(q, k, v, q),
        flops=4 * images * count * queries * keys * width,
    )


def peers(q: Tensor, k: Tensor, v: Tensor) -> Mapping[str, Call]:
    def backend(which: SDPBackend) -> Call:
        def call() -> Tensor:
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    def xformers() -> Tensor:
        from xformers.ops import memory_efficient_attention

        out: Tensor = memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.transpose(1, 2)

    def flash_attn() -> Tensor:
        from flash_attn import flash_attn_func

        out: Tensor = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)))
        return out.transpose(1, 2)

    found = {
        "sdpa flash": backend(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": backend(SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": backend(SDPBackend.EFFICIENT_ATTENTION),
    }
    if find_spec("xformers") is not None:
        found["xformers"] = xformers
    if find_spec("flash_attn") is not None:
        found["flash-attn"] = flash_attn
    return found


def attention_gradients(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Forward and backward: what is kept between the two is the implementation's own affair.

    Five products of the backward pass, one of them the scores again, to two of the forward.
    """
    for case in attention(shape, dtype, device):
        q, k, v = case.operands
        grad = heads(tuple(q.shape), q)

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            asked = wanted()
            if asked is not None and not _has_gradients(asked, q, v, None):
                raise BackendUnavailable(
                    f"no kernel of the gradients takes heads of {q.shape[3]} in {q.dtype}"
                )
            return ops.attention(q, k, v)

        yield replace(
            case,
            op="attention_gradients",
            registered="attention",
            ours=ours,
            grads=(grad,),
            exact=lambda q, k, v, grad=grad: exact_gradients(q, k, v, grad.double()),
            view=lambda gradients: gradients,
            bytes=case.bytes + size(grad, q, k, v, grad) + size(q, k, v),
            flops=case.flops * 7 // 2,
        )


def exact_gradients(*operands: Tensor) -> tuple[Tensor, ...]:
    """Of q, k and v, in the dtype given; a head at a time, for all weights at once might not fit."""
    found = tuple(torch.empty_like(t) for t in operands[:3])
    for image in range(operands[0].shape[0]):
        for head in range(operands[0].shape[1]):
            q, k, v, grad = (t[image, head] for t in operands)
            weights = torch.softmax(q @ k.t() * q.shape[1] ** -0.5, dim=-1)
            of_weights = grad @ v.t()
            of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
            of_scores *= q.shape[1] ** -0.5
            for target, of_one in zip(
                found, (of_scores @ k, of_scores.t() @ q, weights.t() @ grad), strict=True
            ):
                target[image, head] = of_one
    return found


def attention_wgmma(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The kernel for sm_90 and 16 bits, which answers by its name alone."""
    if dtype is not torch.float32:
        for case in attention(shape, dtype, device):
            yield replace(case, op="attention_wgmma", registered="attention", kernels=("wgmma",))
