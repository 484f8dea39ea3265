"""What diffusers' pipelines take beside a function `callback_on_step_end`: an object that names its tensors,
and `callback` with `callback_steps`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

Call = TypeVar("Call", bound=Callable[..., Any])


def takes_callback(call: Call) -> Call:
    """Decorate the `__call__` of a pipeline so that it takes these two, with a warning, and that a
    `callback_on_step_end` with `tensor_inputs` is given those.

    callback(step, timestep, latents) comes after the whole steps of the scheduler whose model call's number
    is divisible by `callback_steps`, as in diffusers, and behind `callback_on_step_end`; it may change the
    latents in place.
    """

    @functools.wraps(call)
    def wrapper(
        self: Any, *args: Any, callback: Any = None, callback_steps: int | None = None, **kwargs: Any
    ) -> Any:
        of_object = getattr(kwargs.get("callback_on_step_end"), "tensor_inputs", None)
        if of_object is not None:
            kwargs["callback_on_step_end_tensor_inputs"] = tuple(of_object)
        if callback is None and callback_steps is None:
            return call(self, *args, **kwargs)
        warnings.warn(
            "callback and callback_steps are deprecated; use callback_on_step_end",
            FutureWarning,
            stacklevel=2,
        )
        every = 1 if callback_steps is None else callback_steps
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"callback_steps is {callback_steps!r}; needed is a whole number from 1 on")
        if callback is not None:
            name = "callback_on_step_end_tensor_inputs"
            inputs = tuple(kwargs.get(name, ()))
            kwargs[name] = inputs if "latents" in inputs else (*inputs, "latents")
            kwargs["callback_on_step_end"] = _both(kwargs.get("callback_on_step_end"), callback, every)
        return call(self, *args, **kwargs)

    return cast(Call, wrapper)


def _both(first: Callable[..., Any] | None, callback: Callable[..., Any], every: int) -> Callable[..., Any]:
    """A `callback_on_step_end` that calls `first`, then `callback`."""

    def step_end(pipeline: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        answer = dict((first and first(pipeline, index, time, tensors)) or {})
        latents = answer.setdefault("latents", tensors["latents"])
        scheduler = pipeline.scheduler
        order = getattr(scheduler, "order", 1)
        steps = getattr(scheduler, "num_inference_steps", None) or len(scheduler.timesteps)
        warm_up = len(scheduler.timesteps) - steps * order
        whole = index + 1 > warm_up and (index + 1) % order == 0
        if (whole or index == pipeline.num_timesteps - 1) and index % every == 0:
            callback(index // order, time, latents)
        return answer

    return step_end
