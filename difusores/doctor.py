"""`python -m difusores doctor`: what is installed, what works, and why the rest does not.

It works with everything broken: each part is examined on its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from difusores import __version__, native

PACKAGES = ("torch", "numpy", "triton", "diffusers", "accelerate", "transformers")
VARIABLES = ("DIFUSORES_BACKEND", "DIFUSORES_ISA", "DIFUSORES_DISABLE")


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_doctor(args: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(report, indent=2) if args.json else describe(report))
    return 0


def examine() -> dict[str, Any]:
    """Everything that the doctor knows, ready for JSON.

    Keys: `folder` (of the package that answers), `versions` (None: not installed), `environment` (the
    variables set), `modules` and `ops` (None where available, else the reason), `build` and `cuda_build` (of
    the compiled modules; empty without), `graph_capture` (a sentence), `problems` (sentences).
    """
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    problems = native.environment_errors()
    for name in ("DIFUSORES_DISABLE", "DIFUSORES_ISA"):
        if any(problem.startswith(f"{name}=") for problem in problems):
            del os.environ[name]  # reported as a problem; the rest is examined as if it were not set
    try:
        import_module("torch")
    except Exception as error:
        problems.append(f"torch cannot be imported: {native.one_line(error)}")
    ops: dict[str, dict[str, str | None]] = {}
    try:
        ops = import_module("difusores.ops").availability()
        import_module("difusores.ops.dispatch").wanted()
    except Exception as error:
        problems.append(native.one_line(error))
    return {
        "folder": os.path.dirname(os.path.abspath(__file__)),
        "versions": {
            "difusores": __version__,
            "python": f"{platform.python_version()} ({sys.implementation.cache_tag}, {platform.platform()})",
            **{name: _version(name) for name in PACKAGES},
        },
        "environment": environment,
        "modules": dict(native.load().reasons),
        "build": native.build_info(),
        "cuda_build": native.build_info("cuda"),
        "ops": ops,
        "graph_capture": examine_graphs(),
        "problems": problems,
    }


def examine_graphs(device: str = "cuda") -> str:
    """Whether a small run as a CUDA graph has the bits of the loop; tried where there is a GPU."""
    try:
        torch = import_module("torch")
        if device == "cuda" and not torch.cuda.is_available():
            return "not exercised: no CUDA device was found"
        layer = torch.nn.Conv2d(4, 4, 3, padding=1).to(device)
        plan = import_module("difusores.schedulers").DDPMScheduler().plan(3)

        def model(x: Any, time: Any) -> Any:
            return layer(x)

        for _ in range(2):  # the first run is captured, the second replayed
            x, seeds = torch.randn(1, 4, 8, 8, device=device), [1]
            want, got = (
                plan.run(model, x, noise="philox", seeds=seeds, graph=graph) for graph in (False, True)
            )
            if not torch.equal(got, want):
                return "broken: a captured run has other bits than the loop"
    except Exception as error:
        return f"broken: {native.one_line(error)}"
    return "exercised: a captured run has the bits of the loop"


def describe(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [f"difusores in {report['folder']}", ""]
    for title in ("versions", "environment", "build", "cuda_build"):
        if report[title]:
            lines += [
                title.replace("_", " "),
                *(f"  {name:18}{_text(value)}" for name, value in report[title].items()),
                "",
            ]
    lines.append("compiled modules")
    lines += [f"  {name:18}{_state(reason)}" for name, reason in report["modules"].items()]
    lines += ["", "CUDA graphs", f"  {'graph capture':18}{report['graph_capture']}"]
    for op, backends in report["ops"].items():
        lines += ["", op, *(f"  {name:18}{_state(reason)}" for name, reason in backends.items())]
    if report["problems"]:
        lines += ["", "problems", *(f"  {problem}" for problem in report["problems"])]
    return "\n".join(lines)


def _state(reason: str | None) -> str:
    return "available" if reason is None else f"no: {reason}"


def _text(value: object) -> str:
    return "not installed" if value is None else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
