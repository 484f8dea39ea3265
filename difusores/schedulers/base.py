"""What all schedulers share: files, tables, the state that callers see, and one step through the op."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from difusores import schedules, solvers
from difusores.configuration import ConfigMixin
from difusores.ops import scheduler_step
from difusores.ops.scheduler_step import MODE, OUTPUTS, PX, shortcut
from difusores.outputs import BaseOutput
from difusores.plan import Noise, Plan, Stage, Threshold
from difusores.sampling import (
    Generators,
    draw_noise,
    dynamic_threshold,
    joined,
    noise_dtype,
    split_output,
)

Self = TypeVar("Self", bound="SchedulerMixin")

COMPATIBLES = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSDEScheduler",
    "EDMEulerScheduler",
]
"""Schedulers for models of one kind, which read each other's configurations."""

MOST_ROWS = 4096
"""Rows that a scheduler keeps: more than there are training steps."""


@dataclass
class SchedulerOutput(BaseOutput):
    """What `step` returns.

    Attributes:
        prev_sample: the next sample, like `sample`.
    """

    prev_sample: Tensor


class SchedulerMixin(ConfigMixin):
    """Base of all schedulers: configuration files under one name."""

    config_name = "scheduler_config.json"
    has_compatibles = True

    @classmethod
    def from_pretrained(
        cls: type[Self],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Build a scheduler from a folder, file or Hub id; `kwargs` as in `load_config` and `from_config`."""
        config, unused = cls.load_config(
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, **kwargs
        )
        return cls.from_config(config, return_unused_kwargs=return_unused_kwargs, **unused)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the configuration into a folder, as `save_config` does."""
        self.save_config(save_directory, push_to_hub, **kwargs)

    @property
    def compatibles(self) -> list[type[ConfigMixin]]:
        """The classes of this package that read this scheduler's configuration."""
        return self._get_compatibles()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


@dataclass
class PredictedSchedulerOutput(SchedulerOutput):
    """What `step` of most classes returns.

    Attributes:
        prev_sample: the next sample, like `sample`.
        pred_original_sample: x0 as predicted at this step, clipped or thresholded, like `sample`.
    """

    pred_original_sample: Tensor | None = None


class CachedStage(NamedTuple):
    """A stage as `step` needs it.

    row: [40] float64 on the CPU; packed: the same as bytes, which C reads without asking torch. outputs: of
    the op. slots: positions in (*results, sample, noise, *slots) of what the slots hold afterwards.
    predicts_x0: x0 is the model's output itself. targets: positions of the outputs in OUTPUTS.
    """

    row: Tensor
    noise: Noise | None
    learned: bool
    threshold: Threshold | None
    outputs: tuple[str, ...]
    slots: tuple[int, ...]
    predicts_x0: bool
    targets: tuple[int, ...]
    packed: bytes


class _Times(NamedTuple):
    """`timesteps` as numbers, and where it lies in memory: an element of it is known by its address."""

    timesteps: Tensor
    version: int
    start: int
    width: int
    values: list[float]


class _Grid(NamedTuple):
    """`timesteps` as numbers, and where it lies in memory: an element of it is known by its address.

    The versions count changes in place of `timesteps` and of `table`, which is alphas_cumprod.
    """

    timesteps: Tensor
    version: int
    start: int
    width: int
    values: list[int]
    table: Tensor
    table_version: int


KEYS_OF_ROWS = frozenset({"timesteps", "sigmas", "num_inference_steps"})
"""Attributes that rows are kept by, so that the next run on the same grid finds its rows."""
_PLAIN = (bool, int, float, str, list, tuple, type(None))


def _same(old: Any, new: Any) -> bool:
    """Whether an assignment changes nothing, which `set_timesteps` often does."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        on_cpu = new.device.type == old.device.type == "cpu"
        return on_cpu and new.dtype is old.dtype and torch.equal(old, new)
    return type(new) in _PLAIN and type(old) is type(new) and bool(old == new)


class TableScheduler(SchedulerMixin):
    """Base of the schedulers with betas as the noise schedule: tables, and rows kept between calls.

    Rows are built when first needed and kept until an attribute without leading underscore, or the
    configuration, is assigned, or timesteps or alphas_cumprod are changed in place.

    Attributes:
        betas, alphas, alphas_cumprod: [T] float32.
        timesteps: [steps] int64, descending. A sequence or array that is assigned to this or to
            alphas_cumprod becomes a tensor.
        num_inference_steps: None before `set_timesteps`.
        init_noise_sigma: standard deviation of the first sample.
        order: model calls per step.
    """

    _compatibles: ClassVar[list[str]] = COMPATIBLES
    order: ClassVar[int] = 1
    timesteps: Tensor
    num_inference_steps: int | None
    alphas_cumprod: Tensor
    _rows: dict[Any, Any]

    def _initialize(self) -> None:
        """Tables and state from the configuration."""
        config = self.config
        table = schedules.betas(
            config["beta_schedule"],
            config["num_train_timesteps"],
            config.get("beta_start", 0.0),
            config.get("beta_end", 0.0),
            config.get("trained_betas"),
            config.get("rescale_betas_zero_snr", False),
        )
        self.betas = table.float()
        self.alphas = schedules.alphas(self.betas)
        self.alphas_cumprod = schedules.alphas_cumprod(table).float()
        self.num_inference_steps = None
        self.timesteps = torch.arange(config["num_train_timesteps"] - 1, -1, -1, device="cpu")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("timesteps", "alphas_cumprod") and not isinstance(value, Tensor):
            value = torch.from_numpy(np.array(value))
        if isinstance(value, Tensor) and value.is_inference():
            # inference tensors have no version counter, by which a change in place is noticed
            with torch.inference_mode(False):
                value = value.clone()
        unchanged = _same(self.__dict__.get(name, _PLAIN), value)
        super().__setattr__(name, value)
        if name in KEYS_OF_ROWS:
            self._regrid()
        elif not unchanged and (not name.startswith("_") or name == "_internal_dict"):
            self._forget()

    def _empty(self) -> dict[str, Any]:
        """What is kept between calls, as it is when nothing is kept."""
        return {"_rows": {}}

    def _forget(self) -> None:
        self.__dict__.update(self._empty())

    def _regrid(self) -> None:
        """`timesteps`, or what goes with it, was assigned; rows are kept by it."""
        self.__dict__["_known"] = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy's tensors lie elsewhere in memory, and count their changes anew
        return {**self.__dict__, **self._empty(), "_host": None, "_scales": (None, [])}

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    def _prediction(self) -> solvers.Prediction:
        config = self.config
        threshold = None
        if config.get("thresholding"):
            threshold = Threshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
        clip = config["clip_sample_range"] if config["clip_sample"] else None
        return solvers.Prediction(config["prediction_type"], clip, threshold)

    def _plan(self, stages: Sequence[Stage]) -> Plan:
        name = type(self).__name__.removesuffix("Scheduler")
        return Plan(name, tuple(stages), self.config["prediction_type"], tuple(self.betas.tolist()))

    def _times(self) -> list[float]:
        """`timesteps` as numbers, read from the device only where a caller put another tensor there."""
        return self._host_times().values

    def _host_times(self) -> _Times:
        t, known = self.timesteps, self.__dict__.get("_host")
        if known is None or known.timesteps is not t or known.version != t._version:
            return self._keep_times(t.tolist())
        return known  # type: ignore[no-any-return]

    def _keep_times(self, values: list[Any]) -> _Times:
        """These are the numbers of `timesteps`."""
        t = self.timesteps
        width = max(t.stride(0), 1) * t.element_size()
        known = self.__dict__["_host"] = _Times(t, t._version, t.data_ptr(), width, values)
        return known

    def _value(self, timestep: float | Tensor) -> float:
        """A timestep as a number; an element of `timesteps` is known by its address and not read."""
        if isinstance(timestep, Tensor):
            known = self._host_times()
            place, odd = divmod(timestep.data_ptr() - known.start, known.width)
            if odd == 0 and 0 <= place < len(known.values) and timestep.ndim == 0:
                return known.values[place]
        return float(timestep)


class DiscreteScheduler(TableScheduler):
    """Base of the schedulers whose model is told a training step, and whose step depends on that alone."""

    init_noise_sigma: float
    returned: ClassVar[tuple[str, ...]] = ("y", "x0")
    """The op's outputs that `step` returns."""
    _known: _Grid | None
    _numbers: list[float] | None
    _tables: dict[torch.device, Tensor]
    _seen: tuple[Tensor, int] | None

    def _initialize(self) -> None:
        super()._initialize()
        self.init_noise_sigma = 1.0

    def _empty(self) -> dict[str, Any]:
        return {"_rows": {}, "_known": None, "_numbers": None, "_tables": {}, "_seen": None}

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The model's input: the sample itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a) * original_samples + sqrt(1 - a) * noise, a = alphas_cumprod[timesteps].

        Args:
            original_samples, noise: [B, ...].
            timesteps: [B] int64, training steps.
        """
        table = self._table(original_samples.device)
        return solvers.forward_process(table, original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a "v_prediction" model predicts, sqrt(a) * noise - sqrt(1 - a) * sample; see `add_noise`."""
        return solvers.forward_process(self._table(sample.device), sample, noise, timesteps, velocity=True)

    def _table(self, device: torch.device) -> Tensor:
        """[T] float64 alphas_cumprod on a device."""
        self._current_grid()
        table = self._tables.get(device)
        if table is None:
            table = self._tables[device] = self.alphas_cumprod.to(device).double()
        return table

    def _alphas(self) -> list[float]:
        """alphas_cumprod as numbers."""
        self._current_grid()
        numbers = self._numbers
        if numbers is None:
            numbers = self._numbers = self.alphas_cumprod.tolist()
        return numbers

    def _number(self, timestep: Any) -> int:
        """A timestep as a number; an element of `timesteps` is known by its address and not read."""
        grid = self._current_grid()
        if not isinstance(timestep, Tensor):
            return int(timestep)
        if timestep.ndim == 0:
            index, odd = divmod(timestep.data_ptr() - grid.start, grid.width)
            if 0 <= index < len(grid.values) and odd == 0:
                return grid.values[index]
        if timestep.numel() != 1:
            raise ValueError(f"step takes one timestep, got a tensor of shape {tuple(timestep.shape)}")
        return int(timestep)

    def _set_grid(self, values: list[int], device: str | torch.device | None) -> None:
        device = "cpu" if device is None else device
        self.timesteps = torch.tensor(values, dtype=torch.int64, device=device)
        self._read_grid(values)

    def _current_grid(self) -> _Grid:
        """The grid; where it or alphas_cumprod has changed, a new one, and all that was kept is forgotten."""
        grid = self._known
        if (
            grid is None
            or grid.timesteps._version != grid.version
            or grid.table._version != grid.table_version
        ):
            return self._read_grid()
        return grid

    def _read_grid(self, values: list[int] | None = None) -> _Grid:
        t, table = self.timesteps, self.alphas_cumprod
        if self._seen is None or self._seen[0] is not table or self._seen[1] != table._version:
            self._forget()
            self._seen = (table, table._version)
        width = max(t.stride(0), 1) * t.element_size()
        values = values or [int(value) for value in t.tolist()]
        self._known = grid = _Grid(t, t._version, t.data_ptr(), width, values, table, table._version)
        return grid

    def _cache(self, key: Any, stage: Stage, returned: tuple[str, ...] | None = None) -> CachedStage:
        cached = cached_stage(stage, returned or self.returned)
        if len(self._rows) >= MOST_ROWS:  # eta may be another number at each call
            self._rows = {}
        self._rows[key] = cached
        return cached

    def _stride(self) -> int:
        """Training steps from one timestep to the next."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps before step")
        return len(self) // self.num_inference_steps

    def _cached_each(
        self, timesteps: Tensor, stages: Callable[[int], Iterable[Stage]], *key: Any
    ) -> list[CachedStage]:
        """The stage of every timestep, kept under (timestep, *key)."""
        self._current_grid()
        found = []
        for t in timesteps.tolist():
            cached = self._rows.get((t, *key))
            found.append(cached or self._cache((t, *key), next(iter(stages(t)))))
        return found

    def _advance(
        self,
        cached: CachedStage,
        model_output: Tensor,
        sample: Tensor,
        generator: Generators,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """(next sample, predicted original sample)."""
        return advance(cached, model_output, sample, generator, noise)[0]


def cached_stage(stage: Stage, returned: tuple[str, ...]) -> CachedStage:
    outputs = (
        *returned,
        *(name for name in ("d", "u", "x0") if name in stage.slots and name not in returned),
    )
    places = {**{name: i for i, name in enumerate(outputs)}, "x": len(outputs), "z": len(outputs) + 1}
    places |= {f"s{k}": len(outputs) + 2 + k for k in range(5)}
    row = torch.tensor(stage.row, dtype=torch.float64, device="cpu")
    learned = stage.row[MODE] != 0
    return CachedStage(
        row,
        stage.noise,
        learned,
        stage.threshold,
        outputs,
        tuple(places[name] for name in stage.slots),
        stage.row[PX] == 0,
        tuple(OUTPUTS.index(name) for name in outputs),
        np.array(stage.row, dtype=np.float64).tobytes(),
    )


def advance(
    cached: CachedStage,
    model_output: Tensor,
    sample: Tensor,
    generator: Generators,
    noise: Tensor | None = None,
    slots: tuple[Tensor, ...] = (),
    upcast: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Carry out a stage: (the op's outputs, what the slots hold afterwards).

    upcast: y in the model output's dtype and everything else in float32 at least, as the classes of diffusers
        do that compute in float32 and cast back.
    """
    _, draw, learned, threshold, _, places, _, targets, row = cached
    variance = None
    if learned:
        shape = torch.Size((len(model_output), *sample.shape[1:]))
        (model_output,), variance = split_output(model_output, shape, learned)
    if draw is not None and noise is None:
        noise = drawn(draw, sample, model_output, generator)
    if variance is None and threshold is None and (not upcast or sample.dtype is torch.float32):
        module = shortcut()
        if module is not None:
            made = module.plain_step(row, sample, model_output, noise, slots, targets, places)
            if made is not None:
                return made  # type: ignore[no-any-return]
    if model_output.dtype is not sample.dtype and not upcast:
        sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
    sample, model_output, noise, variance = _broadcast(sample, model_output, noise, variance)
    results = _step_by_general_way(cached, sample, model_output, slots, noise, variance, upcast)
    held = (*results, sample, noise, *slots)
    return results, tuple([held[place].resolve_neg() for place in places])  # read as they lie in memory later


def drawn(draw: Noise, sample: Tensor, model_output: Tensor, generator: Generators) -> Tensor:
    """The noise of a stage, the last of its draws."""
    dtype = noise_dtype(draw, sample, model_output)
    for _ in range(draw.draws):
        noise = draw_noise(model_output.shape, generator, model_output.device, dtype)
    return noise


def _step_by_general_way(
    cached: CachedStage,
    sample: Tensor,
    model_output: Tensor,
    slots: tuple[Tensor, ...],
    noise: Tensor | None,
    variance: Tensor | None,
    upcast: bool,
) -> tuple[Tensor, ...]:
    row, outputs, threshold = cached.row, cached.outputs, cached.threshold
    operands: dict[str, Any] = {"noise": noise, "variance": variance}
    if threshold is not None:
        (x0,) = scheduler_step(row, sample, (model_output,), slots, outputs=("x0",), **operands)
        operands["threshold"] = dynamic_threshold(x0, *threshold)
    if upcast and (sample.dtype is not torch.float32 or model_output.dtype is not torch.float32):
        wide = torch.promote_types(torch.float32, model_output.dtype)
        narrow = ("y", "x0") if cached.predicts_x0 else ("y",)
        dtypes = [model_output.dtype if name in narrow else wide for name in outputs]
        operands["out"] = [torch.empty_like(sample, dtype=dtype) for dtype in dtypes]
    return scheduler_step(row, sample, (model_output,), slots, outputs=outputs, **operands)


def advance_each(
    cached: Sequence[CachedStage], model_output: Tensor, sample: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The op's outputs where each image has a stage of its own, for which no noise is drawn here.

    cached: one per image, or one for all of them. The results are at least float32, as in diffusers.
    """
    wide = torch.promote_types(sample.dtype, torch.float32)
    sample, model_output, noise = _broadcast(sample.to(wide), model_output, noise)
    if len(cached) not in (1, len(sample)):
        raise ValueError(f"one timestep or one per image: {len(sample)} images, {len(cached)} timesteps")
    stages = cached if len(cached) == len(sample) else [*cached] * len(sample)
    noises = [None] * len(sample) if noise is None else noise.split(1)
    images = zip(stages, model_output.split(1), sample.split(1), noises, strict=True)
    made = [advance(stage, e, x, None, z)[0] for stage, e, x, z in images]
    return tuple(joined(parts) for parts in zip(*made, strict=True))


def _broadcast(sample: Tensor, *others: Tensor | None) -> Any:
    """All at one shape: a sample, model output or noise of batch 1 goes with every batch, as in diffusers."""
    given = [t for t in (sample, *others) if t is not None]
    if all(t.shape == sample.shape for t in given):
        return [sample, *others]
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in given))
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in given)
        raise ValueError(f"sample, model output and noise have shapes {shapes}, which do not fit") from error
    return [None if t is None else t.expand(shape) for t in (sample, *others)]
