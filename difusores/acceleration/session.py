"""What the replaced layers of one `accelerate` call share, and the base of every replacement."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from difusores import native
from difusores.ops.dispatch import transformed, wanted

SESSION = "_difusores_acceleration"  # the key in a model's __dict__ under which its session stands
DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (*DTYPES, torch.float16)
_INT_VIEW = {2: torch.int16, 4: torch.int32}
_SAMPLES = 64  # elements of a weight that are compared
Form = TypeVar("Form")  # of weights, prepared


class Session:
    """One call of `accelerate`.

    Attributes:
        settings: its arguments, to tell whether a second call asks for the same.
        dtype: in which matrix products and attention compute; None for each layer's own.
        image_dtype: the same for images: residual blocks and convolutions of more than a pixel.
        device: type of the device on which the model's parameters are.
        cuda: whether layers are replaced by what is fast on a GPU; else by what is fast on a CPU.
        approximate: the approximations that are allowed, name -> options.
        calibrating: whether layers in 8 bits watch their inputs.
        invariant: whether products and convolutions are only such as have bits that depend neither on the
            batch nor on the number of threads.
        budget: bytes that prepared weights may take.
        forms: the prepared weights that there are now.
        samples_seen: of what they were made of; None until the next forward pass asks.
        generation: counts how often bytes were given back.
        preparing: seconds that making prepared weights has taken so far.
        times: the time projections of its residual blocks.
        here: what belongs to the forward pass that runs in a thread.
        clock: seconds within replaced layers while somebody counts them, else None.
    """

    def __init__(
        self,
        settings: tuple[Any, ...],
        dtype: torch.dtype | None,
        image_dtype: torch.dtype | None,
        budget: int,
        device: str = "cpu",
        cuda: bool = False,
        approximate: Mapping[str, Any] | None = None,
        invariant: bool = False,
    ) -> None:
        self.settings = settings
        self.invariant = invariant
        self.dtype = dtype
        self.image_dtype = image_dtype
        self.device = device
        self.cuda = cuda
        self.approximate = dict(approximate or {})
        self.calibrating = False
        self.dtypes = GPU_DTYPES if cuda else DTYPES
        self.samples = 0 if cuda else _SAMPLES  # to compare values on a GPU would wait for it
        self.budget = budget
        self.forms: list[Packed] = []
        self.samples_seen: Samples | None = None
        self.generation = 0
        self.preparing = 0.0
        self.clock: float | None = None
        self.lock = threading.RLock()
        self.here = threading.local()
        self.times: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lock": None, "here": None, "forms": [], "samples_seen": None, "clock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock(), here=threading.local())

    def begin(self) -> bool:
        """A forward pass of the network begins in this thread; returns what `end` takes.

        What changes no version is looked for once, here, and not again in every layer.
        """
        before: bool = getattr(self.here, "looked", False)
        seen = self.samples_seen
        if seen is None:
            with self.lock:
                seen = self.samples_seen = Samples(self.forms)
        self.here.looked = seen.unchanged()
        return before

    def end(self, before: bool) -> None:
        """It is over: layers that are called by themselves look for themselves."""
        self.here.looked = before

    def make_room(self, size: int, gain: float) -> bool:
        """Whether `size` bytes fit into the budget, after forms that gain less have gone."""
        room = self.budget - sum(form.bytes for form in self.forms)
        lesser = sorted((form for form in self.forms if form.gain < gain), key=lambda form: form.gain)
        if room + sum(form.bytes for form in lesser) < size:
            return False
        for form in lesser:
            if room >= size:
                break
            room += form.bytes
            form.drop()
        return True


class Packed:
    """One prepared form of some parameters, made at first use and again when one of them has changed.

    A change is seen by the parameter itself, its version, its memory, and 64 of its elements: peft adds its
    matrices through `.data`, which leaves the first three as they were. Elements are compared once in a
    forward pass of the network, those of all forms together, and by `get` outside of one.

    Attributes:
        bytes: that it takes now.
        gain: time without over time with it; where memory is short, those that gain least go.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.bytes = 0
        self.gain = 1.0
        self._made: tuple[list[tuple[Any, ...]], Any, int, object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"session": self.session, "bytes": 0, "gain": 1.0, "_made": None}

    def get(
        self,
        sources: tuple[Tensor, ...],
        make: Callable[[], Form],
        size: int | Callable[[], int],
        gain: float,
        purpose: object = None,
    ) -> Form | None:
        """What `make` returns, of `size` bytes; None where the session's budget has no room for it.

        purpose: what it is made for; for another one it is made anew.
        """
        made = self._made
        looked = getattr(self.session.here, "looked", False)
        if (
            made is not None
            and made[3] == purpose
            and len(sources) == len(made[0])
            and (made[1] is not None or made[2] == self.session.generation)
            and all(map(unchanged, sources, made[0], repeat(looked)))
        ):
            known: Form | None = made[1]
            return known
        with self.session.lock:
            if self.bytes:
                self.drop()
            result = None
            size = size if isinstance(size, int) else size()
            if self.session.make_room(size, gain):
                self.bytes, self.gain = size, gain
                self.session.forms.append(self)
                self.session.samples_seen = None
                start = time.perf_counter()
                result = make()
                self.session.preparing += time.perf_counter() - start
            self._made = (
                [fingerprint(source, _SAMPLES) for source in sources],
                result,
                self.session.generation,
                purpose,
            )
        return result

    def drop(self) -> None:
        """Forget it and give its bytes back."""
        self.session.forms.remove(self)
        self.session.samples_seen = None
        self.session.generation += 1
        self.bytes, self._made = 0, None

    def fingerprints(self) -> list[tuple[Any, ...]]:
        """Of what it was made of."""
        return [] if self._made is None else self._made[0]


class Samples:
    """The elements by which changes of some forms' parameters are seen, to be compared all at once."""

    def __init__(self, forms: Sequence[Packed]) -> None:
        prints = [seen for form in forms for seen in form.fingerprints()]
        self._sources, self._pointers = [seen[0] for seen in prints], [seen[2] for seen in prints]
        self._versions = [seen[1] for seen in prints]
        samples = [(sample, copy) for *_, sample, copy in prints]
        rows = [
            (sample.data_ptr(), sample.stride(0) * sample.element_size(), len(sample), sample.element_size())
            for sample, _ in samples
        ]
        self._table = torch.tensor(rows, dtype=torch.int64)
        self._copies = torch.cat([copy.int() for _, copy in samples]) if samples else self._table

    def unchanged(self) -> bool:
        """Whether all are as they were; memory that was given back is not read."""
        if native.status("cpu") is not None:
            return False  # to compare one by one is as fast
        if [source.data_ptr() for source in self._sources] != self._pointers:
            return False
        if [source._version for source in self._sources] != self._versions:
            return False
        from difusores import _C

        same: bool = _C.same_elements(self._table.data_ptr(), len(self._table), self._copies.data_ptr())
        return same


def fingerprint(source: Tensor, samples: int) -> tuple[Any, ...]:
    """By which `unchanged` tells whether a tensor is the same; samples: how many elements it compares."""
    sample = None
    if samples:
        count = source.numel()
        step = max(1, count // samples)
        flat = source.detach().as_strided((min(count, samples),), (step,), source.storage_offset())
        sample = flat.view(_INT_VIEW[source.element_size()])
    return source, source._version, source.data_ptr(), sample, None if sample is None else sample.clone()


def unchanged(source: Tensor, seen: tuple[Any, ...], looked: bool = False) -> bool:
    """Whether a tensor is still what `fingerprint` saw; looked: its elements were compared already."""
    before, version, pointer, sample, copy = seen
    if source is not before or source._version != version or source.data_ptr() != pointer:
        return False
    return looked or sample is None or torch.equal(sample, copy)


def hooked(module: nn.Module) -> bool:
    """Whether somebody would miss a call that goes around the module's `__call__`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
    )


class Forward:
    """Stands in a module's `__dict__` as `forward`; its class's forward still answers what it declines.

    Attributes:
        how: what it does, in words.
        invariant: whether its bits depend neither on the batch nor on the number of threads.
        declined: reason -> number of calls that the class's forward answered.
    """

    how: str = ""
    invariant = False

    module: Any  # of classes that two packages define: checked by name, not by type

    def __init__(self, module: nn.Module, session: Session) -> None:
        self.module = module
        self.session = session
        self.declined: Counter[str] = Counter()

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        """Why this module cannot be replaced at all, or None."""
        return None

    def declines(self, *args: Any, **kwargs: Any) -> str | None:
        """Why this call goes to the class's forward, or None."""
        return None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The replacement; the first argument is a tensor."""
        raise NotImplementedError

    def decisions(self) -> tuple[Any, ...]:
        """What a CUDA graph takes as given."""
        return self.session.settings

    def release(self) -> None:
        """Undo what was done to the parameters' memory."""

    def packs(self) -> Iterator[Packed]:
        """The prepared weights."""
        return (value for value in self.__dict__.values() if isinstance(value, Packed))

    def steady(self, standing: object, *args: Any, **kwargs: Any) -> Any:
        """The replacement within a pass of a network that is known to stand as it did, or None: the long way.

        standing: the same object as long as it does.
        """
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            standing = getattr(self.session.here, "standing", None)
            if standing is not None and (result := self.steady(standing, *args, **kwargs)) is not None:
                return result
        reason = self._why_plain(args, kwargs) or self.declines(*args, **kwargs)
        if reason is not None:
            if not torch.compiler.is_compiling():
                self.declined[reason] += 1
            return type(self.module).forward(self.module, *args, **kwargs)
        if self.session.clock is None or not self.timed:
            return self.run(*args, **kwargs)
        before, start = self.session.clock, time.perf_counter()
        result = self.run(*args, **kwargs)
        self.session.clock = before + time.perf_counter() - start  # what is within it counts once
        return result

    timed: ClassVar[bool] = True

    def _why_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return "the input is no plain tensor"
        if torch.compiler.is_compiling():
            return "torch.compile traces"
        session = self.session
        if x.device.type != session.device:
            return f"the input is on {x.device}"
        if x.dtype not in session.dtypes:
            return f"the input is {x.dtype}"
        if x.numel() == 0:
            return "the input is empty"
        if self.module.training:
            return "the module is in training mode"
        if transformed() or torch._C._is_tracing():
            return "a transform or a trace looks on"
        ours = (None, "cuda", "triton", "triton_tma", "torch") if session.cuda else (None, "cpu")
        if wanted() not in ours:
            return "another backend was asked for"
        if session.device != "meta" and torch.is_autocast_enabled(session.device):
            return "autocast is on"
        if torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.module.parameters())
        ):
            return "gradients are recorded"
        return None
