"""Carrying out a plan: guidance, noise, dynamic thresholds, slots and the buffers of one sampling run.

All state is local to a call of `sample`, so that threads may share a plan. Nothing here reads a value back
from a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from difusores import graphs
from difusores.cuda_graph import Graphed
from difusores.ops import guidance_rescale, scheduler_step
from difusores.ops.scheduler_step import CIN, COLUMNS, G1, HI, LO, MODE, ROW, W, shortcut, why_not_captured

if TYPE_CHECKING:
    from difusores.plan import Noise, Plan

    NoiseSampler = Callable[[Noise, torch.dtype], Tensor]

SHIFTED = 4  # the slot of what is added to the next sample
Generators = torch.Generator | Sequence[torch.Generator] | None
Model = Callable[[Tensor, Tensor], Any]
Callback = Callable[[int, Tensor, Tensor], Tensor | None]
Rescale = float | Callable[[], float]

LONGEST = 128
"""Stages that are captured as one graph; in a longer run each call of the model is one."""


def sample(
    plan: Plan,
    model: Model,
    x: Tensor,
    *,
    generator: Generators,
    callback: Callback | None,
    keys: Tensor | None,
    weights: tuple[float, ...],
    model_dtype: torch.dtype,
    noise_sampler: NoiseSampler | None = None,
    graph: bool = False,
    shift: Callable[[], Tensor] | None = None,
    rescale: Rescale = 0.0,
    conditional: int = 0,
) -> Tensor:
    """The loop behind `Plan.run`.

    keys: [B] int64 for noise made inside the op, or None. weights: of guidance, (1.0,) for none.
    noise_sampler: gives z, of the dtype it is told or like x, in place of the generator.
    """
    if not 1 <= len(weights) <= 3:
        raise ValueError(f"guidance takes one to three weights, got {len(weights)}")
    if not -len(weights) <= conditional < len(weights):
        raise ValueError(f"conditional is {conditional}; there are {len(weights)} guidance weights")
    if graph and callable(rescale):
        raise ValueError("graph=True: rescale has to be a number, which a graph takes as given")
    table = plan.table()
    table[:, G1 : G1 + len(weights)] = torch.tensor(weights, dtype=torch.float64, device="cpu")
    if shift is not None:
        if graph or any(len(stage.slots) > SHIFTED for stage in plan.stages):
            raise ValueError("a shift needs the last slot for itself, and a run that is no graph")
        table[:, W + COLUMNS.index(f"s{SHIFTED}")] = 1.0
    run = _Run(plan, len(weights), model_dtype, generator, rescale, conditional)
    with torch.no_grad():
        if graph and graphs.capturing() is None:
            reason = graphs.refusal(x.device) or why_not_captured(x, keys, model_dtype)
            if reason is not None:
                raise ValueError(f"graph=True: {reason}")
            if callback is None and len(plan) <= LONGEST:
                return _replay(run, model, x, table, keys, noise_sampler)
            model = Graphed(model)
        times = plan.times(x.device)
        return run.carry_out(model, x, table, times, keys, noise_sampler, callback, shift)


@dataclass
class _Run:
    """A plan with what its stages need beside tensors.

    Attributes:
        weights: how many weights guidance has.
        rescale, conditional: see `Plan.run`.
    """

    plan: Plan
    weights: int
    model_dtype: torch.dtype
    generator: Generators
    rescale: Rescale
    conditional: int

    def carry_out(
        self,
        model: Model,
        x: Tensor,
        table: Tensor,
        times: Tensor,
        keys: Tensor | None,
        noise_sampler: NoiseSampler | None,
        callback: Callback | None = None,
        shift: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """The stages. table, times: [stages, 40] and [stages], on x's device for a graph."""
        plan, weights, model_dtype = self.plan, self.weights, self.model_dtype
        rows, moments = table.unbind(0), times.unbind(0)
        buffers = _Buffers(x, model_dtype, weights)
        x = buffers.dense(x)
        slots: tuple[Tensor, ...] = ()
        given = buffers.model_input(x, plan.stages[0].c_in)
        for i, stage in enumerate(plan.stages):
            e, v, factor = [x], None, None
            if stage.calls_model:
                output, learned = model(given, moments[i]), stage.row[MODE] != 0
                e, v = split_output(output, x.shape, learned, weights, self.conditional)
                factor = self.factor(rows[i], e, buffers)
            z = None
            if stage.noise is not None and keys is None:
                dtype = noise_dtype(stage.noise, x, e[0])
                if noise_sampler is not None:
                    z = noise_sampler(stage.noise, dtype)
                else:
                    z = buffers.noise(stage.noise, dtype, self.generator, keep="z" in stage.slots)
            operands: dict[str, Any] = {"noise": z, "variance": v, "factor": factor, "seeds": keys}
            if stage.threshold is not None:
                (x0,) = scheduler_step(rows[i], x, e, slots, outputs=("x0",), **operands)
                operands["threshold"] = dynamic_threshold(x0, *stage.threshold)

            names = ["y", *(name for name in ("d", "u", "x0") if name in stage.slots)]
            out = buffers.take(len(names), held=(x, *slots))
            last, c_in = i + 1 == len(plan), stage.row[CIN]
            given = out[0] if last else buffers.input_for(out[0], c_in)
            if given is not out[0]:
                operands |= {"model_dtype": model_dtype, "model_repeats": weights}
                names, out = [*names, "m"], [*out, given]
            read: tuple[Tensor | None, ...] = slots
            if shift is not None:
                read = (*slots, *(None,) * (SHIFTED - len(slots)), shift())
            scheduler_step(rows[i], x, e, read, outputs=names, out=out, **operands)

            bound: dict[str, Any] = {"x": x, "z": z, **{f"s{k}": slot for k, slot in enumerate(slots)}}
            bound.update(zip(names, out, strict=True))
            x, slots = out[0], tuple(bound[name] for name in stage.slots)
            replaced = callback(i, moments[i], x) if callback is not None else None
            if replaced is not None and replaced is not x:
                x = buffers.dense(replaced)
                given = buffers.model_input(x, c_in)
        return x

    def factor(self, row: Tensor, e: list[Tensor], buffers: _Buffers) -> Tensor | None:
        """That of the guided output, for the step that follows; None: no rescale."""
        share = self.rescale() if callable(self.rescale) else self.rescale
        if not share:
            return None
        return guidance_rescale(row, e, share, conditional=self.conditional, out=buffers.factors(e[0]))


class _FixedNoise:
    """The noise of all stages of a graph, each in memory of its own; drawn by the host in the loop's order.

    So whatever draws it, a generator of any device or a Brownian path, gives the numbers that it gives
    without a graph.
    """

    def __init__(self) -> None:
        self.drawn: list[tuple[Noise, torch.dtype, Tensor]] = []
        self.next = 0

    def first(self, draw: NoiseSampler) -> NoiseSampler:
        """For the run before the capture: what is drawn is kept."""

        def sampler(noise: Noise, dtype: torch.dtype) -> Tensor:
            if graphs.capturing() is None:
                self.drawn.append((noise, dtype, draw(noise, dtype)))
                return self.drawn[-1][2]
            self.next += 1
            return self.drawn[self.next - 1][2]

        return sampler

    def again(self, draw: Callable[[Noise, torch.dtype, Tensor], Tensor]) -> None:
        """For a replay: other numbers in the same memory."""
        for noise, dtype, z in self.drawn:
            draw(noise, dtype, z)


def _replay(
    run: _Run,
    model: Model,
    x: Tensor,
    table: Tensor,
    keys: Tensor | None,
    noise_sampler: NoiseSampler | None,
) -> Tensor:
    """The whole run as one graph: `carry_out` captured, and replayed where it was."""

    def draw(noise: Noise, dtype: torch.dtype, z: Tensor | None = None) -> Tensor:
        if noise_sampler is not None:
            made = noise_sampler(noise, dtype)
            return made if z is None else z.copy_(made)
        if z is None:
            z = torch.empty(x.shape, dtype=dtype, device=x.device)
        for _ in range(noise.draws):
            draw_noise(z.shape, run.generator, z.device, dtype, out=z)
        return z

    kept = graphs.graphs_of(model)
    of_run = (
        *(run.plan, run.weights, run.model_dtype, run.rescale, run.conditional),
        *(keys is None, graphs.described(x), graphs.settings()),
    )
    inputs = [x, table, run.plan.times(), *(() if keys is None else (keys,))]
    with kept.lock:
        found: tuple[graphs.Graph, _FixedNoise] | None = kept.find((of_run, graphs.decisions(model)))
        if found is not None:
            graph, noise = found
            result: Tensor = graph.replay(inputs, before=lambda: noise.again(draw))
            return result
        noise = _FixedNoise()
        sampler = noise.first(draw)

        def function(x: Tensor, table: Tensor, times: Tensor, keys: Tensor | None = None) -> Tensor:
            return run.carry_out(model, x, table, times, keys, sampler)

        graph = graphs.Graph(function, inputs, kept.recorder(x.device))
        # looked at again: parameters may move at their first use
        kept.keep((of_run, graphs.decisions(model)), (graph, noise))
        result, graph.result = graph.result, None
        return result


def split_output(
    output: Any, shape: torch.Size, learned: bool, copies: int = 1, conditional: int = 0
) -> tuple[list[Tensor], Tensor | None]:
    """The model outputs e_k, one per copy of the batch, and one copy's learned variance v or None.

    Args:
        output: [copies * B, C or 2 * C, ...], or an object that begins with it. Nothing is copied.
        shape: of the sample, [B, C, ...].
        learned: whether the second half of the channels has to be there.
        conditional: the copy whose variance is meant.

    Raises:
        ValueError: another shape.
    """
    if not isinstance(output, Tensor):
        output = output[0]
    channels = shape[1]
    double = output.ndim == len(shape) and output.shape[1] == 2 * channels
    expected = (copies * shape[0], 2 * channels if learned or double else channels, *shape[2:])
    if tuple(output.shape) != expected:
        kind = "a learned" if learned else "no learned"
        raise ValueError(
            f"the model returned {tuple(output.shape)}; a sample of {tuple(shape)}, {copies} guidance "
            f"weights and {kind} variance need {expected}"
        )
    parts = output.chunk(copies) if copies > 1 else (output,)
    if not double:
        return list(parts), None
    return [part[:, :channels] for part in parts], parts[conditional][:, channels:]


def dynamic_threshold(x0: Tensor, ratio: float, largest: float) -> Tensor:
    """s of dynamic thresholding: the quantile of |x0| within each image, limited to [1, largest].

    Args:
        x0: [B, ...], unclamped.

    Returns:
        [B], fp32 (fp64 for an fp64 x0).
    """
    images = x0.flatten(1).abs()
    images = images if x0.dtype is torch.float64 else images.float()
    # of two infinities, where x0 has overflowed float16, torch.quantile makes NaN
    images = images.clamp(max=torch.finfo(images.dtype).max)
    if len(images) == 0:
        return images.new_empty(0)
    return _quantile(images, ratio).clamp(min=1, max=largest)


def _quantile(rows: Tensor, ratio: float) -> Tensor:
    """torch.quantile of each row, with its bits, without its reads by the host and its limit of 2**24."""
    precise = np.float64 if rows.dtype is torch.float64 else np.float32
    rank = precise(ratio) * precise(rows.shape[1] - 1)
    below = int(rank)
    rows = rows.sort(dim=1).values
    between = torch.lerp(rows[:, below], rows[:, math.ceil(rank)], float(rank - precise(below)))
    last = rows[:, -1]  # NaN where there is one
    return torch.where(last.isnan(), last, between)


def noise_dtype(noise: Noise, sample: Tensor, model_output: Tensor) -> torch.dtype:
    """The dtype in which a stage's noise is drawn."""
    if noise.dtype is None:
        return model_output.dtype
    if noise.dtype == "sample":
        return sample.dtype
    if noise.dtype == "promoted":
        return torch.promote_types(sample.dtype, model_output.dtype)
    return getattr(torch, noise.dtype)  # type: ignore[no-any-return]


def draw_noise(
    shape: Sequence[int],
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise with the numbers that `torch.randn` gives; a list of generators draws per image.

    A generator of the CPU serves every device.

    Raises:
        ValueError: a list of another length than the batch, or a generator on another device than the CPU's.
    """
    z = torch.empty(tuple(shape), dtype=dtype, device=device) if out is None else out
    sources = list(generator) if isinstance(generator, Sequence) else [generator]
    if len(sources) not in (1, shape[0]):
        raise ValueError(
            f"a list of generators needs one per image: {shape[0]} images, {len(sources)} generators"
        )
    for source, part in zip(sources, z.split(1) if len(sources) > 1 else (z,), strict=True):
        if source is not None and not isinstance(source, torch.Generator):
            raise ValueError(
                f"generator is {source!r}; needed is a torch.Generator, one for each image, or None"
            )
        if source is None or source.device.type == device.type:
            part.normal_(generator=source)
        elif source.device.type == "cpu":
            part.copy_(torch.randn(part.shape, generator=source, dtype=dtype, device="cpu"))
        else:
            raise ValueError(f"a generator on {source.device} cannot draw noise for a sample on {device}")
    return z


def noise_of_the_host(like: Tensor, generator: Generators) -> Tensor:
    """Noise drawn on the CPU in torch's default dtype, whatever those of `like`: so do some of diffusers."""
    noise = draw_noise(like.shape, generator, torch.device("cpu"), torch.get_default_dtype())
    return noise.to(like.device)


def langevin(score: Tensor, sample: Tensor, noise: Tensor, snr: float) -> Tensor:
    """A step of Langevin dynamics (Song et al. 2021, "Score-based generative modeling", algorithm 4).

    y = x + s * score + sqrt(2 * s) * z with s = 2 * (snr * |z| / |score|)², norms being averaged over the
    batch; the row is made on the device, so that nothing is read back. Where the score is 0, so is s.
    Plain fp32 tensors on the CPU are summed in C, in another order than here.

    Returns:
        Like sample, at least fp32.
    """
    module = shortcut()
    result: Tensor | None = None if module is None else module.langevin(score, sample, noise, snr)
    if result is not None:
        return result
    wide = torch.promote_types(torch.promote_types(sample.dtype, score.dtype), noise.dtype)
    norms = [_norms(t, torch.promote_types(wide, torch.float32)).mean() for t in (noise, score)]
    step = 2 * (snr * norms[0] / norms[1]) ** 2
    step = torch.where(norms[1] != 0, step, torch.zeros_like(step))
    numbers = [0.0] * ROW
    numbers[G1], numbers[LO], numbers[HI], numbers[W + COLUMNS.index("xh")] = 1.0, -math.inf, math.inf, 1.0
    row = torch.tensor([numbers], dtype=torch.float64).to(sample.device)
    row[0, W + COLUMNS.index("e")] = step
    row[0, W + COLUMNS.index("z")] = (2 * step).sqrt()
    place = torch.zeros(1, dtype=torch.int64, device=sample.device)
    return scheduler_step(row, sample.to(wide), (score,), noise=noise.to(wide), step=place)[0]


def _norms(images: Tensor, dtype: torch.dtype) -> Tensor:
    """[B] float64 norms, in `dtype` along the last axis: a copy in fp64 would cost far more than the sum."""
    parts = torch.linalg.vector_norm(images.to(dtype), dim=-1).reshape(len(images), -1)
    norms: Tensor = torch.linalg.vector_norm(parts.double(), dim=1)
    return norms


def joined(images: Sequence[Tensor]) -> Tensor:
    """A batch of images that were made one by one."""
    return torch.cat(list(images))


def masked(mask: Tensor, known: Tensor, unknown: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`known` where the mask is 1, `unknown` where it is 0, between them in proportion.

    mask: of any dtype, broadcast. known, unknown: of one shape and dtype. out: may be `unknown` itself.
    """
    return torch.lerp(unknown, known, mask.to(unknown.device, unknown.dtype), out=out)


def philox_keys(
    noise: str, seeds: Sequence[int] | Tensor | None, generator: Generators, x: Tensor
) -> Tensor | None:
    """[B] int64 on x's device for noise made inside the op, None for torch's noise."""
    if noise not in ("torch", "philox"):
        raise ValueError(f"noise must be 'torch' or 'philox', got {noise!r}")
    if (noise == "philox") != (seeds is not None):
        raise ValueError("noise='philox' needs seeds, one per image, and noise='torch' takes none")
    if seeds is None:
        return None
    if generator is not None:
        raise ValueError("noise='philox' is keyed by seeds; pass no generator")
    keys = torch.as_tensor(seeds, dtype=torch.int64, device=x.device)
    if keys.shape != x.shape[:1]:
        raise ValueError(f"seeds must have shape [B] = [{x.shape[0]}], got {tuple(keys.shape)}")
    return keys


class _Buffers:
    """The tensors of one run, written again as soon as neither the sample nor a slot refers to them."""

    def __init__(self, x: Tensor, model_dtype: torch.dtype, copies: int) -> None:
        like = torch.empty_like(x)
        # copies of the batch lie one behind the other, so the batch has to be the outermost dimension
        self.like = like if like.stride(0) == max(like.stride()) else like.contiguous()
        self.model_dtype, self.copies = model_dtype, copies
        self.samples: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.z: Tensor | None = None
        self.kept = False
        self.of_images: Tensor | None = None

    def dense(self, x: Tensor) -> Tensor:
        """x itself, or a copy in the buffers' memory layout."""
        if x.shape != self.like.shape or x.dtype != self.like.dtype:
            raise ValueError(
                f"a sample stays {tuple(self.like.shape)} {self.like.dtype}, got {tuple(x.shape)} {x.dtype}"
            )
        return x if x.stride() == self.like.stride() else torch.empty_like(self.like).copy_(x)

    def take(self, count: int, held: Sequence[Tensor]) -> list[Tensor]:
        free = [t for t in self.samples if all(t is not h for h in held)]
        while len(free) < count:
            free.append(torch.empty_like(self.like))
            self.samples.append(free[-1])
        return free[:count]

    def input_for(self, x: Tensor, c_in: float) -> Tensor:
        """x itself where the model can be given it as it is, else the buffer for c_in * x."""
        if c_in == 1.0 and self.copies == 1 and self.model_dtype is x.dtype:
            return x
        # Two take turns: a model may return its own input, which is read while the next one is written.
        if not self.inputs:
            shape, strides = (self.copies * self.like.shape[0], *self.like.shape[1:]), self.like.stride()
            for _ in range(2):
                self.inputs.append(
                    torch.empty_strided(shape, strides, dtype=self.model_dtype, device=self.like.device)
                )
        self.inputs.reverse()
        return self.inputs[0]

    def model_input(self, x: Tensor, c_in: float) -> Tensor:
        """c_in * x in the model's dtype, repeated for guidance."""
        given = self.input_for(x, c_in)
        if given is not x:
            wide = x if x.dtype is torch.float64 else x.float()
            given.unflatten(0, (self.copies, x.shape[0])).copy_(c_in * wide)
        return given

    def factors(self, e: Tensor) -> Tensor:
        """A number for each image of a model's output."""
        if self.of_images is None:
            dtype = torch.float64 if e.dtype is torch.float64 else torch.float32
            self.of_images = torch.empty(len(e), dtype=dtype, device=e.device)
        return self.of_images

    def noise(self, noise: Noise, dtype: torch.dtype, generator: Generators, keep: bool) -> Tensor:
        z = self.z
        if z is None or z.dtype is not dtype or keep or self.kept:
            z = torch.empty(self.like.shape, dtype=dtype, device=self.like.device)
        for _ in range(noise.draws):
            draw_noise(z.shape, generator, z.device, dtype, out=z)
        self.z, self.kept = z, keep
        return z


def scaled_sum(first: Any, x: Tensor, second: Any, y: Tensor) -> Tensor:
    """first * x + second * y, with numbers or with one for each image."""
    total: Tensor = first * x + second * y
    return total


def scaled_input(sample: Tensor, divisor: float | Tensor) -> Tensor:
    """The model's input for a sample of x0 + sigma * noise."""
    return sample / divisor


def flow_step_by_token(
    levels: Tensor,
    timesteps: Tensor,
    num_train_timesteps: int,
    sample: Tensor,
    model_output: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """A step of a flow model where every token has a noise level of its own: to the next lower one, or to 0.

    Without noise the model's output is taken for x0 - noise, the negative of what `step` takes elsewhere: so
    diffusers has it, and the pipelines that use it.

    Args:
        levels: [N], of the run.
        timesteps: [B, L], of the tokens: level * num_train_timesteps.
        sample, model_output: [B, L, C].
        noise: like sample; then x0 is put under it at the lower level, with noise - x0 as the model's output.

    Returns:
        [B, L, C], at least fp32.
    """
    here = timesteps / num_train_timesteps
    run = levels.to(here.device)[:, None, None]
    after = (run * (run < here - 1e-6)).amax(0)[..., None]
    here = here[..., None]
    sample = sample.to(torch.promote_types(torch.float32, model_output.dtype))
    if noise is None:
        return sample + (here - after) * model_output
    return (1 - after) * (sample - here * model_output) + after * noise
