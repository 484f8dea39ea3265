"""Guidance without a classifier: by hand, and the same options in every pipeline that has it."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_conditional as ours
import test_latent_diffusion as ldm
import torch
from torch import Tensor

import difusores
from difusores.pipelines.guidance import Guided, rescaled
from difusores.plan import Noise, Plan, Stage, make_row

FIXTURES = Path(__file__).parents[1] / "fixtures"
ONE = 1.0  # no guidance


class Parts:
    """A model whose parts of the batch are told apart by one image each; counts the rows that it is given."""

    def __init__(self, *parts: Tensor, conditional: int = -1) -> None:
        self.parts, self.conditional, self.rows = parts, conditional, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.rows.append(len(x))
        if len(x) == len(self.parts):
            return torch.stack(self.parts)
        assert len(x) == 1  # the conditional part alone
        return self.parts[self.conditional][None]


NONE, SOME = (torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), torch.tensor([[[4.0, 1.0], [0.0, -1.0]]]))


def run(
    model: Parts, weights: tuple[float, ...], steps: int = 1, fused: bool = True, **options: Any
) -> list[Tensor]:
    """The guided output, call after call: what steps of a plan make of it, or a sum of the parts."""
    guided = Guided(model, lambda: weights, steps, step_rescales=fused, **options)
    results: list[Tensor] = []
    if fused:
        stage = Stage(0, make_row((0.0, 1.0), {"e": 1.0}))
        Plan("identity", (stage,) * steps, "epsilon", ()).run(
            guided,
            torch.zeros(1, 1, 2, 2),
            guidance=guided.weights,
            rescale=guided.rescale,
            conditional=guided.conditional,
            callback=lambda index, time, y: results.append(y.clone()),
        )
        return results
    for _ in range(steps):
        output = guided(torch.zeros(len(guided.weights), 1, 2, 2), torch.tensor(0)).chunk(len(guided.weights))
        assert guided.rescale() == 0.0
        results.append(
            sum((w * part for w, part in zip(guided.weights, output, strict=True)), torch.zeros(()))
        )
    return results


def test_two_and_three_parts_by_hand() -> None:
    (two,) = run(Parts(NONE, SOME), (-1.5, 2.5))
    torch.testing.assert_close(two[0], -1.5 * NONE + 2.5 * SOME)
    (two,) = run(Parts(SOME, NONE, conditional=0), (2.5, -1.5), conditional=0)
    torch.testing.assert_close(two[0], -1.5 * NONE + 2.5 * SOME)
    between = NONE + 7
    (three,) = run(Parts(SOME, between, NONE, conditional=0), (3.0, -1.5, -0.5), conditional=0)
    torch.testing.assert_close(three[0], 3 * SOME - 1.5 * between - 0.5 * NONE)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("conditional", [0, -1])
def test_rescale_by_hand(conditional: int, fused: bool) -> None:
    """The mixture's deviation becomes the conditional one's, of each image by itself; a share of it."""
    parts = (NONE, SOME) if conditional else (SOME, NONE)
    weights = (-1.0, 2.0) if conditional else (2.0, -1.0)
    mixed = 2 * SOME - NONE  # 8, 1, -2, -5: deviation 5.5678; of SOME, 4, 1, 0, -1: 2.1602
    model = Parts(*parts, conditional=conditional)
    for share in (0.0, 0.25, 1.0):
        (found,) = run(model, weights, conditional=conditional, rescale=share, fused=fused)
        factor = share * 2.160247 / 5.567764 + 1 - share
        torch.testing.assert_close(found[0], mixed * factor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rescaled(mixed[None], SOME[None], 1.0).std(), SOME.std())


def test_interval_by_hand() -> None:
    """Calls 2 and 3 of 4 are within (0.25, 0.75); outside, the conditional part alone is asked for."""
    model = Parts(NONE, SOME)
    found = run(model, (-1.0, 2.0), steps=4, interval=(0.25, 0.75))
    mixed = 2 * SOME - NONE
    for value, expected in zip(found, (SOME, mixed, mixed, SOME), strict=True):
        torch.testing.assert_close(value[0], expected)
    assert model.rows == [1, 2, 2, 1]
    for limits in ({"interval": (0.5, 0.5)}, {"limits": (0.0, 0.0)}):
        (found_none,) = run(Parts(NONE, SOME), (-1.0, 2.0), **limits)
        torch.testing.assert_close(found_none[0], SOME)
    model = Parts(NONE, SOME)
    guided = Guided(model, lambda: (0.0, 1.0), 4, rescale=0.5)
    assert torch.equal(guided(torch.zeros(1, 1, 2, 2), torch.tensor(0)), SOME[None])
    assert guided.weights == (1.0,) and guided.rescale() == 0.0  # no guidance at all


@pytest.mark.parametrize("conditional", [0, -1])
def test_rescale_where_guidance_is(conditional: int) -> None:
    """Outside of the interval nothing is rescaled, not even what has no deviation; nor twice."""
    flat = torch.full_like(SOME, 3.0)
    parts = (NONE, flat) if conditional else (flat, NONE)
    weights = (-1.0, 2.0) if conditional else (2.0, -1.0)
    options: dict[str, Any] = {"conditional": conditional, "rescale": 1.0}
    for fused in (True, False):
        model = Parts(*parts, conditional=conditional)
        found = run(model, weights, 3, interval=(0.3, 0.6), fused=fused, **options)
        assert torch.equal(found[0][0], flat) and torch.equal(found[2][0], flat)
        assert torch.equal(found[1][0], torch.zeros_like(flat))
    now = [weights]
    guided = Guided(Parts(*parts, conditional=conditional), lambda: now[-1], 2, **options)
    x, t = torch.zeros(2, 1, 2, 2), torch.tensor(0)
    guided(x, t)
    assert guided.rescale() == 1.0
    now.append(tuple(w * 2 - 0.5 for w in weights))  # whose sum is 1
    first, second = guided(x, t)
    assert (
        guided.rescale() == 0.0 and torch.equal(first, second) and torch.equal(first, torch.zeros_like(flat))
    )


@pytest.mark.parametrize("conditional", [0, -1])
def test_a_learned_variance_is_the_conditional_one_s(conditional: int) -> None:
    """Also where the output is rescaled, which is left as it is."""
    variances = torch.full_like(NONE, 10.0), torch.full_like(NONE, 20.0)
    parts = [torch.cat(pair) for pair in zip((SOME, NONE), variances, strict=True)]
    weights = (2.0, -1.0) if conditional == 0 else (-1.0, 2.0)
    model = Parts(*(parts if conditional == 0 else parts[::-1]), conditional=conditional)
    guided = Guided(model, lambda: weights, 1, conditional=conditional, rescale=1.0, step_rescales=False)
    output = guided(torch.zeros(2, 1, 2, 2), torch.tensor(0))
    assert output.shape == (2, 2, 2, 2) and torch.equal(output[0], output[1])
    assert (output[0, 1] == 10).all()
    torch.testing.assert_close(output[0, 0].std(), SOME.std())
    row = make_row((0.0, 1.0), {"z": 1.0}, mode=2)  # the noise, times the root of the variance
    plan = Plan("noise", (Stage(0, row, noise=Noise()),), "epsilon", ())
    guided = Guided(model, lambda: weights, 1, conditional=conditional, rescale=1.0)
    options: dict[str, Any] = {"rescale": guided.rescale, "conditional": conditional}
    x, noise = torch.zeros(1, 1, 2, 2), torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    y = plan.run(guided, x, guidance=weights, generator=torch.Generator().manual_seed(3), **options)
    torch.testing.assert_close(y, noise * 10**0.5)


def class_conditional(kind: str) -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = difusores.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, num_class_embeds=4, **blocks
    )
    return getattr(difusores, kind)(unet, difusores.DDPMScheduler())


def adm(scheduler: str | None = None, **options: Any) -> Any:
    """scheduler: with a classifier, whose gradient it takes in its own way."""
    fill = runpy.run_path(str(FIXTURES / "make.py"))["fill"]
    small = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1"}
    unet = difusores.ADMUNet(**small, attention_resolutions="8", class_cond=True, num_classes=4, **options)
    if scheduler is None:
        return difusores.ADMPipeline(
            fill(unet).eval(), difusores.DDPMScheduler(variance_type="learned_range")
        )
    classifier = difusores.ADMClassifier(8, 32, 1, "8", channel_mult="1", num_head_channels=32, num_classes=4)
    made = getattr(difusores, scheduler)()
    return difusores.ADMPipeline(fill(unet).eval(), made, classifier=fill(classifier).eval())


IMAGE = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)
MASK = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
TEXT: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "a dog"}


def of_stable_diffusion(kind: str, channels: int = 4, **given: Any) -> Callable[[Any], Any]:
    def make(request: Any) -> Any:
        parts = request.getfixturevalue("parts")
        if channels != 4:
            parts["unet"] = request.getfixturevalue("widened")(channels)
        if "ControlNet" in kind:
            net = difusores.ControlNetModel.from_unet(
                parts["unet"], conditioning_embedding_out_channels=[4, 4]
            )
            parts["controlnet"] = net
        return getattr(difusores, kind)(**parts), {**TEXT, **given}

    return make


def latent_text(request: Any) -> Any:
    words = ldm.tokenizer(request.getfixturevalue("tmp_path"))
    bert = ldm.spread(difusores.LDMBertModel(vocab_size=len(words), **ldm.BERT))
    unet = ldm.spread(difusores.UNet2DConditionModel(**ldm.CROSSING))
    vqvae, scheduler = difusores.VQModel(**ldm.VQ), ldm.scheduler(clip_sample=False)
    return difusores.LDMTextToImagePipeline(vqvae, bert, words, unet, scheduler), dict(TEXT)


def sounds(request: Any) -> Any:
    sound = ours.tones(60, 300)
    return ours.audible(), {"audio": sound[:1], "sampling_rate": 800, "negative_audio": sound[1]}


def layouts(request: Any) -> Any:
    return ours.semantic(), {"semantic_map": ours.maps(), "negative_map": ours.maps()[1]}


PIPELINES: dict[str, Callable[[Any], Any]] = {
    "DDPM": lambda request: (class_conditional("DDPMPipeline"), {"class_labels": [0, 2], "null_label": 1}),
    "DDIM": lambda request: (class_conditional("DDIMPipeline"), {"class_labels": [0, 2]}),
    "ADM": lambda request: (adm(learn_sigma=True), {"class_labels": [0, 2], "null_label": 1}),
    "audio": sounds,
    "semantic": layouts,
    "LDM text": latent_text,
    "text": of_stable_diffusion("StableDiffusionPipeline"),
    "img2img": of_stable_diffusion("StableDiffusionImg2ImgPipeline", image=IMAGE),
    "inpaint": of_stable_diffusion("StableDiffusionInpaintPipeline", 9, image=IMAGE, mask_image=MASK),
    "controlnet": of_stable_diffusion("StableDiffusionControlNetPipeline", image=IMAGE),
    "edit": of_stable_diffusion("StableDiffusionInstructPix2PixPipeline", 8, image=IMAGE),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_with_guidance(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, given = PIPELINES[name](request)
    pipeline.set_progress_bar_config(disable=True)
    steps = 4 if name == "img2img" else 3

    def sample(**options: Any) -> Tensor:
        every = {
            "num_inference_steps": steps,
            "output_type": "latent",
            "guidance_scale": 3.0,
            **given,
            **options,
        }
        if options.get("guidance_scale") is ONE:
            every.pop("null_label", None)
        images: Tensor = pipeline(generator=torch.Generator().manual_seed(1), **every).images
        return images

    def differ(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    plain, none = sample(), sample(guidance_scale=ONE)
    assert differ(plain, none) > 1e-3
    if name == "DDIM":  # else with guidance x0 is clipped in another way
        none = sample(guidance_scale=ONE, use_clipped_model_output=True)
    assert differ(sample(guidance_interval=(0.5, 0.5)), none) < 1e-5
    whole = sample(guidance_interval=(0.0, 1.0), guidance_rescale=0.0, guidance_scale=torch.tensor(3.0))
    assert torch.equal(whole, plain)
    part = sample(guidance_interval=(0.0, 0.6))
    assert differ(part, plain) > 1e-4 and differ(part, none) > 1e-4
    rescaled = sample(guidance_rescale=0.7)
    assert differ(rescaled, plain) > 1e-4
    rescale_before_the_step(monkeypatch)
    assert_close_to(sample(guidance_rescale=0.7), rescaled)
    monkeypatch.undo()
    negative = next((key for key in given if key.startswith("ne") or key == "null_label"), None)
    if negative is not None:  # what is led away from is felt
        other = 3 if negative == "null_label" else None
        assert differ(sample(**{negative: other}), plain) > 1e-4
    for options, message in (
        ({"guidance_rescale": 1.5}, r"guidance_rescale is 1\.5; it is a share, from 0 to 1"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale is nan"),
        ({"guidance_interval": (0.8, 0.2)}, r"guidance_interval is \(0\.8, 0\.2\); needed are two shares"),
        ({"guidance_interval": 0.5}, r"guidance_interval is 0\.5"),
        ({"guidance_scale": torch.ones(2)}, "guidance_scale is tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(**options)


def rescale_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's operators; no step has a factor then."""
    begin = Guided.__init__
    elsewhere = {"step_rescales": False}
    monkeypatch.setattr(Guided, "__init__", lambda *args, **given: begin(*args, **given | elsewhere))


def assert_close_to(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_rescale_beside_a_classifier(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient shifts the mean of the rescaled step, or the rescaled noise: never what is rescaled."""
    pipeline = adm(scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def sample(rescale: float) -> Tensor:
        given = {"class_labels": [0, 2], "null_label": 1, "guidance_scale": 3.0, "guidance_rescale": rescale}
        seed = torch.Generator().manual_seed(1)
        images: Tensor = pipeline(**given, num_inference_steps=2, generator=seed, output_type="pt").images
        return images

    rescaled = sample(0.7)
    assert (rescaled - sample(0.0)).abs().max() > 1e-4
    rescale_before_the_step(monkeypatch)
    assert_close_to(sample(0.7), rescaled)


def test_null_labels_without_guidance_are_refused() -> None:
    with pytest.raises(ValueError, match="null_label is given, and there is no guidance_scale"):
        class_conditional("DDPMPipeline")(class_labels=1, null_label=0, num_inference_steps=2)


def test_negative_conditions_in_words() -> None:
    with pytest.raises(ValueError, match=r"negative_audio has shape \[1, 7\]; needed is \[1, 300\]"):
        ours.audible()(ours.tones(60), 800, guidance_scale=2.0, negative_audio=torch.zeros(7))
    with pytest.raises(ValueError, match="there are 3 negative maps for 2 maps"):
        ours.semantic()(ours.maps(), guidance_scale=2.0, negative_map=ours.maps()[[0, 0, 0]])
