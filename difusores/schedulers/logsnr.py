"""What the schedulers share that solve in lambda = log(alpha / sigma): DPM-Solver, DEIS, UniPC, SA-Solver."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import ConfigMixin
from difusores.plan import Plan, Threshold
from difusores.sampling import Generators, split_output
from difusores.schedulers.base import SchedulerOutput
from difusores.schedulers.indexed import IndexedScheduler
from difusores.schedules import SigmaGrid


class LogSnrScheduler(IndexedScheduler):
    """Base of schedulers whose sample is alpha * x0 + sigma * noise and whose model is told training steps.

    Attributes:
        sigmas: sigma / alpha, or sigma itself with use_flow_sigmas, where alpha is 1 - sigma.
        alpha_t, sigma_t, lambda_t: [T] float32, of the training steps.
    """

    returned = ("y",)
    continuous = False
    absent_is_last = True
    grid_kinds: ClassVar[tuple[str, ...]] = schedules.LAMBDA_KINDS
    ascending: ClassVar[bool] = False
    """Whether a run leads from the image to the noise."""
    init_noise_sigma: float
    _common: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "time_shift_type": ("exponential",),
        "variance_type": (None, *solvers.VARIANCE_TYPES),
    }
    """What options of most classes may be. No variance but a learned one counts: it is the solver's."""
    _choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """What options of the class may be."""
    _foreign: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """What stands for the values that options have in other classes' configurations."""

    def _initialize(self) -> None:
        known = {name: self._common[name] for name in self._common if name in self.config}
        adopt_names(self, known | dict(self._choices), self._foreign)
        if str(self.config.get("variance_type")).startswith("fixed"):
            self._as_in_diffusers("variance_type")
        if self.config.get("use_dynamic_shifting") and not self.config["use_flow_sigmas"]:
            self._without_effect(
                "use_dynamic_shifting=True needs use_flow_sigmas=True: no other levels are shifted"
            )
        super()._initialize()
        if self.config.get("rescale_betas_zero_snr"):
            # lambda would be infinite. The smallest number of float16 is as good as 0.
            self.alphas_cumprod[-1] = 2**-24
        self._kind()
        self.alpha_t, self.sigma_t, self.lambda_t = schedules.signal_noise_lambda(self.alphas_cumprod)
        self.sigmas = torch.from_numpy(schedules.training_sigmas(self.alphas_cumprod))
        self.timesteps = self.timesteps.float()
        self.init_noise_sigma = 1.0
        self._restart()

    def _kind(self) -> str | None:
        """The kind of grid that the configuration asks for."""
        kinds = [kind for kind in self.grid_kinds if self.config.get(_option(kind))]
        if len(kinds) > 1:
            names = " and ".join(map(_option, kinds))
            raise ValueError(
                f"only one of {', '.join(map(_option, self.grid_kinds))} can be used, got {names}"
            )
        return kinds[0] if kinds else None

    def _rounded(self) -> tuple[str, ...]:
        """The kinds of grid whose times are rounded; the others are cut off."""
        return ("karras",)

    def _shift(self, mu: float | None) -> float:
        """What "flow" noise levels are shifted by.

        Raises:
            ValueError: mu where the configuration has no use for it.
        """
        config = self.config
        if mu is None:
            return float(config.get("flow_shift", 1.0))
        asked = (config.get("use_dynamic_shifting"), config.get("time_shift_type"), config["use_flow_sigmas"])
        if asked != (True, "exponential", True):
            raise ValueError(
                "mu needs use_flow_sigmas=True, use_dynamic_shifting=True and time_shift_type='exponential', "
                f"got {asked[2]}, {asked[0]} and {asked[1]!r}"
            )
        return math.exp(mu)

    def _last_timestep(self) -> int:
        """T, or the training step from which on lambda is below lambda_min_clipped."""
        clipped = self.config.get("lambda_min_clipped", -math.inf)
        return sum(value >= clipped for value in self.lambda_t.tolist())

    def _levels(
        self,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | None = None,
        mu: float | None = None,
        last: float | None = 0.0,
    ) -> SigmaGrid:
        """The grid of so many steps, or at given training steps.

        Args:
            last: where the run ends; None is the last level once more.

        Raises:
            ValueError: not one of the two, or one that the configuration leaves no room for.
        """
        config, kind = self.config, self._kind()
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("exactly one of num_inference_steps and timesteps has to be given")
        if timesteps is not None:
            if kind is not None:
                raise ValueError(f"cannot take timesteps with {_option(kind)}, which chooses its own")
            times = [int(t) for t in timesteps]
            if not times or min(times) < 0 or max(times) >= len(self):
                raise ValueError(f"timesteps must hold training steps from 0 to {len(self) - 1}, got {times}")
        elif kind is None:
            spacing, offset = config.get("timestep_spacing", "linspace"), config.get("steps_offset", 0)
            steps = int(num_inference_steps or 0)
            inner = schedules.inversion_timesteps if self.ascending else schedules.inner_timesteps
            times = inner(spacing, steps, len(self), offset, self._last_timestep())
        else:
            times = []
            if int(num_inference_steps or 0) < 1:
                raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        return schedules.lambda_grid(
            schedules.training_sigmas(self.alphas_cumprod),
            times,
            int(num_inference_steps or len(times)),
            kind=kind,
            sigma_min=config.get("sigma_min"),
            sigma_max=config.get("sigma_max"),
            shift=self._shift(mu),
            rounded=self._rounded(),
            last=last,
            ascending=self.ascending,
        )

    def _end(self) -> float:
        """Where final_sigmas_type lets the run end."""
        ends = {"zero": 0.0, "sigma_min": float(schedules.training_sigmas(self.alphas_cumprod)[0])}
        end = ends.get(self.config["final_sigmas_type"])
        if end is None:
            name = self.config["final_sigmas_type"]
            raise ValueError(f"final_sigmas_type must be 'zero' or 'sigma_min', got {name!r}")
        return end

    def _set(self, grid: SigmaGrid, device: str | torch.device | None) -> None:
        device = "cpu" if device is None else device
        times = list(grid.timesteps)
        self.timesteps = torch.tensor(times, dtype=torch.int64, device=device)
        self._keep_times(times)
        self.sigmas = torch.tensor(grid.sigmas, dtype=torch.float32, device="cpu")
        self.num_inference_steps = len(times)
        self._restart()

    def _signal_noise(self, sigmas: Sequence[float]) -> list[tuple[float, float]]:
        """(alpha, sigma) of each of `sigmas`."""
        if self.config.get("use_flow_sigmas"):
            return [(1 - sigma, sigma) for sigma in sigmas]
        return [(1 / math.sqrt(sigma * sigma + 1), sigma / math.sqrt(sigma * sigma + 1)) for sigma in sigmas]

    def _prediction(self) -> solvers.Prediction:
        config = self.config
        threshold = None
        if config.get("thresholding"):
            threshold = Threshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
        return solvers.Prediction(config["prediction_type"], threshold=threshold)

    def _plan_at(self, grid: SigmaGrid, begin: int, **options: Any) -> Plan:
        return self._plan([*self._stages(grid, begin, **options)])

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The model's input: the sample itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha * original_samples + sigma * noise at each image's timestep, or at the run's place.

        Args:
            original_samples, noise: [B, ...].
            timesteps: [B], elements of `timesteps`; after `set_begin_index` only their number counts.
        """
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            index = self._run.index if self._run.index is not None else self._begin_index
            indices = [index] * len(timesteps)
        return solvers.mix(self._signal_noise(self.sigmas[indices].tolist()), original_samples, noise)

    def _step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        if self.config.get("variance_type") in ("learned", "learned_range"):
            (model_output,), _ = split_output(model_output, sample.shape, False)
        if self.upcast and self.config["prediction_type"] != "sample":
            # the result has the dtype of what the sample and the output are combined to
            model_output = model_output.to(torch.promote_types(sample.dtype, model_output.dtype))
        if variance_noise is not None:
            variance_noise = variance_noise.to(model_output.device)
        result = self._take(model_output, timestep, sample, generator, variance_noise)
        return SchedulerOutput(*result) if return_dict else result


def _option(kind: str) -> str:
    return "use_lu_lambdas" if kind == "lu" else f"use_{kind}_sigmas"


def adopt_names(
    scheduler: ConfigMixin,
    choices: Mapping[str, tuple[str | None, ...]],
    foreign: Mapping[str, Mapping[str, str]],
) -> None:
    """Replace what stands in for an option's value in other classes' configurations.

    Args:
        choices: what options may be. foreign: what replaces the names of others.

    Raises:
        NotImplementedError: none of the two.
    """
    for option, allowed in choices.items():
        name = scheduler.config[option]
        if name in foreign.get(option, {}):
            scheduler.register_to_config(**{option: foreign[option][name]})
        elif name not in allowed:
            raise NotImplementedError(f"{option} must be one of {', '.join(map(str, allowed))}, got {name!r}")
