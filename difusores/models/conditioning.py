"""How a condition reaches a network: the one switch of latent diffusion (Rombach et al. 2022, section 3.3).

A kind of conditioning says which inputs there are and where they go: beside the channels of the sample, to
cross-attention, or to the class embedding. Beside them, some networks are told more: upsamplers the small
images, Stable Diffusion XL a pooled text and sizes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

KINDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "class": ("labels",),
    "crossattn": ("context",),
    "concat": ("image",),
    "hybrid": ("image", "context"),
    "adm": ("vector",),
}
"""Kind of conditioning -> the inputs that it needs."""

BESIDE: dict[str, tuple[str, ...]] = {
    "none": ("low_res",),
    "class": ("low_res",),
    "crossattn": ("text_embeds", "time_ids"),
    "hybrid": ("text_embeds", "time_ids"),
}
"""Kind of conditioning -> the inputs that it takes where the network does; there are no others."""

SHAPES = {
    "labels": "numbers [N]",
    "context": "floating point [N, L, width]",
    "image": "floating point [N, C, H, W]",
    "vector": "floating point [N, width]",
    "low_res": "floating point [N, C, h, w]",
    "text_embeds": "floating point [N, width]",
    "time_ids": "numbers [N, ids]",
}
ARGUMENTS = {
    "labels": "class_labels",
    "vector": "class_labels",
    "context": "encoder_hidden_states",
    "low_res": "low_res",
    "text_embeds": "added_cond_kwargs",
    "time_ids": "added_cond_kwargs",
}
ADDED = ("text_embeds", "time_ids")
"""Inputs that are entries of one argument, a dictionary."""


@dataclass(frozen=True)
class Conditioning:
    """A kind of conditioning with its inputs, for a batch of N.

    Attributes:
        kind: one of `KINDS`.
        labels: [N], rows of the network's label table, or numbers that it embeds (for "class").
        context: [N, L, width], what cross-attention looks at ("crossattn", "hybrid").
        image: [N, C, H, W] of the sample's height and width, joined to its channels ("concat", "hybrid").
        vector: [N, width], what the class embedding is given in place of a label ("adm").
        low_res: [N, C, h, w], the smaller image of which an upsampler makes a larger one.
        text_embeds, time_ids: [N, width] and [N, ids], the pooled text and the sizes that the UNet of Stable
            Diffusion XL is told.

    Raises:
        ValueError: there is no such kind, or an input, which is named, is missing, not expected or misshaped.
    """

    kind: str
    labels: Tensor | None = None
    context: Tensor | None = None
    image: Tensor | None = None
    vector: Tensor | None = None
    low_res: Tensor | None = None
    text_embeds: Tensor | None = None
    time_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"there is no conditioning {self.kind!r}; allowed are {', '.join(KINDS)}")
        needed = KINDS[self.kind]
        taken = (*needed, *BESIDE.get(self.kind, ()))
        for name, shape in SHAPES.items():
            value = getattr(self, name)
            if (value is None) and name in needed:
                raise ValueError(f"conditioning {self.kind!r} needs {name}: {shape}")
            if value is not None and name not in taken:
                raise ValueError(
                    f"conditioning {self.kind!r} takes {', '.join(taken) or 'nothing'}, and no {name}"
                )
            if value is not None and (
                value.ndim != shape.count(",") + 1
                or (shape.startswith("floating") and not value.is_floating_point())
            ):
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}; needed is {shape}")

    @property
    def names(self) -> list[str]:
        """Of the inputs that there are."""
        return [name for name in SHAPES if getattr(self, name) is not None]

    def check(self, model: Any, channels: int) -> None:
        """Compare with a network that is to predict samples of that many channels.

        Raises:
            ValueError: the network does not take one of the inputs, needs more, or has another input width.
        """
        kind, config = type(model).__name__, model.config
        takes = inspect.signature(model.forward).parameters
        passes_on = any(p.kind is p.VAR_KEYWORD for p in takes.values())  # as torch.compile's do
        for name in self.names:
            if name in ARGUMENTS and ARGUMENTS[name] not in takes and not passes_on:
                raise ValueError(f"{kind} takes no {ARGUMENTS[name]}, where {name} would go")
        for names, option, value in _told(config):
            missing = [name for name in names if getattr(self, name) is None]
            if missing and value:
                shapes = " and ".join(f"{name}, {SHAPES[name]}" for name in missing)
                raise ValueError(f"{kind} needs {shapes}: its {option} is {value!r}")
            if len(missing) < len(names) and not value:
                raise ValueError(f"{kind} takes no {' and '.join(names)}: its {option} is {value!r}")
        extra = 0 if self.image is None else self.image.shape[1]
        if config["in_channels"] != channels + extra:
            raise ValueError(
                f"{kind} takes {config['in_channels']} channels; with conditioning {self.kind!r} there are "
                f"{channels} of the sample" + (f" and {extra} of the image" if extra else "")
            )
        if self.labels is not None:
            check_labels(self.labels, label_rows(config), kind)

    def inputs(self, sample: Tensor, image_scale: float = 1.0) -> tuple[Tensor, dict[str, Any]]:
        """What the network is given for a sample [N, C, H, W]: the joined sample, and keyword arguments.

        Args:
            image_scale: factor on the image alone.

        Raises:
            ValueError: the batch, or the image's height and width, is not the sample's.
        """
        given: dict[str, Any] = {}
        for name in self.names:
            value = getattr(self, name)
            if len(value) != len(sample):
                raise ValueError(f"{name} is for a batch of {len(value)}, and the sample's is {len(sample)}")
            if name in ADDED:
                given.setdefault(ARGUMENTS[name], {})[name] = value
            elif name in ARGUMENTS:
                given[ARGUMENTS[name]] = value
        if self.image is None:
            return sample, given
        if self.image.shape[2:] != sample.shape[2:]:
            raise ValueError(
                f"image is {list(self.image.shape[2:])} and the sample {list(sample.shape[2:])}: heights and "
                "widths have to be equal"
            )
        image = self.image.to(sample.dtype)
        return torch.cat((sample, image if image_scale == 1.0 else image_scale * image), dim=1), given

    def part(self, rows: slice) -> Conditioning:
        """That of some rows of the batch."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.names})

    def __call__(
        self, model: Any, sample: Tensor, time: Tensor, image_scale: float = 1.0, **options: Any
    ) -> Any:
        """What the network gives for a noisy sample at a time; options: what else it is told."""
        joined, given = self.inputs(sample, image_scale)
        return model(joined, time, **given, **options)


def _told(config: Any) -> list[tuple[tuple[str, ...], str, Any]]:
    """(inputs that a network may be told beside its kind's, the option that says so, its value)."""
    small, embedding = config.get("small_size"), config.get("addition_embed_type")
    return [
        (("low_res",), "small_size", small),
        (ADDED, "addition_embed_type", embedding if embedding == "text_time" else None),
    ]


def label_rows(config: Any) -> int | None:
    """Rows of a network's table of labels; None where it embeds numbers, or has no labels."""
    table = config.get("num_classes") if config.get("label_type") == "class" else None
    rows: int | None = config.get("num_class_embeds", table)
    return rows


def check_labels(labels: Tensor, rows: int | None, taker: str) -> None:
    """Raise ValueError where labels are no rows of a table; rows: None for no table."""
    if rows is None:
        return
    if labels.is_floating_point() or bool(((labels < 0) | (labels >= rows)).any()):
        raise ValueError(f"labels are {labels.tolist()}; {taker} takes integers from 0 to {rows - 1}")
