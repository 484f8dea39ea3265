"""Base of models: a torch module with a configuration, in folders of diffusers' layout."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from difusores.configuration import ConfigMixin
from difusores.files import find_file, replacing, upload_folder
from difusores.models.attention_processor import AttentionInterface

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "diffusion_pytorch_model"
# before diffusers 0.15
LEGACY_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# arguments of diffusers' from_pretrained that are taken where they ask for nothing
UNSUPPORTED = (
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "quantization_config",
    "ignore_mismatched_sizes",
    "custom_pipeline",
)

DIVIDED = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` for which diffusers divides models among devices."""


class ModelMixin(AttentionInterface, ConfigMixin):
    """A torch module that `from_pretrained` reads and `save_pretrained` writes.

    Class attributes:
        weights_names: names of weight files without their endings, by ending.
    """

    config_name = "config.json"
    weights_names: ClassVar[dict[str, str]] = {"safetensors": WEIGHTS_NAME, "bin": WEIGHTS_NAME}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # parameters and submodules
        except AttributeError:
            return ConfigMixin.__getattr__(self, name)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point parameter."""
        return next(tensor.dtype for tensor in self.parameters() if tensor.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count of scalars: all, those that take gradients, those outside of `nn.Embedding` tables."""
        tables = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable)
            and not (exclude_embeddings and id(parameter) in tables)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the buffers if asked for."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether `enable_gradient_checkpointing` holds."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def enable_gradient_checkpointing(self) -> None:
        """Keep for the gradient what goes into layers, and compute again what is within them: the same
        gradients for less memory and more time (Chen et al. 2016).

        Raises:
            ValueError: the model has no blocks that do this.
        """
        self._checkpoint(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep all for the gradient again."""
        self._checkpoint(False)

    def _checkpoint(self, wanted: bool) -> None:
        blocks: list[Any] = [module for module in self.modules() if hasattr(module, "gradient_checkpointing")]
        if wanted and not blocks:
            raise ValueError(f"{type(self).__name__} has no blocks with gradient checkpointing")
        for block in blocks:
            block.gradient_checkpointing = wanted

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        output_loading_info: bool = False,
        **config: Any,
    ) -> Any:
        """Read a model, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder, a name such as "bundled:digits", or (where no such path
                exists) the id of a Hub repository.
            subfolder: where in it the model lies.
            torch_dtype, dtype: of the parameters, under either name; None for float32, whatever the file has.
            variant: read "diffusion_pytorch_model.<variant>.safetensors".
            use_safetensors: True refuses .bin files, False reads only those (with `weights_only=True`).
            low_cpu_mem_usage: taken for compatibility; a model is never initialised first.
            cache_dir, force_download, local_files_only, revision, token: of a Hub repository.
            output_loading_info: return (model, what did not fit), which is empty: see ValueError.
            config: constructor arguments which override the file's. `device_map` is a device that the model
                is put on. The names in `UNSUPPORTED` are taken as None or False.

        Raises:
            NotImplementedError: one of `UNSUPPORTED` has another value, or `device_map` is no single device.
            OSError: there is no such folder or file.
            TypeError: `config` has a name that the constructor does not know, or the dtype is none.
            ValueError: the weights do not fit the configuration; all missing, unexpected and misshaped ones
                are named. Or both names of the dtype are given, and differ.
        """
        dtype = resolve_dtype(torch_dtype, dtype)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype is {dtype!r}; needed is a torch.dtype such as torch.float16")
        device = take_compatible(config)
        source = os.fspath(pretrained_model_name_or_path)
        if os.path.isfile(source):
            raise OSError(f"{source!r} is a file; a folder is needed")
        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "revision": revision,
            "token": token,
        }
        stored = cls.load_config(source, subfolder=subfolder, **hub)
        with torch.device("meta"):
            model, unused = cls.from_config(stored, return_unused_kwargs=True, **config)
        unknown = sorted(unused.keys() & config.keys())
        if unknown:
            raise TypeError(
                f"{cls.__name__}.from_pretrained does not know the argument(s) {', '.join(unknown)}"
            )
        paths = find_weights(source, cls.weights_names, subfolder, variant, use_safetensors, hub)
        tensors = convert_legacy_attention(read_tensors(paths), model.state_dict())
        assign(model, tensors, dtype or torch.float32, paths[0])
        model.register_to_config(_name_or_path=source)
        model.eval()
        if device is not None:
            model.to(device)
        if not output_loading_info:
            return model
        return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **hub: Any,
    ) -> None:
        """Write config.json and the weights into a folder, made if it is not there.

        The weights are one safetensors file or, above `max_shard_size`, several and an index of them; older
        files of these names are gone afterwards.

        Args:
            is_main_process: False writes nothing (launchers of several processes call this in each).
            safe_serialization: False, for pickled files, is refused.
            variant: write "diffusion_pytorch_model.<variant>.safetensors".
            max_shard_size: of one file: bytes, or a text such as "10GB". A tensor is never divided.
            push_to_hub: upload the folder afterwards, with `hub` as in `save_config`.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            ValueError: pickled files are asked for, or `max_shard_size` is no size.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False is not supported: weights are written as safetensors only"
            )
        if hub and not push_to_hub:
            raise TypeError(f"{', '.join(hub)}: only with push_to_hub=True")
        most = _bytes(max_shard_size)
        if not is_main_process:
            return
        self.save_config(save_directory)
        write_weights(save_directory, self.weights_names["safetensors"], variant, self.state_dict(), most)
        if push_to_hub:
            upload_folder(save_directory, **hub)


def resolve_dtype(torch_dtype: Any, dtype: Any) -> Any:
    """The dtype, given under either name; None if it is not given."""
    if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
        raise ValueError(f"dtype is {dtype}, and torch_dtype is {torch_dtype}: they are one argument")
    return torch_dtype if dtype is None else dtype


def take_compatible(options: dict[str, Any]) -> torch.device | None:
    """Take out `device_map`, which is returned as a device, and the names in `UNSUPPORTED`.

    One of `DIVIDED` is the GPU, or the CPU where there is none.

    Raises:
        NotImplementedError: one of them asks for what is not there, such as a model on several devices.
    """
    for name in UNSUPPORTED:
        value = options.pop(name, None)
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} is {value!r}; difusores takes only None or False for it")
    given = options.pop("device_map", None)
    place = given[""] if isinstance(given, Mapping) and given.keys() == {""} else given
    if place is None or place is False:
        return None
    if place in DIVIDED and torch.cuda.device_count() < 2:
        place = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    except (RuntimeError, TypeError):
        raise NotImplementedError(
            f"device_map is {given!r}; difusores takes None or one device, such as 'cuda', for whole models"
        ) from None


def drop_idle(owner: str, options: dict[str, Any], known: Iterable[str]) -> None:
    """Take out options that a class does not know and that ask for nothing; diffusers lets all of them pass.

    Raises:
        TypeError: an unknown one is neither None nor False.
    """
    names = list(known)
    unknown = sorted(options.keys() - set(names))
    wrong = [name for name in unknown if options[name] is not None and options[name] is not False]
    if wrong:
        raise TypeError(f"{owner} takes {', '.join(names)}, and no {', '.join(wrong)}")
    for name in unknown:
        logger.warning("%s has no %s, which is %s: not used", owner, name, options.pop(name))


def _bytes(size: int | str) -> int:
    """A size such as 1000, "10GB" or "1.5 MiB"."""
    if isinstance(size, int):
        return size
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", size, re.IGNORECASE)
    if parts is None:
        raise ValueError(f'max_shard_size is {size!r}; needed is a number of bytes or a text such as "10GB"')
    number, prefix, binary = parts.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def find_weights(
    source: str,
    stems: Mapping[str, str],
    subfolder: str | None,
    variant: str | None,
    use_safetensors: bool | None,
    hub: dict[str, Any],
) -> list[str]:
    """The weight files of a model: by preference one safetensors file, its shards, or the same as .bin."""
    suffix = f".{variant}" if variant else ""
    kinds = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
    names = []
    for kind in kinds:
        names.append(f"{stems[kind]}{suffix}.{kind}")
        names.append(f"{stems[kind]}.{kind}.index{suffix}.json")
    found = find_file(source, names, subfolder, **hub)
    if not found.endswith(".json"):
        return [found]
    with open(found, encoding="utf-8") as file:
        shards = sorted(set(json.load(file)["weight_map"].values()))
    return [find_file(source, shard, subfolder, **hub) for shard in shards]


def read_tensors(paths: Iterable[str]) -> dict[str, torch.Tensor]:
    """All tensors of the given .safetensors or .bin files, on the CPU."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        if path.endswith(".safetensors"):
            tensors.update(load_file(path))
        else:
            tensors.update(torch.load(path, map_location="cpu", weights_only=True))
    return tensors


def convert_legacy_attention(
    tensors: dict[str, torch.Tensor], wanted: Container[str]
) -> dict[str, torch.Tensor]:
    """Rename query, key, value and proj_attn of old checkpoints where the model wants the new names."""
    renamed = {}
    for name, tensor in tensors.items():
        *path, layer, parameter = name.rsplit(".", 2)
        new_name = ".".join((*path, LEGACY_ATTENTION_NAMES.get(layer, layer), parameter))
        renamed[new_name if new_name in wanted else name] = tensor
    return renamed


def write_weights(
    folder: str | os.PathLike[str],
    stem: str,
    variant: str | None,
    tensors: dict[str, torch.Tensor],
    most: int,
) -> None:
    """Write one safetensors file, or several of at most so many bytes and an index; remove older ones."""
    from huggingface_hub import split_torch_state_dict_into_shards

    suffix = f".{variant}" if variant else ""
    pattern = f"{stem}{suffix}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=most)
    for name, part in split.filename_to_tensors.items():
        write_safetensors(os.path.join(folder, name), {key: tensors[key] for key in part})
    index = f"{stem}.safetensors.index{suffix}.json"
    written = set(split.filename_to_tensors)
    if split.is_sharded:
        written.add(index)
        text = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        with replacing(os.path.join(folder, index)) as temporary, open(temporary, "w") as file:
            json.dump(text, file, indent=2, sort_keys=True)
    ours = re.compile(re.escape(f"{stem}{suffix}") + r"(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(index))
    for name in os.listdir(folder):
        if ours.fullmatch(name) and name not in written:
            os.remove(os.path.join(folder, name))


def write_safetensors(path: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write one safetensors file: the whole file or, on failure, none."""
    from safetensors.torch import save

    # not save_file: it makes files that only their owner can read
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(save({name: t.contiguous() for name, t in tensors.items()}, {"format": "pt"}))


def assign(
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    path: str,
    called: Mapping[str, str] | None = None,
) -> None:
    """Put tensors into a model on the meta device, or say everything that does not fit.

    called: what the file calls the tensors, where that is something else.
    """
    wanted, called = model.state_dict(), called or {}
    problems = [f"missing {called.get(name, name)}" for name in wanted if name not in tensors]
    problems += [f"unexpected {called.get(name, name)}" for name in tensors if name not in wanted]
    problems += [
        f"{called.get(name, name)} has shape {list(tensors[name].shape)}, and {list(tensor.shape)} is needed"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit the configuration of this {type(model).__name__}: {'; '.join(problems)}"
        )
    # copies: mapped pages of the file would show what is later written to it
    copies = {
        name: t.to(dtype if t.is_floating_point() else t.dtype, copy=True) for name, t in tensors.items()
    }
    model.load_state_dict(copies, assign=True)
