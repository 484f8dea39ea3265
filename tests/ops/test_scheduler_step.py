"""scheduler_step on every backend against one float64 oracle."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import difusores
from difusores import ops
from difusores.ops import dispatch
from difusores.ops.scheduler_step import (
    CIN,
    DRAW,
    HI,
    LO,
    MODE,
    NU0,
    NU1,
    OUTPUTS,
    PE,
    PX,
    ROW,
    R,
    W,
    philox_integers,
    philox_normal,
    shortcut,
)

OP = "scheduler_step"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL = dispatch.status("cpu") is None


def row(
    *,
    mode: int = 0,
    churn: float = 0.0,
    clip: float = math.inf,
    columns: str = "111111111",
    guidance: int = 1,
) -> Tensor:
    """A row with the given operands switched on; the coefficients are arbitrary, of the size that samplers
    use.
    """
    r = torch.zeros(ROW, dtype=torch.float64)
    r[:guidance] = torch.tensor([7.5, -6.5, 0.3][:guidance]) if guidance > 1 else 1.0
    r[R], r[PX], r[PE], r[LO], r[HI] = churn, 1.3, -0.8, -clip, clip
    r[NU0], r[NU1], r[MODE], r[CIN], r[DRAW] = -1.1, 0.4, mode, 0.7, 5
    weights = torch.linspace(-0.9, 1.1, 27, dtype=torch.float64).reshape(3, 9)
    r[W : W + 27] = (weights * torch.tensor([float(c) for c in columns], dtype=torch.float64)).flatten()
    return r


CASES: dict[str, dict[str, Any]] = {
    "everything": {"mode": 1, "churn": 0.2, "clip": 1.0, "guidance": 3},
    "ddim": {"clip": 1.0, "columns": "101000000"},
    "ddpm": {"clip": 1.0, "columns": "110100000"},
    "learned": {"mode": 2, "columns": "010100000"},
    "guided": {"columns": "011000000", "guidance": 2},
    "history": {"columns": "010011111"},
    "churned": {"columns": "011000000", "churn": 0.4},
}


def operands(shape: tuple[int, ...], dtype: torch.dtype, guidance: int) -> dict[str, Any]:
    def image() -> Tensor:
        return torch.randn(shape).to(dtype)

    channels = torch.randn(shape[0], 2 * shape[1], *shape[2:]).to(dtype)  # epsilon and variance of one model
    return {
        "sample": image(),
        "model_outputs": [channels[:, : shape[1]], image(), image()][:guidance],
        "slots": [image() for _ in range(5)],
        "noise": image(),
        "variance": channels[:, shape[1] :].abs(),
    }


def cast(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def one(v: Any) -> Any:
        return v.to(dtype) if isinstance(v, Tensor) else [t.to(dtype) for t in v]

    return {k: one(v) for k, v in call.items()}


def step(backend: str, r: Tensor, call: dict[str, Any], **keywords: Any) -> tuple[Tensor, ...]:
    with ops.use_backend(backend):
        return ops.scheduler_step(
            r,
            call["sample"],
            call["model_outputs"],
            call["slots"],
            **{
                "noise": call["noise"],
                "variance": call["variance"],
                "outputs": OUTPUTS,
                **keywords,
            },
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 7, 5), (1, 4, 64, 64), (3, 2, 33), (2, 1), (1, 1, 1, 1, 3)], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(backend: str, case: str, shape: Any, dtype: torch.dtype, check: Any) -> None:
    r = row(**CASES[case])
    call = operands(shape, dtype, CASES[case].get("guidance", 1))
    got = step(backend, r, call, model_repeats=2)
    eager = step("reference", r, call, model_repeats=2)
    oracle = step("reference", r, cast(call, torch.float64), model_repeats=2)
    for name, ours, theirs, exact in zip(OUTPUTS, got, eager, oracle, strict=True):
        check(ours, theirs, exact)
        assert ours.shape == ((2 * shape[0], *shape[1:]) if name == "m" else shape)


def test_dynamic_threshold(backend: str, check: Any) -> None:
    r, call, s = row(), operands((3, 4, 9, 9), torch.float32, 1), torch.tensor([0.5, 1.0, 2.5])
    got = step(backend, r, call, threshold=s, outputs=("x0", "y"))
    eager = step("reference", r, call, threshold=s, outputs=("x0", "y"))
    oracle = step("reference", r, cast(call, torch.float64), threshold=s, outputs=("x0", "y"))
    for ours, theirs, exact in zip(got, eager, oracle, strict=True):
        check(ours, theirs, exact)
    assert got[0].abs().amax() == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["guided", "everything", "ddim"])
def test_factor(backend: str, case: str, dtype: torch.dtype, check: Any) -> None:
    """Of each image's guided output, and of nothing else; where it is 1, the bits are those of none."""
    guidance = CASES[case].get("guidance", 1)
    r, call = row(**CASES[case]), operands((3, 2, 33, 31), dtype, guidance)
    factor = torch.tensor([0.6, 1.0, 1.7])
    got = step(backend, r, call, factor=factor, model_repeats=2)
    eager = step("reference", r, call, factor=factor, model_repeats=2)
    exact = cast(call, torch.float64)
    scaled = [e * factor.double().view(3, 1, 1, 1) for e in exact["model_outputs"]]
    oracle = step("reference", r, {**exact, "model_outputs": scaled}, model_repeats=2)
    for ours, theirs, expected in zip(got, eager, oracle, strict=True):
        check(ours, theirs, expected)
        if dtype is torch.float32:
            torch.testing.assert_close(theirs.double(), expected, rtol=1e-5, atol=1e-4)
    without = step(backend, r, call, model_repeats=2)
    for ours, plain in zip(got, without, strict=True):
        assert torch.equal(ours[1], plain[1]) and not torch.equal(ours[0], plain[0])
    with ops.use_backend(backend):
        table, place = torch.stack([row(), r]), torch.tensor([1])
        by_counter = step(backend, table, call, factor=factor, step=place, model_repeats=2)
    assert all(map(torch.equal, got, by_counter))
    broken = step(backend, r, call, factor=torch.tensor([math.nan, 1.0, math.inf]), outputs=("d",))
    assert broken[0][0].isnan().all() and torch.equal(broken[0][1], without[1][1])


def test_mixed_dtypes_and_model_input(backend: str, check: Any) -> None:
    """An fp32 sample beside a bf16 model: read as it is, m written in the model's dtype, three times."""
    r, call = row(guidance=2), operands((2, 3, 16, 16), torch.float32, 2)
    call["model_outputs"] = [e.bfloat16() for e in call["model_outputs"]]
    outputs: dict[str, Any] = {"outputs": ("y", "m"), "model_dtype": torch.bfloat16, "model_repeats": 3}
    y, m = step(backend, r, call, **outputs)
    eager = step("reference", r, call, **outputs)
    oracle = step("reference", r, cast(call, torch.float64), outputs=("y", "m"), model_repeats=3)
    assert y.dtype is torch.float32 and m.dtype is torch.bfloat16 and m.shape == (6, 3, 16, 16)
    check(y, eager[0], oracle[0])
    check(m, eager[1], oracle[1])
    assert torch.equal(m[:2], m[2:4]) and torch.equal(m[:2], m[4:])


def test_large_terms_that_cancel(backend: str) -> None:
    """x0 at a high noise level: rounding p_x and p_e would cost 1.4 * 2**-24 of x in every element."""
    e, r = torch.randn(2, 3, 64, 64), row(columns="000000000")
    x = 157 * e + torch.randn(e.shape)
    r[PX], r[PE] = 1 + 2.0**-24.5, -157 + 2.0**-17.1
    with ops.use_backend(backend):
        (x0,) = ops.scheduler_step(r, x, [e], outputs=("x0",))
    exact = r[PX] * x.double() + r[PE] * e.double()
    assert ((x0 - exact).abs() / x.abs()).mean() < 2.0**-24


@pytest.mark.parametrize("base", ["sample", "slot"])
def test_one_rounding_of_the_size_of_the_sample(backend: str, base: str) -> None:
    """At a high noise level: what a step begins from is added last."""
    large, r = torch.randn(2, 3, 64, 64) * 1000, row(columns="010011111")
    x, *slots = torch.randn(6, *large.shape)
    if base == "sample":
        x, r[W + 1] = large, 1.0
    else:
        slots[4], r[W + 8] = large, 1.0
    with ops.use_backend(backend):
        (y,) = ops.scheduler_step(r, x, [x], slots)
    exact = r[W + 1] * x.double() + sum(r[W + 4 + k] * s.double() for k, s in enumerate(slots))
    larger = torch.maximum(large.abs(), y.abs())
    ulps = (y - exact).abs() / (torch.nextafter(larger, torch.tensor(math.inf)) - larger)
    assert (ulps[large.abs() > 100] < 0.6).all()


def test_a_table_and_a_counter(backend: str) -> None:
    table = torch.stack([row(clip=c) for c in (0.5, 1.0, 2.0)])
    call = operands((2, 3, 8, 8), torch.float32, 1)
    for k in range(3):
        with ops.use_backend(backend):
            a = ops.scheduler_step(
                table,
                call["sample"],
                call["model_outputs"],
                call["slots"],
                noise=call["noise"],
                outputs=("y", "x0"),
                step=torch.tensor([k]),
            )
        b = step(backend, table[k].clone(), call, outputs=("y", "x0"))
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_layouts(backend: str) -> None:
    """channels_last in, channels_last out, the same numbers; a mixed layout follows the sample's."""
    r, call = row(columns="111000000"), operands((2, 3, 8, 6), torch.float32, 1)
    want = step(backend, r, call, outputs=("y", "m"), model_repeats=2)
    last = {**call, "sample": call["sample"].to(memory_format=torch.channels_last)}
    for outputs in (
        [e.to(memory_format=torch.channels_last) for e in call["model_outputs"]],
        call["model_outputs"],
    ):
        got = step(backend, r, {**last, "model_outputs": outputs}, outputs=("y", "m"), model_repeats=2)
        for a, b in zip(got, want, strict=True):
            assert a.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(a, b)
    sliced = {**call, "sample": torch.cat([call["sample"]] * 2, dim=3)[..., ::2]}
    assert step(backend, r, sliced, outputs=("y",))[0].is_contiguous()
    rows = torch.zeros(2, 3, 8, 12)[..., ::2]  # images with gaps, in and out
    gaps = {**call, "sample": rows.copy_(call["sample"])}
    for out in (torch.zeros(2, 3, 8, 12)[..., ::2], torch.zeros(4, 3, 8, 6)[::2], torch.zeros(2, 3, 6, 8).mT):
        (y,) = step(backend, r, gaps, outputs=("y",), out=[out])
        assert y is out
        torch.testing.assert_close(y, want[0])
    overlapping = torch.randn(9).as_strided((2, 3, 3), (0, 2, 2))  # as long as a dense image, but not one
    fresh = {**operands((2, 3, 3), torch.float32, 1), "sample": overlapping}
    (y,) = step(backend, r, fresh, outputs=("y",))
    copied = {**fresh, "sample": overlapping.contiguous()}
    torch.testing.assert_close(y, step("reference", r, copied, outputs=("y",))[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise(dtype: torch.dtype) -> None:
    r, call = row(mode=1, churn=0.2, clip=1.0, guidance=3), operands((4, 3, 67, 61), dtype, 3)
    threads = torch.get_num_threads()

    def run(c: dict[str, Any]) -> tuple[Tensor, ...]:
        return ops.scheduler_step(
            r,
            c["sample"],
            c["model_outputs"],
            c["slots"],
            noise=c["noise"],
            variance=c["variance"],
            outputs=OUTPUTS,
        )

    try:
        torch.set_num_threads(1)
        one = run(call)
        torch.set_num_threads(3)
        several, again = run(call), run(call)
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(one, several, again, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
    for k in range(4):
        alone = {
            n: v[k : k + 1] if isinstance(v, Tensor) else [t[k : k + 1] for t in v] for n, v in call.items()
        }
        assert all(torch.equal(a, b[k : k + 1]) for a, b in zip(run(alone), one, strict=True))


def test_zero_means_not_read(backend: str) -> None:
    """What the row does not read may be absent or NaN; what it reads must be there."""
    r, call = row(columns="101000000"), operands((2, 3, 8, 8), torch.float32, 1)
    want = step(backend, r, call, outputs=("y",))[0]
    poisoned = {**call, "slots": [torch.full_like(call["sample"], math.nan)] * 5}
    poisoned["noise"] = poisoned["variance"] = poisoned["slots"][0]
    assert torch.equal(step(backend, r, poisoned, outputs=("y",))[0], want)
    with ops.use_backend(backend):
        assert torch.equal(ops.scheduler_step(r, call["sample"], call["model_outputs"])[0], want)
        for columns, missing in (("000100000", "noise"), ("000010000", "s0"), ("000000001", "s4")):
            on_the_host = row(columns=columns).cpu()  # what lies on a device is not read back to be checked
            with pytest.raises((ValueError, RuntimeError), match=f"reads {missing}, which was not given"):
                ops.scheduler_step(on_the_host, call["sample"], call["model_outputs"])
        with pytest.raises((ValueError, RuntimeError), match="reads variance, which was not given"):
            on_the_host = row(columns="000100000", mode=2).cpu()
            ops.scheduler_step(on_the_host, call["sample"], call["model_outputs"], noise=call["noise"])


def test_churn_of_a_sample_that_is_not_read(backend: str) -> None:
    """The reference, which computes every output, wants the noise; a kernel does without it."""
    x = torch.randn(2, 3, 8, 8)
    r = row(columns="100000000", churn=0.5)
    r[PX], r[PE] = 0.0, 1.0
    with ops.use_backend(backend):
        if backend == "reference":
            with pytest.raises(ValueError, match="r reads noise, which was not given"):
                ops.scheduler_step(r, x, [x])
        else:
            torch.testing.assert_close(ops.scheduler_step(r, x, [x])[0], r[W].item() * x)


def test_function_transforms() -> None:
    """torch.func and forward-mode derivatives see through the op, as through eager PyTorch."""
    r, x, e = row(columns="101000000"), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)

    def f(sample: Tensor) -> Tensor:
        return ops.scheduler_step(r, sample, [e])[0]

    want = f(x + e) - f(x)  # the row is linear
    torch.testing.assert_close(torch.func.jvp(f, (x,), (e,))[1], want)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, e))).tangent
    torch.testing.assert_close(tangent, want)
    assert torch.func.grad(lambda sample: f(sample).sum())(x).abs().sum() > 0
    torch.testing.assert_close(torch.vmap(f)(torch.stack([x, e])), torch.stack([f(x), f(e)]))
    with ops.use_backend("reference"):
        torch.func.jvp(f, (x,), (e,))


def test_nan_passes_through(backend: str) -> None:
    r, call = row(clip=1.0), operands((2, 3, 8, 8), torch.float32, 1)
    clean = step(backend, r, call, outputs=("y", "x0"))
    call["sample"][1, 0, 0, 0] = math.nan
    for got, want in zip(step(backend, r, call, outputs=("y", "x0")), clean, strict=True):
        assert torch.isnan(got[1, 0, 0, 0])
        got[1, 0, 0, 0] = want[1, 0, 0, 0]
        assert torch.equal(got, want)


def test_writes_into_given_tensors_and_leaves_inputs_alone(backend: str) -> None:
    r, call = row(), operands((2, 3, 8, 8), torch.float32, 1)
    want = step(backend, r, call, outputs=("y", "d"))
    before = cast(call, torch.float32)
    before = {k: v.clone() if isinstance(v, Tensor) else [t.clone() for t in v] for k, v in before.items()}
    out = (torch.full((2, 3, 8, 8), math.nan), torch.full((2, 3, 8, 8), math.nan))
    got = step(backend, r, call, outputs=("y", "d"), out=out)
    for k in range(2):
        assert got[k] is out[k] and torch.equal(out[k], want[k])
    for name, value in call.items():
        pairs = (
            [(value, before[name])] if isinstance(value, Tensor) else zip(value, before[name], strict=True)
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    assert step(
        backend,
        r,
        {k: v[:0] if isinstance(v, Tensor) else [t[:0] for t in v] for k, v in call.items()},
        outputs=("y",),
    )[0].shape == (0, 3, 8, 8)


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, -1])
def test_philox_noise(backend: str, seed: int) -> None:
    """In-kernel noise is the reference's, whatever the image's place in the batch."""
    shape = (3, 3, 21, 19)
    seeds = torch.tensor([7, seed, 11])
    r = torch.zeros(ROW, dtype=torch.float64)
    r[W + 3], r[DRAW] = 1.0, 4
    x = torch.zeros(shape)
    with ops.use_backend(backend):
        z = ops.scheduler_step(r, x, [x], seeds=seeds)[0]
        alone = ops.scheduler_step(r, x[1:2], [x[1:2]], seeds=seeds[1:2])[0]
    want = philox_normal(seeds, shape, 4, torch.float64)
    assert (z.double() - want).abs().max() <= 1e-6
    assert torch.equal(alone, z[1:2])


def test_philox_integers() -> None:
    """Philox4x32-10 on counter 0 and key 0, from the known answers published with Random123."""
    assert philox_integers(torch.tensor([0]), 1, 0).flatten().tolist() == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]
    bits = philox_integers(torch.tensor([3, 4]), 1000, 2)
    assert len(set(bits.flatten().tolist())) > 7990, "other seeds and counters, other numbers"
    z = philox_normal(torch.tensor([3]), (1, 200_000), 0, torch.float64)
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.1


@pytest.fixture
def plain() -> dict[str, Any]:
    given = operands((2, 3, 5, 7), torch.float32, 1)
    return {
        "row": row(columns="111101000"),
        "sample": given["sample"],
        "model_output": given["model_outputs"][0].contiguous(),
        "slots": tuple(given["slots"][:2]),
        "noise": given["noise"],
        "outputs": (0, 3, 1),
    }


def plain_step(
    row: Any, sample: Any, model_output: Any, noise: Any, slots: Any, outputs: Any, places: Any = ()
) -> Any:
    return shortcut().plain_step(row, sample, model_output, noise, slots, outputs, places)


def by_dispatcher(plain: dict[str, Any]) -> tuple[Tensor, ...]:
    names = [OUTPUTS[place] for place in plain["outputs"]]
    given = {name: plain[name] for name in ("row", "sample", "slots", "noise")}
    return ops.scheduler_step(**given, model_outputs=(plain["model_output"],), outputs=names)


@pytest.mark.skipif(not KERNEL, reason=dispatch.status("cpu") or "")
@pytest.mark.parametrize("shape", [(1,), (2, 3), (1, 4, 8, 8), (3, 2, 5, 7), (2, 4, 128, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_shortest_way_gives_the_same_bits(plain: dict[str, Any], shape: Any, dtype: torch.dtype) -> None:
    for name in ("sample", "model_output", "noise"):
        plain[name] = torch.randn(shape).to(dtype)
    plain["slots"] = (torch.randn(shape).to(dtype), torch.randn(shape))
    for last in (False, True) if len(shape) == 4 else (False,):
        if last:
            for name in ("sample", "model_output", "noise"):
                plain[name] = plain[name].to(memory_format=torch.channels_last)
            plain["slots"] = tuple(t.to(memory_format=torch.channels_last) for t in plain["slots"])
        made = plain_step(**plain, places=(0, 3, 4, 6))
        packed = plain_step(**(plain | {"row": plain["row"].numpy().tobytes()}))
        assert made is not None and packed is not None
        assert all(torch.equal(one, other) for one, other in zip(made[0], packed[0], strict=True))
        results, held = made
        kept = (results[0], plain["sample"], plain["noise"], plain["slots"][1])
        assert all(ours is expected for ours, expected in zip(held, kept, strict=True))
        for ours, expected in zip(results, by_dispatcher(plain), strict=True):
            assert ours.dtype is expected.dtype and ours.stride() == expected.stride()
            assert torch.equal(ours, expected)


@pytest.mark.skipif(not KERNEL, reason=dispatch.status("cpu") or "")
@pytest.mark.parametrize(
    "change",
    [
        {"sample": torch.randn(2, 3, 5, 7).double()},
        {"model_output": torch.randn(2, 3, 5, 7).bfloat16()},
        {"model_output": torch.randn(1, 3, 5, 7)},
        {"model_output": torch.randn(2, 3, 7, 5).mT},
        {"model_output": torch.randn(2, 3, 5, 7).requires_grad_()},
        {"model_output": torch.randn(2, 3, 5, 7, dtype=torch.complex64).conj().imag},
        {"model_output": torch.nn.Parameter(torch.randn(2, 3, 5, 7), requires_grad=False)},
        {"model_output": torch.empty(2, 3, 5, 7, device="meta")},
        {"model_output": torch.randn(2, 3, 5, 7).to_sparse()},
        {"model_output": None},
        {"noise": None},
        {"slots": ()},
        {"row": torch.zeros(ROW)},
        {"row": bytes(8 * ROW - 8)},
        {"row": torch.zeros(ROW - 1, dtype=torch.float64)},
        {"row": torch.zeros(2 * ROW, dtype=torch.float64)[::2]},
        {"outputs": (4,)},
        {"outputs": (-1,)},
        {"places": (7,)},
        {"places": (-1,)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_shortest_way_leaves_what_is_not_plain(plain: dict[str, Any], change: dict[str, Any]) -> None:
    assert plain_step(**(plain | change)) is None


@pytest.mark.skipif(not KERNEL, reason=dispatch.status("cpu") or "")
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["sample", "model_output", "noise"])
def test_negated_views_of_one_element_are_not_taken_for_their_memory(
    plain: dict[str, Any], shape: Any, name: str
) -> None:
    given = {key: torch.randn(shape) for key in ("sample", "model_output", "noise")}
    plain |= given | {"slots": (torch.randn(shape), torch.randn(shape))}
    assert plain_step(**plain) is not None
    plain[name] = torch.randn(shape, dtype=torch.complex64).conj().imag
    assert plain[name].is_neg() and plain_step(**plain) is None


@pytest.mark.skipif(not KERNEL, reason=dispatch.status("cpu") or "")
def test_results_lie_in_memory_that_dropped_ones_left(plain: dict[str, Any]) -> None:
    def step() -> Tensor:
        made = plain_step(**plain)
        assert made is not None
        return made[0][0]

    held = step()
    view, old = held[1], held.clone()
    kept = view.data_ptr()
    del held
    others = [step() for _ in range(20)]
    assert len({t.data_ptr() for t in others}) == 20, "no two results at one place"
    assert not any(t.data_ptr() <= kept < t.data_ptr() + 4 * t.numel() for t in others), "a view holds memory"
    assert torch.equal(view, old[1])
    places = {t.data_ptr() for t in others}
    del others
    assert step().data_ptr() in places
    copy = step().share_memory_()
    assert torch.equal(pickle.loads(pickle.dumps(copy)), old)


@pytest.mark.skipif(not KERNEL, reason=dispatch.status("cpu") or "")
def test_the_shortest_way_hides_from_nobody(plain: dict[str, Any]) -> None:
    assert plain_step(**plain) is not None
    with TorchDispatchMode():
        assert plain_step(**plain) is None
    with TorchFunctionMode():
        assert plain_step(**plain) is None
    with torch.autograd.profiler.profile():
        assert plain_step(**plain) is None
    with difusores.use_backend("reference"):
        assert plain_step(**plain) is None
    with forward_ad.dual_level():
        assert plain_step(**plain) is None
    seen = []

    def transformed(sample: Tensor) -> Tensor:
        seen.append(plain_step(**(plain | {"sample": sample})))
        return sample

    torch.func.vmap(transformed)(plain["sample"][None])
    torch.jit.trace(transformed, plain["sample"], check_trace=False)
    assert seen == [None, None]


def test_gradients_go_through_the_reference() -> None:
    r, call = row(guidance=1), cast(operands((1, 2, 3), torch.float64, 1), torch.float64)
    leaves = [call["sample"], call["model_outputs"][0].clone(), call["noise"], *call["slots"]]
    leaves = [t.requires_grad_() for t in leaves]

    def f(x: Tensor, e: Tensor, z: Tensor, *slots: Tensor) -> Any:
        return ops.scheduler_step(r, x, [e], slots, noise=z, outputs=OUTPUTS)

    assert torch.autograd.gradcheck(f, leaves)
    assert not f(*(t.detach() for t in leaves))[0].requires_grad


def test_opcheck() -> None:
    call = operands((2, 3, 4, 4), torch.float32, 2)
    e1, e2 = call["model_outputs"]
    outputs = [torch.empty_like(call["sample"]) for _ in OUTPUTS]
    torch.library.opcheck(
        torch.ops.difusores.scheduler_step.default,
        (
            *(row(guidance=2), None, call["sample"], e1, e2, None),
            *(call["noise"], call["variance"], None, None),
            *(*call["slots"], None, *outputs),
        ),
    )


def test_compiles_without_a_break(backend: str) -> None:
    r, call = row(clip=1.0), operands((2, 3, 8, 8), torch.float32, 1)

    def f() -> Tensor:
        return ops.scheduler_step(
            r, call["sample"], call["model_outputs"], call["slots"], noise=call["noise"]
        )[0]

    torch.compiler.reset()  # a graph keeps the backend that was in force when it was traced
    with ops.use_backend(backend):
        assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(), f())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": torch.zeros(40)}, "row must be float64"),
        ({"row": torch.zeros(39, dtype=torch.float64)}, r"row must be float64 \[40\]"),
        ({"model_outputs": []}, "one to three model outputs"),
        ({"slots": [None] * 6}, "at most five slots"),
        ({"noise": torch.zeros(2, 3, 8, 7)}, r"sample's shape \(2, 3, 8, 8\)"),
        ({"threshold": torch.zeros(3)}, r"threshold must have shape \[B\] = \[2\]"),
        ({"factor": torch.zeros(1)}, r"factor must have shape \[B\] = \[2\]"),
        ({"seeds": torch.zeros(1, dtype=torch.int64)}, "seeds must have shape"),
        ({"outputs": ("y", "w")}, "unknown output 'w'"),
        ({"outputs": ("y", "y")}, "asked for once"),
        ({"model_outputs": [torch.zeros(2, 3, 8, 8)] * 4}, "one to three model outputs"),
        ({"row": row()[None]}, r"row must be float64 \[40\]"),
        ({"noise": torch.zeros(2, 3, 8, 8), "seeds": torch.zeros(2, dtype=torch.int64)}, "not both"),
        ({"out": [torch.zeros(4, 3, 8, 8)]}, r"out for y must have shape \(2, 3, 8, 8\)"),
        ({"out": []}, "out must hold a tensor for each of y, got 0"),
        ({"model_outputs": [torch.zeros(2, 3, 8, 8, device="meta")]}, "on the sample's device, cpu"),
        ({"out": [torch.zeros(2, 3, 8, 8, device="meta")]}, "on cpu, got .* on meta"),
        ({"row": row().to("meta")}, "row must be on the CPU"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    x = torch.zeros(2, 3, 8, 8)
    call: dict[str, Any] = {"row": row(columns="100000000"), "sample": x, "model_outputs": [x], **change}
    with pytest.raises(ValueError, match=message):
        ops.scheduler_step(**call)
