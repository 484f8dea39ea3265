"""Parameters of several layers that lie side by side in memory, so that one product serves all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from difusores.acceleration.session import Session
from difusores.graphs import capturing


class Merged:
    """One parameter of each of some layers, as rows of one tensor of which each of them is a view.

    Nothing is copied twice and nothing can be stale: whoever changes a parameter in place, `.data` included,
    changes the tensor. A parameter that was given other memory (`to`, `load_state_dict(assign=True)`) is seen
    by its storage, and all are gathered again. `release` gives each memory of its own.
    """

    def __init__(self, session: Session, name: str) -> None:
        self.session = session
        self.name = name
        self._rows: Tensor | None = None
        self._held: list[tuple[nn.Parameter, int]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"session": self.session, "name": self.name, "_rows": None, "_held": []}

    def get(self, layers: Sequence[nn.Module]) -> Tensor | None:
        """The rows of all layers; None where they do not fit together, or a graph is captured just now."""
        parameters: list[Any] = [layer._parameters[self.name] for layer in layers]
        rows = self._rows
        if rows is not None and self._lie_in(rows, parameters):
            return rows
        if capturing() is not None or not _fit(parameters):
            return None
        with self.session.lock:
            return self._gather(parameters)

    def _lie_in(self, rows: Tensor, parameters: Sequence[nn.Parameter]) -> bool:
        storage, held = rows.untyped_storage()._cdata, self._held
        return len(parameters) == len(held) and all(
            p is q and p.storage_offset() == offset and p.untyped_storage()._cdata == storage
            for p, (q, offset) in zip(parameters, held, strict=True)
        )

    def _gather(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        # Tensors made in inference mode would make the parameters such tensors, for ever.
        with torch.inference_mode(False), torch.no_grad():
            rows = torch.cat([p.detach() for p in parameters])
            held: list[tuple[nn.Parameter, int]] = []
            start = 0
            for p in parameters:
                p.data = rows[start : start + p.shape[0]]
                held.append((p, int(p.storage_offset())))
                start += p.shape[0]
        self._rows, self._held = rows, held
        return rows

    def release(self) -> None:
        """Memory of its own for each parameter that still lies here."""
        rows, self._rows = self._rows, None
        if rows is not None:
            storage = rows.untyped_storage()._cdata
            for p, _ in self._held:
                if p.untyped_storage()._cdata == storage:
                    p.data = p.detach().clone()
        self._held = []


def _fit(parameters: Sequence[object]) -> bool:
    first = parameters[0]
    return all(
        type(p) is nn.Parameter
        and isinstance(first, Tensor)
        and (p.dtype, p.device, p.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        and p.is_contiguous()
        and not p.is_inference()
        for p in parameters
    )
