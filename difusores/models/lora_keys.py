"""Names of LoRA tensors in files, and the layers that they mean: the layouts of diffusers, PEFT and kohya."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from difusores.models.lora import LowRank
from difusores.models.original_layout import file_names, unet_modules
from difusores.models.unet_2d_condition import UNet2DConditionModel

KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
"""Prefix of kohya's names -> component. After it, the layer's name has underscores for its points. The UNet's
are diffusers' or, as trainers of Stable Diffusion XL write them, those of the original layout."""

COMPONENTS = ("unet", "text_encoder_2", "text_encoder")
OLD_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Of the text encoder, in diffusers' first layout."""

_WEIGHT = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<ab>[AB])(?:\.[^.]+)?|(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)"
    r"(?P<way>down|up))\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+?)(?:\.lora|_lora|\.lora_linear_layer)?\.alpha")


def read_layers(
    tensors: Mapping[str, Tensor], models: Mapping[str, nn.Module], alphas: Mapping[str, Any]
) -> dict[str, dict[str, LowRank]]:
    """Component -> layer -> its change.

    Args:
        tensors: of a file.
        models: by component: "unet", "text_encoder", "text_encoder_2".
        alphas: of the header of a file by diffusers: "unet.lora_alpha", "unet.alpha_pattern" and others.

    Raises:
        ValueError: tensors fit no layer, lack their other half or have another shape; all are named.
    """
    finders = {name: _Finder(model) for name, model in models.items()}
    found: dict[tuple[str, str], dict[str, str]] = {}
    problems = []
    for key in tensors:
        role, place = _place(key, finders)
        if place is None:
            problems.append(f"{key} fits no layer")
        elif role in found.setdefault(place, {}):
            problems.append(f"{key} and {found[place][role]} are for one layer")
        else:
            found[place][role] = key
    layers: dict[str, dict[str, LowRank]] = {}
    for (component, name), keys in found.items():
        missing = [role for role in ("down", "up") if role not in keys]
        if missing:
            problems.append(f"{', '.join(keys.values())}: no {' and no '.join(missing)} weight beside it")
            continue
        layer = models[component].get_submodule(name)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        down, up = tensors[keys["down"]], tensors[keys["up"]]
        problem = _misfit(layer, down, up)
        if problem:
            problems.append(f"{keys['down']} and {keys['up']} {problem}")
            continue
        rank = len(down)
        alpha = float(tensors[keys["alpha"]]) if "alpha" in keys else _header_alpha(alphas, component, name)
        shape = layer.weight.shape
        if isinstance(layer, nn.Linear):
            down, up = down.reshape(rank, -1), up.reshape(-1, rank)
        else:
            down, up = down.reshape(rank, *shape[1:]), up.reshape(-1, rank, 1, 1)
        factor = 1.0 if alpha is None else alpha / rank
        layers.setdefault(component, {})[name] = LowRank(down.clone(), up.clone(), factor)
    if problems:
        raise ValueError(f"LoRA weights for {', '.join(models)} do not fit: {'; '.join(problems)}")
    return layers


def _place(key: str, finders: Mapping[str, _Finder]) -> tuple[str, tuple[str, str] | None]:
    """(down, up or alpha; (component, layer))."""
    match = _WEIGHT.fullmatch(key)
    if match:
        role = {"A": "down", "B": "up"}.get(match["ab"], match["way"])
    else:
        match, role = _ALPHA.fullmatch(key), "alpha"
    if match is None:
        return role, None
    name = match["layer"]
    for prefix, component in KOHYA.items():
        if name.startswith(prefix):
            layer = finders[component].flat(name.removeprefix(prefix)) if component in finders else None
            return role, None if layer is None else (component, layer)
    component = next((c for c in COMPONENTS if name.startswith(f"{c}.")), "unet")
    layer = finders[component].dotted(name.removeprefix(f"{component}.")) if component in finders else None
    return role, None if layer is None else (component, layer)


class _Finder:
    """Finds a model's layers by the names that files have for them."""

    def __init__(self, model: nn.Module) -> None:
        kinds = (nn.Linear, nn.Conv2d)
        self.names = {name for name, module in model.named_modules() if isinstance(module, kinds)}
        self.by_flat = {name.replace(".", "_"): name for name in self.names}
        if isinstance(model, UNet2DConditionModel):
            original = file_names([f"{name}.weight" for name in self.names], unet_modules(model))
            for ours, theirs in original.items():
                self.by_flat[theirs.removesuffix(".weight").replace(".", "_")] = ours.removesuffix(".weight")

    def dotted(self, name: str) -> str | None:
        return next((form for form in _forms(name, ".") if form in self.names), None)

    def flat(self, name: str) -> str | None:
        return next((self.by_flat[form] for form in _forms(name, "_") if form in self.by_flat), None)


def _forms(name: str, point: str) -> Iterator[str]:
    """A name, and what it may be called in a model of today."""
    name = name.replace(".processor.", ".")
    *path, last = name.split(".")
    renamed = ".".join((*path, OLD_PROJECTIONS.get(last, last)))
    inner = f"text_model{point}"  # transformers 5 has it in one class of two
    for form in (name, f"{name}{point}0", renamed):
        yield from (form, form.removeprefix(inner), inner + form)


def _misfit(layer: nn.Linear | nn.Conv2d, down: Tensor, up: Tensor) -> str | None:
    """What is wrong with the shapes, in words."""
    shape = layer.weight.shape
    rank = len(down) if down.ndim else 0
    fits = (
        rank > 0
        and down.ndim in (2, 4)
        and up.ndim in (2, 4)
        and down.numel() == rank * shape[1:].numel()
        and up.numel() == shape[0] * rank
        and up.shape[:2] == (shape[0], rank)
        and (down.ndim == 2 or down.shape[1:] == (*shape[1:], 1, 1)[:3])
        and (down.ndim == 4 or shape[2:].numel() == 1)
    )
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        return "are for a convolution in groups or with another padding than zeros, which is not supported"
    if not fits:
        return f"have shapes {list(down.shape)} and {list(up.shape)}; the layer's weight has {list(shape)}"
    return None


def _header_alpha(alphas: Mapping[str, Any], component: str, layer: str) -> float | None:
    patterns = alphas.get(f"{component}.alpha_pattern") or {}
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return float(value)
    value = alphas.get(f"{component}.lora_alpha")
    return None if value is None else float(value)
