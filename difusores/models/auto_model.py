"""`AutoModel`: a model of the class that its folder names."""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn

from difusores.configuration import ConfigMixin
from difusores.models.modeling import ModelMixin


class AutoModel(ConfigMixin):
    """Reads models of this package, and text encoders and others of transformers; has no objects."""

    config_name = "config.json"

    def __init__(self) -> NoReturn:
        raise OSError("there are no objects of AutoModel: use AutoModel.from_pretrained")

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """A model, of the class in config.json.

        options: see `ModelMixin.from_pretrained`; for models of transformers theirs.

        Raises:
            OSError: there is no such folder or file.
            ValueError: config.json names no class, or one that neither package has.
        """
        names = ("subfolder", "cache_dir", "force_download", "local_files_only", "revision", "token")
        place = {name: options[name] for name in names if name in options}
        config = cls.load_config(pretrained_model_or_path, **place)
        ours = config.get("_class_name")
        name = ours or next(iter(config.get("architectures") or ()), None)
        package = importlib.import_module("difusores" if ours else "transformers") if name else None
        found = getattr(package, str(name), None)
        if found is None or (ours and not issubclass(found, ModelMixin)):
            said = f"a {name}" if name else "no class"
            raise ValueError(f"the config.json of {os.fspath(pretrained_model_or_path)!r} names {said}")
        return found.from_pretrained(pretrained_model_or_path, **options)
