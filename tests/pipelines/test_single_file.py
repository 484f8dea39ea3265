"""Checkpoints of the original layout: which they are, that every tensor arrives, what is said of bad ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import original
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import difusores
from difusores.__main__ import main
from difusores.models.single_file import Checkpoint
from difusores.pipelines.clip_layout import read_text_encoder
from difusores.pipelines.single_file import find_kind, make_scheduler

transformers = pytest.importorskip("transformers")

UNET = difusores.UNet2DConditionModel
V1: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
V2: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "attention_head_dim": (5, 10, 20, 20),
    "upcast_attention": True,
}
XL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = {
    **XL,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 4, 4, 4),
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
KL8: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
# name -> (model, prefix, number of tensors that the published file has of it)
PARTS: dict[str, tuple[Any, dict[str, Any], str, int]] = {
    "1.x": (UNET, V1, "model.diffusion_model.", 686),
    "1.x inpainting": (UNET, {**V1, "in_channels": 9}, "model.diffusion_model.", 686),
    "1.x editing": (UNET, {**V1, "in_channels": 8}, "model.diffusion_model.", 686),
    "2.x": (UNET, V2, "model.diffusion_model.", 686),
    "2.x inpainting": (UNET, {**V2, "in_channels": 9, "sample_size": 64}, "model.diffusion_model.", 686),
    "XL": (UNET, XL, "model.diffusion_model.", 1680),
    "XL refiner": (UNET, REFINER, "model.diffusion_model.", 1220),
    "KL f8": (difusores.AutoencoderKL, KL8, "first_stage_model.", 248),
    "ControlNet": (difusores.ControlNetModel, {"cross_attention_dim": 768}, "control_model.", 340),
}


def listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", PARTS)
def test_published_networks(name: str) -> None:
    """At full width on the meta device: names, shapes and configuration; diffusers has the same names."""
    kind, options, prefix, count = PARTS[name]
    with torch.device("meta"):
        model = kind(**options)
    inner = original.autoencoder(model) if prefix.startswith("first") else original.network(model)
    tensors = {prefix + key: tensor for key, tensor in inner.items()}
    assert len(tensors) == count
    read = kind.from_single_file(tensors)
    assert read.state_dict().keys() == model.state_dict().keys()
    for key in options.keys() | {"cross_attention_dim", "attention_head_dim", "latent_channels"}:
        assert listed(read.config.get(key)) == listed(model.config.get(key)), key
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    convert = {
        "UNet2DConditionModel": utils.convert_ldm_unet_checkpoint,
        "AutoencoderKL": utils.convert_ldm_vae_checkpoint,
        "ControlNetModel": utils.convert_controlnet_checkpoint,
    }[kind.__name__]
    theirs = convert(tensors, dict(model.config))
    assert {key: t.shape for key, t in theirs.items()} == {
        key: t.shape for key, t in read.state_dict().items()
    }


TEXTS: dict[str, tuple[bool, str, dict[str, Any], int]] = {
    "cond_stage_model.transformer.": (
        False,
        "plain_clip",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        197,
    ),
    "cond_stage_model.model.": (
        False,
        "open_clip",
        {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096},
        294,
    ),
    "conditioner.embedders.1.model.": (
        True,
        "open_clip",
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120},
        390,
    ),
}


@pytest.mark.parametrize("prefix", TEXTS)
def test_published_text_encoders(prefix: str) -> None:
    projects, layout, options, count = TEXTS[prefix]
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    act = "gelu" if layout == "open_clip" else "quick_gelu"
    config = transformers.CLIPTextConfig(vocab_size=49408, projection_dim=1280, hidden_act=act, **options)
    with torch.device("meta"):
        model = kind(config)
        unused = {} if projects or layout == "plain_clip" else {"unused_layer": True}
        tensors = getattr(original, layout)(model, **unused)
    assert len(tensors) == count
    checkpoint = Checkpoint("file", {prefix + key: tensor for key, tensor in tensors.items()})
    read = read_text_encoder(checkpoint, prefix, projects, None, None)
    shapes = {key: tensor.shape for key, tensor in read.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in model.state_dict().items()}
    for key in (*options, "hidden_act", "vocab_size", "max_position_embeddings"):
        assert getattr(read.config, key) == getattr(config, key), key


def clip(projects: bool = False, **options: Any) -> Any:
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        **{
            "vocab_size": 194,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 1,
            "num_hidden_layers": 2,
            "projection_dim": 8,
            "bos_token_id": 0,
            "eos_token_id": 2,
            **options,
        }
    )
    torch.manual_seed(1)
    return kind(config).eval()


def test_text_encoders_as_diffusers_reads_them() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    first, second = clip(), clip(True)
    prefix = "conditioner.embedders.1.model."
    tensors = {prefix + key: tensor for key, tensor in original.open_clip(second).items()}
    read = read_text_encoder(Checkpoint("file", tensors), prefix, True, None, None)
    theirs = utils.convert_open_clip_checkpoint(second, tensors, prefix=prefix)
    assert theirs.keys() == read.state_dict().keys() == second.state_dict().keys()
    for key, tensor in second.state_dict().items():
        assert torch.equal(read.state_dict()[key], tensor) and torch.equal(theirs[key], tensor), key
    prefix = "conditioner.embedders.0.transformer."
    tensors = {prefix + key: tensor for key, tensor in original.plain_clip(first).items()}
    read = read_text_encoder(Checkpoint("file", tensors), prefix, False, None, None)
    theirs = utils.convert_ldm_clip_checkpoint(tensors)
    for key, tensor in first.state_dict().items():
        inside = f"text_model.{key.removeprefix('text_model.')}"
        assert torch.equal(read.state_dict()[key], tensor) and torch.equal(theirs[inside], tensor), key


# 32 groups are what a file cannot tell
WIDE: dict[str, Any] = {"block_out_channels": (32, 64), "norm_num_groups": 32}


@pytest.fixture
def build(parts: dict[str, Any], widened: Any) -> Any:
    """build(family, channels) -> (components of a folder, tensors of the file)."""

    def make(family: str = "1.x", channels: int = 4, narrow: bool = False) -> tuple[dict[str, Any], Any]:
        chosen = dict(parts)
        linear = {"use_linear_projection": True, "attention_head_dim": 1} if family == "2.x" else {}
        heads = {"attention_head_dim": 8, **linear}
        chosen["unet"] = widened(channels, **({**linear} if narrow else {**WIDE, **heads}))
        wide = {"block_out_channels": (32, 32), "norm_num_groups": 32}
        if not narrow:
            chosen["vae"] = type(parts["vae"]).from_config(parts["vae"].config, **wide).eval()
        act = "gelu" if family == "2.x" else "quick_gelu"
        chosen["text_encoder"] = clip(hidden_act=act)
        text = (
            {"cond_stage_model__model": original.open_clip(chosen["text_encoder"], unused_layer=True)}
            if family == "2.x"
            else {"cond_stage_model__transformer": original.plain_clip(chosen["text_encoder"])}
        )
        tensors = original.prefixed(
            model__diffusion_model=original.network(chosen["unet"]),
            first_stage_model=original.autoencoder(chosen["vae"]),
            **text,
        )
        return chosen, {**tensors, "betas": torch.zeros(1000), "model_ema.decay": torch.zeros(())}

    return make


def write(path: Path, tensors: dict[str, Tensor], **beside: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save({"state_dict": tensors, **beside}, path)
    return path


def assert_same(read: Any, components: dict[str, Any]) -> None:
    for name in ("unet", "vae", "text_encoder"):
        expected, found = components[name].state_dict(), read.components[name].state_dict()
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), f"{name}.{key}"


def sample(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    given = {"num_inference_steps": 3, "output_type": "pt", "generator": generator, **options}
    return pipeline("a cat", **given).images


CASES = [
    ("StableDiffusionPipeline", "1.x", 4, ".safetensors"),
    ("StableDiffusionPipeline", "2.x", 4, ".ckpt"),
    ("StableDiffusionImg2ImgPipeline", "1.x", 4, ".ckpt"),
    ("StableDiffusionInpaintPipeline", "1.x", 9, ".safetensors"),
    ("StableDiffusionInpaintPipeline", "2.x", 9, ".safetensors"),
    ("StableDiffusionInstructPix2PixPipeline", "1.x", 8, ".safetensors"),
]


@pytest.mark.parametrize(("kind", "family", "channels", "ending"), CASES)
def test_every_tensor_arrives(
    build: Any, tmp_path: Path, kind: str, family: str, channels: int, ending: str
) -> None:
    components, tensors = build(family, channels)
    pipeline_class = getattr(difusores, kind)
    path = write(tmp_path / f"file{ending}", tensors)
    given = {"tokenizer": components["tokenizer"], "requires_safety_checker": False}
    read = pipeline_class.from_single_file(path, **given)
    assert_same(read, components)
    assert read.text_encoder.embeddings if hasattr(read.text_encoder, "embeddings") else read.text_encoder
    v = "v_prediction" if (family, channels) == ("2.x", 4) else "epsilon"
    assert read.scheduler.config.prediction_type == v and not read.unet.training
    options: dict[str, Any] = {}
    if kind != "StableDiffusionPipeline":
        options["image"] = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    if "Inpaint" in kind:
        options["mask_image"] = (options["image"][:, :1] > 0.5).float()
    if "height" in pipeline_class.__call__.__annotations__:
        options |= {"height": 32, "width": 32}
    expected = pipeline_class(**{**components, "scheduler": read.scheduler})
    assert torch.equal(sample(read, **options), sample(expected, **options))


def test_a_folder_tells_the_rest(build: Any, tmp_path: Path) -> None:
    """With config= the weights are the file's, and all else the folder's; diffusers' are the same."""
    components, tensors = build(narrow=True)
    folder, path = tmp_path / "folder", write(tmp_path / "file.safetensors", tensors)
    difusores.StableDiffusionPipeline(**components).save_pretrained(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    read = difusores.StableDiffusionPipeline.from_single_file(path, config=folder)
    assert_same(read, components)
    assert read.unet.config.attention_head_dim == 2 and type(read.scheduler) is difusores.DDIMScheduler
    assert read.config["requires_safety_checker"] is False
    image = sample(read)
    assert torch.equal(image, sample(difusores.StableDiffusionPipeline(**components)))
    out = tmp_path / "out.png"
    given = ["--model", str(path), "--config", str(folder), "--prompt", "a", "--num", "1", "--steps", "2"]
    assert main(["generate", "--out", str(out), *given]) == 0
    with Image.open(out) as picture:
        assert picture.size == (16, 16)
    assert main(["generate", "--out", str(out), "--config", str(folder)]) != 0
    swapped = difusores.StableDiffusionPipeline.from_single_file(
        path, config=folder, prediction_type="v_prediction"
    )
    assert swapped.scheduler.config.prediction_type == "v_prediction"
    assert (sample(swapped) - image).abs().max() > 1e-3
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_single_file(str(path), config=str(folder))
    assert_same(theirs, components)
    assert (sample(theirs) - image).abs().max() < 2e-3


def test_models_alone(build: Any, tmp_path: Path) -> None:
    components, tensors = build()
    path = write(tmp_path / "file.safetensors", tensors)
    inside = {key.removeprefix("first_stage_model."): t for key, t in tensors.items() if "first" in key}
    inside["loss.logvar"] = torch.zeros(())
    alone = write(tmp_path / "vae.pt", inside)
    for kind, name, source in ((UNET, "unet", path), (difusores.AutoencoderKL, "vae", alone)):
        read = kind.from_single_file(source, torch_dtype=torch.bfloat16)
        for key, tensor in components[name].state_dict().items():
            assert torch.equal(read.state_dict()[key], tensor.bfloat16()), key
    vae = difusores.AutoencoderKL.from_single_file(alone, scaling_factor=0.5)
    assert vae.config.scaling_factor == 0.5
    torch.manual_seed(3)
    control = difusores.ControlNetModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        conditioning_embedding_out_channels=(4, 6),
    )
    torch.nn.init.ones_(control.controlnet_mid_block.weight)
    names = original.network(control)
    for tensors in (names, {f"control_model.{key}": tensor for key, tensor in names.items()}):
        read = difusores.ControlNetModel.from_single_file(tensors)
        for key, tensor in control.state_dict().items():
            assert torch.equal(read.state_dict()[key], tensor), key
    folder = tmp_path / "control"
    control.save_pretrained(folder)
    both = difusores.ControlNetModel.from_single_file(
        folder / "diffusion_pytorch_model.safetensors", config=folder
    )
    assert torch.equal(both.controlnet_mid_block.weight, control.controlnet_mid_block.weight)
    given = {"tokenizer": components["tokenizer"], "requires_safety_checker": False}
    pipeline = difusores.StableDiffusionControlNetPipeline
    assert pipeline.from_single_file(path, controlnet=control, **given).controlnet is control
    with pytest.raises(ValueError, match=r"has no controlnet: give controlnet="):
        pipeline.from_single_file(path, **given)


def test_averages_of_training(build: Any) -> None:
    components, tensors = build()
    names = [key for key in tensors if key.startswith("model.")]
    for key in names:
        tensors["model_ema." + key.removeprefix("model.").replace(".", "")] = tensors[key] + 1
    read = UNET.from_single_file(tensors, extract_ema=True)
    for key, tensor in components["unet"].state_dict().items():
        assert torch.equal(read.state_dict()[key], tensor + 1), key
    del tensors["model_ema.diffusion_modelout2weight"]
    with pytest.raises(ValueError, match=r"no averages of 1 weights: model_ema.diffusion_modelout2weight"):
        UNET.from_single_file(tensors, extract_ema=True)


@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
def test_stable_diffusion_xl(
    build: Any, widened: Any, xl_parts: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    """The base model, the refiner (whose second text encoder is alone), and inpainting with 9 channels."""
    refiner, channels = kind == "Img2Img", 9 if kind == "Inpaint" else 4
    linear = {"use_linear_projection": True, "attention_head_dim": 1}
    alone = {"cross_attention_dim": 24, "projection_class_embeddings_input_dim": 5 * 8 + 12}
    added = {**xl_parts["unet"].config, **WIDE, **linear, **(alone if refiner else {})}
    added["in_channels"] = channels
    unet = difusores.UNet2DConditionModel.from_config(added).eval()
    first, second = xl_parts["text_encoder"], xl_parts["text_encoder_2"]
    texts = {"conditioner__embedders__0__model": original.open_clip(second)}
    if not refiner:
        texts = {
            "conditioner__embedders__0__transformer": original.plain_clip(first),
            "conditioner__embedders__1__model": original.open_clip(second),
        }
    tensors = original.prefixed(
        model__diffusion_model=original.network(unet),
        first_stage_model=original.autoencoder(xl_parts["vae"], convolutions=False),
        **texts,
    )
    path = write(tmp_path / "file.safetensors", tensors)
    pipeline = getattr(difusores, f"StableDiffusionXL{kind}Pipeline")
    lacking = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    chosen = {**xl_parts, "unet": unet, **(lacking if refiner else {})}
    folder = pipeline(**chosen)
    folder.save_pretrained(tmp_path / "folder")
    read = pipeline.from_single_file(path, config=tmp_path / "folder")
    for name in ("unet", "text_encoder_2", "vae", *(() if refiner else ("text_encoder",))):
        for key, tensor in chosen[name].state_dict().items():
            assert torch.equal(read.components[name].state_dict()[key], tensor), f"{name}.{key}"
    options: dict[str, Any] = {}
    if kind:
        options["strength"] = 0.7
        options["image"] = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    if channels == 9:
        options["mask_image"] = (options["image"][:, :1] > 0.5).float()
    assert torch.equal(sample(read, **options), sample(folder, **options))

    words = {"tokenizer": None if refiner else chosen["tokenizer"], "tokenizer_2": chosen["tokenizer_2"]}
    told = pipeline.from_single_file(path, vae=chosen["vae"], **words)
    assert (told.text_encoder is None) == refiner
    assert told.config["force_zeros_for_empty_prompt"] is not refiner
    assert told.config.get("requires_aesthetics_score", False) is refiner
    assert told.unet.config.sample_size == 128 and told.unet.config.addition_embed_type == "text_time"
    with pytest.raises(
        ValueError, match=r"is Stable Diffusion XL.* is for Stable Diffusion 1.x and 2.x with"
    ):
        difusores.StableDiffusionPipeline.from_single_file(path)
    vae = difusores.AutoencoderKL(**{**KL8, "block_out_channels": (32,) * 4}).eval()
    inside = original.prefixed(first_stage_model=original.autoencoder(vae), **texts)
    found = difusores.AutoencoderKL.from_single_file(inside)
    assert found.config.scaling_factor == 0.13025 and found.config.sample_size == 1024


def test_what_stable_diffusion_2_predicts(
    build: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    components, tensors = build("2.x")
    given = {"tokenizer": components["tokenizer"], "requires_safety_checker": False}
    read = difusores.StableDiffusionPipeline.from_single_file
    path = write(tmp_path / "file.ckpt", tensors, global_step=875000)
    with caplog.at_level(logging.WARNING):
        told = [read(tensors, prediction_type="epsilon", **given), read(path, **given)]
        scheduler = difusores.EulerDiscreteScheduler()
        told.append(read(tensors, scheduler=scheduler, **given))
    assert not caplog.records and told[-1].scheduler is scheduler
    for pipeline in told:
        assert pipeline.scheduler.config.prediction_type == "epsilon"
        assert pipeline.unet.config.sample_size == 64
    with caplog.at_level(logging.WARNING):
        untold = read(tensors, **given)
    assert untold.unet.config.sample_size == 96
    assert untold.scheduler.config.prediction_type == "v_prediction"
    assert "do not tell what it predicts" in caplog.text
    assert not components["unet"].config.upcast_attention and pipeline.unet.config.upcast_attention


def test_schedulers_of_the_published_folders() -> None:
    find = lambda tensors: find_kind(Checkpoint("file", tensors))  # noqa: E731
    first = "model.diffusion_model.input_blocks.0.0.weight"
    kinds = {
        ("cond_stage_model.transformer.", 4): "PNDMScheduler",
        ("cond_stage_model.transformer.", 8): "EulerAncestralDiscreteScheduler",
        ("cond_stage_model.transformer.", 9): "DDIMScheduler",
        ("cond_stage_model.model.", 4): "DDIMScheduler",
        ("conditioner.embedders.1.model.", 4): "EulerDiscreteScheduler",
    }
    for (encoder, channels), name in kinds.items():
        kind = find({first: torch.zeros(8, channels, 3, 3), f"{encoder}x": torch.zeros(1)})
        scheduler = make_scheduler(kind, "epsilon")
        assert type(scheduler).__name__ == name and scheduler.config.steps_offset == 1
        assert (scheduler.config.beta_start, scheduler.config.beta_end) == (0.00085, 0.012)
        told = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
        assert {k: scheduler.config[k] for k in told if k in scheduler.config}.items() <= told.items()
        spacing = "leading" if name != "EulerAncestralDiscreteScheduler" else "linspace"
        assert scheduler.config.timestep_spacing == spacing


def test_all_that_does_not_fit_is_named(build: Any) -> None:
    components, tensors = build()
    down = "model.diffusion_model.input_blocks.1.0.in_layers.2.bias"
    words = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias"
    query = "first_stage_model.encoder.mid.attn_1.q.weight"
    given = {"tokenizer": components["tokenizer"], "requires_safety_checker": False}
    read = difusores.StableDiffusionPipeline.from_single_file
    broken = {key: tensor for key, tensor in tensors.items() if key != down}
    broken["model.diffusion_model.more.weight"] = torch.zeros(1)
    broken["model.diffusion_model.out.2.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as caught:
        read(broken, **given)
    for found in (f"missing {down}", "unexpected model.diffusion_model.more.weight", "out.2.bias has shape"):
        assert found in str(caught.value)
    assert str(caught.value).count(";") == 2
    for name, tensor, message in (
        (words, None, f"missing {words}"),
        (query, torch.zeros(3, 3, 1, 1), rf"{query} has shape \[3, 3\], and \[32, 32\] is needed"),
    ):
        broken = {**tensors, name: tensor} if tensor is not None else dict(tensors)
        if tensor is None:
            del broken[name]
        with pytest.raises(ValueError, match=message):
            read(broken, **given)
    with pytest.warns(UserWarning, match="has what 1.x has not: embedder.a, lora.b.weight"):
        read({**tensors, "lora.b.weight": torch.zeros(1), "embedder.a": torch.zeros(1)}, **given)


def test_what_was_found_instead(build: Any, tmp_path: Path) -> None:
    components, tensors = build(channels=9)
    unet = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    given = {"tokenizer": components["tokenizer"], "requires_safety_checker": False}
    read = difusores.StableDiffusionPipeline.from_single_file
    path = tmp_path / "objects.ckpt"
    torch.save({"state_dict": {}, "hook": Path("x")}, path)
    damaged = write(tmp_path / "damaged.safetensors", tensors)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (tensors, given, ValueError, r"is Stable Diffusion 1.x with 9 input channels \(inpainting\); "
         r"StableDiffusionPipeline is for Stable Diffusion 1.x and 2.x with 4 input channels"),
        ({"a.b.c": torch.zeros(1), "a.b.d": torch.zeros(1)}, given, ValueError,
         r"has no model.diffusion_model.\*. It has a.b.\* \(2\)"),
        (tmp_path / "nothing.ckpt", given, OSError, "there is no file"),
        (damaged, given, ValueError, "is damaged"),
        (path, given, ValueError, "cannot be read as tensors alone, and other objects could run code"),
        (tensors, {"speed": 2}, TypeError, "takes vae, text_encoder, .* and no speed"),
        (tensors, {"device_map": {"unet": 0}}, NotImplementedError, "device_map is {.unet.: 0}"),
    ]  # fmt: skip
    for source, options, error, message in cases:
        with pytest.raises(error, match=message):
            read(source, **options)
    inpaint = difusores.StableDiffusionInpaintPipeline.from_single_file
    with pytest.raises(
        ValueError, match=r"has no first_stage_model.\* or vae.\*. It has model.diffusion_model"
    ):
        inpaint(unet, **given)
    (tmp_path / "folder" / "tokenizer").mkdir(parents=True)
    index = {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}
    (tmp_path / "folder" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match=r"no file named tokenizer.json or vocab.json .*tokenizer'"):
        inpaint(tensors, config=tmp_path / "folder")
    with pytest.raises(OSError, match="holds no tokenizer, as no such file does: give tokenizer= one"):
        inpaint(tensors, local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"has no model.diffusion_model.middle_block.1.proj_in.weight, which"
    ):
        del unet["model.diffusion_model.middle_block.1.proj_in.weight"]
        UNET.from_single_file(unet)
    with pytest.raises(TypeError, match="from_single_file does not know speed"):
        UNET.from_single_file(tensors, speed=2)


def test_a_link_names_a_repository_and_a_file(monkeypatch: pytest.MonkeyPatch, build: Any) -> None:
    seen: list[Any] = []

    def find(*args: Any, **hub: Any) -> str:
        seen.append((args, hub["revision"]))
        raise OSError("stop")

    monkeypatch.setattr("difusores.models.single_file.find_file", find)
    for link in (
        "https://huggingface.co/a/b/blob/main/c/d.safetensors",
        "hf.co/a/b/resolve/v2/d.ckpt",
    ):
        with pytest.raises(OSError, match="stop"):
            UNET.from_single_file(link)
    assert seen == [(("a/b", "c/d.safetensors"), "main"), (("a/b", "d.ckpt"), "v2")]


def test_the_tokenizer_of_the_hub(monkeypatch: pytest.MonkeyPatch, build: Any, tokenizer_files: Path) -> None:
    """The vocabulary is one for all; what short texts are filled up with is not."""
    monkeypatch.setattr(
        "difusores.pipelines.single_file.find_file", lambda _, name, **hub: str(tokenizer_files / name)
    )
    for family, last in (("1.x", "<|endoftext|>"), ("2.x", "!")):
        pipeline = difusores.StableDiffusionPipeline.from_single_file(
            build(family)[1], prediction_type="epsilon", requires_safety_checker=False
        )
        ids = pipeline.tokenizer("a cat", padding="max_length").input_ids
        assert len(ids) == 77 and pipeline.tokenizer.convert_ids_to_tokens(ids[-1]) == last
