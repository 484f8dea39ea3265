"""Configuration of schedulers and models: constructor arguments as a frozen dictionary and a JSON file.

The files have the layout of diffusers 0.42 (`_class_name`, `_diffusers_version`, one key per constructor
argument), so either library reads what the other wrote.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import logging
import os
import re
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar, NoReturn, TypeVar

from difusores.files import find_file, replacing, upload_folder

logger = logging.getLogger(__name__)

DIFFUSERS_VERSION = "0.42.0"
"""Written to `_diffusers_version`: the file format, which diffusers compares with its own version."""

_loading = ContextVar("difusores_loading", default=False)
"""Whether an object is being built from a configuration, and not by a caller's own words."""

Init = TypeVar("Init", bound=Callable[..., None])
Self = TypeVar("Self", bound="ConfigMixin")


class FrozenDict(OrderedDict[str, Any]):
    """An ordered dictionary whose entries can be read as attributes too, and never changed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            super().__setitem__(key, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no key {name!r}; it has {sorted(self)}") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "a configuration cannot be changed in place; use from_config(config, key=value) instead"
        )

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _refuse
    pop = popitem = update = setdefault = clear = move_to_end = _refuse

    # those of OrderedDict would update a copy
    def __or__(self, other: Any) -> Any:
        return type(self)({**self, **other}) if isinstance(other, dict) else NotImplemented

    def __ror__(self, other: Any) -> Any:
        return type(self)({**other, **self}) if isinstance(other, dict) else NotImplemented

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)

    def copy(self) -> FrozenDict:
        return type(self)(self)


def register_to_config(init: Init) -> Init:
    """Decorate an `__init__` so that all its arguments, defaults included, are stored before it runs.

    Arguments that were not passed are also named in `_use_default_values`. Keyword arguments that begin with
    an underscore are stored and not handed on. Names in `ignore_for_config` are handed on and not stored.
    """
    signature = inspect.signature(init)
    parameters = list(signature.parameters.values())[1:]

    @functools.wraps(init)
    def wrapper(self: ConfigMixin, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self, ConfigMixin):
            raise RuntimeError(f"@register_to_config needs a ConfigMixin, and {type(self).__name__} is none")
        private = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith("_")}
        passed = signature.bind(self, *args, **kwargs).arguments
        stored, defaulted = dict[str, Any](), list[str]()
        for parameter in parameters:
            name = parameter.name
            if name in self.ignore_for_config or parameter.kind is parameter.VAR_KEYWORD:
                continue
            stored[name] = passed.get(name, parameter.default)
            if name not in passed:
                defaulted.append(name)
        if defaulted:
            stored["_use_default_values"] = defaulted
        self.register_to_config(**private, **stored)
        init(self, *args, **kwargs)

    return wrapper  # type: ignore[return-value]


class ConfigMixin:
    """Base of everything that has a configuration file.

    Put it before `torch.nn.Module` in a class's bases: then a configuration key read off the object warns.

    Class attributes:
        config_name: name of the file inside a folder.
        ignore_for_config: constructor arguments that are not stored.
        has_compatibles: whether `_compatibles` names classes that share configurations with this one.
        _compatibles: names of those classes in the package's top level.
        _deprecated_kwargs: arguments that the constructor takes through `**kwargs` only.
    """

    config_name: ClassVar[str | None] = None
    ignore_for_config: ClassVar[list[str]] = []
    has_compatibles: ClassVar[bool] = False
    _compatibles: ClassVar[list[str]] = []
    _deprecated_kwargs: ClassVar[list[str]] = []
    _internal_dict: FrozenDict

    def register_to_config(self, **kwargs: Any) -> None:
        """Store `kwargs`, over what is stored already."""
        if self.config_name is None:
            raise NotImplementedError(f"{type(self).__name__} has to define `config_name`")
        kwargs.pop("kwargs", None)
        self._internal_dict = FrozenDict({**self.__dict__.get("_internal_dict", {}), **kwargs})

    def _without_effect(self, message: str, level: int = logging.WARNING) -> None:
        """Options that would count for nothing: refused, but where a configuration holds them only told.

        Args:
            level: at which that is logged.

        Raises:
            ValueError: the constructor was called with them.
        """
        if not _loading.get():
            raise ValueError(message)
        logger.log(level, "%s: %s", type(self).__name__, message)

    def _as_in_diffusers(self, *names: str) -> None:
        """Options that diffusers takes and never reads, which its files hold: refused but for the defaults.

        Where a file holds another value that is no surprise: told at the level of information.
        """
        defaults = inspect.signature(type(self).__init__).parameters
        given = [
            f"{name}={self.config[name]!r}" for name in names if self.config[name] != defaults[name].default
        ]
        if given:
            message = (
                f"without effect, as in diffusers, and only for saved configurations: {', '.join(given)}"
            )
            self._without_effect(message, logging.INFO)

    @property
    def config(self) -> FrozenDict:
        """All constructor arguments, and the keys kept for compatible classes."""
        return self._internal_dict

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("_internal_dict", {})
        if name in config:
            owner = type(self).__name__
            message = f"reading {name!r} off a {owner} is deprecated; read `.config.{name}` instead"
            warnings.warn(message, FutureWarning, stacklevel=2)
            return config[name]
        inherited: Callable[[str], Any] | None = getattr(super(), "__getattr__", None)
        if inherited is not None:
            return inherited(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def _get_compatibles(cls) -> list[type[ConfigMixin]]:
        package = importlib.import_module(__package__)
        names = dict.fromkeys([cls.__name__, *cls._compatibles])
        return [getattr(package, name) for name in names if hasattr(package, name)]

    def to_json_string(self) -> str:
        """The configuration as JSON with sorted keys; arrays become lists, paths become strings."""
        config = {key: value for key, value in self._internal_dict.items() if key != "_use_default_values"}
        config.update(_class_name=type(self).__name__, _diffusers_version=DIFFUSERS_VERSION)
        return json.dumps(config, indent=2, sort_keys=True, default=_to_jsonable) + "\n"

    def __repr__(self) -> str:
        try:
            return f"{type(self).__name__} {self.to_json_string()}"
        except (AttributeError, TypeError):  # half built, or with a value that no file can hold
            return super().__repr__()

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `to_json_string()` to a file: the whole file or, on failure, none."""
        with replacing(json_file_path) as path, open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json_string())

    def save_config(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `config_name` into a folder, made if it is not there.

        Args:
            push_to_hub: upload the folder afterwards; `kwargs` are `repo_id` (the folder's name if absent),
                `private`, `token`, `commit_message`, `create_pr`, `subfolder`, as huggingface_hub knows them.

        Raises:
            NotADirectoryError: `save_directory` is a file.
        """
        if self.config_name is None:
            raise NotImplementedError(f"{type(self).__name__} has to define `config_name`")
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"{os.fspath(save_directory)!r} is a file; a folder is needed")
        os.makedirs(save_directory, exist_ok=True)
        self.to_json_file(os.path.join(save_directory, self.config_name))
        if push_to_hub:
            upload_folder(save_directory, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> Any:
        """Upload what `save_pretrained` writes to a Hub repository, made if it is not there.

        Args:
            commit_message, private, token, create_pr, subfolder: as huggingface_hub knows them.
            safe_serialization, variant: of `save_pretrained`, where there are weights.

        Returns:
            What `huggingface_hub.HfApi.upload_folder` returns: the commit.
        """
        save: Callable[..., None] = self.save_pretrained
        weights = {"safe_serialization": safe_serialization, "variant": variant}
        known = inspect.signature(save).parameters
        with tempfile.TemporaryDirectory() as folder:
            save(folder, **{key: value for key, value in weights.items() if key in known})
            hub = {"private": private, "token": token, "create_pr": create_pr, "subfolder": subfolder}
            message = commit_message or f"Upload {type(self).__name__}"
            return upload_folder(folder, repo_id=repo_id, commit_message=message, **hub)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """The old name of `load_config`."""
        warnings.warn("get_config_dict is deprecated; it is called load_config", FutureWarning, stacklevel=2)
        return cls.load_config(*args, **kwargs)

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Read a configuration from a file, a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path: a JSON file, a folder, or (where no such path exists) a Hub id.
            kwargs: `subfolder`, and for a Hub id `cache_dir`, `force_download`, `local_dir`,
                `local_files_only`, `revision`, `token`. Other names are left unused.

        Returns:
            The dictionary, or a tuple that begins with it: unused kwargs, the commit (or None), as asked for.

        Raises:
            OSError: there is no such file, it is not JSON, or the Hub cannot be reached.
        """
        if cls.config_name is None:
            raise ValueError(f"{cls.__name__} has to define `config_name`")
        hub_names = ("cache_dir", "force_download", "local_dir", "local_files_only", "revision", "token")
        hub = {key: kwargs.pop(key) for key in hub_names if key in kwargs}
        path = find_file(pretrained_model_name_or_path, cls.config_name, kwargs.pop("subfolder", None), **hub)
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise OSError(f"{path!r} is not a valid JSON file: {error}") from error
        if not isinstance(config, dict):
            raise OSError(f"{path!r} must hold a JSON object, {{...}}, got {type(config).__name__}")
        commit = re.search(r"snapshots/([^/]+)/", path.replace(os.sep, "/"))
        extras = [kwargs] if return_unused_kwargs else []
        if return_commit_hash:
            extras.append(commit.group(1) if commit else None)  # type: ignore[arg-type]
        return (config, *extras) if extras else config

    @classmethod
    def from_config(
        cls: type[Self],
        config: dict[str, Any] | str | os.PathLike[str] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Build an object from a configuration, its own or a compatible class's.

        Values that the source had by default are not taken over: this class's defaults stand. Keys that this
        class does not know are kept in its configuration, so that switching back loses nothing.

        Args:
            config: a dictionary such as `other.config`. A path still works, with a FutureWarning. Options in
                it that count for nothing, which the constructor refuses, are told in the log.
            kwargs: override the dictionary.

        Returns:
            The object, or (object, unused) with `return_unused_kwargs`.
        """
        if config is None:
            raise ValueError(f"{cls.__name__}.from_config needs a configuration dictionary, and got None")
        if isinstance(config, dict):
            source = config
        else:
            message = f"passing a path to {cls.__name__}.from_config is deprecated; use load_config first"
            warnings.warn(message, FutureWarning, stacklevel=2)
            source, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)

        init, unused, hidden = cls.extract_init_dict(source, **kwargs)
        init.update({key: unused.pop(key) for key in cls._deprecated_kwargs if key in unused})
        token = _loading.set(True)
        try:
            instance = cls(**init)
        finally:
            _loading.reset(token)
        if "_class_name" in hidden:
            hidden["_class_name"] = cls.__name__
        instance.register_to_config(**hidden)
        return (instance, {**unused, **hidden}) if return_unused_kwargs else instance

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Split a configuration into (constructor arguments, unused keys, keys to keep hidden)."""
        defaulted = {"_use_default_values", *config_dict.get("_use_default_values", ())}
        source = {key: value for key, value in config_dict.items() if key not in defaulted}
        expected = _init_names(cls) - set(cls.ignore_for_config)
        merged = {**source, **kwargs}
        init = {key: merged[key] for key in merged if key in expected}

        rest = {key: value for key, value in source.items() if key not in init and not key.startswith("_")}
        relatives = cls._names_of_relatives(source.get("_class_name"))
        unexpected = {key: value for key, value in rest.items() if key not in relatives}
        if unexpected:
            logger.warning(
                "The config attributes %s were passed to %s, but are not expected and will be ignored. "
                "Please check %s.",
                unexpected,
                cls.__name__,
                cls.config_name,
            )
        unused = {**unexpected, **{key: value for key, value in kwargs.items() if key not in init}}
        hidden = {key: value for key, value in source.items() if key not in init}
        return init, unused, hidden

    @classmethod
    def _names_of_relatives(cls, origin: object) -> set[str]:
        """Arguments that compatible classes, or the class that wrote the configuration, would know."""
        if origin is not None and not isinstance(origin, (str, list, tuple)):
            raise ValueError(f"`_class_name` has to be a string or a list of strings, and is {origin!r}")
        relatives = list(cls._get_compatibles()) if cls.has_compatibles else []
        if isinstance(origin, str):
            writer = getattr(importlib.import_module(__package__), origin, None)
            relatives += [writer] if isinstance(writer, type) else []
        return {name for relative in relatives for name in _init_names(relative)}


def _init_names(cls: type) -> set[str]:
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}


def _to_jsonable(value: Any) -> Any:
    """What json does not know: numpy arrays and scalars, tensors, paths, nested configurations."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    raise TypeError(f"a configuration value of {type(value)} cannot be written as JSON: {value!r}")
