"""The CUDA kernels' own source, executed on the CPU, against the float64 oracle of the ops' tests.

The tests are those of each op's own file; its call is carried out by the
emulation, under three schedules which must agree in every bit.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_budget
import emulated
import pytest
import torch

from difusores import native, ops
from difusores.ops import dispatch
from difusores.ops.scheduler_step import MODE, PX, ROW, W

pytestmark = [
    pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or ""),
    pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or ""),
]


BUDGET = json.loads(cuda_budget.BUDGET.read_text(encoding="utf-8"))


def suite(op: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"suite_of_{op}", Path(__file__).with_name(f"test_{op}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which the emulated kernels answer: what is registered for the CPU is replaced."""
    for op, run in emulated.OPS.items():
        monkeypatch.setattr(importlib.import_module(f"difusores.ops.{op}"), "_OP", run)
    return "cpu"


# Channels that SD 1.5, SDXL, ddpm-cat-256 and the VAE normalise in 32 groups
NUMBERS = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (128, 256, 320, 384, 512, 640, 768, 960, 1024, 1280, 1920, 2560)


class UnderItsOwnName:
    """For ops without a kernel for the CPU: the backend `cuda` takes their calls on CPU tensors."""

    @pytest.fixture
    def backend(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
        status = dispatch.status
        monkeypatch.setattr(dispatch, "status", lambda name: None if name == "cuda" else status(name))
        monkeypatch.setattr(dispatch, "_left_out", lambda op, backend: None)
        monkeypatch.setitem(dispatch._DEVICES, "cuda", ("cuda", "cpu"))
        return "cuda"


class TestBiasResidual(UnderItsOwnName):
    of = suite("bias_residual")
    test_against_the_oracle = staticmethod(of.test_against_the_oracle)
    test_hostile_values = staticmethod(of.test_hostile_values)

    @pytest.fixture
    def backend(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
        def in_place(x: Any, *call: Any) -> None:
            x.copy_(emulated.bias_residual(x, *call))

        monkeypatch.setattr(importlib.import_module("difusores.ops.bias_residual"), "_OP_IN_PLACE", in_place)
        return backend

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("width", WIDTHS)
    def test_at_the_widths_of_models(self, backend: str, width: int, layout: str, check: Any) -> None:
        dtype = self.of.DTYPES[WIDTHS.index(width) % 3]
        given = self.of.make((2, width, 2, 4), dtype, layout, self.of.OPTIONS[0])
        with ops.use_backend(backend):
            got = ops.bias_residual(**given)
        check(
            got, self.of.reference(*self.of.call(given)), self.of.reference(*self.of.call(given, wide=True))
        )


class TestGeglu(UnderItsOwnName):
    of = suite("geglu")
    test_against_the_oracle = staticmethod(of.test_against_the_oracle)
    test_hostile_values = staticmethod(of.test_hostile_values)

    @pytest.mark.parametrize("width", [1280, 2560, 5120])
    @pytest.mark.parametrize("dtype", NUMBERS, ids=str)
    def test_at_the_widths_of_models(self, backend: str, width: int, dtype: torch.dtype, check: Any) -> None:
        self.of.test_against_the_oracle(backend, (2, 2 * width), "none", dtype, check)


class TestLayerNorm(UnderItsOwnName):
    of = suite("layer_norm")
    test_against_the_oracle = staticmethod(of.test_against_the_oracle)
    test_mean_far_above_the_deviation = staticmethod(of.test_mean_far_above_the_deviation)

    @pytest.mark.parametrize("width", [320, 640, 768, 1024, 1280, 2048])
    @pytest.mark.parametrize("dtype", NUMBERS, ids=str)
    def test_at_the_widths_of_models(self, backend: str, width: int, dtype: torch.dtype, check: Any) -> None:
        self.of.test_against_the_oracle(backend, (5, width), dtype, check)

    @pytest.mark.parametrize(
        ("columns", "dtype", "plan"),
        [
            (320, torch.float16, (8, 3, 16, 128)),
            (1280, torch.bfloat16, (8, 3, 64, 64)),
            (1280, torch.float32, (4, 3, 128, 128)),
            (2048, torch.float16, (8, 2, 128, 128)),
            (768, torch.float16, (8, 3, 32, 128)),
            (16384, torch.float32, (4, 8, 512, 512)),
            (3, torch.float32, (1, 16, 1, 128)),
            (1001, torch.float16, (1, 16, 64, 64)),
        ],
        ids=str,
    )
    def test_how_a_row_is_cut(
        self, columns: int, dtype: torch.dtype, plan: tuple[int, ...], check: Any
    ) -> None:
        """Rows that are a part of a warp, a warp, several; a row has the same bits alone; NaN stays in it."""
        x, w, b = torch.randn(9, columns).to(dtype) + 2, torch.randn(columns), torch.randn(columns).to(dtype)
        found = emulated.LayerNormPlan()
        y, _ = emulated.layer_norm(x, w, b, 1e-5, None, False, plan=found)
        assert tuple(getattr(found, name) for name, _ in found._fields_) == plan
        wide = self.of.torch.nn.functional.layer_norm(x.double(), (columns,), w.double(), b.double())
        eager = torch.nn.functional.layer_norm(x, (columns,), w.to(dtype), b)
        check(y, eager, wide)
        assert torch.equal(emulated.layer_norm(x[4:5], w, b, 1e-5, None, False)[0], y[4:5])
        x[4, 1] = math.nan
        broken, _ = emulated.layer_norm(x, w, b, 1e-5, None, False)
        assert torch.isnan(broken[4]).all() and torch.equal(
            broken[[*range(4), *range(5, 9)]], y[[*range(4), *range(5, 9)]]
        )


class TestSchedulerStep:
    of = suite("scheduler_step")
    test_against_the_oracle = staticmethod(of.test_against_the_oracle)
    test_dynamic_threshold = staticmethod(of.test_dynamic_threshold)
    test_factor = staticmethod(of.test_factor)
    test_mixed_dtypes_and_model_input = staticmethod(of.test_mixed_dtypes_and_model_input)
    test_large_terms_that_cancel = staticmethod(of.test_large_terms_that_cancel)
    test_one_rounding_of_the_size_of_the_sample = staticmethod(of.test_one_rounding_of_the_size_of_the_sample)
    test_a_table_and_a_counter = staticmethod(of.test_a_table_and_a_counter)
    test_layouts = staticmethod(of.test_layouts)
    test_bitwise = staticmethod(of.test_bitwise)
    test_churn_of_a_sample_that_is_not_read = staticmethod(of.test_churn_of_a_sample_that_is_not_read)
    test_philox_noise = staticmethod(of.test_philox_noise)
    test_nan_passes_through = staticmethod(of.test_nan_passes_through)

    def test_more_elements_than_one_turn_of_the_grid(self) -> None:
        row, x = torch.zeros(ROW, dtype=torch.float64), torch.randn(320, 1030)
        row[W + 1] = 0.5
        (y,) = ops.scheduler_step(row, x, [x])
        assert torch.equal(y, 0.5 * x)

    def test_every_instance_has_the_same_bits(self) -> None:
        """Vectors of each pair of dtypes, and the same numbers element by element where an address is odd."""
        half, brain, single = torch.float16, torch.bfloat16, torch.float32
        everything = self.of.row(mode=1, churn=0.2, clip=1.0, guidance=3)
        usual = self.of.row(clip=1.0, guidance=2, columns="111111000")
        seeds, factor = torch.tensor([5, -7]), torch.tensor([0.7, 1.3])

        def moved(t: torch.Tensor) -> torch.Tensor:
            return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

        for of_sample, of_model in (
            *((single, single), (half, half), (brain, brain)),
            *((single, half), (single, brain)),
        ):
            like_x = [torch.randn(2, 1, 4, 4).to(of_sample) for _ in range(7)]
            like_e = [torch.rand(2, 1, 4, 4).to(of_model) for _ in range(4)]
            for row, names, more in (
                *((everything, "yduxm", {}), (usual, "ydxm", {})),
                *((everything, "yduxm", {"seeds": seeds}), (usual, "ydxm", {"seeds": seeds})),
            ):
                found = []
                for place in (lambda t: t, moved):
                    x, z, *slots = map(place, like_x)
                    *e, v = map(place, like_e)
                    options: dict[str, Any] = {"model_dtype": of_model, "model_repeats": 2, "variance": v}
                    options["factor"] = factor
                    options |= more or {"noise": z}
                    outputs = ["x0" if name == "x" else name for name in names]
                    found.append(ops.scheduler_step(row, x, e, slots, outputs=outputs, **options))
                assert all(map(emulated.same_bits, *found)), (of_sample, of_model, names, more)
        ran = {cuda_budget.short_name(name) for name in emulated.launched("scheduler_step")}
        assert ran == {name for name in BUDGET["sm_80"] if name.startswith("scheduler_step")}

    @pytest.mark.parametrize("missing", ["noise", "s0", "s4", "variance"])
    def test_an_operand_that_is_not_there_is_nan(self, missing: str) -> None:
        """The row may be in device memory, where the host cannot check it without waiting."""
        row, given = torch.zeros(2, ROW, dtype=torch.float64), {}
        row[:, PX] = row[:, W + 1] = 1
        if missing == "variance":
            row[1, MODE] = row[1, W + 3] = 1
        else:
            row[1, W + ("x0", "xh", "e", "noise", "s0", "", "", "", "s4").index(missing)] = 0.5
        for size in (4, 5):  # vectors, elements
            x = torch.randn(2, 3, size, size)
            if missing == "variance":
                given = {"noise": torch.ones_like(x)}
            for index, is_nan in ((0, False), (1, True)):
                (y,) = ops.scheduler_step(row, x, [x], step=torch.tensor([index]), **given)
                assert torch.isnan(y).all() if is_nan else torch.equal(y, x)

    @pytest.mark.parametrize("index", [-1, 2, 2**40])
    def test_a_counter_outside_the_table_gives_nan(self, index: int) -> None:
        table, x = torch.zeros(2, ROW, dtype=torch.float64), torch.randn(1, 4, 8, 8)
        results = ops.scheduler_step(table, x, [x], outputs=("y", "x0", "m"), step=torch.tensor([index]))
        assert all(torch.isnan(t).all() for t in results)


class TestGuidanceRescale:
    of = suite("guidance_rescale")
    test_a_large_mean = staticmethod(of.test_a_large_mean)
    test_equal_parts_give_one = staticmethod(of.test_equal_parts_give_one)
    test_what_has_no_deviation = staticmethod(of.test_what_has_no_deviation)
    test_a_table_and_a_counter = staticmethod(of.test_a_table_and_a_counter)
    test_layouts_and_mixtures_of_dtypes = staticmethod(of.test_layouts_and_mixtures_of_dtypes)
    test_bitwise = staticmethod(of.test_bitwise)

    @pytest.mark.parametrize(("weights", "dtype"), tuple(zip(of.WEIGHTS, NUMBERS, strict=True)))
    def test_against_the_oracle(self, weights: Any, dtype: torch.dtype, check: Any) -> None:
        self.of.test_against_the_oracle("cpu", weights, dtype, check)

    def test_tiles_within_an_image(self, check: Any) -> None:
        """Vectors of each dtype and single elements, by one block and by several; the last tile is short."""
        row = self.of.row(-6.5, 7.5)
        for shape in ((2, 4, 127, 131), (2, 1, 4, 18434), (1, 1, 65537)):
            for dtype in NUMBERS if shape[0] > 1 else NUMBERS[:1]:
                outputs = self.of.images(2, shape, dtype)
                got = ops.guidance_rescale(row, outputs, 0.7)
                wide = self.of.by_hand((-6.5, 7.5), self.of.wide(outputs), -1, 0.7)
                check(got, self.of.by_hand((-6.5, 7.5), [e.float() for e in outputs], -1, 0.7), wide)
                alone = ops.guidance_rescale(row, [e[-1:] for e in outputs], 0.7)
                assert torch.equal(got[-1:], alone)
        ran = {cuda_budget.short_name(name) for name in emulated.launched("guidance_rescale")}
        assert ran == {name for name in BUDGET["sm_80"] if name.startswith("guidance_rescale")}

    def test_what_the_host_cannot_see(self) -> None:
        """A counter outside the table gives NaN; an output of weight 0 is read, and does not count."""
        told, other = self.of.images(2, (2, 4, 6, 6))
        broken, table = torch.full_like(other, math.nan), torch.stack([self.of.row(0.0, 2.0)] * 2)
        for index, weights in ((1, (2.0,)), (-1, ()), (2, ()), (2**40, ())):
            got = ops.guidance_rescale(table, [broken, told], 0.7, step=torch.tensor([index]))
            want = self.of.by_hand(weights, [told], 0, 0.7) if weights else torch.full((2,), math.nan)
            torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-6, atol=0)


NORM = suite("group_norm_silu")
LAYOUTS = ("contiguous", "channels_last")


@pytest.mark.parametrize("limit", [227 << 10, 0], ids=["whole groups", "split groups"])
class TestGroupNormSilu:
    test_hostile_values = staticmethod(NORM.test_hostile_values)
    test_empty_batch_and_no_parameters = staticmethod(NORM.test_empty_batch_and_no_parameters)
    test_inputs_are_not_changed = staticmethod(NORM.test_inputs_are_not_changed)
    test_parameters_of_any_strides = staticmethod(NORM.test_parameters_of_any_strides)

    @pytest.fixture(autouse=True)
    def _limit(self, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        """Of shared memory: whether a group stays in one block."""
        monkeypatch.setattr(emulated, "SHARED_LIMIT", limit)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("case", range(len(NORM.CASES)), ids=lambda k: str(NORM.CASES[k]))
    def test_against_the_oracle(self, case: int, layout: str, check: Any) -> None:
        """Every shape, layout and dtype; of the options each in its turn."""
        shape, groups = NORM.CASES[case]
        if layout == "channels_last" and len(shape) == 3:
            layout = "contiguous"  # PyTorch has no channels_last for three dimensions
        for number, dtype in enumerate(NORM.DTYPES):
            names = list(NORM.OPTIONS)
            call = NORM.make(shape, dtype, layout, NORM.OPTIONS[names[(case + number) % len(names)]])
            silu = (case + number) % 3 > 0
            y, total = NORM.run("cpu", call, groups, silu)
            eager, eager_total = NORM.run("reference", call, groups, silu)
            oracle, oracle_total = NORM.run("reference", NORM.wide(call), groups, silu)
            check(y, eager, oracle)
            assert y.stride() == call["x"].stride(), "the layout comes out as it went in"
            if total is not None:
                check(total, eager_total, oracle_total)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("width", WIDTHS)
    def test_at_the_widths_of_models(self, width: int, layout: str, check: Any) -> None:
        call = NORM.make((1, width, 4, 8), NUMBERS[WIDTHS.index(width) % 3], layout, NORM.OPTIONS["all"])
        results = (
            NORM.run("cpu", call, 32),
            *(NORM.run("reference", of, 32) for of in (call, NORM.wide(call))),
        )
        for ours, eager, oracle in zip(*results, strict=True):
            check(ours, eager, oracle)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_nan_stays_in_its_group(self, layout: str) -> None:
        NORM.test_nan_and_inf_stay_in_their_group("cpu", layout, math.inf)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_an_image_has_the_same_bits_alone_and_in_a_batch(self, layout: str, dtype: torch.dtype) -> None:
        call = NORM.make((3, 96, 8, 8), dtype, layout, NORM.OPTIONS["all"])
        together, again = NORM.run(None, call, 32), NORM.run(None, call, 32)
        per_image = ("x", "scale", "shift", "add", "residual")
        alone = NORM.run(None, {k: v[1:2] if k in per_image else v for k, v in call.items()}, 32)
        for one, two, three in zip(together, again, alone, strict=True):
            assert torch.equal(one, two) and torch.equal(one[1:2], three)


class TestGroupNormSiluBackward(UnderItsOwnName):
    @pytest.fixture(autouse=True)
    def _kernels(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("difusores.ops.group_norm_silu")
        monkeypatch.setattr(module, "_BACKWARD_OP", emulated.group_norm_silu_backward)
        monkeypatch.setattr(module, "_OP", torch.ops.difusores.group_norm_silu.default)  # has a gradient

    test_gradients = staticmethod(NORM.test_gradients)
    test_gradients_of_layouts = staticmethod(NORM.test_gradients_of_layouts)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("case", range(len(NORM.CASES)), ids=lambda k: str(NORM.CASES[k]))
    def test_against_the_oracle(self, case: int, layout: str, check: Any) -> None:
        shape, groups = NORM.CASES[case]
        if layout == "channels_last" and len(shape) == 3:
            layout = "contiguous"
        for number, dtype in enumerate(NORM.DTYPES):
            names = list(NORM.OPTIONS)
            options = NORM.OPTIONS[names[(case + number) % len(names)]]
            self.compare(shape, groups, layout, dtype, options, (case + number) % 3 > 0, check)

    @pytest.mark.parametrize("width", WIDTHS)
    def test_at_the_widths_of_models(self, width: int, check: Any) -> None:
        dtype, layout = NUMBERS[WIDTHS.index(width) % 3], LAYOUTS[WIDTHS.index(width) % 2]
        self.compare((1, width, 4, 4), 32, layout, dtype, NORM.OPTIONS["all"], True, check)

    @pytest.mark.parametrize(
        ("shape", "groups", "layout", "plan"),
        [
            ((2, 4, 160, 112), 2, "contiguous", {"chunk": 2048, "chunks": 2, "lanes": 256, "threads": 256}),
            ((1, 20, 64, 64), 2, "contiguous", {"chunk": 512, "chunks": 1, "lanes": 128, "threads": 128}),
            ((2, 40, 64, 64), 4, "channels_last", {"chunks": 20}),
            ((1, 5000, 3, 2), 1, "channels_last", {"chunks": 2}),  # a group wider than a block
        ],
        ids=str,
    )
    def test_how_it_is_cut(
        self, shape: Any, groups: int, layout: str, plan: dict[str, int], check: Any
    ) -> None:
        found = self.compare(shape, groups, layout, torch.float16, NORM.OPTIONS["all"], True, check)
        assert {name: getattr(found, name) for name in plan} == plan

    @staticmethod
    def compare(
        shape: Any, groups: int, layout: str, dtype: torch.dtype, options: Any, silu: bool, check: Any
    ) -> Any:
        """Each gradient by the tolerance rule; an image has the same bits alone."""
        call = NORM.make(shape, dtype, layout, options)
        grad_y, grad_sum = torch.randn_like(call["x"]), torch.randn_like(call["x"])
        params = ("weight", "bias", "scale", "shift", "add")

        def kernels(call: dict[str, Any], grad_y: Any, grad_sum: Any, plan: Any = None) -> tuple[Any, ...]:
            (x, *values, residual) = (call.get(name) for name in ("x", *params, "residual"))
            of_sum = grad_sum if "return_sum" in call else None
            return emulated.group_norm_silu_backward(
                *(grad_y, of_sum, x, groups, *values[:2], 1e-5, silu, *values[2:], residual), plan=plan
            )

        def by_autograd(call: dict[str, Any], to: torch.dtype | None) -> tuple[Any, ...]:
            leaves = {
                name: t.to(to or t.dtype).detach().requires_grad_() if isinstance(t, torch.Tensor) else t
                for name, t in call.items()
            }
            outputs = [t for t in NORM.run("reference", leaves, groups, silu) if t is not None]
            wanted = [leaves[name] for name in ("x", *params) if name in leaves]
            return torch.autograd.grad(
                outputs, wanted, [g.to(outputs[0]) for g in (grad_y, grad_sum)][: len(outputs)]
            )

        plan = emulated.GroupNormBackwardPlan()
        grads = kernels(call, grad_y, grad_sum, plan)
        given = [g for g in grads if g.numel()]
        eager, oracle = by_autograd(call, None), by_autograd(call, torch.float64)
        for ours, theirs, exact in zip(given, eager, oracle, strict=True):
            # Of parameters in fp32 too: their gradients are as good as the images that they are sums over.
            check(ours.to(dtype), theirs.to(dtype), exact)
        per_image = ("x", "scale", "shift", "add", "residual")
        last = {name: t[-1:] if name in per_image else t for name, t in call.items()}
        alone = kernels(last, grad_y[-1:], grad_sum[-1:])
        for k in (0, 3, 4, 5):
            assert torch.equal(alone[k], grads[k][-1:]), "other bits in a batch"
        return plan


@pytest.mark.parametrize(
    ("shape", "groups", "layout", "limit", "plan"),
    [
        # SD 1.5's first level, of one image and fewer channels: 80 KB of a group, which four blocks share
        ((1, 20, 64, 64), 2, "contiguous", 227 << 10, {"whole": True, "vec": 8, "cluster": 4, "chunks": 4}),
        ((1, 4, 64, 64), 2, "contiguous", 227 << 10, {"whole": True, "chunks": 1, "vec": 8}),
        ((1, 20, 64, 64), 2, "contiguous", 8 << 10, {"whole": False, "chunks": 3, "partials": 6}),
        ((1, 80, 64, 64), 8, "channels_last", 24 << 10, {"whole": False, "vec": 8, "chunks": 25}),
        ((1, 160, 16, 16), 4, "channels_last", 99 << 10, {"whole": True, "spans": 4, "groups_in_span": 1}),
        # a group wider than a block: several blocks for a row of it
        ((2, 5000, 3, 1), 1, "channels_last", 0, {"vec": 8, "parts": 3, "span": 1672}),
        ((2, 1030, 3, 1), 2, "channels_last", 0, {"vec": 1, "parts": 3, "span": 172}),
        # more channels than a tile's table may have
        ((1, 4096, 1, 1), 1, "contiguous", 8 << 10, {"whole": False, "chunks": 4, "table": 1028}),
        # clusters: two blocks with little each; four, as much as one may have; eight, of 512 threads; rows
        # that two divide and four do not; shares that begin within a channel, the last one smaller
        ((1, 80, 32, 32), 8, "channels_last", 227 << 10, {"cluster": 2, "chunk": 512, "threads": 256}),
        ((2, 40, 32, 32), 4, "channels_last", 48 << 10, {"cluster": 4, "partials": 0}),
        ((1, 32, 80, 80), 2, "channels_last", 227 << 10, {"cluster": 8, "threads": 512, "vec": 8}),
        ((1, 510, 3, 2), 2, "channels_last", 6 << 10, {"cluster": 2, "chunk": 3, "vec": 1}),
        ((1, 20, 64, 64), 2, "contiguous", 64 << 10, {"cluster": 2, "chunk": 20480, "vec": 8}),
        ((2, 10, 33, 31), 2, "contiguous", 3 << 10, {"cluster": 8, "chunk": 640, "vec": 1}),
        # a device without clusters: 20 channels in accesses of 64 bits; 128 would take two groups, 80 KB
        ((1, 40, 32, 32), 2, "channels_last", 163 << 10, {"cluster": 1, "whole": True, "vec": 4, "span": 20}),
    ],
    ids=str,
)
def test_how_group_norm_is_cut(
    shape: Any,
    groups: int,
    layout: str,
    limit: int,
    plan: dict[str, int],
    check: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(emulated, "CLUSTER", 1 if plan.get("cluster") == 1 else emulated.CLUSTER)
    call = NORM.make(shape, torch.float16, layout, NORM.OPTIONS["all"])
    found = emulated.GroupNormPlan()
    per_image = ("x", "scale", "shift", "add", "residual")

    def kernels(images: slice) -> tuple[torch.Tensor, ...]:
        x, scale, shift, add, residual = (call[name][images] for name in per_image)
        head, tail = (
            (x, groups, call["weight"], call["bias"], 1e-5, True),
            (scale, shift, add, residual, True),
        )
        return emulated.group_norm_silu(*head, *tail, shared_limit=limit, plan=found)

    got = kernels(slice(None))
    assert {name: getattr(found, name) for name in plan} == plan
    if found.cluster > 1 and shape[0] > 1:
        for together, alone in zip(got, kernels(slice(1, None)), strict=True):
            assert torch.equal(together[1:], alone), "other bits in a batch"
    eager = NORM.run("reference", call, groups)
    oracle = NORM.run("reference", NORM.wide(call), groups)
    for ours, theirs, exact in zip(got, eager, oracle, strict=True):
        check(ours, theirs, exact)


ATTENTION = suite("attention")
HALF = (torch.float16, torch.bfloat16)
# B, H, L, S, D, Dv, multiprocessors of the device: every width, one and two groups of warps along the keys,
# one to four warps along the queries, sizes around 16, 32, 64 and 128
SHAPES = [
    (2, 3, 16, 16, 8, 8, 132),
    (1, 2, 33, 77, 40, 40, 132),
    (1, 1, 1, 1, 64, 40, 132),
    (1, 1, 130, 97, 64, 64, 1),
    (1, 1, 65, 31, 80, 72, 1),
    (1, 1, 17, 129, 96, 96, 132),
    (1, 2, 20, 64, 128, 128, 4),
    (1, 1, 70, 100, 160, 160, 2),
    (1, 1, 1100, 40, 40, 40, 1),
    (1, 2, 65, 70, 256, 168, 132),
    (1, 1, 33, 129, 512, 512, 132),
]
# The same for fp32: every width, columns in pieces of 1, 2 and 4, one to four warps, one query, one key
FP32_SHAPES = [
    (2, 2, 33, 77, 40, 36, 132),
    (1, 1, 130, 65, 64, 64, 1),
    (1, 1, 70, 33, 80, 80, 1),
    (1, 1, 1, 1, 96, 4, 132),
    (1, 1, 17, 40, 128, 128, 132),
    (1, 2, 40, 31, 160, 160, 4),
    (1, 1, 20, 40, 256, 168, 132),
    (1, 1, 9, 33, 512, 512, 132),
]


class TestAttention:
    test_no_keys_give_zeros = staticmethod(ATTENTION.test_no_keys_give_zeros)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_against_the_oracle(self, shape: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        *sizes, multiprocessors = shape
        monkeypatch.setattr(emulated, "MULTIPROCESSORS", multiprocessors)
        b, h, length, keys, d, dv = sizes
        masks = (None, torch.rand(b, 1, 1, keys) > 0.3, torch.randn(b, 1, length, keys))
        for number, dtype in enumerate(HALF):
            q, k, v = (ATTENTION.heads(b, h, n, w, dtype) for n, w in ((length, d), (keys, d), (keys, dv)))
            some = masks if d < 256 else (masks[::2], masks[1:2])[number]  # wide heads take their time
            for mask in some if length < 1000 else masks[: 1 + number]:
                whole = mask if mask is None or mask.dtype is torch.bool else mask.to(dtype)
                ATTENTION.compare("cpu", check, q, k, v, whole)

    @pytest.mark.parametrize("shape", FP32_SHAPES, ids=str)
    def test_fp32_against_the_oracle(self, shape: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        b, h, length, keys, d, dv, multiprocessors = shape
        monkeypatch.setattr(emulated, "MULTIPROCESSORS", multiprocessors)
        sizes = ((length, d), (keys, d), (keys, dv))
        q, k, v = (ATTENTION.heads(b, h, n, width, torch.float32) for n, width in sizes)
        masks = (None, torch.rand(b, 1, 1, keys) > 0.3, torch.randn(b, 1, length, keys))
        for mask in masks if d in (40, 256) else masks[:1]:
            got = ATTENTION.compare("cpu", check, q, k, v, mask)
        if b > 1:  # alone, and with other queries, the same bits
            part = [t[1:, 1:] for t in (q[:, :, 5:30], k, v, mask.expand(b, h, -1, -1)[:, :, 5:30])]
            assert torch.equal(ops.attention(*part[:3], mask=part[3]), got[1:, 1:, 5:30])

    @pytest.mark.parametrize("mask", ATTENTION.MASKS)
    def test_masks_of_any_shape_and_strides(self, mask: str, check: Any) -> None:
        dtype = torch.float32 if mask in ("queries", "transposed") else torch.bfloat16
        q, k, v = (ATTENTION.heads(2, 3, n, 24, dtype) for n in (70, 77, 77))
        made = ATTENTION.MASKS[mask]()
        ATTENTION.compare("cpu", check, q, k, v, made if made.dtype is torch.bool else made.to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_a_query_whose_keys_are_all_masked_gets_zeros(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ATTENTION, "some_dtype", lambda backend: dtype)
        ATTENTION.test_a_query_whose_keys_are_all_masked_gets_zeros("cpu")

    @pytest.mark.parametrize("size", [1e-30, 1e-3, 300.0, 1e15])
    @pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
    def test_huge_and_tiny_values(self, size: float, dtype: torch.dtype, check: Any) -> None:
        ATTENTION.test_huge_and_tiny_values("cpu", size, dtype, check)

    @pytest.mark.parametrize("scale", [0.7, -0.7, 0.0, 50.0])
    def test_scale(self, scale: float, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = torch.float32 if scale in (-0.7, 50.0) else torch.float16
        monkeypatch.setattr(ATTENTION, "some_dtype", lambda backend: ours)
        ATTENTION.test_scale("cpu", scale, check)

    @pytest.mark.parametrize("width", [8, 168])
    def test_scores_that_climb(self, width: int, check: Any) -> None:
        """Every step over the keys passes the highest score so far, by little or by much."""
        q, v = torch.ones(1, 1, 40, width).half(), torch.randn(1, 1, 300, width).half()
        q *= torch.linspace(0.01, 4, 40).half()[:, None]
        k = torch.linspace(-8, 8, 300).half()[:, None].expand(1, 1, 300, width).contiguous()
        for scale in (8**0.5 / width, -(8**0.5) / width):
            ATTENTION.compare("cpu", check, q, k, v, None, scale=scale)
        if width == 8:
            ATTENTION.compare("cpu", check, q.float(), k.float(), v.float(), None, scale=0.35)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_nan_and_infinity_stay_where_they_belong(self, dtype: torch.dtype) -> None:
        ATTENTION.test_nan_and_infinity_stay_where_they_belong("cpu", dtype)

    @pytest.mark.parametrize("how", ["of one projection", "heads first"])
    def test_strides_do_not_matter(self, how: str, check: Any) -> None:
        q, k, v = (ATTENTION.heads(2, 3, n, 24, torch.float16) for n in (70, 77, 77))
        others = [ATTENTION.strided(x, how) for x in (q, k, v)]
        assert others[0].stride() != q.stride()
        got = ATTENTION.compare("cpu", check, *others, None)
        assert torch.equal(got, ops.attention(q, k, v))
        assert got.transpose(1, 2).flatten(2).data_ptr() == got.data_ptr()

    def test_bits_do_not_depend_on_batch_head_grid_or_the_other_queries(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        q, k, v = (ATTENTION.heads(3, 2, n, 40, torch.float16) for n in (140, 100, 100))
        together = ops.attention(q, k, v)
        assert torch.equal(together[1:2, 1:], ops.attention(*(t[1:2, 1:] for t in (q, k, v))))
        assert torch.equal(together[:, :, 70:90], ops.attention(q[:, :, 70:90], k, v))
        wide = [ATTENTION.heads(2, 1, n, 264, torch.float16) for n in (70, 20, 20)]
        assert torch.equal(
            ops.attention(*wide)[1:, :, 40:], ops.attention(wide[0][1:, :, 40:], *(t[1:] for t in wide[1:]))
        )
        monkeypatch.setattr(emulated, "MULTIPROCESSORS", 1)
        assert torch.equal(together, ops.attention(q, k, v))

    @pytest.mark.parametrize("case", ATTENTION.GRADIENT_CASES[:-1], ids=str)
    def test_gradients(self, case: Any, check: Any) -> None:
        b, h, length, keys, d, dv = case
        sizes = ((length, d), (keys, d), (keys, dv), (length, dv))
        known = torch.rand(b, 1, length, keys) > 0.3
        known[:, :, 3] = False  # a query without keys
        masks = {
            torch.float16: [None, known],
            torch.bfloat16: [torch.randn(b, 1, 1, keys)],
            torch.float32: [known if d == 40 else None],
        }
        for dtype, scale in zip((*HALF, torch.float32), (d**-0.5, -0.2, 0.3), strict=True):
            q, k, v, grad = (ATTENTION.heads(b, h, n, width, dtype) for n, width in sizes)
            for mask in masks[dtype] if d != 64 else [None]:
                whole = mask if mask is None or mask.dtype is torch.bool else mask.to(dtype)
                out, sums = emulated.attention_with_sums(q, k, v, whole, scale)
                assert torch.equal(out, ops.attention(q, k, v, mask=whole, scale=scale))
                got = emulated.attention_gradients(grad, q, k, v, whole, out, sums, scale)

                def call(*tensors: Any, mask: Any = whole, scale: float = scale) -> torch.Tensor:
                    if mask is not None and mask.dtype is not torch.bool:
                        mask = mask.to(tensors[0].dtype)
                    sdpa = torch.nn.functional.scaled_dot_product_attention
                    return sdpa(*tensors, attn_mask=mask, scale=scale)

                eager = ATTENTION.gradients(call, q, k, v, grad)
                oracle = ATTENTION.gradients(call, *(t.double() for t in (q, k, v, grad)))
                for ours, theirs, true in zip(got, eager, oracle, strict=True):
                    check(ours, theirs, true)

    def test_gradients_in_fp32_do_not_depend_on_how_many_rows_a_block_has(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        q, k, v, grad = (torch.randn(1, 1, n, 128) for n in (70, 40, 40, 70))
        mask = torch.randn(70, 40)
        out, sums = emulated.attention_with_sums(q, k, v, mask, 0.3)
        results = []
        for limit in (227, 64):  # four warps, two
            monkeypatch.setattr(emulated, "SHARED_LIMIT", limit << 10)
            results.append(emulated.attention_gradients(grad, q, k, v, mask, out, sums, 0.3))
        assert all(map(torch.equal, *results))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_gradients_of_scores_that_are_all_low(self, dtype: torch.dtype) -> None:
        """A key that is not there has a score of 0: the highest, were it not left out."""
        q, k = (torch.full((1, 1, 3, 8), size, dtype=dtype) for size in (20.0, -20.0))
        v, grad = (torch.randn(1, 1, 3, 8, dtype=dtype) for _ in range(2))
        out, sums = emulated.attention_with_sums(q, k, v, None, 1.0)
        assert all(
            torch.isfinite(t).all() for t in emulated.attention_gradients(grad, q, k, v, None, out, sums, 1.0)
        )

    def test_what_is_read_lies_within_the_tensors(self) -> None:
        """The last query, key and value are the last bytes of their page; beyond it nothing may be read."""
        for dtype in (torch.float32, torch.float16):
            tensors = [emulated.at_the_end_of_a_page(1, 2, n, 40, dtype) for n in (33, 77, 77)]
            out, sums = emulated.attention_with_sums(*tensors, None, 0.1)
            grad = emulated.at_the_end_of_a_page(1, 2, 33, 40, dtype)
            results = emulated.attention_gradients(grad, *tensors, None, out, sums, 0.1)
            assert all(torch.isfinite(t).all() for t in (out, *results))


@pytest.mark.parametrize(
    ("length", "keys", "width", "limit", "plan"),
    [
        (4096, 4096, 40, 227, {"width": 40, "warps": 4, "groups": 1, "tile_keys": 64, "rows": 128}),
        (1024, 1024, 80, 227, {"width": 80, "warps": 4, "groups": 2, "threads": 256}),
        (4096, 4096, 64, 99, {"tile_keys": 64, "shared_bytes": 3 * 2 * 64 * 9 * 16}),
        (4096, 4096, 160, 99, {"tile_keys": 32, "groups": 1, "shared_bytes": 3 * 2 * 32 * 21 * 16}),
        (256, 256, 160, 64, {"tile_keys": 32, "rows": 32}),
        (64, 64, 160, 227, {"warps": 1, "groups": 2, "rows": 16, "blocks": 4}),
        (4096, 77, 48, 227, {"width": 64}),
        (4096, 4096, 512, 227, {"width": 512, "rows": 64, "blocks": 64, "shared_bytes": 209920}),
        (256, 256, 256, 227, {"width": 256, "threads": 256, "shared_bytes": 111616}),
        (4096, 4096, -64, 227, {"rows": 128, "tile_keys": 32, "threads": 128, "shared_bytes": 70656}),
        (4096, 4096, -64, 64, {"rows": 64, "threads": 64, "shared_bytes": 44032}),
        (4096, 4096, -512, 99, {"rows": 16, "tile_keys": 16, "shared_bytes": 100352}),
        (64, 64, -512, 227, {"rows": 8, "shared_bytes": 83200}),
        (64, 64, -256, 227, {"rows": 16, "shared_bytes": 51200}),
    ],
    ids=str,
)
def test_how_attention_is_cut(length: int, keys: int, width: int, limit: int, plan: dict[str, int]) -> None:
    """A width below 0 stands for fp32."""
    dtype = torch.float32 if width < 0 else torch.float16
    found = emulated.attention_plan(2, 8, length, keys, abs(width), limit << 10, dtype)
    assert {name: getattr(found, name) for name in plan} == plan


def test_what_the_package_asks_a_device_for_is_what_the_kernels_take() -> None:
    """Bytes of shared memory; less, and a call that is taken would fail when it is launched."""
    module, limit = importlib.import_module("difusores.ops.attention"), 227 << 10
    bytes_of = emulated.library("attention").attention_gradient_bytes
    assert {width: bytes_of(width) for width in (128, 160)} == module._GRADIENT_BYTES
    assert bytes_of(96) <= 64 << 10
    for dtype in (torch.float16, torch.float32):
        least = emulated.attention_plan(2, 8, 64, 64, 160, 64 << 10, dtype)
        assert least.shared_bytes <= 64 << 10, "what every card has"
        plans = {d: emulated.attention_plan(2, 8, 64, 64, d, limit, dtype) for d in (256, 512)}
        assert {d: plan.shared_bytes for d, plan in plans.items()} == module._SHARED_BYTES[dtype.itemsize]


@pytest.mark.parametrize("op", emulated.OPS)
def test_the_compiler_and_the_emulation_make_the_same_kernels(op: str) -> None:
    """Of templates; wgmma has no emulation."""
    prefix = "group_norm" if op.startswith("group_norm") else op
    path = emulated.library(prefix.replace("group_norm", "group_norm_silu"))._name
    listing = cuda_budget.output_of("nm", "-D", "-C", "--defined-only", path)
    defined = {cuda_budget.shortened(line.split(maxsplit=2)[2]) for line in listing.splitlines()}
    budget = {name for name in BUDGET["sm_80"] if name.startswith(prefix) and "wgmma" not in name}
    kernels = {name.split("<")[0] for name in budget}
    found = {name for name in defined if name.split("<")[0] in kernels and "lambda" not in name}
    assert found == budget
