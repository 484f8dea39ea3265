"""A small Stable Diffusion: components, and folders of them; and tests without diffusers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import difusores

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
VAE: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "projection_dim": 16,
    "max_position_embeddings": 77,
}
XL_UNET: dict[str, Any] = {
    **UNET,
    "cross_attention_dim": 40,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 12,
}
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(autouse=True)
def _without_diffusers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pipeline needs diffusers: where a file does not compare with it, an import of it fails."""
    if 'importorskip("diffusers' not in Path(request.path).read_text(encoding="utf-8"):
        monkeypatch.setitem(sys.modules, "diffusers", None)


def fill(model: torch.nn.Module, seed: int = 0, scale: float = 1.0) -> Any:
    """Weights with an effect, as a seed gives them: random ones with the deviation of a trained layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                deviation = scale / math.sqrt(parameter[0].numel())
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return model.eval()


def write_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows single letters and a few words."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    words = [merge.replace(" ", "") for merge in merges]
    names = [*letters, *(f"{letter}</w>" for letter in letters), *words, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {name: index for index, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, model_max_length=77)


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files of `text_parts`' tokenizer are."""
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="session")
def text_parts(tokenizer_files: Path) -> tuple[Any, Any]:
    """(tokenizer, text encoder)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = write_tokenizer(tokenizer_files)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT, **ends))
    return tokenizer, fill(encoder, 2)


@pytest.fixture(scope="session")
def second_text_parts(
    text_parts: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """(tokenizer, text encoder with a projection)."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer_2"))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = {**TEXT, "hidden_size": 24, "projection_dim": 12}
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(tokenizer), **options, **ends))
    return tokenizer, fill(encoder, 6)


@pytest.fixture
def xl_parts(text_parts: tuple[Any, Any], second_text_parts: tuple[Any, Any]) -> dict[str, Any]:
    """The components of a `StableDiffusionXLPipeline`, with an Euler scheduler."""
    return make_xl_parts(text_parts, second_text_parts)


def make_xl_parts(text_parts: tuple[Any, Any], second_text_parts: tuple[Any, Any]) -> dict[str, Any]:
    """What `xl_parts` gives: new models but for the text encoders."""
    return {
        "vae": fill(difusores.AutoencoderKL(**VAE, scaling_factor=0.13025), 3),
        "text_encoder": text_parts[1],
        "text_encoder_2": second_text_parts[1],
        "tokenizer": text_parts[0],
        "tokenizer_2": second_text_parts[0],
        "unet": fill(difusores.UNet2DConditionModel(**XL_UNET), 4),
        "scheduler": difusores.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    }


@pytest.fixture
def parts(text_parts: tuple[Any, Any]) -> dict[str, Any]:
    """The components of a `StableDiffusionPipeline`, with a DDIM scheduler."""
    tokenizer, encoder = text_parts
    return {
        "vae": fill(difusores.AutoencoderKL(**VAE), 3),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "unet": fill(difusores.UNet2DConditionModel(**UNET), 4),
        "scheduler": difusores.DDIMScheduler(
            **BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@pytest.fixture
def widened() -> Any:
    """widened(channels, base, **options) -> a UNet with that many input channels."""
    return make_widened


def make_widened(channels: int, base: dict[str, Any] = UNET, **options: Any) -> Any:
    config = {**base, "in_channels": channels, "out_channels": 4, **options}
    return fill(difusores.UNet2DConditionModel(**config), 4)
