"""Replacement of a whole network's forward: what goes in and comes out, around layers in channels_last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from difusores.acceleration.feature_cache import caching
from difusores.acceleration.layers import CHANNELS_LAST
from difusores.acceleration.session import Forward, Packed, Session
from difusores.acceleration.standing import Standing


class NetworkForward(Forward):
    """Hands images on in channels_last, and returns the layout and dtype that came.

    Its residual blocks share the product of their time projections.
    """

    how = "network: channels_last within, layout and dtype of the input outside; time projections as one GEMM"
    timed = False

    def __init__(self, module: nn.Module, session: Session) -> None:
        super().__init__(module, session)
        self._standing: Standing | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_standing": None}

    def packs(self) -> Iterator[Packed]:
        yield self.session.times.rows

    def release(self) -> None:
        self.session.times.release()

    def declines(self, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
        return None if x.ndim == 4 else "the input's shape is not [N, C, H, W]"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        name = None if args else next(iter(kwargs))
        x: Tensor = kwargs[name] if name is not None else args[0]
        inside = x.contiguous(memory_format=CHANNELS_LAST)
        if name is None:
            args = (inside, *args[1:])
        else:
            kwargs = {**kwargs, name: inside}
        here = self.session.here
        before, here.network = getattr(here, "network", None), self.module
        before_times, before_looked = self.session.times.begin(), self.session.begin()
        before_standing, here.standing = getattr(here, "standing", None), self._stands()
        try:
            with self._approximations(args, kwargs):
                out = type(self.module).forward(self.module, *args, **kwargs)
        finally:
            here.network = before
            self.session.times.end(before_times)
            self.session.end(before_looked)
            here.standing = before_standing
        last = x.is_contiguous(memory_format=CHANNELS_LAST) and not x.is_contiguous()
        layout = CHANNELS_LAST if last else torch.contiguous_format

        def outside(t: Any) -> Any:
            if isinstance(t, Tensor):
                return t.to(x.dtype).contiguous(memory_format=layout) if t.ndim == 4 else t
            if type(t) in (tuple, list):
                return type(t)(outside(part) for part in t)
            return t

        if isinstance(out, (Tensor, tuple, list)):
            return outside(out)
        for key in list(out):
            out[key] = outside(out[key])
        return out

    def _stands(self) -> Standing | None:
        """How the network stands, where its layers need not look for themselves in this pass."""
        session = self.session
        samples = session.samples_seen
        if not session.here.looked or samples is None or session.approximate or session.cuda:
            return None
        if torch.is_grad_enabled() or session.clock is not None:
            return None
        standing = self._standing
        if standing is None or standing.samples is not samples or not standing.is_as_it_was():
            standing = self._standing = Standing(self.module, samples)
        return None if standing.is_watched() else standing

    def _approximations(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """What is around a call of the network with these arguments."""
        session = self.session
        if "token_merging" in session.approximate:
            session.here.full = (args[0] if args else kwargs["sample"]).shape[2:]
        cache = session.approximate.get("feature_cache")
        return nullcontext() if cache is None else caching(session, cache.interval, args, kwargs)
