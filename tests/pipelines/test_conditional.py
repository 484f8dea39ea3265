"""A semantic map -> image and a sound -> image: conditions are felt, folders, other parts, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import difusores
from difusores import AudioToImagePipeline, SemanticToImagePipeline

VAE: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "out_channels": 4,
}
PLAIN = UNET | {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
CROSSING = UNET | {
    "in_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
ENCODER = {"sampling_rate": 800, "n_fft": 64, "hop_length": 16, "n_mels": 6, "d_model": 16, "num_layers": 1}


def filled(model: Any) -> Any:
    """Random weights as large as trained ones: then conditions are felt."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return model.eval()


def semantic(channels: int = 5) -> SemanticToImagePipeline:
    unet = filled(difusores.UNet2DModel(in_channels=4 + channels, **PLAIN))
    scheduler = difusores.DDIMScheduler(clip_sample=False)
    return SemanticToImagePipeline(filled(difusores.AutoencoderKL(**VAE)), unet, scheduler)


def audible() -> AudioToImagePipeline:
    unet, encoder = (
        filled(difusores.UNet2DConditionModel(**CROSSING)),
        filled(difusores.AudioEncoder(**ENCODER)),
    )
    scheduler = difusores.DDIMScheduler(clip_sample=False)
    return AudioToImagePipeline(filled(difusores.AutoencoderKL(**VAE)), encoder, unet, scheduler)


def tones(*frequencies: float) -> torch.Tensor:
    return torch.stack([torch.sin(2 * math.pi * f / 800 * torch.arange(300)) for f in frequencies])


def maps() -> torch.Tensor:
    layout = torch.arange(16).expand(2, 16, 16) // 8
    return torch.stack((layout[0], layout[1].T + 2))


def images(pipeline: Any, *args: Any, **options: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "output_type": "np", "generator": torch.Generator().manual_seed(3)}
    return pipeline(*args, **given | options).images


NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_condition_is_felt(kind: str) -> None:
    cases: list[tuple[Any, tuple[Any, ...], Any]] = [
        (semantic(), (), maps()),
        (audible(), (800,), tones(60, 300)),
    ]
    for pipeline, rest, conditions in cases:
        pipeline.scheduler = getattr(difusores, kind)()
        one = images(pipeline, conditions, *rest, latents=NOISE)
        other = images(pipeline, conditions.flip(0), *rest, latents=NOISE)
        assert one.shape == (2, 16, 16, 3) and np.isfinite(one).all()
        assert np.abs(one - other[::-1]).max() < 1e-4 < 1e-2 < np.abs(one - other).max()
        alone = images(pipeline, conditions[:1], *rest, latents=NOISE[:1])
        assert np.abs(alone - one[:1]).max() < 1e-4


def test_guidance_from_silence() -> None:
    pipeline, sound = audible(), tones(60)
    plain, none = images(pipeline, sound, 800), images(pipeline, sound, 800, guidance_scale=1.0)
    assert np.array_equal(plain, none)
    silent = images(pipeline, torch.zeros_like(sound), 800)
    assert np.abs(images(pipeline, sound, 800, guidance_scale=0.0) - silent).max() < 1e-4
    assert np.abs(images(pipeline, sound, 800, guidance_scale=3.0) - plain).max() > 1e-2


def test_separate_guidance() -> None:
    """The UNet is called for the sound and for silence by themselves; the image is the same."""
    pipeline, rows = audible(), []
    together = images(pipeline, tones(60, 300), 800, guidance_scale=3.0, latents=NOISE)
    pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    pipeline.enable_separate_guidance()
    apart = images(pipeline, tones(60, 300), 800, guidance_scale=3.0, latents=NOISE)
    assert rows == [2] * 8 and np.abs(apart - together).max() < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
def test_on_a_gpu() -> None:
    for pipeline, given in ((semantic(), (maps(),)), (audible(), (tones(60, 300), 800))):
        options = {"guidance_scale": 3.0} if len(given) == 2 else {}
        expected = images(pipeline, *given, latents=NOISE, **options)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            found = images(pipeline.to("cuda"), *given, latents=NOISE, **options)
        assert np.abs(found - expected).max() < 2e-3


def test_the_loop_by_hand() -> None:
    """What the pipelines make is what their parts make."""
    layout = torch.randint(0, 5, (2, 16, 16))
    for pipeline, given in ((semantic(), (layout,)), (audible(), (tones(60, 300), 800))):
        scheduler = difusores.EulerDiscreteScheduler()
        pipeline.scheduler = scheduler
        expected = images(pipeline, *given, latents=NOISE)
        with torch.no_grad():
            if isinstance(pipeline, SemanticToImagePipeline):
                # latents are 8 of 16 pixels: the map's odd rows and columns
                beside = torch.nn.functional.one_hot(layout[:, 1::2, 1::2], 5).permute(0, 3, 1, 2).float()
            else:
                context = pipeline.audio_encoder(*given)
            scheduler.set_timesteps(4)
            x = NOISE * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t)
                if isinstance(pipeline, SemanticToImagePipeline):
                    output = pipeline.unet(torch.cat((scaled, beside), dim=1), t).sample
                else:
                    output = pipeline.unet(scaled, t, encoder_hidden_states=context).sample
                x = scheduler.step(output, t, x).prev_sample
            decoded = pipeline.vae.decode(x / 0.18215).sample
        by_hand = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert np.abs(by_hand - expected).max() < 1e-4


def test_kinds_of_maps() -> None:
    numbers = maps()
    pipeline = semantic()
    expected = images(pipeline, numbers)
    pictures = [Image.fromarray(layout.numpy().astype(np.uint8)) for layout in numbers]
    assert np.array_equal(images(pipeline, pictures), expected)
    assert np.array_equal(images(pipeline, numbers[0]), images(pipeline, pictures[0]))
    shares = torch.nn.functional.one_hot(numbers, 5).permute(0, 3, 1, 2).float()
    assert np.abs(images(pipeline, shares) - expected).max() < 1e-6  # edges lie between latents
    coloured = semantic(3)
    colours = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    result = images(coloured, Image.fromarray(colours))
    image = torch.from_numpy(colours / np.float32(127.5) - 1).permute(2, 0, 1)[None]
    assert result.shape == (1, 16, 24, 3) and np.abs(images(coloured, image) - result).max() < 1e-5


def test_folders(tmp_path: Path) -> None:
    for name, pipeline, given in (
        ("map", semantic(), (maps(),)),
        ("sound", audible(), (tones(60, 300), 800)),
    ):
        pipeline.save_pretrained(tmp_path / name)
        back = difusores.DiffusionPipeline.from_pretrained(tmp_path / name)
        assert type(back) is type(pipeline) and set(back.components) == set(pipeline.components)
        assert np.array_equal(images(back, *given), images(pipeline, *given))


def test_output_batches_and_callbacks() -> None:
    pipeline, sounds = audible(), tones(60, 300)
    pictures = images(pipeline, sounds.numpy(), 800, num_images_per_audio=2, output_type="pil", height=24)
    assert len(pictures) == 4 and pictures[0].size == (16, 24)
    listed = images(pipeline, [sounds[0], sounds[1].numpy()], 800, latents=NOISE)
    assert np.array_equal(listed, images(pipeline, sounds, 800, latents=NOISE))
    (latents,) = pipeline(sounds[0], 800, num_inference_steps=2, output_type="latent", return_dict=False)
    assert latents.shape == (1, 4, 8, 8)
    seen = []

    def note(pipeline: Any, step: int, time: Any, given: dict[str, Any]) -> None:
        seen.append((step, given["latents"].shape))

    images(semantic(), maps(), callback_on_step_end=note)
    assert seen == [(i, (2, 4, 8, 8)) for i in range(4)]
    generators = [torch.Generator().manual_seed(i) for i in (4, 4)]
    twins = images(pipeline, sounds[:1].repeat(2, 1), 800, generator=generators)
    assert np.abs(twins[0] - twins[1]).max() < 1e-5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"semantic_map": "sea"}, "semantic_map is 'sea'; needed is a tensor, a picture"),
        ({"semantic_map": torch.full((1, 16, 16), 5)}, "classes from 5 to 5; the UNet takes 5, from 0 to 4"),
        ({"semantic_map": torch.zeros(1, 16, 20).long()}, "16 and 20; both have to be divisible by 8"),
        ({"semantic_map": torch.zeros(1, 16, 16)}, "needed are integers"),
        ({"semantic_map": torch.zeros(0, 16, 16).long()}, r"int64 \[0, 16, 16\]; needed are integers"),
        (
            {"semantic_map": torch.full((1, 5, 16, 16), torch.nan)},
            "semantic_map: 1280 of 1280 numbers are NaN",
        ),
        ({"semantic_map": torch.zeros(1, 5, 16, 16).long()}, r"int64 \[1, 5, 16, 16\]; needed are integers"),
        (
            {"semantic_map": torch.zeros(1, 3, 16, 16)},
            "takes 9 channels; .* 4 of the sample and 3 of the image",
        ),
        (
            {"semantic_map": maps(), "latents": NOISE[:1]},
            r"latents have shape \[1, 4, 8, 8\]; needed is \[2,",
        ),
        ({"semantic_map": [Image.new("L", (16, 16)), Image.new("L", (8, 16))]}, "need one mode and size"),
        ({"audio": "a.wav", "sampling_rate": 800}, "audio is 'a.wav'; needed are samples"),
        ({"audio": [], "sampling_rate": 800}, r"audio is \[\]; needed are samples"),
        ({"audio": tones(60), "sampling_rate": 800, "num_images_per_audio": 0}, "num_images_per_audio is 0"),
        ({"audio": tones(60), "sampling_rate": 800, "guidance_scale": "2"}, "guidance_scale is '2'"),
        ({"audio": tones(60), "sampling_rate": 16000}, "16000 samples a second, .* made for 800"),
        (
            {"audio": [torch.zeros(20), torch.zeros(30)], "sampling_rate": 800},
            r"one length, .*\(20,\), \(30,\)",
        ),
        ({"audio": tones(60), "sampling_rate": 800, "height": 20}, "20 and 16; both have to be divisible"),
        ({"audio": tones(60), "sampling_rate": 800, "output_type": "wav"}, "output_type is 'wav'"),
    ],
)
def test_bad_input(given: dict[str, Any], words: str) -> None:
    pipeline = semantic() if "semantic_map" in given else audible()
    with pytest.raises(ValueError, match=words):
        images(pipeline, **given)


def test_an_encoder_of_another_width() -> None:
    pipeline = audible()
    pipeline.audio_encoder = difusores.AudioEncoder(**ENCODER | {"d_model": 8})
    with pytest.raises(ValueError, match=r"encoder_hidden_states has shape .* 8\]; needed is \[N, L, 16\]"):
        images(pipeline, tones(60), 800)
