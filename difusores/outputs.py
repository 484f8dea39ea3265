"""What models, schedulers and pipelines return: a dataclass that reads like a dictionary or a tuple too."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import fields
from typing import Any, NoReturn

import torch.utils._pytree as pytree


class BaseOutput(OrderedDict[str, Any]):
    """Base of output dataclasses.

    `output.sample`, `output["sample"]` and `output[0]` are the same. Fields that are None are attributes
    only: they are no keys and are left out of `to_tuple()`. Subclasses are pytrees, as torch.compile asks.
    """

    def __init_subclass__(cls) -> None:
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        first = getattr(self, names[0])
        if isinstance(first, dict) and all(getattr(self, name) is None for name in names[1:]):
            # type(output)({...}) is how accelerate rebuilds a mapping
            OrderedDict.__delitem__(self, names[0])
            for name, value in first.items():
                setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is not None:
            super().__setitem__(name, value)
        elif name in self:
            super().__delitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"entries of a {type(self).__name__} can be replaced, but not removed or merged")

    __delitem__ = pop = popitem = update = setdefault = clear = _refuse

    def __reduce__(self) -> tuple[type[BaseOutput], tuple[Any, ...]]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())
