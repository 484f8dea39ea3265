"""UNet2DModel without diffusers: stored outputs, layouts, dtypes, torch.compile, gradients, bad input."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch._dynamo.testing import CompileCounter

from difusores import UNet2DModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
fill = runpy.run_path(str(FIXTURES / "make.py"))["fill"]
STORED = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


def load_case(name: str) -> tuple[UNet2DModel, dict[str, torch.Tensor], torch.Tensor]:
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    output = tensors.pop("output")
    return fill(UNet2DModel(**config)).eval(), tensors, output


@pytest.fixture(params=STORED)
def case(request: pytest.FixtureRequest) -> tuple[UNet2DModel, dict[str, torch.Tensor], torch.Tensor]:
    return load_case(request.param)


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def test_there_are_stored_outputs() -> None:
    assert STORED == ["ddpm_cifar10", "scale_shift_classes"]


@torch.no_grad()
def test_stored_output(case) -> None:
    model, inputs, output = case
    assert relative_l2(model(**inputs).sample, output) < 2e-5
    assert torch.equal(model(**inputs).sample, model(**inputs, return_dict=False)[0])


def test_stored_output_without_diffusers() -> None:
    """As where diffusers is not installed: importing it fails."""
    script = f"""
import sys
sys.modules["diffusers"] = sys.modules["huggingface_hub"] = sys.modules["transformers"] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, test_unet_2d as t
with torch.no_grad():
    for name in t.STORED:
        model, inputs, output = t.load_case(name)
        assert t.relative_l2(model(**inputs).sample, output) < 2e-5
        print(name)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.split() == STORED, run.stderr


@torch.no_grad()
def test_timesteps_may_be_numbers_or_tensors(case) -> None:
    model, inputs, _ = case
    expected = model(**{**inputs, "timestep": torch.tensor([7, 7])}).sample
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])):
        assert torch.equal(model(**{**inputs, "timestep": timestep}).sample, expected)
    assert relative_l2(model(**{**inputs, "timestep": 8}).sample, expected) > 1e-4


@torch.no_grad()
def test_channels_last_is_kept_in_every_layer(case) -> None:
    model, inputs, output = case
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    seen = []

    def look(module: nn.Module, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        seen.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in (args[0], result)))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.register_forward_hook(look)
    result = model(**inputs).sample
    assert len(seen) > 10 and all(seen)
    assert relative_l2(result, output) < 2e-5


@torch.no_grad()
def test_nchw_is_kept_in_every_layer(case) -> None:
    model, inputs, _ = case
    seen = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.register_forward_hook(lambda _, args, result: seen.append((args[0], result)))
    model(**inputs)
    assert len(seen) > 10 and all(t.is_contiguous() for pair in seen for t in pair)


@torch.no_grad()
def test_compiles_without_a_graph_break(case) -> None:
    model, inputs, output = case
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_l2(compiled(**inputs).sample, output) < 2e-5


@torch.no_grad()
def test_timesteps_that_are_numbers_compile_twice_at_most(case) -> None:
    model, inputs, _ = case
    compilations = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compilations)
    for timestep in range(0, 1000, 83):
        result = compiled(**{**inputs, "timestep": timestep}).sample
        assert torch.equal(result, model(**{**inputs, "timestep": timestep}).sample)
    assert compilations.frame_count <= 2


@torch.no_grad()
def test_a_fraction_of_a_timestep_is_cut_off_as_in_diffusers(case) -> None:
    model, inputs, _ = case
    expected = model(**{**inputs, "timestep": 7}).sample
    assert torch.equal(model(**{**inputs, "timestep": 7.9}).sample, expected)


@pytest.mark.slow
def test_compiled_training_gives_the_same_gradients() -> None:
    config = {**SMALL, "block_out_channels": (8,), "num_class_embeds": 3}
    config.update(down_block_types=("AttnDownBlock2D",), up_block_types=("UpBlock2D",))
    model = fill(UNet2DModel(**config))
    call = (torch.randn(2, 3, 5, 7), torch.tensor([1, 2]), torch.tensor([0, 2]))
    model(*call).sample.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(*call).sample.square().sum().backward()
    total = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() < 1e-5 * total, name


def test_gradients_reach_every_parameter(case) -> None:
    model, inputs, output = case
    model.train()
    (model(**inputs).sample - output.roll(1)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # softmax does not see what is added to all keys
        assert parameter.grad.abs().sum() > 0 or name.endswith("to_k.bias"), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case, dtype: torch.dtype) -> None:
    model, inputs, output = case
    result = model.to(dtype)(**{**inputs, "sample": inputs["sample"].to(dtype)}).sample
    assert result.dtype is dtype
    assert relative_l2(result, output) < 8 * torch.finfo(dtype).eps


@torch.no_grad()
def test_autocast_keeps_half_precision_between_layers(case) -> None:
    model, inputs, output = case
    seen = set()
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda _, args, result: seen.add((args[0].dtype, result.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        result = model(**inputs).sample
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert relative_l2(result, output) < 8 * torch.finfo(torch.bfloat16).eps


@torch.no_grad()
def test_same_call_twice_is_bitwise_the_same(case) -> None:
    model, inputs, _ = case
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    assert torch.equal(model(**inputs).sample, model(**inputs).sample)
    assert all(torch.equal(before[name], inputs[name]) for name in inputs)


def test_dropout_acts_in_training_only() -> None:
    model = UNet2DModel(**{**SMALL, "dropout": 0.5})
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(model(x, 1).sample, model(x, 1).sample)
        model.eval()
        assert torch.equal(model(x, 1).sample, model(x, 1).sample)


@pytest.mark.parametrize(
    "option",
    [
        {"down_block_types": ("AttnSkipDownBlock2D", "DownBlock2D")},
        {"up_block_types": ("UpBlock2D", "KUpBlock2D")},
        {"mid_block_type": "UNetMidBlock2DCrossAttn"},
        {"time_embedding_type": "sinusoidal"},
        {"time_embedding_type": "learned"},
        {"downsample_padding": 2},
        {"downsample_type": "fir"},
        {"upsample_type": "fir"},
        {"resnet_time_scale_shift": "ada_group"},
        {"class_embed_type": "projection"},
        {"act_fn": "tanh"},
        {"norm_num_groups": 3},
        {"norm_num_groups": None},
        {"attention_head_dim": 0},
        {"attention_head_dim": 32},
        {"block_out_channels": (8, 16, 32)},
    ],
    ids=str,
)
def test_option_that_is_not_supported_is_named(option: dict[str, object]) -> None:
    (name, value) = next(iter(option.items()))
    with pytest.raises(ValueError, match=name) as error:
        UNet2DModel(**{**SMALL, **option})
    odd = value[0] if name == "down_block_types" else value[1] if name == "up_block_types" else value
    if name != "block_out_channels":
        assert str(odd) in str(error.value)


def test_inputs_that_do_not_fit_are_named() -> None:
    model = UNet2DModel(**SMALL)
    for shape in ((1, 3, 7, 8), (1, 3, 8, 9), (1, 4, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match="multiples of 2") as error:
            model(torch.zeros(shape), 0)
        assert str(list(shape)) in str(error.value)
    with pytest.raises(ValueError, match="class_labels"):
        model(torch.zeros(1, 3, 8, 8), 0, class_labels=torch.tensor([1]))
    with pytest.raises(ValueError, match="class_labels"):
        UNet2DModel(**SMALL, num_class_embeds=3)(torch.zeros(1, 3, 8, 8), 0)
