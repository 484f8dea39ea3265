"""Replacement of group normalisations, and of the activation behind a network's last one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from difusores.acceleration.session import Forward, Session, hooked
from difusores.models.layers import GroupNormAct
from difusores.ops import group_norm_silu


class GroupNormForward(Forward):
    """A group normalisation by the package's op.

    Attributes:
        network: of diffusers' networks, whose last normalisation this is: while it runs, the activation
            behind this is computed here.
    """

    how = "group norm: the package's op"
    invariant = True
    network: Any = None

    def run(self, input: Tensor) -> Tensor:
        """[N, C, *] -> the same."""
        silu = self._activates()
        out = normalize(self.module, input, silu=silu)
        if silu:
            self.session.here.activated = out
        return out

    def _activates(self) -> bool:
        running = getattr(self.session.here, "network", None)
        if self.network is None or running is not self.network:
            return False
        network: Any = self.network
        act = network.conv_act
        mine = network.conv_norm_out is self.module
        return (
            mine
            and isinstance(act.__dict__.get("forward"), LastActivationForward)
            and not (hooked(act) or hooked(self.module))
        )


class LastActivationForward(Forward):
    """The activation behind a network's last normalisation, which may have computed it."""

    how = "SiLU: by the normalisation before it"
    invariant = True

    def __call__(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            here = self.session.here
            mine, here.activated = getattr(here, "activated", None) is input, None
            if mine:
                return input
        out: Tensor = type(self.module).forward(self.module, input)
        return out


def join_last_activation(network: Any, session: Session) -> None:
    """Let the last normalisation of a network of diffusers compute the activation that follows it."""
    norm, act = (getattr(network, name, None) for name in ("conv_norm_out", "conv_act"))
    forward = norm.__dict__.get("forward") if isinstance(norm, nn.Module) else None
    if isinstance(forward, GroupNormForward) and type(act) is nn.SiLU and "forward" not in act.__dict__:
        forward.network = network
        act.__dict__["forward"] = LastActivationForward(act, session)


def normalize(norm: Any, x: Tensor, silu: bool, **terms: Any) -> Tensor:
    """A group normalisation, activated or not; terms: scale, shift, add of `group_norm_silu`."""
    out = group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu, **terms)
    assert isinstance(out, Tensor)
    return out


def plain_norm(norm: Any) -> bool:
    """Whether a block may compute this normalisation itself."""
    return type(norm) in (nn.GroupNorm, GroupNormAct) and not hooked(norm)
