"""What callers of diffusers' pipelines ask for to save memory: models that take turns on a GPU, and names of
what is done here anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

TOGETHER = ("unet", "controlnet")
"""Components that are called in turns in every step."""


class Offload:
    """Keeps models on the CPU, and brings the one that is called to a device.

    Args:
        groups: models of one group are there together; a call of one sends those of the others back.
        device: where they compute; tensors that they are given come along.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Module]], device: torch.device) -> None:
        self.device = device
        self.here: Sequence[nn.Module] = ()
        self.handles: list[Any] = []
        for group in groups:
            enter = partial(self._enter, group)
            for model in group:
                model.to("cpu")
                for module in (model, *model.children()):  # autoencoders are called by their parts
                    self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))

    def _enter(
        self, group: Sequence[nn.Module], module: nn.Module, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        if group is not self.here:
            self.send_back()
            for model in group:
                model.to(self.device)
            self.here = group
        there = tree_map_only(Tensor, lambda tensor: tensor.to(self.device), (args, kwargs))
        return there[0], there[1]

    def send_back(self) -> None:
        """All models to the CPU."""
        for model in self.here:
            model.to("cpu")
        self.here = ()

    def end(self) -> None:
        """All models to the CPU, where they stay."""
        self.send_back()
        for handle in self.handles:
            handle.remove()


class MemorySavers:
    """Methods of every pipeline, with diffusers' names."""

    components: Any
    _offload: Offload | None = None

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the models on the CPU, but for the one that computes: it takes turns with the others on a GPU.

        On a CPU nothing is to be done. The last one stays on the GPU until another is called. For one thread.

        Args:
            gpu_id, device: which; the first GPU if neither is given, and the CPU where there is none.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        target = torch.device(device)
        if gpu_id is not None and target.type != "cpu":
            target = torch.device(target.type, gpu_id)
        self.remove_all_hooks()
        if target.type == "cpu":
            return
        models = {name: value for name, value in self.components.items() if isinstance(value, nn.Module)}
        together = [models.pop(name) for name in TOGETHER if name in models]
        self._offload = Offload([together, *([model] for model in models.values())], target)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """On a CPU nothing is to be done; for a GPU it is refused.

        Raises:
            NotImplementedError: there is a GPU, or `device` is one.
        """
        if device is None and gpu_id is None and not torch.cuda.is_available():
            return
        if device is None or torch.device(device).type != "cpu":
            raise NotImplementedError(
                "layers are not moved one by one: enable_model_cpu_offload moves whole models, and "
                "enable_separate_guidance and enable_vae_tiling take less memory too"
            )

    def remove_all_hooks(self) -> None:
        """End what `enable_model_cpu_offload` began; all models are on the CPU then."""
        if self._offload is not None:
            self._offload.end()
            self._offload = None

    def maybe_free_model_hooks(self) -> None:
        """Send the model that `enable_model_cpu_offload` has left on the GPU to the CPU."""
        if self._offload is not None:
            self._offload.send_back()

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Nothing: attention holds no table of scores that slices could make smaller."""

    def disable_attention_slicing(self) -> None:
        """Nothing, see `enable_attention_slicing`."""

    def enable_xformers_memory_efficient_attention(
        self, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """Nothing: attention takes no more memory than xFormers' already, and xFormers is not asked for."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Nothing, see `enable_xformers_memory_efficient_attention`."""

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Nothing: it changes no number, and `accelerate` computes them together where that is faster."""

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Nothing, see `fuse_qkv_projections`."""
