"""Plans as data, and the sampling loop: noise, guidance, slots, buffers, threads."""

from __future__ import annotations

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from difusores import schedules
from difusores.ops.scheduler_step import CIN, COLUMNS, DRAW, MODE, PE, PX, W, philox_normal
from difusores.plan import make_row
from difusores.sampling import draw_noise, dynamic_threshold
from difusores.schedulers import DDIMScheduler, DDPMScheduler
from difusores.solvers import Noise, Plan, Prediction, Stage, Threshold, ddim, ddpm

BETAS = schedules.betas("linear", 100, 0.001, 0.2)
ALPHAS = schedules.alphas_cumprod(BETAS).tolist()
TIMES = schedules.timesteps("leading", 10, 100)
STEPS = list(pairwise([*TIMES, -1]))
SHAPE = (3, 2, 5, 4)


def make_plan(stages: Any, **options: Any) -> Plan:
    return Plan("test", tuple(stages), prediction_type="epsilon", betas=tuple(BETAS.tolist()), **options)


def plans() -> dict[str, Plan]:
    threshold = Prediction("v_prediction", threshold=Threshold(0.9, 2.0))
    return {
        "ddim": make_plan(ddim(ALPHAS, STEPS, Prediction(clip=1.0))),
        "eta": make_plan(ddim(ALPHAS, STEPS, Prediction("sample"), eta=0.7, use_clipped_model_output=True)),
        "threshold": make_plan(ddpm(ALPHAS, STEPS, threshold)),
        "learned": make_plan(ddpm(ALPHAS, STEPS, Prediction(clip=1.5), variance_type="learned_range")),
    }


def start(dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def model(x: Tensor, t: Tensor) -> Tensor:
    """Not linear, and different at every time and place."""
    return torch.sin(3 * x + t.to(x.dtype) / 50) * torch.linspace(
        0.5, 1, x[0].numel(), dtype=x.dtype
    ).view_as(x[0])


def two_halves(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([model(x, t), torch.cos(x)], dim=1)


def test_a_plan_is_a_value() -> None:
    for name, plan in plans().items():
        twin = plans()[name]
        assert plan == twin and hash(plan) == hash(twin) and plan is not twin
        assert all(plan != other for key, other in plans().items() if key != name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            plan.stages = ()  # type: ignore[misc]
        with pytest.raises(dataclasses.FrozenInstanceError):
            plan.stages[0].time = 3  # type: ignore[misc]
        plan.table().zero_()
        assert plan == twin and plan.table().abs().sum() > 0
        assert plan.table().dtype is torch.float64 and plan.table().shape == (10, 40)
        assert plan.times().tolist() == TIMES and plan.times().dtype is torch.int64
        assert make_plan(plan.stages, continuous=True).times().dtype is torch.float32


def test_a_plan_becomes_json_and_back() -> None:
    for plan in plans().values():
        text = plan.to_json()
        assert Plan.from_json(text) == plan
        # standard JSON: no bare Infinity
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    for wrong in ("[]", "{}", '{"stages": [{}]}', '{"stages": [], "more": 1}'):
        with pytest.raises(ValueError, match="not a plan"):
            Plan.from_json(wrong)


def test_a_plan_prints_as_a_table() -> None:
    lines = str(plans()["eta"]).splitlines()
    assert lines[0] == "test: 10 stages, predicts epsilon, discrete time" and len(lines) == 11
    assert lines[1].split()[:4] == ["0", "t", "=", "90"] and lines[1].endswith("; draws 1")
    assert "z = z exp(" in str(plans()["learned"]) and "in [-1.5, 1.5]" in str(plans()["learned"])
    assert "threshold at quantile 0.9 <= 2" in str(plans()["threshold"])
    churned = make_row((1, 0), {"x0": 1, "s0": -0.5}, d={"e": 2}, churn=0.25, mode=2)
    text = str(make_plan([Stage(0.5, churned, slots=("d",))]))
    assert "x = x +0.25 z; x0 = +1 x; z = z sqrt(v); y = +1 x0 -0.5 s0; d = +2 e; slots <- d" in text


def test_rows_are_linked() -> None:
    row = make_row((1, 0), {"x0": 1})
    plan = make_plan([Stage(2, row, c_in=0.5), Stage(1, row, c_in=0.25)])
    assert [stage.row[CIN] for stage in plan.stages] == [0.25, 1.0]
    assert [stage.row[DRAW] for stage in plan.stages] == [1.0, 2.0]
    assert Plan.from_json(plan.to_json()) == plan


def test_wrong_plans_are_refused() -> None:
    row = make_row((1, 0), {"x0": 1})
    with pytest.raises(ValueError, match="at least one stage"):
        make_plan([])
    with pytest.raises(ValueError, match="40 numbers, got 3"):
        Stage(0, (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="not finite"):
        Stage(0, make_row((math.inf, 0), {"x0": 1}))
    with pytest.raises(ValueError, match="slots"):
        Stage(0, row, slots=("w",))
    with pytest.raises(ValueError, match="prediction_type"):
        Prediction("score")
    with pytest.raises(ValueError, match="variance_type"):
        next(ddpm(ALPHAS, STEPS, Prediction(), variance_type="large"))
    for solver in (ddpm, ddim):
        for t in (100, -1):
            with pytest.raises(IndexError, match=f"timestep {t} is outside"):
                next(solver(ALPHAS, [(t, 5)], Prediction()))


def test_eta_that_fills_the_variance_but_for_rounding_is_taken() -> None:
    steps, prediction = [(1, 0)], Prediction("v_prediction")
    stage = next(ddim([0.3, 0.0], steps, prediction, eta=1 + 1e-14))
    assert stage.row[W + COLUMNS.index("e")] == 0
    assert stage.row[W + COLUMNS.index("z")] == pytest.approx(math.sqrt(0.7))
    with pytest.raises(ValueError, match=r"eta = 1\.01"):
        next(ddim([0.3, 0.0], steps, prediction, eta=1.01))


def test_ddim_at_eta_one_has_the_coefficients_of_ddpm() -> None:
    # Song et al. 2021, section 4.1
    for one, other in zip(
        ddim(ALPHAS, STEPS, Prediction(), eta=1.0), ddpm(ALPHAS, STEPS, Prediction()), strict=True
    ):
        x = {name: one.row[W + COLUMNS.index(name)] for name in COLUMNS}
        y = {name: other.row[W + COLUMNS.index(name)] for name in COLUMNS}
        a = ALPHAS[int(one.time)]
        # e = (x - sqrt(a) x0) / sqrt(1 - a)
        assert x["x0"] - x["e"] * math.sqrt(a / (1 - a)) == pytest.approx(y["x0"], abs=1e-12)
        assert x["e"] / math.sqrt(1 - a) == pytest.approx(y["xh"], abs=1e-12)
        assert x["z"] == pytest.approx(y["z"], abs=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["one", "list", "global"])
@pytest.mark.parametrize("name", ["ddim", "eta", "threshold", "learned"])
def test_run_is_the_loop_of_steps(name: str, kind: str, layout: torch.memory_format) -> None:
    plan = plans()[name]
    network = two_halves if name == "learned" else model
    options: dict[str, Any] = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2}
    options |= {
        "ddim": {},
        "eta": {"prediction_type": "sample", "clip_sample": False},
        "threshold": {
            "prediction_type": "v_prediction",
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.9,
            "sample_max_value": 2.0,
        },
        "learned": {"clip_sample_range": 1.5, "variance_type": "learned_range"},
    }[name]
    steps = {"eta": {"eta": 0.7, "use_clipped_model_output": True}}.get(name, {})
    scheduler = (DDIMScheduler if name in ("ddim", "eta") else DDPMScheduler)(**options)
    scheduler.set_timesteps(10)
    built = scheduler.plan(10, **steps)
    assert built.stages == plan.stages and built.betas == plan.betas

    def source() -> Any:
        if kind == "list":
            return [torch.Generator().manual_seed(k) for k in range(SHAPE[0])]
        torch.manual_seed(7)
        return torch.Generator().manual_seed(7) if kind == "one" else None

    x = start().to(memory_format=layout)
    kept, generator = x.clone(), source()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **steps, generator=generator, return_dict=False)[0]
    result = plan.run(network, kept, generator=source())
    assert torch.equal(result, x) and result.is_contiguous(memory_format=layout)
    assert torch.equal(kept, start())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_noise_has_the_bits_of_diffusers(dtype: torch.dtype) -> None:
    their = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor
    cpu = torch.device("cpu")
    for shape in ((2, 3), (3, 2, 5, 4), (2, 4, 64, 64), (1, 7)):
        for seeds in ([5], list(range(shape[0]))):

            def sources(seeds: list[int] = seeds) -> list[torch.Generator]:
                return [torch.Generator().manual_seed(seed) for seed in seeds]

            for pick in (list, lambda generators: generators[0]):
                wanted = their(shape, pick(sources()), cpu, dtype)
                assert torch.equal(draw_noise(shape, pick(sources()), cpu, dtype), wanted)
                used = torch.full(shape, float("nan"), dtype=dtype)
                assert draw_noise(shape, pick(sources()), cpu, dtype, out=used) is used
                assert torch.equal(used, wanted)


def test_noise_errors() -> None:
    with pytest.raises(ValueError, match="3 images, 2 generators"):
        draw_noise((3, 4), [torch.Generator(), torch.Generator()], torch.device("cpu"), torch.float32)


def test_guidance_is_combined_inside_the_op() -> None:
    plan = plans()["eta"]

    def halves(x: Tensor, t: Tensor) -> Tensor:
        assert x.shape == (2 * SHAPE[0], *SHAPE[1:]) and torch.equal(*x.chunk(2))
        first, second = x.chunk(2)
        return torch.cat([model(first, t), model(-second, t)])

    def combined(x: Tensor, t: Tensor) -> Tensor:
        return 3.0 * model(x, t) - 2.0 * model(-x, t)

    results = [
        plan.run(network, start(torch.float64), generator=torch.Generator().manual_seed(0), **options)
        for network, options in ((halves, {"guidance": (3.0, -2.0)}), (combined, {}))
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    thirds = plan.run(
        lambda x, t: model(x, t), start(), guidance=(0.5, 0.25, 0.25), noise="philox", seeds=[1, 2, 3]
    )
    whole = plan.run(model, start(), noise="philox", seeds=[1, 2, 3])
    torch.testing.assert_close(thirds, whole, rtol=1e-4, atol=1e-4)
    for weights in ((), (1.0, 1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="one to three weights"):
            plan.run(model, start(), guidance=weights)


def test_guidance_takes_the_learned_variance_of_the_first() -> None:
    plan = plans()["learned"]

    def halves(x: Tensor, t: Tensor) -> Tensor:
        output = two_halves(x, t)
        output[SHAPE[0] :, SHAPE[1] :] = float("nan")
        return output

    results = [
        plan.run(network, start(), generator=torch.Generator().manual_seed(0), guidance=weights)
        for network, weights in ((halves, (0.5, 0.5)), (two_halves, None))
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_philox_noise_belongs_to_the_image() -> None:
    plan = plans()["eta"]
    together = plan.run(model, start(), noise="philox", seeds=torch.tensor([11, 12, 13]))
    alone = plan.run(model, start()[1:2].clone(), noise="philox", seeds=[12])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)
    x = start(torch.float64)
    for i, stage in enumerate(plan.stages):
        z = philox_normal(torch.tensor([11, 12, 13]), SHAPE, i + 1, torch.float64)
        e, row = model(x, plan.times()[i]), stage.row
        x0 = row[PX] * x + row[PE] * e
        x = sum(row[W + COLUMNS.index(n)] * t for n, t in (("x0", x0), ("xh", x), ("e", e), ("z", z)))
    torch.testing.assert_close(together.double(), x, rtol=1e-4, atol=1e-4)


def test_noise_options_are_checked() -> None:
    plan = plans()["eta"]
    for options, words in (
        ({"noise": "perlin"}, "'perlin'"),
        ({"noise": "philox"}, "needs seeds"),
        ({"seeds": [1, 2, 3]}, "takes none"),
        ({"noise": "philox", "seeds": [1, 2, 3], "generator": torch.Generator()}, "pass no generator"),
        ({"noise": "philox", "seeds": [1, 2]}, r"\[B\] = \[3\], got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            plan.run(model, start(), **options)


def test_a_model_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"returned \(3, 1, 5, 4\)"):
        plans()["ddim"].run(lambda x, t: x[:, :1], start())
    with pytest.raises(ValueError, match="a learned variance need"):
        plans()["learned"].run(model, start())


def test_a_variance_that_the_plan_does_not_use_is_left_out() -> None:
    plan = plans()["ddim"]
    assert torch.equal(plan.run(two_halves, start()), plan.run(model, start()))
    assert torch.equal(plan.run(lambda x, t: (model(x, t), None), start()), plan.run(model, start()))


def test_a_model_may_return_its_own_input() -> None:
    plan = make_plan([Stage(t, make_row((0, 1), {"x0": 0.5, "xh": 0.25}), c_in=0.5 + t) for t in (3, 2, 1)])
    addresses = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        addresses.append(x.data_ptr())
        return x

    x = expected = start()
    for c_in in (3.5, 2.5, 1.5):
        expected = 0.5 * c_in * expected + 0.25 * expected
    torch.testing.assert_close(plan.run(network, x), expected)
    # the next input is written while this one, returned as the output, is read
    assert all(one != other for one, other in pairwise(addresses))


def test_the_model_is_given_its_dtype_and_scale() -> None:
    seen = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert t.ndim == 0 and not torch.is_grad_enabled()
        seen.append(x.clone())
        return model(x, t)

    rows = [make_row((1, -0.5), {"x0": 0.9}) for _ in range(3)]
    plan = make_plan(
        [Stage(3 - i, row, c_in=c) for i, (row, c) in enumerate(zip(rows, (2.0, 1.0, 0.5), strict=True))]
    )
    samples = [start()]
    plan.run(network, start(), model_dtype=torch.bfloat16, callback=lambda i, t, x: samples.append(x.clone()))
    for x, sample, c_in in zip(seen, samples, (2.0, 1.0, 0.5), strict=False):
        assert x.dtype is torch.bfloat16 and torch.equal(x, (c_in * sample).bfloat16())
    assert len(seen) == 3 and len(samples) == 4
    wide = plan.run(lambda x, t: model(x, t).float(), start(), model_dtype=torch.bfloat16)
    assert wide.dtype is torch.float32 and torch.equal(samples[-1], wide)


def test_callbacks_see_every_stage_and_may_replace_the_sample() -> None:
    plan, seen = plans()["ddim"], []

    def callback(i: int, t: Tensor, x: Tensor) -> Tensor | None:
        seen.append((i, int(t)))
        return x.flip(0).contiguous() if i == 4 else None

    result = plan.run(model, start(), callback=callback)
    assert seen == list(enumerate(TIMES))
    first, second = (make_plan(part) for part in (plan.stages[:5], plan.stages[5:]))
    expected = second.run(model, first.run(model, start()).flip(0))
    assert torch.equal(result, expected)
    with pytest.raises(ValueError, match="a sample stays"):
        plan.run(model, start(), callback=lambda i, t, x: x.double())


def test_slots_hold_what_the_stage_binds() -> None:
    # Adams-Bashforth of order 2 on dx/dt = e, which remembers one slope, and one that remembers everything
    # else
    euler = make_row((1, 0), {"x0": 1, "e": 0.1}, d={"e": 1})
    second = make_row((1, 0), {"x0": 1, "e": 0.15, "s0": -0.05}, d={"e": 1})
    plan = make_plan(
        [Stage(9, euler, slots=("d",)), *(Stage(t, second, slots=("d",)) for t in range(8, 0, -1))]
    )
    x, before = start(torch.float64), None
    for t in plan.times():
        e = model(x, t)
        x = x + (0.1 * e if before is None else 0.15 * e - 0.05 * before)
        before = e
    torch.testing.assert_close(plan.run(model, start(torch.float64)), x, rtol=1e-12, atol=1e-12)

    names = ("x", "y", "x0", "d", "u")
    fill = make_row((0.5, 0.25), {"x0": 0.5, "xh": 0.25}, d={"xh": 2}, u={"e": -1})
    read = make_row((0, 0), {f"s{k}": float(k + 1) for k in range(5)})
    keep = Stage(1, make_row((0, 0), {"xh": 0.5}), slots=("s4", "s3", "s2", "s1", "s0"))
    plan = make_plan([Stage(2, fill, slots=names), keep, Stage(0, read)])
    x = start(torch.float64)
    e = model(x, torch.tensor(2))
    x0 = 0.5 * x + 0.25 * e
    held = {"x": x, "y": 0.5 * x0 + 0.25 * x, "x0": x0, "d": 2 * x, "u": -e}
    expected = sum((k + 1) * held[name] for k, name in enumerate(reversed(names)))
    torch.testing.assert_close(plan.run(model, x), expected, rtol=1e-12, atol=1e-12)


def test_noise_in_a_slot_is_kept_and_several_draws_are_drawn() -> None:
    first = make_row((1, 0), {"x0": 1, "z": 0.5})
    later = make_row((1, 0), {"x0": 1, "z": 1, "s0": 3})
    plan = make_plan(
        [
            Stage(3, first, noise=Noise(), slots=("z",)),
            Stage(2, later, noise=Noise(2), slots=("s0",)),
            Stage(1, later, noise=Noise(1, "float32")),
        ]
    )
    draws = torch.Generator().manual_seed(1)
    z = [torch.randn(SHAPE, generator=draws, dtype=torch.float64) for _ in range(3)]
    last = torch.randn(SHAPE, generator=draws, dtype=torch.float32).double()
    expected = start(torch.float64) + 0.5 * z[0] + (z[2] + 3 * z[0]) + (last + 3 * z[0])
    result = plan.run(model, start(torch.float64), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_a_run_uses_its_buffers_again() -> None:
    addresses = set()
    plans()["ddim"].run(model, start(), callback=lambda i, t, x: addresses.add(x.data_ptr()))
    assert len(addresses) == 2


@pytest.mark.parametrize(
    "make", [lambda x: x.transpose(2, 3), lambda x: x[..., ::2], lambda x: x.transpose(0, 1)]
)
def test_samples_in_any_memory_layout(make: Any) -> None:
    plan = plans()["eta"]
    options: dict[str, Any] = {"guidance": (0.5, 0.5), "model_dtype": torch.float64}
    x = make(torch.randn(4, 4, 4, 4))
    network = lambda x, t: torch.sin(x)  # noqa: E731
    results = [
        plan.run(network, layout, generator=torch.Generator().manual_seed(0), **options)
        for layout in (x, x.contiguous())
    ]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_dynamic_threshold() -> None:
    x0 = torch.tensor([[0.0, -1.0, 2.0, 3.0, 4.0], [0.1, 0.2, -0.3, 0.4, 0.5]])
    assert dynamic_threshold(x0, 0.75, 10.0).tolist() == [3.0, 1.0]
    assert dynamic_threshold(x0.half(), 1.0, 3.5).tolist() == [3.5, 1.0]
    assert dynamic_threshold(x0.double().view(2, 5, 1, 1, 1), 0.875, 10.0).tolist() == [3.5, 1.0]
    assert dynamic_threshold(x0[:0], 0.5, 1.0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_threshold_is_the_quantile(dtype: torch.dtype) -> None:
    """Bit for bit, from one number to many; a NaN in an image makes its threshold NaN and no other."""
    for numbers, ratio in (
        (1, 0.995),
        (2, 0.5),
        (40, 0.9),
        (101, 0.99),
        (3 * 77 * 64, 0.995),
        (7, 1.0),
        (9, 0.0),
    ):
        x0 = 3 * torch.randn(3, numbers, dtype=dtype)
        wanted = torch.stack([torch.quantile(image.abs(), ratio) for image in x0])
        assert torch.equal(dynamic_threshold(x0, ratio, 1e9), wanted.clamp(min=1))
    x0[1, 3] = math.nan
    found = dynamic_threshold(x0, 0.5, 1e9)
    assert found.isnan().tolist() == [False, True, False]


def test_threads_that_share_a_plan_get_what_they_get_alone() -> None:
    for name in ("eta", "threshold", "learned"):
        plan = plans()[name]

        def sample(seed: int, plan: Plan = plan, name: str = name) -> Tensor:
            network = two_halves if name == "learned" else model
            return plan.run(network, start(seed=seed), generator=torch.Generator().manual_seed(seed))

        alone = [sample(seed) for seed in range(6)]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(sample, range(6)))
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
        assert not torch.equal(alone[0], alone[1])


def test_learned_rows_read_the_variance() -> None:
    for kind, mode in (("learned", 2), ("learned_range", 1), ("fixed_large", 0)):
        stage = next(ddpm(ALPHAS, STEPS, Prediction(), variance_type=kind))
        assert stage.row[MODE] == mode
