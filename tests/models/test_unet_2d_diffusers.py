"""UNet2DModel against the class of the same name in diffusers, from the same saved folders."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from difusores import UNet2DModel

diffusers = pytest.importorskip("diffusers")
fill = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "make.py"))["fill"]

DDPM = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 8,
    "time_embedding_type": "positional",
}
DDPM_256 = {
    **DDPM,
    "sample_size": 256,
    "block_out_channels": [16, 16, 32, 32, 64, 64],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "google/ddpm-cifar10-32": {
        **DDPM,
        "sample_size": 32,
        "block_out_channels": [16, 32, 32, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "google/ddpm-cat-256, ddpm-celebahq-256, ddpm-church-256": DDPM_256,
    "CompVis/ldm-celebahq-256": {
        "sample_size": 64,
        "attention_head_dim": 8,
        "block_out_channels": [24, 48, 72, 96],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
    },
}
BASE: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
RESNET = {
    "down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "ResnetUpsampleBlock2D"],
}
ATTENTION = {
    "down_block_types": ["AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"],
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"in_channels": 5, "out_channels": 7},
    {"center_input_sample": True},
    {"time_embedding_type": "fourier"},
    {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    {"time_embedding_dim": 40},
    {"freq_shift": 1, "flip_sin_to_cos": False},
    {"block_out_channels": [15, 33], "norm_num_groups": 3, "attention_head_dim": 11},
    {"block_out_channels": [16, 40], "attention_head_dim": 12},
    {"mid_block_type": None},
    {"layers_per_block": 3, "mid_block_scale_factor": 1.7},
    {"downsample_padding": 0},
    RESNET,
    {**RESNET, "resnet_time_scale_shift": "scale_shift"},
    {**ATTENTION, "downsample_type": "resnet", "upsample_type": "resnet"},
    {**ATTENTION, "attention_head_dim": None, "downsample_type": "resnet"},
    {"act_fn": "gelu"},
    {"act_fn": "mish"},
    {"act_fn": "relu", "resnet_time_scale_shift": "scale_shift"},
    {"act_fn": "swish", "dropout": 0.3},
    {"norm_eps": 1e-3, "attn_norm_num_groups": 4},
    {"attn_norm_num_groups": 4, "resnet_time_scale_shift": "scale_shift"},
    {"add_attention": False},
    {"num_class_embeds": 7},
    {"class_embed_type": "timestep"},
    {"class_embed_type": "timestep", "time_embedding_type": "fourier"},
    {"class_embed_type": "identity"},
    {
        "block_out_channels": [16],
        "down_block_types": ["AttnDownBlock2D"],
        "up_block_types": ["UNetResAttnUpBlock2D"],
    },
]
CONFIGS = {**CHECKPOINTS, **{json.dumps(option): {**BASE, **option} for option in OPTIONS}}


def build(config: dict[str, Any]) -> tuple[Any, UNet2DModel]:
    theirs = fill(diffusers.UNet2DModel(**config)).eval()
    ours = UNet2DModel(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(config: dict[str, Any], batch: int, sides: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Sides are in units of the smallest size that the model takes."""
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    given = {
        "sample": torch.randn(batch, config.get("in_channels", 3), sides[0] * factor, sides[1] * factor),
        "timestep": torch.arange(1, batch + 1) * 137 % 1000,
    }
    if config.get("num_class_embeds"):
        given["class_labels"] = torch.arange(batch) % config["num_class_embeds"]
    elif config.get("class_embed_type") == "timestep":
        given["class_labels"] = torch.arange(1, batch + 1)
    elif config.get("class_embed_type") == "identity":
        given["class_labels"] = torch.randn(batch, 4 * config["block_out_channels"][0])
    return given


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


@torch.no_grad()
@pytest.mark.parametrize(("batch", "sides"), [(1, (1, 3)), (3, (3, 1)), (2, (2, 5))])
def test_same_output(config, batch: int, sides: tuple[int, int]) -> None:
    theirs, ours = build(config)
    given = inputs(config, batch, sides)
    expected = theirs(**given).sample
    assert torch.isfinite(expected).all()
    assert relative_l2(ours(**given).sample, expected) < 2e-5
    given["sample"] = given["sample"].contiguous(memory_format=torch.channels_last)
    assert relative_l2(ours(**given).sample, expected) < 2e-5


@torch.no_grad()
def test_folders_go_both_ways(config, tmp_path: Path) -> None:
    theirs, _ = build(config)
    given = inputs(config, 2, (1, 2))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet2DModel.from_pretrained(tmp_path / "theirs")
    assert not ours.training
    ours.save_pretrained(tmp_path / "ours")
    back = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == json.loads(
        json.dumps({k: v for k, v in back.config.items() if k[0] != "_"})
    )
    assert torch.equal(back(**given).sample, theirs(**given).sample)
    assert relative_l2(ours(**given).sample, theirs(**given).sample) < 2e-5


def test_same_configuration() -> None:
    theirs, ours = diffusers.UNet2DModel(**BASE), UNet2DModel(**BASE)
    assert list(ours.config) == list(theirs.config)
    assert ours.config.attention_head_dim == theirs.config.attention_head_dim == 8
    assert set(ours.config["_use_default_values"]) == set(theirs.config["_use_default_values"])
    assert ours.num_parameters() == theirs.num_parameters()


@torch.no_grad()
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bfloat16_error_is_at_most_twice_theirs(name: str, memory_format: torch.memory_format) -> None:
    config = CHECKPOINTS[name]
    theirs, ours = build(config)
    given = inputs(config, 2, (2, 1))
    given["sample"] = given["sample"].bfloat16()
    theirs.double()
    expected = theirs(**{**given, "sample": given["sample"].double()}).sample
    limit = relative_l2(theirs.bfloat16()(**given).sample, expected)
    given["sample"] = given["sample"].contiguous(memory_format=memory_format)
    assert relative_l2(ours.bfloat16()(**given).sample, expected) <= 2 * limit


@pytest.mark.parametrize(
    "option",
    [{}, {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 7}, {"act_fn": "mish"}],
    ids=str,
)
def test_same_gradients(option: dict[str, Any]) -> None:
    config = {**BASE, **option}
    given = inputs(config, 2, (3, 2))
    given["sample"] = given["sample"].double()
    models = [model.double() for model in build(config)]
    for model in models:
        model(**given).sample.square().sum().backward()
    theirs, ours = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in models)
    assert relative_l2(ours, theirs) < 1e-10
