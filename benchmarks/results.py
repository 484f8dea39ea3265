"""The results that are kept in benchmarks/results/ as tables and a picture.

`publish` prints every table and writes what is generated: the blocks between `<!-- NAME:begin -->` and
`<!-- NAME:end -->` of README.md and docs/, and docs/images/networks.png. A block whose results are not there
stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PICTURE = ROOT / "docs" / "images" / "networks.png"
OURS = {"fp32": "difusores accelerated", "bf16": "difusores accelerated bf16"}
PEERS = {
    "fp32": ("torch.compile", "zentorch", "ONNX Runtime", "OpenVINO f32"),
    "bf16": ("zentorch bf16", "OpenVINO bf16"),
}
COLUMNS = {
    "ms (quartiles)": "ms",
    "× diffusers": "times_base",
    "GFLOP/s": "gflops",
    "of the peak": "share",
    "distance": "distance",
    "build s": "build_s",
    "prepare s": "prepare_s",
    "peak GB": "peak_gb",
    "× eager's": "memory",
    "packed GB": "packed_gb",
    "page faults": "faults",
}
SCHEDULERS = (  # rows of README.md: case, shape
    ("DDIM", [1, 4, 64, 64]),
    ("DDPM", [1, 4, 64, 64]),
    ("UniPCMultistep", [1, 4, 64, 64]),
    ("DDIM", [8, 3, 512, 512]),
)
NORMS = (([2, 320, 64, 64], "float32"), ([1, 512, 64, 64], "bfloat16"))


def keep(name: str, result: dict[str, Any]) -> None:
    """Write a result; rows of contestants that this run left out stay, with the ratio of their own run."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    if file.is_file():
        result = {**result, "rows": {**json.loads(file.read_text())["rows"], **result["rows"]}}
    file.write_text(json.dumps(result, indent=1) + "\n")


def load(pattern: str) -> list[dict[str, Any]]:
    """All results whose name fits, small networks first."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{pattern}.json"))]
    return sorted(found, key=lambda result: result.get("gflop", 0))


def where(machine: Mapping[str, Any]) -> str:
    """A machine and its versions in words."""
    peaks = machine.get("peak_gflops") or {}
    parts = [f"{machine['threads']} threads of {machine['processor'].strip()}"]
    parts += [f"{figure} GFLOP/s of {kind} multiply-adds at most" for kind, figure in peaks.items()]
    names = {
        "torch": "torch",
        "diffusers": "diffusers",
        "openvino": "OpenVINO",
        "onnxruntime": "ONNX Runtime",
        "zentorch": "zentorch",
    }
    parts += [f"{shown} {machine[name]}" for name, shown in names.items() if name in machine]
    return ", ".join([*parts, machine["date"]])


def precision(contestant: str) -> str:
    return "bf16" if contestant.endswith("bf16") else "fp32"


def cell(result: Mapping[str, Any], contestant: str, key: str) -> str:
    """One figure of a contestant, or nothing where it is not known."""
    row, rows = result["rows"][contestant], result["rows"]
    if key == "ms":
        low, high = row["ms_quartiles"]
        return f"{row['ms']:.0f} ({low:.0f}–{high:.0f})"
    if key in ("gflops", "share"):
        figure = 1e3 * result["gflop"] / row["ms"] if "gflop" in result else None
        peak = (result["machine"].get("peak_gflops") or {}).get(precision(contestant))
        if figure is None or (key == "share" and peak is None):
            return ""
        return f"{figure:.0f}" if key == "gflops" else f"{figure / peak:.0%}"
    if key == "memory":
        base = rows.get("diffusers", {}).get("peak_gb")
        return f"{row['peak_gb'] / base:.2f}" if base else ""
    figure = row.get(key)
    if figure is None:
        return ""
    return f"{figure:.1e}" if key == "distance" else str(figure)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; columns without a figure are left out."""
    used = [i for i, name in enumerate(head) if i == 0 or any(row[i] for row in rows)]
    lines = [[head[i] for i in used], ["---"] * len(used), *([row[i] for i in used] for row in rows)]
    return [f"| {' | '.join(line)} |".replace("| --- ", "|---").replace("--- |", "---|") for line in lines]


def markdown(result: Mapping[str, Any]) -> str:
    """All rows of one network or loop."""
    size = f", {result['gflop']:.0f} GFLOP" if "gflop" in result else ""
    done = [name for name, row in result["rows"].items() if "ms" in row]
    rows = [[name, *(cell(result, name, key) for key in COLUMNS.values())] for name in done]
    lines = [f"**{result['workload']}**{size}: {where(result['machine'])}", ""]
    lines += table(["", *COLUMNS], rows)
    failed = {name: row["error"] for name, row in result["rows"].items() if "ms" not in row}
    lines += ["", *(f"{name}: {error}" for name, error in failed.items())] if failed else []
    return "\n".join([*lines, ""])


def ratio(result: Mapping[str, Any], kind: str, over: Sequence[str]) -> str:
    """How many times as fast as the fastest of others ours is; in brackets that one's name.

    Both are compared by what they are faster than the base in their own group.
    """
    rows = result["rows"]
    known = {name: rows[name]["times_base"] for name in over if "times_base" in rows.get(name, {})}
    ours = rows.get(OURS[kind], {}).get("times_base")
    if not known or ours is None:
        return ""
    best = max(known, key=known.__getitem__)
    return f"{ours / known[best]:.2f}×" + (f" ({best})" if len(over) > 1 else "")


def networks() -> list[str]:
    """README's table of whole networks and loops."""
    rows, machines = [], []
    for result in [*load("models-*"), *load("loops-*")]:
        times = [
            f"{result['rows'][name]['ms']:.0f}" if "ms" in result["rows"].get(name, {}) else ""
            for name in OURS.values()
        ]
        rows.append(
            [
                result["workload"],
                times[0],
                ratio(result, "fp32", ["diffusers"]),
                ratio(result, "fp32", PEERS["fp32"]),
                times[1],
                ratio(result, "bf16", PEERS["bf16"]),
            ]
        )
        machines.append(where({**result["machine"], "peak_gflops": None}))  # its peak moves between runs
    if not rows:
        return []
    head = ["", "fp32, ms", "× diffusers", "× the fastest other", "bf16, ms", "× the fastest other bf16"]
    picture = [f"![How many times as fast as diffusers]({PICTURE.relative_to(ROOT)})", ""]
    return [
        *(picture if PICTURE.is_file() else []),
        *table(head, rows),
        "",
        "`difusores.accelerate` beside diffusers, torch.compile, zentorch, ONNX Runtime and OpenVINO: "
        "medians of `benchmarks/bench_models.py` and `bench_loops.py`, random weights, every result checked "
        "first; [all figures](docs/benchmarks.md). " + "; ".join(dict.fromkeys(machines)) + ".",
    ]


def kernels() -> list[str]:
    """README's table of single operations."""
    rows, machines = [], []
    for result in load("schedulers"):
        machines.append(where(result["machine"]))
        for case, shape in SCHEDULERS:
            for row in result["microseconds"]:
                if (row["case"], row["shape"]) == (case, shape):
                    rows.append(
                        [
                            f"`{case}Scheduler.step`, {_shape(shape)}",
                            _us(row["difusores"]),
                            f"diffusers {_us(row['diffusers'])}",
                            f"{row['faster']:.1f}×",
                        ]
                    )
    for result in load("ops"):
        machines.append(where(result["machine"]))
        for shape, dtype in NORMS:
            for row in result["rows"]:
                if row["op"] == "group_norm_silu" and (row["shape"], row["dtype"], row["layout"]) == (
                    shape,
                    dtype,
                    "contiguous",
                ):
                    rows.append(
                        [
                            f"group norm + SiLU, {_shape(shape)}, {dtype}",
                            _us(row["ours_us"]),
                            f"eager {_us(row['eager_us'])}",
                            f"{row['eager_over_ours']:.1f}×",
                        ]
                    )
    if not (load("schedulers") and load("ops")):
        return []
    lines = table(["", "difusores", "in place of", "faster"], rows)
    return [
        *lines,
        "",
        "Medians of interleaved runs of `benchmarks/bench_schedulers.py` and `bench_ops.py`. "
        + "; ".join(dict.fromkeys(machines))
        + ".",
    ]


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _us(microseconds: float) -> str:
    return f"{microseconds:.0f} µs" if microseconds < 1000 else f"{microseconds / 1000:.1f} ms"


def approximation(result: Mapping[str, Any]) -> list[str]:
    """The rows of one workload of docs/approximate.md."""
    rows = [
        [name, f"{row['ms']:.0f}", f"{row['times_base']:.2f}", f"{row['distance']:.1e}", f"{row['psnr']:.1f}"]
        for name, row in result["rows"].items()
    ]
    head = ["", "ms", "× exact", "distance of latents", "PSNR, dB"]
    return [f"**{result['workload']}**: {where(result['machine'])}", "", *table(head, rows), ""]


def approximations() -> list[str]:
    """The tables of docs/approximate.md."""
    return [line for result in load("approximate-*") for line in approximation(result)][:-1]


def draw() -> None:
    """The picture: how many times as fast as diffusers each peer is, for each network."""
    found = [result for result in load("models-*") if "ms" in result["rows"].get("diffusers", {})]
    if not found:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [*PEERS["fp32"], OURS["fp32"], *PEERS["bf16"], OURS["bf16"]]
    colours = ["#ccd5dc", "#b0bdc8", "#93a4b3", "#6d8598", "#d9480f", "#5c7183", "#4b5f70", "#f08c00"]
    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 1.4 * len(found)))
    height = 0.85 / len(shown)
    for k, (name, colour) in enumerate(zip(shown, colours, strict=True)):
        bars = [result["rows"].get(name, {}).get("times_base", 0) for result in found]
        places = [i + k * height for i in range(len(found))]
        drawn = axes.barh(places, bars, height=height, color=colour, label=name)
        axes.bar_label(drawn, labels=[f"{bar:.1f}" if bar else "" for bar in bars], fontsize=7, padding=2)
    axes.set_yticks([i + 0.42 for i in range(len(found))], [result["workload"] for result in found])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"times as fast as diffusers in fp32 ({found[0]['machine']['date']})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", ncol=3, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130)
    pyplot.close(figure)


def replace(file: Path, name: str, lines: Sequence[str]) -> None:
    """Put lines between the marks of a block.

    Raises:
        ValueError: the file has no such block.
    """
    text = file.read_text()
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"{file} has no block {name!r}")
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    file.write_text(before + begin + "\n".join([*lines, ""]) + end + after)


def publish() -> None:
    """Print all tables; write the picture and the generated blocks."""
    draw()
    full = [markdown(result) for result in [*load("models-*"), *load("loops-*")]]
    blocks = {
        "kernels": (ROOT / "README.md", kernels()),
        "networks": (ROOT / "README.md", networks()),
        "all networks": (ROOT / "docs" / "benchmarks.md", full),
        "approximate": (ROOT / "docs" / "approximate.md", approximations()),
    }
    for name, (file, lines) in blocks.items():
        print("\n".join(lines) or f"{name}: no results in {RESULTS}")
        if lines:
            replace(file, name, lines)
