"""Base of pipelines: named components that work together, read from and written to one folder."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from difusores.configuration import ConfigMixin
from difusores.cuda_graph import disable_cuda_graph, enable_cuda_graph
from difusores.files import find_file, upload_folder
from difusores.image_processor import VaeImageProcessor
from difusores.models.modeling import ModelMixin, drop_idle, resolve_dtype, take_compatible
from difusores.pipelines.call_state import CallState
from difusores.pipelines.fit import needs
from difusores.pipelines.memory import MemorySavers
from difusores.utils.logging import is_progress_bar_enabled

SAFETY_CHECKER = "difusores.pipelines.safety_checker"
LIBRARIES = {
    "diffusers": "difusores",
    "difusores": "difusores",
    "latent_diffusion": "difusores",
    "stable_diffusion": SAFETY_CHECKER,
    "transformers": "transformers",
}
"""Library named in a model_index.json -> the package or module whose classes are used."""

RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
"""Class named in old folders -> the name that it has now."""

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
"""Of a tokenizer; where there is none, transformers 5 makes an empty one without a word."""

Self = TypeVar("Self", bound="DiffusionPipeline")


class DiffusionPipeline(MemorySavers, ConfigMixin):
    """A set of components and a `__call__` that samples with them.

    Components are attributes, named as the constructor's arguments; assigning another object swaps one.
    """

    config_name = "model_index.json"
    _component_names: tuple[str, ...] = ()
    _progress_bar_config: dict[str, Any]
    # the scheduler in the folder that the models came from; None where that is not known
    _trained_with: Any = None
    _scheduler_of_run = CallState[Any](None)

    @property
    def scheduler(self) -> Any:
        """The scheduler; in a callback the copy that is set to the steps of its own call, in its thread."""
        running = self._scheduler_of_run
        return self.__dict__["scheduler"] if running is None else running

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.__dict__["scheduler"] = scheduler

    @contextmanager
    def _running(self, scheduler: Any, steps: int | None = None) -> Iterator[None]:
        """Show callbacks this scheduler, until the call ends; steps: a copy of it that is set to them."""
        if steps is not None:
            scheduler = copy.deepcopy(scheduler)
            scheduler.set_timesteps(steps)
        before, self._scheduler_of_run = self._scheduler_of_run, scheduler
        try:
            yield
        finally:
            self._scheduler_of_run = before

    def register_modules(self, **components: Any) -> None:
        """Make the arguments components."""
        self.__dict__.update(components, _component_names=tuple(components), _progress_bar_config={})
        self._register_names()

    def _register_names(self) -> None:
        self.register_to_config(
            **{name: _library_and_class(value) for name, value in self.components.items()}
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._component_names:
            self._register_names()
            if isinstance(value, nn.Module):
                self._trained_with = None

    @property
    def components(self) -> dict[str, Any]:
        """All components by name, as the constructor takes them."""
        return {name: getattr(self, name) for name in self._component_names}

    def _models(self) -> list[nn.Module]:
        return [value for value in self.components.values() if isinstance(value, nn.Module)]

    @property
    def device(self) -> torch.device:
        """Of the first model; with `enable_model_cpu_offload`, where the models compute."""
        if self._offload is not None:
            return self._offload.device
        return next((next(model.parameters()).device for model in self._models()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the first model."""
        return next((next(model.parameters()).dtype for model in self._models()), torch.float32)

    @property
    def _execution_device(self) -> torch.device:
        """`device`, under the name that diffusers' own loops have for it."""
        return self.device

    @staticmethod
    def numpy_to_pil(images: npt.NDArray[Any]) -> list[Image.Image]:
        """Arrays [N, H, W, C] or [H, W, C] in [0, 1] as pictures."""
        return VaeImageProcessor.numpy_to_pil(images)

    def to(
        self: Self,
        *targets: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> Self:
        """Move and cast all models: `to("cuda")`, `to(torch.bfloat16)`, both in this order, or by keyword.

        `silence_dtype_warnings` is taken for compatibility; there are no such warnings.

        Raises:
            ValueError: a device, while `enable_model_cpu_offload` moves the models.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        if self._offload is not None and device is not None:
            raise ValueError("enable_model_cpu_offload moves the models; call remove_all_hooks() first")
        for model in self._models():
            model.to(device=device, dtype=dtype)
        return self

    def enable_cuda_graph(self) -> None:
        """Launch each call of the networks that denoise as one CUDA graph: `difusores.enable_cuda_graph`."""
        enable_cuda_graph(self)

    def disable_cuda_graph(self) -> None:
        """Launch kernel after kernel again, and give the graphs' memory back."""
        disable_cuda_graph(self)

    def set_progress_bar_config(self, **config: Any) -> None:
        """Arguments for tqdm, such as `disable=True`."""
        self._progress_bar_config = config

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar over an iterable or of a length."""
        if (iterable is None) == (total is None):
            raise ValueError("progress_bar takes an iterable or a total, one of the two")
        shown = {"disable": not is_progress_bar_enabled(), **self._progress_bar_config}
        return tqdm(iterable, total=total, **shown)

    def check_training(self) -> None:
        """Compare with the scheduler in the models' own folder; other betas give a warning.

        Raises:
            ValueError: the models predict something else, are told another kind of time, or are scaled for
                data of another deviation.
        """
        own, given = self._trained_with, self.scheduler
        needed, offered = (None if each is None else needs(each) for each in (own, given))
        if needed is None or offered is None:
            return
        subjects = ("prediction_type is", "the scheduler's time is", "the scheduler's data deviation is")
        for subject, asked, trained in zip(subjects, offered, needed, strict=True):
            if asked != trained:
                raise ValueError(
                    f"{subject} {asked}, but the model's own folder says {trained}; "
                    "strict=False samples nevertheless"
                )
        if needed.time.endswith("training steps"):
            betas, trained_betas = given.betas.tolist(), own.betas.tolist()
            if betas != trained_betas:
                texts = [f"{len(b)} betas from {b[0]:.4g} to {b[-1]:.4g}" for b in (betas, trained_betas)]
                warnings.warn(
                    f"the scheduler has {texts[0]}, and the model's own folder says {texts[1]}", stacklevel=4
                )

    @classmethod
    def from_pipe(
        cls: type[Self],
        pipeline: DiffusionPipeline,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """A pipeline of this class over the components of another one, which they share.

        Args:
            torch_dtype, dtype: what the models are cast to, the other pipeline's too. None leaves them as
                they are, where diffusers casts to float32.
            options: components in place of the other's, and other arguments of the constructor.

        Raises:
            TypeError: the constructor has no such argument.
            ValueError: a component is missing; or both names of the dtype are given, and differ.
        """
        dtype = resolve_dtype(torch_dtype, dtype)
        parameters = dict(list(inspect.signature(cls.__init__).parameters.items())[1:])
        drop_idle(cls.__name__, options, parameters)
        given = {**pipeline.config, **pipeline.components, **options}
        empty = inspect.Parameter.empty
        missing = [name for name, p in parameters.items() if name not in given and p.default is empty]
        if missing:
            raise ValueError(
                f"{cls.__name__} needs {', '.join(missing)}, which the {type(pipeline).__name__} has not"
            )
        made = cls(**{name: given[name] for name in parameters if name in given})
        if not any(isinstance(value, nn.Module) for value in options.values()):
            made._trained_with = getattr(pipeline, "_trained_with", None)
        return made if dtype is None else made.to(dtype)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        **options: Any,
    ) -> Self:
        """Read a pipeline. `DiffusionPipeline.from_pretrained` gives the class that the folder names.

        Args:
            pretrained_model_name_or_path: a folder with a model_index.json, a name such as "bundled:digits",
                or (where no such path exists) the id of a Hub repository.
            torch_dtype, dtype, variant, use_safetensors, low_cpu_mem_usage: of models, see
                `ModelMixin.from_pretrained`. A dictionary gives a dtype by component, and one to "default".
                Components without files of the variant are read without it, with a warning.
            options: components to use in place of the folder's; and for a Hub id `cache_dir`,
                `force_download`, `local_files_only`, `revision`, `token`. `device_map` is a device that all
                models are put on. The names in `difusores.models.modeling.UNSUPPORTED`, and those that the
                class does not know, are taken as None or False.

        Raises:
            NotImplementedError: one of `UNSUPPORTED` has another value, or `device_map` is no single device.
            OSError: there is no such folder or file.
            TypeError: an option that is not one of these, or a dtype that is none.
            ValueError: a component is missing, or this package has no class of its name; no component has
                the variant; or both names of the dtype are given, and differ.
        """
        dtype = resolve_dtype(torch_dtype, dtype)
        device = take_compatible(options)
        source = os.fspath(pretrained_model_name_or_path)
        hub_names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        hub: dict[str, Any] = {name: options.pop(name) for name in hub_names if name in options}
        model_options = {
            "torch_dtype": dtype,
            "variant": variant,
            "use_safetensors": use_safetensors,
            "low_cpu_mem_usage": low_cpu_mem_usage,
        }
        index = cls.load_config(source, **hub)
        own_class = (
            _find_class("difusores", str(index.get("_class_name"))) if cls is DiffusionPipeline else cls
        )
        parameters = dict(list(inspect.signature(own_class.__init__).parameters.items())[1:])
        names = list(parameters)
        drop_idle(own_class.__name__, options, names)
        present = {*index, *options}
        empty = inspect.Parameter.empty
        missing = [name for name in names if name not in present and parameters[name].default is empty]
        if missing:
            raise ValueError(f"{source!r} has no {', '.join(missing)}, which {own_class.__name__} needs")

        plain: list[str] = []
        stored = {
            name: load_component(source, name, index[name], model_options, hub, plain)
            for name in names
            if name in index and name not in options
        }
        if plain and len(plain) == sum(isinstance(value, nn.Module) for value in stored.values()):
            raise ValueError(f"no component of {source!r} has files of variant {variant!r}")
        if plain:
            warnings.warn(
                f"{', '.join(plain)} of {source!r} have no files of variant {variant!r}: those without it "
                "are read",
                stacklevel=2,
            )
        pipeline: Self = own_class(**stored, **options)
        if not any(isinstance(value, nn.Module) for value in options.values()):
            pipeline._trained_with = _own_scheduler(source, index, stored, hub)
        return pipeline if device is None else pipeline.to(device)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> None:
        """Write every component into a folder of its name, and model_index.json last.

        Args:
            safe_serialization, variant, max_shard_size: of models, see `ModelMixin.save_pretrained`.
            push_to_hub: upload the folder afterwards, with `hub` as in `save_config`.
        """
        if hub and not push_to_hub:
            raise TypeError(f"{', '.join(hub)}: only with push_to_hub=True")
        for name, component in self.components.items():
            options: dict[str, Any] = {}
            if isinstance(component, nn.Module):
                options = {"safe_serialization": safe_serialization, "variant": variant}
                if max_shard_size is not None:
                    options["max_shard_size"] = max_shard_size
            if component is not None:
                if not hasattr(component, "save_pretrained"):
                    kind = type(component).__name__
                    raise TypeError(f"{name} is a {kind}, which has no save_pretrained: it cannot be saved")
                component.save_pretrained(os.path.join(save_directory, name), **options)
        self.save_config(save_directory)
        if push_to_hub:
            upload_folder(save_directory, **hub)


def follows_plan(scheduler: Any) -> bool:
    """Whether `scheduler.plan` says all that its `set_timesteps` and `step` do.

    It does not where there is no plan, as in diffusers' schedulers, nor where a subclass or an assignment to
    the object has put something else in the place of one of the two methods.
    """
    methods = (getattr(scheduler, name, None) for name in ("plan", "set_timesteps", "step"))
    functions = (getattr(method, "__func__", None) for method in methods)
    return all(getattr(f, "__module__", "").startswith("difusores.schedulers.") for f in functions)


def step_accepts_generator(scheduler: Any) -> bool:
    """Whether `scheduler.step` takes a generator beside (model_output, timestep, sample).

    Raises:
        ValueError: it needs other arguments, or there is none.
    """
    name, step = type(scheduler).__name__, getattr(scheduler, "step", None)
    if step is None:
        raise ValueError(f"{name} has no step(model_output, timestep, sample): write its own loop")
    parameters = inspect.signature(step).parameters
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in variable]
    if len(needed) > 3:
        raise ValueError(
            f"{name}.step needs {', '.join(needed)}, and this pipeline has a model output, a timestep and a "
            "sample: write its own loop"
        )
    return "generator" in parameters or any(p.kind is variable[1] for p in parameters.values())


def _library_and_class(component: object) -> tuple[str | None, str | None]:
    """An entry of model_index.json; "diffusers" stands for this package too, so that both read it."""
    if component is None:
        return None, None
    component = getattr(component, "_orig_mod", component)  # of torch.compile
    library = type(component).__module__.split(".")[0]
    if library == "difusores":
        # diffusers keeps a few classes beside their pipeline, and finds them under its name
        library = getattr(type(component), "index_library", "diffusers")
    return library, type(component).__name__


def _find_class(library: str, name: str) -> Any:
    package = LIBRARIES.get(library)
    needs_transformers = package in ("transformers", SAFETY_CHECKER)
    if needs_transformers and importlib.util.find_spec("transformers") is None:
        raise ImportError(f"{name} needs transformers, which is not installed: difusores[text] has it")
    name = RENAMED.get(name, name)
    found = getattr(importlib.import_module(package), name, None) if package else None
    if found is None:
        raise ValueError(
            f"this version of difusores cannot load {library}.{name}; an object can be passed instead"
        )
    return found


def load_component(
    source: str,
    name: str,
    entry: Any,
    model_options: dict[str, Any],
    hub: dict[str, Any],
    plain: list[str] | None = None,
) -> Any:
    """One component, from the folder of its name.

    plain: where a variant is asked for, gets the name if there is none and the files without it are read.
    """
    if not isinstance(entry, (list, tuple)):
        return entry
    library, class_name = entry
    if class_name is None:
        return None
    component_class = _find_class(library, class_name)
    options = dict(hub)
    if library == "transformers" and "Tokenizer" in class_name:
        find_file(source, VOCABULARIES, name, **hub)
    if issubclass(component_class, nn.Module):
        options.update(model_options)
        dtype = options["torch_dtype"]
        if isinstance(dtype, dict):
            options["torch_dtype"] = dtype.get(name, dtype.get("default"))
        if not issubclass(component_class, ModelMixin):
            # transformers', which else takes the file's dtype, and knows the argument as dtype
            options["dtype"] = options.pop("torch_dtype") or torch.float32
    try:
        return component_class.from_pretrained(source, subfolder=name, **options)
    except OSError:
        if plain is None or options.pop("variant", None) is None:
            raise
        found = component_class.from_pretrained(source, subfolder=name, **options)
    plain.append(name)
    return found


def _own_scheduler(source: str, index: dict[str, Any], stored: dict[str, Any], hub: dict[str, Any]) -> Any:
    """The folder's scheduler, read for the check alone if another was passed; None if it cannot be known."""
    if "scheduler" in stored or "scheduler" not in index:
        return stored.get("scheduler")
    try:
        return load_component(source, "scheduler", index["scheduler"], {}, hub)
    except ValueError:  # of a class that this version does not have
        return None
