"""Latent diffusion of 2022: images equal to diffusers' from the same folders, conditions, and bad input."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import difusores
from difusores import LDMPipeline, LDMSuperResolutionPipeline, LDMTextToImagePipeline

fill = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "make.py"))["fill"]

VQ: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "num_vq_embeddings": 512,
    "latent_channels": 3,
    "scaling_factor": 0.7,
}
PLAIN: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "out_channels": 3,
}
CROSSING = PLAIN | {
    "in_channels": 3,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
BERT = {
    "encoder_layers": 1,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "head_dim": 8,
    "d_model": 16,
}
BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("DPMSolverMultistepScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("HeunDiscreteScheduler", {}),
]


def scheduler(name: str = "DDIMScheduler", library: Any = difusores, **options: Any) -> Any:
    return getattr(library, name)(**BETAS, **options)


def spread(model: Any) -> Any:
    """Random weights, as large as trained ones or larger: then conditions are felt."""
    for parameter in fill(model).parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return model.eval()


def unconditional() -> Any:
    unet = spread(difusores.UNet2DModel(in_channels=3, **PLAIN))
    return LDMPipeline(fill(difusores.VQModel(**VQ)).eval(), unet, scheduler(clip_sample=False))


def super_resolution() -> Any:
    unet = spread(difusores.UNet2DModel(in_channels=6, **PLAIN))
    return LDMSuperResolutionPipeline(
        fill(difusores.VQModel(**VQ)).eval(), unet, scheduler(clip_sample=False)
    )


def tokenizer(folder: Path) -> Any:
    pytest.importorskip("transformers")
    from transformers import BertTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", *letters[1:]]
    words += [f"##{letter}" for letter in letters]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer.from_pretrained(folder)


@pytest.fixture
def text_to_image(tmp_path: Path) -> Any:
    words = tokenizer(tmp_path / "words")
    bert = spread(difusores.LDMBertModel(vocab_size=len(words), **BERT))
    unet = spread(difusores.UNet2DConditionModel(**CROSSING))
    vqvae = fill(difusores.VQModel(**VQ)).eval()
    return LDMTextToImagePipeline(vqvae, bert, words, unet, scheduler(clip_sample=False))


def images(pipeline: Any, *args: Any, **options: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "output_type": "np", "generator": torch.Generator().manual_seed(3)}
    return pipeline(*args, **given | options).images


def both(name: str, folder: Path, kind: tuple[str, dict[str, Any]], **options: Any) -> list[Any]:
    """[theirs, ours]: the pipeline of a folder with another scheduler."""
    diffusers = pytest.importorskip("diffusers")
    result = []
    for library in (diffusers, difusores):
        pipeline = getattr(library, name).from_pretrained(folder)
        pipeline.scheduler = scheduler(kind[0], library, **kind[1])
        result.append(images(pipeline, **options))
    assert result[0].std() > 0.02 and np.isfinite(result[0]).all()
    return result


@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind[0])
def test_unconditional_images_are_diffusers(kind: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    unconditional().save_pretrained(tmp_path)
    expected, ours = both("LDMPipeline", tmp_path, kind, batch_size=2)
    assert ours.shape == (2, 64, 64, 3) and np.abs(ours - expected).max() < 2e-3


@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind[0])
def test_super_resolution_images_are_diffusers(kind: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    super_resolution().save_pretrained(tmp_path)
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    expected, ours = both("LDMSuperResolutionPipeline", tmp_path, kind, image=image)
    assert ours.shape == (2, 64, 64, 3) and np.abs(ours - expected).max() < 2e-3


@pytest.mark.filterwarnings("ignore:.*spoilt", "ignore:.*scale_model_input", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", SCHEDULERS[:4], ids=lambda kind: kind[0])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_images_of_texts_are_diffusers(
    text_to_image: Any, kind: tuple[str, dict[str, Any]], scale: float, tmp_path: Path
) -> None:
    text_to_image.save_pretrained(tmp_path / "saved")
    options: dict[str, Any] = {"prompt": ["a cat", "a dog"], "guidance_scale": scale}
    expected, ours = both("LDMTextToImagePipeline", tmp_path / "saved", kind, **options)
    assert ours.shape == (2, 64, 64, 3) and np.abs(ours - expected).max() < 2e-3


def test_noise_of_the_steps(tmp_path: Path) -> None:
    unconditional().save_pretrained(tmp_path)
    diffusers = pytest.importorskip("diffusers")
    result = []
    for library in (diffusers, difusores):
        torch.manual_seed(5)
        pipeline = library.LDMPipeline.from_pretrained(tmp_path)
        result.append(images(pipeline, eta=0.8, generator=None))
    assert np.abs(result[0] - result[1]).max() < 2e-3
    # from the generator, where there is one: theirs is not the same twice
    assert np.array_equal(images(pipeline, eta=0.8), images(pipeline, eta=0.8))
    assert np.abs(images(pipeline, eta=0.8) - images(pipeline)).max() > 1e-2


@pytest.mark.filterwarnings("ignore:.*spoilt", "ignore:.*scale_model_input")
@pytest.mark.parametrize("kind", SCHEDULERS[1:4:2], ids=lambda kind: kind[0])
def test_their_schedulers_in_our_pipelines(text_to_image: Any, kind: tuple[str, dict[str, Any]]) -> None:
    diffusers = pytest.importorskip("diffusers")
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    cases = [(unconditional(), {}), (super_resolution(), {"image": image})]
    cases.append((text_to_image, {"prompt": "a cat", "guidance_scale": 2.0}))
    for pipeline, options in cases:
        result = []
        for library in (diffusers, difusores):
            pipeline.scheduler = scheduler(kind[0], library, **kind[1])
            result.append(images(pipeline, **options))
        assert np.abs(result[0] - result[1]).max() < 2e-3


def test_folders_say_what_diffusers_says(text_to_image: Any, tmp_path: Path) -> None:
    import json

    diffusers = pytest.importorskip("diffusers")
    text_to_image.save_pretrained(tmp_path / "ours")
    theirs = diffusers.LDMTextToImagePipeline.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    index = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("ours", "theirs")]
    for entries in index:
        for name in ("_name_or_path", "_diffusers_version"):
            entries.pop(name, None)
    assert index[0] == index[1] and index[0]["bert"] == ["latent_diffusion", "LDMBertModel"]
    back = difusores.DiffusionPipeline.from_pretrained(tmp_path / "theirs")
    assert type(back) is LDMTextToImagePipeline and type(back.bert) is difusores.LDMBertModel
    assert np.array_equal(images(back, "a cat"), images(text_to_image, "a cat"))


def test_the_text_is_felt(text_to_image: Any) -> None:
    cat, dog = images(text_to_image, ["a cat"]), images(text_to_image, ["a dog"])
    assert np.abs(cat - dog).max() > 1e-2
    torch.manual_seed(1)
    noise = torch.randn(1, 3, 8, 8).repeat(2, 1, 1, 1)
    for options in ({}, {"guidance_scale": 4.0}):
        one = images(text_to_image, ["a cat", "a dog"], latents=noise, **options)
        other = images(text_to_image, ["a dog", "a cat"], latents=noise, **options)
        assert np.abs(one - other[::-1]).max() < 1e-5 < 1e-2 < np.abs(one - other).max()
    guided = images(text_to_image, "a cat", guidance_scale=4.0)
    assert np.abs(guided - cat).max() > 1e-2
    negative = images(text_to_image, "a cat", guidance_scale=4.0, negative_prompt="a cat")
    assert np.abs(negative - cat).max() < 1e-4  # guidance away from the text itself is none
    twice = images(text_to_image, "a cat", num_images_per_prompt=2, latents=noise)
    assert np.abs(twice - images(text_to_image, ["a cat"] * 2, latents=noise)).max() < 1e-6
    with torch.no_grad():  # with gradients, attention is another kernel's
        embeds = text_to_image._encode_texts(["a cat"])
    assert np.array_equal(images(text_to_image, prompt_embeds=embeds), cat)


def test_the_small_image_is_felt() -> None:
    pipeline = super_resolution()
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    swapped = image.flip(0)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    one = images(pipeline, image, generator=generators)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    other = images(pipeline, swapped, generator=generators)
    assert np.abs(one - other[::-1]).max() < 1e-5 < 1e-2 < np.abs(one - other).max()


def test_a_picture_is_cut_to_multiples_of_32() -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import preprocess

    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    pipeline = super_resolution()
    result = images(pipeline, picture, num_inference_steps=2)
    assert result.shape == (1, 256, 512, 3) and diffusers
    assert np.array_equal(images(pipeline, preprocess(picture), num_inference_steps=2), result)


def test_another_decoder_and_callbacks() -> None:
    class Upscale:
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents.repeat_interleave(8, 2).repeat_interleave(8, 3)

    pipeline = unconditional()
    latents = images(pipeline, output_type="latent")
    seen = []

    def halve(pipeline: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(int(time))
        return {"latents": given["latents"] / 2} if step == 3 else {}

    halved = images(pipeline, output_type="latent", callback_on_step_end=halve)
    assert torch.allclose(halved, latents / 2) and len(seen) == 4 and seen == sorted(seen, reverse=True)
    pipeline.vqvae = Upscale()
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(1, torch.Generator().manual_seed(3), num_inference_steps=4, output_type="pt")
    assert result.images.shape == (1, 3, 64, 64)
    (pictures,) = pipeline(num_inference_steps=1, return_dict=False)
    assert pictures[0].size == (64, 64)


def test_bad_input(text_to_image: Any) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (text_to_image, {"prompt": 3}, "string or a list"),
        (text_to_image, {"prompt": "a", "height": 60}, "divisible by 8, and one is 60"),
        (text_to_image, {"prompt": "a", "latents": torch.zeros(1, 3, 4, 8)}, r"\[1, 3, 4, 8\]; needed is"),
        (text_to_image, {"prompt": "a", "latents": torch.full((1, 3, 8, 8), torch.nan)}, "NaN"),
        (text_to_image, {"prompt": "a", "output_type": "jpg"}, "output_type is 'jpg'"),
        (text_to_image, {"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        (text_to_image, {"prompt": "a", "guidance_scale": torch.nan}, "guidance_scale is nan"),
        (text_to_image, {"prompt_embeds": torch.zeros(1, 77, 4)}, "4 wide, and the UNet reads 16"),
        (unconditional(), {"batch_size": 0}, "batch_size is 0; it has to be a whole number, 1 or more"),
        (super_resolution(), {"image": torch.full((1, 3, 8, 8), torch.nan)}, "image: 192 of 192 numbers"),
        (super_resolution(), {}, "image is NoneType; needed is a picture or a tensor"),
        (super_resolution(), {"image": torch.zeros(2, 3, 8, 8), "batch_size": 3}, "there are 2 images"),
        (super_resolution(), {"image": torch.zeros(1, 4, 8, 8)}, "takes 6 channels; .*4 of the image"),
        (super_resolution(), {"image": Image.new("RGB", (31, 40))}, "needed are at least 32"),
        (unconditional(), {"num_inference_steps": 0}, "num_inference_steps"),
    ]
    for pipeline, options, words in cases:
        with pytest.raises(ValueError, match=words):
            images(pipeline, **options)
    with pytest.warns(UserWarning, match="eta is 0.5, and PNDMScheduler has none"):
        pipeline.scheduler = scheduler("PNDMScheduler")
        images(pipeline, eta=0.5)
    with pytest.warns(UserWarning, match="77 tokens.*cut: 'dog dog'"):
        images(text_to_image, "a " + "cat " * 74 + "dog dog")
    with pytest.warns(UserWarning, match="LMSDiscreteScheduler begins with noise .* spoilt"):
        text_to_image.scheduler = scheduler("LMSDiscreteScheduler")
        images(text_to_image, "a cat")
    text_to_image.vqvae = fill(difusores.VQModel(**VQ | {key: VQ[key][:2] for key in list(VQ)[:3]})).eval()
    with pytest.warns(UserWarning, match="factor of 2, .* a side of 16 becomes one of 4 pixels"):
        text_to_image.scheduler = scheduler()
        assert images(text_to_image, "a cat").shape == (1, 4, 4, 3)
