"""How much the package tells, under the names that diffusers has for it."""

from __future__ import annotations

import logging

_PACKAGE = logging.getLogger("difusores")
_progress_bars = True


def get_logger(name: str | None = None) -> logging.Logger:
    """A logger of Python's, the package's own if the name is None."""
    return _PACKAGE if name is None else logging.getLogger(name)


def get_verbosity() -> int:
    """The least level that is told, one of Python's `logging`."""
    return _PACKAGE.getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Tell that level and those above it."""
    _PACKAGE.setLevel(verbosity)


def set_verbosity_debug() -> None:
    """Tell everything."""
    set_verbosity(logging.DEBUG)


def set_verbosity_info() -> None:
    """Tell what goes on."""
    set_verbosity(logging.INFO)


def set_verbosity_warning() -> None:
    """Tell what may be wrong, as at the beginning."""
    set_verbosity(logging.WARNING)


def set_verbosity_error() -> None:
    """Tell errors alone."""
    set_verbosity(logging.ERROR)


def is_progress_bar_enabled() -> bool:
    """Whether pipelines show their steps."""
    return _progress_bars


def enable_progress_bar() -> None:
    """Let pipelines show their steps, as at the beginning."""
    global _progress_bars
    _progress_bars = True


def disable_progress_bar() -> None:
    """Let no pipeline show its steps."""
    global _progress_bars
    _progress_bars = False
