"""A sampler as data: an immutable list of stages, each one call of the model and one row of coefficients.

`difusores.solvers` writes the rows, `difusores.ops.scheduler_step` carries one out, and `Plan.run` is the
whole loop. A plan holds no tensors and no state, so any number of threads may run the same one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from difusores.brownian import BrownianNoise, BrownianPath
from difusores.ops.scheduler_step import CIN, COLUMNS, DRAW, G1, HI, LO, MODE, NU0, NU1, PE, PX, ROW, R, W
from difusores.sampling import Callback, Generators, Model, Rescale, philox_keys, sample

BINDINGS = ("x", "y", "x0", "d", "u", "z", "s0", "s1", "s2", "s3", "s4")
"""What a slot can hold after a stage: the sample before or after it, an output, its noise, another slot."""


class Noise(NamedTuple):
    """Standard normal noise drawn at a stage, whether or not the row then reads it.

    Attributes:
        draws: draws taken from the generator; the last one is z.
        dtype: "float32" and so on; None is that of the model's output, "sample" that of the sample,
            "promoted" what the two promote to.
        span: of which part of a Brownian path z is the increment, as two noise levels.
    """

    draws: int = 1
    dtype: str | None = None
    span: tuple[float, float] | None = None


class Threshold(NamedTuple):
    """Dynamic thresholding (Saharia et al. 2022, "Imagen", section 2.3).

    Attributes:
        ratio: quantile of |x0| within an image, in [0, 1].
        largest: upper limit of that quantile; the lower one is 1.
    """

    ratio: float
    largest: float


@dataclass(frozen=True)
class Stage:
    """One model call and what follows it.

    Attributes:
        time: what the model is told, in its own units.
        row: 40 numbers in the layout of `difusores.ops.scheduler_step`.
        c_in: the model's input is c_in * x.
        noise: None draws nothing.
        threshold: None clamps x0 to the row's limits.
        slots: names from BINDINGS that slots 0, 1, ... hold afterwards.
        calls_model: False where the row reads no model output, and none is asked for.
    """

    time: float
    row: tuple[float, ...]
    c_in: float = 1.0
    noise: Noise | None = None
    threshold: Threshold | None = None
    slots: tuple[str, ...] = ()
    calls_model: bool = True

    def __post_init__(self) -> None:
        if len(self.row) != ROW:
            raise ValueError(f"a row has {ROW} numbers, got {len(self.row)}")
        finite = (*self.row[:LO], *self.row[HI + 1 :], self.time, self.c_in)
        if not all(map(math.isfinite, finite)):
            raise ValueError(f"the coefficients at time {self.time} are not finite: {format_row(self.row)}")
        if len(self.slots) > 5 or not set(self.slots) <= set(BINDINGS):
            raise ValueError(f"at most five slots, each one of {', '.join(BINDINGS)}; got {self.slots}")


def make_row(
    x0: tuple[float, float],
    y: Mapping[str, float],
    d: Mapping[str, float] | None = None,
    u: Mapping[str, float] | None = None,
    *,
    clip: tuple[float, float] = (-math.inf, math.inf),
    churn: float = 0.0,
    mode: int = 0,
    nu: tuple[float, float] = (0.0, 0.0),
) -> tuple[float, ...]:
    """A row with one model output.

    Args:
        x0: (p_x, p_e), x0 = p_x * xh + p_e * e.
        y, d, u: weights over the operands "x0", "xh", "e", "z", "s0" ... "s4"; the others are zero.
        clip: limits of x0.
        churn: r, xh = x + r * z.
        mode: 0 leaves z, 1 scales it by exp(nu[0] + nu[1] * v), 2 by sqrt(v).
    """
    row = [0.0] * ROW
    row[G1], row[R], row[MODE], row[CIN] = 1.0, churn, float(mode), 1.0
    row[PX], row[PE] = x0
    row[LO], row[HI] = clip
    row[NU0], row[NU1] = nu
    for k, weights in enumerate((y, d or {}, u or {})):
        for name, weight in weights.items():
            row[W + 9 * k + COLUMNS.index(name)] = weight
    return tuple(map(float, row))


def _noise(draws: int, dtype: str | None, span: Sequence[float] | None) -> Noise:
    return Noise(draws, dtype, None if span is None else (span[0], span[1]))


def _path(lowest: float, highest: float, seed: int | Sequence[int] | None) -> BrownianPath:
    return BrownianPath(lowest, highest, tuple(seed) if isinstance(seed, Sequence) else seed)


def format_row(row: Sequence[float]) -> str:
    """A row as equations, for people."""

    def combine(weights: Sequence[float], names: Sequence[str]) -> str:
        terms = [f"{weight:+.6g} {name}" for weight, name in zip(weights, names, strict=True) if weight != 0]
        return " ".join(terms) or "0"

    equations = [f"x0 = {combine(row[PX : PE + 1], ('x', 'e'))}"]
    if row[LO] != -math.inf or row[HI] != math.inf:
        equations[0] += f" in [{row[LO]:g}, {row[HI]:g}]"
    if row[R] != 0:
        equations.insert(0, f"x = x {row[R]:+.6g} z")
    if row[MODE] != 0:
        scale = f"exp({row[NU0]:.6g} {row[NU1]:+.6g} v)" if row[MODE] == 1 else "sqrt(v)"
        equations.append(f"z = z {scale}")
    names = [name.replace("xh", "x") for name in COLUMNS]
    for k, name in enumerate("ydu"):
        weights = row[W + 9 * k : W + 9 * k + 9]
        if any(weights):
            equations.append(f"{name} = {combine(weights, names)}")
    return "; ".join(equations)


@dataclass(frozen=True)
class Plan:
    """All stages of one sampling run: immutable, hashable and comparable by value.

    Attributes:
        sampler: its name, for people.
        stages: in order. Each row is completed with the next stage's c_in and the number of its own noise
            draw (from 1; 0 is left for the initial sample).
        prediction_type: what the model has to predict: one of `PREDICTION_TYPES` of the solvers, "score", or
            "-epsilon", the negative of the noise.
        betas: the training schedule that the rows are made for.
        continuous: whether times are real numbers (the model is told float32) or training steps (int64).
        init_noise_sigma: standard deviation of the first sample.
        path: the Brownian path that `span` of the stages' noise refers to. None: each noise is drawn on its
            own, spans or none.
    """

    sampler: str
    stages: tuple[Stage, ...]
    prediction_type: str
    betas: tuple[float, ...]
    continuous: bool = False
    init_noise_sigma: float = 1.0
    path: BrownianPath | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a plan needs at least one stage")
        noises = [stage.noise for stage in self.stages if stage.noise is not None]
        if self.path is not None and any(noise.span is None for noise in noises):
            raise ValueError("every noise of a plan with a Brownian path needs a span of it")
        c_in = [*(stage.c_in for stage in self.stages[1:]), 1.0]
        completed = []
        for i, stage in enumerate(self.stages):
            row = list(stage.row)
            row[CIN], row[DRAW] = c_in[i], float(i + 1)
            completed.append(replace(stage, row=tuple(row)))
        object.__setattr__(self, "stages", tuple(completed))

    def __len__(self) -> int:
        return len(self.stages)

    def __str__(self) -> str:
        time = "continuous" if self.continuous else "discrete"
        lines = [f"{self.sampler}: {len(self)} stages, predicts {self.prediction_type}, {time} time"]
        if self.path is not None:
            lines[0] += f", noise of a Brownian path over [{self.path.lowest:g}, {self.path.highest:g}]"
        for i, stage in enumerate(self.stages):
            line = f"{i:4d}  t = {stage.time:<10.6g} {format_row(stage.row)}"
            if stage.threshold is not None:
                line += f"; threshold at quantile {stage.threshold.ratio:g} <= {stage.threshold.largest:g}"
            if stage.noise is not None:
                line += f"; draws {stage.noise.draws}"
                if stage.noise.span is not None:
                    line += " from {:g} to {:g}".format(*stage.noise.span)
            if stage.slots:
                line += f"; slots <- {', '.join(stage.slots)}"
            lines.append(line)
        return "\n".join(lines)

    def table(self) -> Tensor:
        """All rows, [stages, 40] float64 on the CPU; a new tensor at each call."""
        rows = [stage.row for stage in self.stages]
        return torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(-1, ROW)

    def times(self, device: torch.device | str = "cpu") -> Tensor:
        """What the model is told, [stages]: int64, or float32 for continuous time."""
        dtype = torch.float32 if self.continuous else torch.int64
        return torch.tensor([stage.time for stage in self.stages], dtype=dtype, device=device)

    def to_json(self) -> str:
        """The plan as JSON (infinite limits as strings); `from_json` gives back an equal plan."""
        content = asdict(self)
        for stage in content["stages"]:
            stage["row"] = [v if math.isfinite(v) else str(v) for v in stage["row"]]
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not JSON, or not a plan.
        """
        content = json.loads(text)
        try:
            stages = [
                Stage(
                    time=stage["time"],
                    row=tuple(map(float, stage["row"])),
                    c_in=stage["c_in"],
                    noise=None if stage["noise"] is None else _noise(*stage["noise"]),
                    threshold=None if stage["threshold"] is None else Threshold(*stage["threshold"]),
                    slots=tuple(stage["slots"]),
                    calls_model=stage["calls_model"],
                )
                for stage in content.pop("stages")
            ]
            path = content.pop("path", None)
            return cls(
                **{**content, "stages": tuple(stages), "betas": tuple(content["betas"])},
                path=None if path is None else _path(*path),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this JSON is not a plan: {error!r}") from error

    def run(
        self,
        model: Model,
        x: Tensor,
        *,
        generator: Generators = None,
        callback: Callback | None = None,
        noise: str = "torch",
        seeds: Sequence[int] | Tensor | None = None,
        guidance: Sequence[float] | None = None,
        model_dtype: torch.dtype | None = None,
        graph: bool = False,
        shift: Callable[[], Tensor] | None = None,
        rescale: Rescale = 0.0,
        conditional: int = 0,
    ) -> Tensor:
        """Sample: call the model and carry out a row, stage after stage, without gradients.

        Args:
            model: model(input, time) -> output, or an output object or tuple that begins with it. input: like
                x, in `model_dtype`, repeated for guidance. time: a 0-dim tensor on x's device. output: like
                input, or with twice the channels (the second half is the learned variance, or not used).
            x: [B, C, ...], fp32, bf16, fp16 or fp64, of standard deviation `init_noise_sigma`. Not changed.
            generator: source of the noise: one, one per image, or None for the global one. Where the plan has
                a Brownian `path`, their initial seeds are the path's, unless it has its own.
            callback: callback(stage, time, sample) after each stage; may return another sample. The one it is
                given is overwritten later: clone it to keep it.
            noise: "torch" draws as diffusers draws; "philox" makes the noise inside the op from `seeds`,
                independent of batch, device and backend. It needs no torchsde: the increments of a Brownian
                path are independent, which is refused where a plan asks for parts that overlap.
            seeds: [B] integers, one per image, for "philox" alone.
            guidance: up to three weights. The input is repeated that often along the batch, and the outputs
                are combined with these weights inside the op: (w, 1 - w) for conditional and unconditional.
            model_dtype: dtype of the model's input; x's if None.
            graph: on a CUDA device, launch the whole run as one CUDA graph, with the same bits. The first run
                of a plan with samples of a shape and dtype goes as ever and is captured then; new noise,
                seeds and guidance weights need no new graph, nor do new values in the memory of the model's
                parameters and of tensors that it knows. Pass the same `model` object each time: graphs are
                kept with it, see `difusores.graphs`. With a callback, or in a run of more than 128 stages,
                each call of the model is a graph.
            shift: asked after each call of the model; what it returns, like x, is added to the next sample
                inside the op. Not with `graph`.
            rescale: share of the guided output that is brought to the deviation of the conditional one, from
                0 to 1, see `difusores.ops.guidance_rescale` (Lin et al. 2024, section 3.4); or what gives it,
                asked after each call of the model, not with `graph`.
            conditional: number of the guidance weight whose output is the conditional one, -1 for the last.
                A learned variance is that output's too.

        Returns:
            The last sample, a new tensor like x.

        Raises:
            ImportError: the noise is of a Brownian path, and torchsde is missing.
            RuntimeError: the model cannot be captured, for example because it reads values back.
            ValueError: an option that is not one of the above, or shapes that do not fit; or `graph` where
                tensors are on no CUDA device, or no kernel takes the step.
        """
        keys = philox_keys(noise, seeds, generator, x)
        if keys is not None and self.path is not None and self._spans_overlap():
            raise ValueError(
                "noise='philox' draws independent noise, and this plan's is of parts of a Brownian path that "
                "overlap"
            )
        path = self.path

        @cache
        def begun(dtype: torch.dtype) -> BrownianNoise:
            assert path is not None
            return path.begin(torch.empty_like(x, dtype=dtype), generator)

        def of_path(noise: Noise, dtype: torch.dtype) -> Tensor:
            assert noise.span is not None
            return begun(dtype)(*noise.span)

        return sample(
            self,
            model,
            x,
            generator=generator,
            callback=callback,
            keys=keys,
            weights=(1.0,) if guidance is None else tuple(guidance),
            model_dtype=model_dtype or x.dtype,
            noise_sampler=None if path is None else of_path,
            graph=graph,
            shift=shift,
            rescale=rescale,
            conditional=conditional,
        )

    def _spans_overlap(self) -> bool:
        noises = [stage.noise for stage in self.stages if stage.noise is not None]
        spans = sorted(sorted(noise.span) for noise in noises if noise.span is not None)
        return any(high > low for (_, high), (low, _) in pairwise(spans))
