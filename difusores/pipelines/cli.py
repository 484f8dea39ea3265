"""`python -m difusores generate`: sample images from a model into one picture."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from difusores import __version__, native, schedulers
from difusores.models.single_file import read_checkpoint
from difusores.ops import use_backend
from difusores.ops.dispatch import wanted
from difusores.pipelines.images import write_grid
from difusores.pipelines.pipeline import DiffusionPipeline
from difusores.pipelines.single_file import find_kind
from difusores.pipelines.stable_diffusion import StableDiffusionPipeline
from difusores.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from difusores.pipelines.unconditional import DDIMPipeline, DDPMPipeline, UNetPipeline
from difusores.schedulers.base import COMPATIBLES

BATCH = 64  # images sampled at once
TEXT_BATCH = 4  # of models that are told a text, whose images are larger
GUIDANCE = 2.0  # of models with classes, where none is given
TEXT_GUIDANCE = {
    StableDiffusionPipeline: 7.5,
    StableDiffusionXLPipeline: 5.0,
}  # of models that are told a text
DTYPES = ("float32", "bfloat16", "float16")

TextPipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
Pipeline = DDPMPipeline | DDIMPipeline | TextPipeline


def _short_name(scheduler: str) -> str:
    """euler-ancestral for EulerAncestralDiscreteScheduler."""
    name = scheduler.removesuffix("Scheduler").replace("Discrete", "")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


# Those that read the configuration which a model's folder holds.
SCHEDULERS = {_short_name(name): name for name in COMPATIBLES if name in schedulers.__all__}


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `generate`."""
    add = parser.add_argument
    text = "pipeline folder, bundled:NAME, Hub id, or one file of Stable Diffusion (%(default)s)"
    add("--model", default="bundled:digits", help=text)
    add("--config", help="folder with the tokenizer and configurations for such a file")
    add("--out", default="images.png", help="picture to write, a PNG (%(default)s)")
    add("--num", type=int, default=16, help="number of images (%(default)s)")
    add(
        "--label",
        type=int,
        nargs="+",
        help="class label(s), taken in turn; all classes in turn if not given. The last label of every model "
        "is taken for the null label of guidance and cannot be asked for",
    )
    add("--prompt", nargs="+", help="text(s) for a model that is told one, taken in turn")
    add("--negative-prompt", help="text to lead away from, with --prompt")
    add("--height", type=int, help="of the images, with --prompt (the model's own)")
    add("--width", type=int, help="of the images, with --prompt (the model's own)")
    add(
        "--guidance",
        type=float,
        help=f"classifier-free guidance scale, 1 for none ({GUIDANCE}; with texts 7.5, of SDXL 5)",
    )
    add("--steps", type=int, default=25, help="calls of the model (%(default)s)")
    add("--scheduler", choices=tuple(SCHEDULERS), default="ddim", help="sampler (%(default)s)")
    add("--eta", type=float, default=0.0, help="noise of the ddim sampler, 0 to 1 (%(default)s)")
    add("--seed", type=int, default=0, help="of the first image; the next ones count up (%(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the model (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device (%(default)s)")
    add("--backend", help="use one implementation of the ops by name, see `doctor`")
    add("--json", action="store_true", help="print one line of JSON and no progress bar")


def run_generate(args: argparse.Namespace) -> int:
    """Sample and write the picture. Returns the exit status.

    Raises:
        ValueError, OSError: an option that does not fit, named.
    """
    _check(args)
    pipeline = _pipeline(args)
    texts = _texts(args) if isinstance(pipeline, TextPipeline) else None
    labels = None if texts is not None else _labels(args, pipeline.unet.config)
    if args.guidance is None and (labels or texts):
        args.guidance = TEXT_GUIDANCE.get(type(pipeline), GUIDANCE)
    batch = TEXT_BATCH if texts else BATCH
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with use_backend(args.backend) if args.backend else contextlib.nullcontext():
        start = time.perf_counter()
        parts = [range(first, min(first + batch, args.num)) for first in range(0, args.num, batch)]
        images = [_sample(pipeline, args, labels, texts, numbers) for numbers in parts]
        seconds = time.perf_counter() - start
    write_grid(np.concatenate(images), out)
    if args.json:
        print(json.dumps(_report(args, seconds), allow_nan=False))
    else:
        rate = args.num / seconds
        print(f"{out}: {args.num} images in {seconds:.2f} s, {rate:.2f} images/s, {args.steps} steps each")
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("num", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it has to be 1 or more")
    if not 0 <= args.eta <= 1:
        raise ValueError(f"--eta is {args.eta}; it has to be from 0 to 1")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise ValueError(f"--guidance is {args.guidance}; it has to be a finite number")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed is {args.seed}; it has to be from 0 to {2**63 - 1}")
    if args.eta and args.scheduler != "ddim":
        raise ValueError(f"--eta is an option of --scheduler ddim, not of {args.scheduler}")
    try:
        torch.empty(0, device=args.device).cpu()  # the device "meta" makes tensors but holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not available: {native.one_line(error)}") from error
    if not args.out.lower().endswith(".png"):
        raise ValueError(f"--out is {args.out!r}; it has to end in .png")
    if Path(args.out).is_dir():
        raise IsADirectoryError(f"--out is {args.out!r}, which is a folder")
    if not args.backend:
        wanted()  # refuses a DIFUSORES_BACKEND that cannot be honoured


def _pipeline(args: argparse.Namespace) -> Pipeline:
    try:
        dtype = getattr(torch, args.dtype)
        if Path(args.model).is_file():
            xl = find_kind(read_checkpoint(args.model, {})).family.startswith("XL")
            kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
            stored: DiffusionPipeline = kind.from_single_file(
                args.model, config=args.config, torch_dtype=dtype
            )
        else:
            _refuse(args, ("config",), "is no file that needs one")
            stored = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype)
    except SafetensorError as error:
        raise ValueError(f"the weights in {args.model!r} are damaged: {error}") from error
    if not isinstance(stored, UNetPipeline | TextPipeline):
        raise ValueError(
            f"{args.model!r} is a {type(stored).__name__}; generate needs one of unconditional images, a "
            "StableDiffusionPipeline or a StableDiffusionXLPipeline"
        )
    config, unet = stored.components["scheduler"].config, stored.unet
    pipeline: Pipeline
    scheduler = getattr(schedulers, SCHEDULERS[args.scheduler]).from_config(config)
    if isinstance(stored, TextPipeline):
        stored.scheduler, pipeline = scheduler, stored
    else:
        _refuse(args, ("prompt", "negative_prompt", "height", "width"), "is not told a text")
        pipeline = (DDIMPipeline if args.scheduler == "ddim" else DDPMPipeline)(unet, scheduler)
    pipeline.set_progress_bar_config(disable=args.json)
    return pipeline.to(args.device)


def _refuse(args: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is given, and {args.model!r} {reason}")


def _texts(args: argparse.Namespace) -> list[str]:
    """A text for each image."""
    _refuse(args, ("label",), "has no classes")
    if not args.prompt:
        raise ValueError(f"{args.model!r} is told a text: --prompt is needed")
    return [args.prompt[i % len(args.prompt)] for i in range(args.num)]


def _labels(args: argparse.Namespace, config: dict[str, Any]) -> list[int] | None:
    """A label for each image, or None for a model without classes."""
    classes = config.get("num_class_embeds")
    if classes is None:
        _refuse(args, ("label", "guidance"), "is not class-conditional")
        return None
    given = args.label or list(range(classes - 1))
    wrong = [label for label in given if not 0 <= label < classes - 1]
    if wrong:
        raise ValueError(f"--label is {wrong[0]}; the classes of {args.model!r} are 0 to {classes - 2}")
    return [given[i % len(given)] for i in range(args.num)]


def _sample(
    pipeline: Pipeline,
    args: argparse.Namespace,
    labels: list[int] | None,
    texts: list[str] | None,
    numbers: range,
) -> Any:
    """The images of these numbers, [N, H, W, C]. Each has its own generator: alone it comes out the same."""
    options: dict[str, Any] = {"eta": args.eta} if args.scheduler == "ddim" else {}
    if labels is not None:
        options |= {"class_labels": [labels[i] for i in numbers], "guidance_scale": args.guidance}
    if texts is None:
        options["batch_size"] = len(numbers)
    else:
        options |= {"prompt": [texts[i] for i in numbers], "guidance_scale": args.guidance}
        options |= {"height": args.height, "width": args.width}
        if args.negative_prompt is not None:
            options["negative_prompt"] = [args.negative_prompt] * len(numbers)
    images = pipeline(
        generator=[torch.Generator().manual_seed(args.seed + i) for i in numbers],
        num_inference_steps=args.steps,
        output_type="np",
        return_dict=False,
        **options,
    )[0]
    return images


def _report(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    names = (
        "model",
        "num",
        "label",
        "prompt",
        "negative_prompt",
        "guidance",
        "steps",
        "scheduler",
        "eta",
        "seed",
        "dtype",
        "device",
        "out",
    )
    return {
        **{name: getattr(args, name) for name in names},
        "backend": args.backend or "default",
        "seconds": seconds,
        "images_per_second": args.num / seconds,
        "threads": torch.get_num_threads(),
        "versions": {"difusores": __version__, "torch": torch.__version__},
    }
