"""Scaled dot-product attention: softmax(scale * q kᵀ + mask) v (Vaswani et al. 2017, equation 1)."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores.ops.descriptors import DESCRIBED, refused
from difusores.ops.dispatch import (
    LIBRARY,
    _refusal,
    below_autograd,
    choose,
    needs_grad,
    register,
    register_triton,
    wanted,
)

_SIGNATURE = "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor"
LIBRARY.define("attention" + _SIGNATURE)
_OP = torch.ops.difusores.attention.default
for _suffix in ("", "_triton"):
    LIBRARY.define(
        f"attention_with_sums{_suffix}(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale"
        f"{DESCRIBED if _suffix else ''}) -> (Tensor, Tensor)"
    )
LIBRARY.define(
    "attention_gradients(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor sums,"
    " float scale) -> (Tensor, Tensor, Tensor)"
)
_WITH_SUMS = {
    "cuda": torch.ops.difusores.attention_with_sums.default,
    "triton": torch.ops.difusores.attention_with_sums_triton.default,
    "triton_tma": torch.ops.difusores.attention_with_sums_triton.default,
}
_GRADIENTS = torch.ops.difusores.attention_gradients.default
_GRADIENTS_TRITON = register_triton(
    "attention_gradients",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor sums, float scale"
    f"{DESCRIBED}) -> (Tensor, Tensor, Tensor)",
)
LIBRARY.define("attention_wgmma(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
_WGMMA_OP = torch.ops.difusores.attention_wgmma.default
_TRITON_OP = register_triton("attention", _SIGNATURE.replace(")", f"{DESCRIBED})", 1))
register("attention", "cuda", "torch", "triton", "triton_tma", "wgmma", "cpu")

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKWARD_WEIGHTS = 1 << 20  # weights that the backward pass holds at a time


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide), k.to(wide).transpose(-1, -2)) * scale
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.to(wide)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = _scores(q, k, mask, scale)
    nothing = (scores == -math.inf).all(dim=-1, keepdim=True)  # filled twice: once for the gradient's sake
    return torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)


def _heads_inside(out: Tensor) -> Tensor:
    """The same [B, H, L, Dv], in memory [B, L, H, Dv]: joining the heads then copies nothing."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The op in plain PyTorch: scores and softmax in fp32 or wider."""
    p = _weights(q, k, mask, scale)
    return _heads_inside(torch.matmul(p, v.to(p.dtype)).to(q.dtype))


LIBRARY.impl("attention", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("difusores::attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    b, h, length, _ = q.shape
    return q.new_empty((b, length, h, v.shape[-1])).transpose(1, 2)


@torch.library.register_fake("difusores::attention_triton", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, described: bool = False
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


@torch.library.register_fake("difusores::attention_wgmma", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_wgmma(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def _padded(length: int) -> int:
    return -(-length // 64) * 64


def reference_with_sums(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The op, and what its gradients need: log2 of each query's sum of exp(score).

    Returns:
        [B, H, L, Dv] as `attention`; [B, H, L rounded up to 64] fp32, beyond L unspecified.
    """
    sums = torch.logsumexp(_scores(q, k, mask, scale), dim=-1) / math.log(2.0)
    padded = F.pad(sums.float(), (0, _padded(q.shape[2]) - q.shape[2]))
    return reference(q, k, v, mask, scale), padded


def reference_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v (Dao et al. 2022, algorithm 4), by formula."""
    context = SimpleNamespace(
        saved_tensors=(q, k, v, mask), scale=scale, needs_input_grad=(True,) * 3 + (False,)
    )
    of_q, of_k, of_v, *_ = _backward(context, grad)
    assert of_q is not None and of_k is not None and of_v is not None
    return _heads_inside(of_q), _heads_inside(of_k), _heads_inside(of_v)


def _triton_with_sums(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, described: bool = False
) -> tuple[Tensor, Tensor]:
    from difusores.ops.triton.attention import launch_with_sums

    return launch_with_sums(q, k, v, mask, scale, described)


LIBRARY.impl("attention_with_sums", reference_with_sums, "CompositeExplicitAutograd")
LIBRARY.impl("attention_with_sums_triton", _triton_with_sums, "CompositeExplicitAutograd")
LIBRARY.impl("attention_gradients", reference_gradients, "CompositeExplicitAutograd")


def _fake_with_sums(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, described: bool = False
) -> tuple[Tensor, Tensor]:
    sums = q.new_empty((*q.shape[:2], _padded(q.shape[2])), dtype=torch.float32)
    return _fake(q, k, v, None, scale), sums


def _fake_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2) for t in (q, k, v)
    )


def _setup_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.scale, *ctx.described = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.mark_non_differentiable(output[1])


def _backward_with_sums(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if not _in_steps_of_16_bytes(grad):
        grad = _heads_inside(grad)
    return (*_GRADIENTS(grad, *ctx.saved_tensors, ctx.scale), None, None)


def _backward_with_sums_triton(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_GRADIENTS_TRITON(grad, *ctx.saved_tensors, ctx.scale, *ctx.described), None, None, None)


for _suffix, _rule in (("", _backward_with_sums), ("_triton", _backward_with_sums_triton)):
    for _name, _meta in (("with_sums", _fake_with_sums), ("gradients", _fake_gradients)):
        torch.library.register_fake(f"difusores::attention_{_name}{_suffix}", _meta, lib=LIBRARY)
    torch.library.register_autograd(
        f"difusores::attention_with_sums{_suffix}", _rule, setup_context=_setup_sums, lib=LIBRARY
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ctx.scale, *_ = inputs
    ctx.save_for_backward(q, k, v, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The weights again, for some queries at a time, so that never all of them are there at once."""
    q, k, v, mask = ctx.saved_tensors
    wide = torch.promote_types(q.dtype, torch.float32)
    wide_k, wide_v = k.to(wide), v.to(wide)
    grad_k, grad_v = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    parts_of_q, parts_of_mask = [], []
    mask_has_rows = mask is not None and mask.ndim >= 2 and mask.shape[-2] > 1
    step = max(1, BACKWARD_WEIGHTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        wide_q, wide_grad = q[:, :, rows].to(wide), grad[:, :, rows].to(wide)
        part = mask[..., rows, :] if mask_has_rows else mask
        p = _weights(wide_q, wide_k, part, ctx.scale)
        grad_v = grad_v + torch.matmul(p.transpose(-1, -2), wide_grad)
        grad_p = torch.matmul(wide_grad, wide_v.transpose(-1, -2))
        grad_scores = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))
        parts_of_q.append(torch.matmul(grad_scores, wide_k) * ctx.scale)
        grad_k = grad_k + torch.matmul(grad_scores.transpose(-1, -2), wide_q) * ctx.scale
        if mask is not None and ctx.needs_input_grad[3]:
            parts_of_mask.append(grad_scores.sum_to_size(part.shape))
    grad_q = torch.cat(parts_of_q, dim=2).to(q.dtype) if parts_of_q else torch.zeros_like(q)
    grad_mask = None
    if parts_of_mask:
        whole = torch.cat(parts_of_mask, dim=-2) if mask_has_rows else torch.stack(parts_of_mask).sum(0)
        grad_mask = whole.to(mask.dtype)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_mask, None


def _backward_triton(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(ctx, grad), None)


for _name, _formula in (("attention", _backward), ("attention_triton", _backward_triton)):
    torch.library.register_autograd(
        f"difusores::{_name}", _formula, setup_context=_setup_context, lib=LIBRARY
    )


def _broadcasts(mask: Tensor, shape: tuple[int, ...]) -> bool:
    return mask.ndim <= 4 and all(
        size in (1, full) for size, full in zip(reversed(mask.shape), reversed(shape), strict=False)
    )


# Heads that the kernels of the gradients take; bytes of shared memory for a block of CUDA's above 96.
_WIDEST_GRADIENT, _WIDEST_FP32_GRADIENT = 160, 80
_GRADIENT_BYTES = {128: 70656, 160: 87040}
_WIDEST = 512  # head that fits the registers of a kernel
# That a block of the CUDA kernels needs for heads above 160, in 16 bits and in fp32.
_SHARED_BYTES = {2: {256: 111616, 512: 209920}, 4: {256: 51200, 512: 83200}}


@functools.cache
def _properties(device: torch.device) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(device)
    return found.major, found.shared_memory_per_block_optin  # type: ignore[attr-defined]


def _device(device: torch.device) -> tuple[int, int]:
    """A GPU's generation (8: sm_80 to sm_89), and the bytes of shared memory that a block may have."""
    return _properties(device)


_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _in_steps_of_16_bytes(t: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, their elements side by side."""
    count = 16 // t.element_size()
    batch, head, row, element = t.stride()
    if element != 1:
        return False
    if (batch | head | row) % count and any(
        step % count for step, size in zip((batch, head, row), t.shape, strict=False) if size > 1
    ):
        return False
    return torch.compiler.is_compiling() or t.storage_offset() % count == 0  # Dynamo cannot trace the offset


def supports(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """None if `backend` takes this call, else the reason in words."""
    if backend == "torch":
        return None
    if q.dtype not in KERNEL_DTYPES:
        return f"the kernel takes float32, bfloat16 and float16, not {q.dtype}"
    depth, width = q.shape[3], v.shape[3]
    if backend != "cpu" and (depth > _WIDEST or width > _WIDEST):
        return f"the kernel takes heads of at most {_WIDEST} elements, not {max(depth, width)}"
    if depth == 0:
        return "the kernel needs D of at least 1"
    if backend in ("triton", "triton_tma"):
        if backend == "triton_tma" and width * v.element_size() % 16:
            return f"tensor descriptors need rows of v of a multiple of 16 bytes, not {width} elements"
        return None if backend == "triton" else refused(q=q, k=k, v=v)
    if mask is not None and mask.dtype not in (torch.bool, *KERNEL_DTYPES):
        return f"the kernel takes a mask of bool, float32, bfloat16 or float16, not {mask.dtype}"
    if backend == "wgmma" and (reason := _refused_by_wgmma(q, k, v, mask)) is not None:
        return reason
    return _refused_by_cuda(q, k, v, depth, width) if backend in ("cuda", "wgmma") else None


def _refused_by_cuda(q: Tensor, k: Tensor, v: Tensor, depth: int, width: int) -> str | None:
    size = q.element_size()
    if depth % (16 // size) or width % (16 // size):
        found = depth if depth % (16 // size) else width
        return f"the kernel takes heads of a multiple of {16 // size} elements, not {found}"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not _in_steps_of_16_bytes(t):
            return (
                "the kernel takes rows at multiples of 16 bytes with their elements side by side, not "
                f"{name} with strides {t.stride()}"
            )
    widest = max(depth, width)
    if q.dtype is not torch.bfloat16 and widest <= 160:
        return None
    generation, shared_bytes = _device(q.device)
    if q.dtype is torch.bfloat16 and generation < 8:
        return "the kernel takes bfloat16 only from sm_80 on: older GPUs have no products of it"
    needed = 0 if widest <= 160 else _SHARED_BYTES[size][256 if widest <= 256 else 512]
    if needed > shared_bytes:
        return f"heads of {widest} elements need {needed} bytes of shared memory, this GPU has {shared_bytes}"
    return None


_WGMMA_HEADS = (64, 80, 96, 128, 160)


def _refused_by_wgmma(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Beyond what the other CUDA kernel refuses."""
    if q.dtype is torch.float32:
        return "the kernel takes float16 and bfloat16, not torch.float32"
    if mask is not None or needs_grad(q, k, v):
        return "the kernel takes no mask" if mask is not None else "the kernel has no gradients"
    if q.shape[3] not in _WGMMA_HEADS or v.shape[3] != q.shape[3]:
        sizes = f"{q.shape[3]} and {v.shape[3]}"
        return f"the kernel takes heads of 64, 80, 96, 128 and 160 elements, of q, k and v alike, not {sizes}"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if any(step == 0 and size > 1 for step, size in zip(t.stride(), t.shape, strict=True)):
            return f"the kernel takes tensors that are expanded in no dimension, not {name}"
    generation = _device(q.device)[0]
    if generation != 9:
        return (
            f"the kernel needs a GPU of sm_90, which alone has its instructions; this is of sm_{generation}x"
        )
    return None


FEW_KEYS = 128


def _torch_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether PyTorch's fused attention beats our CUDA kernel, as an H200 said (docs/kernels/attention.md).

    On sm_90 and newer that is cuDNN's, with products that older GPUs do not have: ours wins where keys are
    few. Against the flash attention of older GPUs it wins where a head fills no power of two. No GPU has
    timed fp32.
    """
    width = q.shape[3]
    fits = q.dtype is not torch.float32 and (width <= 40 or 128 < width <= 160)
    return not fits or (_device(q.device)[0] >= 9 and k.shape[2] > FEW_KEYS)


TRITON_FLOPS = 1 << 33  # of a call that keeps a GPU before sm_90 busy for longer than its launch the host


def _triton_is_faster(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether Triton's kernel answers where our CUDA kernel is absent or refuses.

    By the rule for that one, but before sm_90 alone, since from then on cuDNN is faster at most shapes, and
    for large calls alone, because a launch through Triton takes the host 60 to 100 us more (docs/gpu.md).
    """
    return (
        4 * q.numel() * k.shape[2] >= TRITON_FLOPS
        and _refusal("triton", q.device.type) is None
        and supports("triton", q, k, v, mask) is None
        and _device(q.device)[0] < 9
        and not _torch_is_faster(q, k)
    )


def _has_gradients(backend: str, q: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether `backend` has kernels of the gradients for this call."""
    widest = max(q.shape[3], v.shape[3])
    if widest > _WIDEST_GRADIENT or (mask is not None and mask.requires_grad):
        return False
    if backend in ("triton", "triton_tma"):
        return q.dtype is not torch.float32 or widest <= _WIDEST_FP32_GRADIENT
    if backend != "cuda" or q.dtype is torch.float32:
        return backend == "cuda"
    return widest <= 96 or _device(q.device)[1] >= _GRADIENT_BYTES[128 if widest <= 128 else 160]


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale * q kᵀ + mask) v, per batch and head.

    Args:
        q: [B, H, L, D], any strides; fp32, bf16, fp16, fp64.
        k: [B, H, S, D], v: [B, H, S, Dv], any strides, same dtype as q.
        mask: broadcastable to [B, H, L, S]; bool (True takes part) or floating point (added to the scores).
        scale: factor on the scores; 1 / sqrt(D) if None.

    Returns:
        [B, H, L, Dv] in q's dtype; from our kernels in memory [B, L, H, Dv], so that joining the heads
        copies nothing. Zeros for a query without keys, or whose keys are all masked. Differentiable: through
        PyTorch's own attention unless a backend was asked for by name. The kernels' backward pass computes
        the weights again, for some queries at a time; CUDA's and Triton's, for heads up to 160 (Triton's in
        fp32: 80) and a mask that needs no gradient itself, in kernels of their own with the same bits twice.

    Raises:
        ValueError: shapes or dtypes that do not fit, named.
        BackendUnavailable: a backend was asked for by name and does not take this call.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v must be [B, H, L, D], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q [B, H, L, D], k [B, H, S, D], v [B, H, S, Dv] do not fit: got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.dtype is not q.dtype or v.dtype is not q.dtype:
        raise ValueError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if mask is not None and not (mask.dtype is torch.bool or mask.is_floating_point()):
        raise ValueError(f"mask must be bool or floating point, got {mask.dtype}")
    if mask is not None and not _broadcasts(mask, (*q.shape[:3], k.shape[2])):
        raise ValueError(
            f"mask must broadcast to [B, H, L, S] = {(*q.shape[:3], k.shape[2])}, got {tuple(mask.shape)}"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    backend = choose("attention", q.device.type, supports, q, k, v, mask)
    recorded = needs_grad(q, k, v, mask)
    if backend in ("cpu", "cuda") and wanted() is None:
        # Whose backward pass is fused: several times as fast as the formula above.
        if recorded or (backend == "cuda" and _torch_is_faster(q, k)):
            backend = "torch"
    elif backend == "torch" and wanted() is None and not recorded and _triton_is_faster(q, k, v, mask):
        backend = "triton"
    elif recorded and _has_gradients(backend, q, v, mask):
        more = (True,) if backend == "triton_tma" else ()
        result: Tensor = _WITH_SUMS[backend](q, k, v, mask, scale, *more)[0]
        return result
    if backend == "wgmma":
        return below_autograd(_WGMMA_OP, q, k, v, scale)  # type: ignore[no-any-return]
    if backend in ("cpu", "triton", "triton_tma", "cuda"):
        op = _OP if backend in ("cpu", "cuda") else _TRITON_OP
        call = (q, k, v, mask, scale, *((True,) if backend == "triton_tma" else ()))
        out: Tensor = op(*call) if recorded else below_autograd(op, *call)
        return out
    if backend == "torch":
        additive = mask if mask is None else torch.atleast_2d(mask)
        if additive is not None and additive.dtype is not torch.bool:
            additive = additive.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=additive, scale=scale)
    return reference(q, k, v, mask, scale)
