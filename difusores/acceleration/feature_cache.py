"""Feature caching: most of a UNet is computed at some steps of a run only (approximate).

Ma et al. 2024, "DeepCache: Accelerating Diffusion Models for Free": what a UNet's deep layers give hardly
changes from step to step. At the first step of a run, and every `interval` steps from there, everything is
computed and kept; in between, the layers at full resolution nearest to input and output (`depth` of them) are
computed on the deep features of before.

A module with `CachedForward` returns what it returned, whatever it is given, so the network's own forward
runs as ever. Everything kept belongs to a thread and to one line of calls: images of one shape with the same
conditions (prompt, labels), as a run makes them, or one part of its guidance. A run begins anew where no line
fits, where the timestep does not fall, or where the images have little to do with those of the last call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from difusores.acceleration.session import Forward, Packed, Session

MOST = 4  # lines that a thread remembers: separate parts of guidance have two or three
ALIKE = 0.5  # least cosine between the images of two steps of a run; that of other noise is near 0
# Arguments that are other tensors in every step, and not conditions.
RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
ADAPTER = "down_intrablock_additional_residuals"


class Line:
    """Calls of one run with the same conditions, and what was kept of the last full one."""

    def __init__(self, conditions: list[Tensor]) -> None:
        self.conditions = [t.clone() for t in conditions]
        self.images: Tensor | None = None
        self.time = 0.0
        self.age = 0
        self.kept: dict[int, tuple[Any, int]] = {}

    def fits(self, images: Tensor, conditions: list[Tensor]) -> bool:
        """Whether these are images of its shape and the same conditions."""
        before = self.images
        return (
            before is not None
            and (before.shape, before.dtype) == (images.shape, images.dtype)
            and len(conditions) == len(self.conditions)
            and all(map(_equal, conditions, self.conditions))
        )

    def goes_on(self, images: Tensor, time: float) -> bool:
        """Whether this is a later step of its run."""
        if time >= self.time or self.images is None:
            return False
        cosine = torch.cosine_similarity(images.flatten().double(), self.images.flatten().double(), dim=0)
        return bool(cosine >= ALIKE)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and torch.equal(a, b)


@contextmanager
def caching(
    session: Session, interval: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Around a call of a UNet with these arguments: finds its line, and whether it computes everything."""
    call = _call(args, kwargs)
    if call is None:
        yield
        return
    images, time, conditions = call
    here = session.here
    lines: list[Line] = here.__dict__.setdefault("lines", [])
    line = next((known for known in lines if known.fits(images, conditions)), None)
    if line is not None:
        lines.remove(line)  # until the call has come to its end
    if line is not None and line.goes_on(images, time):
        line.age += 1
    else:
        line = Line(conditions)
    if line.age % interval == 0:
        line.kept.clear()
    line.images, line.time = images.clone(), time
    here.line = line
    try:
        yield
    finally:
        here.line = None
    lines.append(line)
    del lines[:-MOST]


def _call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, float, list[Tensor]] | None:
    """Images, timestep and conditions of a call; None where it has several times or an adapter."""
    images = args[0] if args else kwargs.get("sample")
    time = args[1] if len(args) > 1 else kwargs.get("timestep")
    others = [
        *args[2:],
        *(value for name, value in kwargs.items() if name not in ("sample", "timestep", *RESIDUALS)),
    ]
    if isinstance(time, Tensor):
        times = time.flatten()
        if times.numel() == 0 or not bool((times == times[0]).all()):
            return None
        time = times[0].item()
    adapted = kwargs.get(RESIDUALS[0]) is not None and kwargs.get(RESIDUALS[1]) is None
    if not isinstance(images, Tensor) or time is None or adapted or kwargs.get(ADAPTER) is not None:
        return None
    conditions: list[Tensor] = []
    for value in others:
        found = value.values() if isinstance(value, Mapping) else (value,)
        conditions += [t for t in found if isinstance(t, Tensor)]
    return images, float(time), conditions


class CachedForward(Forward):
    """Returns what its module returned at the last full step; at a full step, and outside runs, computes."""

    how = "feature cache: as at the last full step"
    timed = False

    def __init__(self, module: nn.Module, session: Session, inner: Forward | None) -> None:
        super().__init__(module, session)
        self.inner = inner
        if inner is not None:
            self.how = f"{CachedForward.how}; {inner.how}"
            self.declined = inner.declined

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        line: Line | None = getattr(self.session.here, "line", None)
        if line is None:
            return self._compute(args, kwargs)
        # ours takes the states that it reads off the end of a list
        states = args[1] if hasattr(self.module, "reads_states") else []
        kept = line.kept.get(id(self))
        if kept is not None:
            result, taken = kept
            if taken:
                del states[-taken:]
            return result
        before = len(states)
        result = self._compute(args, kwargs)
        line.kept[id(self)] = result, before - len(states)
        return result

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward: Callable[..., Any] | None = self.inner
        if forward is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return forward(*args, **kwargs)

    def release(self) -> None:
        if self.inner is not None:
            self.inner.release()

    def packs(self) -> Iterator[Packed]:
        return iter(()) if self.inner is None else self.inner.packs()


def cached_modules(unet: Any, depth: int) -> list[nn.Module]:
    """What is not computed in every step: all but `depth` layers on the way up at full resolution, and the
    layers on the way down whose results those read.
    """
    first, last = unet.down_blocks[0], unet.up_blocks[-1]
    found = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]
    for block, layers in (
        (first, range(depth - 1, len(first.resnets))),
        (last, range(len(last.resnets) - depth)),
    ):
        attentions = getattr(block, "attentions", None) or ()
        found += [part[i] for part in (block.resnets, attentions) for i in layers if i < len(part)]
    found += getattr(first, "downsamplers", None) or ()
    return [module for module in found if module is not None]


def install(unet: nn.Module, session: Session, depth: int) -> None:
    """Put caches around what stands there, where nobody else's forward does."""
    for module in cached_modules(unet, depth):
        forward = module.__dict__.get("forward")
        if forward is None or (isinstance(forward, Forward) and not isinstance(forward, CachedForward)):
            module.__dict__["forward"] = CachedForward(module, session, forward)
