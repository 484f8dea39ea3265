"""Keeps the memory that tensors give back, so that a step finds the pages of the step before.

glibc takes blocks above 32 MiB from the system and returns them at once; each step would then begin with a
page fault for every 4 KiB, a third of the time of a UNet at 256x256 pixels. While any model is accelerated,
the heap keeps them instead. The setting is the process's; `restore` of the last model takes it back.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from typing import Any

# mallopt(3): option, value while a model is accelerated, value of glibc's own start
_SETTINGS = (
    (-4, 0, 65536),  # M_MMAP_MAX: number of blocks that are taken from the system directly
    (-1, 2**31 - 1, 128 * 1024),  # M_TRIM_THRESHOLD: free bytes at the heap's end that go back
    (-2, 64 * 2**20, 128 * 1024),  # M_TOP_PAD: taken in advance whenever the heap grows
)

_users: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()


def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def keep(user: object) -> str | None:
    """Keep freed memory while `user` lives or until `release`; None, or why it cannot be kept."""
    libc = _libc()
    if libc is None:
        return "the C library is not glibc"
    with _lock:
        if not _users:
            for option, value, _ in _SETTINGS:
                libc.mallopt(option, value)
        _users.add(user)
    return None


def release(user: object) -> None:
    """`user` needs it no longer; after the last one, free memory goes back to the system."""
    libc = _libc()
    if libc is None:
        return
    with _lock:
        was_used = bool(_users)
        _users.discard(user)
        if was_used and not _users:
            for option, _, value in _SETTINGS:
                libc.mallopt(option, value)
            libc.malloc_trim(0)
