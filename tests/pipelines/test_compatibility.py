"""What scripts for diffusers ask of pipelines beside sampling; tests/test_examples.py compares such lines."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import difusores
from difusores import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, callbacks
from difusores.pipelines.memory import Offload
from difusores.pipelines.prompts import tokenize
from difusores.pipelines.textual_inversion import spelt_out
from difusores.utils import logging
from difusores.utils.torch_utils import randn_tensor

pytest.importorskip("transformers")


@pytest.fixture
def pipeline(parts: dict[str, Any]) -> StableDiffusionPipeline:
    made = StableDiffusionPipeline(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def sample(pipeline: Any, steps: int = 3, **options: Any) -> Tensor:
    given = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), **options}
    images: Tensor = pipeline("a cat", output_type="pt", **given).images
    return images


@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_callbacks_see_the_scheduler_of_their_run(pipeline: Any, name: str) -> None:
    """In each thread its own, and the images of runs one after the other."""
    own = pipeline.scheduler = getattr(difusores, name).from_config(pipeline.scheduler.config)
    before = own.num_inference_steps
    expected = {steps: sample(pipeline, steps) for steps in (2, 3, 5)}

    def run(steps: int) -> tuple[Tensor, list[Any]]:
        seen = []

        def look(pipe: Any, index: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            scheduler = pipe.scheduler
            assert float(scheduler.timesteps[index]) == float(time)
            seen.append((scheduler.num_inference_steps, getattr(scheduler, "step_index", index + 1) - index))
            return {}

        return sample(pipeline, steps, callback_on_step_end=look), seen

    with ThreadPoolExecutor(3) as pool:
        for steps, (image, seen) in zip((2, 3, 5) * 2, pool.map(run, (2, 3, 5) * 2), strict=True):
            assert torch.equal(image, expected[steps])
            assert set(seen) == {(steps, 1)} and len(seen) == (2 * steps - 1 if "Heun" in name else steps)
    assert pipeline.scheduler is own and own.num_inference_steps == before


def test_a_failed_run_leaves_nothing_behind(pipeline: Any) -> None:
    def fail(*args: Any) -> Any:
        raise KeyError("mine")

    own = pipeline.scheduler
    with pytest.raises(KeyError, match="mine"):
        sample(pipeline, callback_on_step_end=fail)
    assert pipeline.scheduler is own and pipeline.components["scheduler"] is own


def test_old_callbacks(pipeline: Any) -> None:
    calls: list[tuple[str, int]] = []

    def new(pipe: Any, index: int, time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(("new", index))
        return {"latents": 0 * tensors["latents"]}

    def old(index: int, time: Tensor, latents: Tensor) -> None:
        assert not latents.any()
        calls.append(("old", index))

    with pytest.warns(FutureWarning, match="callback_on_step_end"):
        sample(pipeline, 3, callback=old, callback_steps=2, callback_on_step_end=new)
    assert calls == [("new", 0), ("old", 0), ("new", 1), ("new", 2), ("old", 2)]
    for bad in (0, 1.5):
        with pytest.warns(FutureWarning), pytest.raises(ValueError, match=f"callback_steps is {bad}"):
            sample(pipeline, callback=old, callback_steps=bad)


def test_from_pipe(pipeline: Any) -> None:
    image = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    assert all(image.components[name] is part for name, part in pipeline.components.items())
    other = difusores.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    assert StableDiffusionPipeline.from_pipe(image, scheduler=other).scheduler is other
    with pytest.raises(ValueError, match=r"needs text_encoder_2, tokenizer_2.* StableDiffusionPipeline"):
        difusores.StableDiffusionXLPipeline.from_pipe(pipeline)
    with pytest.raises(TypeError, match="and no uent"):
        StableDiffusionImg2ImgPipeline.from_pipe(pipeline, uent=pipeline.unet)
    encoder = copy.deepcopy(pipeline.text_encoder)  # the fixture's own serves all tests
    cast = StableDiffusionImg2ImgPipeline.from_pipe(pipeline, text_encoder=encoder, dtype=torch.bfloat16)
    assert cast.dtype is torch.bfloat16 and encoder.dtype is torch.bfloat16


def test_pipelines_of_a_task(pipeline: Any, tmp_path: Path) -> None:
    controlnet = difusores.ControlNetModel.from_unet(pipeline.unet)
    controlled = difusores.AutoPipelineForText2Image.from_pipe(pipeline, controlnet=controlnet)
    assert type(controlled) is difusores.StableDiffusionControlNetPipeline
    plain = difusores.AutoPipelineForText2Image.from_pipe(controlled, controlnet=None)
    assert type(plain) is StableDiffusionPipeline
    with pytest.raises(ValueError, match=r"AutoPipelineForInpainting knows no pipeline .* and a controlnet"):
        difusores.AutoPipelineForInpainting.from_pipe(controlled)
    with pytest.raises(OSError, match="there are no objects of AutoPipelineForText2Image"):
        difusores.AutoPipelineForText2Image()
    with pytest.raises(ValueError, match="knows no pipeline for the models of a DDPMPipeline"):
        difusores.AutoPipelineForText2Image.from_pretrained("bundled:digits")


def test_models_take_turns(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which here is a name: who is brought and who is sent back, and the image is the same."""
    expected = sample(pipeline)
    moves: list[tuple[str, str]] = []
    names = {part: name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    for part, name in names.items():
        monkeypatch.setattr(part, "to", lambda device, name=name: moves.append((name, str(device))))
    groups = [[pipeline.unet], [pipeline.text_encoder], [pipeline.vae]]
    pipeline._offload = Offload(groups, torch.device("cpu", 0))
    moves.clear()
    assert torch.equal(sample(pipeline), expected) and pipeline.device == torch.device("cpu", 0)
    order = ["text_encoder", "unet", "vae"]
    brought = [("text_encoder", "cpu:0"), ("unet", "cpu:0"), ("vae", "cpu:0")]
    assert [move for move in moves if move[1] == "cpu:0"] == brought
    assert [name for name, device in moves if device == "cpu"] == order[:2]
    with pytest.raises(ValueError, match=r"remove_all_hooks\(\) first"):
        pipeline.to("cpu")
    pipeline.remove_all_hooks()
    assert moves[-1] == ("vae", "cpu")
    moves.clear()
    sample(pipeline)
    assert not moves


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
def test_models_take_turns_on_a_gpu(pipeline: Any) -> None:
    expected = sample(pipeline)
    pipeline.enable_model_cpu_offload()
    assert (sample(pipeline).cpu() - expected).abs().max() < 2e-3
    assert pipeline.vae.device.type == "cuda" and pipeline.unet.device.type == "cpu"
    with pytest.raises(NotImplementedError, match="enable_model_cpu_offload"):
        pipeline.enable_sequential_cpu_offload()


def test_what_a_cpu_needs_not(pipeline: Any) -> None:
    expected = sample(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    pipeline.enable_sequential_cpu_offload(device="cpu")
    pipeline.enable_attention_slicing("max")
    pipeline.unet.set_attention_slice(1)
    pipeline.enable_xformers_memory_efficient_attention()
    pipeline.vae.enable_xformers_memory_efficient_attention(attention_op=None)
    pipeline.unet.set_attn_processor(dict(pipeline.unet.attn_processors))
    pipeline.unet.fuse_qkv_projections()
    pipeline.vae.unfuse_qkv_projections()
    assert torch.equal(sample(pipeline), expected)


def test_learned_words(pipeline: Any, parts: dict[str, Any], tokenizer_files: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    pipeline.tokenizer = CLIPTokenizer.from_pretrained(tokenizer_files, model_max_length=77)
    pipeline.text_encoder = copy.deepcopy(pipeline.text_encoder)
    known, before = len(pipeline.tokenizer), pipeline.encode_prompt("a cat", None, 1, False)[0]
    torch.save({"<cat>": torch.zeros(3, 16)}, tmp_path / "learned_embeds.bin")
    pipeline.load_textual_inversion(tmp_path)
    assert torch.equal(pipeline.encode_prompt("a cat", None, 1, False)[0], before)
    assert spelt_out(pipeline.tokenizer, "a <cat>, a cat") == "a <cat> <cat>_1 <cat>_2, a cat"
    ids, _ = tokenize(pipeline.tokenizer, ["a <cat>"])
    rows = pipeline.text_encoder.get_input_embeddings().weight
    assert len(rows) == len(pipeline.tokenizer) and not rows[ids[0, 2:5]].any() and rows[ids[0, 1]].any()
    pipeline.load_textual_inversion(torch.ones(2, 16), token=["<x>", "<y>"])
    pipeline.load_textual_inversion({"string_to_param": {"*": torch.ones(1, 16)}, "name": "<z>"})
    for given, options, message in (
        ({"<x>": torch.ones(16)}, {}, "a token '<x>' already"),
        (torch.ones(16), {}, "token is needed"),
        ({"<new>": torch.ones(15)}, {}, r"'<new>' has shape \[15\], and the text encoder's are 16 wide"),
        ({"<a>": torch.ones(16), "<b>": torch.ones(16)}, {}, "needed is one, or string_to_param"),
        ([{"<a>": torch.ones(16)}], {"token": ["<a>", "<b>"]}, "2 tokens for 1 embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.load_textual_inversion(given, **options)
    with pytest.raises(TypeError, match="takes no weight"):
        pipeline.load_textual_inversion(tmp_path, weight="learned_embeds.bin")
    assert "<new>" not in pipeline.tokenizer.get_vocab()
    kept = pipeline.text_encoder.get_input_embeddings().weight[-2:].clone()
    first = pipeline.encode_prompt("a <y> <z> cat", None, 1, False)[0]
    pipeline.unload_textual_inversion(["<cat>", "<x>"])
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert pipeline.tokenizer.get_added_vocab().keys() & {"<cat>", "<cat>_1", "<x>"} == set()
    assert len(table) == len(pipeline.tokenizer) == known + 2 and torch.equal(table[-2:], kept)
    assert torch.equal(pipeline.encode_prompt("a <y> <z> cat", None, 1, False)[0], first)
    with pytest.raises(ValueError, match=r"no added token '<x>'; it has <y>, <z>"):
        pipeline.unload_textual_inversion("<x>")
    pipeline.unload_textual_inversion()
    assert torch.equal(pipeline.encode_prompt("a cat", None, 1, False)[0], before)
    assert len(pipeline.tokenizer) == len(pipeline.text_encoder.get_input_embeddings().weight) == known
    with pytest.raises(ValueError, match="it has none"):
        pipeline.unload_textual_inversion()
    pipeline.load_textual_inversion(tmp_path)
    ids, _ = tokenize(pipeline.tokenizer, ["a <cat>"])
    assert not pipeline.text_encoder.get_input_embeddings().weight[ids[0, 2:5]].any()


def test_learned_words_of_a_tokenizer_in_python(pipeline: Any) -> None:
    """As transformers 4 has them for CLIP, and transformers 5 for a few others."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert not hasattr(tokenizer, "_tokenizer")
    known, encoder = len(tokenizer), copy.deepcopy(pipeline.text_encoder)
    encoder.resize_token_embeddings(known, mean_resizing=False)
    there = {"tokenizer": tokenizer, "text_encoder": encoder}
    for word, number in (("<a>", 1.0), ("<b>", 2.0), ("<c>", 3.0)):
        pipeline.load_textual_inversion({word: torch.full((2, 16), number)}, **there)
    before = tokenizer("x<b> <b>_1").input_ids
    pipeline.unload_textual_inversion("<a>", **there)
    ids = tokenizer("x<b> <b>_1").input_ids
    assert [i - 2 * (i >= known) for i in before] == ids and sum(i >= known for i in ids) == 2
    rows = encoder.get_input_embeddings().weight
    assert len(rows) == len(tokenizer) == known + 4 and (rows[[i for i in ids if i >= known]] == 2).all()
    assert len(tokenizer("<a>").input_ids) == 1 + len("<a>")
    pipeline.unload_textual_inversion(**there)
    assert len(encoder.get_input_embeddings().weight) == len(tokenizer) == known


@pytest.mark.parametrize("xl", [False, True])
def test_callbacks_that_are_objects(xl: bool, request: pytest.FixtureRequest) -> None:
    """Guidance ends at a step, for all images of a batch."""
    parts = request.getfixturevalue("xl_parts" if xl else "parts")
    kind = difusores.StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    pipeline, rows = kind(**parts), list[int]()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    cutoff = (callbacks.SDXLCFGCutoffCallback if xl else callbacks.SDCFGCutoffCallback)(0.5)

    class Counting(callbacks.PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline: Any, index: int, time: Any, tensors: dict[str, Any]) -> Any:
            self.seen = [*getattr(self, "seen", ()), (index, sorted(tensors))]
            return tensors

    counting = Counting(cutoff_step_ratio=None, cutoff_step_index=1)
    both = callbacks.MultiPipelineCallbacks([cutoff, counting])
    options = {"num_inference_steps": 4, "output_type": "pt"}
    prompts = ["a cat", "a dog"]

    def draw(prompts: Any, seeds: tuple[int, ...], **more: Any) -> Tensor:
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        images: Tensor = pipeline(prompts, generator=sources, **options, **more).images
        return images

    together = draw(prompts, (0, 1), callback_on_step_end=both)
    assert rows == [4, 4, 4, 2] and [index for index, _ in counting.seen] == [0, 1, 2, 3]
    assert counting.seen[0][1] == sorted((*cutoff.tensor_inputs, "latents"))
    alone = [draw(prompt, (i,), callback_on_step_end=cutoff) for i, prompt in enumerate(prompts)]
    assert (together - torch.cat(alone)).abs().max() < 1e-4
    assert (together - draw(prompts, (0, 1))).abs().max() > 1e-4
    with pytest.raises(ValueError, match="one of them has to be None"):
        callbacks.SDCFGCutoffCallback(cutoff_step_index=1)
    with pytest.raises(ValueError, match=r"is 1\.5; it is a share"):
        callbacks.SDCFGCutoffCallback(1.5)


def test_how_much_is_told(pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        assert logging.get_verbosity() == logging.get_logger().level == 40
        pipeline.set_progress_bar_config()
        logging.disable_progress_bar()
        list(pipeline.progress_bar([1, 2]))
        assert capsys.readouterr().err == "" and not logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    list(pipeline.progress_bar([1, 2]))
    assert "2/2" in capsys.readouterr().err


def test_noise_for_loops() -> None:
    found = randn_tensor((2, 3), torch.Generator().manual_seed(1), device="cpu", dtype=torch.float64)
    expected = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"layout is torch\.sparse_coo"):
        randn_tensor((2, 3), layout=torch.sparse_coo)


def test_models_of_the_class_that_their_folder_names(parts: dict[str, Any], tmp_path: Path) -> None:
    for name in ("unet", "text_encoder"):
        parts[name].save_pretrained(tmp_path / name)
        found = difusores.AutoModel.from_pretrained(tmp_path, subfolder=name, dtype=torch.float64)
        assert type(found) is type(parts[name]) and found.dtype is torch.float64
    for content, said in ("{}", "no class"), ('{"_class_name": "DDIMScheduler"}', "a DDIMScheduler"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"names {said}"):
            difusores.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"use AutoModel\.from_pretrained"):
        difusores.AutoModel()
