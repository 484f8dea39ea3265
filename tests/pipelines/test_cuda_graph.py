"""`enable_cuda_graph` of pipelines: the bits of the call without graphs; on a tape where there is no GPU."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import difusores
from difusores import graphs
from difusores.models.lora import LowRank, make_adapters

pytest.importorskip("transformers")

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
Pair = Callable[..., Tensor]


def quiet(pipeline: Any, device: str = "cpu") -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def both(pipeline: Any, *args: Any, **options: Any) -> Tensor:
    """The image, which has to have the same bits with graphs as without."""
    options = {"num_inference_steps": 3, "output_type": "latent", "return_dict": False, **options}
    answers = []
    for enabled in (False, True):
        if enabled:
            pipeline.enable_cuda_graph()
        for model in pipeline.components.values() if not enabled else ():
            if isinstance(model, torch.nn.Module):
                model._compiled_call_impl = None  # and the graphs stay
        answers.append(pipeline(*args, generator=torch.Generator().manual_seed(7), **options)[0])
    assert torch.equal(*answers)
    return answers[1]


def text_to_image(parts: dict[str, Any], device: str) -> None:
    pipeline = quiet(difusores.StableDiffusionPipeline(**parts), device)
    images = [both(pipeline, prompt) for prompt in ("a cat", "a dog", "a cat")]
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    both(pipeline, "a dog", guidance_scale=3.0)
    both(pipeline, "a dog", guidance_rescale=0.5)
    both(pipeline, "a dog", guidance_interval=(0.4, 1.0))
    both(pipeline, "a dog", callback_on_step_end=lambda p, i, t, given: {"latents": given["latents"] / 2})
    both(pipeline, "a dog", height=24)


@CUDA
def test_text_to_image_on_a_gpu(parts: dict[str, Any]) -> None:
    text_to_image(parts, "cuda")


@CUDA
def test_accelerated_text_to_image_on_a_gpu(parts: dict[str, Any]) -> None:
    difusores.accelerate(parts["unet"].cuda())
    text_to_image(parts, "cuda")


@CUDA
def test_half_precision_on_a_gpu(parts: dict[str, Any]) -> None:
    parts["unet"].half()
    text_to_image(parts, "cuda")


@CUDA
def test_accelerated_diffusers_on_a_gpu() -> None:
    unet = pytest.importorskip("diffusers").UNet2DConditionModel(**SMALL).eval().cuda()
    plain = [by_diffusers(unet, seed).sample for seed in range(3)]
    difusores.accelerate(unet)
    want = [by_diffusers(unet, seed).sample for seed in range(3)]
    difusores.enable_cuda_graph(unet)
    for _ in range(2):
        assert all(torch.equal(by_diffusers(unet, seed).sample, want[seed]) for seed in range(3))
    difusores.restore(unet)
    assert all(torch.equal(by_diffusers(unet, seed).sample, plain[seed]) for seed in range(3))


def test_a_new_prompt_needs_no_new_graph(parts: dict[str, Any], captures: Callable[[], int]) -> None:
    text_to_image(parts, "cpu")
    # the whole batch, the conditional half alone in the interval, and another height
    assert captures() == 3


def test_adapters_and_weights(parts: dict[str, Any], captures: Callable[[], int]) -> None:
    pipeline = quiet(difusores.StableDiffusionPipeline(**parts))
    plain = both(pipeline, "a cat")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    adapters = make_adapters(pipeline.unet)
    adapters.load("one", {layer: LowRank(torch.randn(2, 16), torch.randn(8, 2), 1.0)})
    changed = both(pipeline, "a cat")
    weaker = both(pipeline, "a cat", cross_attention_kwargs={"scale": 0.5})
    assert captures() == 3 and not torch.equal(plain, changed) and not torch.equal(weaker, changed)
    adapters.fuse(1.0)
    fused = both(pipeline, "a cat")
    adapters.unfuse()
    assert torch.equal(both(pipeline, "a cat"), changed)
    adapters.enabled = False
    assert torch.equal(both(pipeline, "a cat"), plain) and not torch.equal(fused, plain)
    assert captures() == 3  # fused or disabled, the graph is that of the model without adapters
    pipeline.unet.double().float()  # its memory is another one
    assert torch.equal(both(pipeline, "a cat"), plain) and captures() == 4
    pipeline.disable_cuda_graph()
    both(pipeline, "a cat")
    assert captures() == 5


def test_other_pipelines(
    parts: dict[str, Any], xl_parts: dict[str, Any], captures: Callable[[], int]
) -> None:
    xl = quiet(difusores.StableDiffusionXLPipeline(**xl_parts))
    assert not torch.equal(both(xl, "a cat"), both(xl, "a dog")) and captures() == 1
    unet = parts["unet"]
    config = {k: v for k, v in unet.config.items() if k in ("block_out_channels", "down_block_types")}
    named = {"cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1}
    controlnet = difusores.ControlNetModel(
        **config, **named, conditioning_embedding_out_channels=(8, 8)
    ).eval()
    for parameter in controlnet.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)  # some are 0 before training
    control = quiet(difusores.StableDiffusionControlNetPipeline(**parts, controlnet=controlnet))
    images = [both(control, "a cat", torch.full((1, 3, 16, 16), level)) for level in (0.1, 0.9)]
    assert not torch.equal(*images) and captures() == 3
    unet = difusores.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        num_class_embeds=3,
    ).eval()
    ddim = quiet(difusores.DDIMPipeline(unet, difusores.DDIMScheduler()))
    images = [both(ddim, class_labels=[label], guidance_scale=2.0) for label in (0, 1)]
    assert not torch.equal(*images) and captures() == 4
    by_diffusers = pytest.importorskip("diffusers").DDIMScheduler()
    both(quiet(difusores.DDPMPipeline(unet, by_diffusers)), class_labels=[1])
    assert captures() == 5


SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


def by_diffusers(unet: Any, seed: int, **options: Any) -> Any:
    """A call of diffusers' UNet."""
    source = torch.Generator().manual_seed(seed)
    x, text = (torch.randn(shape, generator=source).to(unet.device) for shape in ((2, 4, 8, 8), (2, 5, 16)))
    with torch.no_grad():
        return unet(x, torch.tensor(seed), encoder_hidden_states=text, **options)


def test_a_model_of_diffusers(captures: Callable[[], int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(**SMALL).eval()
    want = [by_diffusers(unet, seed).sample for seed in range(3)]
    difusores.enable_cuda_graph(unet)
    difusores.enable_cuda_graph(unet)
    for seed in range(3):
        given = by_diffusers(unet, seed)
        assert type(given).__name__ == "UNet2DConditionOutput" and torch.equal(given.sample, want[seed])
    assert captures() == 1
    assert torch.equal(by_diffusers(unet, 1, return_dict=False)[0], want[1]) and captures() == 2
    alone = copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))
    assert all(torch.equal(by_diffusers(other, 2).sample, want[2]) for other in alone) and captures() == 2
    unet(want[0], 1, encoder_hidden_states=torch.zeros(2, 5, 16)).sample.sum().backward()
    assert unet.conv_in.weight.grad is not None and captures() == 2
    unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    assert torch.allclose(by_diffusers(unet, 1).sample, want[1], atol=1e-5) and captures() == 3
    difusores.disable_cuda_graph(unet)
    by_diffusers(unet, 1)
    assert captures() == 3 and not graphs.graphs_of(unet).graphs
    assert unet._compiled_call_impl is None


def test_a_pipeline_of_diffusers(parts: dict[str, Any], captures: Callable[[], int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    parts["unet"] = diffusers.UNet2DConditionModel(**SMALL).eval()
    parts["scheduler"] = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    pipeline = diffusers.StableDiffusionPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)

    def images() -> list[Tensor]:
        given = {"num_inference_steps": 3, "output_type": "latent", "height": 64, "width": 64}
        return [
            pipeline(prompt, generator=torch.Generator().manual_seed(1), **given).images
            for prompt in ("a cat", "a dog")
        ]

    want = images()
    difusores.enable_cuda_graph(pipeline)
    for _ in range(2):
        assert all(map(torch.equal, images(), want))
    assert captures() == 1
    with pytest.raises(TypeError, match="unet, controlnet, transformer is needed, got dict"):
        difusores.enable_cuda_graph(parts)


def test_on_a_cpu_it_is_refused(parts: dict[str, Any]) -> None:
    pipeline = quiet(difusores.StableDiffusionPipeline(**parts))
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, not on cpu"):
        pipeline.enable_cuda_graph()
