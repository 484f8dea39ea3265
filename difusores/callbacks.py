"""Callbacks for pipelines that are objects, under the names that diffusers has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from difusores.configuration import ConfigMixin, register_to_config


class PipelineCallback(ConfigMixin):
    """A `callback_on_step_end` that says which tensors it is given; a subclass has `callback_fn`.

    Args:
        cutoff_step_ratio: a share of the steps, which a subclass may do something after.
        cutoff_step_index: in place of it, the number of a step, from 0 on.

    Class attributes:
        tensor_inputs: names of tensors, see `callback_on_step_end_tensor_inputs` of pipelines.

    Raises:
        ValueError: both or none of the two, or a ratio that is no share.
    """

    config_name = "config.json"
    tensor_inputs: ClassVar[Sequence[str]] = ()

    @register_to_config
    def __init__(self, cutoff_step_ratio: float | None = 1.0, cutoff_step_index: int | None = None) -> None:
        if (cutoff_step_ratio is None) == (cutoff_step_index is None):
            raise ValueError(
                f"cutoff_step_ratio is {cutoff_step_ratio} and cutoff_step_index {cutoff_step_index}; one of "
                "them has to be None"
            )
        if cutoff_step_ratio is not None and not 0 <= cutoff_step_ratio <= 1:
            raise ValueError(f"cutoff_step_ratio is {cutoff_step_ratio}; it is a share, from 0 to 1")

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What is done after a step; returns the tensors that are to be others."""
        raise NotImplementedError(f"{type(self).__name__} has to define callback_fn")

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        return self.callback_fn(pipeline, step_index, timestep, callback_kwargs)


class MultiPipelineCallbacks:
    """Several `PipelineCallback`s, one after the other; each is given what those before it return."""

    def __init__(self, callbacks: Sequence[PipelineCallback]) -> None:
        self.callbacks = list(callbacks)

    @property
    def tensor_inputs(self) -> list[str]:
        """Of all of them."""
        return [name for callback in self.callbacks for name in callback.tensor_inputs]

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        for callback in self.callbacks:
            callback_kwargs = callback(pipeline, step_index, timestep, callback_kwargs)
        return callback_kwargs


class SDCFGCutoffCallback(PipelineCallback):
    """Guidance ends behind the step of the cutoff, and half of the model's work with it."""

    tensor_inputs: ClassVar[Sequence[str]] = ("prompt_embeds",)

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Leaves the conditional half of the tensors, of the whole batch."""
        cutoff = self.config.cutoff_step_index
        if cutoff is None:
            cutoff = int(pipeline.num_timesteps * self.config.cutoff_step_ratio)
        if step_index == cutoff and pipeline.do_classifier_free_guidance:
            pipeline._guidance_scale = 0.0
            halves = {name: callback_kwargs[name].chunk(2)[-1] for name in self.tensor_inputs}
            return {**callback_kwargs, **halves}
        return callback_kwargs


class SDXLCFGCutoffCallback(SDCFGCutoffCallback):
    """The same for Stable Diffusion XL."""

    tensor_inputs = ("prompt_embeds", "add_text_embeds", "add_time_ids")
