"""What a forward pass of a network may take as given, looked at once and not in every layer.

A layer's replacement asks before each call whether somebody would miss it: hooks, other parameters or
modules, training, gradients. Between the layers of one pass nothing of that changes, and to ask in each of
them takes a tenth of a pass where images are small: what Python reads has left the caches meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

from torch import nn
from torch.nn.modules import module as nn_module

from difusores.acceleration.session import Samples

T = TypeVar("T")

_OF_MODULE = (
    *("training", "eps", "num_groups", "heads", "processor"),
    *("output_scale_factor", "rescale_output_factor", "residual_connection"),
)


class Standing:
    """A network as it stands: modules, classes, parameters, forwards, and what prepared weights were made of.

    Attributes:
        samples: of the prepared weights that there were.
    """

    def __init__(self, network: nn.Module, samples: Samples) -> None:
        self.samples = samples
        self._modules = list(network.modules())
        self._classes = list(map(type, self._modules))
        self._trains = any(m.training for m in self._modules)
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        held: list[tuple[Mapping[str, Any], str, object]] = []
        for m in self._modules:
            state = m.__dict__
            held.append((state, "forward", state.get("forward")))
            held += [(state, name, state[name]) for name in _OF_MODULE if name in state]
            held += [(table, *item) for table in (m._parameters, m._modules) for item in table.items()]
        self._tables, self._names, self._values = (list(column) for column in zip(*held, strict=True))

    def is_as_it_was(self) -> bool:
        """Whether all of that is still so; values of parameters are compared elsewhere."""
        from difusores import _C

        return list(map(type, self._modules)) == self._classes and _C.same_objects(
            self._tables, self._names, self._values
        )

    def is_watched(self) -> bool:
        """Whether there is a hook anywhere, or a module in training mode."""
        return (
            any(self._hooks)
            or bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
            or self._trains
        )


class Prepared(Generic[T]):
    """What a layer prepared for a network as it stands, by the images' size; gone when that changes."""

    def __init__(self) -> None:
        self._made: tuple[object, dict[Hashable, T]] = None, {}

    def __reduce__(self) -> tuple[type[Prepared[T]], tuple[()]]:
        return Prepared, ()  # a copy of the layer prepares its own

    def get(self, standing: object, key: Hashable, make: Callable[[], T]) -> T:
        made_for, made = self._made  # one pair, which other threads replace and do not change
        if made_for is not standing:
            made = {}
            self._made = standing, made
        if key not in made:
            made[key] = make()
        return made[key]
