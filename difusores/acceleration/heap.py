"""Keeps the memory that tensors give back, so that a step finds the pages of the step before.

glibc takes blocks above 32 MiB from the system and returns them at once; each step would then begin with a
page fault for every 4 KiB, a third of the time of a UNet at 256x256 pixels. While any model is accelerated,
the heap keeps them instead, and the large images that kernels return are in an arena of their own
(`csrc/arena.h`): in the heap, the gap that an image leaves is soon too short for the next one of its size,
and a decoder took twice the memory that it held. The setting is the process's; when the last model is
restored or gone, it is taken back.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from typing import Any

from difusores import native

# mallopt(3): option, value while a model is accelerated, value of glibc's own start
_SETTINGS = (
    (-4, 0, 65536),  # M_MMAP_MAX: number of blocks that are taken from the system directly
    (-1, 2**31 - 1, 128 * 1024),  # M_TRIM_THRESHOLD: free bytes at the heap's end that go back
    (-2, 64 * 2**20, 128 * 1024),  # M_TOP_PAD: taken in advance whenever the heap grows
)

_users: dict[int, weakref.finalize[..., Any]] = {}
_lock = threading.RLock()  # a user may go while another one comes


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
            _keep_images(True)
        if id(user) not in _users:
            _users[id(user)] = gone = weakref.finalize(user, _leave, libc, id(user))
            gone.atexit = False
    return None


def release(user: object) -> None:
    """`user` needs it no longer; after the last one, free memory goes back to the system."""
    with _lock:
        gone = _users.get(id(user))
        if gone is not None:
            gone()


def _leave(libc: ctypes.CDLL, user: int) -> None:
    with _lock:
        del _users[user]
        if not _users:
            for option, _, value in _SETTINGS:
                libc.mallopt(option, value)
            _keep_images(False)
            libc.malloc_trim(0)


def _keep_images(on: bool) -> None:
    if native.status("cpu") is None:
        from difusores import _C

        _C.keep_images(on)
