"""What a pipeline keeps for one call of it, so that threads may share the pipeline."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class CallState(Generic[T]):
    """An attribute of a pipeline that each thread has for itself, as the calls that run in it set it."""

    def __init__(self, default: T) -> None:
        self.default, self.threads = default, threading.local()

    def __get__(self, pipeline: object, owner: type | None = None) -> T:
        values: WeakKeyDictionary[object, T] | None = getattr(self.threads, "values", None)
        return self.default if values is None else values.get(pipeline, self.default)

    def __set__(self, pipeline: object, value: T) -> None:
        if not hasattr(self.threads, "values"):
            self.threads.values = WeakKeyDictionary()
        self.threads.values[pipeline] = value
