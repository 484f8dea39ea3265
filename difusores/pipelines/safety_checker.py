"""Stable Diffusion's safety checker: which images are near to concepts that are not to be shown."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPVisionModel, PreTrainedModel

logger = logging.getLogger(__name__)

CONCEPTS, SPECIAL = 17, 3
ADJUSTMENT = 0.01
"""Added to all concepts' scores where a special one is found."""


class StableDiffusionSafetyChecker(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Compares CLIP's embedding of an image with those of concepts, each with a threshold of its own.

    Configuration and parameter names are those of the folders of Stable Diffusion 1.x.

    Args:
        config: transformers' `CLIPConfig`, of which `vision_config` and `projection_dim` are used.
    """

    config_class = CLIPConfig
    main_input_name = "clip_input"
    index_library = "stable_diffusion"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.projection_dim
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(CONCEPTS, width), requires_grad=False)
        self.special_care_embeds = nn.Parameter(torch.ones(SPECIAL, width), requires_grad=False)
        self.concept_embeds_weights = nn.Parameter(torch.ones(CONCEPTS), requires_grad=False)
        self.special_care_embeds_weights = nn.Parameter(torch.ones(SPECIAL), requires_grad=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, list[bool]]:
        """Mark images, and make the marked ones black.

        Args:
            clip_input: [N, 3, h, w], the images as CLIP's image processor makes them.
            images: [N, ...] a tensor, an array, or a list of either; it is not changed.

        Returns:
            (images with zeros in place of the marked ones, whether each is marked).
        """
        embeds = self.visual_projection(self.vision_model(clip_input)[1])
        special = _scores(embeds, self.special_care_embeds, self.special_care_embeds_weights)
        near_special = (special > 0).any(axis=1, keepdims=True)
        adjustment = np.where(near_special, np.float32(ADJUSTMENT), np.float32(0))
        scores = _scores(embeds, self.concept_embeds, self.concept_embeds_weights, adjustment)
        marked: list[bool] = (scores > 0).any(axis=1).tolist()
        if not any(marked):
            return images, marked
        logger.warning(
            "%d of %d images may show what is not safe for work; black ones take their place. Another prompt "
            "or seed may help.",
            sum(marked),
            len(marked),
        )
        kept = images.clone() if isinstance(images, Tensor) else images.copy()
        for i in (i for i, mark in enumerate(marked) if mark):
            kept[i] = 0 * kept[i]
        return kept, marked


def _scores(embeds: Tensor, concepts: Tensor, thresholds: Tensor, adjustment: Any = 0.0) -> Any:
    """[N, concepts], cosines above their thresholds, to three digits as the thresholds were chosen for."""
    cosines = F.normalize(embeds) @ F.normalize(concepts).T
    above = cosines.float().cpu().numpy() - thresholds.float().cpu().numpy()
    return np.round(above + adjustment, 3)
