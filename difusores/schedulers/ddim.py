"""DDIM, batched and inverse too (Song et al. 2021, "Denoising diffusion implicit models")."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import register_to_config
from difusores.plan import Plan, Stage
from difusores.sampling import Generators
from difusores.schedulers.base import DiscreteScheduler, SchedulerOutput, advance_each


@dataclass
class DDIMSchedulerOutput(SchedulerOutput):
    """What `DDIMScheduler.step` returns.

    Attributes:
        prev_sample: the next sample, like `sample`.
        pred_original_sample: x0 as predicted at this step, clipped or thresholded, like `sample`.
    """

    pred_original_sample: Tensor | None = None


@dataclass
class DDIMParallelSchedulerOutput(DDIMSchedulerOutput):
    """What `DDIMParallelScheduler.step` returns: as `DDIMSchedulerOutput`."""


class DDIMScheduler(DiscreteScheduler):
    """Drop-in for the class of the same name in diffusers 0.42.

    Args:
        num_train_timesteps: T.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: see
            `difusores.schedules.betas`.
        clip_sample, clip_sample_range: clamp the predicted x0 to [-clip_sample_range, clip_sample_range].
        set_alpha_to_one: after the last step alphas_cumprod is 1 instead of its value at training step 0.
        prediction_type: "epsilon", "sample" or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding, in place of
            clipping.
        timestep_spacing, steps_offset: see `difusores.schedules.timesteps`.
    """

    _output: ClassVar[type[DDIMSchedulerOutput]] = DDIMSchedulerOutput

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._initialize()

    def _initialize(self) -> None:
        super()._initialize()
        one = torch.tensor(1.0, dtype=torch.float32, device="cpu")
        self.final_alpha_cumprod = one if self.config["set_alpha_to_one"] else self.alphas_cumprod[0]

    def _timesteps(self, num_inference_steps: int) -> list[int]:
        config = self.config
        return schedules.timesteps(
            config["timestep_spacing"], int(num_inference_steps), len(self), config["steps_offset"]
        )

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the training steps at which the model is called.

        Args:
            num_inference_steps: how many, from 1 to T, spaced by the configuration.
            device: where `self.timesteps` is put.

        Raises:
            ValueError: out of range.
        """
        values = self._timesteps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._set_grid(values, device)

    def plan(
        self,
        num_inference_steps: int,
        *,
        begin: int = 0,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Plan:
        """The run from step `begin` on as an immutable plan; the scheduler's own state stays as it is.

        The other arguments and Raises: as `set_timesteps` and `step`.
        """
        timesteps = self._timesteps(num_inference_steps)[begin:]
        stride = len(self) // int(num_inference_steps)
        steps = [(t, t - stride) for t in timesteps]
        return self._plan([*self._stages(steps, eta, use_clipped_model_output)])

    def _stages(self, steps: Any, eta: float, use_clipped_model_output: bool) -> Any:
        return solvers.ddim(
            self._alphas(),
            steps,
            self._prediction(),
            final_alpha_cumprod=self._final(),
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
        )

    def _final(self) -> float:
        final: Any = self.final_alpha_cumprod
        if isinstance(final, Tensor):
            final = final.tolist()
        return float(final)

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """The variance at eta = 1, which editing pipelines of diffusers read; 0-dim float32."""
        a = self._alphas()
        before = a[prev_timestep] if prev_timestep >= 0 else self._final()
        variance = solvers.ddim_variance(a[timestep], before)
        return torch.tensor(variance, dtype=torch.float32, device="cpu")

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """One step back in time.

        Args:
            model_output: [B, C, ...].
            timestep: where the sample is; an element of `self.timesteps` costs no read.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            eta: 0 is deterministic, 1 adds the noise of DDPM; below 0 see `difusores.solvers.ddim`.
            use_clipped_model_output: take the noise from the clipped x0 instead of the model's output.
            generator: source of the noise, drawn where eta > 0; a list draws one image each.
            variance_noise: the noise itself, like model_output, in place of a generator.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: `set_timesteps` was not called, or generator and variance_noise are both given.
        """
        t = self._number(timestep)
        eta = float(eta)
        key = (t, eta, use_clipped_model_output, self.num_inference_steps)
        cached = self._rows.get(key)
        if cached is None:
            steps = [(t, t - self._stride())]
            cached = self._cache(key, next(self._stages(steps, eta, use_clipped_model_output)))
        if cached.noise is not None and variance_noise is not None and generator is not None:
            raise ValueError("generator and variance_noise cannot both be given")
        result = self._advance(
            cached, model_output, sample, generator, variance_noise if cached.noise is not None else None
        )
        return self._output(*result) if return_dict else result


class DDIMParallelScheduler(DDIMScheduler):
    """`DDIMScheduler` that also takes each image at a timestep of its own; drop-in as there, same options."""

    _output = DDIMParallelSchedulerOutput

    def _get_variance(self, timestep: int, prev_timestep: int | None = None) -> Tensor:
        before = timestep - self._stride() if prev_timestep is None else prev_timestep
        return super()._get_variance(timestep, before)

    def batch_step_no_noise(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """One step of every image from its own timestep (Shih et al. 2023, "ParaDiGMS").

        Args:
            model_output, sample: [B, C, ...].
            timesteps: [B] int64. After the last one alphas_cumprod is 1, whatever set_alpha_to_one says, as
                in diffusers.
            eta: 0, since no noise is drawn.
            use_clipped_model_output: see `step`.

        Raises:
            ValueError: eta is not 0, or `set_timesteps` was not called.
        """
        if eta != 0:
            raise ValueError(f"batch_step_no_noise draws no noise: eta must be 0, got {eta}")
        stride = self._stride()
        prediction = self._prediction()

        def stages(t: int) -> Iterable[Stage]:
            steps = [(t, t - stride)]
            clipped = use_clipped_model_output
            return solvers.ddim(self._alphas(), steps, prediction, use_clipped_model_output=clipped)

        cached = self._cached_each(timesteps, stages, "each", use_clipped_model_output)
        return advance_each(cached, model_output, sample)[0]


class DDIMInverseScheduler(DiscreteScheduler):
    """Drop-in for the class of the same name in diffusers 0.42: from the image to its noise.

    Args:
        set_alpha_to_one: before the first step alphas_cumprod is 1 instead of its value at training step 0.
        timestep_spacing: "leading" or "trailing".
        kwargs: `set_alpha_to_zero`, the old name of set_alpha_to_one, which it takes the place of.

    The other options are those of `DDIMScheduler`.
    """

    _compatibles: ClassVar[list[str]] = []
    _deprecated_kwargs: ClassVar[list[str]] = ["set_alpha_to_zero"]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        **kwargs: Any,
    ) -> None:
        old = kwargs.pop("set_alpha_to_zero", None)
        if kwargs:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(kwargs)}")
        if old is not None:
            message = "set_alpha_to_zero is deprecated; the option is called set_alpha_to_one"
            warnings.warn(message, FutureWarning, stacklevel=3)
            set_alpha_to_one = old
        self._initialize()
        one = torch.tensor(1.0, dtype=torch.float32, device="cpu")
        self.initial_alpha_cumprod = one if set_alpha_to_one else self.alphas_cumprod[0]
        self.timesteps = self.timesteps.flip(0)

    def _timesteps(self, num_inference_steps: int) -> list[int]:
        config, spacing = self.config, self.config["timestep_spacing"]
        if spacing not in ("leading", "trailing"):
            raise ValueError(f"timestep_spacing must be 'leading' or 'trailing', got {spacing!r}")
        offset = config["steps_offset"]
        return schedules.timesteps(spacing, int(num_inference_steps), len(self), offset)[::-1]

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the training steps that the run reaches, ascending; as `DDIMScheduler.set_timesteps`."""
        values = self._timesteps(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._set_grid(values, device)

    def plan(self, num_inference_steps: int) -> Plan:
        """The run as an immutable plan; the scheduler's own state is neither used nor changed."""
        values = self._timesteps(num_inference_steps)
        return self._plan([*self._stages(values, len(self) // int(num_inference_steps))])

    def _stages(self, timesteps: Iterable[int], stride: int) -> Iterable[Stage]:
        initial: Any = self.initial_alpha_cumprod
        return solvers.ddim_inverse(
            self._alphas(),
            [(t, min(t - stride, len(self) - 1)) for t in timesteps],
            self._prediction(),
            initial_alpha_cumprod=float(initial),
        )

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """One step forward in time.

        Args:
            model_output: [B, C, ...], the model having been told `timestep`.
            timestep: where the step leads; an element of `self.timesteps` costs no read.
            sample: [B, C, ...]; fp32, fp64, fp16 or bf16. Not changed.
            return_dict: False returns the tuple (prev_sample, pred_original_sample).

        Raises:
            ValueError: `set_timesteps` was not called.
        """
        t = self._number(timestep)
        cached = self._rows.get(t)
        if cached is None:
            cached = self._cache(t, next(iter(self._stages([t], self._stride()))))
        result = self._advance(cached, model_output, sample, None)
        return DDIMSchedulerOutput(*result) if return_dict else result
