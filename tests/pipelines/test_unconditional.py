"""DDPMPipeline and DDIMPipeline, without diffusers."""

from __future__ import annotations

import inspect
import json
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import difusores
from difusores import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
PIPELINES = [DDPMPipeline, DDIMPipeline]
FIXTURES = Path(__file__).parents[1] / "fixtures"
STORED = sorted(path.name for path in (FIXTURES / "images").glob("*.safetensors"))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(kind: Any, scheduler: Any = None, **options: Any) -> Any:
    torch.manual_seed(1)
    return quiet(kind(UNet2DModel(**{**CONFIG, **options}).eval(), scheduler or DDPMScheduler()))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipeline: Any, seed: int = 0, **options: Any) -> np.ndarray:
    options = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np", **options}
    return pipeline(generator=seeded(seed), **options).images


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("channels", [1, 3])
def test_output_types(kind: Any, channels: int) -> None:
    scheduler = DDPMScheduler(clip_sample_range=3.0)
    pipeline = build(kind, scheduler, in_channels=channels, out_channels=channels)
    array = sample(pipeline)
    assert array.shape == (2, 8, 8, channels) and array.dtype == np.float32
    assert array.min() >= 0 and array.max() <= 1 and array.std() > 0.05
    tensor = sample(pipeline, output_type="pt")
    assert torch.equal(tensor.permute(0, 2, 3, 1), torch.from_numpy(array))
    pictures = sample(pipeline, output_type="pil")
    for picture, expected in zip(pictures, array, strict=True):
        assert picture.mode == ("L" if channels == 1 else "RGB")
        assert np.array_equal(np.asarray(picture).reshape(expected.shape), np.rint(expected * 255))
    raw = sample(pipeline, output_type="latent")
    assert raw.abs().max() > 1 and torch.equal((raw / 2 + 0.5).clamp(0, 1), tensor)
    (images,) = pipeline(2, seeded(), num_inference_steps=4, output_type="np", return_dict=False)
    assert np.array_equal(images, array)


def test_the_picture_is_made_by_the_loop_that_users_write() -> None:
    pipeline = build(DDPMPipeline)
    generator, scheduler = seeded(), DDPMScheduler()
    with torch.no_grad():
        x = torch.randn(2, 3, 8, 8, generator=generator)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t).sample, t, x, generator=generator).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(sample(pipeline) - expected).max() < 1e-5


@pytest.mark.parametrize("kind", PIPELINES)
def test_same_seed_same_images(kind: Any) -> None:
    pipeline = build(kind)
    options = {"eta": 0.5} if kind is DDIMPipeline else {}
    first = sample(pipeline, **options)
    assert np.array_equal(first, sample(pipeline, **options))
    assert not np.array_equal(first, sample(pipeline, seed=1, **options))


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_generator_for_each_image(kind: Any) -> None:
    pipeline = build(kind)
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    together = pipeline(3, [seeded(i) for i in range(3)], **options).images
    for i in range(3):
        assert np.abs(pipeline(1, seeded(i), **options).images[0] - together[i]).max() < 1e-5
    with pytest.raises(ValueError, match="2 generators"):
        pipeline(3, [seeded(0), seeded(1)], **options)


@pytest.mark.parametrize("kind", PIPELINES)
def test_threads_get_the_images_that_they_get_alone(kind: Any) -> None:
    pipeline = build(kind)
    options = {"eta": 1.0} if kind is DDIMPipeline else {}
    # different numbers of steps: state of the scheduler, were it shared, would show
    jobs = [{"seed": i, "num_inference_steps": 5 + 4 * i, **options} for i in range(4)]
    alone = [sample(pipeline, **job) for job in jobs]
    together: list[Any] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        barrier.wait()
        together[i] = sample(pipeline, **jobs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


ALL = [name for name in difusores.schedulers.__all__ if name.endswith("Scheduler")]
OWN_LOOPS = {"KarrasVeScheduler", "RePaintScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler"}


def with_scheduler(name: str) -> Any:
    if name in ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"):
        pytest.importorskip("torchsde", reason="Brownian noise is torchsde's")
    # its `step` takes no generator
    options = {"noise_sampler_seed": 0} if name == "DPMSolverSDEScheduler" else {}
    return build(DDPMPipeline, getattr(difusores, name)(**options))


@pytest.mark.parametrize("name", [name for name in ALL if name not in OWN_LOOPS])
def test_every_scheduler_gives_the_images_of_the_loop_in_each_thread(name: str) -> None:
    pipeline, scheduler, generator = with_scheduler(name), with_scheduler(name).scheduler, seeded()
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
    known = inspect.signature(scheduler.step).parameters
    given: dict[str, Any] = {"generator": generator} if "generator" in known else {}
    with torch.no_grad():
        x = torch.randn(2, 3, 8, 8, generator=generator)
        scheduler.set_timesteps(4)
        x = x * scheduler.plan(4).init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            if "prev_timestep" in known:
                given["prev_timestep"] = scheduler.timesteps[i + 1] if i < 3 else None
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(pipeline.unet(scaled, t).sample, t, x, **given).prev_sample
    alone = [sample(pipeline, seed, **options) for seed in (0, 1)]
    torch.testing.assert_close(alone[0], x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))
    together: dict[int, Any] = {}
    barrier = threading.Barrier(2)

    def work(seed: int) -> None:
        barrier.wait()
        together[seed] = sample(pipeline, seed, **options)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[seed], alone[seed]) for seed in (0, 1))


@pytest.mark.parametrize("name", sorted(OWN_LOOPS))
def test_schedulers_with_a_loop_of_their_own_are_refused(name: str) -> None:
    words = {
        "KarrasVeScheduler": "step needs model_output, sigma_hat, sigma_prev, sample_hat",
        "RePaintScheduler": "step needs .*, original_image, mask",
    }
    with pytest.raises(ValueError, match=f"{name}.*{words.get(name, 'has no step')}.*write its own loop"):
        sample(build(DDPMPipeline, getattr(difusores, name)()))


def test_a_step_without_noise_is_given_no_generator() -> None:
    class SameSteps(HeunDiscreteScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
            return super().step(model_output, timestep, sample, return_dict)

    images = [sample(build(DDPMPipeline, kind())) for kind in (HeunDiscreteScheduler, SameSteps)]
    assert np.abs(images[0] - images[1]).max() < 1e-4


class HalfSteps(DDIMScheduler):
    """A scheduler with steps of its own."""

    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().step(model_output / 2, *args, **kwargs)


class TestSchedulersWithAStepOfTheirOwn:
    def half(self, scheduler: Any) -> Any:
        """The same, as an assignment to the object."""
        own = scheduler.step
        scheduler.step = lambda output, *args, **kwargs: own(output / 2, *args, **kwargs)
        return scheduler

    @pytest.mark.parametrize("kind", PIPELINES)
    @pytest.mark.parametrize("assigned", [False, True])
    def test_that_step_is_taken(self, kind: Any, assigned: bool) -> None:
        pipeline = build(kind)
        pipeline.scheduler = self.half(DDIMScheduler()) if assigned else HalfSteps()
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(4)
        with torch.no_grad():
            x = torch.randn(2, 3, 8, 8, generator=seeded())
            for t in scheduler.timesteps:
                x = scheduler.step(pipeline.unet(x, t).sample / 2, t, x).prev_sample
        assert (sample(pipeline, output_type="latent") - x).abs().max() < 1e-5

    @pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
    def test_labels_guidance_and_callback_act_as_with_a_plan(self, variance_type: str) -> None:
        class SameSteps(DDPMScheduler):
            def step(self, *args: Any, **kwargs: Any) -> Any:
                return super().step(*args, **kwargs)

        seen: list[tuple[int, int]] = []

        def halve(pipe: Any, step: int, time: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
            seen.append((step, int(time)))
            return {"image": tensors["image"] / 2}

        images = []
        for scheduler in (DDPMScheduler, SameSteps):
            channels = 6 if variance_type == "learned_range" else 3
            pipeline = build(DDPMPipeline, num_class_embeds=4, out_channels=channels)
            pipeline.scheduler = scheduler(variance_type=variance_type)
            options = {"class_labels": [0, 2], "guidance_scale": 2.5, "callback_on_step_end": halve}
            images.append(sample(pipeline, output_type="pt", **options))
        assert (images[0] - images[1]).abs().max() < 1e-5
        assert seen[:4] == seen[4:] == list(zip(range(4), (750, 500, 250, 0), strict=True))


def test_the_scheduler_is_not_touched() -> None:
    pipeline = build(DDIMPipeline)
    pipeline.scheduler.set_timesteps(7)
    sample(pipeline, num_inference_steps=3)
    assert pipeline.scheduler.num_inference_steps == 7 and len(pipeline.scheduler.timesteps) == 7


def test_no_gradients_and_no_inference_tensors() -> None:
    image = sample(build(DDPMPipeline), output_type="pt")
    assert not image.requires_grad and not image.is_inference()


@pytest.mark.parametrize("kind", PIPELINES)
def test_callback_and_progress_bar(kind: Any, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = build(kind)
    seen: list[tuple[int, int, torch.Tensor]] = []

    def callback(pipe: Any, step: int, time: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        assert pipe is pipeline
        seen.append((step, int(time), tensors["image"]))

    pipeline.set_progress_bar_config(desc="sampling")
    image = sample(pipeline, output_type="pt", callback_on_step_end=callback)
    scheduler = type(pipeline.scheduler)()
    scheduler.set_timesteps(4)
    assert [entry[:2] for entry in seen] == list(enumerate(scheduler.timesteps.tolist()))
    assert torch.equal((seen[-1][2] / 2 + 0.5).clamp(0, 1), image)
    assert len({float(entry[2].sum()) for entry in seen}) == 4
    error = capfd.readouterr().err
    assert "sampling" in error and "4/4" in error


def test_callback_may_replace_the_image() -> None:
    def blacken(pipe: Any, step: int, time: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Any:
        return {"image": torch.full_like(tensors["image"], -1.0)} if step == 3 else {}

    assert (sample(build(DDPMPipeline), callback_on_step_end=blacken) == 0).all()


class TestClasses:
    @pytest.fixture
    def pipeline(self) -> Any:
        return build(DDIMPipeline, num_class_embeds=4)

    def test_labels_set_the_number_of_images(self, pipeline: Any) -> None:
        images = sample(pipeline, batch_size=1, class_labels=[0, 1, 1])
        assert len(images) == 3
        assert np.array_equal(sample(pipeline, class_labels=2), sample(pipeline, class_labels=[2, 2]))
        assert np.array_equal(
            sample(pipeline, class_labels=torch.tensor([2, 2])), sample(pipeline, class_labels=2)
        )
        assert not np.array_equal(sample(pipeline, class_labels=1), sample(pipeline, class_labels=2))

    def test_guidance_combines_conditional_and_null_predictions(self, pipeline: Any) -> None:
        labels, w, generator = torch.tensor([0, 2]), 2.5, seeded()
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(4)
        with torch.no_grad():
            x = torch.randn(2, 3, 8, 8, generator=generator)
            for t in scheduler.timesteps:
                conditional = pipeline.unet(x, t, labels).sample
                null = pipeline.unet(x, t, torch.full_like(labels, 3)).sample
                e = null + w * (conditional - null)
                x = scheduler.step(e, t, x, use_clipped_model_output=True).prev_sample
        expected = (x / 2 + 0.5).clamp(0, 1)
        guided = sample(pipeline, class_labels=labels, guidance_scale=w, output_type="pt")
        assert (guided - expected).abs().max() < 1e-5
        loose = {"use_clipped_model_output": False, "output_type": "pt"}
        assert (guided - sample(pipeline, class_labels=labels, guidance_scale=w, **loose)).abs().max() > 1e-4
        plain = sample(pipeline, class_labels=labels, output_type="pt")
        assert (guided - plain).abs().max() > 1e-3
        assert torch.equal(plain, sample(pipeline, class_labels=labels, guidance_scale=1, output_type="pt"))

    @pytest.mark.parametrize("planned", [True, False])
    def test_separate_guidance(self, pipeline: Any, planned: bool) -> None:
        """The model is called for labels and for null labels by themselves; the images are the same."""

        class SameSteps(DDIMScheduler):
            def step(self, *args: Any, **kwargs: Any) -> Any:
                return super().step(*args, **kwargs)

        pipeline.scheduler = DDIMScheduler() if planned else SameSteps()
        options: dict[str, Any] = {"class_labels": [0, 2], "guidance_scale": 2.5, "output_type": "pt"}
        together, rows = sample(pipeline, **options), []
        pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        pipeline.enable_separate_guidance()
        assert (sample(pipeline, **options) - together).abs().max() < 1e-5 and rows == [2] * 8

    def test_mistakes_are_named(self, pipeline: Any) -> None:
        for options, words in (
            ({"class_labels": [0, 4]}, "integers from 0 to 3"),
            ({"class_labels": [0, -1]}, "integers from 0 to 3"),
            ({"class_labels": [0.5, 1.0]}, "integers from 0 to 3"),
            ({"class_labels": [0, 1, 2]}, "batch_size is 2, and there are 3"),
            ({"class_labels": 1, "batch_size": 0}, "batch_size is 0; it has to be a whole number"),
            ({"class_labels": 1, "guidance_scale": float("nan")}, "guidance_scale is nan"),
            ({"class_labels": 1, "num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
            ({"class_labels": 1, "eta": -1.0}, "eta is -1.0; it has to be a finite number, 0 or more"),
            ({"guidance_scale": 2.0}, "guidance_scale needs class_labels"),
            ({}, "needs class_labels"),
        ):
            with pytest.raises(ValueError, match=words):
                sample(pipeline, **options)
        with pytest.raises(ValueError, match="not class-conditional"):
            sample(build(DDPMPipeline), class_labels=[0, 1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output_type": "jpeg"}, "jpeg.*pil, np, pt, latent"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "1001"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample(build(DDPMPipeline), **options)


def test_sample_size() -> None:
    assert sample(build(DDIMPipeline, sample_size=(4, 6))).shape == (2, 4, 6, 3)
    with pytest.raises(ValueError, match="sample_size"):
        sample(build(DDIMPipeline, sample_size=None))


@pytest.mark.parametrize("kind", PIPELINES)
def test_half_precision_and_to(kind: Any) -> None:
    pipeline = build(kind)
    exact = sample(pipeline, output_type="pt")
    assert pipeline.to("cpu", torch.bfloat16) is pipeline
    assert pipeline.dtype is torch.bfloat16 and pipeline.device == torch.device("cpu")
    image = sample(pipeline, output_type="pt")
    assert image.dtype is torch.bfloat16 and (image - exact).abs().mean() < 0.03
    assert sample(pipeline).dtype == np.float32
    assert pipeline.to(dtype=torch.float32).unet.dtype is torch.float32


def check_stored(name: str) -> None:
    fill = runpy.run_path(str(FIXTURES / "make.py"))["fill"]
    with safe_open(FIXTURES / "images" / name, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        expected = file.get_tensor("images")
    scheduler = DDPMScheduler(**metadata["scheduler"])
    pipeline = quiet(globals()[metadata["pipeline"]](fill(UNet2DModel(**metadata["unet"])).eval(), scheduler))
    images = sample(pipeline, output_type="pt", **metadata["options"])
    assert (images - expected).abs().max() < 2e-3


@pytest.mark.parametrize("name", STORED)
def test_stored_images(name: str) -> None:
    check_stored(name)


def test_stored_images_without_diffusers() -> None:
    script = f"""
import sys
sys.modules["diffusers"] = sys.modules["huggingface_hub"] = sys.modules["transformers"] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_unconditional as t
for name in t.STORED:
    t.check_stored(name)
    print(name)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.split() == STORED and len(STORED) == 2, run.stderr
