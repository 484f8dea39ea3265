"""Low-rank adapters (Hu et al. 2021, "LoRA") on the linear layers and convolutions of any module.

A layer of weight W acts as W + sum_k w_k (alpha_k / r_k) B_k A_k. Modules and parameters stay what they are:
hooks add the second term to a layer's output, or `fuse` writes the sum into W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_strength: ContextVar[float] = ContextVar("lora_strength", default=1.0)


class LowRank:
    """One adapter's change of one layer.

    Attributes:
        down: A, [r, in] or [r, in, kh, kw].
        up: B, [out, r] or [out, r, 1, 1].
        factor: alpha / r.
    """

    def __init__(self, down: Tensor, up: Tensor, factor: float) -> None:
        self.down, self.up, self.factor = down, up, factor
        self._cast: tuple[Any, Tensor, Tensor] | None = None

    def output(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What is added to the layer's output for the input x, without the factor."""
        down, up = self.down, self.up
        if (down.device, down.dtype) != (x.device, x.dtype):
            down, up = self._as(x)
        if isinstance(layer, nn.Conv2d):
            hidden = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
            return F.conv2d(hidden, up)
        return F.linear(F.linear(x, down), up)

    def _as(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(A, B) on the device and in the dtype of x, made anew where they have been changed in place."""
        key = (x.device, x.dtype, self.down._version, self.up._version)
        cast = self._cast
        if cast is None or cast[0] != key:
            cast = self._cast = key, self.down.to(x), self.up.to(x)
        return cast[1:]

    def memory(self) -> tuple[int, ...]:
        """Where A and B lie that the last output read, and which version of them."""
        read = (self.down, self.up) if self._cast is None else self._cast[1:]
        return self.down._version, self.up._version, *(t.data_ptr() for t in read)

    def weight(self, like: Tensor) -> Tensor:
        """What is added to the layer's weight, without the factor; float32 at least, on its device."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        down, up = (t.to(like.device, dtype).flatten(1) for t in (self.down, self.up))
        return (up @ down).reshape(like.shape)


class Adapters:
    """The adapters of one module.

    Attributes:
        loaded: adapter -> name of a layer -> its change.
        weights: factor of each active adapter.
        fused: the adapters that are in the weights now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.loaded: dict[str, dict[str, LowRank]] = {}
        self.weights: dict[str, float] = {}
        self.fused: tuple[str, ...] = ()
        self.enabled = True
        self._before: dict[str, Tensor] = {}
        self._hooks: dict[str, Any] = {}

    def load(self, name: str, layers: Mapping[str, LowRank]) -> None:
        """Add an adapter; it alone is active then.

        Raises:
            ValueError: the name is in use, or adapters are fused.
        """
        self._check_not_fused("another adapter is loaded")
        if name in self.loaded:
            raise ValueError(f"there is an adapter {name!r} already; loaded are {', '.join(self.loaded)}")
        self.loaded[name] = dict(layers)
        for layer in self.loaded[name].keys() - self._hooks.keys():
            self._hooks[layer] = self.model.get_submodule(layer).register_forward_hook(_Hook(self, layer))
        self.weights = {name: 1.0}

    def activate(self, weights: Mapping[str, float]) -> None:
        """Make these adapters, with these factors, the active ones."""
        self._check_not_fused("others are activated")
        self.weights = {name: weight for name, weight in weights.items() if name in self.loaded}

    def delete(self, name: str) -> None:
        """Forget an adapter."""
        self._check_not_fused("one is deleted")
        self.loaded.pop(name, None)
        self.weights.pop(name, None)
        for layer in [key for key in self._hooks if not any(key in ls for ls in self.loaded.values())]:
            self._hooks.pop(layer).remove()

    def fuse(self, scale: float, names: list[str] | None = None, safe: bool = False) -> None:
        """Write active adapters into the weights, which are kept for `unfuse`.

        Args:
            scale: factor on all changes.
            names: of the active ones, which; None for all.
            safe: raise ValueError, and change nothing, where a sum is not finite.
        """
        self._check_not_fused("adapters are fused again")
        chosen = {n: w for n, w in self.weights.items() if names is None or n in names}
        sums: dict[str, Tensor] = {}
        for layer in self._hooks:
            old = layer_weight(self.model, layer)
            changes = [
                weight * scale * self.loaded[name][layer].factor * self.loaded[name][layer].weight(old)
                for name, weight in chosen.items()
                if layer in self.loaded[name]
            ]
            if changes:
                sums[layer] = (old.detach().to(changes[0].dtype) + sum(changes)).to(old.dtype)
                if safe and not bool(torch.isfinite(sums[layer]).all()):
                    raise ValueError(f"with the adapters, the weight of {layer} has NaN or infinity")
        with torch.no_grad():
            for layer, weight in sums.items():
                parameter = layer_weight(self.model, layer)
                self._before[layer] = parameter.detach().clone()
                parameter.copy_(weight)
        self.fused = tuple(chosen)

    def unfuse(self) -> None:
        """Put the weights from before `fuse` back, bit for bit, in the model's present dtype."""
        with torch.no_grad():
            for layer, weight in self._before.items():
                layer_weight(self.model, layer).copy_(weight)
        self._before, self.fused = {}, ()

    def remove(self) -> None:
        """Take all hooks off; weights that are fused stay so."""
        for hook in self._hooks.values():
            hook.remove()
        self.model.__dict__.pop("_lora_adapters", None)

    def _check_not_fused(self, action: str) -> None:
        if self.fused:
            raise ValueError(f"adapters {', '.join(self.fused)} are fused: unfuse them before {action}")


class _Hook:
    """Adds the active adapters' change of one layer to its output."""

    def __init__(self, adapters: Adapters, layer: str) -> None:
        self.adapters, self.layer = adapters, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        adapters, strength = self.adapters, _strength.get()
        if adapters.fused or not adapters.enabled or strength == 0:
            return output
        for name, weight in adapters.weights.items():
            change = adapters.loaded[name].get(self.layer)
            if change is not None and weight != 0:
                output = output + weight * strength * change.factor * change.output(module, args[0])
        return output

    def decisions(self) -> tuple[Any, ...]:
        """What a CUDA graph takes as given: the factors, and the memory of the matrices."""
        adapters, strength = self.adapters, _strength.get()
        if adapters.fused or not adapters.enabled or strength == 0:
            return ()
        changes = [(w, adapters.loaded[name].get(self.layer)) for name, w in adapters.weights.items()]
        return tuple(
            (w * strength * change.factor, *change.memory())
            for w, change in changes
            if change is not None and w != 0
        )


def layer_weight(model: nn.Module, layer: str) -> Tensor:
    """The weight of a linear layer or convolution."""
    found = model.get_submodule(layer)
    assert isinstance(found, (nn.Linear, nn.Conv2d))
    return found.weight


def adapters_of(model: nn.Module) -> Adapters | None:
    """The module's adapters; None if none was loaded."""
    found: Adapters | None = model.__dict__.get("_lora_adapters")
    return found


def make_adapters(model: nn.Module) -> Adapters:
    """The module's adapters, made if there are none."""
    adapters = adapters_of(model)
    if adapters is None:
        adapters = model.__dict__["_lora_adapters"] = Adapters(model)
    return adapters


@contextmanager
def _with_strength(value: float) -> Iterator[None]:
    token = _strength.set(value)
    try:
        yield
    finally:
        _strength.reset(token)


class _Unchanged:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def lora_strength(model: nn.Module, value: float | None) -> Any:
    """A context in which adapters act with a factor; in the calling thread alone.

    Args:
        value: None for 1.

    Raises:
        ValueError: the module's adapters are fused, so that they have no strength of their own.
    """
    if value is None or value == 1:
        return _Unchanged()
    adapters = adapters_of(model)
    if adapters is not None and adapters.fused:
        raise ValueError(
            f"scale is {value}, and adapters are fused: unfuse them, or give fuse_lora the scale"
        )
    return _with_strength(float(value))


def lora_state_dict(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """An adapter as in files: "<layer>.lora_A.weight" and "<layer>.lora_B.weight", alpha / r within B."""
    adapters = adapters_of(model)
    if adapters is None or adapter not in adapters.loaded:
        raise ValueError(f"there is no adapter {adapter!r}")
    tensors = {}
    for layer, change in adapters.loaded[adapter].items():
        tensors[f"{layer}.lora_A.weight"] = change.down
        tensors[f"{layer}.lora_B.weight"] = change.up * change.factor
    return tensors
