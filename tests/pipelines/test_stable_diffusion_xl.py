"""Stable Diffusion XL: conditions are felt, one encoder or two, bad input is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import difusores

from .conftest import XL_UNET

pytest.importorskip("transformers")

TEXT, CHANGE = "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"
FILL = "StableDiffusionXLInpaintPipeline"
IMAGE = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
MASK = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
GIVEN: dict[str, dict[str, Any]] = {
    TEXT: {},
    CHANGE: {"image": IMAGE, "strength": 1.0},
    FILL: {"image": IMAGE, "mask_image": MASK},
}
EMBEDS = {"prompt_embeds": torch.zeros(1, 77, 40), "pooled_prompt_embeds": torch.zeros(1, 12)}
REFINER = {"cross_attention_dim": 24, "projection_class_embeddings_input_dim": 5 * 8 + 12}


@pytest.fixture
def make(xl_parts: dict[str, Any], widened: Any) -> Any:
    """make(kind, channels, **components) -> a pipeline."""

    def build(kind: str = TEXT, channels: int = 4, **changed: Any) -> Any:
        unet = xl_parts["unet"] if channels == 4 else widened(channels, XL_UNET)
        pipeline = getattr(difusores, kind)(**{**xl_parts, "unet": unet, **changed})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


@pytest.fixture
def refiner(make: Any, widened: Any) -> Any:
    return make(
        CHANGE,
        text_encoder=None,
        tokenizer=None,
        unet=widened(4, XL_UNET, **REFINER),
        requires_aesthetics_score=True,
    )


def sample(pipeline: Any, prompt: Any = "a cat", seeds: Any = 1, **options: Any) -> Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in np.atleast_1d(seeds).tolist()]
    given = {"num_inference_steps": 2, "output_type": "pt", **GIVEN[type(pipeline).__name__], **options}
    found: Tensor = pipeline(prompt, generator=generator, **given).images
    return found


def cast(pipeline: Any, dtype: torch.dtype) -> None:
    """All but the text encoders, which serve all tests."""
    pipeline.vae.to(dtype)
    pipeline.unet.to(dtype)


def differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_prompts_are_felt(make: Any) -> None:
    pipeline = make()
    pair = sample(pipeline, ["a cat", "a dog"], (1, 1))
    assert differ(pair[0], pair[1]) > 1e-2
    assert differ(sample(pipeline, ["a dog", "a cat"], (1, 1)).flip(0), pair) < 1e-5
    assert torch.equal(sample(pipeline), sample(pipeline, prompt_2="a cat"))
    assert differ(sample(pipeline), pair[:1]) < 1e-5
    for change in ({"prompt_2": "a dog"}, {"negative_prompt": "a dog"}, {"negative_prompt": ""}):
        assert differ(sample(pipeline, **change), pair[:1]) > 1e-3
    whole = {"prompt_2": ["x", "y"], "negative_prompt": ["u", "v"], "negative_prompt_2": ["m", "n"]}
    twice = sample(pipeline, ["a", "b"], (1, 1, 2, 2), num_images_per_prompt=2, **whole)
    turned = sample(
        pipeline,
        ["b", "a"],
        (2, 2, 1, 1),
        num_images_per_prompt=2,
        **{name: texts[::-1] for name, texts in whole.items()},
    )
    assert differ(twice[[0, 2]], twice[[1, 3]]) < 1e-5 and differ(turned[[2, 0]], twice[[0, 2]]) < 1e-5
    assert torch.equal(
        sample(pipeline, ["a", "b"], (1, 2), negative_prompt="u"),
        sample(pipeline, ["a", "b"], (1, 2), negative_prompt=["u", "u"]),
    )


def test_guidance_of_one_is_none(make: Any) -> None:
    pipeline = make()
    alone = sample(pipeline, guidance_scale=1.0)
    assert differ(sample(pipeline, negative_prompt="a cat"), alone) < 1e-5
    assert differ(sample(pipeline, guidance_scale=1 + 1e-6), alone) < 1e-4
    assert differ(sample(pipeline), alone) > 1e-2
    assert differ(sample(pipeline, guidance_interval=(0.5, 0.5)), alone) < 1e-5


@pytest.mark.parametrize("kind", [TEXT, CHANGE, FILL])
def test_guidance_in_an_interval(make: Any, kind: str) -> None:
    pipeline, rows, seen = make(kind), [], []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    whole: dict[str, Any] = {} if kind == TEXT else {"strength": 1.0}
    whole["callback_on_step_end"] = lambda pipe, step, time, tensors: seen.append(step)
    sample(pipeline, num_inference_steps=4, guidance_interval=(0.25, 0.75), **whole)
    assert rows == [1, 2, 2, 1] and seen == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [TEXT, CHANGE, FILL])
def test_the_models_own_scheduler_is_believed(make: Any, kind: str) -> None:
    pipeline = make(kind)
    pipeline._trained_with = pipeline.scheduler
    pipeline.scheduler = difusores.DDIMScheduler.from_config(
        pipeline.scheduler.config, prediction_type="v_prediction"
    )
    with pytest.raises(ValueError, match=r"'v_prediction'.*'epsilon'"):
        sample(pipeline)
    assert torch.isfinite(sample(pipeline, strict=False)).all()


@pytest.mark.parametrize("kind", [CHANGE, FILL])
def test_prompts_that_change_places(make: Any, kind: str) -> None:
    """With them the images do, too; and guidance of 1 is none."""
    pipeline = make(kind)
    twice = {"image": IMAGE.repeat(2, 1, 1, 1)}  # so each generator encodes one
    pair = sample(pipeline, ["a cat", "a dog"], (1, 1), **twice)
    assert differ(pair[0], pair[1]) > 1e-3
    assert differ(sample(pipeline, ["a dog", "a cat"], (1, 1), **twice).flip(0), pair) < 1e-5
    alone = sample(pipeline, guidance_scale=1.0)
    assert differ(sample(pipeline, guidance_scale=1 + 1e-6), alone) < 1e-4 < differ(pair[:1], alone)


SIZES: list[tuple[str, dict[str, Any]]] = [
    (TEXT, {"original_size": (90, 30)}),
    (TEXT, {"crops_coords_top_left": (5, 9)}),
    (TEXT, {"target_size": (90, 30)}),
    (TEXT, {"negative_original_size": (90, 30), "negative_target_size": (16, 16)}),
    (CHANGE, {"negative_original_size": (90, 30)}),
    (CHANGE, {"negative_crops_coords_top_left": (90, 30)}),
    (CHANGE, {"negative_target_size": (90, 30)}),
    (CHANGE, {"prompt_2": "x"}),
    (CHANGE, {"image": 1 - IMAGE}),
    (CHANGE, {"strength": 0.5}),
    (FILL, {"image": 1 - IMAGE}),
    (FILL, {"mask_image": 1 - MASK}),
    (FILL, {"prompt_2": "x"}),
]


@pytest.mark.parametrize(("kind", "change"), SIZES, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_conditions_are_felt(make: Any, kind: str, change: dict[str, Any]) -> None:
    pipeline = make(kind)
    assert differ(sample(pipeline, **change), sample(pipeline)) > 1e-4


@pytest.mark.parametrize(
    "change", [{"mask_image": 1 - MASK}, {"masked_image_latents": torch.zeros(1, 4, 8, 8)}], ids="-".join
)
def test_a_model_that_is_told_the_mask(make: Any, change: dict[str, Any]) -> None:
    pipeline = make(FILL, 9)
    assert differ(sample(pipeline, **change), sample(pipeline)) > 1e-3


def test_refiners_are_told_a_score(refiner: Any) -> None:
    expected = sample(refiner)
    for change in (
        {"aesthetic_score": 9.0},
        {"negative_aesthetic_score": 9.0},
        {"original_size": (90, 30)},
        {"negative_crops_coords_top_left": (90, 30)},
    ):
        assert differ(sample(refiner, **change), expected) > 1e-4


def test_negative_sizes_in_a_batch(make: Any) -> None:
    pipeline, sizes = make(), {"negative_original_size": (90, 30), "negative_target_size": (3, 4)}
    seen: list[Any] = []

    def look(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["add_time_ids"].tolist())

    hooked = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["add_time_ids"]}
    pair = sample(pipeline, ["a cat", "a dog"], (1, 2), **sizes, **hooked)
    negative, positive = [90, 30, 0, 0, 3, 4], [16, 16, 0, 0, 16, 16]
    assert seen[0] == [negative, negative, positive, positive]
    for i, prompt in enumerate(("a cat", "a dog")):
        assert differ(sample(pipeline, prompt, i + 1, **sizes), pair[i : i + 1]) < 1e-5


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_zero_mask_leaves_the_image(make: Any, scheduler: str) -> None:
    pipeline = make(FILL)
    pipeline.scheduler = getattr(difusores, scheduler).from_config(pipeline.scheduler.config)
    latents = torch.randn(1, 4, 8, 8)
    given = {"image": latents, "output_type": "latent"}
    assert torch.equal(sample(pipeline, mask_image=0 * MASK, **given), latents)
    half = sample(pipeline, **given)
    assert torch.equal(half[..., 4:], latents[..., 4:]) and differ(half[..., :4], latents[..., :4]) > 0.1


def test_means_and_deviations_go_there_and_back(make: Any, xl_parts: dict[str, Any]) -> None:
    pipeline = make(FILL)
    plain = pipeline._image_latents(2 * IMAGE - 1, 1, torch.Generator().manual_seed(0))
    mean, std = [0.5, -1.0, 0.2, 0.3], [1.5, 0.7, 2.0, 1.1]
    xl_parts["vae"].register_to_config(latents_mean=mean, latents_std=std)
    found = pipeline._image_latents(2 * IMAGE - 1, 1, torch.Generator().manual_seed(0))
    by_hand = (plain / 0.13025 - torch.tensor(mean).view(1, 4, 1, 1)) * 0.13025
    torch.testing.assert_close(found, by_hand / torch.tensor(std).view(1, 4, 1, 1))
    torch.testing.assert_close(pipeline._unscaled(found), plain / 0.13025)
    xl_parts["vae"].register_to_config(latents_mean=None)
    torch.testing.assert_close(pipeline._unscaled(plain), plain / 0.13025)


def test_embeddings_in_place_of_texts(make: Any) -> None:
    pipeline, texts = make(), {"prompt_2": "x", "negative_prompt": "a dog"}
    found = pipeline.encode_prompt("a cat", **texts)
    assert [tuple(part.shape) for part in found] == [(1, 77, 40), (1, 77, 40), (1, 12), (1, 12)]
    expected = sample(pipeline, **texts)
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    embeds = dict(zip(names, found, strict=True))
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        assert torch.equal(sample(pipeline, None, **embeds), expected)
        setattr(pipeline, name, None)
    assert torch.equal(sample(pipeline, None, **embeds), expected)
    with pytest.raises(ValueError, match="without text_encoder_2, tokenizer_2"):
        sample(pipeline)
    ours = make()
    assert differ(sample(ours, pooled_prompt_embeds=found[2] + 1, **texts), expected) > 1e-3
    assert differ(sample(ours, negative_pooled_prompt_embeds=found[2] + 1, **texts), expected) > 1e-4


def test_layers_that_are_read(make: Any) -> None:
    pipeline = make()
    ids = pipeline.tokenizer(["a cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    first, second = (
        encoder(ids, output_hidden_states=True)
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    )
    for skip, layer in ((None, -2), (1, -3)):
        embeds, zeros, pooled, _ = pipeline.encode_prompt("a cat", clip_skip=skip)
        expected = torch.cat((first.hidden_states[layer], second.hidden_states[layer]), dim=-1)
        assert torch.equal(embeds, expected) and torch.equal(pooled, second.text_embeds)
        assert not zeros.any()


def test_a_long_prompt_is_cut_in_words(make: Any) -> None:
    pipeline, long = make(), " ".join(["cat"] * 75 + ["dog", "x", "cat"])
    with pytest.warns(UserWarning, match=r"reads 77 tokens, and a prompt has 80; this is cut: 'dog x cat'"):
        cut = sample(pipeline, "a", prompt_2=long)
    assert torch.equal(cut, sample(pipeline, "a", prompt_2=" ".join(["cat"] * 75)))


def test_callbacks_see_and_change(make: Any) -> None:
    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    shapes: list[Any] = []

    def cut(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.append([list(tensors[name].shape) for name in names])
        if step != 1:
            return {}
        pipe._guidance_scale = 0.0
        return {name: tensors[name].chunk(2)[-1] for name in names[1:]}

    hooked = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": names}
    pipeline = make()
    ended = sample(pipeline, num_inference_steps=4, **hooked)
    whole, half = [[1, 4, 8, 8], [2, 77, 40], [2, 12], [2, 6]], [[1, 4, 8, 8], [1, 77, 40], [1, 12], [1, 6]]
    assert shapes == [whole, whole, half, half]
    assert differ(ended, sample(pipeline, num_inference_steps=4, guidance_interval=(0, 0.5))) < 1e-5

    def stop(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> None:
        pipe._interrupt = True

    assert pipeline.num_timesteps == 4
    first = sample(pipeline, num_inference_steps=4, output_type="latent", callback_on_step_end=stop)
    assert not torch.equal(first, sample(pipeline, num_inference_steps=4, output_type="latent"))
    sample(make(FILL, 9), callback_on_step_end_tensor_inputs=["mask", "masked_image_latents"])


def test_shares_of_the_run(make: Any, xl_parts: dict[str, Any]) -> None:
    pipeline, image = make(), make(CHANGE)
    latents = {"output_type": "latent", "num_inference_steps": 10}
    half = sample(pipeline, denoising_end=0.4, **latents)
    assert pipeline.num_timesteps == 4 and pipeline.denoising_end == 0.4
    rest = sample(image, image=half, strength=0.3, denoising_start=0.4, **latents)
    assert image.num_timesteps == 6 and image.denoising_start == 0.4 and image.denoising_end is None
    assert differ(rest, sample(pipeline, **latents)) < 1e-4
    assert torch.equal(sample(pipeline, denoising_end=1.0, **latents), sample(pipeline, **latents))
    for strength, calls in ((1.0, 4), (0.5, 2)):
        sample(image, strength=strength, num_inference_steps=4)
        assert image.num_timesteps == calls
    given = torch.randn(1, 4, 8, 8)
    start = sample(image, image=None, latents=given, num_inference_steps=4, output_type="latent")
    assert (
        differ(
            start, sample(image, image=None, latents=2 * given, num_inference_steps=4, output_type="latent")
        )
        > 0
    )
    pipeline.scheduler = difusores.EDMEulerScheduler()
    with pytest.raises(ValueError, match="shares of the training steps, and the times of EDMEuler"):
        sample(pipeline, denoising_end=0.5)


def test_output_types(make: Any) -> None:
    pipeline = make()
    images = sample(pipeline)
    assert np.array_equal(sample(pipeline, output_type="np"), images.permute(0, 2, 3, 1).numpy())
    (picture,) = sample(pipeline, output_type="pil")
    assert np.abs(np.asarray(picture) / 255 - images[0].permute(1, 2, 0).numpy()).max() < 0.003
    latents = sample(pipeline, output_type="latent")
    with torch.no_grad():  # with gradients, attention is another kernel's
        decoded = pipeline.vae.decode(latents / 0.13025).sample
    assert torch.equal((decoded / 2 + 0.5).clamp(0, 1), images)
    result = pipeline("a cat", num_inference_steps=1, output_type="pt", return_dict=False)
    assert type(result) is tuple and len(result) == 1 and result[0].shape == images.shape


def test_the_autoencoder_of_float16(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make(CHANGE)
    cast(pipeline, torch.float16)
    pipeline.vae.enable_tiling()
    seen: list[Any] = []
    for name in ("encode", "decode"):
        plain = getattr(difusores.AutoencoderKL, name)

        def look(self: Any, x: Tensor, *args: Any, _plain: Any = plain, **options: Any) -> Any:
            seen.append((self.dtype, x.dtype, self.use_tiling))
            return _plain(self, x, *args, **options)

        monkeypatch.setattr(difusores.AutoencoderKL, name, look)
    assert sample(pipeline).dtype is torch.float32
    assert seen == [(torch.float32, torch.float32, True)] * 2
    assert {p.dtype for p in pipeline.vae.parameters()} == {torch.float16}
    seen.clear()
    cast(pipeline, torch.bfloat16)
    sample(pipeline)
    assert [dtype for dtype, _, _ in seen] == [torch.float32, torch.bfloat16]
    seen.clear()
    pipeline.vae.register_to_config(force_upcast=False)
    cast(pipeline, torch.float16)
    sample(pipeline)
    assert [dtype for dtype, _, _ in seen] == [torch.float16] * 2


def test_sizes_are_told_exactly_in_half_precision(make: Any) -> None:
    pipeline = make()
    cast(pipeline, torch.bfloat16)
    ids: list[Tensor] = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, options: ids.append(options["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    sample(pipeline, original_size=(1023, 1021))
    assert ids[0][0, :2].tolist() == [1023, 1021]


def test_folders(make: Any, refiner: Any, tmp_path: Path) -> None:
    for pipeline in (make(FILL, force_zeros_for_empty_prompt=False), refiner):
        kind, folder = type(pipeline).__name__, tmp_path / type(pipeline).__name__
        expected = sample(pipeline)
        pipeline.save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        alone = pipeline is refiner
        assert index["text_encoder"] == ([None, None] if alone else ["transformers", "CLIPTextModel"])
        assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
        assert index["force_zeros_for_empty_prompt"] is alone and index["requires_aesthetics_score"] is alone
        for found in (getattr(difusores, kind), difusores.DiffusionPipeline):
            loaded = found.from_pretrained(folder)
            loaded.set_progress_bar_config(disable=True)
            assert type(loaded) is type(pipeline) and torch.equal(sample(loaded), expected)
    base = difusores.StableDiffusionXLPipeline.from_pretrained(tmp_path / FILL)
    components = {**base.components, "scheduler": difusores.DDIMScheduler()}
    other = difusores.StableDiffusionXLImg2ImgPipeline(**components)
    assert other.unet is base.unet and other.config["requires_aesthetics_score"] is False
    with pytest.raises(NotImplementedError, match="add_watermarker is True, and no watermark"):
        difusores.StableDiffusionXLPipeline.from_pretrained(tmp_path / FILL, add_watermarker=True)


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (TEXT, {"height": 20}, ValueError, "height and width are 20 and 16; both have to be divisible by 8"),
    (TEXT, {"prompt_2": ("a",)}, ValueError, "prompt_2 is .*a list of strings"),
    (TEXT, {"prompt_2": ["a", "b"]}, ValueError, "prompt_2 has 2 texts for 1 prompts"),
    (TEXT, {"prompt": None, "prompt_2": "a"}, ValueError, "one of prompt and prompt_embeds is needed"),
    (TEXT, {"prompt": None, "prompt_2": "a", **EMBEDS}, ValueError, "only one of prompt_2 and prompt_embeds"),
    (
        TEXT,
        {"prompt": None, "prompt_embeds": EMBEDS["prompt_embeds"]},
        ValueError,
        "prompt_embeds are given: pooled_prompt_embeds are needed too",
    ),
    (
        TEXT,
        {"negative_prompt_embeds": EMBEDS["prompt_embeds"]},
        ValueError,
        "negative_prompt_embeds are given: negative_pooled_prompt_embeds are needed too",
    ),
    (
        TEXT,
        {"prompt": None, **EMBEDS, "pooled_prompt_embeds": torch.zeros(2, 12)},
        ValueError,
        r"pooled_prompt_embeds has shape \[2, 12\]; needed is \[1, width\]",
    ),
    (
        TEXT,
        {"prompt": None, **EMBEDS, "pooled_prompt_embeds": torch.zeros(1, 7)},
        ValueError,
        "the UNet reads 60 numbers of added conditions; 6 time ids and a pooled embedding of 7 have 55",
    ),
    (TEXT, {"negative_prompt_2": "a"}, ValueError, "give negative_prompt too"),
    (TEXT, {"negative_pooled_prompt_embeds": torch.zeros(1, 12)}, ValueError, "give negative_prompt too"),
    (TEXT, {"prompt": ["a"], "negative_prompt": ["a", "b"]}, ValueError, "2 negative prompts for 1"),
    (TEXT, {"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt is 0"),
    (TEXT, {"clip_skip": 3}, ValueError, "clip_skip is 3, and the text encoder has 3 layers"),
    (TEXT, {"original_size": 16}, ValueError, "two numbers, got 16"),
    (TEXT, {"original_size": ("a", 3)}, ValueError, r"two numbers, got \('a', 3\)"),
    (TEXT, {"target_size": (float("nan"), 3)}, ValueError, r"two numbers, got \(nan, 3\)"),
    (TEXT, {"original_size": torch.tensor([3, 4])}, ValueError, r"two numbers, got tensor\(\[3, 4\]\)"),
    (TEXT, {"sigmas": []}, ValueError, "sigmas is empty; needed is one step or more"),
    (TEXT, {"negative_original_size": (4, 4)}, ValueError, "are needed both, or neither"),
    (TEXT, {"negative_crops_coords_top_left": (4, 4)}, ValueError, "are needed both, or neither"),
    (TEXT, {"denoising_end": 1.5}, ValueError, "denoising_end is 1.5; it has to be above 0 and at most 1"),
    (TEXT, {"denoising_end": 0.01}, ValueError, "denoising_end 0.01 leaves none of 2 steps"),
    (TEXT, {"ip_adapter_image": IMAGE}, NotImplementedError, "ip_adapter_image"),
    (TEXT, {"ip_adapter_image_embeds": [IMAGE]}, NotImplementedError, "ip_adapter_image"),
    (TEXT, {"output_type": "jpg"}, ValueError, "output_type is 'jpg'"),
    (TEXT, {"cross_attention_kwargs": {"gligen": 1}}, ValueError, "takes 'scale' alone, got gligen"),
    (
        TEXT,
        {"callback_on_step_end_tensor_inputs": ["mask"]},
        ValueError,
        "has mask; allowed are latents, prompt_embeds, add_text_embeds, add_time_ids",
    ),
    (TEXT, {"latents": torch.zeros(1, 4, 8, 8) / 0}, ValueError, "latents: 256 of 256 numbers are NaN"),
    (CHANGE, {"image": None}, ValueError, "image is a NoneType"),
    (CHANGE, {"latents": torch.zeros(1, 4, 8, 8)}, ValueError, "image and latents are given"),
    (
        CHANGE,
        {"image": None, "latents": torch.zeros(2, 4, 8, 8)},
        ValueError,
        r"needed is \[1, 4, 'h', 'w'\]",
    ),
    (CHANGE, {"strength": 1.5}, ValueError, r"strength is 1\.5"),
    (CHANGE, {"strength": 0.1}, ValueError, "strength 0.1 leaves none of 2 steps"),
    (CHANGE, {"denoising_start": 0.5}, ValueError, "strength is 1.0 and denoising_start 0.5"),
    (CHANGE, {"denoising_start": 0.0, "strength": 0.3}, ValueError, "denoising_start is 0.0"),
    (CHANGE, {"denoising_start": 0.999, "strength": 0.3}, ValueError, "denoising_start 0.999 leaves none"),
    (
        CHANGE,
        {"denoising_start": 0.5, "denoising_end": 0.5, "strength": 0.3},
        ValueError,
        "denoising_end is 0.5; it has to be above 0.5",
    ),
    (
        CHANGE,
        {"aesthetic_score": 9.0},
        ValueError,
        "aesthetic_score .* 9.0 and 2.5, and this model is told none",
    ),
    (FILL, {"padding_mask_crop": 3}, ValueError, "image is a Tensor; padding_mask_crop needs a PIL image"),
    (
        FILL,
        {"masked_image_latents": torch.zeros(1, 4, 8, 8)},
        ValueError,
        "masked_image_latents are given, and a UNet of 4 input channels reads none",
    ),
    (
        FILL,
        {"latents": torch.zeros(1, 4, 8, 8), "denoising_start": 0.5},
        ValueError,
        "latents and denoising_start are given",
    ),
]


@pytest.mark.parametrize(("kind", "options", "error", "message"), BAD)
def test_bad_input_in_words(make: Any, kind: str, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        sample(make(kind), **{"prompt": "a cat", **options})


def test_what_a_refiner_does_not_read(make: Any, refiner: Any, widened: Any) -> None:
    for options, message in (
        ({"prompt_2": "x"}, "prompt_2 is given, and there is one text encoder alone, which reads prompt"),
        ({"negative_prompt": "y", "negative_prompt_2": "x"}, "which reads negative_prompt"),
        ({"target_size": (8, 8)}, "told an aesthetic score in its place"),
        ({"negative_target_size": (8, 8)}, "told an aesthetic score in its place"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(refiner, **options)
    refiner.register_to_config(requires_aesthetics_score=False)
    with pytest.raises(ValueError, match=r"52 numbers .* have 60; requires_aesthetics_score is False"):
        sample(refiner)
    with pytest.raises(ValueError, match="addition_embed_type has to be 'text_time'"):
        sample(make(unet=widened(4, cross_attention_dim=40)))
