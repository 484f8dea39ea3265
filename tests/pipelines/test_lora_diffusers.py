"""LoRA against diffusers, which has peft for it: the same file, the same seed, the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_lora import kohya, make, peft
from torch import Tensor

import difusores

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")


def sample(pipeline: Any, **options: Any) -> Tensor:
    given = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(1)}
    found: Tensor = pipeline("a cat", **given, **options).images
    return found


def life(library: Any, folder: Path, files: list[Path]) -> dict[str, Tensor]:
    """What a script does with two adapters -> the image."""
    pipeline = library.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = {"plain": sample(pipeline)}
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "hotswap": False}
    pipeline.load_lora_weights(folder, weight_name=files[0].name, adapter_name="one", **options)
    images["loaded"] = sample(pipeline)
    images["scaled"] = sample(pipeline, cross_attention_kwargs={"scale": 0.5})
    pipeline.load_lora_weights(str(files[1]), adapter_name="two")
    pipeline.set_adapters(["one", "two"], adapter_weights=[0.7, 0.4])
    assert sorted(pipeline.get_active_adapters()) == ["one", "two"]
    images["two"] = sample(pipeline)
    pipeline.disable_lora()
    images["disabled"] = sample(pipeline)
    pipeline.enable_lora()
    pipeline.delete_adapters("two")
    pipeline.set_adapters("one")
    images["one again"] = sample(pipeline)
    pipeline.fuse_lora(lora_scale=0.6)
    images["fused"] = sample(pipeline)
    pipeline.unfuse_lora()
    pipeline.set_adapters("one")  # diffusers leaves the factor of the fusion in place, and this resets it
    images["unfused"] = sample(pipeline)
    pipeline.unload_lora_weights()
    images["unloaded"] = sample(pipeline)
    return images


def test_the_life_of_two_adapters(parts: dict[str, Any], tmp_path: Path) -> None:
    """The first one in diffusers' layout, without alpha, which is the rank then; the second in kohya's."""
    pipeline = difusores.StableDiffusionPipeline(**parts)
    pipeline.save_pretrained(tmp_path)
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    pairs = [make(pipeline, seed, rank=2 + seed, alpha=5.0) for seed in (0, 1)]
    save_file({name: value for name, value in peft(pairs[0]).items() if "lora" in name}, files[0])
    save_file(kohya(pairs[1]), files[1])
    ours, theirs = life(difusores, tmp_path, files), life(diffusers, tmp_path, files)
    for name, image in theirs.items():
        assert (ours[name] - image).abs().max() < 2e-3, name
    felt = [name for name, image in ours.items() if (image - ours["plain"]).abs().max() > 1e-2]
    assert felt == ["loaded", "scaled", "two", "one again", "fused", "unfused"]
    assert (ours["two"] - ours["loaded"]).abs().max() > 1e-2
