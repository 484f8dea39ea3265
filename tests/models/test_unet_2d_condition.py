"""UNet2DConditionModel: against diffusers from the same folders, every condition, odd sizes, bad input."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from difusores import UNet2DConditionModel

fill = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "make.py"))["fill"]

BASE: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": {},
    "Stable Diffusion 2": {
        "use_linear_projection": True,
        "upcast_attention": True,
        "attention_head_dim": [2, 4],
    },
    "Stable Diffusion XL": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 58,
        "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "inpainting": {"in_channels": 9},
    "editing": {"in_channels": 8},
    "LDM text-to-image": {"center_input_sample": False, "flip_sin_to_cos": True, "layers_per_block": 2},
    "AudioLDM": {
        "class_embed_type": "simple_projection",
        "class_embeddings_concat": True,
        "projection_class_embeddings_input_dim": 12,
        "cross_attention_dim": [32, 64],
    },
    "only_cross_attention": {"only_cross_attention": True},
    "text_proj": {"encoder_hid_dim": 20},
    "pooled text": {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    "depths of layers": {
        "transformer_layers_per_block": [[2], 1],
        "reverse_transformer_layers_per_block": [1, [1, 2]],
    },
    "embeddings": {
        "time_cond_proj_dim": 5,
        "timestep_post_act": "silu",
        "time_embedding_act_fn": "gelu",
        "num_class_embeds": 7,
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
    },
    "class as time": {"class_embed_type": "timestep", "dropout": 0.1, "downsample_padding": 0},
    "class as vector": {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 12,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "center_input_sample": True,
    },
    "kernels": {
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "layers_per_block": [2, 1],
        "mid_block_type": "UNetMidBlock2D",
        "mid_block_scale_factor": 1.5,
    },
    "no mid block": {"mid_block_type": None, "cross_attention_dim": [24, 24]},
}


def inputs(config: dict[str, Any], batch: int, height: int, width: int) -> dict[str, Any]:
    given: dict[str, Any] = {
        "sample": torch.randn(batch, config.get("in_channels", 4), height, width),
        "timestep": torch.arange(1, batch + 1) * 137 % 1000,
        "encoder_hidden_states": None,
    }
    if not config.get("class_embeddings_concat"):
        given["encoder_hidden_states"] = torch.randn(batch, 7, config.get("encoder_hid_dim", 24))
        given["encoder_attention_mask"] = (torch.arange(7) < 5).long().expand(batch, 7)
    if config.get("num_class_embeds"):
        given["class_labels"] = torch.arange(batch) % config["num_class_embeds"]
    elif config.get("class_embed_type") == "timestep":
        given["class_labels"] = torch.arange(1, batch + 1)
    elif config.get("class_embed_type"):
        given["class_labels"] = torch.randn(batch, 12)
    if config.get("time_cond_proj_dim"):
        given["timestep_cond"] = torch.randn(batch, 5)
    if config.get("addition_embed_type") == "text_time":
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 10),
            "time_ids": torch.randint(0, 512, (batch, 6)),
        }
    return given


def relative_l2(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return BASE | CONFIGS[request.param]


@pytest.fixture
def model() -> UNet2DConditionModel:
    return fill(UNet2DConditionModel(**BASE)).eval()


@torch.no_grad()
def test_same_output_from_the_same_folder(config: dict[str, Any], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = fill(diffusers.UNet2DConditionModel(**config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet2DConditionModel.from_pretrained(tmp_path / "theirs")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for batch, height, width in ((1, 8, 16), (3, 13, 9)):
        given = inputs(config, batch, height, width)
        expected = theirs(**given).sample
        assert torch.isfinite(expected).all()
        assert relative_l2(ours(**given).sample, expected) < 2e-5
        given["sample"] = given["sample"].contiguous(memory_format=torch.channels_last)
        assert relative_l2(ours(**given, return_dict=False)[0], expected) < 2e-5
    ours.save_pretrained(tmp_path / "ours")
    back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(back(**given).sample, theirs(**given).sample)
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == json.loads(
        json.dumps({k: v for k, v in back.config.items() if k[0] != "_"})
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL"])
def test_bfloat16_error_is_at_most_twice_theirs(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = BASE | CONFIGS[name]
    theirs = fill(diffusers.UNet2DConditionModel(**config)).eval()
    ours = UNet2DConditionModel(**config).eval()
    ours.load_state_dict(theirs.state_dict())

    def to(given: Any, dtype: torch.dtype) -> Any:
        if isinstance(given, dict):
            return {key: to(value, dtype) for key, value in given.items()}
        return given.to(dtype) if isinstance(given, Tensor) and given.is_floating_point() else given

    given = to(inputs(config, 2, 16, 8), torch.bfloat16)
    expected = theirs.double()(**to(given, torch.float64)).sample
    limit = relative_l2(theirs.bfloat16()(**given).sample, expected)
    assert relative_l2(ours.bfloat16()(**given).sample, expected) <= 2 * limit


@torch.no_grad()
def test_residuals_of_a_controlnet_and_of_an_adapter() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = fill(diffusers.UNet2DConditionModel(**BASE)).eval()
    ours = UNet2DConditionModel(**BASE).eval()
    ours.load_state_dict(theirs.state_dict())
    given = inputs(BASE, 2, 8, 8)
    shapes = [(32, 8), (32, 8), (32, 4), (64, 4)]
    control = {
        "down_block_additional_residuals": [torch.randn(2, c, s, s) for c, s in shapes],
        "mid_block_additional_residual": torch.randn(2, 64, 4, 4),
    }
    inside = [torch.randn(2, 32, 8, 8), torch.randn(2, 64, 4, 4)]
    plain = ours(**given).sample
    for extra in (
        lambda: control,
        lambda: {"down_intrablock_additional_residuals": list(inside)},
        lambda: control | {"down_intrablock_additional_residuals": list(inside)},
        lambda: {"down_block_additional_residuals": list(inside)},
    ):
        expected = theirs(**given, **extra()).sample
        assert relative_l2(ours(**given, **extra()).sample, expected) < 2e-5
        assert relative_l2(expected, plain) > 1e-3
    with pytest.raises(ValueError, match="has 3 tensors; the way down of this model has 4"):
        ours(**given, **(control | {"down_block_additional_residuals": [torch.zeros(1)] * 3}))


@torch.no_grad()
def test_conditions_are_felt_each_by_its_image(model: UNet2DConditionModel) -> None:
    given = inputs(BASE, 2, 8, 8)
    given["timestep"] = 500
    one, two = model(**given).sample
    given["sample"] = given["sample"][:1].expand(2, -1, -1, -1)
    straight = model(**given).sample
    assert relative_l2(straight[1], straight[0]) > 1e-4
    given["encoder_hidden_states"] = given["encoder_hidden_states"].flip(0)
    assert relative_l2(model(**given).sample, straight.flip(0)) < 1e-6
    assert relative_l2(one, two) > 1e-4


@torch.no_grad()
def test_what_the_mask_hides_is_not_felt(model: UNet2DConditionModel) -> None:
    given = inputs(BASE, 1, 8, 8)
    expected = model(**given).sample
    given["encoder_hidden_states"][:, 5:] = 100.0
    assert torch.equal(model(**given).sample, expected)


@torch.no_grad()
def test_a_mask_of_the_pixels_hides_them_from_the_others() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = BASE | {
        "block_out_channels": [32],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    }
    theirs = fill(diffusers.UNet2DConditionModel(**config)).eval()
    ours = UNet2DConditionModel(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    given = inputs(config, 2, 8, 8) | {"attention_mask": (torch.arange(64) < 40).long().expand(2, 64)}
    assert relative_l2(ours(**given).sample, theirs(**given).sample) < 2e-5


def test_compiles_without_a_graph_break_and_reaches_every_gradient(model: UNet2DConditionModel) -> None:
    given = inputs(BASE, 1, 8, 8)
    model.train()
    expected = model(**given).sample
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_l2(compiled(**given).sample.detach(), expected.detach()) < 1e-6
    expected.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}, "down_block_types has 'Simple"),
        ({"cross_attention_dim": [24]}, "cross_attention_dim has 1 entries; block_out_channels has 2"),
        ({"attention_head_dim": 5}, "5 attention heads do not divide the 32 channels"),
        ({"num_attention_heads": 4}, "num_attention_heads has 4"),
        ({"attention_type": "gated"}, "attention_type has 'gated'"),
        ({"dual_cross_attention": True}, "dual_cross_attention has True"),
        ({"norm_num_groups": 5}, "norm_num_groups is 5"),
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim is None"),
        (
            {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 8},
            "needs addition_time_embed_dim",
        ),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim is None"),
        ({"transformer_layers_per_block": [[1], 1]}, "reverse_transformer_layers_per_block has to say"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention has True"),
    ],
)
def test_an_option_that_is_not_supported_is_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel(**(BASE | option))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(1, 3, 8, 8)}, r"needed is \[N, 4, H, W\]"),
        ({"encoder_hidden_states": torch.zeros(1, 7, 25)}, r"needed is \[N, L, 24\]"),
        ({"class_labels": torch.zeros(1)}, "this model is not class-conditional"),
        ({"timestep_cond": torch.zeros(1, 5)}, "no time_cond_proj_dim"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "takes 'scale' alone, got gligen"),
    ],
)
def test_input_that_does_not_fit_is_named(
    model: UNet2DConditionModel, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model(**(inputs(BASE, 1, 8, 8) | change))


def test_a_missing_condition_is_named() -> None:
    xl = UNet2DConditionModel(**(BASE | CONFIGS["Stable Diffusion XL"]))
    given = inputs(BASE | CONFIGS["Stable Diffusion XL"], 1, 8, 8)
    del given["added_cond_kwargs"]["time_ids"]
    with pytest.raises(ValueError, match="added_cond_kwargs lacks time_ids"):
        xl(**given)
    given.pop("added_cond_kwargs")
    with pytest.raises(ValueError, match="lacks text_embeds and time_ids"):
        xl(**given)
    with pytest.raises(ValueError, match="is class-conditional and needs class_labels"):
        UNet2DConditionModel(**BASE, num_class_embeds=3)(**inputs(BASE, 1, 8, 8))
