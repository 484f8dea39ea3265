"""Keys and values of cross-attention, computed once for a prompt and not once for a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difusores.acceleration.session import Session, fingerprint, unchanged
from difusores.graphs import capturing

MOST = 4  # prompts that an attention remembers: separate passes of guidance come with two or three


class _Entry(NamedTuple):
    prompt: weakref.ref[Tensor]
    seen: tuple[Any, ...]
    weights: list[tuple[Any, ...]]
    made: tuple[Tensor, ...]


class Prompts:
    """What one attention made of the last prompts, each for as long as its tensor lives.

    A prompt is told by its tensor, its version (which counts changes in place), its memory and shape; the
    weights as `Packed` tells them. A CUDA graph uses nothing from before its capture, and nothing of it is
    used later: it computes keys and values itself, once, from whatever the prompt's memory then holds.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._entries: dict[int, _Entry] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"session": self.session, "_entries": {}}

    def get(
        self, prompt: Tensor, weights: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `make` returns, now or when it was last asked for the same."""
        if prompt.is_inference():
            return make()
        key, seen = id(prompt), self._seen(prompt)
        entry = self._entries.get(key)
        if (
            entry is not None
            and entry.prompt() is prompt
            and entry.seen == seen
            and len(weights) == len(entry.weights)
            and all(map(unchanged, weights, entry.weights))
        ):
            return entry.made
        made = make()
        entries = self._entries
        reference = weakref.ref(prompt, lambda gone: _forget(entries, key, gone))
        while len(entries) >= MOST and key not in entries:
            entries.pop(next(iter(entries)), None)
        entries[key] = _Entry(reference, seen, [fingerprint(w, self.session.samples) for w in weights], made)
        return made

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()

    def _seen(self, prompt: Tensor) -> tuple[Any, ...]:
        # On a GPU what one stream computes, another may read too early.
        stream = torch.cuda.current_stream(prompt.device).cuda_stream if prompt.is_cuda else 0
        memory = (prompt.data_ptr(), prompt.shape, prompt.stride(), prompt.dtype)
        return prompt._version, *memory, stream, capturing()


def _forget(entries: dict[int, _Entry], key: int, gone: weakref.ref[Tensor]) -> None:
    entry = entries.get(key)
    if entry is not None and entry.prompt is gone:
        entries.pop(key, None)
