"""One stage of any sampler in one launch; formula and row layout: ops/scheduler_step.py.

Bytes: every operand that the row reads once, every output once; what a 0 switches off is not loaded.
Layout: [B, inner], each image one run of memory, any batch stride of the inputs. Arithmetic is fp32.

The kernel reads the row from device memory, by a counter there where `step` is given: nothing comes back to
the host, and a whole loop can be one graph. A kernel cannot raise: what a row in device memory reads and was
not given is NaN, and so is everything where the counter is not the number of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from difusores.ops.scheduler_step import CIN, DRAW, G1, HI, LO, MODE, NU0, NU1, PE, PX, ROW, R, W
from difusores.ops.triton import run

BLOCK = 1024  # elements in a program of 4 warps: 16 bytes a thread in 16 bits

_G1, _R, _PX, _PE, _LO, _HI = (tl.constexpr(k) for k in (G1, R, PX, PE, LO, HI))
_NU0, _NU1, _MODE, _CIN, _W, _DRAW, _ROW = (tl.constexpr(k) for k in (NU0, NU1, MODE, CIN, W, DRAW, ROW))


@triton.jit
def _log(x):
    """Of normal x > 0, to 1 ulp; `tl.log` is too coarse near 1, where the radius of Box-Muller is small."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126
    m = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    low = m < 0.7071067811865476
    exponent = tl.where(low, exponent - 1, exponent).to(tl.float32)
    m = tl.where(low, m + m, m) - 1.0
    z = m * m
    p = m * 7.0376836292e-2 - 1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m - 1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m - 1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m - 2.4999993993e-1
    p = p * m + 3.3333331174e-1
    y = p * z * m + exponent * -2.12194440e-4 - 0.5 * z
    return m + y + exponent * 0.693359375


@triton.jit
def _box_muller(a, b):
    """Two normals from two integers of 32 bits: sqrt(-2 ln u) (cos, sin)(2 pi t)."""
    u = ((a >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    t = (b >> 8).to(tl.float32) * 5.960464477539063e-08  # 2^-24
    radius = tl.sqrt_rn(-2.0 * _log(u))
    quarters = t * 4.0 + 12582912.0  # the low bits now count the nearest quarter turn
    q = quarters.to(tl.int32, bitcast=True)
    angle = (t - (quarters - 12582912.0) * 0.25) * 6.283185307179586
    z = angle * angle
    s = ((z * -1.9515295891e-4 + 8.3321608736e-3) * z - 1.6666654611e-1) * z * angle + angle
    c = ((z * 2.443315711809948e-5 - 1.388731625493765e-3) * z + 4.166664568298827e-2) * (z * z)
    c = c - 0.5 * z + 1.0
    odd = (q & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((q + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((q & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def _normals(seed, draw, counter, BLOCK: tl.constexpr):
    """Normals of BLOCK elements from `counter` on: Philox4x32-10, four to a counter."""
    index = counter + tl.arange(0, BLOCK // 4)
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, c, d = tl.philox(seed, low, high, zero + draw.to(tl.uint32), zero)
    n0, n1 = _box_muller(a, b)
    n2, n3 = _box_muller(c, d)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])


@triton.jit
def _coefficient(row, k, poison):
    return tl.load(row + k).to(tl.float32) + poison


@triton.jit
def _rest(row, k):
    """What rounding to float32 leaves of a coefficient."""
    exact = tl.load(row + k)
    return (exact - exact.to(tl.float32).to(tl.float64)).to(tl.float32)


@triton.jit
def _operand(p, start, offset, inside, used):
    """As float32; not loaded where the row does not use it, NaN where it does and it was not given."""
    if p is None:
        return tl.where(used, float("nan"), 0.0)
    else:
        return tl.load(p + start + offset, inside & used, other=0.0).to(tl.float32)


@triton.jit
def _term(total, c, t):
    """total + c t, where an exact 0 means that t does not count, whatever it holds."""
    return total + tl.where(c != 0.0, c * t, 0.0)


@triton.jit
def _used(row, column, poison, y, d, u, m):
    """Whether an output that was asked for reads this operand."""
    used = False
    if y is not None or m is not None:
        used |= _coefficient(row, _W + column, poison) != 0.0
    if d is not None:
        used |= _coefficient(row, _W + 9 + column, poison) != 0.0
    if u is not None:
        used |= _coefficient(row, _W + 18 + column, poison) != 0.0
    return used


@triton.jit
def _begins_from_slot(row):
    """Whether a slot's weight in y is 1."""
    found = _coefficient(row, _W + 4, 0.0) == 1.0
    for column in tl.static_range(5, 9):
        found |= _coefficient(row, _W + column, 0.0) == 1.0
    return found


@triton.jit
def _column(row, column, poison, t, y, d, u):
    y = _term(y, _coefficient(row, _W + column, poison), t)
    d = _term(d, _coefficient(row, _W + 9 + column, poison), t)
    u = _term(u, _coefficient(row, _W + 18 + column, poison), t)
    return y, d, u


@triton.jit
def _store(p, start, offset, value, inside):
    if p is not None:
        tl.store(p + start + offset, value.to(p.dtype.element_ty), inside)


@triton.jit
def scheduler_step(
    row,
    step,
    x,
    e1,
    e2,
    e3,
    noise,
    variance,
    threshold,
    factor,
    s0,
    s1,
    s2,
    s3,
    s4,
    seeds,
    y,
    d,
    u,
    x0,
    m,
    rows,
    batch,
    inner,
    repeats,
    x_stride,
    e1_stride,
    e2_stride,
    e3_stride,
    noise_stride,
    variance_stride,
    s0_stride,
    s1_stride,
    s2_stride,
    s3_stride,
    s4_stride,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(inner, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    poison = 0.0
    if step is not None:
        index = tl.load(step)
        valid = (index >= 0) & (index < rows)
        row += tl.where(valid, index, 0) * _ROW
        poison = tl.where(valid, 0.0, float("nan"))

    px, pe = _coefficient(row, _PX, poison), _coefficient(row, _PE, poison)
    churn, mode = _coefficient(row, _R, poison), _coefficient(row, _MODE, poison)
    needs_x0 = _used(row, 0, poison, y, d, u, m)
    if x0 is not None:
        needs_x0 |= True
    needs_xh = _used(row, 1, poison, y, d, u, m) | (needs_x0 & (px != 0.0))
    needs_e = _used(row, 2, poison, y, d, u, m) | (needs_x0 & (pe != 0.0))
    scales_z = _used(row, 3, poison, y, d, u, m)
    needs_z = scales_z | (needs_xh & (churn != 0.0))

    e = tl.zeros([BLOCK], tl.float32)
    g = _coefficient(row, _G1, poison)
    e = _term(e, g, _operand(e1, image * e1_stride, at, inside, needs_e & (g != 0.0)))
    if e2 is not None:
        g = _coefficient(row, _G1 + 1, poison)
        e = _term(e, g, _operand(e2, image * e2_stride, at, inside, needs_e & (g != 0.0)))
    if e3 is not None:
        g = _coefficient(row, _G1 + 2, poison)
        e = _term(e, g, _operand(e3, image * e3_stride, at, inside, needs_e & (g != 0.0)))

    if factor is not None:
        e *= tl.load(factor + image)

    z = tl.zeros([BLOCK], tl.float32)
    if seeds is None:
        z += _operand(noise, image * noise_stride, at, inside, needs_z)
    elif needs_z:
        draw = tl.load(row + _DRAW).to(tl.int64)
        z = _normals(tl.load(seeds + image), draw, block.to(tl.int64) * (BLOCK // 4), BLOCK)

    xh = _term(_operand(x, image * x_stride, at, inside, needs_xh), churn, z)
    p = _term(_term(tl.zeros([BLOCK], tl.float32), _rest(row, _PX), xh), _rest(row, _PE), e)
    p = _term(_term(p, px, xh), pe, e)
    if threshold is not None:
        s = tl.load(threshold + image)
        p = tl.clamp(p, -s, s, propagate_nan=tl.PropagateNan.ALL) / s
    else:
        low, high = _coefficient(row, _LO, poison), _coefficient(row, _HI, poison)
        p = tl.clamp(p, low, high, propagate_nan=tl.PropagateNan.ALL)

    scaled = scales_z & (mode != 0.0)
    v = _operand(variance, image * variance_stride, at, inside, scaled)
    deviation = tl.exp(_coefficient(row, _NU0, poison) + _coefficient(row, _NU1, poison) * v)
    deviation = tl.where(mode == 1.0, deviation, tl.sqrt_rn(v))
    z = tl.where(scaled, z * deviation, z)

    ys = _term(tl.zeros([BLOCK], tl.float32), _rest(row, _W + 1), xh)
    ds = _term(tl.zeros([BLOCK], tl.float32), _rest(row, _W + 10), xh)
    us = _term(tl.zeros([BLOCK], tl.float32), _rest(row, _W + 19), xh)
    ys, ds, us = _column(row, 0, poison, p, ys, ds, us)
    ys, ds, us = _column(row, 3, poison, z, ys, ds, us)
    ys, ds, us = _column(row, 2, poison, e, ys, ds, us)
    begins_from_slot = _begins_from_slot(row)
    if begins_from_slot:
        ys, ds, us = _column(row, 1, poison, xh, ys, ds, us)
    slot = _operand(s0, image * s0_stride, at, inside, _used(row, 4, poison, y, d, u, m))
    ys, ds, us = _column(row, 4, poison, slot, ys, ds, us)
    slot = _operand(s1, image * s1_stride, at, inside, _used(row, 5, poison, y, d, u, m))
    ys, ds, us = _column(row, 5, poison, slot, ys, ds, us)
    slot = _operand(s2, image * s2_stride, at, inside, _used(row, 6, poison, y, d, u, m))
    ys, ds, us = _column(row, 6, poison, slot, ys, ds, us)
    slot = _operand(s3, image * s3_stride, at, inside, _used(row, 7, poison, y, d, u, m))
    ys, ds, us = _column(row, 7, poison, slot, ys, ds, us)
    slot = _operand(s4, image * s4_stride, at, inside, _used(row, 8, poison, y, d, u, m))
    ys, ds, us = _column(row, 8, poison, slot, ys, ds, us)
    if not begins_from_slot:
        ys, ds, us = _column(row, 1, poison, xh, ys, ds, us)

    start = image * inner
    _store(x0, start, at, p, inside)
    _store(d, start, at, ds, inside)
    _store(u, start, at, us, inside)
    _store(y, start, at, ys, inside)
    if m is not None:
        ys *= _coefficient(row, _CIN, poison)
        for _ in range(repeats):
            _store(m, start, at, ys, inside)
            start += batch * inner


def _missing(
    row: Tensor,
    noise: bool,
    variance: bool,
    slots: tuple[Tensor | None, ...],
    outputs: tuple[bool, bool, bool],
    x0: bool,
) -> str | None:
    """What this row of numbers reads and was not given, in the words of the other kernels."""
    c = row.tolist()
    reads = [any(w and c[W + 9 * k + j] != 0.0 for k, w in enumerate(outputs)) for j in range(9)]
    xh = reads[1] or ((x0 or reads[0]) and c[PX] != 0.0)
    if not noise and (reads[3] or (xh and c[R] != 0.0)):
        return "this row reads noise, which was not given"
    if reads[3] and c[MODE] != 0.0 and not variance:
        return "this row's mode reads variance, which was not given"
    for k, slot in enumerate(slots):
        if reads[4 + k] and slot is None:
            return f"this row's W reads s{k}, which was not given"
    return None


def launch(
    row: Tensor,
    step: Tensor | None,
    sample: Tensor,
    e1: Tensor,
    e2: Tensor | None,
    e3: Tensor | None,
    noise: Tensor | None,
    variance: Tensor | None,
    threshold: Tensor | None,
    factor: Tensor | None,
    s0: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    s3: Tensor | None,
    s4: Tensor | None,
    seeds: Tensor | None,
    y: Tensor | None,
    d: Tensor | None,
    u: Tensor | None,
    x0: Tensor | None,
    m: Tensor | None,
) -> None:
    slots = (s0, s1, s2, s3, s4)
    if row.is_cpu and step is None:
        outputs = (y is not None or m is not None, d is not None, u is not None)
        given = noise is not None or seeds is not None
        missing = _missing(row, given, variance is not None, slots, outputs, x0 is not None)
        if missing is not None:
            raise RuntimeError(f"scheduler_step: {missing}")
    if row.device != sample.device:
        # 320 bytes or a table, which the driver copies before it returns: nothing waits for the device.
        row = row.to(sample.device, non_blocking=True)
        step = None if step is None else step.to(sample.device, non_blocking=True)
    batch, inner = sample.shape[0], sample.shape[1:].numel()
    operands = (sample, e1, e2, e3, noise, variance, *slots)
    run(
        scheduler_step,
        batch * -(-inner // BLOCK),
        sample,
        *(row.contiguous(), step, sample, e1, e2, e3, noise, variance, threshold, factor, *slots, seeds),
        *(y, d, u, x0, m),
        *(row.shape[0], batch, inner, 1 if m is None else m.shape[0] // max(batch, 1)),
        *(0 if t is None else t.stride(0) for t in operands),
        BLOCK=BLOCK,
        num_warps=4,
    )
