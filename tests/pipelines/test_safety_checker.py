"""The safety checker: decisions by hand and as diffusers makes them, and whole folders with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import difusores

transformers = pytest.importorskip("transformers")

from difusores.pipelines.safety_checker import StableDiffusionSafetyChecker  # noqa: E402

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def build(kind: Any = StableDiffusionSafetyChecker) -> Any:
    """With random concepts, near to which some random images are."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=VISION, projection_dim=8)
    checker = kind(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in checker.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return checker


def nearness(checker: Any, pooled: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    """[N], cosine to the nearest concept, in ascending order."""
    embeds = torch.nn.functional.normalize(checker.visual_projection(pooled).detach())
    return (embeds @ torch.nn.functional.normalize(concepts).T).amax(1).sort().values


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(64, 3, 8, 8, generator=generator), torch.rand(64, 3, 4, 4, generator=generator) + 0.1


def test_decisions_are_diffusers(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    module = pytest.importorskip("diffusers.pipelines.stable_diffusion.safety_checker")
    ours, theirs = build(), build(module.StableDiffusionSafetyChecker)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    seen, images = inputs
    with torch.no_grad():
        pooled = ours.vision_model(seen)[1]
        for name in ("concept_embeds", "special_care_embeds"):
            middle = float(nearness(ours, pooled, getattr(ours, name))[32])
            for checker in (ours, theirs):
                getattr(checker, f"{name}_weights").fill_(middle)
    for dtype in (torch.float32, torch.bfloat16):
        expected, marks = theirs.to(dtype)(clip_input=seen.to(dtype), images=images.clone())
        found, marked = ours.to(dtype)(clip_input=seen.to(dtype), images=images)
        assert marked == marks and 8 < sum(marked) < 56 and torch.equal(found, expected)
        _, marked = ours(clip_input=seen.to(dtype), images=list(images.numpy()))
        assert marked == marks


def test_thresholds_by_hand() -> None:
    """One concept at cosine 0.8 to the image; a special one lowers all thresholds by 0.01."""
    checker = build()
    checker.vision_model.forward = lambda clip_input: (None, clip_input)
    checker.visual_projection = torch.nn.Identity()
    axis = torch.eye(8)
    with torch.no_grad():
        checker.concept_embeds.copy_(axis[2].expand(17, 8))
        checker.concept_embeds[5] = 0.8 * axis[0] + 0.6 * axis[1]
        checker.special_care_embeds.copy_(axis[3].expand(3, 8))
    images = torch.ones(1, 3, 2, 2)
    cases = [(0.7, False, True), (0.799, False, True), (0.7996, False, False), (0.805, False, False)]
    cases += [(0.805, True, True), (0.8096, True, False), (0.8085, True, True)]
    for threshold, special, expected in cases:
        with torch.no_grad():
            checker.concept_embeds_weights.fill_(threshold)
            checker.special_care_embeds_weights.fill_(-0.1 if special else 0.1)
        found, marked = checker(clip_input=3 * axis[:1], images=images)
        assert marked == [expected], (threshold, special)
        assert torch.equal(found, images * (not expected)) and bool((images == 1).all())


def processor() -> Any:
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    return transformers.CLIPImageProcessor(**size)


def sample(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
    return pipeline(["a cat"] * 4, num_inference_steps=2, generator=generator, output_type="np")


@pytest.fixture
def folder(parts: dict[str, Any], tmp_path: Path) -> Path:
    """Of which the first two images are above the threshold."""
    checker = build()
    chosen = {**parts, "safety_checker": checker, "feature_extractor": processor()}
    chosen["requires_safety_checker"] = True
    seen: list[torch.Tensor] = []
    checker.vision_model.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    pipeline = difusores.StableDiffusionPipeline(**chosen)
    sample(pipeline)
    order = nearness(checker, seen[0], checker.concept_embeds)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(float(order[1] + order[2]) / 2)
        checker.special_care_embeds_weights.fill_(2.0)
    pipeline.save_pretrained(tmp_path / "checked")
    return tmp_path / "checked"


def test_a_folder_with_a_safety_checker(
    folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    index = difusores.StableDiffusionPipeline.load_config(folder)
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    read = difusores.StableDiffusionPipeline.from_pretrained(folder)
    assert type(read.safety_checker) is StableDiffusionSafetyChecker and not read.safety_checker.training
    with caplog.at_level(logging.WARNING):
        images, marked = sample(read).to_tuple()
    assert sum(marked) == 2 and "2 of 4 images may show" in caplog.text
    assert [bool((image == 0).all()) for image in images] == marked
    caplog.clear()
    unchecked = difusores.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert "has no safety checker" in caplog.text
    plain = sample(unchecked)
    assert plain.nsfw_content_detected is None and all(image.std() > 0 for image in plain.images)
    for image, other, mark in zip(images, plain.images, marked, strict=True):
        assert mark or np.array_equal(image, other)
    half = difusores.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert half.safety_checker.dtype is torch.bfloat16 and len(sample(half).nsfw_content_detected) == 4
    changed = difusores.StableDiffusionImg2ImgPipeline(**read.components)
    assert changed.safety_checker is read.safety_checker

    diffusers = pytest.importorskip("diffusers")
    theirs = sample(diffusers.StableDiffusionPipeline.from_pretrained(folder))
    assert theirs.nsfw_content_detected == marked and np.abs(theirs.images - images).max() < 2e-3
    diffusers.StableDiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    again = sample(difusores.StableDiffusionPipeline.from_pretrained(tmp_path / "theirs"))
    assert again.nsfw_content_detected == marked and np.array_equal(again.images, images)


def test_names_of_the_published_folder(folder: Path) -> None:
    """There the tower's parameters are one module deeper, with a table that is none, and pickled."""
    path = folder / "safety_checker" / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        inside = name.removeprefix("vision_model.").removeprefix("vision_model.")
        tensors[f"vision_model.vision_model.{inside}" if name.startswith("vision_") else name] = tensor
    tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    expected = sample(difusores.StableDiffusionPipeline.from_pretrained(folder))
    save_file(tensors, path, {"format": "pt"})
    read = difusores.StableDiffusionPipeline.from_pretrained(folder)
    for name, tensor in build().vision_model.state_dict().items():
        assert torch.equal(read.safety_checker.vision_model.state_dict()[name], tensor), name
    assert sample(read).nsfw_content_detected == expected.nsfw_content_detected
