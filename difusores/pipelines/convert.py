"""`python -m difusores convert`: other people's files of weights -> folders that `from_pretrained` reads."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from difusores.models.adm import ADMClassifier, ADMUNet
from difusores.models.modeling import ModelMixin, assign
from difusores.pipelines.adm import ADMPipeline
from difusores.pipelines.terrain import read_terrain
from difusores.schedulers import CMStochasticIterativeScheduler, DDIMScheduler, DDPMScheduler

DIFFUSION = {
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "predict_xstart": False,
    "rescale_timesteps": False,
}
"""guided-diffusion's options of the process, and its defaults."""
OF_TRAINING = ("use_fp16", "use_checkpoint", "use_kl", "rescale_learned_sigmas", "classifier_use_fp16")
"""Its options that concern training, or the dtype that `from_pretrained` takes: they are left out."""
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each kind of file."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="kind")
    text = "a checkpoint of guided-diffusion (.pt), with or without its classifier"
    adm = kinds.add_parser("adm", help=text, description=text)
    adm.add_argument("file", help="the UNet's weights")
    adm.add_argument("out", help="folder to write, a pipeline")
    text = "JSON file of guided-diffusion's options, by its names; what is left out has its defaults"
    adm.add_argument("--config", required=True, help=text)
    adm.add_argument("--classifier", help="the classifier's weights (.pt)")
    adm.add_argument("--classifier-config", help="JSON file of the classifier's options")
    text = "the height-map model that `fetch terrain` brings"
    terrain = kinds.add_parser("terrain", help=text, description=text)
    terrain.add_argument("file", help="the wheel, or the .onnx file in it")
    terrain.add_argument("out", help="folder to write, a pipeline")


def run_convert(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    if args.kind == "adm":
        if (args.classifier is None) != (args.classifier_config is None):
            raise ValueError("--classifier and --classifier-config belong together")
        classifier = None
        if args.classifier is not None:
            classifier = (args.classifier, _read_config(args.classifier_config))
        pipeline = convert_adm(args.file, _read_config(args.config), classifier)
    else:
        pipeline = convert_terrain(args.file)
    pipeline.save_pretrained(args.out)
    if args.kind == "terrain":
        _copy_licences(args.file, Path(args.out))
    print(f"{args.out}: {pipeline.unet.num_parameters():,} parameters in an {type(pipeline.unet).__name__}")
    return 0


def convert_adm(
    file: str | os.PathLike[str],
    config: Mapping[str, Any],
    classifier: tuple[str | os.PathLike[str], Mapping[str, Any]] | None = None,
) -> ADMPipeline:
    """A pipeline of an original checkpoint, in float32.

    Args:
        file: a .pt file of guided-diffusion, read with `weights_only=True`.
        config: its options by their names in `model_and_diffusion_defaults`, and for upsamplers `large_size`
            and `small_size`. `timestep_respacing` is "" or a number, for ancestral sampling, or "ddim" and a
            number; the number itself is `num_inference_steps` of the pipeline.
        classifier: the same of a classifier, by the names in `classifier_defaults`.

    Raises:
        OSError: a file cannot be read.
        ValueError: an option is not known or not supported, or weights do not fit; all missing, unexpected
            and misshaped ones are named.
    """
    options = {**config}
    if "large_size" in options:
        if "image_size" in options:
            raise ValueError("large_size and image_size are one option: large_size is that of upsamplers")
        options["image_size"] = options.pop("large_size")
    process = {name: options.pop(name, default) for name, default in DIFFUSION.items()}
    unet = _load(ADMUNet, file, options)
    scheduler = _scheduler(process, bool(options.get("learn_sigma", False)))
    guide = None
    if classifier is not None:
        options = {name: value for name, value in classifier[1].items() if name not in DIFFUSION}
        guide = _load(ADMClassifier, classifier[0], options)
    return ADMPipeline(unet, scheduler, guide)


def convert_terrain(file: str | os.PathLike[str]) -> ADMPipeline:
    """A pipeline of the height-map model, in float32; see `difusores.pipelines.terrain`.

    Raises:
        ImportError: onnx, which reads the file, is missing.
        OSError: the file cannot be read.
        ValueError: it is not that model; all missing, unexpected and misshaped weights are named.
    """
    config, tensors = read_terrain(file)
    unet = _fill(ADMUNet, config, tensors, os.fspath(file))
    return ADMPipeline(unet, CMStochasticIterativeScheduler())


def _fill(kind: type[ModelMixin], config: Mapping[str, Any], tensors: dict[str, Any], path: str) -> Any:
    with torch.device("meta"):
        model = kind(**config)
    assign(model, tensors, torch.float32, path)
    return model.eval()


def _load(kind: type[ModelMixin], file: str | os.PathLike[str], config: Mapping[str, Any]) -> Any:
    known = [*list(inspect.signature(kind.__init__).parameters)[1:], *OF_TRAINING]
    unknown = sorted(config.keys() - set(known))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: no options of {kind.__name__}; allowed are {', '.join(known)}"
        )
    path = os.fspath(file)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no file of tensors alone: {error}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(value, torch.Tensor) for value in tensors.values()
    ):
        raise ValueError(f"{path} does not hold a dictionary of tensors, as guided-diffusion writes it")
    return _fill(kind, {name: config[name] for name in config if name not in OF_TRAINING}, tensors, path)


def _scheduler(process: Mapping[str, Any], learn_sigma: bool) -> DDPMScheduler | DDIMScheduler:
    steps, schedule = process["diffusion_steps"], process["noise_schedule"]
    if schedule not in SCHEDULES:
        raise ValueError(f"noise_schedule is {schedule!r}; allowed are {', '.join(SCHEDULES)}")
    if process["rescale_timesteps"] and steps != 1000:
        raise ValueError(f"rescale_timesteps is not supported with diffusion_steps {steps}, but with 1000")
    respacing = str(process["timestep_respacing"])
    ddim = respacing.startswith("ddim")
    number = respacing.removeprefix("ddim")
    if number and not number.isdigit():
        raise ValueError(
            f'timestep_respacing is {respacing!r}; allowed are "", a number, and "ddim" with a number'
        )
    options: dict[str, Any] = {
        "num_train_timesteps": steps,
        # the betas of 1000 steps, stretched or compressed
        "beta_start": 0.0001 * 1000 / steps,
        "beta_end": 0.02 * 1000 / steps,
        "beta_schedule": SCHEDULES[schedule],
        "prediction_type": "sample" if process["predict_xstart"] else "epsilon",
    }
    if ddim:
        return DDIMScheduler(**options)
    variance = "learned_range" if learn_sigma else "fixed_large"
    return DDPMScheduler(**options, variance_type=variance, timestep_spacing="linspace")


def _read_config(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; needed is an object of options")
    left_out = sorted(config.keys() & set(OF_TRAINING))
    if left_out:
        print(f"{path}: left out {', '.join(left_out)}, of training or of the dtype")
    return config


def _copy_licences(file: str, folder: Path) -> None:
    """Of a wheel: its licences, beside the weights that they allow to be passed on."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as wheel:
        for name in wheel.namelist():
            if "/licenses/" in name and not name.endswith("/"):
                (folder / os.path.basename(name)).write_bytes(wheel.read(name))
