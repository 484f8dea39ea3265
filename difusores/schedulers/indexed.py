"""What the schedulers share whose step depends on its place in the run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from difusores.ops.scheduler_step import shortcut
from difusores.plan import Noise, Stage
from difusores.sampling import Generators
from difusores.schedulers.base import CachedStage, TableScheduler, advance, cached_stage, drawn
from difusores.schedules import SigmaGrid

MOST_GRIDS = 64
"""Grids whose rows a scheduler keeps, and runs on one of them (a beginning, options of step)."""
NO_OPTIONS: dict[str, Any] = {}
"""Of a class whose `step` has none; the same object each time, so that comparing it costs nothing."""


class Known(NamedTuple):
    """The stages of a run and what they follow from, as `take_stage` in C reads it.

    begin: the index of the first one. options: of `_stages`. times, levels: the tables, at these versions.
    returned, upcast: of the class.
    """

    stages: list[CachedStage]
    begin: int
    options: dict[str, Any]
    times: Tensor
    times_version: int
    levels: Tensor
    levels_version: int
    returned: tuple[str, ...]
    upcast: bool

    def holds(self, options: dict[str, Any]) -> bool:
        """Whether these are the stages for `options`, and of the tables as they are."""
        versions = self.times._version, self.levels._version
        return self.options == options and versions == (self.times_version, self.levels_version)


class Run:
    """Where a sampling run is: what `step` needs and changes."""

    __slots__ = ("begin", "index", "known", "slots")

    def __init__(self) -> None:
        self.index: int | None = None
        self.begin = 0
        self.slots: tuple[Tensor, ...] = ()
        self.known: Known | None = None
        """None: to be asked for."""


class _Rows(NamedTuple):
    """The rows of runs on the grid that the tables hold, by beginning and options."""

    times: Tensor
    times_version: int
    levels: Tensor
    levels_version: int
    grid: SigmaGrid
    runs: dict[Any, list[CachedStage]]


class IndexedScheduler(TableScheduler):
    """Base of the schedulers whose step depends on its place in the run.

    A run is a list of stages, one for each element of `timesteps` from where it begins; `step` carries out
    the next one. A subclass gives `_stages`, and `_grid`, which `set_timesteps` and `plan` share.

    Attributes:
        sigmas: float32 on the CPU, the noise level of every timestep, and the one at which the run ends.
    """

    sigmas: Tensor
    returned: ClassVar[tuple[str, ...]] = ("y", "x0")
    """The op's outputs that `step` returns."""
    upcast: ClassVar[bool] = False
    """Whether a step is computed in float32 and cast back to the model output's dtype."""
    continuous: ClassVar[bool] = True
    absent_is_last: ClassVar[bool] = False
    """Whether a timestep that is not one of `timesteps` counts as the last one."""
    _run: Run
    _begin_index: int | None
    _here: _Rows | None

    def _stages(self, grid: SigmaGrid, begin: int, **options: Any) -> Iterable[Stage]:
        """The stages from `begin`, an index into `grid.timesteps`, on."""
        raise NotImplementedError

    def _empty(self) -> dict[str, Any]:
        return {**super()._empty(), "_here": None}

    def _forget(self) -> None:
        super()._forget()
        self._regrid()

    def _regrid(self) -> None:
        super()._regrid()
        run = self.__dict__.get("_run")
        if run is not None:
            run.known = None

    def _restart(self) -> None:
        self.__dict__.update(_run=Run(), _begin_index=None)
        self._rows_here()  # here, where it is not part of the first step

    @property
    def step_index(self) -> int | None:
        """The index of the next step; None before the first one."""
        return self._run.index

    @property
    def _step_index(self) -> int | None:
        """`step_index`, which pipelines of diffusers assign where they take a step twice."""
        return self._run.index

    @_step_index.setter
    def _step_index(self, index: int | None) -> None:
        run = self._run
        if index is None or run.index is None or index < run.begin:
            run = self.__dict__["_run"] = Run()
            run.begin = index or 0
        run.index = index

    @property
    def begin_index(self) -> int | None:
        """The index of the first step, if `set_begin_index` gave it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which element of `timesteps` the run begins; else the first timestep that is met says it."""
        self.__dict__["_begin_index"] = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep is in `timesteps`; of two equal ones the second, which begins a whole step.

        Raises:
            IndexError: nowhere, unless `absent_is_last`.
        """
        values = self._times() if schedule_timesteps is None else schedule_timesteps.tolist()
        wanted = self._value(timestep)
        places = [i for i, value in enumerate(values) if value == wanted]
        if not places and self.absent_is_last:
            return len(self.timesteps) - 1
        if not places:
            raise IndexError(f"timestep {wanted} is not one of timesteps, {values[0]} to {values[-1]}")
        return places[min(1, len(places) - 1)]

    def _start(self, timestep: float | Tensor) -> int:
        index = self._begin_index
        if index is None:
            # the first element itself begins the run, even where rounding made the second one equal
            first = self.timesteps.data_ptr()
            is_first = isinstance(timestep, Tensor) and timestep.ndim == 0 and timestep.data_ptr() == first
            index = 0 if is_first else self.index_for_timestep(timestep)
        elif not 0 <= index < len(self.timesteps):
            raise IndexError(f"begin_index is {index}, and there are {len(self.timesteps)} timesteps")
        self._run.index = self._run.begin = index
        return index

    def _levels_table(self) -> Tensor:
        """What a step depends on besides `timesteps`: `_stages` is given it as `grid.sigmas`."""
        return self.sigmas

    def _rows_here(self) -> _Rows:
        """The rows of the grid as the tables are now."""
        times, levels, here = self.timesteps, self._levels_table(), self.__dict__.get("_here")
        versions = times._version, levels._version
        if (
            here is None
            or here.times is not times
            or here.levels is not levels
            or versions != (here.times_version, here.levels_version)
        ):
            grid = SigmaGrid(tuple(self._times()), tuple(levels.tolist()))
            runs = self._rows.get(grid)
            if runs is None:
                if len(self._rows) >= MOST_GRIDS:
                    self._rows.clear()
                runs = self._rows[grid] = {}
            here = self.__dict__["_here"] = _Rows(times, versions[0], levels, versions[1], grid, runs)
        return here

    def _look_up(self, run: Run, options: dict[str, Any]) -> Known:
        """The stages of a run as the tables are now, kept for the next run on the same grid."""
        times, times_version, levels, levels_version, grid, runs = self._rows_here()
        key = (run.begin, *options.values())
        stages = runs.get(key)
        if stages is None:
            if len(runs) >= MOST_GRIDS:
                runs.clear()
            made = self._stages(grid, run.begin, **options)
            stages = runs[key] = [cached_stage(stage, self.returned) for stage in made]
        run.known = known = Known(
            *(stages, run.begin, options, times, times_version, levels, levels_version),
            self.returned,
            self.upcast,
        )
        return known

    def _drawn(self, draw: Noise, sample: Tensor, model_output: Tensor, generator: Generators) -> Tensor:
        """The noise of the next stage."""
        return drawn(draw, sample, model_output, generator)

    def _take(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        noise: Tensor | None = None,
        options: dict[str, Any] = NO_OPTIONS,
    ) -> tuple[Tensor, ...]:
        """Carry out the next stage and return the outputs named by `returned`.

        noise: used where the stage draws noise, in place of it. options: of `_stages`.
        """
        run = self._run
        module = shortcut()
        if module is not None:
            if run.known is None:
                if run.index is None:
                    self._start(timestep)
                self._look_up(run, options)
            taken = module.take_stage(run, options, model_output, sample, noise)
            if type(taken) is Noise:
                noise = self._drawn(taken, sample, model_output, generator)
                taken = module.take_stage(run, options, model_output, sample, noise)
            if taken is not None:
                return taken  # type: ignore[no-any-return]
        index = self._start(timestep) if run.index is None else run.index
        known = run.known
        if known is None or not known.holds(options):
            known = self._look_up(run, options)
        if index - run.begin >= len(known.stages):
            raise IndexError(f"the run is over: it has {len(self.timesteps)} timesteps; call set_timesteps")
        cached = known.stages[index - run.begin]
        if cached.noise is None:
            noise = None
        elif noise is None:
            noise = self._drawn(cached.noise, sample, model_output, generator)
        results, run.slots = advance(cached, model_output, sample, generator, noise, run.slots, self.upcast)
        run.index = index + 1
        return results[: len(self.returned)]


def refuse_integers(scheduler: object, timestep: Any) -> None:
    if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
        raise ValueError(
            f"{type(scheduler).__name__}.step takes an element of `timesteps`, which are real numbers; "
            f"got the integer {timestep!r} (an index from `enumerate(timesteps)`?)"
        )
