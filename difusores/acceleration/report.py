"""What `accelerate` did, as data and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from torch import nn

from difusores.acceleration.session import SESSION, Forward, Session
from difusores.acceleration.table import replacement
from difusores.models.layers import GroupNormAct
from difusores.models.transformer import LayerNorm


@dataclass(frozen=True)
class LayerReport:
    """One module.

    Attributes:
        name: within the model; kind: its class.
        replaced: whether an own forward stands there.
        how: what that does, or why there is none.
        invariant: whether its bits depend neither on the batch nor on the number of threads.
        packed_bytes: of its prepared weights now.
        declined: reason -> calls that its class's forward answered in spite of the replacement.
    """

    name: str
    kind: str
    replaced: bool
    how: str
    invariant: bool = False
    packed_bytes: int = 0
    declined: Mapping[str, int] = field(default_factory=dict)


class Report:
    """What `accelerate` did; looks at the models whenever it is asked.

    Attributes:
        models: name -> model; a model that was given alone has the name "".
        notes: what could not be had, in words.
    """

    def __init__(self, models: Mapping[str, nn.Module], notes: Sequence[str] = ()) -> None:
        self.models = dict(models)
        self.notes = tuple(notes)

    @property
    def layers(self) -> list[LayerReport]:
        """Every module that computes something itself or is replaced."""
        return [
            _layer_report(".".join(filter(None, (prefix, name))), module, _on_gpu(model))
            for prefix, model in self.models.items()
            for name, module in model.named_modules()
            if isinstance(module.__dict__.get("forward"), Forward) or _computes(module, _on_gpu(model))
        ]

    @property
    def packed_bytes(self) -> int:
        """Of all prepared weights now."""
        return sum(layer.packed_bytes for layer in self.layers)

    @property
    def preparing_seconds(self) -> float:
        """That making prepared weights has taken so far, within the calls that used them first."""
        return sum(session.preparing for session in self._sessions())

    def _sessions(self) -> list[Session]:
        return [model.__dict__[SESSION] for model in self.models.values() if SESSION in model.__dict__]

    @property
    def model_bytes(self) -> int:
        """Of all parameters."""
        return sum(size(model) for model in self.models.values())

    def share_not_replaced(self, call: Callable[[], object]) -> float:
        """Part of the time of one `call` that is spent outside replaced layers, from 0 to 1."""
        sessions = self._sessions()
        call()
        start, inside = perf_counter(), 0.0
        for session in sessions:
            session.clock = 0.0
        try:
            call()
        finally:
            total = perf_counter() - start
            for session in sessions:
                inside, session.clock = inside + (session.clock or 0.0), None
        return 1.0 - inside / total

    def __str__(self) -> str:
        layers = self.layers
        replaced = [layer for layer in layers if layer.replaced]
        lines = [
            f"{len(replaced)} of {len(layers)} layers replaced; prepared weights "
            f"{self.packed_bytes / 2**20:.0f} MiB beside {self.model_bytes / 2**20:.0f} MiB of parameters, "
            f"made in {self.preparing_seconds:.1f} s"
        ]
        groups: dict[tuple[bool, str, str], list[LayerReport]] = {}
        for layer in layers:
            groups.setdefault((layer.replaced, layer.kind, layer.how), []).append(layer)
        for (is_replaced, kind, how), members in sorted(groups.items(), key=lambda item: not item[0][0]):
            mark = "+" if is_replaced else "-"
            bits = ", bits independent of batch and threads" if members[0].invariant else ""
            lines.append(f"{mark} {len(members):4} {kind}: {how}{bits}")
            for reason, count in sum((Counter(m.declined) for m in members), Counter()).items():
                lines.append(f"       {count} calls by the class's own forward: {reason}")
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__


def size(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _on_gpu(model: nn.Module) -> bool:
    session = model.__dict__.get(SESSION)
    return session is not None and session.cuda


def _computes(module: nn.Module, cuda: bool) -> bool:
    own = any(p is not None for p in module._parameters.values())
    return own or replacement(module, cuda)[0] is not None


def _layer_report(name: str, module: nn.Module, cuda: bool) -> LayerReport:
    kind, forward = type(module).__name__, module.__dict__.get("forward")
    if isinstance(forward, Forward):
        packed = sum(form.bytes for form in forward.packs())
        return LayerReport(name, kind, True, forward.how, forward.invariant, packed, dict(forward.declined))
    if isinstance(module, (GroupNormAct, LayerNorm)):
        return LayerReport(
            name, kind, False, "computes by the package's op already", isinstance(module, GroupNormAct)
        )
    listed, reason = replacement(module, cuda)
    if listed is None:
        reason = "its class is not listed"
    return LayerReport(name, kind, False, reason or "it came after accelerate, or restore was called")
