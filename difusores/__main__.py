"""The command line: `python -m difusores generate | train | fetch | convert | bench | doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from difusores import __version__, native

# command -> (the module that has `add_<command>_arguments(parser)` and `run_<command>(args) -> int`, help)
COMMANDS = {
    "generate": ("difusores.pipelines.cli", "sample images from a model into a picture"),
    "train": ("difusores.training.cli", "train a model on a folder of images or on a fetched data set"),
    "fetch": ("difusores.training.cli", "bring a data set or weights, pinned and checked, into a folder"),
    "convert": ("difusores.pipelines.convert", "make a folder of other people's files of weights"),
    "bench": ("difusores.bench.gpu", "time every kernel on this machine's GPU beside its peers"),
    "doctor": ("difusores.doctor", "say what is installed, what works, and why the rest does not"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after a one-line message for a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 130
    except (
        BrokenPipeError
    ):  # whoever read our output has left; the interpreter's last flush must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        print(f"difusores: error: {native.one_line(error)}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="difusores", description="Sampling and training of diffusion models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(command, help=text, description=text)
        if argv[:1] == [command]:  # only what was asked for is imported
            getattr(import_module(module), f"add_{command}_arguments")(subparser)
    args = parser.parse_args(argv)
    status: int = getattr(import_module(COMMANDS[args.command][0]), f"run_{args.command}")(args)
    return status


def _user_errors() -> tuple[type[Exception], ...]:
    """What bad input, a missing extra or a diverging run raises; all else is a defect, with its traceback."""
    ops = sys.modules.get("difusores.ops")
    return (ValueError, OSError, ImportError, FloatingPointError, *([ops.BackendUnavailable] if ops else []))


if __name__ == "__main__":
    sys.exit(main())
