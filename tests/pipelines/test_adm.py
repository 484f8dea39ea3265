"""ADMPipeline: images of guided-diffusion's own loops, and its semantics by hand."""

from __future__ import annotations

import copy
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from difusores import (
    ADMClassifier,
    ADMPipeline,
    ADMUNet,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from difusores.pipelines.classifier_guidance import log_gradient
from difusores.plan import Plan

FIXTURES = Path(__file__).parents[1] / "fixtures"
fill = runpy.run_path(str(FIXTURES / "make.py"))["fill"]
IMAGES = load_file(FIXTURES / "adm" / "images.safetensors")
SMALL: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "8",
}


def quiet(pipeline: ADMPipeline) -> ADMPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def models() -> tuple[ADMUNet, ADMClassifier]:
    with safe_open(FIXTURES / "adm" / "models.safetensors", "pt") as file:
        metadata = file.metadata()
    unet = ADMUNet(**json.loads(metadata["configs"])["class_conditional"])
    return fill(unet).eval(), fill(ADMClassifier(**json.loads(metadata["classifier"]))).eval()


LINEAR = {"variance_type": "learned_range", "timestep_spacing": "linspace"}
COSINE = {
    "variance_type": "fixed_large",
    "timestep_spacing": "linspace",
    "beta_schedule": "squaredcos_cap_v2",
}


@pytest.mark.parametrize(
    ("name", "scheduler", "scale"),
    [
        ("ancestral", DDPMScheduler(**LINEAR), 0.0),
        ("ancestral_guided", DDPMScheduler(**LINEAR), 300.0),
        ("ancestral_fixed_large", DDPMScheduler(**COSINE), 300.0),
        ("ddim", DDIMScheduler(), 0.0),
        ("ddim_guided", DDIMScheduler(), 20.0),
    ],
)
def test_images_of_guided_diffusion(models, name: str, scheduler: Any, scale: float) -> None:
    """Its loops over 5 of 1000 steps; without the classifier the images differ by 2."""
    unet, classifier = models
    pipeline = quiet(ADMPipeline(unet, scheduler, classifier))
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", "classifier_scale": scale}
    images = pipeline(class_labels=[4, 1], **options).images
    assert (images - IMAGES[name]).abs().max() < 3e-4
    if scale:
        torch.manual_seed(0)
        assert (pipeline(class_labels=[3, 1], **options).images[0] - IMAGES[name][0]).abs().max() > 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("name", ["ancestral_guided", "ddim_guided"])
def test_on_a_gpu(models, name: str) -> None:
    scheduler, scale = (DDIMScheduler(), 20.0) if name == "ddim_guided" else (DDPMScheduler(**LINEAR), 300.0)
    pipeline = quiet(ADMPipeline(copy.deepcopy(models[0]), scheduler, copy.deepcopy(models[1]))).to("cuda")
    options: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", "classifier_scale": scale}
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        found = pipeline(class_labels=[4, 1], generator=torch.Generator().manual_seed(0), **options).images
    assert (found.cpu() - IMAGES[name]).abs().max() < 2e-3


class Fixed(ADMUNet):
    """Predicts what it is told to, in place of a network's output."""

    def __init__(self, *values: float, **options: Any) -> None:
        super().__init__(**{**SMALL, "in_channels": 1, **options})
        self.values, self.times = values, []

    def forward(self, sample, timestep, class_labels=None, low_res=None, return_dict=True):  # type: ignore[no-untyped-def]
        self.times.append(float(timestep))
        parts = [torch.full_like(sample, value) for value in self.values]
        if class_labels is not None:
            parts[0] = parts[0] * class_labels.view(-1, 1, 1, 1)
        return (torch.cat(parts, dim=1),)


class Linear(ADMClassifier):
    """logits = (0, x of the first pixel): log p(1 | x) has the gradient 1 - p there, and log p(0 | x) -p."""

    def __init__(self) -> None:
        super().__init__(8, 32, 1, "8", channel_mult="1", num_head_channels=32, in_channels=1, num_classes=2)

    def forward(self, sample, timestep):  # type: ignore[no-untyped-def]
        pixel = sample[:, 0, 0, 0]
        return torch.stack((torch.zeros_like(pixel), pixel), dim=1)


def test_sign_and_scale_of_the_gradient() -> None:
    x = torch.zeros(2, 1, 8, 8)
    x[1, 0, 0, 0] = math.log(3)  # p = 3/4
    up = log_gradient(Linear(), x, 0, torch.tensor([1, 1]))
    down = log_gradient(Linear(), x, 0, torch.tensor([0, 0]))
    torch.testing.assert_close(up[:, 0, 0, 0], torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(down[:, 0, 0, 0], torch.tensor([-0.5, -0.75]))
    assert up.count_nonzero() == 2


# Four training steps with betas of 0.1: alphas_cumprod 0.9, 0.81, 0.729, 0.6561.
TENTHS = {"num_train_timesteps": 4, "trained_betas": [0.1] * 4, "clip_sample": False}


def test_respacing_by_hand() -> None:
    """10 steps respaced to 4 are 0, 3, 6, 9 in ancestral sampling; DDIM respaced to 5 takes every second."""
    unet = Fixed(0.0)
    quiet(ADMPipeline(unet, DDPMScheduler(10, timestep_spacing="linspace")))(num_inference_steps=4)
    assert unet.times == [9, 6, 3, 0]
    unet.times.clear()
    quiet(ADMPipeline(unet, DDIMScheduler(10)))(num_inference_steps=5)
    assert unet.times == [8, 6, 4, 2, 0]


def run(unet: Any, scheduler: Any, classifier: Any = None, **options: Any) -> list[torch.Tensor]:
    """The first noise, then the sample after each step."""
    states = [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))]
    quiet(ADMPipeline(unet, scheduler, classifier))(
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda _, i, t, state: states.append(state["image"]) or {},
        **options,
    )
    return states


@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0])
def test_learned_variance_by_hand(v: float) -> None:
    """From step 3 to step 1, respaced: beta' = 1 - 0.6561 / 0.81 = 0.19; v interpolates the logarithms."""
    scheduler = DDPMScheduler(**TENTHS, variance_type="learned_range", timestep_spacing="linspace")
    states = run(Fixed(0.5, v, learn_sigma=True), scheduler, num_inference_steps=4)
    a, before, beta = 0.6561, 0.729, 0.1
    x0 = (states[0] - math.sqrt(1 - a) * 0.5) / math.sqrt(a)
    mean = math.sqrt(before) * beta / (1 - a) * x0 + math.sqrt(0.9) * (1 - before) / (1 - a) * states[0]
    small = (1 - before) / (1 - a) * beta
    variance = {-1.0: small, 0.0: math.sqrt(small * beta), 1.0: beta}[v]
    source = torch.Generator().manual_seed(0)
    torch.randn(1, 1, 8, 8, generator=source)
    z = torch.randn(1, 1, 8, 8, generator=source)
    torch.testing.assert_close(states[1], mean + math.sqrt(variance) * z)


@pytest.mark.parametrize("v", [-1.0, 1.0])
def test_shift_of_the_mean_by_hand(v: float) -> None:
    """The first step moves by variance * s * gradient, and the last one, which adds no noise, too."""
    scheduler = DDPMScheduler(**TENTHS, variance_type="learned_range", timestep_spacing="linspace")
    options: dict[str, Any] = {"num_inference_steps": 4, "class_labels": [1]}
    unet = Fixed(0.5, v, learn_sigma=True)
    plain, guided = (run(unet, scheduler, Linear(), classifier_scale=s, **options) for s in (0, 3.0))
    moved = (guided[1] - plain[1])[0, 0]
    x = plain[0][0, 0, 0, 0]
    small = (1 - 0.729) / (1 - 0.6561) * 0.1
    torch.testing.assert_close(moved[0, 0], (0.1 if v > 0 else small) * 3 * (1 - x.sigmoid()))
    assert moved.count_nonzero() == 1
    # the last variance: between the posterior's of the step before, (1 - 0.9) / (1 - 0.81) * 0.1, and beta
    last = 0.1 if v > 0 else 0.1 / 0.19 * 0.1
    x = guided[3]
    x0 = (x - math.sqrt(0.1) * 0.5) / math.sqrt(0.9)
    moved = (guided[4] - x0)[0, 0]
    torch.testing.assert_close(moved[0, 0], last * 3 * (1 - x[0, 0, 0, 0].sigmoid()), rtol=1e-4, atol=1e-6)
    assert moved[1:].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("kind", "first", "last"),
    [
        (
            "fixed_large",
            0.1,
            0.1 / 0.19 * 0.1,
        ),  # beta, but in the last step the posterior's of the one before
        ("fixed_small", (1 - 0.729) / (1 - 0.6561) * 0.1, 0.0),
    ],
)
def test_shift_of_the_mean_by_fixed_variances(kind: str, first: float, last: float) -> None:
    scheduler = DDPMScheduler(**TENTHS, variance_type=kind, timestep_spacing="linspace")
    options: dict[str, Any] = {"num_inference_steps": 4, "class_labels": [1]}
    plain, guided = (run(Fixed(0.5), scheduler, Linear(), classifier_scale=s, **options) for s in (0, 3.0))
    x = plain[0][0, 0, 0, 0]
    torch.testing.assert_close((guided[1] - plain[1])[0, 0, 0, 0], first * 3 * (1 - x.sigmoid()))
    x = guided[3][0, 0, 0, 0]
    moved = guided[4][0, 0, 0, 0] - (x - math.sqrt(0.1) * 0.5) / math.sqrt(0.9)
    torch.testing.assert_close(moved, last * 3 * (1 - x.sigmoid()), rtol=1e-4, atol=1e-6)


def test_shift_of_the_noise_by_hand() -> None:
    """DDIM from step 2 of 4: e' = e - √(1 - 0.729) * s * gradient, then x0 and the direction follow e'."""
    states = run(
        Fixed(0.5),
        DDIMScheduler(**TENTHS),
        Linear(),
        num_inference_steps=2,
        class_labels=1,
        classifier_scale=3.0,
    )
    x, a, before = states[0], 0.729, 0.9
    e = torch.full_like(x, 0.5)
    e[0, 0, 0, 0] -= math.sqrt(1 - a) * 3 * (1 - x[0, 0, 0, 0].sigmoid())
    x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
    torch.testing.assert_close(states[1], math.sqrt(before) * x0 + math.sqrt(1 - before) * e)


@pytest.mark.parametrize(("clip", "weights"), [(False, (2.0, -1.0, 1.0)), (True, None)])
def test_the_step_adds_the_shift_where_it_is_linear(
    models, clip: bool, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    plain = Plan.run
    monkeypatch.setattr(Plan, "run", lambda *a, **given: told.append(given["guidance"]) or plain(*a, **given))
    pipeline = quiet(ADMPipeline(models[0], DDIMScheduler(clip_sample=clip), models[1]))
    pipeline(class_labels=[4], guidance_scale=2.0, null_label=0, num_inference_steps=2, output_type="pt")
    assert told == [weights]


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_shift_of_other_predictions(kind: str) -> None:
    """A model that predicts the same noise in other words moves by the same."""

    class Translated(Fixed):
        def forward(self, sample, timestep, class_labels=None, low_res=None, return_dict=True):  # type: ignore[no-untyped-def]
            a = 0.9 ** (float(timestep) + 1)
            x0 = (sample - math.sqrt(1 - a) * 0.5) / math.sqrt(a)
            return (x0 if kind == "sample" else math.sqrt(a) * 0.5 - math.sqrt(1 - a) * x0,)

    options: dict[str, Any] = {"num_inference_steps": 4, "class_labels": 1, "classifier_scale": 2.0}
    expected = run(Fixed(0.5), DDIMScheduler(**TENTHS), Linear(), **options)
    states = run(Translated(), DDIMScheduler(**TENTHS, prediction_type=kind), Linear(), **options)
    torch.testing.assert_close(states[-1], expected[-1])


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_both_guidances_together(kind: Any) -> None:
    """Label 3 predicts noise 3 * 0.1, null label 1 0.1: weight 2 makes 2 * 0.3 - 0.1 = 0.5 of them."""
    options: dict[str, Any] = {"num_inference_steps": 4, "classifier_scale": 2.0}
    expected = run(Fixed(0.5), kind(**TENTHS), Linear(), class_labels=1, **options)

    class Third(Linear):
        def forward(self, sample, timestep):  # type: ignore[no-untyped-def]
            return super().forward(sample, timestep)[:, [0, 0, 0, 1]]

    classifier = Third()
    classifier.register_to_config(num_classes=4)
    unet = Fixed(0.1, class_cond=True, num_classes=4)
    label: dict[str, Any] = {"class_labels": 3, "guidance_scale": 2.0, "null_label": 1}
    plain = run(unet, kind(**TENTHS), None, num_inference_steps=4, **label)
    torch.testing.assert_close(plain[-1], run(Fixed(0.5), kind(**TENTHS), num_inference_steps=4)[-1])
    states = run(unet, kind(**TENTHS), classifier, **label, **options)
    # of four logits three are 0, so p is smaller, and the push upwards larger
    moved, reference = (states[1] - plain[1])[0, 0, 0, 0], (expected[1] - plain[1])[0, 0, 0, 0]
    p = plain[0][0, 0, 0, 0].exp()
    torch.testing.assert_close(moved / reference, (3 / (3 + p)) / (1 / (1 + p)))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(**LINEAR), DDIMScheduler()], ids=["mean", "noise"])
def test_separate_guidance(models, scheduler: Any) -> None:
    """Beside a classifier's, too: the UNet is called for each part by itself, and the images are the same."""
    pipeline, rows, found = quiet(ADMPipeline(models[0], scheduler, models[1])), [], []
    hook = models[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for separate in (False, True):
        if separate:
            pipeline.enable_separate_guidance()
        torch.manual_seed(0)
        options: dict[str, Any] = {"guidance_scale": 2.0, "null_label": 0, "classifier_scale": 20.0}
        call = pipeline(class_labels=[4, 1], num_inference_steps=3, output_type="latent", **options)
        found.append(call.images)
    hook.remove()
    assert rows == [4] * 3 + [2] * 6 and (found[0] - found[1]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_other_schedulers_are_guided(models, kind: Any) -> None:
    """The classifier finds the images that it has guided more probable, in every sampler."""
    unet, classifier = models
    unet = ADMUNet.from_config(unet.config, learn_sigma=False)
    pipeline = quiet(ADMPipeline(fill(unet).eval(), kind(), classifier))
    labels, log_p = torch.tensor([4, 1]), []
    for scale in (0.0, 200.0):
        torch.manual_seed(0)
        images = pipeline(
            class_labels=labels, num_inference_steps=5, classifier_scale=scale, output_type="latent"
        ).images
        with torch.no_grad():
            log_p.append(classifier(images, 0).log_softmax(-1)[[0, 1], labels])
    assert (log_p[1] > log_p[0] + 0.01).all()


def test_a_folder_with_and_without_classifier(models, tmp_path: Path) -> None:
    unet, classifier = models
    ADMPipeline(ADMUNet(**SMALL), DDIMScheduler()).save_pretrained(tmp_path / "without")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "without")
    assert isinstance(pipeline, ADMPipeline) and pipeline.classifier is None
    ADMPipeline(unet, DDPMScheduler(**LINEAR), classifier).save_pretrained(tmp_path / "with")
    pipeline = quiet(DiffusionPipeline.from_pretrained(tmp_path / "with"))
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", "classifier_scale": 300.0}
    images = pipeline(class_labels=[4, 1], **options).images
    assert (images - IMAGES["ancestral_guided"]).abs().max() < 3e-4


def test_an_upsampler_is_given_small_images() -> None:
    unet = fill(ADMUNet(**SMALL, small_size=4)).eval()
    pipeline = quiet(ADMPipeline(unet, DDIMScheduler()))
    images = []
    for value in (-1.0, 1.0):
        torch.manual_seed(0)
        images.append(
            pipeline(low_res=torch.full((1, 3, 4, 4), value), num_inference_steps=2, output_type="pt")
        )
    assert images[0].images.shape == (1, 3, 8, 8)
    assert (images[0].images - images[1].images).abs().max() > 0.01
    with pytest.raises(ValueError, match="low_res holds 1 images, and 2 are asked for"):
        pipeline(2, low_res=torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="ADMUNet needs low_res, floating point"):
        pipeline(num_inference_steps=1)


def test_bad_arguments_in_words(models) -> None:
    unet, classifier = models
    plain = ADMUNet(**SMALL)
    ddim = DDIMScheduler()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ((unet, ddim), {}, "class-conditional and needs class_labels"),
        ((plain, ddim), {"class_labels": 1}, "neither the model nor a classifier takes them"),
        ((unet, ddim), {"class_labels": 1000}, r"\[1000\]; ADMUNet takes integers from 0 to 999"),
        ((unet, ddim), {"class_labels": [0.5]}, "ADMUNet takes integers"),
        ((unet, ddim, classifier), {"class_labels": 5}, "ADMClassifier takes integers from 0 to 4"),
        ((unet, ddim), {"class_labels": 1, "classifier_scale": 1.0}, "this pipeline has no classifier"),
        ((plain, ddim, classifier), {"classifier_scale": 1.0}, "there are no class_labels to move to"),
        ((plain, ddim), {"batch_size": 0}, "batch_size is 0; it has to be a whole number, 1 or more"),
        ((plain, ddim), {"num_inference_steps": None}, "num_inference_steps is None"),
        ((plain, ddim), {"eta": math.nan}, "eta is nan; it has to be a finite number, 0 or more"),
        ((plain, ddim), {"guidance_scale": math.inf}, "guidance_scale is inf; it has to be a finite number"),
        ((unet, ddim), {"class_labels": [1, 2], "batch_size": 3}, "batch_size is 3, and class_labels"),
        ((unet, ddim), {"class_labels": 1, "guidance_scale": 2.0}, "and its null_label"),
        ((plain, ddim), {"null_label": 1}, "there is no guidance_scale that needs it"),
        ((plain, DDPMScheduler()), {"eta": 0.5}, "eta is an option of DDIMScheduler"),
        ((plain, object()), {}, "object has no plan"),
        (
            (unet, FlowMatchEulerDiscreteScheduler(), classifier),
            {"class_labels": 1, "num_inference_steps": 2},
            "needs a scheduler for training steps",
        ),
        ((plain, ddim, classifier), {"classifier_scale": math.nan, "class_labels": 1}, "finite number"),
    ]
    for parts, options, words in cases:
        with pytest.raises(ValueError, match=words):
            quiet(ADMPipeline(*parts))(**options)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_step_adds_the_shift_of_the_mean(steps: int) -> None:
    """Within the op, so that the model's next input has it too, and nothing is added after it."""
    plan = DDPMScheduler(**TENTHS).plan(steps)
    x, shift, seen = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), []

    def model(given: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        seen.append(given.clone())
        return torch.zeros_like(given)

    def run(**options: Any) -> torch.Tensor:
        return plan.run(model, x, generator=torch.Generator().manual_seed(0), **options)

    def afterwards(index: int, time: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return sample + shift

    torch.testing.assert_close(run(shift=lambda: shift), run(callback=afterwards))
    torch.testing.assert_close(seen[:steps], seen[steps:])
    with pytest.raises(ValueError, match="no graph"):
        run(shift=lambda: shift, graph=True)
