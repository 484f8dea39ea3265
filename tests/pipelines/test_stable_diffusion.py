"""Text to image: conditions are felt, every slot can be filled otherwise, bad input is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import difusores
from difusores import DDIMScheduler, StableDiffusionPipeline

pytest.importorskip("transformers")


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(parts: dict[str, Any]) -> Any:
    return quiet(StableDiffusionPipeline(**parts))


def sample(pipeline: Any, prompt: Any = "a cat", seeds: Any = 1, **options: Any) -> Any:
    seeds = [seeds] if isinstance(seeds, int) else seeds
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = {"num_inference_steps": 4, "output_type": "pt", "generator": generator, **options}
    return pipeline(prompt, **given).images


def differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_prompts_are_felt(pipeline: Any) -> None:
    pair = sample(pipeline, ["a cat", "a dog"], (1, 1))
    assert differ(pair[0], pair[1]) > 1e-2
    assert differ(sample(pipeline, ["a dog", "a cat"], (1, 1)).flip(0), pair) < 1e-5
    assert differ(sample(pipeline), pair[:1]) < 1e-5
    assert differ(sample(pipeline, negative_prompt="a dog"), pair[:1]) > 1e-2
    twice = sample(pipeline, ["a cat", "a dog"], (1, 1, 1, 1), num_images_per_prompt=2)
    assert differ(twice[::2], pair) < 1e-5 and differ(twice[1::2], pair) < 1e-5
    assert torch.equal(sample(pipeline), sample(pipeline))


def test_guidance_of_one_is_none(pipeline: Any) -> None:
    alone = sample(pipeline, guidance_scale=1.0)
    assert differ(sample(pipeline, guidance_scale=7.5, negative_prompt="a cat"), alone) < 1e-5
    assert differ(sample(pipeline, guidance_scale=1 + 1e-6), alone) < 1e-4
    assert differ(sample(pipeline), alone) > 1e-2
    assert differ(sample(pipeline, guidance_rescale=1.0), sample(pipeline)) > 1e-3


def test_guidance_in_an_interval(pipeline: Any) -> None:
    none, whole = sample(pipeline, guidance_scale=1.0), sample(pipeline)
    assert differ(sample(pipeline, guidance_interval=(0.5, 0.5)), none) < 1e-5
    rows: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    middle = sample(pipeline, guidance_interval=(0.25, 0.75))
    assert rows == [1, 2, 2, 1]
    assert differ(middle, none) > 1e-2 and differ(middle, whole) > 1e-3


def test_a_long_prompt_is_cut_in_words(pipeline: Any) -> None:
    long = " ".join(["cat"] * 75 + ["dog", "x", "cat"])
    with pytest.warns(UserWarning, match=r"reads 77 tokens, and a prompt has 80; this is cut: 'dog x cat'"):
        cut = sample(pipeline, long)
    assert torch.equal(cut, sample(pipeline, " ".join(["cat"] * 75)))


def test_embeddings_in_place_of_texts(pipeline: Any) -> None:
    positive, negative = pipeline.encode_prompt("a cat", None, 1, True, "a dog")
    assert positive.shape == negative.shape == (1, 77, 16)
    expected = sample(pipeline, negative_prompt="a dog")
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.equal(sample(pipeline, None, **embeds), expected)
    pipeline.text_encoder = pipeline.tokenizer = None
    assert torch.equal(sample(pipeline, None, **embeds), expected)
    with pytest.raises(ValueError, match="without a text_encoder"):
        sample(pipeline)


def test_callbacks_see_and_change(pipeline: Any) -> None:
    seen: list[Any] = []

    def watch(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((pipe is pipeline, step, int(time), {key: len(value) for key, value in tensors.items()}))
        return {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    expected = sample(pipeline)
    hooked = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": names}
    assert torch.equal(sample(pipeline, **hooked), expected)
    assert seen == [
        (True, i, t, dict(zip(names, (1, 2, 1), strict=True))) for i, t in enumerate((751, 501, 251, 1))
    ]
    assert pipeline.num_timesteps == 4 and pipeline.guidance_scale == 7.5

    zeros = sample(
        pipeline, output_type="latent", callback_on_step_end=lambda p, i, t, k: {"latents": 0 * k["latents"]}
    )
    assert not zeros.any()


def test_a_callback_ends_guidance_or_the_run(pipeline: Any) -> None:
    def cut(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step != 1:
            return {}
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    names = ["latents", "prompt_embeds"]
    ended = sample(pipeline, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=names)
    assert differ(ended, sample(pipeline, guidance_interval=(0, 0.5))) < 1e-5

    states: list[Tensor] = []

    def stop(pipe: Any, step: int, time: Tensor, tensors: dict[str, Tensor]) -> None:
        states.append(tensors["latents"])
        pipe._interrupt = step == 1

    last = sample(pipeline, output_type="latent", callback_on_step_end=stop)
    assert len(states) == 2 and torch.equal(last, states[1])


def test_output_types(pipeline: Any) -> None:
    images = sample(pipeline)
    assert images.shape == (1, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    array = sample(pipeline, output_type="np")
    assert np.array_equal(array, images.permute(0, 2, 3, 1).numpy())
    (picture,) = sample(pipeline, output_type="pil")
    assert np.abs(np.asarray(picture) / 255 - array[0]).max() < 0.003
    latents = sample(pipeline, output_type="latent")
    with torch.no_grad():  # with gradients, attention is another kernel's
        decoded = pipeline.vae.decode(latents / 0.18215).sample
    assert torch.equal((decoded / 2 + 0.5).clamp(0, 1), images)
    result = pipeline("a cat", num_inference_steps=2, output_type="pt", return_dict=False)
    assert result[0].shape == images.shape and result[1] is None


class Decoder:
    """Somebody's decoder: no configuration, no parameters."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_another_decoder(pipeline: Any, tmp_path: Path) -> None:
    latents = sample(pipeline, output_type="latent")
    pipeline.vae = Decoder()
    expected = (Decoder().decode(latents / 0.18215) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(sample(pipeline, height=64, width=64), expected)
    with pytest.raises(TypeError, match="vae is a Decoder, which has no save_pretrained"):
        pipeline.save_pretrained(tmp_path)


def test_tiles_and_slices(pipeline: Any) -> None:
    size = {"height": 32, "width": 24}
    expected = sample(pipeline, ["a cat", "a dog"], (1, 2), **size)
    pipeline.enable_vae_slicing()
    assert differ(sample(pipeline, ["a cat", "a dog"], (1, 2), **size), expected) < 1e-5
    pipeline.disable_vae_slicing()
    pipeline.enable_vae_tiling()
    tiled = sample(pipeline, ["a cat", "a dog"], (1, 2), **size)
    assert tiled.shape == expected.shape and differ(tiled, expected) > 1e-5
    pipeline.disable_vae_tiling()
    assert torch.equal(sample(pipeline, ["a cat", "a dog"], (1, 2), **size), expected)


def test_the_safety_checker_is_called(parts: dict[str, Any], pipeline: Any) -> None:
    def extract(images: Any, return_tensors: str) -> Any:
        assert return_tensors == "pt" and images[0].size == (16, 16)
        features = SimpleNamespace(pixel_values=torch.ones(len(images), 2))
        features.to = lambda device: features
        return features

    def check(images: Tensor, clip_input: Tensor) -> tuple[Tensor, list[bool]]:
        assert len(clip_input) == len(images) == 2
        return torch.stack([torch.zeros_like(images[0]), images[1]]), [True, False]

    prompts = ["a cat", "a dog"]
    expected = sample(pipeline, prompts, (1, 2))
    checked = quiet(
        StableDiffusionPipeline(**{**parts, "safety_checker": check, "feature_extractor": extract})
    )
    result = checked(
        prompts,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(i) for i in (1, 2)],
        output_type="pt",
    )
    assert result.nsfw_content_detected == [True, False]
    assert not result.images[0].any() and torch.equal(result.images[1], expected[1])
    with pytest.raises(ValueError, match="needs a feature_extractor"):
        StableDiffusionPipeline(**{**parts, "safety_checker": check})


def test_folders(pipeline: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = sample(pipeline)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["tokenizer"][0] == "transformers"
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False
    for kind in (StableDiffusionPipeline, difusores.DiffusionPipeline):
        assert torch.equal(sample(quiet(kind.from_pretrained(tmp_path, safety_checker=None))), expected)
    half = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {model.dtype for model in (half.unet, half.vae, half.text_encoder)} == {torch.bfloat16}
    assert differ(sample(quiet(half)).float(), expected) < 0.2
    # folders of old versions have fewer entries
    for name in ("image_encoder", "requires_safety_checker"):
        del index[name]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.config["requires_safety_checker"] and "no safety checker" in caplog.text


def test_components_and_swapping(pipeline: Any) -> None:
    other = quiet(StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False))
    assert torch.equal(sample(other), sample(pipeline))
    other.scheduler = difusores.DPMSolverMultistepScheduler.from_config(other.scheduler.config)
    assert other.config["scheduler"] == ("diffusers", "DPMSolverMultistepScheduler")
    assert differ(sample(other), sample(pipeline)) > 1e-3


def test_old_configurations_are_replaced(parts: dict[str, Any]) -> None:
    scheduler = DDIMScheduler(steps_offset=0, clip_sample=True)
    parts["unet"].register_to_config(_diffusers_version="0.6.0")
    pipeline = StableDiffusionPipeline(**{**parts, "scheduler": scheduler})
    assert pipeline.scheduler is scheduler
    assert scheduler.config.steps_offset == 1 and scheduler.config.clip_sample is False
    assert pipeline.unet.config["sample_size"] == 64


def test_the_models_own_scheduler_is_believed(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(StableDiffusionPipeline.from_pretrained(tmp_path))
    loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"'v_prediction'.*'epsilon'"):
        sample(loaded)
    assert torch.isfinite(sample(loaded, strict=False)).all()


def test_a_call_leaves_the_scheduler_as_it_is(pipeline: Any) -> None:
    scheduler = difusores.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler = scheduler
    sample(pipeline)
    assert scheduler.num_inference_steps is None and scheduler.step_index is None


class Stepped(DDIMScheduler):
    """A step of one's own, so there is no plan to follow."""

    def step(self, *args: Any, **options: Any) -> Any:
        return super().step(*args, **options)


def test_a_scheduler_without_a_plan(pipeline: Any) -> None:
    expected = [sample(pipeline, eta=0.5), sample(pipeline, guidance_rescale=0.5)]
    pipeline.scheduler = Stepped.from_config(pipeline.scheduler.config)
    assert differ(sample(pipeline, eta=0.5), expected[0]) < 1e-5
    assert differ(sample(pipeline, guidance_rescale=0.5), expected[1]) < 1e-5


def test_timesteps_of_ones_own(pipeline: Any) -> None:
    with pytest.raises(ValueError, match=r"DDIMScheduler\.set_timesteps takes no timesteps"):
        sample(pipeline, timesteps=[900, 500, 100])
    pipeline.scheduler = difusores.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="only one of timesteps and sigmas"):
        sample(pipeline, timesteps=[900, 500, 100], sigmas=[3.0, 0.0])
    sample(pipeline, timesteps=[900, 500, 100])
    assert pipeline.num_timesteps == 3
    with pytest.warns(UserWarning, match="eta is 0.5, and EulerDiscreteScheduler has none"):
        sample(pipeline, eta=0.5)


ZEROS = torch.zeros(1, 77, 16)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"height": 20}, ValueError, "height and width are 20 and 16; both have to be divisible by 8"),
    (
        {"latents": torch.zeros(1, 4, 9, 8), "height": 16},
        ValueError,
        r"\[1, 4, 9, 8\]; needed is \[1, 4, 8, 8\]",
    ),
    (
        {"latents": torch.zeros(1, 4, 8, 8).fill_(torch.nan)},
        ValueError,
        "latents: 256 of 256 numbers are NaN",
    ),
    ({"seeds": (1, 2, 3)}, ValueError, "3 generators for 1 images"),
    ({"output_type": "jpg"}, ValueError, "output_type is 'jpg'"),
    ({"prompt": None}, ValueError, "one of prompt and prompt_embeds is needed, and neither"),
    ({"prompt_embeds": ZEROS}, ValueError, "and both of them"),
    ({"prompt": ("a", "b")}, ValueError, r"prompt is \('a', 'b'\); it has to be a string or a list"),
    ({"prompt": []}, ValueError, "prompt is an empty list"),
    ({"negative_prompt": ["a", "b"]}, TypeError, "negative_prompt is a list, and prompt a str"),
    ({"prompt": ["a"], "negative_prompt": ["a", "b"]}, ValueError, "2 negative prompts for 1 prompts"),
    (
        {"negative_prompt": "a", "negative_prompt_embeds": ZEROS},
        ValueError,
        "only one of negative_prompt and",
    ),
    ({"prompt": None, "prompt_embeds": ZEROS[0]}, ValueError, r"prompt_embeds has shape \[77, 16\]"),
    ({"prompt": None, "prompt_embeds": ZEROS[..., :8]}, ValueError, "8 wide, and the UNet reads 16"),
    ({"prompt": None, "prompt_embeds": ZEROS.repeat(1, 2, 1)}, ValueError, "have 154 tokens.*reads 77"),
    (
        {"prompt": None, "prompt_embeds": ZEROS, "negative_prompt_embeds": ZEROS[:, :5]},
        ValueError,
        r"has shape \[1, 77, 16\], and negative_prompt_embeds has \[1, 5, 16\]",
    ),
    ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt is 0"),
    ({"num_images_per_prompt": 1.5}, ValueError, "num_images_per_prompt is 1.5; it has to be a whole number"),
    ({"num_inference_steps": None}, ValueError, "num_inference_steps is None; it has to be a whole number"),
    ({"num_inference_steps": 2.5}, ValueError, "num_inference_steps is 2.5; it has to be a whole number"),
    ({"guidance_scale": float("nan")}, ValueError, "guidance_scale is nan; it has to be a finite number"),
    ({"guidance_scale": "7"}, ValueError, "guidance_scale is '7'; it has to be a finite number"),
    ({"guidance_interval": 0.5}, ValueError, "guidance_interval is 0.5; needed are two shares"),
    ({"eta": -1.0}, ValueError, "eta is -1.0; it has to be a finite number, 0 or more"),
    (
        {"generator": 3},
        ValueError,
        "generator is 3; needed is a torch.Generator, one for each image, or None",
    ),
    ({"height": "16"}, ValueError, "height and width are '16' and 16; both have to be divisible by 8"),
    ({"latents": np.zeros((1, 4, 8, 8))}, ValueError, "latents is a ndarray; needed is a tensor"),
    ({"clip_skip": 9}, ValueError, "clip_skip is 9, and the text encoder has 3 layers"),
    ({"guidance_rescale": 1.5}, ValueError, "guidance_rescale is 1.5"),
    ({"guidance_interval": (0.5, 0.2)}, ValueError, r"guidance_interval is \(0.5, 0.2\)"),
    ({"ip_adapter_image": torch.zeros(1)}, NotImplementedError, "ip_adapter_image"),
    (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        ValueError,
        "has noise; allowed are latents, prompt_embeds",
    ),
    ({"cross_attention_kwargs": {"gain": 1}}, ValueError, "takes 'scale' alone, got gain"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_in_words(pipeline: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        sample(pipeline, **options)


def test_latents_that_are_not_numbers_any_more(pipeline: Any) -> None:
    with pytest.warns(UserWarning, match=r"latents of image\(s\) \[1\] have NaN"):
        sample(
            pipeline,
            ["a cat", "a dog"],
            (1, 2),
            callback_on_step_end=lambda p, i, t, k: {
                "latents": k["latents"] * torch.tensor([1.0, torch.nan])[:, None, None, None]
            },
        )


def test_a_tokenizer_of_another_encoder(pipeline: Any) -> None:
    pipeline.text_encoder.get_input_embeddings = lambda: torch.nn.Embedding(3, 16)
    with pytest.raises(ValueError, match="has 3 embeddings: they do not belong together"):
        try:
            sample(pipeline)
        finally:
            del pipeline.text_encoder.get_input_embeddings


def test_latents_decide_the_size(pipeline: Any) -> None:
    assert sample(pipeline, latents=torch.ones(1, 4, 5, 6)).shape == (1, 3, 10, 12)


def test_without_transformers(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.save_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"transformers, which is not installed: difusores\[text\]"):
        StableDiffusionPipeline.from_pretrained(tmp_path)


def test_threads_share_a_pipeline(parts: dict[str, Any]) -> None:
    pipeline = quiet(StableDiffusionPipeline(**parts))
    scales = (1.0, 3.0, 7.5)
    expected = [sample(pipeline, guidance_scale=scale) for scale in scales]
    results: dict[float, Tensor] = {}
    barrier = Barrier(len(scales))

    def run(scale: float) -> None:
        barrier.wait()
        results[scale] = sample(
            pipeline, guidance_scale=scale, callback_on_step_end=lambda *args: barrier.wait() and None
        )

    threads = [Thread(target=run, args=(scale,)) for scale in scales]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale, image in zip(scales, expected, strict=True):
        assert differ(results[scale], image) < 1e-5


def test_a_model_that_is_told_the_guidance(parts: dict[str, Any], widened: Any) -> None:
    unet = widened(4, time_cond_proj_dim=8)
    pipeline = quiet(StableDiffusionPipeline(**{**parts, "unet": unet}))
    rows: list[int] = []
    unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    assert differ(sample(pipeline, guidance_scale=3.0), sample(pipeline, guidance_scale=8.0)) > 1e-3
    assert set(rows) == {1}
