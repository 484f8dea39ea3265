"""ADMUNet and ADMClassifier: names and shapes of the public checkpoints, stored outputs, layers by hand."""

from __future__ import annotations

import gzip
import hashlib
import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from difusores import ADMClassifier, ADMUNet, use_backend
from difusores.models.adm_blocks import AttentionBlock, AttentionPool2d, ResBlock

FIXTURES = Path(__file__).parents[1] / "fixtures"
fill = runpy.run_path(str(FIXTURES / "make.py"))["fill"]

KEYS = runpy.run_path(str(FIXTURES / "adm_keys.py"))
# Numbers of parameters of the models that guided-diffusion's own code builds, on the meta device.
PARAMETERS = {
    "64x64_diffusion": 295904454,
    "128x128_diffusion": 421529606,
    "256x256_diffusion": 553838086,
    "256x256_diffusion_uncond": 552814086,
    "512x512_diffusion": 558997638,
    "64_256_upsampler": 311795910,
    "128_512_upsampler": 308835270,
    "lsun_bedroom": 552814086,
    "lsun_cat": 552814086,
    "lsun_horse": 552814086,
    "64x64_classifier": 65438568,
    "128x128_classifier": 42568040,
    "256x256_classifier": 54096360,
    "512x512_classifier": 54448360,
}
# The paper's figures, in millions (tables of hyperparameters in its appendix): all agree, when rounded.
PAPER = {
    "64x64_diffusion": 296,
    "128x128_diffusion": 422,
    "256x256_diffusion": 554,
    "512x512_diffusion": 559,
    "64_256_upsampler": 312,
    "128_512_upsampler": 309,
    "64x64_classifier": 65,
    "128x128_classifier": 43,
    "256x256_classifier": 54,
    "512x512_classifier": 54,
}


@pytest.fixture(scope="module")
def listed() -> dict[str, list[str]]:
    """checkpoint -> "name [shape]" of its tensors."""
    lists: dict[str, list[str]] = json.loads(
        gzip.decompress((FIXTURES / "adm" / "keys.json.gz").read_bytes())
    )
    return lists


@cache
def built(options: str) -> tuple[list[str], int]:
    """(lines, number of parameters) of our model."""
    is_unet, config = json.loads(options)
    with torch.device("meta"):
        model = ADMUNet(**config) if is_unet else ADMClassifier(**config)
    lines = sorted(f"{key} {list(tensor.shape)}" for key, tensor in model.state_dict().items())
    return lines, model.num_parameters()


@pytest.mark.parametrize("name", PARAMETERS)
def test_public_checkpoints(name: str, listed: dict[str, list[str]]) -> None:
    assert hashlib.sha256("\n".join(listed[name]).encode()).hexdigest() == KEYS["DIGESTS"][name]
    lines, count = built(json.dumps((name in KEYS["UNETS"], {**KEYS["UNETS"], **KEYS["CLASSIFIERS"]}[name])))
    assert lines == listed[name]
    assert count == PARAMETERS[name]
    if name in PAPER:
        assert round(count / 1e6) == PAPER[name]


def test_the_lists_are_those_that_the_command_writes(listed: dict[str, list[str]]) -> None:
    assert dict(KEYS["lists"]()) == listed


def stored() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(FIXTURES / "adm" / "models.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.detach().double() - expected.double()).norm() / expected.double().norm())


def build(name: str) -> tuple[ADMUNet, dict[str, torch.Tensor], torch.Tensor]:
    """A model, its inputs, and what guided-diffusion's model gives."""
    tensors, metadata = stored()
    config = json.loads(metadata["configs"])[name]
    inputs = {key: tensors[key] for key in ("sample", "timestep")}
    if config.get("class_cond"):
        inputs["class_labels"] = tensors["class_labels"]
    if config.get("small_size"):
        inputs["low_res"] = tensors["low_res"]
    return fill(ADMUNet(**config)).eval(), inputs, tensors[name]


CASES = ("class_conditional", "unconditional", "upsampler")


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_stored_output(name: str) -> None:
    model, inputs, expected = build(name)
    output = model(**inputs).sample
    assert relative_l2(output, expected) < 2e-5
    assert torch.equal(output, model(**inputs, return_dict=False)[0])
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    assert relative_l2(model(**inputs).sample, expected) < 2e-5


@torch.no_grad()
def test_bfloat16() -> None:
    """At most twice the error of plain PyTorch in the same dtype."""
    model, inputs, expected = build("class_conditional")
    model, inputs["sample"] = model.to(torch.bfloat16), inputs["sample"].bfloat16()
    output = model(**inputs).sample
    with use_backend("reference"):
        plain = model(**inputs).sample
    assert output.dtype is torch.bfloat16
    assert relative_l2(output, expected) <= 2 * relative_l2(plain, expected) < 0.1


@torch.no_grad()
def test_bfloat16_of_the_classifier() -> None:
    """Likewise."""
    tensors, metadata = stored()
    classifier = fill(ADMClassifier(**json.loads(metadata["classifier"]))).eval().to(torch.bfloat16)
    inputs = tensors["sample"].bfloat16(), tensors["timestep"]
    output = classifier(*inputs)
    with use_backend("reference"):
        plain = classifier(*inputs)
    assert output.dtype is torch.bfloat16
    assert relative_l2(output, tensors["logits"]) <= 2 * relative_l2(plain, tensors["logits"]) < 0.1


@torch.no_grad()
def test_one_graph() -> None:
    model, inputs, expected = build("class_conditional")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_l2(compiled(**inputs).sample, expected) < 2e-5


def test_classifier_and_its_gradient() -> None:
    tensors, metadata = stored()
    classifier = fill(ADMClassifier(**json.loads(metadata["classifier"]))).eval()
    x = tensors["sample"].requires_grad_()
    logits = classifier(x, tensors["timestep"])
    assert relative_l2(logits, tensors["logits"]) < 2e-5
    log_p = logits.log_softmax(dim=-1)
    (gradient,) = torch.autograd.grad(log_p[0, 4] + log_p[1, 1], x)
    assert relative_l2(gradient, tensors["gradient"]) < 2e-5
    with pytest.raises(ValueError, match="this classifier's images are 8x8"):
        classifier(torch.zeros(1, 3, 16, 16), 0)


def test_scale_and_shift_by_hand() -> None:
    """Two constant groups would normalise to 0; what is left is the shift, and 1 + scale scales the bias."""
    block = ResBlock(32, 32, 4, 0.0, scale_shift=True)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.emb_layers[1].bias[:32] = 0.5  # scale
        block.emb_layers[1].bias[32:] = 2.0  # shift
        block.out_layers[0].bias.fill_(4.0)  # of the normalisation
        block.out_layers[3].bias.fill_(1.0)
        block.out_layers[3].weight[:, :, 1, 1] = torch.eye(32)
    # h = silu(4 * (1 + 0.5) + 2) = silu(8), plus the convolution's bias 1, plus x = 3
    expected = 3 + 1 + 8 / (1 + torch.tensor(-8.0).exp())
    output = block(torch.full((1, 32, 2, 2), 3.0), torch.zeros(1, 4))
    torch.testing.assert_close(output, expected.expand(1, 32, 2, 2))


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_orders_by_hand(new_order: bool) -> None:
    """The projection's bias alone tells who is a value: the first order has q, k, v head by head."""
    block = AttentionBlock(32, heads=2, new_order=new_order)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.qkv.bias.copy_(torch.arange(96.0))
        block.proj_out.weight[:, :, 0] = torch.eye(32)
    output = block(torch.zeros(1, 32, 1, 2))[0, :, 0, 1]
    values = (
        torch.arange(64.0, 96) if new_order else torch.cat((torch.arange(32.0, 48), torch.arange(80.0, 96)))
    )
    torch.testing.assert_close(output, values)


def test_attention_pooling_by_hand() -> None:
    """With no keys all weights are equal: the mean over the pixels and their mean, plus its embedding."""
    pool = AttentionPool2d(2, 4, 4, out_channels=4)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.zero_()
        pool.qkv_proj.weight[8:, :, 0] = torch.eye(4)
        pool.c_proj.weight[:, :, 0] = torch.eye(4)
        pool.positional_embedding[:, 0] = 5.0  # of the mean alone, one token of five
    x = torch.arange(16.0).view(1, 4, 2, 2)
    torch.testing.assert_close(pool(x), x.mean(dim=(2, 3)) + 1.0)


SMALL: dict[str, Any] = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}


def test_a_folder_gives_back_the_same_model(tmp_path: Path) -> None:
    for model in (
        fill(ADMUNet(**SMALL, attention_resolutions=[4], class_cond=True, num_classes=3)),
        fill(ADMClassifier(8, 32, 1, "4", channel_mult="1,2", num_head_channels=32, num_classes=3)),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name


@torch.no_grad()
def test_labels_that_are_numbers() -> None:
    model = fill(ADMUNet(**SMALL, attention_resolutions="4", class_cond=True, label_type="number")).eval()
    assert [tuple(p.shape) for p in model.label_emb.parameters()] == [(128, 1), (128,), (128, 128), (128,)]
    x = torch.randn(2, 3, 8, 8)
    both = model(x, 1.5, class_labels=torch.tensor([0.25, 1.0])).sample
    swapped = model(x.flip(0), 1.5, class_labels=torch.tensor([1.0, 0.25])).sample
    torch.testing.assert_close(both, swapped.flip(0))
    assert not torch.allclose(both, model(x, 1.5, class_labels=torch.tensor([0.75, 1.0])).sample)
    assert not torch.allclose(both, model(x, 1.0, class_labels=torch.tensor([0.25, 1.0])).sample)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channel_mult": ""}, "image_size is 8; without channel_mult the sizes 64, 128, 256, 512"),
        ({"channel_mult": "1,x"}, "needed are numbers with commas"),
        ({"num_channels": 8}, r"widths of \[8, 16\]; needed are multiples of 32"),
        ({"attention_resolutions": "32"}, "attention_resolutions has 32; this network's are 8, 4"),
        ({"num_head_channels": 48}, "num_head_channels is 48; needed is a divisor of .* here 64"),
        ({"num_heads": 5}, "num_heads is 5; needed is a divisor"),
        ({"label_type": "text"}, "label_type is 'text'; allowed are 'class' and 'number'"),
    ],
)
def test_bad_options_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ADMUNet(**{**SMALL, "attention_resolutions": "4", **options})


def test_bad_inputs_in_words() -> None:
    plain = ADMUNet(**SMALL, attention_resolutions="4")
    x = torch.zeros(2, 3, 8, 8)
    for model, inputs, words in (
        (
            plain,
            {"sample": x[:, :, :7]},
            r"\[2, 3, 7, 8\]; needed is \[N, 3, H, W\] with H and W multiples of 2",
        ),
        (plain, {"class_labels": torch.zeros(2)}, "takes no class_labels: class_cond is False"),
        (plain, {"low_res": x}, "takes no low_res"),
        (plain, {"timestep": torch.zeros(3)}, "timestep has 3 elements"),
        (ADMUNet(**SMALL, attention_resolutions="4", class_cond=True), {}, "needs class_labels"),
        (ADMUNet(**SMALL, attention_resolutions="4", small_size=4), {}, "is an upsampler and needs low_res"),
        (
            ADMUNet(**SMALL, attention_resolutions="4", small_size=4),
            {"low_res": x[:1]},
            r"low_res has shape \[1, 3, 8, 8\]; needed is \[2, 3, h, w\]",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            model(**{"sample": x, "timestep": 0, **inputs})
    with pytest.raises(ValueError, match="classifier_pool is 'spatial'; allowed is 'attention'"):
        ADMClassifier(classifier_pool="spatial")
