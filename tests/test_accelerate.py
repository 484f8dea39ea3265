"""accelerate and restore: everything that they touch, against the plain model."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import difusores
from difusores import native
from difusores.acceleration import engine, layers, products, resnet
from difusores.acceleration.session import Forward, Session
from difusores.models.layers import double
from difusores.models.lora import LowRank, make_adapters
from difusores.ops import BackendUnavailable
from difusores.ops.gemm_conv import NEEDS_PAIRS, multiplies_pairs
from difusores.ops.winograd_conv import NEEDS_INT16, multiplies_int16, plan

BOUND = 5e-5  # of a whole network, relative L2, against float64
HALF = 1.25  # in bfloat16: times the error of the plain model in bfloat16

SOAK = Path(__file__).with_name("soak.py")
ARENA = Path(__file__).with_name("arena.py")

PIXELS: dict[str, Any] = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
LATENTS: dict[str, Any] = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
VAE: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pixels": ("UNet2DModel", PIXELS),
    "scale_shift": ("UNet2DModel", {**PIXELS, "resnet_time_scale_shift": "scale_shift"}),
    "resample": (
        "UNet2DModel",
        {
            **PIXELS,
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "mid_block_scale_factor": 1.5,
            "downsample_padding": 0,
        },
    ),
    "latents": ("UNet2DConditionModel", LATENTS),
    "linear": ("UNet2DConditionModel", {**LATENTS, "use_linear_projection": True}),
    "vae": ("AutoencoderKL", VAE),
}
LIBRARIES = {"difusores": difusores, "diffusers": diffusers}


def make(library: str, variant: str) -> nn.Module:
    """A model whose weights are all random, the same in both libraries."""
    name, config = VARIANTS[variant]
    torch.manual_seed(1)
    model: nn.Module = getattr(LIBRARIES[library], name)(**config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(
    variant: str, batch: int = 1, size: tuple[int, int] = (10, 14), time: int = 371
) -> tuple[Tensor, ...]:
    name, _ = VARIANTS[variant]
    generator = torch.Generator().manual_seed(2 + batch)
    channels = 4 if name == "UNet2DConditionModel" else 3
    x = torch.randn(batch, channels, *size, generator=generator)
    if name == "AutoencoderKL":
        return (x,)
    t = torch.full((batch,), time)
    if name == "UNet2DModel":
        return x, t
    return x, t, torch.randn(batch, 7, 24, generator=generator)


def run(model: nn.Module, *args: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(*args).sample
    return out


def oracle(model: nn.Module, *args: Tensor) -> Tensor:
    wide = copy.deepcopy(model)
    difusores.restore(wide)
    return run(wide.double(), *(t.double() if t.is_floating_point() else t for t in args))


def half_bounds(model: nn.Module, cases: list[tuple[Tensor, ...]], wanted: list[Tensor]) -> list[float]:
    """How far a model in bfloat16 may be from float64: `HALF` times the plain one in bfloat16."""
    plain = copy.deepcopy(model).bfloat16()
    halves = [tuple(t.bfloat16() if t.is_floating_point() else t for t in case) for case in cases]
    return [HALF * distance(run(plain, *half), want) for half, want in zip(halves, wanted, strict=True)]


def distance(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads than free cores make tiny layers slow; tests that are about threads ask for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(LIBRARIES))
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(library: str) -> Iterator[nn.Module]:
    """A tiny UNet with attention to a context."""
    made = make(library, "latents")
    yield made
    difusores.restore(made)


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "bfloat16 beside float32 images"])
def test_agrees_and_comes_back(
    library: str, variant: str, numbers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if numbers != "float32" and native.status("cpu") is not None:
        pytest.skip(native.status("cpu") or "")  # the bound is for the kernels, which keep more in float32
    dtype = None if numbers == "float32" else "bfloat16"
    monkeypatch.setattr(products, "fast_bfloat16_convolution", lambda: numbers == "bfloat16")
    plain = make(library, variant)
    model = copy.deepcopy(plain)
    odd = (16, 8) if VARIANTS[variant][0] == "UNet2DModel" else (11, 7)  # which that class does not take
    cases = [inputs(variant), inputs(variant, 3, time=20), inputs(variant, 2, odd)]
    before = [run(model, *case) for case in cases]
    wanted = [oracle(model, *case) for case in cases]
    bounds = [BOUND] * len(cases) if dtype is None else half_bounds(model, cases, wanted)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = difusores.accelerate(model, dtype=dtype)
    assert report.packed_bytes == 0  # until the first use
    for case, old, want, bound in zip(cases, before, wanted, bounds, strict=True):
        got = run(model, *case)
        assert got.is_contiguous() and got.dtype is torch.float32
        assert distance(got, want) <= bound
        assert torch.equal(got, run(model, *case))
        last = case[0].to(memory_format=torch.channels_last)
        again = run(model, last, *case[1:])
        assert torch.equal(again, got)
        # a half of an autoencoder's moments has neither layout
        assert variant == "vae" or again.is_contiguous(memory_format=torch.channels_last)
        assert not torch.equal(got, old)  # something was replaced
    assert 0 < report.packed_bytes <= 1.2 * report.model_bytes and report.preparing_seconds > 0
    declined = {reason: count for layer in report.layers for reason, count in layer.declined.items()}
    assert not declined
    difusores.restore(model)
    for case, old in zip(cases, before, strict=True):
        assert torch.equal(run(model, *case), old)
    assert list(model.state_dict()) == list(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) and value.stride() == state[key].stride()
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.skipif(not multiplies_pairs(), reason=NEEDS_PAIRS)
def test_which_convolutions_in_bfloat16_are_the_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large images those without a stride; of small ones all; never those of few channels."""

    def fuses(channels: int, out: int, size: int, stride: int = 1) -> bool:
        session = Session((), torch.bfloat16, torch.bfloat16, 1 << 20)
        layer = layers.ConvForward(nn.Conv2d(channels, out, 3, stride, 1).bfloat16(), session)
        return layer.way(torch.empty(1, channels, size, size, dtype=torch.bfloat16, device="meta")).fuses

    monkeypatch.setattr(products, "fast_bfloat16_convolution", lambda: True)
    assert fuses(16, 16, 256) and fuses(32, 16, 33) and fuses(16, 3, 32) and fuses(16, 16, 32, stride=2)
    assert not (fuses(16, 3, 33) or fuses(16, 16, 33, stride=2) or fuses(3, 16, 33) or fuses(3, 16, 32))
    monkeypatch.setattr(products, "fast_bfloat16_convolution", lambda: False)
    assert not fuses(16, 16, 32)


@pytest.mark.skipif(not multiplies_int16(), reason=NEEDS_INT16)
def test_which_convolutions_in_bfloat16_are_in_16_bit_fixed_point() -> None:
    """Those in float32 images of 16 tiles and more; the same bits whether the weights may be kept or not."""

    def layer(dtype: torch.dtype | None, images: torch.dtype | None, budget: int) -> Any:
        conv = nn.Conv2d(64, 128, 3, 1, 1)
        conv.load_state_dict(weights)
        return layers.ConvForward(conv, Session((), dtype, images, budget))

    weights = nn.Conv2d(64, 128, 3, 1, 1).state_dict()
    x = torch.randn(1, 64, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact, kept, made = (
            layer(dtype, None, budget)
            for dtype, budget in ((None, 1 << 24), (torch.bfloat16, 1 << 24), (torch.bfloat16, 0))
        )
        assert kept.way(x).winograd.int16 and not exact.way(x).winograd.int16
        assert "16-bit fixed point" in kept.how and "16-bit fixed point" not in exact.how
        assert kept.way(x).invariant and not kept.way(x[..., :12]).winograd.int16
        assert not layer(torch.bfloat16, torch.bfloat16, 0).int16
        want = exact.run(x).double()
        assert 1e-5 < distance(kept.run(x), want) < 1e-3
        assert torch.equal(kept.run(x), made.run(x))
        assert kept.transformed.bytes and not made.transformed.bytes


@pytest.mark.skipif(not multiplies_pairs(), reason=NEEDS_PAIRS)
def test_which_images_in_float32_are_rounded() -> None:
    """In a session in bfloat16 small ones and those of convolutions with strides, if weights may be kept."""

    def fuses(size: int, stride: int = 1, out: int = 16, budget: int = 1 << 20, keep: bool = False) -> bool:
        session = Session((), torch.bfloat16, None, budget)
        layer = layers.ConvForward(nn.Conv2d(16, out, 3, stride, 1), session, keep)
        return layer.way(torch.empty(1, 16, size, size, device="meta")).fuses

    assert fuses(4) and fuses(5) and fuses(64, stride=2)
    assert not (fuses(6) or fuses(4, out=3) or fuses(4, budget=0) or fuses(4, keep=True))


def test_which_convolutions_in_float32_are_the_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "own_product_is_faster", lambda dtype: True)

    def own(size: int, stride: int, channels: int = 16, budget: int = 1 << 20) -> bool:
        layer = layers.ConvForward(nn.Conv2d(channels, 16, 3, stride, 1), Session((), None, None, budget))
        return layer.way(torch.empty(1, channels, size, size, device="meta")).own

    assert own(8, 2) and own(5, 2)
    assert not (own(9, 2) or own(8, 1) or own(8, 2, channels=15) or own(8, 2, budget=0))


def test_autoencoder_halves(library: str) -> None:
    model = make(library, "vae")
    image = inputs("vae")[0]
    with torch.no_grad():
        moments = model.encode(image).latent_dist.parameters
        decoded = model.decode(moments[:, :4]).sample
        difusores.accelerate(model)
        assert distance(model.encode(image).latent_dist.parameters, moments.double()) <= BOUND
        assert distance(model.decode(moments[:, :4]).sample, decoded.double()) <= BOUND


def test_pipeline(library: str) -> None:
    """Steps, guidance and decoding, with the UNet and the autoencoder replaced, and back."""
    package: Any = LIBRARIES[library]
    pipe = package.StableDiffusionPipeline(
        vae=make(library, "vae"),
        text_encoder=None,
        tokenizer=None,
        unet=make(library, "latents"),
        scheduler=package.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)

    def image() -> Tensor:
        call = {
            "prompt_embeds": torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(4)),
            "negative_prompt_embeds": torch.zeros(1, 7, 24),
            "latents": torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5)),
        }
        made = pipe(**call, height=16, width=24, num_inference_steps=3, output_type="pt").images
        return torch.as_tensor(made)

    plain = image()
    report = difusores.accelerate(pipe)
    assert {layer.name.split(".")[0] for layer in report.layers} == {"unet", "vae"}
    got = image()
    assert distance(got, plain.double()) <= BOUND and not torch.equal(got, plain)
    difusores.restore(pipe)
    assert torch.equal(image(), plain)


def test_idempotent_and_anew(model: nn.Module) -> None:
    difusores.accelerate(model)
    forwards = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    difusores.accelerate(model)
    assert forwards == {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    report = difusores.accelerate(model, memory="fast")
    assert forwards != {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    assert sum(layer.replaced for layer in report.layers) == sum(f is not None for f in forwards.values())
    difusores.restore(model)
    difusores.restore(model)


def test_own_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded, scaled and unloaded while accelerated; layers that it changes, merged ones too, and others."""
    monkeypatch.setattr(products, "linear_wants_packing", lambda dtype: True)
    model, case = make("difusores", "latents"), inputs("latents")
    before = run(model, *case)
    difusores.accelerate(model)
    unchanged = run(model, *case)
    names = ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.resnets.0.conv1"]
    block = "up_blocks.1.attentions.0.transformer_blocks.0.attn1."
    names += ["down_blocks.0.attentions.0.proj_in", block + "to_out.0", block + "to_q"]
    names += ["up_blocks.1.resnets.0.time_emb_proj"]
    changes = {}
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        down, up = (
            torch.randn(2, *weight.shape[1:]),
            torch.randn(weight.shape[0], 2, *[1] * (weight.ndim - 2)),
        )
        changes[name] = LowRank(down, up, 0.1)
    adapters = make_adapters(model)
    adapters.load("one", changes)
    for weight in (1.0, 0.3):
        adapters.activate({"one": weight})
        got = run(model, *case)
        difusores.restore(model)
        want = run(model, *case)
        difusores.accelerate(model)
        assert distance(got, want.double()) <= BOUND and distance(got, before.double()) > 1e-3
        adapters.fuse(1.0)
        assert distance(run(model, *case), want.double()) <= BOUND
        adapters.unfuse()
    adapters.delete("one")
    assert torch.equal(run(model, *case), unchanged)
    difusores.restore(model)
    assert torch.equal(run(model, *case), before)


def test_weights_that_change(model: nn.Module) -> None:
    """In place, through `.data` as peft merges, by a new parameter, by load_state_dict, by another dtype."""
    case = inputs("latents")
    state = copy.deepcopy(model.state_dict())
    difusores.accelerate(model)
    first = run(model, *case)

    def in_place() -> None:
        with torch.no_grad():
            model.mid_block.resnets[0].conv1.weight.mul_(1.5)

    def through_data() -> None:
        model.mid_block.resnets[0].conv2.weight.data += 0.03 * torch.randn(64, 64, 3, 3)

    def new_parameter() -> None:
        layer = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
        layer.weight = nn.Parameter(layer.weight.detach() * 1.5)

    def new_bias() -> None:
        with torch.no_grad():
            model.conv_in.bias.add_(0.5)

    changes: list[Callable[[], None]] = [in_place, through_data, new_parameter, new_bias]
    for change in changes:
        before = run(model, *case)
        change()
        got = run(model, *case)
        assert distance(got, oracle(model, *case)) <= BOUND, change.__name__
        assert distance(got, before.double()) > 1e-3, change.__name__
    model.load_state_dict(state)
    assert torch.equal(run(model, *case), first)
    model.to(torch.bfloat16)
    half = tuple(t.bfloat16() if t.is_floating_point() else t for t in case)
    got = run(model, *half)
    assert got.dtype is torch.bfloat16 and distance(got, first.double()) < 5e-2
    model.to(torch.float64)
    assert distance(run(model, case[0].double(), case[1], case[2].double()), first.double()) < 2e-2


def test_biases_that_change_unseen(model: nn.Module) -> None:
    """What is kept of them beside the weights is made anew when one changes through `.data`."""
    case = inputs("latents")
    difusores.accelerate(model, dtype="bfloat16")
    before = run(model, *case)
    attention = "down_blocks.0.attentions.0"
    for name in ("conv_in", "mid_block.resnets.0.time_emb_proj", f"{attention}.proj_in", "conv_out"):
        model.get_submodule(name).bias.data += 0.5
        got = run(model, *case)
        assert not torch.equal(got, before), name
        assert torch.equal(got, run(copy.deepcopy(model), *case)), name  # which has prepared nothing yet
        before = got


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.resnets.0.time_emb_proj",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k",
    ],
)
def test_merged_weights_follow(model: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is one of several in one product: changed in every way, and back by `restore`."""
    monkeypatch.setattr(products, "linear_wants_packing", lambda dtype: True)
    monkeypatch.setattr(products, "own_product_is_faster", lambda dtype: False)
    case, layer = inputs("latents"), model.get_submodule(name)
    plain, state = run(model, *case), copy.deepcopy(model.state_dict())
    difusores.accelerate(model)
    first = run(model, *case)
    block = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    merged = [block.forward.packed] if "attn1" in name else [model.conv_in.forward.session.times.rows]
    assert all(form.bytes >= 2 * layer.weight.numel() * 4 for form in merged)
    noise = torch.randn(layer.weight.shape)

    def in_place() -> None:
        with torch.no_grad():
            layer.weight.add_(noise)

    def through_data() -> None:
        layer.weight.data -= 2 * noise

    def other_memory() -> None:
        layer.weight.data = layer.weight.data + 3 * noise

    def new_parameter() -> None:
        layer.weight = nn.Parameter(layer.weight.detach() - 4 * noise)

    def optimizer() -> None:
        layer.weight.grad = noise.clone()
        torch.optim.SGD([layer.weight], lr=0.5).step()
        layer.weight.grad = None

    changes: list[Callable[[], None]] = [in_place, through_data, other_memory, new_parameter, optimizer]
    for change in changes:
        before = run(model, *case)
        change()
        got = run(model, *case)
        assert distance(got, oracle(model, *case)) <= BOUND, change.__name__
        assert distance(got, before.double()) > 10 * BOUND, change.__name__
    model.load_state_dict(state)
    assert torch.equal(run(model, *case), first)
    model.load_state_dict(copy.deepcopy(state), assign=True)
    assert torch.equal(run(model, *case), first)
    difusores.restore(model)
    assert torch.equal(run(model, *case), plain)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_merged_weights_and_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapters on a time projection, a query and a key: loaded, scaled, fused and unloaded."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(products, "linear_wants_packing", lambda dtype: True)
    model, case = make("diffusers", "latents"), inputs("latents")
    model_: Any = model
    plain = run(model, *case)
    difusores.accelerate(model)
    first = run(model, *case)
    targets = ["down_blocks.0.resnets.0.time_emb_proj"]
    targets += [f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{part}" for part in "qk"]
    model_.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "one")
    seen = first
    for scale in (1.0, 0.3):
        model_.set_adapters("one", scale)
        got = run(model, *case)
        assert distance(got, oracle(model, *case)) <= BOUND
        assert distance(got, seen.double()) > 10 * BOUND
        seen = got
    model_.fuse_lora()
    assert distance(run(model, *case), seen.double()) <= BOUND
    model_.unfuse_lora()
    model_.unload_lora()
    assert distance(run(model, *case), first.double()) <= BOUND  # peft subtracts what it had added
    difusores.restore(model)
    assert distance(run(model, *case), plain.double()) <= BOUND


def test_training_is_refused_and_gradients_flow(model: nn.Module) -> None:
    case = inputs("latents")
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        difusores.accelerate(model)
    model.eval()

    def gradient() -> Tensor:
        model.zero_grad()
        model(*case).sample.square().sum().backward()
        weight = model.conv_in.weight.grad
        assert isinstance(weight, Tensor)
        return weight.clone()

    want, plain = gradient(), run(model, *case)
    report = difusores.accelerate(model)
    assert torch.equal(gradient(), want)
    assert any("gradients are recorded" in layer.declined for layer in report.layers)
    model.train()
    assert torch.equal(run(model, *case), plain)
    assert any("the module is in training mode" in layer.declined for layer in report.layers)
    model.eval()
    assert not torch.equal(run(model, *case), plain)
    with difusores.use_backend("reference"):
        run(model, *case)
    assert any("another backend was asked for" in layer.declined for layer in report.layers)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number(model: nn.Module, bad: float) -> None:
    x, t, states = inputs("latents", 2)
    x[1, 2, 3, 4] = bad
    want = run(model, x, t, states)
    for dtype, bound in (("float32", BOUND), ("bfloat16", 5e-2)):
        difusores.accelerate(model, dtype=dtype)
        got = run(model, x, t, states)
        assert torch.equal(got.isfinite(), want.isfinite())
        assert not got[1].isfinite().any() and distance(got[:1], want[:1].double()) <= bound


def test_two_threads_at_once(model: nn.Module) -> None:
    cases = [inputs("latents"), inputs("latents", 2, (16, 12))]
    difusores.accelerate(model)
    wanted = [run(model, *case) for case in cases]
    difusores.restore(model)
    difusores.accelerate(model)  # weights are prepared by whoever comes first
    wrong: list[int] = []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(8) if not torch.equal(run(model, *cases[index]), wanted[index]))

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(model: nn.Module, case: tuple[Tensor, ...], queue: Any) -> None:
    torch.set_num_threads(1)  # as torch's own workers do: OpenMP's pool does not survive a fork
    queue.put(run(model, *case).numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forked_worker(model: nn.Module, dtype: str) -> None:
    case = inputs("latents")
    difusores.accelerate(model, dtype=dtype)
    want = run(model, *case)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(model, case, queue))
    child.start()
    got = torch.from_numpy(queue.get(timeout=60))
    child.join(60)
    assert distance(got, want.double()) <= (1e-5 if dtype == "float32" else 2e-2)


def test_copies_and_pickles(model: nn.Module) -> None:
    case = inputs("latents")
    report = difusores.accelerate(model)
    want = run(model, *case)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.conv_in.__dict__["forward"], Forward)
        with torch.no_grad():
            other.conv_in.weight.zero_()
        assert distance(run(other, *case), want.double()) > 1e-3
    assert torch.equal(run(model, *case), want)
    assert report.packed_bytes == sum(layer.packed_bytes for layer in report.layers) > 0


def test_a_watched_layer_is_still_called(model: nn.Module) -> None:
    case = inputs("latents")
    difusores.accelerate(model)
    want = run(model, *case)
    seen: list[str] = []
    watched = [name for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d, nn.GroupNorm)]
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.append(name))
        for name in watched
    ]
    got = run(model, *case)
    assert set(seen) == set(watched)
    assert distance(got, want.double()) <= BOUND
    for hook in hooks:
        hook.remove()
    assert torch.equal(run(model, *case), want)


@pytest.mark.parametrize("by", ["the own product where that is faster", "oneDNN"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_short_memory_changes_no_bits(dtype: str | None, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms that gain least go first, and what is computed without them is the same."""
    if by == "oneDNN":
        monkeypatch.setattr(products, "own_product_is_faster", lambda dtype: False)
        monkeypatch.setattr(products, "linear_wants_packing", lambda dtype: True)
    model, cases = make("difusores", "latents"), [inputs("latents"), inputs("latents", 2, (32, 32))]
    report = difusores.accelerate(model, memory="fast", dtype=dtype)
    wanted = [run(model, *case) for case in cases]
    plenty = report.packed_bytes
    assert plenty <= 2.5 * report.model_bytes
    difusores.restore(model)
    report = difusores.accelerate(model, dtype=dtype)
    session = model.__dict__["_difusores_acceleration"]
    session.budget //= 8
    for case, want in zip(cases, wanted, strict=True):
        assert torch.equal(run(model, *case), want)
    assert 0 <= report.packed_bytes <= session.budget < plenty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_memory_holds_weights_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, whose storages are counted, and nothing after a forward, or gathered within it."""
    model, (sample, *rest) = make("difusores", "latents").to(dtype), inputs("latents")
    case = (sample.to(dtype), *(value.to(dtype) if value.is_floating_point() else value for value in rest))
    difusores.accelerate(model)
    wanted = run(model, *case)
    difusores.restore(model)
    report = difusores.accelerate(model, memory="lean")
    cat = torch.cat

    def of_images(tensors: list[Tensor], dim: int = 0) -> Tensor:
        assert dim != 0, "weights are gathered"
        return cat(tensors, dim=dim)

    monkeypatch.setattr(torch, "cat", of_images)
    assert distance(run(model, *case), wanted.double()) <= (BOUND if dtype is torch.float32 else 2e-2)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    weights = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    assert sum(held.values()) + report.packed_bytes == weights


def test_bits_of_layers_marked_invariant() -> None:
    """Alone, in a batch and on two threads; and marked are all that the package's own kernels compute."""
    model, case = make("difusores", "pixels"), inputs("pixels", 3, (16, 16))
    report = difusores.accelerate(model)
    run(model, *case)
    marked = {layer.name for layer in report.layers if layer.invariant}
    image = torch.randn(3, 64, 8, 8).to(memory_format=torch.channels_last)
    convolutions = products_found = 0
    for name, layer in model.named_modules():
        if name not in marked:
            continue
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 64 and layer.kernel_size == (3, 3):
            convolutions += 1
            x = image
        elif isinstance(layer, nn.Linear) and layer.in_features == 64:
            products_found += 1
            x = image.flatten(2).transpose(1, 2).contiguous()
        else:
            continue
        with torch.no_grad():
            whole = layer(x)
            assert torch.equal(layer(x[:1].clone()), whole[:1])
            torch.set_num_threads(2)
            assert torch.equal(layer(x), whole)
            torch.set_num_threads(1)
    # what libraries compute, all convolutions and products without AVX2, depends on the batch and is unmarked
    assert (convolutions > 0) == plan(64, 64, 8, 8).winograd
    assert (products_found > 0) == products.own_product_is_faster(torch.float32)


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
@pytest.mark.parametrize("level", ["base", "avx2", "avx512", "amx"])
def test_whose_product_in_float32(level: str, vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "status", lambda backend: None)
    monkeypatch.setattr(native, "build_info", lambda: {"isa_used": level})
    monkeypatch.setattr(products, "_cpuinfo", lambda: f"vendor_id : {vendor}")
    own = products.own_product_is_faster.__wrapped__(torch.float32)  # what it caches is this processor's
    assert own == (level in ("avx512", "amx") or (level == "avx2" and vendor == "AuthenticAMD"))


@pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or "")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_own_product(library: str, dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers, GEGLU at the end of one, a weight that changes, little memory, and back."""
    if dtype and not multiplies_pairs():
        pytest.skip(NEEDS_PAIRS)
    model, case = make(library, "latents"), inputs("latents")
    plain, wanted = run(model, *case), oracle(model, *case)
    bound = half_bounds(model, [case], [wanted])[0] if dtype else BOUND
    monkeypatch.setattr(products, "own_product_is_faster", lambda dtype: True)
    report = difusores.accelerate(model, dtype=dtype)
    assert distance(run(model, *case), wanted) <= bound
    linears = [layer for layer in report.layers if layer.kind == "Linear"]
    for layer in linears:  # the network computes the time projections together
        assert layer.invariant == ("time_emb_proj" not in layer.name), layer
    gates = [layer for layer in report.layers if layer.kind == "GEGLU"]
    assert gates and all(layer.packed_bytes > 0 for layer in gates)
    assert report.packed_bytes <= 1.2 * sum(4 * p.numel() for p in model.parameters())
    weight = model.get_submodule(gates[0].name + ".proj").weight
    assert isinstance(weight, nn.Parameter)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    changed = oracle(model, *case)
    assert distance(run(model, *case), changed) <= (0.2 * distance(changed, wanted) if dtype else BOUND)
    assert distance(changed, wanted) > 10 * BOUND
    with torch.no_grad():
        weight.copy_(before)
    report = difusores.accelerate(model, dtype=dtype, memory="lean")
    assert distance(run(model, *case), wanted) <= bound  # nothing is packed: the products are the library's
    assert report.packed_bytes == 0
    difusores.restore(model)
    assert torch.equal(run(model, *case), plain)


@pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or "")
@pytest.mark.parametrize("variant", ["resample", "latents", "vae"])
def test_invariant(library: str, variant: str) -> None:
    """An image alone or in a batch, on one thread or two: the same bits, and as near to float64 as ever."""
    model, case = make(library, variant), inputs(variant, 3)
    wanted = oracle(model, *case)
    report = difusores.accelerate(model, invariant=True)
    assert distance(same_bits(model, case), wanted) <= BOUND
    is_invariant(report)


@pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or "")
@pytest.mark.skipif(not multiplies_pairs(), reason=NEEDS_PAIRS)
@pytest.mark.parametrize("variant", ["resample", "latents"])
def test_invariant_in_bfloat16(variant: str) -> None:
    model, case = make("difusores", variant), inputs(variant, 3)
    wanted = oracle(model, *case)
    bound = half_bounds(model, [case], [wanted])[0]
    report = difusores.accelerate(model, invariant=True, dtype="bfloat16")
    assert distance(same_bits(model, case), wanted) <= bound
    is_invariant(report)


def same_bits(model: nn.Module, case: tuple[Tensor, ...]) -> Tensor:
    """The result for three images, which have the same bits alone, and on one thread or two."""
    whole = run(model, *case)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(run(model, *case), whole)
        parts = [run(model, *(t[i : i + 1] for t in case)) for i in range(3)]
        assert torch.equal(torch.cat(parts), whole)
    return whole


def is_invariant(report: difusores.acceleration.Report) -> None:
    kinds = ("Conv2d", "Linear", "GroupNorm", "GroupNormAct")
    assert [layer.name for layer in report.layers if layer.kind in kinds and not layer.invariant] == []
    assert report.packed_bytes > 0


def test_invariant_without_its_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"gemm_conv": {"cpu": "it was left out"}}
    monkeypatch.setattr(engine, "availability", lambda: missing)
    model = make("difusores", "pixels")
    with pytest.raises(BackendUnavailable, match="needs the package's own kernels: it was left out"):
        difusores.accelerate(model, invariant=True)
    monkeypatch.undo()
    monkeypatch.setattr(engine, "multiplies_pairs", lambda: False)
    with pytest.raises(BackendUnavailable, match=r"in bfloat16 needs AVX-512|switched off"):
        difusores.accelerate(model, invariant=True, dtype="bfloat16")
    assert not any("forward" in module.__dict__ for module in model.modules())
    difusores.accelerate(model)


def test_what_is_refused() -> None:
    model = make("difusores", "pixels")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "float16"}, "dtype is 'float16'; allowed are None, float32 and bfloat16"),
        ({"memory": "huge"}, "memory is 'huge'; allowed are 'lean', 'balanced', 'fast'"),
        ({"memory_format": "nchw"}, "memory_format is 'nchw'"),
        ({"approximate": ("int8", "tome")}, "approximate has 'tome'; allowed are 'int8'"),
        ({"invariant": True, "approximate": ("int8",)}, "invariant=True and int8 exclude each other"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            difusores.accelerate(model, **options)
    for thing in (nn.Linear(2, 2), "model", None):
        with pytest.raises(TypeError, match="take models and pipelines of difusores and diffusers"):
            difusores.accelerate(thing)
    with pytest.raises(ValueError, match="parameters on meta"):
        difusores.accelerate(make("difusores", "pixels").to("meta"))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_report_tells_what_was_not_replaced() -> None:
    model = make("diffusers", "pixels")
    model.conv_in = nn.Conv2d(3, 32, 3, padding=1, padding_mode="circular")
    model.conv_out.forward = lambda x: nn.Conv2d.forward(model.conv_out, x)
    report = difusores.accelerate(model)
    by_name = {layer.name: layer for layer in report.layers}
    assert not by_name["conv_in"].replaced and "circular" in by_name["conv_in"].how
    assert not by_name["conv_out"].replaced and "a forward of its own" in by_name["conv_out"].how
    assert by_name["mid_block.resnets.0"].replaced
    case = inputs("pixels")
    with torch.no_grad():
        share = report.share_not_replaced(lambda: model(*case))
    assert 0 < share < 1
    text = str(report)
    assert "circular" in text and "ResnetBlock2D" in text
    difusores.restore(model)
    assert "forward" in model.conv_out.__dict__


@pytest.mark.skipif(not plan(64, 64, 18, 24).winograd, reason=str(plan(64, 64, 18, 24).reason))
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_upsampling_makes_no_copy(library: str, dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of its convolution on a copy, made only for another size or where that is watched."""
    monkeypatch.setattr(products, "fast_bfloat16_convolution", lambda: False)
    copies: list[torch.Size] = []

    def noted(x: Tensor, *size: Any) -> Tensor:
        copies.append(x.shape)
        return double(x, *size)

    for module in (layers, resnet):
        monkeypatch.setattr(module, "double", noted)
    model = make(library, "latents")
    difusores.accelerate(model, dtype=dtype)
    upsampler = cast(Any, model).up_blocks[0].upsamplers[0]
    x = torch.randn(2, 64, 9, 12).to(memory_format=torch.channels_last)

    def sized(*size: int) -> Tensor:
        given = (None, torch.Size(size)) if library == "difusores" else (torch.Size(size),)
        out: Tensor = upsampler(x, *given)
        return out

    with torch.no_grad():
        want = upsampler.conv(F.interpolate(x, scale_factor=2.0))
        assert torch.equal(upsampler(x), want) and torch.equal(sized(18, 24), want)
        assert not copies
        assert torch.equal(sized(17, 24), upsampler.conv(F.interpolate(x, (17, 24))))
        assert len(copies) == 1
        upsampler.conv.register_forward_hook(lambda *call: None)
        assert torch.equal(upsampler(x), want) and len(copies) == 2


@pytest.mark.skipif(not plan(64, 64, 64, 64).winograd, reason=str(plan(64, 64, 64, 64).reason))
@pytest.mark.parametrize(("kind", "blocks"), [("pixels", 3), ("scale_shift", 3), ("resample", 4)])
def test_large_images_are_summed_as_they_are_written(
    library: str, kind: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the second norm of a block, the first time as any other time; smaller images are not."""
    name, config = VARIANTS[kind]
    config = {**config, "block_out_channels": [64, 64]}
    if kind == "resample":  # with a block that doubles on its way to the large images
        config["up_block_types"] = ["ResnetUpsampleBlock2D", "UpBlock2D"]
    made: Any = getattr(LIBRARIES[library], name)(**config).eval()
    written: list[Tensor] = []
    read: list[Tensor] = []

    def note(op: str, *places: tuple[list[Tensor], int]) -> None:
        plain_op = getattr(torch.ops.difusores, op).default

        def noted(*call: Any) -> Any:
            for which, place in places:
                if call[place] is not None:
                    which.append(call[place])
            return plain_op(*call)

        monkeypatch.setattr(import_module(f"difusores.ops.{op}"), "_OP", noted)

    note("winograd_conv", (written, 15), (read, 16))
    note("group_norm_affine", (read, 7))
    difusores.accelerate(made)
    for size in (32, 64):
        case = inputs(kind, 2, (size, size))
        want = oracle(made, *case)
        first = run(made, *case)
        assert distance(first, want) <= BOUND
        expected = blocks if size == 64 else 0
        assert len(written) == expected
        assert all(moments.shape == (2, 2, 64) for moments in written)
        assert all(a is b for a, b in zip(written, read, strict=True)), "by the convolution after it"
        for _ in range(3):
            written.clear(), read.clear()
            assert torch.equal(run(made, *case), first)
            assert len(written) == len(read) == expected


@pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or "")
@pytest.mark.parametrize("addresses", ["many", "few"])
def test_large_images_have_an_arena(addresses: str) -> None:
    """In a process of its own: what a test suite leaves in it fills gaps."""
    result = subprocess.run([sys.executable, ARENA, addresses], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_memory_is_flat_and_pages_are_kept() -> None:
    """In a process of its own: what other tests left on the heap costs faults of its own."""
    result = subprocess.run([sys.executable, SOAK], capture_output=True, text=True, check=True)
    away, kibibytes, faults, faults_of_large = map(float, result.stdout.split())
    assert away <= 1e-5
    assert kibibytes < 1024
    assert faults < 80, "less than one in ten forwards"
    assert faults_of_large < 2000, "of 30,000 without `heap.keep`"
