"""The original layout of latent diffusion's networks (CompVis, Stability AI): what tensors are called there,
and which configuration their shapes tell.

Names are those inside of a part: without "model.diffusion_model.", "first_stage_model." or "control_model.".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Tensors = Mapping[str, Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
EMBEDDINGS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
HEAD_WIDTH = 64
"""Of attention in Stable Diffusion 2.x and XL, and in CLIP; 1.x has `HEADS` at every width."""
HEADS = 8
SAMPLE_SIZES = {"1.x": 64, "2.x": 96, "XL": 128, "XL refiner": 128}
"""Of latents, in training. Stable Diffusion 2.x base and inpainting have `SMALL_SAMPLE`."""
SMALL_SAMPLE = 64


@dataclass(frozen=True)
class Layout:
    """How one kind of network is stored.

    Attributes:
        part: name of the component in pipelines, and of its folder.
        prefixes: of its tensors in a file with several parts.
        mark: a tensor that every such part has.
        config: config(tensors of the part, family) -> constructor arguments.
        modules: modules(model) -> the model's modules with parameters, and what the file calls them.
    """

    part: str
    prefixes: tuple[str, ...]
    mark: str
    config: Callable[[Tensors, str], dict[str, Any]]
    modules: Callable[[Any], dict[str, str]]


def file_names(names: list[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Name of a parameter -> its name in the file, by the longest module that is in the table, if any."""
    found = {}
    for name in names:
        found[name] = name
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:end])
            if module in modules:
                found[name] = ".".join((modules[module], *parts[end:]))
                break
    return found


def _with_parts(module: str, original: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{module}.{new}": f"{original}.{old}" for new, old in parts.items()}


def way_down_modules(model: Any) -> dict[str, str]:
    """Of what a UNet and a ControlNet have in common: embeddings, the way down, the mid block."""
    names, i = dict(EMBEDDINGS), 1
    for b, block in enumerate(model.down_blocks):
        for r in range(len(block.resnets)):
            names |= _with_parts(f"down_blocks.{b}.resnets.{r}", f"input_blocks.{i}.0", RESNET)
            names[f"down_blocks.{b}.attentions.{r}"] = f"input_blocks.{i}.1"
            i += 1
        if block.downsamplers is not None:
            names[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{i}.0.op"
            i += 1
    names |= _with_parts("mid_block.resnets.0", "middle_block.0", RESNET)
    names["mid_block.attentions.0"] = "middle_block.1"
    return names | _with_parts("mid_block.resnets.1", "middle_block.2", RESNET)


def unet_modules(model: Any) -> dict[str, str]:
    """Of a `UNet2DConditionModel`."""
    names, i = way_down_modules(model), 0
    for b, block in enumerate(model.up_blocks):
        crossing = block.attentions is not None
        for r in range(len(block.resnets)):
            names |= _with_parts(f"up_blocks.{b}.resnets.{r}", f"output_blocks.{i}.0", RESNET)
            names[f"up_blocks.{b}.attentions.{r}"] = f"output_blocks.{i}.1"
            i += 1
        names[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{i - 1}.{2 if crossing else 1}.conv"
    return names | {"conv_norm_out": "out.0", "conv_out": "out.2"}


def controlnet_modules(model: Any) -> dict[str, str]:
    """Of a `ControlNetModel`; of the convolutions over the image, every second entry is an activation."""
    names, hint = way_down_modules(model), "input_hint_block"
    blocks = len(model.controlnet_cond_embedding.blocks)
    names["controlnet_cond_embedding.conv_in"] = f"{hint}.0"
    for i in range(blocks):
        names[f"controlnet_cond_embedding.blocks.{i}"] = f"{hint}.{2 * i + 2}"
    names["controlnet_cond_embedding.conv_out"] = f"{hint}.{2 * blocks + 2}"
    for i in range(len(model.controlnet_down_blocks)):
        names[f"controlnet_down_blocks.{i}"] = f"zero_convs.{i}.0"
    return names | {"controlnet_mid_block": "middle_block_out.0"}


def vae_modules(model: Any) -> dict[str, str]:
    """Of an `AutoencoderKL`; the file counts resolutions from the highest one, on the way up too."""
    names = {}
    for half, way, blocks in (
        ("encoder", "down", model.encoder.down_blocks),
        ("decoder", "up", model.decoder.up_blocks),
    ):
        for b, block in enumerate(blocks):
            module = f"{half}.{way}_blocks.{b}"
            original = f"{half}.{way}.{b if way == 'down' else len(blocks) - 1 - b}"
            for r in range(len(block.resnets)):
                names[f"{module}.resnets.{r}"] = f"{original}.block.{r}"
                names[f"{module}.resnets.{r}.conv_shortcut"] = f"{original}.block.{r}.nin_shortcut"
                names |= _with_parts(f"{module}.attentions.{r}", f"{original}.attn.{r}", VAE_ATTENTION)
            names[f"{module}.{way}samplers.0.conv"] = f"{original}.{way}sample.conv"
        names[f"{half}.mid_block.resnets.0"] = f"{half}.mid.block_1"
        names |= _with_parts(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
        names[f"{half}.mid_block.resnets.1"] = f"{half}.mid.block_2"
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
    return names


def count_numbers(tensors: Tensors, prefix: str) -> int:
    """How many numbers follow the prefix in names."""
    parts = {name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)}
    return len([part for part in parts if part.isdigit()])


def _width(tensors: Tensors, names: Iterable[str]) -> int:
    """Length of the first tensor that there is: one may be missing, which is said later."""
    names = list(names)
    return len(tensors[next((name for name in names if name in tensors), names[0])])


def _levels(tensors: Tensors) -> Iterator[tuple[int, int, int]]:
    """(width, residual blocks, transformer blocks after one) of each resolution on the way down."""
    width = layers = depth = 0
    for i in range(1, count_numbers(tensors, "input_blocks.")):
        block = f"input_blocks.{i}"
        if any(f"{block}.0.op.{kind}" in tensors for kind in ("weight", "bias")):
            yield width, layers, depth
            layers = 0
            continue
        width = _width(tensors, (f"{block}.0.{n}" for n in ("in_layers.2.bias", "out_layers.3.bias")))
        depth = count_numbers(tensors, f"{block}.1.transformer_blocks.")
        layers += 1
    yield width, layers, depth


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _way_down_config(tensors: Tensors, family: str) -> dict[str, Any]:
    levels = list(_levels(tensors))
    widths, layers, depths = (list(column) for column in zip(*levels, strict=True))
    inside = "middle_block.1.transformer_blocks."
    linear = tensors["middle_block.1.proj_in.weight"].ndim == 2
    config: dict[str, Any] = {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "layers_per_block": _one(layers),
        "transformer_layers_per_block": _one(
            [*(d or 1 for d in depths[:-1]), count_numbers(tensors, inside)]
        ),
        "cross_attention_dim": tensors[f"{inside}0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": linear,
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in widths] if linear else HEADS,
        "upcast_attention": family == "2.x",
    }
    if "label_emb.0.0.weight" in tensors:
        config["projection_class_embeddings_input_dim"] = tensors["label_emb.0.0.weight"].shape[1]
        if family.startswith("XL"):
            config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        else:
            config["class_embed_type"] = "projection"
    elif "label_emb.weight" in tensors:
        config["num_class_embeds"] = len(tensors["label_emb.weight"])
    return config


def unet_config(tensors: Tensors, family: str) -> dict[str, Any]:
    """Of a `UNet2DConditionModel`."""
    config = _way_down_config(tensors, family)
    small = family == "2.x" and config["in_channels"] != 4
    return config | {
        "sample_size": SMALL_SAMPLE if small else SAMPLE_SIZES[family],
        "out_channels": len(tensors["out.2.weight"]),
        "up_block_types": [kind.replace("Down", "Up") for kind in config["down_block_types"][::-1]],
    }


def controlnet_config(tensors: Tensors, family: str) -> dict[str, Any]:
    """Of a `ControlNetModel`."""
    hint = "input_hint_block"
    count = count_numbers(tensors, f"{hint}.")
    widths = [len(tensors[f"{hint}.{2 * i}.bias"]) for i in range(count - 1)]
    return _way_down_config(tensors, family) | {
        "conditioning_channels": tensors[f"{hint}.0.weight"].shape[1],
        "conditioning_embedding_out_channels": [widths[0], *widths[2::2]],
    }


def vae_config(tensors: Tensors, family: str) -> dict[str, Any]:
    """Of an `AutoencoderKL`."""
    count = count_numbers(tensors, "encoder.down.")
    blocks = [f"encoder.down.{i}.block.0" for i in range(count)]
    types = [count_numbers(tensors, f"encoder.down.{i}.attn.") > 0 for i in range(count)]
    xl = family.startswith("XL")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": len(tensors["decoder.conv_out.weight"]),
        "block_out_channels": [
            _width(tensors, (f"{block}.conv1.bias", f"{block}.conv2.bias")) for block in blocks
        ],
        "down_block_types": [f"{'Attn' if attends else ''}DownEncoderBlock2D" for attends in types],
        "up_block_types": [f"{'Attn' if attends else ''}UpDecoderBlock2D" for attends in types[::-1]],
        "layers_per_block": count_numbers(tensors, "encoder.down.0.block."),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "sample_size": 8 * SAMPLE_SIZES[family],
        "scaling_factor": 0.13025 if xl else 0.18215,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


UNET = Layout("unet", ("model.diffusion_model.",), "input_blocks.0.0.weight", unet_config, unet_modules)
CONTROLNET = Layout(
    "controlnet", ("control_model.",), "input_hint_block.0.weight", controlnet_config, controlnet_modules
)
VAE = Layout("vae", ("first_stage_model.", "vae."), "encoder.conv_in.weight", vae_config, vae_modules)
