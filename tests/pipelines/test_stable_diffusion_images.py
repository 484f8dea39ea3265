"""Pipelines of Stable Diffusion that take an image: both are felt, bad ones are refused in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import difusores
from difusores.pipelines.preprocess import preprocess, preprocess_mask

pytest.importorskip("transformers")

IMAGE = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
MASK = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
CHANGE, FILL = "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"
EDIT = "StableDiffusionInstructPix2PixPipeline"


@pytest.fixture
def make(parts: dict[str, Any], widened: Any) -> Any:
    def build(kind: str, channels: int = 4, **options: Any) -> Any:
        unet = parts["unet"] if channels == 4 else widened(channels)
        pipeline = getattr(difusores, kind)(**{**parts, "unet": unet, **options})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


def sample(pipeline: Any, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    given = {"prompt": "a cat", "image": IMAGE, "num_inference_steps": 4, "output_type": "pt", **options}
    return pipeline(generator=generator, **given).images


def differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


CASES: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    (CHANGE, 4, {}, {"prompt": "a dog"}),
    (CHANGE, 4, {}, {"image": 1 - IMAGE}),
    (CHANGE, 4, {}, {"strength": 0.5}),
    (FILL, 4, {"mask_image": MASK}, {"prompt": "a dog"}),
    (FILL, 4, {"mask_image": MASK}, {"image": 1 - IMAGE}),
    (FILL, 4, {"mask_image": MASK}, {"mask_image": 1 - MASK}),
    (FILL, 9, {"mask_image": MASK}, {"prompt": "a dog"}),
    (FILL, 9, {"mask_image": MASK}, {"image": 1 - IMAGE}),
    (FILL, 9, {"mask_image": MASK}, {"mask_image": 1 - MASK}),
    (FILL, 9, {"mask_image": MASK}, {"masked_image_latents": torch.zeros(1, 4, 8, 8)}),
    (EDIT, 8, {}, {"prompt": "a dog"}),
    (EDIT, 8, {}, {"image": 1 - IMAGE}),
    (EDIT, 8, {}, {"image_guidance_scale": 3.0}),
]


@pytest.mark.parametrize(("kind", "channels", "options", "change"), CASES, ids=lambda value: str(value)[:60])
def test_conditions_are_felt(make: Any, kind: str, channels: int, options: Any, change: Any) -> None:
    pipeline = make(kind, channels)
    first = sample(pipeline, **options)
    assert torch.equal(sample(pipeline, **options), first)
    assert differ(sample(pipeline, **{**options, **change}), first) > 1e-3


@pytest.mark.parametrize(("kind", "channels"), [(CHANGE, 4), (FILL, 4), (FILL, 9), (EDIT, 8)])
def test_prompts_that_change_places(make: Any, kind: str, channels: int) -> None:
    """With them the images do, too; and guidance of 1 is none."""
    pipeline = make(kind, channels)

    def pair(*prompts: str, **options: Any) -> Tensor:
        seeds = [torch.Generator().manual_seed(1) for _ in prompts]
        # an image for each prompt, so each generator encodes one
        image = IMAGE.repeat(len(prompts), 1, 1, 1)
        given = {"image": image, "num_inference_steps": 2, "output_type": "pt", **options}
        if kind == FILL:
            given["mask_image"] = MASK
        images: Tensor = pipeline(list(prompts), generator=seeds, **given).images
        return images

    both = pair("a cat", "a dog")
    assert differ(both[0], both[1]) > 1e-3 and differ(pair("a dog", "a cat").flip(0), both) < 1e-5
    weights = {"image_guidance_scale": 1.0} if kind == EDIT else {}
    alone = pair("a cat", guidance_scale=1.0)
    assert differ(pair("a cat", guidance_scale=1 + 1e-6, **weights), alone) < 1e-4 < differ(both[:1], alone)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_zero_mask_leaves_the_image(make: Any, scheduler: str) -> None:
    pipeline = make(FILL)
    pipeline.scheduler = getattr(difusores, scheduler).from_config(pipeline.scheduler.config)
    latents = torch.randn(1, 4, 8, 8)
    for mask, other in ((0 * MASK, False), (1 + 0 * MASK, True)):
        result = sample(pipeline, image=latents, mask_image=mask, output_type="latent")
        assert (differ(result, latents) > 0.1) is other
    half = sample(pipeline, image=latents, mask_image=MASK, output_type="latent")
    assert torch.equal(half[..., 4:], latents[..., 4:]) and differ(half[..., :4], latents[..., :4]) > 0.1


def test_the_strength_says_how_many_steps(make: Any) -> None:
    pipeline = make(CHANGE)
    for strength, calls in ((1.0, 4), (0.5, 2), (0.25, 1)):
        sample(pipeline, strength=strength)
        assert pipeline.num_timesteps == calls
    latents = torch.randn(1, 4, 8, 8)
    close = [
        differ(sample(pipeline, image=latents, strength=s, output_type="latent"), latents) for s in (0.25, 1)
    ]
    assert close[0] < close[1]


def test_callbacks(make: Any) -> None:
    shapes: list[Any] = []

    def look(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> None:
        shapes.append({key: list(value.shape) for key, value in tensors.items()})

    names = ["mask", "masked_image_latents"]
    hooked = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
    sample(make(FILL, 9), mask_image=MASK, **hooked)
    assert shapes == [{"mask": [2, 1, 8, 8], "masked_image_latents": [2, 4, 8, 8]}] * 4
    shapes.clear()
    hooked["callback_on_step_end_tensor_inputs"] = ["prompt_embeds", "image_latents"]
    sample(make(EDIT, 8), **hooked)
    assert shapes == [{"prompt_embeds": [3, 77, 16], "image_latents": [3, 4, 8, 8]}] * 4


def test_runge_kutta_steps_are_left_out(make: Any) -> None:
    assert make(FILL, scheduler=difusores.PNDMScheduler()).scheduler.config.skip_prk_steps is True
    assert make(CHANGE, scheduler=difusores.PNDMScheduler()).scheduler.config.skip_prk_steps is False
    old = difusores.DDIMScheduler(steps_offset=0)
    assert make(EDIT, 8, scheduler=old).scheduler.config.steps_offset == 0


NAN = torch.full((1, 4, 8, 8), torch.nan)
BAD: list[tuple[str, int, dict[str, Any], type[Exception], str]] = [
    (CHANGE, 4, {"strength": 1.5}, ValueError, r"strength is 1\.5"),
    (
        CHANGE,
        4,
        {"strength": 0.1},
        ValueError,
        r"strength 0\.1 leaves none of 4 steps; needed is at least 0\.25",
    ),
    (CHANGE, 4, {"image": None}, ValueError, "image is a NoneType; needed is a PIL image"),
    (
        CHANGE,
        4,
        {"image": IMAGE[..., :1]},
        ValueError,
        "an image is 16x1 pixels; needed are 2 each way or more",
    ),
    (CHANGE, 4, {"image": Image.new("RGB", (1, 9))}, ValueError, "an image is 9x1 pixels; needed are 2"),
    (FILL, 4, {"mask_image": MASK * torch.nan}, ValueError, "mask_image has NaN"),
    (EDIT, 8, {"image_guidance_scale": torch.nan}, ValueError, "image_guidance_scale is nan"),
    (CHANGE, 4, {"image": 255 * IMAGE}, ValueError, "numbers from 0 to 255; needed are 0 to 1"),
    (CHANGE, 4, {"image": NAN}, ValueError, "image: 256 of 256 numbers are NaN"),
    (
        CHANGE,
        4,
        {"image": IMAGE.repeat(2, 1, 1, 1), "prompt": ["a"] * 3},
        ValueError,
        "2 cannot be shared by 3",
    ),
    (FILL, 4, {"mask_image": None}, ValueError, "mask_image is a NoneType"),
    (
        FILL,
        4,
        {"mask_image": MASK, "padding_mask_crop": 3},
        ValueError,
        "image is a Tensor; padding_mask_crop",
    ),
    (FILL, 4, {"mask_image": MASK, "height": 12}, ValueError, "height and width are 12 and 16"),
    (FILL, 4, {"mask_image": IMAGE}, ValueError, "mask_image has 3 channels"),
    (FILL, 8, {"mask_image": MASK}, ValueError, "the UNet has 8 input channels; inpainting needs 4 or 9"),
    (
        FILL,
        9,
        {"mask_image": MASK, "masked_image_latents": torch.zeros(1, 4, 5, 8)},
        ValueError,
        r"latents have shape \[1, 4, 5, 8\]; needed is \['N', 4, 8, 8\]",
    ),
    (
        FILL,
        9,
        {"mask_image": MASK, "image": torch.zeros(1, 4, 8, 8)},
        ValueError,
        "masked_image_latents are needed",
    ),
    (EDIT, 4, {}, ValueError, "the UNet has 4 input channels; needed are 8"),
    (EDIT, 8, {"latents": torch.zeros(1, 4, 4, 4)}, ValueError, r"needed is \[1, 4, 8, 8\]"),
]


@pytest.mark.parametrize(("kind", "channels", "options", "error", "message"), BAD)
def test_bad_input_in_words(
    make: Any, kind: str, channels: int, options: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        sample(make(kind, channels), **options)


def test_a_decoder_alone_encodes_nothing(make: Any) -> None:
    pipeline = make(CHANGE)
    pipeline.vae = type("Decoder", (), {"decode": lambda self, latents: latents})()
    with pytest.raises(ValueError, match="vae is a Decoder, which has no encode"):
        sample(pipeline)


def test_images_of_every_kind() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (17, 18, 3), np.uint8)
    expected = torch.from_numpy(pixels[:16, :16]).permute(2, 0, 1)[None] / 127.5 - 1
    square = pixels[:16, :16]
    tensor = torch.from_numpy(square).permute(2, 0, 1) / 255
    kinds = [
        Image.fromarray(square),
        square / 255,
        (square / 255)[None],
        [square / 255],
        tensor,
        tensor[None],
        [tensor],
    ]
    for kind in kinds:
        torch.testing.assert_close(preprocess(kind, 8), expected, rtol=0, atol=1e-6)
    assert preprocess(Image.fromarray(pixels), 8).shape == (1, 3, 16, 16)
    assert preprocess([tensor, tensor], 8, 32, 24).shape == (2, 3, 32, 24)
    transparent = Image.fromarray(square).convert("RGBA")
    torch.testing.assert_close(preprocess(transparent, 8), expected, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match=r"taken to be in \[-1, 1\]"):
        torch.testing.assert_close(preprocess(expected, 8), expected)


def test_masks_of_every_kind() -> None:
    whole = (np.arange(64).reshape(8, 8) % 3 == 0).astype(np.float32)
    expected = torch.from_numpy(whole)[None, None]
    tensor = torch.from_numpy(whole)
    picture = Image.fromarray((whole * 255).astype(np.uint8))
    kinds = [
        picture,
        [picture],
        picture.convert("RGB"),
        whole,
        whole[None],
        whole[..., None],
        whole[None, ..., None],
    ]
    for kind in [*kinds, tensor, tensor[None], tensor[None, None], 0.5 * tensor]:
        assert torch.equal(preprocess_mask(kind, 8, 8, 8), expected)
    assert preprocess_mask(tensor, 8, 16, 8).shape == (1, 1, 16, 8)
