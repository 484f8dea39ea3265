"""group_norm_silu on every backend against one float64 oracle."""

from __future__ import annotations

import importlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import ops
from difusores.ops import dispatch
from difusores.ops.group_norm_silu import _backward, reference

OP = "group_norm_silu"
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}

# (shape, groups): sizes of 1, odd sizes, groups of 1 and of all channels, fewer positions or channels than a
# vector has lanes; the largest are just above a chunk of the kernels
CASES = [
    ((2, 32, 8, 8), 32),
    ((1, 12, 5, 7), 3),
    ((3, 64, 4, 4), 8),
    ((1, 320, 15, 15), 32),
    ((2, 6, 17), 2),
    ((1, 8, 3, 4, 5), 4),
    ((2, 30, 33, 31), 5),
    ((1, 4, 1, 1), 2),
    ((2, 7, 9, 9), 7),
    ((2, 7, 9, 9), 1),
    ((1, 1, 1, 3), 1),
    ((1, 40, 33, 33), 2),
]

OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "adm": ("scale", "shift"),
    "block": ("add", "residual", "return_sum"),
    "residual": ("residual",),
    "all": ("add", "residual", "return_sum", "scale", "shift"),
}


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str, options: tuple[str, ...]) -> dict[str, Any]:
    n, c = shape[:2]

    def image() -> Tensor:
        t = (torch.randn(shape) * 2 + 5).to(dtype)
        return t.to(memory_format=FORMATS[t.ndim]) if layout == "channels_last" else t

    strided = torch.randn(n, 2 * c)  # scale and shift are the halves of one projection
    parts: dict[str, Any] = {
        "scale": strided[:, :c],
        "shift": strided[:, c:].to(dtype),
        "add": torch.randn(n, c).to(dtype),
        "residual": image(),
        "return_sum": True,
    }
    return {"x": image(), "weight": torch.randn(c), "bias": torch.randn(c), **{k: parts[k] for k in options}}


def run(
    backend: str | None, call: dict[str, Any], groups: int, silu: bool = True
) -> tuple[Tensor, Tensor | None]:
    keywords = {k: v for k, v in call.items() if k not in ("x", "weight", "bias")}

    def answer() -> tuple[Tensor, Tensor | None]:
        out = ops.group_norm_silu(
            call["x"], groups, call["weight"], call["bias"], 1e-5, silu=silu, **keywords
        )
        return out if isinstance(out, tuple) else (out, None)

    if backend is None:
        return answer()
    with ops.use_backend(backend):
        return answer()


def wide(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_against_the_oracle(
    backend: str, shape: Any, groups: int, layout: str, dtype: torch.dtype, check: Any
) -> None:
    if layout == "channels_last" and len(shape) == 3:
        layout = "contiguous"  # PyTorch has no channels_last for three dimensions
    for options in OPTIONS.values():
        for silu in (True, False):
            call = make(shape, dtype, layout, options)
            y, total = run(backend, call, groups, silu)
            eager, eager_total = run("reference", call, groups, silu)
            oracle, oracle_total = run("reference", wide(call), groups, silu)
            check(y, eager, oracle)
            memory_format = FORMATS[y.ndim] if layout == "channels_last" else torch.contiguous_format
            assert y.is_contiguous(memory_format=memory_format), "the layout comes out as it went in"
            if total is not None:
                check(total, eager_total, oracle_total)
                assert total.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("mean >> std", -2300.0, 1.0), ("huge", 0.0, 1e15), ("tiny", 0.0, 1e-18), ("constant", 3.0, 0.0)],
)
def test_hostile_values(backend: str, name: str, mean: float, std: float, layout: str, check: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = make((2, 64, 24, 24), dtype, layout, ())
        call["x"] = ((call["x"].float() - 5) / 2 * std + mean).to(dtype)
        check(run(backend, call, 8)[0], run("reference", call, 8)[0], run("reference", wide(call), 8)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_inf_stay_in_their_group(backend: str, layout: str, value: float) -> None:
    call = make((2, 8, 5, 5), torch.float32, layout, ())
    clean = run(backend, call, 4)[0]
    call["x"] = call["x"].clone(memory_format=torch.preserve_format)
    call["x"][1, 2, 3, 3] = value  # group 1 of image 1
    y = run(backend, call, 4)[0]
    assert torch.isnan(y[1, 2:4]).all()
    y[1, 2:4] = clean[1, 2:4]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 64, 33, 31), "all"),
        ((3, 96, 8, 8), "all"),
        ((3, 128, 32, 32), "plain"),
        ((5, 64, 16, 16), "plain"),
    ],
    ids=str,
)
def test_bitwise(shape: Any, options: str, layout: str, dtype: torch.dtype) -> None:
    """The same call twice, an image alone or in a batch, one thread or several: the same bits.

    Of the kernel: PyTorch's group norm, which is the reference, cuts its sums by the number of threads.
    """
    reason = dispatch.status("cpu")
    if reason is not None:
        pytest.skip(reason)
    call = make(shape, dtype, layout, OPTIONS[options])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(None, call, 32)
        torch.set_num_threads(3)
        several, again = run(None, call, 32), run(None, call, 32)
    finally:
        torch.set_num_threads(threads)
    outputs = range(2 if one[1] is not None else 1)
    for k in outputs:
        assert torch.equal(one[k], several[k]) and torch.equal(several[k], again[k])
    for image in range(shape[0]):
        per_image = ("x", "scale", "shift", "add", "residual")
        alone = {k: v[image : image + 1] if k in per_image else v for k, v in call.items()}
        for k in outputs:
            assert torch.equal(run(None, alone, 32)[k], one[k][image : image + 1])


def test_empty_batch_and_no_parameters(backend: str) -> None:
    with ops.use_backend(backend):
        assert ops.group_norm_silu(torch.empty(0, 8, 4, 4), 2, None, None).shape == (0, 8, 4, 4)
        x = torch.randn(2, 8, 4, 4)
        y, total = ops.group_norm_silu(x, 2, None, None, return_sum=True)
    assert total is x
    torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2)))


def test_inputs_are_not_changed(backend: str) -> None:
    call = make((2, 16, 6, 6), torch.float32, "contiguous", OPTIONS["all"])
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()}
    run(backend, call, 4)
    assert all(torch.equal(call[k], before[k]) for k in call if isinstance(call[k], Tensor))


def test_other_strides_go_to_the_reference_or_are_refused_by_name() -> None:
    x = torch.randn(2, 8, 6, 12)[..., ::2]
    torch.testing.assert_close(
        ops.group_norm_silu(x, 4, None, None), ops.group_norm_silu(x.contiguous(), 4, None, None)
    )
    if dispatch.status("cpu") is None:
        with (
            ops.use_backend("cpu"),
            pytest.raises(ops.BackendUnavailable, match="contiguous and channels_last"),
        ):
            ops.group_norm_silu(x, 4, None, None)
        with ops.use_backend("cpu"), pytest.raises(ops.BackendUnavailable, match=r"not torch\.float64"):
            ops.group_norm_silu(x.double(), 4, None, None)


def test_parameters_of_any_strides(backend: str) -> None:
    x, w, table = torch.randn(2, 8, 4, 4), torch.randn(16)[::2], torch.randn(8, 2).t()
    call = {
        "x": x,
        "weight": w,
        "bias": torch.ones(1).expand(8),
        "scale": table,
        "add": table[:1].expand(2, 8),
    }
    dense = {k: v.contiguous() for k, v in call.items()}
    torch.testing.assert_close(run(backend, call, 4)[0], run(backend, dense, 4)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 3}, "num_groups must divide"),
        ({"num_groups": 0}, "num_groups must divide"),
        ({"x": torch.randn(2, 8)}, "3 to 5 dimensions"),
        ({"weight": torch.randn(4)}, r"weight must have shape \[C\] = \[8\]"),
        ({"bias": torch.randn(2, 8)}, r"bias must have shape"),
        ({"add": torch.randn(8)}, r"add must have shape \[N, C\]"),
        ({"scale": torch.randn(2, 4)}, r"scale must have shape"),
        ({"shift": torch.randn(1, 8)}, r"shift must have shape"),
        ({"residual": torch.randn(2, 8, 4, 5)}, "residual must be like x"),
        ({"residual": torch.randn(2, 8, 4, 4).half()}, "residual must be like x"),
        ({"weight": torch.randn(8, device="meta")}, "weight must be on the device of x, cpu, got meta"),
        ({"residual": torch.randn(2, 8, 4, 4, device="meta")}, "residual must be on the device of x"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "x": torch.randn(2, 8, 4, 4),
        "num_groups": 4,
        "weight": None,
        "bias": None,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        ops.group_norm_silu(**call)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        ops.group_norm_silu(torch.ones(2, 8, 4, 4, dtype=torch.int64), 4, None, None)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options: str, check: Any) -> None:
    """The registered formula against autograd through the reference: by the tolerance rule in fp32,
    exactly in fp64.
    """
    call = make((2, 12, 5, 4), torch.float32, "contiguous", OPTIONS[options])
    names = [k for k, v in call.items() if isinstance(v, Tensor)]
    grads = (torch.randn(2, 12, 5, 4, dtype=torch.float64), torch.randn(2, 12, 5, 4, dtype=torch.float64))

    def differentiate(backend: str | None, tensors: dict[str, Any], to: torch.dtype) -> list[Tensor]:
        leaves = {k: v.to(to).detach().requires_grad_() if k in names else v for k, v in tensors.items()}
        y, total = run(backend, leaves, 3)
        outputs = [y] if total is None else [y, total]
        return list(
            torch.autograd.grad(
                outputs, [leaves[k] for k in names], [g.to(to) for g in grads[: len(outputs)]]
            )
        )

    oracle = differentiate("reference", call, torch.float64)
    for name, ours, eager, exact in zip(
        names,
        differentiate(None, call, torch.float32),
        differentiate("reference", call, torch.float32),
        oracle,
        strict=True,
    ):
        assert torch.isfinite(ours).all(), name
        check(ours, eager, exact)

    saved = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()}
    order = ("x", "weight", "bias", "scale", "shift", "add", "residual")
    context = SimpleNamespace(
        saved_tensors=[saved.get(k) for k in order],
        num_groups=3,
        eps=1e-5,
        silu=True,
        return_sum="return_sum" in call,
        wanted=None,
    )
    places = {"x": 0, "weight": 2, "bias": 3, "scale": 6, "shift": 7, "add": 8, "residual": 9}
    with torch.no_grad():
        formula = _backward(context, *grads)
    for name, exact in zip(names, oracle, strict=True):
        torch.testing.assert_close(formula[places[name]], exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_gradients_of_backends(backend: str, options: str, layout: str, check: Any) -> None:
    """Every gradient by the tolerance rule, forward and backward by one backend; the same bits twice."""
    for dtype in (torch.float32, torch.float16):
        call = make((2, 24, 9, 8), dtype, layout, OPTIONS[options])
        names = [name for name, t in call.items() if isinstance(t, Tensor)]
        outside = [torch.randn_like(call["x"]) for _ in range(2)]

        def differentiate(
            by: str, to: torch.dtype | None, call: Any = call, names: Any = names, outside: Any = outside
        ) -> Any:
            leaves = {
                k: v.to(to or v.dtype).detach().requires_grad_() if k in names else v for k, v in call.items()
            }
            with ops.use_backend(by):
                outputs = [t for t in run(None, leaves, 4) if t is not None]
                grads = [g.to(outputs[0]) for g in outside[: len(outputs)]]
                return torch.autograd.grad(outputs, [leaves[name] for name in names], grads)

        ours, again = differentiate(backend, None), differentiate(backend, None)
        eager, oracle = differentiate("reference", None), differentiate("reference", torch.float64)
        for name, got, same, theirs, exact in zip(names, ours, again, eager, oracle, strict=True):
            assert torch.equal(got, same), name
            check(got.to(dtype), theirs.to(dtype), exact)


@pytest.mark.skipif(dispatch.status("cpu") is not None, reason=dispatch.status("cpu") or "")
def test_the_gradient_has_the_backend_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU autograd goes backward in a thread of its own, where nobody asked for one."""
    module, seen = importlib.import_module("difusores.ops.group_norm_silu"), []

    def choose(op: str, *call: Any) -> str:
        seen.append((op, dispatch.wanted()))
        return dispatch.choose(op, *call)

    monkeypatch.setattr(module, "choose", choose)
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    with ops.use_backend("cpu"):
        y = ops.group_norm_silu(x, 2, None, None).sum()
    thread = threading.Thread(target=y.backward)
    thread.start()
    thread.join()
    assert seen[-1] == ("group_norm_silu_backward", "cpu") and x.grad is not None


@pytest.mark.parametrize("of_grad", ["contiguous", "channels_last"])
@pytest.mark.parametrize("of_x", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 8, 5, 4), (2, 8, 3, 5, 4)], ids=str)
def test_gradients_of_layouts(shape: tuple[int, ...], of_x: str, of_grad: str) -> None:
    """The gradient comes in the layout of what follows, which need not be that of x."""
    call = make(shape, torch.float32, of_x, OPTIONS["plain"])
    grad = make(shape, torch.float32, of_grad, OPTIONS["plain"])["x"]
    grads = []
    for backend in (None, "reference"):
        x = call["x"].detach().requires_grad_()
        run(backend, {**call, "x": x}, 4)[0].backward(grad)
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_gradient_of_a_bias_alone() -> None:
    x, bias = torch.randn(2, 8, 4, 4), torch.randn(8, requires_grad=True)
    grads = [
        torch.autograd.grad(run(backend, {"x": x, "weight": w, "bias": bias}, 4)[0].sum(), bias)[0]
        for backend, w in ((None, None), ("reference", None), ("reference", torch.ones(8)))
    ]
    torch.testing.assert_close(grads[0], grads[2])
    torch.testing.assert_close(grads[1], grads[2])


def test_second_derivatives() -> None:
    """With x twice among the inputs: each use has a derivative of its own."""
    x, weight = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(8, requires_grad=True)

    def second(backend: str | None) -> tuple[Tensor, ...]:
        y, total = run(
            backend, {"x": x, "weight": weight, "bias": None, "residual": x, "return_sum": True}, 4
        )
        (grad,) = torch.autograd.grad(y.square().sum() + total.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, weight))

    for ours, eager in zip(second(None), second("reference"), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-3)


def test_function_transforms() -> None:
    """torch.func and forward-mode derivatives see through the op, as through eager PyTorch."""
    x, v, weight = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), torch.randn(8)

    def f(t: Tensor) -> Tensor:
        return ops.group_norm_silu(t, 4, weight, None)

    def eager(t: Tensor) -> Tensor:
        return F.silu(F.group_norm(t, 4, weight))

    torch.testing.assert_close(torch.func.jvp(f, (x,), (v,)), torch.func.jvp(eager, (x,), (v,)))
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(eager, (x,), (v,))[1])
    for transform in (torch.func.grad, lambda g: torch.vmap(torch.func.grad(g))):
        batch = torch.stack([x, v]) if transform is not torch.func.grad else x
        torch.testing.assert_close(
            transform(lambda t: f(t).square().sum())(batch),
            transform(lambda t: eager(t).square().sum())(batch),
            rtol=1e-4,
            atol=1e-4,
        )


def test_gradcheck() -> None:
    def f(*tensors: Tensor) -> Any:
        x, weight, bias, scale, shift, add, residual = tensors
        return reference(x, 2, weight, bias, 1e-5, True, scale, shift, add, residual, True)

    shapes = [(2, 4, 3, 2), (4,), (4,), (2, 4), (2, 4), (2, 4), (2, 4, 3, 2)]
    assert torch.autograd.gradcheck(
        f, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    )


@pytest.mark.parametrize(("options", "layout"), [("plain", "channels_last"), ("all", "contiguous")])
def test_opcheck(options: str, layout: str) -> None:
    call = make((2, 8, 4, 4), torch.float32, layout, OPTIONS[options])
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) and v.is_leaf else v for k, v in call.items()}
    get = leaves.get
    torch.library.opcheck(
        torch.ops.difusores.group_norm_silu.default,
        (
            *(leaves["x"], 4, get("weight"), get("bias"), 1e-5, True),
            *(get("scale"), get("shift"), get("add"), get("residual"), get("return_sum", False)),
        ),
    )


def test_opcheck_of_the_gradients() -> None:
    call = make((2, 8, 4, 4), torch.float32, "channels_last", OPTIONS["all"])
    x, weight, bias, scale, shift, add = (call[k] for k in ("x", "weight", "bias", "scale", "shift", "add"))
    op = torch.ops.difusores.group_norm_silu_backward.default
    for more in ((scale, shift, add, call["residual"]), (None, None, None, None)):
        torch.library.opcheck(op, (x + 1, x - 1, x, 4, weight, bias, 1e-5, True, *more))
    torch.library.opcheck(op, (x + 1, None, x, 4, None, None, 1e-5, False, None, None, None, None))


def test_compiles_without_a_break(backend: str) -> None:
    torch.compiler.reset()  # a graph keeps the backend that was in force when it was traced
    call = make((2, 8, 4, 4), torch.float32, "contiguous", OPTIONS["all"])
    compiled = torch.compile(lambda: run(None, call, 4), fullgraph=True, backend="aot_eager")
    with ops.use_backend(backend):
        got, want = compiled(), run(None, call, 4)
    torch.testing.assert_close(got, want)  # the compiler decomposes the reference's group norm
