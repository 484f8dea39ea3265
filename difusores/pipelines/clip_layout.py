"""CLIP's text encoders out of checkpoints of the original layout, as transformers has them.

A checkpoint stores them as transformers did ("….transformer.text_model.") or as OpenCLIP does ("….model."),
where the three projections of attention are one matrix, and the last one stands to the right of its input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from difusores.models.original_layout import HEAD_WIDTH, count_numbers
from difusores.models.single_file import Checkpoint, fill_from

OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
"""Names in transformers -> names in OpenCLIP, of the model and of one layer."""


def read_text_encoder(
    checkpoint: Checkpoint,
    prefix: str,
    projects: bool,
    config: Any,
    dtype: torch.dtype | None,
) -> Any:
    """A `CLIPTextModel`, or a `CLIPTextModelWithProjection`, in evaluation mode.

    Args:
        prefix: of its tensors; OpenCLIP's ends with ".model.".
        projects: make the one with a projection.
        config: a `CLIPTextConfig`; None for that which the shapes tell, with heads of 64 and, of OpenCLIP
            without projection, without the last layer, whose output Stable Diffusion 2.x does not use.
        dtype: None for float32.

    Raises:
        ValueError: weights are missing, unexpected or misshaped, which are all named as the file names them.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tensors = {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
    is_open = prefix.endswith(".model.")
    called = _open_clip_name if is_open else _transformers_name(tensors)
    if is_open:
        tensors = _one_for_each(tensors)
    if config is None:
        try:
            config = CLIPTextConfig(**_config(tensors, called, is_open, projects))
        except KeyError as error:
            raise ValueError(
                f"{checkpoint.path} has no {prefix}{error.args[0]}, which tells the configuration of a text "
                f"encoder. It has {checkpoint.contents()}"
            ) from error
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)
    names = {name: called(name.removeprefix("text_model.")) for name in model.state_dict()}
    if is_open and not projects:
        last = f"transformer.resblocks.{config.num_hidden_layers}."
        tensors = {n: t for n, t in tensors.items() if n != "text_projection" and not n.startswith(last)}
    fill_from(model, names, tensors, dtype, checkpoint.path, prefix)
    for module in model.modules():  # a buffer that no file has, and which the meta device left empty
        if isinstance(getattr(module, "position_ids", None), Tensor):
            module.position_ids = torch.arange(config.max_position_embeddings)[None]
    model.train(False)
    return model


def _transformers_name(tensors: Mapping[str, Tensor]) -> Callable[[str], str]:
    """called(name in the model without "text_model.") -> name in the file, of which some lack that too."""
    inside = "text_model." if any(name.startswith("text_model.") for name in tensors) else ""
    return lambda name: name if name.startswith("text_projection.") else inside + name


def _open_clip_name(name: str) -> str:
    """Name in the model without "text_model." -> name in the file, after `_one_for_each`."""
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer is None:
        return OPEN_CLIP.get(name, name)
    number, module, kind = layer.groups()
    projection = re.fullmatch(r"self_attn\.([qkv])_proj", module)
    if projection is not None:
        return f"transformer.resblocks.{number}.attn.in_proj_{kind} ({projection.group(1)})"
    return f"transformer.resblocks.{number}.{OPEN_CLIP_LAYER.get(module, module)}.{kind}"


def _one_for_each(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's tensors: "a" with q, k, v in it as "a (q)", "a (k)", "a (v)"; the last projection turned."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((".in_proj_weight", ".in_proj_bias")):
            split |= {f"{name} ({part})": t for part, t in zip("qkv", tensor.chunk(3), strict=False)}
        else:
            split[name] = tensor.T.contiguous() if name == "text_projection" else tensor
    return split


def _config(
    tensors: Mapping[str, Tensor], called: Callable[[str], str], is_open: bool, projects: bool
) -> dict[str, Any]:
    """Arguments of a `CLIPTextConfig`; the tokens of begin and end are those of the published folders."""
    words = tensors[called("embeddings.token_embedding.weight")]
    vocabulary, width = words.shape
    layers = count_numbers(tensors, "transformer.resblocks." if is_open else called("encoder.layers."))
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": len(tensors[called("encoder.layers.0.mlp.fc1.bias")]),
        "num_hidden_layers": layers - (is_open and not projects),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": len(tensors[called("embeddings.position_embedding.weight")]),
        "projection_dim": len(tensors[called("text_projection.weight")]) if projects else width,
        "hidden_act": "gelu" if is_open else "quick_gelu",
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
