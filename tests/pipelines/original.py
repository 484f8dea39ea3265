"""The original layout of Stable Diffusion's checkpoints, written down anew: models of ours -> its tensors."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
WHOLE = [
    (r"conv_in", "input_blocks.0.0"),
    (r"conv_norm_out", "out.0"),
    (r"conv_out", "out.2"),
    (r"time_embedding.linear_1", "time_embed.0"),
    (r"time_embedding.linear_2", "time_embed.2"),
    (r"add_embedding.linear_1", "label_emb.0.0"),
    (r"add_embedding.linear_2", "label_emb.0.2"),
    (r"controlnet_mid_block", "middle_block_out.0"),
    (r"controlnet_cond_embedding.conv_in", "input_hint_block.0"),
]


def network(model: Any) -> dict[str, Tensor]:
    """Of a UNet or a ControlNet, without prefix: blocks are numbered through, halvings among them."""
    layers = model.config["layers_per_block"]
    return {_name(name, layers, model.config): tensor for name, tensor in model.state_dict().items()}


def _name(name: str, layers: int, config: Any) -> str:
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        way, block, kind, layer, rest = match.groups()
        number = int(block) * (layers + 1) + int(layer)
        where = f"input_blocks.{number + 1}" if way == "down" else f"output_blocks.{number}"
        return f"{where}.1.{rest}" if kind == "attentions" else f"{where}.0.{_resnet(rest)}"
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv\.(.*)", name):
        number = (int(match[2]) + 1) * (layers + 1)
        if match[1] == "down":
            return f"input_blocks.{number}.0.op.{match[3]}"
        attends = config["up_block_types"][int(match[2])].startswith("Cross")
        return f"output_blocks.{number - 1}.{1 + attends}.conv.{match[3]}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{_resnet(match[3])}"
    if match := re.match(r"controlnet_down_blocks\.(\d+)\.(.*)", name):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    if match := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)\.(.*)", name):
        return f"input_hint_block.{2 * int(match[1]) + 2}.{match[2]}"
    if match := re.match(r"controlnet_cond_embedding\.conv_out\.(.*)", name):
        halvings = len(config["conditioning_embedding_out_channels"]) - 1
        return f"input_hint_block.{4 * halvings + 2}.{match[1]}"
    return next(f"{new}{name[len(old) :]}" for old, new in WHOLE if name.startswith(f"{old}."))


def _resnet(rest: str) -> str:
    layer, kind = rest.split(".")
    return f"{RESNET[layer]}.{kind}"


def autoencoder(model: Any, convolutions: bool = True) -> dict[str, Tensor]:
    """Of an `AutoencoderKL`, without prefix; attention's projections are 1x1 convolutions."""
    count = len(model.config["block_out_channels"])
    found = {}
    for name, tensor in model.state_dict().items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(
            r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)",
            lambda m: f"up.{count - 1 - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}",
            new,
        )
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            new = new.replace("to_out.0", "proj_out").replace("to_", "")
            if tensor.ndim == 2 and convolutions:
                tensor = tensor[:, :, None, None]
        found[new] = tensor
    return found


def plain_clip(model: Any) -> dict[str, Tensor]:
    """Of a text encoder as transformers stored it then, without "….transformer."."""
    found = {}
    for name, tensor in model.state_dict().items():
        inner = name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
        found[inner] = tensor
    found["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return found


def open_clip(model: Any, unused_layer: bool = False) -> dict[str, Tensor]:
    """Of a text encoder as OpenCLIP stores it, without "….model."."""
    state = {name.removeprefix("text_model."): t for name, t in model.state_dict().items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
    }
    width = len(found["ln_final.bias"])
    found["text_projection"] = (
        state["text_projection.weight"].T.contiguous()
        if "text_projection.weight" in state
        else torch.eye(width)
    )
    layers = model.config.num_hidden_layers
    for i in range(layers):
        old, new = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            parts = [state[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
            for ours, theirs in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                found[f"{new}.{theirs}.{kind}"] = state[f"{old}.{ours}.{kind}"]
    if unused_layer:  # Stable Diffusion 2.x stops before the last one
        last = f"transformer.resblocks.{layers - 1}."
        extra = {name: t for name, t in found.items() if name.startswith(last)}
        found |= {name.replace(last, f"transformer.resblocks.{layers}."): t + 1 for name, t in extra.items()}
    return found


def prefixed(**parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """prefixed(model__diffusion_model={...}) -> {"model.diffusion_model.…": ...}."""
    return {
        f"{prefix.replace('__', '.')}.{name}": tensor
        for prefix, tensors in parts.items()
        for name, tensor in tensors.items()
    }
