"""Checkpoints in one file of the original layout of Stable Diffusion, and models that are read from them."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores.files import find_file
from difusores.models.modeling import (
    ModelMixin,
    assign,
    read_tensors,
    resolve_dtype,
    take_compatible,
)
from difusores.models.original_layout import UNET, Layout, file_names

FAMILIES = {
    "XL": "conditioner.embedders.1.model.",
    "XL refiner": "conditioner.embedders.0.model.",
    "2.x": "cond_stage_model.model.",
    "1.x": "cond_stage_model.transformer.",
}
"""Family of Stable Diffusion -> what the names of its (last) text encoder begin with; the first counts."""

UNUSED = re.compile(r"(^|\.)(position_ids|logit_scale|attn_mask)$|^(loss|model_ema)\.")
"""Names in a part that are no parameters of ours: constants, what training needs, averages."""

LINK = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:(?:blob|resolve)/([^/]+)/)?(.+)"
)

CONV_IN = "conv_in.weight"
"""A tensor that every UNet and ControlNet in diffusers' layout has."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file.

    Attributes:
        path: of the file, for messages.
        tensors: by their names in it.
        global_step: number of training steps that it tells; None if it does not.
    """

    path: str
    tensors: dict[str, Tensor]
    global_step: int | None = None

    def part(self, prefixes: tuple[str, ...], mark: str) -> tuple[str, dict[str, Tensor]]:
        """(prefix, the tensors behind it without it).

        The prefix is "" in a file with one part alone, of either layout.

        Raises:
            ValueError: there is no such part; what there is, is said.
        """
        prefix = next((p for p in prefixes if any(name.startswith(p) for name in self.tensors)), "")
        if not prefix and mark not in self.tensors and CONV_IN not in self.tensors:
            wanted = " or ".join(f"{p}*" for p in prefixes)
            raise ValueError(f"{self.path} has no {wanted}. It has {self.contents()}")
        size = len(prefix)
        return prefix, {name[size:]: t for name, t in self.tensors.items() if name.startswith(prefix)}

    def contents(self) -> str:
        """The first two words of all names, with their numbers."""
        counts = Counter(".".join(name.split(".")[:2]) for name in self.tensors)
        listed = [f"{name}.* ({n})" if n > 1 else name for name, n in counts.most_common(8)]
        more = len(counts) - len(listed)
        return ", ".join(listed) + (f" and {more} others" if more else "") or "no tensors"

    def family(self) -> str:
        """One of `FAMILIES`: by the text encoders, or by the UNet where there are none."""
        for family, prefix in FAMILIES.items():
            if any(name.startswith(prefix) for name in self.tensors):
                return family
        for prefix in (*UNET.prefixes, "control_model.", ""):
            inside = f"{prefix}middle_block.1."
            context = self.tensors.get(f"{inside}transformer_blocks.0.attn2.to_k.weight")
            if context is None:
                continue
            if f"{prefix}label_emb.0.0.weight" in self.tensors and context.shape[1] in (1280, 2048):
                return "XL" if context.shape[1] == 2048 else "XL refiner"
            projection = self.tensors.get(f"{inside}proj_in.weight")
            return "2.x" if projection is not None and projection.ndim == 2 else "1.x"
        return "1.x"


def read_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any], hub: Mapping[str, Any]) -> Checkpoint:
    """Read a file, all of it or (safetensors, zipped .ckpt) page by page when its tensors are used.

    Args:
        source: a .safetensors file; one of `torch.save`, read with `weights_only=True`; the link of one on
            the Hub; or tensors by name.
        hub: for a link, see `find_file`.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, or holds other things than tensors, numbers and texts.
    """
    if isinstance(source, Mapping):
        return _checkpoint("the given dictionary", dict(source))
    path = os.fspath(source)
    link = None if os.path.isfile(path) else LINK.fullmatch(path)
    if link is not None:
        repository, revision, name = link.groups()
        path = find_file(repository, name, **{**hub, **({"revision": revision} if revision else {})})
    if not os.path.isfile(path):
        raise OSError(f"there is no file {path!r}; needed is a file, or its link on huggingface.co")
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError

        try:
            return _checkpoint(path, dict(read_tensors([path])))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors alone, and other objects could run code; most checkpoints "
            f"exist as .safetensors too: {error}"
        ) from error
    return _checkpoint(path, stored)


def _checkpoint(path: str, stored: Any) -> Checkpoint:
    step = stored.get("global_step") if isinstance(stored, dict) else None
    while isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = stored["state_dict"]
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}; needed is a dictionary of tensors")
    tensors = {name: value for name, value in stored.items() if isinstance(value, Tensor)}
    return Checkpoint(path, tensors, step if isinstance(step, int) else None)


class SingleFileModel(ModelMixin):
    """A model that `from_single_file` reads too.

    Class attributes:
        original_layout: how it is stored in the original layout.
    """

    original_layout: ClassVar[Layout]

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Any],
        *,
        config: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        extract_ema: bool = False,
        low_cpu_mem_usage: bool = True,
        disable_mmap: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> Any:
        """Read a model out of a file in the original layout, in evaluation mode.

        Args:
            pretrained_model_link_or_path_or_dict: see `read_checkpoint`; a whole checkpoint, or this part.
            config: a folder, or a Hub id, whose config.json says the configuration; None for that which the
                shapes tell. They do not tell the number of attention heads, taken to be 8 in Stable Diffusion
                1.x and width / 64 in others, nor an autoencoder's `scaling_factor` in a file of its own,
                taken to be 0.18215; and normalisations are taken to have 32 groups.
            subfolder: of the model in that folder; None for "unet", "vae" or "controlnet", or the folder.
            torch_dtype, dtype: of the parameters, under either name; None for float32.
            extract_ema: take the averaged weights of a training checkpoint.
            low_cpu_mem_usage, disable_mmap: taken for compatibility.
            cache_dir, force_download, local_files_only, revision, token: of a link or a Hub id.
            options: constructor arguments which override the configuration; and `device_map`, a device.

        Raises:
            OSError: there is no such file or folder.
            TypeError: `options` has a name that the constructor does not know, or the dtype is none.
            ValueError: the file has no such part, or weights do not fit; all missing, unexpected and
                misshaped ones are named as the file names them.
        """
        dtype = resolve_dtype(torch_dtype, dtype)
        device = take_compatible(options)
        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        checkpoint = read_checkpoint(pretrained_model_link_or_path_or_dict, {**hub, "revision": revision})
        stored = None
        if config is not None:
            stored = cls.load_config(config, subfolder=subfolder or cls.original_layout.part, **hub)
        model = cls.from_checkpoint(checkpoint, stored, dtype, extract_ema, **options)
        return model if device is None else model.to(device)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        config: dict[str, Any] | None,
        dtype: torch.dtype | None,
        extract_ema: bool = False,
        **options: Any,
    ) -> Any:
        """`from_single_file` of what is read already; config: as in a config.json."""
        layout, path = cls.original_layout, checkpoint.path
        prefix, tensors = checkpoint.part(layout.prefixes, layout.mark)
        if config is None:
            try:
                config = layout.config(tensors, checkpoint.family())
            except KeyError as error:
                raise ValueError(
                    f"{path} has no {prefix}{error.args[0]}, which tells the configuration of a "
                    f"{cls.__name__}; config= can name a folder with it. It has {checkpoint.contents()}"
                ) from error
        with torch.device("meta"):
            model, unused = cls.from_config(config, return_unused_kwargs=True, **options)
        unknown = sorted(unused.keys() & options.keys())
        if unknown:
            raise TypeError(f"{cls.__name__}.from_single_file does not know {', '.join(unknown)}")
        names = file_names(list(model.state_dict()), layout.modules(model))
        if extract_ema:
            tensors = _averages(checkpoint, tensors, path)
        fill_from(model, names, tensors, dtype, path, prefix)
        model.eval()
        return model


def _averages(checkpoint: Checkpoint, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Of a UNet's tensors the averages that training keeps under names without points."""
    keys = {name: "model_ema." + f"diffusion_model.{name}".replace(".", "") for name in tensors}
    missing = sorted(key for key in keys.values() if key not in checkpoint.tensors)
    if missing:
        raise ValueError(f"{path} has no averages of {len(missing)} weights: {', '.join(missing)}")
    return {name: checkpoint.tensors[key] for name, key in keys.items()}


def fill_from(
    model: torch.nn.Module,
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    path: str,
    prefix: str,
) -> None:
    """Put the tensors of a file into a model on the meta device, see `assign`.

    Tensors under the model's own names are taken too: some files hold diffusers' layout.

    Args:
        names: parameter -> its name in the file, without the prefix. A 1x1 convolution fills a linear layer.
        dtype: None for float32.
    """
    wanted, new = model.state_dict(), {}
    for name, original in names.items():
        if original in tensors:
            tensor, ndim = tensors[original], wanted[name].ndim
            linear = tensor.ndim > ndim and set(tensor.shape[ndim:]) == {1}
            new[name] = tensor.reshape(tensor.shape[:ndim]) if linear else tensor
    used = set(names.values())
    left = {name: t for name, t in tensors.items() if name not in used and not UNUSED.search(name)}
    called = {name: prefix + original for name, original in names.items()}
    called |= {name: prefix + name for name in left}
    assign(model, {**new, **left}, dtype or torch.float32, path, called)
