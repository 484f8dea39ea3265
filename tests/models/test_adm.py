"""ADMUNet and ADMClassifier: names and shapes of the public checkpoints, stored outputs, layers by hand."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from difusores import ADMClassifier, ADMUNet, use_backend
from difusores.models.adm_blocks import AttentionBlock, AttentionPool2d, ResBlock

FIXTURES = Path(__file__).parents[1] / "fixtures"
fill = runpy.run_path(str(FIXTURES / "make.py"))["fill"]

# The options of guided-diffusion's README for its checkpoints.
ALL: dict[str, Any] = {
    "attention_resolutions": "32,16,8",
    "learn_sigma": True,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
AT_256 = {**ALL, "image_size": 256, "num_channels": 256, "num_head_channels": 64, "num_res_blocks": 2}
UNETS: dict[str, dict[str, Any]] = {
    "64x64_diffusion": {
        **ALL,
        "class_cond": True,
        "dropout": 0.1,
        "image_size": 64,
        "num_channels": 192,
        "num_head_channels": 64,
        "num_res_blocks": 3,
        "use_new_attention_order": True,
    },
    "128x128_diffusion": {
        **ALL,
        "class_cond": True,
        "image_size": 128,
        "num_channels": 256,
        "num_heads": 4,
        "num_res_blocks": 2,
    },
    "256x256_diffusion": {**AT_256, "class_cond": True},
    "256x256_diffusion_uncond": AT_256,
    "512x512_diffusion": {**AT_256, "image_size": 512, "class_cond": True},
    "64_256_upsampler": {
        **ALL,
        "class_cond": True,
        "image_size": 256,
        "small_size": 64,
        "num_channels": 192,
        "num_heads": 4,
        "num_res_blocks": 2,
    },
    "128_512_upsampler": {
        **ALL,
        "attention_resolutions": "32,16",
        "class_cond": True,
        "image_size": 512,
        "small_size": 128,
        "num_channels": 192,
        "num_head_channels": 64,
        "num_res_blocks": 2,
    },
    "lsun_bedroom": {**AT_256, "dropout": 0.1},
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "64x64_classifier": {"image_size": 64, "classifier_depth": 4},
    "128x128_classifier": {"image_size": 128},
    "256x256_classifier": {"image_size": 256},
    "512x512_classifier": {"image_size": 512},
}
# sha256 of the lines "name [shape]" in alphabetical order, number of lines, number of parameters: of the
# models that guided-diffusion's own code builds with these options, on the meta device.
EXPECTED = {
    "64x64_diffusion": ("cdbf32c1675c84fb6da4f769818eb4980bc71961a09ee1fd72653565ec04d974", 541, 295904454),
    "128x128_diffusion": ("c56d52445fdb2112b94cacc66f3e72fb277c6468c0a3907521619b0fc87ef37e", 493, 421529606),
    "256x256_diffusion": ("e357403fc997eb00c7f3c70091fdc5286057847a0e1ffc31f6140f1fed305261", 567, 553838086),
    "256x256_diffusion_uncond": (
        "77e18ded5689d791c0f80de615de87c7b701e6613a73e6856ce4baeebb4a6524",
        566,
        552814086,
    ),
    "512x512_diffusion": ("ab03f15f765591ce8e1ffca2860c02fea26bbe6e0300e58ff6576c7660d272dd", 645, 558997638),
    "64_256_upsampler": ("3a8b8bceb82c3f82b22b5dcf81f6e36d85ccad0d36e36f0e3a6243bb7a950f30", 567, 311795910),
    "128_512_upsampler": ("7e722e2f64fce61c3f61d6d062dbf1367c8e8b3d238ec71c62173ec6b8d3e3cd", 537, 308835270),
    "lsun_bedroom": ("77e18ded5689d791c0f80de615de87c7b701e6613a73e6856ce4baeebb4a6524", 566, 552814086),
    "64x64_classifier": ("0b7fc9917ffd8325f41be9ccb410a7ed19b1b246f2ec700d87120b5ec670ee13", 307, 65438568),
    "128x128_classifier": ("e717337216e0644859cedb0c4ed35bb9012a2c6ddf6d460c4b99ed3af8c704ef", 221, 42568040),
    "256x256_classifier": ("bc098f973cf9f8b95ca9251e326846016ea8cd08d65e19bba139551b01721c21", 249, 54096360),
    "512x512_classifier": ("2a24b6c641814825a5b3bc56d50013e856eb1b459b504910ce9a04fa38a6e35f", 281, 54448360),
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


@pytest.mark.parametrize("name", EXPECTED)
def test_public_checkpoints(name: str) -> None:
    with torch.device("meta"):
        model = ADMUNet(**UNETS[name]) if name in UNETS else ADMClassifier(**CLASSIFIERS[name])
    lines = sorted(f"{key} {list(tensor.shape)}" for key, tensor in model.state_dict().items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (digest, len(lines), model.num_parameters()) == EXPECTED[name]
    if name in PAPER:
        assert round(model.num_parameters() / 1e6) == PAPER[name]


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
