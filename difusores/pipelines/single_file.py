"""Pipelines from one file of the original layout: which Stable Diffusion it is, and its components."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from difusores.files import find_file
from difusores.models.autoencoder import AutoencoderKL
from difusores.models.modeling import drop_idle, resolve_dtype, take_compatible
from difusores.models.original_layout import SMALL_SAMPLE, UNET, VAE
from difusores.models.single_file import UNUSED, Checkpoint, read_checkpoint
from difusores.models.unet_2d_condition import UNet2DConditionModel
from difusores.pipelines.clip_layout import read_text_encoder
from difusores.pipelines.lora import LoraPipeline
from difusores.pipelines.pipeline import load_component
from difusores.schedulers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="SingleFilePipeline")

TEXT_ENCODERS = {
    "1.x": {"text_encoder": "cond_stage_model.transformer."},
    "2.x": {"text_encoder": "cond_stage_model.model."},
    "XL": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "XL refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
"""Family -> text encoder -> what the names of its tensors begin with: ".model." is OpenCLIP's layout."""

EDITING, INPAINTING = 8, 9
USES = {4: "text to image", EDITING: "editing", INPAINTING: "inpainting"}
"""Input channels of the UNet -> what it was made for."""

OF_TRAINING = ("model_ema.", "denoiser.")
REFINER = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
"""Options of pipelines that the refiner's published folder has."""

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BASE_STEPS = 875_000
"""`global_step` of Stable Diffusion 2.0 base, the one 2.x file that tells that it predicts the noise."""

TOKENS = 77
TOKENIZER = "openai/clip-vit-large-patch14"
"""The vocabulary of all families, on the Hub. With OpenCLIP, short texts are filled up with "!"."""


@dataclass(frozen=True)
class Kind:
    """What a checkpoint is.

    Attributes:
        family: one of `TEXT_ENCODERS`.
        channels: input channels of the UNet.
    """

    family: str
    channels: int

    def __str__(self) -> str:
        use = USES.get(self.channels, "another use")
        return f"Stable Diffusion {self.family} with {self.channels} input channels ({use})"


def find_kind(checkpoint: Checkpoint) -> Kind:
    """By the names of text encoders and the shape of the first convolution.

    Raises:
        ValueError: it is no Stable Diffusion; the message says what was found.
    """
    prefix, tensors = checkpoint.part(UNET.prefixes, UNET.mark)
    if UNET.mark not in tensors:
        raise ValueError(f"{checkpoint.path} has no {prefix}{UNET.mark}. It has {checkpoint.contents()}")
    return Kind(checkpoint.family(), tensors[UNET.mark].shape[1])


def make_scheduler(kind: Kind, prediction_type: str) -> Any:
    """As in the published folder that diffusers reads for a kind: that of 1.5, of its inpainting or of
    InstructPix2Pix; for all of 2.x that of 2.1, though its base's has PNDM; for all of XL that of XL base.
    """
    options = {**BETAS, "steps_offset": 1, "prediction_type": prediction_type}
    if kind.channels == EDITING:
        return EulerAncestralDiscreteScheduler(**options)
    if kind.family.startswith("XL"):
        return EulerDiscreteScheduler(**options, timestep_spacing="leading")
    if kind.family == "1.x" and kind.channels != INPAINTING:
        return PNDMScheduler(**options, skip_prk_steps=True, set_alpha_to_one=False)
    return DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False)


class _Source:
    """A checkpoint, and perhaps a folder of configurations, as components of a pipeline.

    Args:
        index: of the folder's model_index.json; empty without a folder.
        prediction_type: what is known of it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kind: Kind,
        config: str | os.PathLike[str] | None,
        index: dict[str, Any],
        prediction_type: str | None,
        dtype: torch.dtype | None,
        hub: dict[str, Any],
    ) -> None:
        self.checkpoint, self.kind, self.dtype, self.hub = checkpoint, kind, dtype, hub
        self.config, self.index = None if config is None else os.fspath(config), index
        self.prediction_type = prediction_type

    def scheduler(self) -> Any:
        """The folder's, or as in the published one."""
        if "scheduler" not in self.index:
            return make_scheduler(self.kind, self.prediction_type or self._usual_prediction())
        assert self.config is not None
        stored = load_component(self.config, "scheduler", self.index["scheduler"], {}, self.hub)
        if self.prediction_type is None:
            return stored
        return type(stored).from_config(stored.config, prediction_type=self.prediction_type)

    def _usual_prediction(self) -> str:
        kind, checkpoint = self.kind, self.checkpoint
        if kind.family != "2.x" or kind.channels != 4 or checkpoint.global_step == BASE_STEPS:
            return "epsilon"
        logger.warning(
            "%s is Stable Diffusion 2.x, whose tensors do not tell what it predicts. It is taken to be the "
            "one for 768 pixels, which predicts v; prediction_type='epsilon' says that it is 2.x base.",
            checkpoint.path,
        )
        return "v_prediction"

    def unet(self, extract_ema: bool) -> Any:
        """Of the configuration in the folder, or that which shapes tell."""
        options: dict[str, Any] = {}
        base = self.prediction_type == "epsilon" or self.checkpoint.global_step == BASE_STEPS
        if self.kind.family == "2.x" and base and self.config is None:
            options["sample_size"] = SMALL_SAMPLE
        config = self._stored(UNet2DConditionModel, "unet")
        return UNet2DConditionModel.from_checkpoint(
            self.checkpoint, config, self.dtype, extract_ema, **options
        )

    def vae(self) -> Any:
        """Likewise."""
        return AutoencoderKL.from_checkpoint(self.checkpoint, self._stored(AutoencoderKL, "vae"), self.dtype)

    def text_encoder(self, name: str) -> Any:
        """Likewise; None where the family has none of the name."""
        prefix = TEXT_ENCODERS[self.kind.family].get(name)
        if prefix is None:
            return None
        config = None
        if self.config is not None and name in self.index:
            from transformers import CLIPTextConfig

            config = CLIPTextConfig.from_pretrained(self.config, subfolder=name, **self.hub)
        projects = name == "text_encoder_2"
        return read_text_encoder(self.checkpoint, prefix, projects, config, self.dtype)

    def tokenizer(self, name: str) -> Any:
        """The folder's, or the Hub's; None where the family has no text encoder for it."""
        prefix = TEXT_ENCODERS[self.kind.family].get(name.replace("tokenizer", "text_encoder"))
        if prefix is None:
            return None
        if name in self.index:
            assert self.config is not None
            return load_component(self.config, name, self.index[name], {}, self.hub)
        from transformers import CLIPTokenizer

        padding = {"pad_token": "!"} if prefix.endswith(".model.") else {}
        try:
            files = [find_file(TOKENIZER, file, **self.hub) for file in ("vocab.json", "merges.txt")]
        except OSError as error:
            raise OSError(
                f"{self.checkpoint.path} holds no tokenizer, as no such file does: give {name}= one of "
                f"transformers, or config= a pipeline's folder with one. {TOKENIZER} could not be read from "
                f"the Hub either: {error}"
            ) from error
        return CLIPTokenizer(*files, model_max_length=TOKENS, **padding)

    def other(self, name: str) -> dict[str, Any]:
        """{name: what it is} of the folder or the family, {} where that is not known."""
        entry = self.index.get(name)
        if name == "feature_extractor":
            if entry is None or entry[1] is None:
                return {name: None}
            assert self.config is not None
            return {name: load_component(self.config, name, entry, {}, self.hub)}
        if name in ("safety_checker", "image_encoder"):
            return {name: None}
        if name in self.index and not isinstance(entry, (list, tuple)):
            return {name: entry}
        known = self.kind.family == "XL refiner" and name in REFINER
        return {name: REFINER[name]} if known else {}

    def _stored(self, kind: Any, name: str) -> Any:
        if self.config is None or name not in self.index:
            return None
        return kind.load_config(self.config, subfolder=name, **self.hub)

    def left_over(self) -> list[str]:
        """Tensors that are in none of the parts; tables of training have one word."""
        parts = (*UNET.prefixes, *VAE.prefixes, *TEXT_ENCODERS[self.kind.family].values(), *OF_TRAINING)
        names = self.checkpoint.tensors
        if not any(name.startswith(UNET.prefixes) for name in names):
            return []
        return sorted(n for n in names if "." in n and not n.startswith(parts) and not UNUSED.search(n))


class SingleFilePipeline(LoraPipeline):
    """Base of Stable Diffusion's pipelines: they are read from one file, too.

    Class attributes:
        single_file_families: of `TEXT_ENCODERS`, those that the pipeline is for.
        single_file_channels: numbers of input channels of the UNet that it takes.
    """

    single_file_families: ClassVar[tuple[str, ...]] = ("1.x", "2.x")
    single_file_channels: ClassVar[tuple[int, ...]] = (4,)

    @classmethod
    def from_single_file(
        cls: type[Self],
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        prediction_type: str | None = None,
        extract_ema: bool = False,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        low_cpu_mem_usage: bool = True,
        disable_mmap: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> Self:
        """Read a pipeline from a checkpoint of the original layout of Stable Diffusion 1.x, 2.x or XL.

        Which it is, and the configuration of its networks, is found from names and shapes. The file holds no
        tokenizer: it comes from `options` or `config`, else from the Hub.

        Args:
            pretrained_model_link_or_path: see `read_checkpoint`.
            config: a pipeline's folder, or a Hub id, whose configurations are taken in place of what shapes
                tell, and whose scheduler, tokenizers and feature extractor are. Its weights are not read.
            prediction_type: "epsilon", "v_prediction" or "sample"; None for that of `config`'s scheduler,
                else "v_prediction" in Stable Diffusion 2.x (a log entry says so) and "epsilon" in others.
            extract_ema: take the averaged weights of the UNet in a training checkpoint.
            torch_dtype, dtype: of all models, under either name; None for float32.
            low_cpu_mem_usage, disable_mmap: taken for compatibility.
            cache_dir, force_download, local_files_only, revision, token: of a link or a Hub id.
            options: components in place of those of the file or folder, and other arguments of the
                constructor; and `device_map`, a device. There is no safety checker but the one given here.

        Raises:
            OSError: there is no such file or folder, or there is no tokenizer to be had.
            TypeError: an option that is not one of these.
            ValueError: the file is none of these, or one for another pipeline: the message says what was
                found. Or weights do not fit; all missing, unexpected and misshaped ones are named as the file
                names them.
        """
        dtype = resolve_dtype(torch_dtype, dtype)
        device = take_compatible(options)
        parameters = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])
        drop_idle(cls.__name__, options, parameters)
        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        checkpoint = read_checkpoint(pretrained_model_link_or_path, {**hub, "revision": revision})
        kind = find_kind(checkpoint)
        if kind.family not in cls.single_file_families or kind.channels not in cls.single_file_channels:
            raise ValueError(
                f"{checkpoint.path} is {kind}; {cls.__name__} is for Stable Diffusion "
                f"{' and '.join(cls.single_file_families)} with "
                f"{' or '.join(map(str, cls.single_file_channels))} input channels"
            )
        index = {} if config is None else cls.load_config(config, **hub)
        if prediction_type is None and "scheduler" in options:
            prediction_type = options["scheduler"].config.get("prediction_type")
        source = _Source(checkpoint, kind, config, index, prediction_type, dtype, hub)
        parts = {**_components(source, [n for n in parameters if n not in options], extract_ema), **options}
        empty = inspect.Parameter.empty
        lacking = [name for name in parameters if name not in parts and parameters[name].default is empty]
        if lacking:
            raise ValueError(f"{checkpoint.path} has no {' and '.join(lacking)}: give {lacking[0]}=")
        if left := source.left_over():
            warnings.warn(
                f"{checkpoint.path} has what {kind.family} has not: {', '.join(left)}", stacklevel=2
            )
        pipeline: Self = cls(**parts)
        pipeline._trained_with = None if "scheduler" in options else parts["scheduler"]
        return pipeline if device is None else pipeline.to(device)


def _components(source: _Source, names: list[str], extract_ema: bool) -> dict[str, Any]:
    """Those of the names that the file, the folder or the family tells."""
    parts: dict[str, Any] = {}
    for name in names:
        if name == "unet":
            parts[name] = source.unet(extract_ema)
        elif name == "vae":
            parts[name] = source.vae()
        elif name == "scheduler":
            parts[name] = source.scheduler()
        elif name.startswith("text_encoder"):
            parts[name] = source.text_encoder(name)
        elif name.startswith("tokenizer"):
            parts[name] = source.tokenizer(name)
        else:
            parts |= source.other(name)
    return parts
