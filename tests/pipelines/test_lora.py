"""LoRA: both layouts of files, strength, mixtures, fusing, and what comes back after it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import difusores
from difusores.models.lora import lora_state_dict

pytest.importorskip("transformers")

LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.1.resnets.0.conv1",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
)
TEXT_LAYERS = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.0.self_attn.out_proj",
    "encoder.layers.1.mlp.fc1",
)
Pairs = dict[str, dict[str, tuple[Tensor, Tensor, float]]]


@pytest.fixture
def pipeline(parts: dict[str, Any]) -> Any:
    made = difusores.StableDiffusionPipeline(**parts)
    made.set_progress_bar_config(disable=True)
    yield made
    made.unload_lora_weights()  # the text encoder serves all tests


def make(pipeline: Any, seed: int = 0, rank: int = 3, alpha: float = 6.0) -> Pairs:
    """component -> layer -> (A, B, alpha)."""
    generator = torch.Generator().manual_seed(seed)
    found: Pairs = {}
    for component, names in (("unet", LAYERS), ("text_encoder", TEXT_LAYERS)):
        for name in names:
            weight = getattr(pipeline, component).get_submodule(name).weight
            down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.2
            up = torch.randn(len(weight), rank, *(1,) * (weight.ndim - 2), generator=generator) * 0.2
            found.setdefault(component, {})[name] = down, up, alpha
    return found


def kohya(pairs: Pairs) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for component, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        for layer, (down, up, alpha) in pairs[component].items():
            name = prefix + layer.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(pairs: Pairs, ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for component, inner in (("unet", ""), ("text_encoder", "text_model.")):
        for layer, (down, up, alpha) in pairs[component].items():
            name = f"{component}.{inner}{layer}"
            tensors |= {
                f"{name}.{ends[0]}": down,
                f"{name}.{ends[1]}": up,
                f"{name}.alpha": torch.tensor(alpha),
            }
    return tensors


def by_hand(pipeline: Any, *weighted: tuple[Pairs, float]) -> Any:
    """A pipeline with W + weight * alpha / r * B A in the place of W."""
    models = {name: copy.deepcopy(getattr(pipeline, name)) for name in ("unet", "text_encoder")}
    made = difusores.StableDiffusionPipeline(
        **{**pipeline.components, **models}, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    made.unload_lora_weights()  # copies have their own adapters
    for pairs, weight in weighted:
        for component, model in models.items():
            for name, (down, up, alpha) in pairs[component].items():
                old = model.get_submodule(name).weight.data
                change = (up.flatten(1).double() @ down.flatten(1).double()).reshape(old.shape)
                old += (weight * alpha / len(down) * change).float()
    return made


def sample(pipeline: Any, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": generator, **options}
    found: Tensor = pipeline("a cat", **given).images
    return found


def assert_close(value: Tensor, expected: Tensor) -> None:
    assert float((value - expected).norm() / expected.norm()) < 2e-5


@pytest.mark.parametrize("layout", ["kohya", "peft", "old"])
def test_layouts_and_strength(pipeline: Any, layout: str, tmp_path: Path) -> None:
    pairs, plain = make(pipeline), sample(pipeline)
    ends = (
        ("lora_A.default.weight", "lora_B.default.weight")
        if layout == "peft"
        else ("lora.down.weight", "lora.up.weight")
    )
    tensors = kohya(pairs) if layout == "kohya" else peft(pairs, ends)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    names = list(pipeline.unet.state_dict())
    pipeline.load_lora_weights(tmp_path)
    assert list(pipeline.unet.state_dict()) == names
    assert pipeline.get_active_adapters() == ["default_0"]
    changed = sample(pipeline)
    assert float((changed - plain).norm() / plain.norm()) > 1e-2
    assert_close(changed, sample(by_hand(pipeline, (pairs, 1.0))))
    halved = sample(pipeline, cross_attention_kwargs={"scale": 0.5})
    assert_close(halved, sample(by_hand(pipeline, (pairs, 0.5))))
    assert torch.equal(sample(pipeline, cross_attention_kwargs={"scale": 0.0}), plain)
    pipeline.disable_lora()
    assert torch.equal(sample(pipeline), plain)
    pipeline.enable_lora()
    pipeline.unload_lora_weights()
    assert torch.equal(sample(pipeline), plain)


def test_first_layout_of_attention_processors(pipeline: Any) -> None:
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    text = "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"
    tensors = {f"{name}.down.weight": down, f"{name}.up.weight": up}
    tensors |= {f"{text}.down.weight": torch.randn(2, 16), f"{text}.up.weight": torch.randn(16, 2)}
    pipeline.load_lora_weights(tensors, adapter_name="old")
    assert list(lora_state_dict(pipeline.unet, "old")) == [
        f"{name.removeprefix('unet.').replace('.processor.to_out_lora', '.to_out.0')}.lora_{half}.weight"
        for half in "AB"
    ]
    assert "encoder.layers.0.self_attn.q_proj" in next(iter(lora_state_dict(pipeline.text_encoder, "old")))


def test_alpha_in_the_header_of_the_file(pipeline: Any, tmp_path: Path) -> None:
    pairs = make(pipeline)
    tensors = {key: value for key, value in peft(pairs).items() if not key.endswith("alpha")}
    header = {"unet.lora_alpha": 1.5, "unet.alpha_pattern": {"conv1": 6.0}, "text_encoder.lora_alpha": 3.0}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
    state = lora_state_dict(pipeline.unet, "a")
    for layer, factor in ((LAYERS[0], 0.5), (LAYERS[4], 2.0)):
        assert torch.equal(state[f"{layer}.lora_B.weight"], factor * pairs["unet"][layer][1])


def test_several_adapters_fused_and_back(pipeline: Any, tmp_path: Path) -> None:
    one, two = make(pipeline, 1), make(pipeline, 2, rank=2)
    before = copy.deepcopy(pipeline.unet.state_dict())
    plain = sample(pipeline)
    pipeline.load_lora_weights(kohya(one), adapter_name="one")
    pipeline.load_lora_weights(peft(two), adapter_name="two")
    assert pipeline.get_active_adapters() == ["two"]
    pipeline.set_adapters(["one", "two"], [0.7, {"unet": -0.4, "text_encoder": -0.4}])
    expected = sample(by_hand(pipeline, (one, 0.7), (two, -0.4)))
    assert_close(sample(pipeline), expected)
    pipeline.fuse_lora(lora_scale=0.5)
    assert pipeline.fused_loras == {"one", "two"} and pipeline.num_fused_loras == 2
    assert_close(sample(pipeline), sample(by_hand_before(pipeline, before, (one, 0.35), (two, -0.2))))
    with pytest.raises(ValueError, match=r"scale is 0\.3, and adapters are fused"):
        sample(pipeline, cross_attention_kwargs={"scale": 0.3})
    with pytest.raises(ValueError, match="one, two are fused: unfuse them before others are activated"):
        pipeline.set_adapters("one")
    with pytest.raises(ValueError, match="are fused"):
        pipeline.load_lora_weights(kohya(one))
    pipeline.unfuse_lora()
    assert all(torch.equal(value, before[key]) for key, value in pipeline.unet.state_dict().items())
    pipeline.delete_adapters("two")
    assert pipeline.get_list_adapters() == {"unet": ["one"], "text_encoder": ["one"]}
    pipeline.set_adapters("one")
    layers = {
        f"{name}_lora_layers": lora_state_dict(getattr(pipeline, name), "one")
        for name in ("unet", "text_encoder")
    }
    expected = sample(pipeline)
    pipeline.save_lora_weights(tmp_path, **layers)
    pipeline.unload_lora_weights()
    assert torch.equal(sample(pipeline), plain)
    pipeline.load_lora_weights(tmp_path)
    assert_close(sample(pipeline), expected)


def by_hand_before(pipeline: Any, before: dict[str, Tensor], *weighted: tuple[Pairs, float]) -> Any:
    """`by_hand`, where the pipeline's adapters are fused."""
    pipeline.unfuse_lora()
    assert all(torch.equal(value, before[key]) for key, value in pipeline.unet.state_dict().items())
    made = by_hand(pipeline, *weighted)
    pipeline.fuse_lora(lora_scale=0.5)
    return made


def test_adapters_follow_the_models_dtype(pipeline: Any) -> None:
    pipeline.load_lora_weights(kohya(make(pipeline)))
    unet = pipeline.unet.bfloat16()
    x, context = torch.randn(1, 4, 8, 8).bfloat16(), torch.randn(1, 5, 16).bfloat16()
    assert unet(x, 3, context).sample.dtype is torch.bfloat16


def test_keys_that_fit_nothing_are_all_named(pipeline: Any) -> None:
    tensors = kohya(make(pipeline))
    tensors["lora_unet_nowhere.lora_down.weight"] = torch.zeros(1, 1)
    tensors["lora_te2_text_model_final.lora_down.weight"] = torch.zeros(1, 1)
    tensors["lora_unet_conv_in.dora_scale"] = torch.zeros(1)
    tensors["lora_unet_conv_out.lora_up.weight"] = torch.zeros(4, 2, 1, 1)
    tensors["lora_unet_conv_in.lora_down.weight"] = torch.zeros(2, 5, 3, 3)
    tensors["lora_unet_conv_in.lora_up.weight"] = torch.zeros(8, 2, 1, 1)
    with pytest.raises(ValueError) as caught:
        pipeline.load_lora_weights(tensors)
    for part in (
        "lora_unet_nowhere.lora_down.weight fits no layer",
        "lora_te2_text_model_final.lora_down.weight fits no layer",
        "lora_unet_conv_in.dora_scale fits no layer",
        "lora_unet_conv_out.lora_up.weight: no down weight beside it",
        "have shapes [2, 5, 3, 3] and [8, 2, 1, 1]; the layer's weight has [8, 4, 3, 3]",
    ):
        assert part in str(caught.value)
    assert pipeline.get_list_adapters() == {}


def test_bad_input_in_words(pipeline: Any, tmp_path: Path) -> None:
    tensors = kohya(make(pipeline))
    pipeline.load_lora_weights(tensors, adapter_name="one")
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: pipeline.load_lora_weights(tensors, adapter_name="one"), "an adapter 'one' already"),
        (lambda: pipeline.load_lora_weights({}), "no LoRA weights"),
        (lambda: pipeline.set_adapters("two"), "no adapter two; loaded are one"),
        (lambda: pipeline.set_adapters("one", [1.0, 2.0]), "2 adapter_weights for 1 adapters"),
        (lambda: pipeline.set_adapters("one", {"unet": {"mid": 1.0}}), "needed is a number"),
        (lambda: pipeline.fuse_lora(["vae"]), "no component vae"),
        (lambda: pipeline.save_lora_weights(tmp_path), "there are no tensors"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="hotswap is True, and there is no adapter 'two'"):
        pipeline.load_lora_weights(tensors, "two", hotswap=True)
    with pytest.raises(TypeError, match="takes no speed"):
        pipeline.load_lora_weights(tensors, speed=2)
    with pytest.raises(OSError):
        pipeline.load_lora_weights(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(OSError, match=r"no file named pytorch_lora_weights\.safetensors"):
        pipeline.load_lora_weights(tmp_path, use_safetensors=True)
    pipeline.load_lora_weights(tmp_path, "of a pickle", use_safetensors=False)


def test_one_adapter_in_the_place_of_another(pipeline: Any) -> None:
    one, two, three = (make(pipeline, seed) for seed in (1, 2, 3))
    pipeline.load_lora_weights(kohya(one), "one")
    pipeline.load_lora_weights(kohya(two), "two")
    pipeline.set_adapters(["one", "two"], [0.7, 0.4])
    pipeline.load_lora_weights(kohya(three), "two", hotswap=True)
    assert pipeline.get_active_adapters() == ["one", "two"]
    assert_close(sample(pipeline), sample(by_hand(pipeline, (one, 0.7), (three, 0.4))))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_unet_and_two_threads(pipeline: Any) -> None:
    """Adapters act in a compiled model as in a plain one, and a scale is its own thread's."""
    pairs = make(pipeline)
    pipeline.load_lora_weights(kohya(pairs))
    expected = {scale: sample(pipeline, cross_attention_kwargs={"scale": scale}) for scale in (0.5, 1.0)}
    unet = pipeline.unet
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 77, 16))
    plain = unet(*inputs).sample
    assert torch.equal(torch.compile(unet, backend="eager")(*inputs).sample, plain)
    found: dict[float, list[Tensor]] = {0.5: [], 1.0: []}

    def run(scale: float) -> None:
        for _ in range(3):
            found[scale].append(sample(pipeline, cross_attention_kwargs={"scale": scale}))

    threads = [Thread(target=run, args=(scale,)) for scale in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale, images in found.items():
        assert len(images) == 3
        for image in images:
            assert_close(image, expected[scale])
    pipeline.unload_lora_weights()
    bare = torch.compile(unet, backend="eager")
    before = bare(*inputs).sample
    pipeline.load_lora_weights(kohya(pairs))  # after it was compiled
    assert torch.equal(bare(*inputs).sample, plain) and not torch.equal(before, plain)


@torch.no_grad()
def test_adapters_that_change_in_place(pipeline: Any) -> None:
    """What is kept in the model's dtype is made anew."""
    pipeline.load_lora_weights(kohya(make(pipeline)))
    unet = pipeline.unet.to(torch.bfloat16)
    inputs = (torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor(3), torch.randn(1, 77, 16).bfloat16())
    first = unet(*inputs).sample
    for change in unet._lora_adapters.loaded["default_0"].values():
        change.up.mul_(0)
    pipeline_off = unet(*inputs).sample
    pipeline.disable_lora()
    assert torch.equal(pipeline_off, unet(*inputs).sample) and not torch.equal(first, pipeline_off)


class TestTwoTextEncoders:
    """Stable Diffusion XL: trainers name the UNet's layers as the original layout does."""

    UNET = (
        (
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        ),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_2_0_op"),
        ("mid_block.attentions.0.proj_in", "middle_block_1_proj_in"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block_2_emb_layers_1"),
        ("up_blocks.0.resnets.0.conv_shortcut", "output_blocks_0_0_skip_connection"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_1_1_conv"),
        (
            "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj",
            "output_blocks_3_1_transformer_blocks_0_ff_net_0_proj",
        ),
        ("add_embedding.linear_1", "label_emb_0_0"),
        ("time_embedding.linear_2", "time_embed_2"),
        ("conv_in", "input_blocks_0_0"),
        ("conv_out", "out_2"),
    )
    TEXT = (("encoder.layers.0.self_attn.q_proj", "encoder_layers_0_self_attn_q_proj"),)

    @pytest.fixture
    def pipeline(self, xl_parts: dict[str, Any]) -> Any:
        copies = {name: copy.deepcopy(xl_parts[name]) for name in ("text_encoder", "text_encoder_2")}
        made = difusores.StableDiffusionXLPipeline(**{**xl_parts, **copies})
        made.set_progress_bar_config(disable=True)
        return made

    @pytest.mark.parametrize("layout", ["original", "kohya", "diffusers"])
    def test_layouts_and_strength(self, pipeline: Any, layout: str, tmp_path: Path) -> None:
        generator, plain = torch.Generator().manual_seed(0), sample(pipeline)
        changes: list[tuple[Tensor, Tensor]] = []
        tensors: dict[str, Tensor] = {}
        for component, prefix, dotted, layers in (
            ("unet", "lora_unet_", "", self.UNET),
            ("text_encoder", "lora_te1_text_model_", "text_model.", self.TEXT),
            ("text_encoder_2", "lora_te2_text_model_", "text_model.", self.TEXT),
        ):
            model = getattr(pipeline, component)
            inner = model.text_model if hasattr(model, "text_model") else model
            for layer, original in layers:
                weight = inner.get_submodule(layer).weight
                down = torch.randn(2, *weight.shape[1:], generator=generator) * 0.2
                up = torch.randn(len(weight), 2, *(1,) * (weight.ndim - 2), generator=generator) * 0.2
                name = f"{component}.{dotted}{layer}"
                ends = ("lora_A.weight", "lora_B.weight")
                if layout != "diffusers":
                    name = prefix + (original if layout == "original" else layer.replace(".", "_"))
                    ends = ("lora_down.weight", "lora_up.weight")
                tensors |= {
                    f"{name}.{ends[0]}": down,
                    f"{name}.{ends[1]}": up,
                    f"{name}.alpha": torch.tensor(3.0),
                }
                changes.append((weight, 1.5 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)))
        pipeline.load_lora_weights(tensors, adapter_name="one")
        assert {name: len(found["one"]) for name, found in self.loaded(pipeline).items()} == {
            "unet": 11,
            "text_encoder": 1,
            "text_encoder_2": 1,
        }
        whole, half = sample(pipeline), sample(pipeline, cross_attention_kwargs={"scale": 0.5})
        states = {
            f"{name}_lora_layers": lora_state_dict(getattr(pipeline, name), "one")
            for name in self.loaded(pipeline)
        }
        pipeline.save_lora_weights(tmp_path, **states)
        pipeline.unload_lora_weights()
        assert torch.equal(sample(pipeline), plain)
        pipeline.load_lora_weights(tmp_path)
        assert_close(sample(pipeline), whole)
        pipeline.unload_lora_weights()
        for result in (half, whole):
            with torch.no_grad():
                for weight, change in changes:
                    weight += 0.5 * change
            assert float((result - plain).norm() / plain.norm()) > 1e-2
            assert_close(result, sample(pipeline))

    def loaded(self, pipeline: Any) -> dict[str, Any]:
        return {name: adapters.loaded for name, adapters in pipeline._adapters().items()}

    def test_each_text_encoder_is_changed(self, pipeline: Any) -> None:
        plain = pipeline.encode_prompt("a cat")[0]
        for prefix, columns in (("lora_te1_", slice(0, 16)), ("lora_te2_", slice(16, 40))):
            width = columns.stop - columns.start
            name = f"{prefix}text_model_encoder_layers_0_self_attn_q_proj"
            tensors = {
                f"{name}.lora_down.weight": torch.randn(2, width),
                f"{name}.lora_up.weight": torch.randn(width, 2),
            }
            pipeline.load_lora_weights(tensors)
            changed = (pipeline.encode_prompt("a cat")[0] - plain).abs().amax((0, 1)) > 1e-4
            assert changed[columns].all() and int(changed.sum()) == width
            pipeline.unload_lora_weights()
