"""Several ControlNets that lead together: the sum of their residuals (Zhang et al. 2023, section 3.4)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from difusores.models.controlnet import ControlNetModel, ControlNetOutput
from difusores.models.modeling import ModelMixin


class MultiControlNetModel(ModelMixin):
    """Calls each network with its own image and scale, and adds up what they give.

    In a folder it is several: "controlnet", "controlnet_1", "controlnet_2" and so on.

    Args:
        controlnets: one or more, for the same UNet.

    Raises:
        ValueError: there is none, or one is no `ControlNetModel`.
    """

    nets: nn.ModuleList

    def __init__(self, controlnets: Sequence[ControlNetModel]) -> None:
        super().__init__()
        others = [type(net).__name__ for net in controlnets if not isinstance(net, ControlNetModel)]
        if others or not controlnets:
            found = ", ".join(others) or "nothing"
            raise ValueError(f"controlnets has {found}; needed is one ControlNetModel or more")
        self.nets = nn.ModuleList(controlnets)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None,
        controlnet_cond: Sequence[torch.Tensor],
        conditioning_scale: Sequence[float],
        *options: Any,
        return_dict: bool = True,
        **named: Any,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The sum of the residuals.

        Args:
            controlnet_cond, conditioning_scale: one for each network.
            return_dict: return a `ControlNetOutput`; else a tuple of its two entries.

        The other arguments are those of `ControlNetModel.forward`.

        Raises:
            ValueError: there are more or fewer images or scales than networks.
        """
        counts = len(controlnet_cond), len(conditioning_scale)
        if counts != (len(self.nets),) * 2:
            raise ValueError(
                f"there are {counts[0]} images and {counts[1]} scales for {len(self.nets)} ControlNets"
            )
        down: list[torch.Tensor] = []
        mid: Any = None
        for net, image, scale in zip(self.nets, controlnet_cond, conditioning_scale, strict=True):
            states, lowest = net(
                sample, timestep, encoder_hidden_states, image, scale, *options, return_dict=False, **named
            )
            down = [a + b for a, b in zip(down, states, strict=True)] if down else list(states)
            mid = lowest if mid is None else mid + lowest
        if not return_dict:
            return tuple(down), mid
        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=mid)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """Write each network into a folder of its own; arguments: see `ModelMixin.save_pretrained`."""
        for folder, net in zip(_folders(save_directory, len(self.nets)), self.nets, strict=True):
            assert isinstance(net, ControlNetModel)
            net.save_pretrained(folder, *args, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        **options: Any,
    ) -> MultiControlNetModel:
        """Read as many networks as there are folders; options: see `ModelMixin.from_pretrained`.

        Raises:
            OSError: there is no such folder. Hub repositories have to be downloaded first.
        """
        first = os.path.join(pretrained_model_name_or_path, subfolder or "")
        count = 0
        while os.path.isdir(_folders(first, count + 1)[-1]):
            count += 1
        if not count:
            raise OSError(
                f"{first!r} is no folder of this machine, and several ControlNets are read from one"
            )
        return cls([ControlNetModel.from_pretrained(path, **options) for path in _folders(first, count)])


def _folders(first: str | os.PathLike[str], count: int) -> list[str]:
    path = os.fspath(first).rstrip("/")
    return [path, *(f"{path}_{k}" for k in range(1, count))]
