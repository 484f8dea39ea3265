"""The switch of conditioning: where each kind's inputs go, and the words for what is missing or too much."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difusores import ADMUNet, UNet2DConditionModel, UNet2DModel
from difusores.models.conditioning import KINDS, Conditioning

INPUTS: dict[str, Tensor] = {
    "labels": torch.tensor([3, 1]),
    "context": torch.ones(2, 5, 7),
    "image": torch.full((2, 3, 4, 4), 2.0),
    "vector": torch.ones(2, 9),
}
SAMPLE = torch.zeros(2, 1, 4, 4)


def given(kind: str) -> dict[str, Tensor]:
    return {name: INPUTS[name] for name in KINDS[kind]}


class Recorder(nn.Module):
    """Returns what it was called with."""

    def forward(self, sample: Tensor, timestep: Any, **conditions: Tensor) -> Any:
        return sample, timestep, conditions


@pytest.mark.parametrize(
    ("kind", "channels", "arguments"),
    [
        ("none", 1, {}),
        ("class", 1, {"class_labels": "labels"}),
        ("crossattn", 1, {"encoder_hidden_states": "context"}),
        ("concat", 4, {}),
        ("hybrid", 4, {"encoder_hidden_states": "context"}),
        ("adm", 1, {"class_labels": "vector"}),
    ],
)
def test_where_inputs_go(kind: str, channels: int, arguments: dict[str, str]) -> None:
    sample, time, conditions = Conditioning(kind, **given(kind))(Recorder(), SAMPLE, torch.tensor(7))
    assert time == 7 and sample.shape == (2, channels, 4, 4)
    assert torch.equal(sample[:, :1], SAMPLE) and (sample[:, 1:] == 2).all()
    assert {name: id(value) for name, value in conditions.items()} == {
        name: id(INPUTS[source]) for name, source in arguments.items()
    }
    assert set(KINDS) == {"none", "class", "crossattn", "concat", "hybrid", "adm"}


def test_the_image_is_scaled_alone_and_takes_the_sample_s_dtype() -> None:
    conditioning = Conditioning("concat", image=INPUTS["image"])
    sample, _ = conditioning.inputs(SAMPLE.to(torch.bfloat16) + 1, image_scale=0.5)
    assert sample.dtype is torch.bfloat16 and (sample == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_or_a_further_input_is_named(kind: str) -> None:
    for name in KINDS[kind]:
        rest = {key: value for key, value in given(kind).items() if key != name}
        with pytest.raises(ValueError, match=f"'{kind}' needs {name}"):
            Conditioning(kind, **rest)
    for name in set(INPUTS) - set(KINDS[kind]):
        with pytest.raises(ValueError, match=f"'{kind}' takes .*and no {name}"):
            Conditioning(kind, **given(kind), **{name: INPUTS[name]})


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("class", {"labels": torch.ones(2, 1, dtype=torch.int64)}),
        ("crossattn", {"context": torch.ones(2, 7)}),
        ("crossattn", {"context": torch.ones(2, 5, 7, dtype=torch.int64)}),
        ("concat", {"image": torch.ones(2, 4, 4)}),
        ("hybrid", {"context": torch.ones(5, 7), "image": INPUTS["image"]}),
        ("adm", {"vector": torch.tensor([1, 2])}),
    ],
)
def test_shapes_and_dtypes(kind: str, wrong: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"needed is (numbers|floating point) \[N"):
        Conditioning(kind, **wrong)


def test_batches_and_sizes() -> None:
    with pytest.raises(ValueError, match="labels is for a batch of 2, and the sample's is 3"):
        Conditioning("class", labels=INPUTS["labels"]).inputs(torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match=r"image is \[4, 4\] and the sample \[4, 5\]"):
        Conditioning("concat", image=INPUTS["image"]).inputs(torch.zeros(2, 1, 4, 5))
    with pytest.raises(ValueError, match="no conditioning 'text'; allowed are none, class"):
        Conditioning("text")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch(kind: str) -> None:
    part = Conditioning(kind, **given(kind)).part(slice(1, 2))
    assert part.kind == kind
    for name in KINDS[kind]:
        assert torch.equal(getattr(part, name), INPUTS[name][1:])


def test_networks_that_do_not_fit() -> None:
    shape = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    plain = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), **shape}
    unet = UNet2DModel(in_channels=4, num_class_embeds=3, **plain)
    Conditioning("concat", image=INPUTS["image"]).check(unet, 1)
    with pytest.raises(ValueError, match=r"takes 4 channels; with .*'concat'.* 2 of the sample and 3 of the"):
        Conditioning("concat", image=INPUTS["image"]).check(unet, 2)
    with pytest.raises(ValueError, match="takes no encoder_hidden_states, where context would go"):
        Conditioning("crossattn", context=INPUTS["context"]).check(unet, 4)
    with pytest.raises(ValueError, match=r"labels are \[3, 1\]; .* from 0 to 2"):
        Conditioning("class", labels=INPUTS["labels"]).check(unet, 4)
    with pytest.raises(ValueError, match=r"labels are \[0.5\]; UNet2DModel takes integers from 0 to 2"):
        Conditioning("class", labels=torch.tensor([0.5])).check(unet, 4)
    compiled = SimpleNamespace(config=unet.config, forward=lambda *args, **options: None)
    Conditioning("class", labels=torch.tensor([0, 2])).check(compiled, 4)
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    crossing = UNet2DConditionModel(
        in_channels=4, attention_head_dim=2, cross_attention_dim=7, **kinds, **shape
    )
    hybrid = Conditioning("hybrid", **given("hybrid"))
    hybrid.check(crossing, 1)
    assert hybrid(crossing, SAMPLE, torch.tensor(3)).sample.shape == (2, 4, 4, 4)


TOLD = {"text_embeds": torch.ones(2, 6), "time_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}


@pytest.mark.parametrize("kind", ["crossattn", "hybrid"])
def test_pooled_texts_and_sizes(kind: str) -> None:
    conditioning = Conditioning(kind, **given(kind), **TOLD)
    _, _, conditions = conditioning(Recorder(), SAMPLE, 0)
    assert {name: id(value) for name, value in conditions.pop("added_cond_kwargs").items()} == {
        name: id(value) for name, value in TOLD.items()
    }
    assert list(conditions) == ["encoder_hidden_states"]
    part = conditioning.part(slice(1, 2))
    assert part.time_ids is not None and part.time_ids.tolist() == [[4, 5, 6]]
    with pytest.raises(ValueError, match="text_embeds is for a batch of 2, and the sample's is 1"):
        Conditioning(kind, **{name: value[:1] for name, value in given(kind).items()}, **TOLD).inputs(
            SAMPLE[:1]
        )
    with pytest.raises(
        ValueError, match=r"text_embeds is torch.float32 .*needed is floating point .N, width"
    ):
        Conditioning(kind, **given(kind), text_embeds=torch.ones(2, 1, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kind_does_not_take_beside_it(kind: str) -> None:
    beside = {**TOLD, "low_res": INPUTS["image"]}
    for name in {"crossattn": ["low_res"], "hybrid": ["low_res"], "none": TOLD, "class": TOLD}.get(
        kind, beside
    ):
        with pytest.raises(ValueError, match=f"'{kind}' takes .*and no {name}"):
            Conditioning(kind, **given(kind), **{name: beside[name]})


def test_networks_that_are_told_more() -> None:
    shape: dict[str, Any] = {"block_out_channels": (8,), "norm_num_groups": 4, "attention_head_dim": 2}
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    plain = UNet2DConditionModel(in_channels=1, out_channels=1, cross_attention_dim=7, **kinds, **shape)
    told = UNet2DConditionModel.from_config(
        plain.config,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 + 3 * 4,
    )
    bare = Conditioning("crossattn", **given("crossattn"))
    full = Conditioning("crossattn", **given("crossattn"), **TOLD)
    full.check(told, 1)
    assert full(told, SAMPLE, torch.tensor(3)).sample.shape == (2, 1, 4, 4)
    with pytest.raises(
        ValueError, match=r"needs text_embeds, floating.* and time_ids, numbers \[N, ids\]: its"
    ):
        bare.check(told, 1)
    with pytest.raises(
        ValueError, match="takes no text_embeds and time_ids: its addition_embed_type is None"
    ):
        full.check(plain, 1)
    small = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1"}
    upsampler = ADMUNet(**small, attention_resolutions="8", small_size=4)
    images = Conditioning("none", low_res=torch.ones(2, 3, 4, 4))
    images.check(upsampler, 3)
    assert images(upsampler, torch.zeros(2, 3, 8, 8), 1).sample.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"ADMUNet needs low_res, floating point .*: its small_size is 4"):
        Conditioning("none").check(upsampler, 3)
    with pytest.raises(ValueError, match="UNet2DModel takes no low_res, where low_res would go"):
        images.check(
            UNet2DModel(**{**shape, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}),
            3,
        )
    with pytest.raises(ValueError, match="takes no low_res: its small_size is None"):
        images.check(ADMUNet(**small, attention_resolutions="8"), 3)
