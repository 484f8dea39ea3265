"""ControlNetModel: against diffusers from the same folders, begun from a UNet, bad input."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from difusores import ControlNetModel, UNet2DConditionModel

fill = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "make.py"))["fill"]

SHARED: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
UNET = SHARED | {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
BASE = SHARED | {"conditioning_embedding_out_channels": [4, 8]}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 30,
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": {},
    "bgr": {"controlnet_conditioning_channel_order": "bgr", "layers_per_block": 2},
    "pooled": {"global_pool_conditions": True, "conditioning_channels": 2},
    "Stable Diffusion XL": XL,
    "class": {"num_class_embeds": 5, "mid_block_type": "UNetMidBlock2D"},
    "class as time": {"class_embed_type": "timestep", "act_fn": "gelu"},
    "class as vector": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 9},
}


def inputs(config: dict[str, Any], height: int, width: int, batch: int = 2) -> dict[str, Any]:
    given: dict[str, Any] = {
        "sample": torch.randn(batch, 4, height, width),
        "timestep": torch.tensor([3, 700])[:batch],
        "encoder_hidden_states": torch.randn(batch, 5, 12),
        "controlnet_cond": torch.rand(batch, config.get("conditioning_channels", 3), 2 * height, 2 * width),
    }
    if config.get("num_class_embeds"):
        given["class_labels"] = torch.arange(batch)
    elif config.get("class_embed_type"):
        kind = config["class_embed_type"]
        given["class_labels"] = torch.arange(batch) if kind == "timestep" else torch.randn(batch, 9)
    if config.get("addition_embed_type"):
        text, ids = torch.randn(batch, 6), torch.randint(0, 99, (batch, 6))
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    return given


def distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_same_residuals_from_the_same_folder(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = BASE | CONFIGS[name]
    theirs = fill(diffusers.ControlNetModel(**config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ControlNetModel.from_pretrained(tmp_path / "theirs")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for height, width, options in (
        (8, 4, {}),
        (7, 5, {"guess_mode": True, "conditioning_scale": 0.7}),
        (5, 9, {"conditioning_scale": 1.5}),
    ):
        given = inputs(config, height, width) | options
        expected, found = theirs(**given), ours(**given)
        assert distance(found.mid_block_res_sample, expected.mid_block_res_sample) < 2e-5
        pairs = zip(found.down_block_res_samples, expected.down_block_res_samples, strict=True)
        assert all(distance(one, other) < 2e-5 for one, other in pairs)
    ours.save_pretrained(tmp_path / "ours")
    back = diffusers.ControlNetModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(back(**given).mid_block_res_sample, expected.mid_block_res_sample)


@torch.no_grad()
def test_bfloat16_error_is_at_most_twice_theirs() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = fill(diffusers.ControlNetModel(**BASE)).eval()
    ours = ControlNetModel(**BASE).eval()
    ours.load_state_dict(theirs.state_dict())
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(BASE, 8, 8).items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    expected = theirs.double()(**exact).mid_block_res_sample
    limit = distance(theirs.bfloat16()(**given).mid_block_res_sample, expected)
    assert distance(ours.bfloat16()(**given).mid_block_res_sample, expected) <= 2 * limit


@torch.no_grad()
def test_begun_from_a_unet_it_changes_nothing_and_trained_it_steers() -> None:
    unet = fill(UNet2DConditionModel(**(UNET | {"num_class_embeds": 3, "layers_per_block": [1, 1]}))).eval()
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=[4, 8]).eval()
    assert torch.equal(
        net.down_blocks[0].resnets[0].conv1.weight, unet.down_blocks[0].resnets[0].conv1.weight
    )
    assert net.config.layers_per_block == 1 and net.config.attention_head_dim == 2
    given = inputs({"num_class_embeds": 3}, 6, 7)
    image = given.pop("controlnet_cond")
    plain = unet(**given).sample
    for trained in (False, True):
        if trained:
            for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
                fill(layer)
        down, mid = net(**given, controlnet_cond=image, return_dict=False)
        steered = unet(
            **given, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        assert torch.equal(steered, plain) is not trained
    bare = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    assert not torch.equal(bare.conv_in.weight, unet.conv_in.weight)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"controlnet_conditioning_channel_order": "grb"}, "has 'grb'; ControlNetModel allows 'rgb', 'bgr'"),
        ({"mid_block_type": None}, "mid_block_type has None"),
        ({"layers_per_block": [1, 1]}, "are single numbers"),
        ({"conditioning_embedding_out_channels": []}, "needed is at least one width"),
        ({"encoder_hid_dim": 10}, "encoder_hid_dim has 10; ControlNetModel allows None"),
        ({"class_embed_type": "simple_projection"}, "class_embed_type has 'simple_projection'"),
    ],
)
def test_an_option_that_is_not_supported_is_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlNetModel(**(BASE | option))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"controlnet_cond": torch.zeros(2, 1, 16, 16)}, r"needed is \[2, 3, H, W\]"),
        ({"controlnet_cond": torch.zeros(2, 3, 8, 8)}, "is 8x8; for a sample of 8x8 it has to be 16x16"),
        ({"sample": torch.zeros(2, 5, 8, 8)}, r"needed is \[N, 4, H, W\]"),
    ],
)
def test_input_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlNetModel(**BASE)(**(inputs(BASE, 8, 8) | change))


def test_a_unet_that_no_controlnet_can_copy_is_refused() -> None:
    unet = UNet2DConditionModel(**(UNET | {"time_embedding_act_fn": "silu"}))
    with pytest.raises(ValueError, match="time_embedding_act_fn of the UNet is 'silu'"):
        ControlNetModel.from_unet(unet)
    unet = UNet2DConditionModel(**(UNET | {"cross_attention_dim": [12, 16]}))
    with pytest.raises(ValueError, match=r"cross_attention_dim of the UNet is \[12, 16\]"):
        ControlNetModel.from_unet(unet)
