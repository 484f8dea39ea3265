"""Calls of a model as CUDA graphs: of one that is wrapped, or of all networks of a pipeline that denoise."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from difusores.graphs import (
    Graph,
    capturing,
    decisions,
    described,
    forget_graphs,
    graphs_of,
    refusal,
    settings,
)

NETWORKS = ("unet", "controlnet", "transformer")
"""The components of pipelines that are called at each step."""


class Graphed:
    """A model whose calls are replayed as CUDA graphs; where gradients are recorded,
    or within another capture, it is called as it is.

    Tensors in its arguments, also in tuples, lists and dictionaries, may have other values at each call; all
    else is constant: another value, another graph. Results are new tensors. The model's `decisions` are those
    of when this was made: make one for each run.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.of_model = decisions(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.launch(self.model, self.of_model, args, kwargs)

    def launch(
        self,
        call: Callable[..., Any],
        of_model: tuple[object, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """`call`, which is the model or stands for it, as a graph among the model's."""
        if torch.is_grad_enabled() or capturing() is not None:
            return call(*args, **kwargs)
        tensors: list[Tensor] = []
        kind = _describe((args, kwargs), tensors)
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
        reason = refusal(device)
        if reason is not None:
            raise ValueError(reason)

        def function(*inputs: Tensor) -> Any:
            given, named = _replaced((args, kwargs), iter(inputs))
            return call(*given, **named)

        graphs = graphs_of(self.model)
        of_call = ("call", kind, settings())
        with graphs.lock:
            graph = graphs.find((of_call, of_model))
            if graph is not None:
                return graph.replay(tensors)
            graph = Graph(function, tensors, graphs.recorder(device))
            self.of_model = of_model = decisions(self.model)  # parameters may move at their first use
            graphs.keep((of_call, of_model), graph)
            result, graph.result = graph.result, None
            return result


class GraphedCall(Graphed):
    """Stands where `nn.Module.compile` puts a compiled call, in front of hooks and `forward`.

    So `accelerate`, hooks and adapters come and go behind it, and copies and pickles of the module are
    without it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.before = module._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.model
        return self.launch(self.before or module._call_impl, decisions(module), args, kwargs)


def enable_cuda_graph(model_or_pipe: Any) -> None:
    """Launch each call of a network without gradients as one CUDA graph, with the same bits.

    The first call with inputs of a shape is captured. New prompts and images need no new graph, nor do new
    values in the memory of parameters, such as fused adapters. A call with parameters elsewhere, with
    adapters of another strength or other layers is captured anew. See docs/cuda_graphs.md.

    Args:
        model_or_pipe: a network on a CUDA device; or a pipeline of this package or of diffusers, whose
            `NETWORKS` are meant.

    Raises:
        TypeError: neither a module nor a pipeline with such components.
        ValueError: parameters are on another device.
    """
    networks = list(_networks(model_or_pipe))
    for network in networks:
        for parameter in network.parameters():
            reason = refusal(parameter.device)
            if reason is not None:
                raise ValueError(reason)
    for network in networks:
        if not isinstance(network._compiled_call_impl, GraphedCall):
            network._compiled_call_impl = GraphedCall(network)


def disable_cuda_graph(model_or_pipe: Any) -> None:
    """Launch kernel after kernel again, and give the graphs' memory back.

    Raises:
        TypeError: see `enable_cuda_graph`.
    """
    for network in _networks(model_or_pipe):
        call = network._compiled_call_impl
        if isinstance(call, GraphedCall):
            network._compiled_call_impl = call.before
        forget_graphs(network)


def _networks(given: Any) -> Iterator[nn.Module]:
    if isinstance(given, nn.Module):
        yield given
        return
    components = getattr(given, "components", None)
    found = [components.get(name) for name in NETWORKS] if isinstance(components, Mapping) else []
    modules = [part for part in found if isinstance(part, nn.Module)]
    if not modules:
        raise TypeError(
            f"a network or a pipeline with one of {', '.join(NETWORKS)} is needed, got {type(given).__name__}"
        )
    yield from modules


def _describe(value: Any, tensors: list[Tensor]) -> Hashable:
    """An argument without its tensors, which go to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return described(value)
    if type(value) in (tuple, list):
        return (type(value), *(_describe(part, tensors) for part in value))
    if type(value) is dict:
        return (dict, *((name, _describe(part, tensors)) for name, part in value.items()))
    if not isinstance(value, Hashable):
        raise TypeError(f"a CUDA graph is not captured with a {type(value).__name__} among its arguments")
    return type(value), value


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """An argument with these tensors, in the order of `_describe`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if type(value) in (tuple, list):
        return type(value)(_replaced(part, tensors) for part in value)
    if type(value) is dict:
        return {name: _replaced(part, tensors) for name, part in value.items()}
    return value
