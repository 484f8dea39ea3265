"""Approximations of `accelerate`: off by default, what each does, the exact network again after restore."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_accelerate import BOUND, PIXELS, distance, inputs, make, run
from torch import Tensor, nn

import difusores
from difusores.acceleration.feature_cache import CachedForward, cached_modules
from difusores.acceleration.layers import LayerForward
from difusores.acceleration.session import SESSION
from difusores.acceleration.token_merging import Merging

ALL = ("int8", "feature_cache", "token_merging")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["difusores", "diffusers"])
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def steps(model: nn.Module, times: list[int], case: tuple[Tensor, ...], change: float = 0.98) -> list[Tensor]:
    """What the model makes of images that change a little from step to step."""
    x, _, *rest = case
    results = []
    for t in times:
        results.append(run(model, x, torch.tensor(t), *rest))
        x = x * change + 0.02 * torch.ones_like(x)
    return results


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("latents", ("int8",)),
        ("latents", ("feature_cache",)),
        ("latents", ("token_merging",)),
        ("latents", ALL),
        ("pixels", ("int8", "feature_cache")),
    ],
)
def test_near_the_exact_result_and_back(library: str, variant: str, names: tuple[str, ...]) -> None:
    model, cases = make(library, variant), [inputs(variant, 2, (12, 16)), inputs(variant, 1, (8, 8))]
    plain = [steps(model, [900, 880, 860, 840], case) for case in cases]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = difusores.accelerate(model, approximate=names)
    if "int8" in names:
        difusores.calibrate(model, lambda: [steps(model, [900, 400], case) for case in cases])
    merges = "token_merging" in names and variant == "latents"
    for case, wanted in zip(cases, plain, strict=True):
        got = steps(model, [900, 880, 860, 840], case)
        for i, (result, want) in enumerate(zip(got, wanted, strict=True)):
            far = distance(result, want.double())
            exact = "int8" not in names and not merges and (i % 3 == 0 or "feature_cache" not in names)
            assert far <= (BOUND if exact else 0.2) and (exact or far > 1e-4), (names, i, far)
        assert all(map(torch.equal, got, steps(model, [900, 880, 860, 840], case)))  # the same run twice
    forwards = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    difusores.accelerate(model, approximate=names)
    assert forwards == {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    assert report.packed_bytes <= 1.2 * report.model_bytes
    difusores.restore(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(map(torch.equal, steps(model, [900, 880, 860, 840], cases[0]), plain[0]))


def test_nothing_is_approximate_unless_asked_for() -> None:
    model = make("difusores", "latents")
    difusores.accelerate(model)
    assert not any(isinstance(m.__dict__.get("forward"), CachedForward) for m in model.modules())
    assert not any(getattr(m.__dict__.get("forward"), "quantized", None) for m in model.modules())
    difusores.accelerate(model, approximate=("feature_cache",))
    difusores.accelerate(model)
    assert not any(isinstance(m.__dict__.get("forward"), CachedForward) for m in model.modules())


def test_int8_layers_are_calibrated_and_the_ends_stay_exact() -> None:
    model, case = make("difusores", "latents"), inputs("latents", 2, (16, 16))
    report = difusores.accelerate(model, approximate=("int8",))
    exact = run(model, *case)
    assert distance(exact, run(make("difusores", "latents"), *case).double()) <= BOUND  # until calibration
    difusores.calibrate(model, lambda: run(model, *case))
    got = run(model, *case)
    assert 1e-3 < distance(got, exact.double()) < 0.06
    assert torch.equal(got, run(model, *case))
    forwards = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    layers = {name: f for name, f in forwards.items() if isinstance(f, LayerForward)}
    exact_ones = {name for name, forward in layers.items() if forward.quantized is None}
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} <= exact_ones
    assert all(name.startswith(("conv_", "time_emb")) or "time_emb" in name for name in exact_ones)
    assert all(forward.quantized.ready for name, forward in layers.items() if name not in exact_ones)
    resnet = {layer.name: layer for layer in report.layers}["mid_block.resnets.0.conv1"]
    weight = model.mid_block.resnets[0].conv1.weight
    assert "int8" in resnet.how and weight.numel() <= resnet.packed_bytes
    alone = [run(model, *(t[i : i + 1] for t in case)) for i in range(2)]
    assert distance(torch.cat(alone), got.double()) <= BOUND  # no image's range moves another's
    with torch.no_grad():
        weight.mul_(1.5)
    assert distance(run(model, *case), got.double()) > 1e-3  # changed weights are seen
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, *case), run(model, *case))


def test_int8_beside_bfloat16(library: str) -> None:
    model, case = make(library, "latents"), inputs("latents", 2, (12, 8))
    exact = run(model, *case)
    difusores.accelerate(model, dtype="bfloat16", approximate=("int8",))
    difusores.calibrate(model, lambda: run(model, *case))
    got = run(model, *case)
    assert got.dtype is torch.float32 and 1e-3 < distance(got, exact.double()) < 0.1


def test_calibration_adds_up() -> None:
    model, case = make("difusores", "pixels"), inputs("pixels", 1, (8, 8))
    with pytest.raises(ValueError, match=r"calibrate needs accelerate\(..., approximate=\(\"int8\",\)\)"):
        difusores.calibrate(model, lambda: run(model, *case))
    difusores.accelerate(model, approximate=("int8",))
    with pytest.raises(ValueError, match="reached no layer"):
        difusores.calibrate(model, lambda: None)
    difusores.calibrate(model, lambda: run(model, *case))
    quantized = model.mid_block.resnets[0].conv1.__dict__["forward"].quantized
    narrow = quantized.low, quantized.high
    run(model, *case)
    large = (20 * case[0], case[1])
    clipped = run(model, *large)
    difusores.calibrate(model, lambda: run(model, *large))
    assert (
        quantized.low <= narrow[0]
        and quantized.high >= narrow[1]
        and narrow != (quantized.low, quantized.high)
    )
    exact = run(make("difusores", "pixels"), *large)
    assert distance(run(model, *large), exact.double()) < min(0.1, distance(clipped, exact.double()))
    with pytest.raises(RuntimeError, match="stopped"):
        difusores.calibrate(model, _stop)
    assert not model.__dict__[SESSION].calibrating


def test_int8_without_vnni() -> None:
    """A processor that adds pairs of products in 16 bits gets 7 bits, and the right sums."""
    program = (
        "import torch; from difusores.acceleration.quantized import Quantized, input_levels\n"
        "from difusores.acceleration.session import Session\n"
        "torch.set_grad_enabled(False); x = torch.rand(4, 64) + 1\n"
        "layer = torch.nn.Linear(64, 32); layer.weight.fill_(1.0); layer.bias.fill_(0.0)\n"
        "q = Quantized(Session((), None, None, 10**9)); q.high = 2.0\n"
        "y = q.linear(x, layer); print(input_levels(), ((y - layer(x)).abs() / layer(x)).max().item())"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    levels, error = done.stdout.split()
    assert levels == "127" and float(error) < 5e-3


def _stop() -> None:
    raise RuntimeError("stopped")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_the_cache_leaves_out(library: str, depth: int) -> None:
    """At a step in between, exactly the layers on the way through full resolution are called."""
    model = make(library, "latents")
    difusores.accelerate(model, approximate={"feature_cache": {"interval": 2, "depth": depth}})
    called: list[str] = []
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d:
            module.register_forward_hook(lambda m, i, o, name=name: called.append(name))
    steps(model, [900], inputs("latents", 1, (8, 8)))
    everything = len(called)
    called.clear()
    steps(model, [880], inputs("latents", 1, (8, 8)))
    up = [f"up_blocks.1.resnets.{i}.conv1" for i in range(max(0, 2 - depth), 2)]
    down = [f"down_blocks.0.resnets.{i}.conv1" for i in range(min(depth - 1, 1))]
    assert [name for name in called if name.endswith("conv1")] == down + up
    assert {"conv_in", "conv_out"} <= set(called) and len(called) < everything
    assert not any("downsamplers" in name or "mid_block" in name for name in called)


def test_a_run_begins_anew(library: str) -> None:
    """Later times of the same images go on; anything else computes everything, and is exact."""
    model, case = make(library, "latents"), inputs("latents", 2, (8, 8))
    plain = copy.deepcopy(model)
    difusores.accelerate(model, approximate={"feature_cache": {"interval": 9}})

    def exact(t: int, x: Tensor, states: Tensor = case[2]) -> bool:
        got, want = run(model, x, torch.tensor(t), states), run(plain, x, torch.tensor(t), states)
        return distance(got, want.double()) <= BOUND

    x = case[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    assert exact(900, x) and not exact(880, 0.98 * x) and not exact(860, 0.96 * x)
    assert exact(900, x), "the time rises: another run"
    assert not exact(880, x) and exact(880, x), "the same time again is no later step"
    assert not exact(870, x) and exact(860, noise), "other noise"
    assert not exact(850, noise) and exact(840, noise[:1], case[2][:1]), (
        "half of the batch: guidance has ended"
    )
    assert exact(830, noise, case[2] + 0.1), "another prompt"
    assert not exact(820, noise) and exact(810, noise[..., :4]), "another size"
    assert not exact(800, noise), "the lines of calls do not disturb each other"
    difusores.restore(model)
    difusores.accelerate(model, approximate={"feature_cache": {"interval": 9}})
    assert exact(700, noise), "accelerated anew"


def test_parts_of_guidance_one_after_the_other_have_lines_of_their_own() -> None:
    model, case = make("difusores", "latents"), inputs("latents", 2, (8, 8))
    difusores.accelerate(model, approximate=("feature_cache",))
    x, _, states = case
    for t in (900, 880, 860, 840):
        together = run(model, x, torch.tensor(t), states)
        apart = [run(model, x[i : i + 1], torch.tensor(t), states[i : i + 1]) for i in range(2)]
        assert distance(torch.cat(apart), together.double()) <= BOUND
        x = 0.98 * x
    lines = model.__dict__[SESSION].here.lines
    assert [line.age for line in lines] == [3, 3, 3]


def test_threads_have_caches_of_their_own() -> None:
    model, times = make("difusores", "pixels"), [900, 880, 860, 840, 820]
    difusores.accelerate(model, approximate=("feature_cache",))
    case = inputs("pixels", 1, (8, 8))
    cases = [case, (case[0].flip(0) * 1.1, case[1])]
    wanted = [steps(model, times, case) for case in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(4):
            wrong.extend(
                i
                for got, want in zip(steps(model, times, cases[i]), wanted[i], strict=True)
                if not torch.equal(got, want)
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_leaves_no_half_of_a_step() -> None:
    model, case = make("difusores", "latents"), inputs("latents", 1, (8, 8))
    difusores.accelerate(model, approximate=("feature_cache",))
    wanted = steps(model, [900, 880], case)
    hook = model.conv_out.register_forward_hook(lambda *_: _stop())
    with pytest.raises(RuntimeError, match="stopped"):
        steps(model, [900], case)
    hook.remove()
    assert model.__dict__[SESSION].here.line is None
    assert all(map(torch.equal, steps(model, [900, 880], case), wanted))


def test_adapters_residuals_are_not_cached_over() -> None:
    """diffusers adds them in place to what blocks return."""
    model, case = make("diffusers", "latents"), inputs("latents", 1, (8, 8))
    residuals = [torch.ones(1, 32, 8, 8), torch.ones(1, 64, 4, 4)]
    with torch.no_grad():
        want = model(*case, down_intrablock_additional_residuals=[r.clone() for r in residuals]).sample
        difusores.accelerate(model, approximate=("feature_cache",))
        for t in (371, 360, 350):
            got = model(
                case[0], t, case[2], down_intrablock_additional_residuals=[r.clone() for r in residuals]
            )
            if t == 371:
                assert distance(got.sample, want.double()) <= BOUND
    assert not getattr(model.__dict__[SESSION].here, "lines", [])


def test_merging_tokens() -> None:
    """Equal tokens come back as they were; all go into the nearest destination; nothing is drawn."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(2, 3, 4, 6, generator=generator)
    tokens = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2).contiguous()
    merging = Merging(tokens, (8, 12), 0.75)
    assert merging.merge(tokens).shape == (2, 24, 3)
    torch.testing.assert_close(merging.spread(merging.merge(tokens)), tokens)
    tokens = torch.randn(2, 35, 8, generator=generator)  # 5 x 7: windows at the borders are not whole
    merging = Merging(tokens, (5, 7), 0.5)
    merged = merging.merge(tokens)
    assert merged.shape == (2, 18, 8)
    assert torch.equal(merged, Merging(tokens.clone(), (5, 7), 0.5).merge(tokens))
    spread = merging.spread(merged)
    for image in range(2):  # a destination is the mean of what went into it
        for group in {tuple(row.tolist()) for row in spread[image]}:
            members = (spread[image] == torch.tensor(group)).all(-1)
            torch.testing.assert_close(tokens[image][members].mean(0), torch.tensor(group))
    tokens[:, 1] = tokens[:, 0] * 2  # the same direction: the first to go
    first = Merging(tokens, (5, 7), 0.03)
    assert first.merge(tokens).shape == (2, 34, 8)
    spread = first.spread(first.merge(tokens))
    torch.testing.assert_close(spread[:, 0], 1.5 * tokens[:, 0])
    assert torch.equal(spread[:, 2:], tokens[:, 2:])
    least = Merging(tokens, (5, 7), 0.01)
    assert torch.equal(least.spread(least.merge(tokens)), tokens)


def pipeline() -> Any:
    return difusores.StableDiffusionPipeline(
        vae=make("difusores", "vae"),
        text_encoder=None,
        tokenizer=None,
        unet=make("difusores", "latents"),
        scheduler=difusores.DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def latents(pipe: Any, **options: Any) -> tuple[Tensor, list[int]]:
    """The latents of ten steps, and the batch of each call of the UNet."""
    batches: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        prompt_embeds=torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(4)),
        negative_prompt_embeds=torch.zeros(1, 7, 24),
        latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)),
        height=16,
        width=16,
        num_inference_steps=10,
        output_type="latent",
        **options,
    ).images
    hook.remove()
    return torch.as_tensor(made), batches


def test_partial_guidance_is_the_pipelines_interval() -> None:
    pipe = pipeline()
    plain, batches = latents(pipe)
    assert batches == [2] * 10
    difusores.accelerate(pipe)
    wanted = {last: latents(pipe, guidance_interval=(0.0, last))[0] for last in (0.3, 0.6)}
    difusores.accelerate(pipe, approximate=("partial_guidance",))
    got, batches = latents(pipe)
    assert batches == [2] * 6 + [1] * 4 and torch.equal(got, wanted[0.6])
    got, batches = latents(pipe, guidance_interval=(0.0, 0.3))  # a call may ask for less, not for more
    assert batches == [2] * 3 + [1] * 7 and torch.equal(got, wanted[0.3])
    difusores.accelerate(pipe, approximate={"partial_guidance": {"interval": (0.2, 0.4)}})
    assert latents(pipe)[1] == [1] * 2 + [2] * 2 + [1] * 6
    difusores.accelerate(pipe)
    assert latents(pipe)[1] == [2] * 10
    difusores.accelerate(pipe, approximate=("partial_guidance",))
    difusores.restore(pipe)
    assert torch.equal(latents(pipe)[0], plain)


def test_all_four_in_a_pipeline() -> None:
    pipe = pipeline()
    exact, _ = latents(pipe)
    difusores.accelerate(pipe, approximate=(*ALL, "partial_guidance"))
    difusores.calibrate(pipe, lambda: latents(pipe))
    got, batches = latents(pipe)
    assert 1e-3 < distance(got, exact.double()) < 0.5 and batches == [2] * 6 + [1] * 4
    pipe.enable_separate_guidance()
    assert distance(latents(pipe)[0], got.double()) < 1e-4
    difusores.restore(pipe)
    pipe.disable_separate_guidance()
    assert torch.equal(latents(pipe)[0], exact)


def test_what_is_refused() -> None:
    import diffusers

    unet, vae = make("difusores", "pixels"), make("difusores", "vae")
    theirs = diffusers.DDPMPipeline(diffusers.UNet2DModel(**PIXELS).eval(), diffusers.DDPMScheduler())
    refused: list[tuple[Any, Any, str]] = [
        (
            unet,
            ("int8", "tome"),
            r"approximate has 'tome'; allowed are 'int8', 'feature_cache', 'token_merging', ",
        ),
        (unet, "int8", "approximate is the text 'int8'; needed is a tuple of names"),
        (unet, {"int8": {"bits": 4}}, "option 'bits' for 'int8'; allowed are none"),
        (
            unet,
            {"feature_cache": {"every": 2}},
            "option 'every' for 'feature_cache'; allowed are 'interval', 'depth'",
        ),
        (
            unet,
            {"feature_cache": {"interval": 1}},
            "interval of feature_cache is 1; allowed are integers from 2",
        ),
        (unet, {"feature_cache": {"depth": 0.5}}, "depth of feature_cache is 0.5"),
        (
            unet,
            {"token_merging": {"ratio": 0.8}},
            "ratio of token_merging is 0.8; allowed are numbers above 0",
        ),
        (
            unet,
            {"partial_guidance": {"interval": (0.5, 0.1)}},
            r"interval of partial_guidance is \(0.5, 0.1\)",
        ),
        (
            unet,
            ("partial_guidance",),
            "pipelines that take guidance_interval; got difusores.models.unet_2d.UNet2DModel",
        ),
        (theirs, ("partial_guidance",), "pipelines that take guidance_interval; got diffusers"),
        (vae, ("int8",), "approximate has 'int8', for UNets; AutoencoderKL has none"),
    ]
    for thing, approximate, message in refused:
        with pytest.raises(ValueError, match=message):
            difusores.accelerate(thing, approximate=approximate)
    assert not any("forward" in module.__dict__ for module in (*unet.modules(), *vae.modules()))
    assert len(cached_modules(unet, 99)) < len(cached_modules(unet, 1))
