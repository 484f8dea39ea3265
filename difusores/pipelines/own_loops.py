"""What the loop of diffusers' text-to-image pipeline calls, for subclasses with a `__call__` of their own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difusores.models.embeddings import Timesteps
from difusores.pipelines.guidance import rescaled
from difusores.pipelines.latent import LatentPipeline, check_callback_inputs
from difusores.pipelines.prompts import check_prompts
from difusores.sampling import Generators, draw_noise


def retrieve_timesteps(
    scheduler: Any,
    num_inference_steps: int | None = None,
    device: str | torch.device | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """Set a scheduler's steps; (its timesteps, their number as `num_inference_steps` counts them).

    Args:
        timesteps, sigmas: in place of `num_inference_steps`, for schedulers that take them.
        options: of the scheduler's `set_timesteps`.

    Raises:
        ValueError: both are given, or the scheduler takes no such thing.
    """
    given = {"timesteps": timesteps, "sigmas": sigmas}
    custom = {name: value for name, value in given.items() if value is not None}
    if len(custom) == 2:
        raise ValueError("only one of timesteps and sigmas can be given")
    for name in custom:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__}.set_timesteps takes no {name}")
    if custom:
        scheduler.set_timesteps(device=device, **custom, **options)
        return scheduler.timesteps, len(scheduler.timesteps)
    scheduler.set_timesteps(num_inference_steps, device=device, **options)
    return scheduler.timesteps, int(num_inference_steps or 0)


def rescale_noise_cfg(noise_cfg: Tensor, noise_pred_text: Tensor, guidance_rescale: float = 0.0) -> Tensor:
    """See `rescaled`."""
    return rescaled(noise_cfg, noise_pred_text, guidance_rescale)


class OwnLoops(LatentPipeline):
    """Parts of a loop. They set and read `pipeline.scheduler` itself, so such a loop is for one thread."""

    @property
    def _is_unet_config_sample_size_int(self) -> bool:
        return isinstance(self.unet.config["sample_size"], int)

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int,
        width: int,
        callback_steps: int | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ) -> None:
        """Nothing, where arguments of a call fit together.

        Raises:
            NotImplementedError: an IP adapter's image is given.
            TypeError, ValueError: arguments that do not fit, see `check_prompts`.
        """
        if callback_steps is not None and (not isinstance(callback_steps, int) or callback_steps < 1):
            raise ValueError(f"callback_steps is {callback_steps!r}; needed is a whole number from 1 on")
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            raise NotImplementedError("there are no IP adapters: their images have to be None")
        self._image_size(height, width, None)
        check_callback_inputs(self, callback_on_step_end_tensor_inputs or ())
        check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise [batch_size, num_channels_latents, h, w], or `latents`, with the scheduler's first deviation.

        height, width: in pixels.

        Raises:
            ValueError: there are other numbers of generators and of images.
        """
        factor = self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // factor, width // factor)
        if isinstance(generator, Sequence) and len(generator) != batch_size:
            raise ValueError(f"there are {len(generator)} generators for {batch_size} images")
        if latents is None:
            latents = draw_noise(shape, generator, torch.device(device), dtype)
        scaled: Tensor = latents.to(device) * self.scheduler.init_noise_sigma
        return scaled

    def prepare_extra_step_kwargs(self, generator: Generators, eta: float) -> dict[str, Any]:
        """Those of `generator` and `eta` that the scheduler's `step` takes."""
        given = {"eta": eta, "generator": generator}
        known = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in given.items() if name in known}

    def get_guidance_scale_embedding(
        self, w: Tensor, embedding_dim: int = 512, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """[N, embedding_dim] sinusoids of N weights, less 1, for models that are told the guidance."""
        waves: Tensor = Timesteps(embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1)(1000 * w)
        return waves.to(dtype)
