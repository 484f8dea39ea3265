"""The logic of the benchmarks of whole networks: what is compared, timed and written, with tiny networks."""

from __future__ import annotations

import json
import mmap
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bench_loops
import bench_profile
import contest
import pytest
import results
import torch
from contest import Contestant, compete
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import difusores

WANTED = [torch.arange(1.0, 5.0, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A forked process does not find OpenMP's pool again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answers(factors: tuple[float, float], seconds: float = 0.0, precision: str = "fp32") -> Contestant:
    """Computes both cases, each wrong by a factor."""

    def call(case: int) -> Tensor:
        time.sleep(seconds)
        return WANTED[case].float() * factors[case]

    return Contestant(precision, lambda: None, lambda network: [lambda: call(0), lambda: call(1)])


def fails(network: Any) -> Any:
    raise RuntimeError("no such operation")


def test_only_what_is_right_is_timed() -> None:
    contestants = {
        "diffusers": answers((1, 1), 0.02),
        "fast": answers((1, 1)),
        "second case wrong": answers((1, 1.001)),
        "rounded": answers((1, 1.01), precision="bf16"),
        "not a number": answers((float("nan"), 1)),
        "broken": Contestant("fp32", lambda: None, fails),
    }
    rows = compete(contestants, WANTED, 0.0, rounds=4)
    assert [name for name in rows if "ms" in rows[name]] == ["diffusers", "fast", "rounded"]
    assert rows["diffusers"]["ms"] >= 20 and rows["diffusers"]["times_base"] == 1
    assert rows["fast"]["times_base"] > 5 and rows["fast"]["rounds"] == 4 and rows["fast"]["distance"] == 0
    assert rows["rounded"]["distance"] == pytest.approx(0.01, rel=0.01)
    assert "1.0e-03 away from the oracle" in rows["second case wrong"]["error"]
    assert "nan away" in rows["not a number"]["error"]
    assert list(rows) == list(contestants)
    assert rows["broken"]["error"] == "RuntimeError: no such operation"
    assert rows["fast"]["peak_gb"] > 0 and rows["fast"]["prepare_s"] >= 0


def test_the_next_is_asked_when_the_threads_of_the_one_before_sleep(tmp_path: Path) -> None:
    ends = tmp_path / "ends"

    def spin() -> None:
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass
        with ends.open("a") as file:
            file.write(f"{time.monotonic()}\n")

    def leaves_a_thread_at_work() -> Tensor:
        threading.Thread(target=spin).start()
        return WANTED[0].float()

    contestant = Contestant("fp32", lambda: None, lambda network: [leaves_a_thread_at_work])
    process = contest._Process(contestant, 1)
    for count in range(2, 5):  # the first was at set-up
        process.ask("time")
        answered = time.monotonic()
        lines = ends.read_text().split()
        assert len(lines) == count and float(lines[-1]) <= answered
    process.end()
    assert "error" in process.ask("time")


def test_groups_have_the_base_in_common() -> None:
    contestants = {"diffusers": answers((1, 1), 0.04), **{name: answers((1, 1), 0.02) for name in "abc"}}
    groups: list[list[str]] = []
    compete_group = contest._compete

    def note(group: dict[str, Contestant], *arguments: Any) -> Any:
        groups.append(list(group))
        return compete_group(group, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contest, "_compete", note)
        rows = compete(contestants, WANTED, 0.0, rounds=1, together=2)
    assert groups == [["diffusers", "a", "b"], ["diffusers", "c"]]
    assert list(rows) == list(contestants)
    assert all(1.2 < rows[name]["times_base"] < 3 for name in "abc"), rows


def test_the_peak_of_memory_is_that_since_the_reset() -> None:
    def grows(network: Any) -> Any:
        with mmap.mmap(-1, 2**28) as pages:  # given back; malloc would keep them while a model is accelerated
            for _ in range(2**8):
                pages.write(bytes(2**20))
        return [lambda: WANTED[0].float()]

    contestants = {"large": Contestant("fp32", lambda: None, grows), "small": answers((1, 1))}
    large = compete({"large": contestants["large"]}, WANTED[:1], 0.0)["large"]
    assert large["setup_peak_gb"] >= large["peak_gb"] + 0.2


def row(ms: float, **more: Any) -> dict[str, Any]:
    figures = {"ms": ms, "ms_quartiles": [ms, ms], "distance": 1e-6, "build_s": 1.0, "prepare_s": 2.0}
    return {**figures, "peak_gb": 2.0, "faults": 0, "times_base": round(100 / ms, 2), **more}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with results of one network and one loop."""
    (tmp_path / "docs" / "images").mkdir(parents=True)
    for file, names in {
        "README.md": ("networks", "kernels"),
        "docs/benchmarks.md": ("all networks",),
        "docs/approximate.md": ("approximate",),
    }.items():
        blocks = "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in names)
        (tmp_path / file).write_text(f"before\n{blocks}after\n")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "PICTURE", tmp_path / "docs" / "images" / "networks.png")
    stamp = {"processor": "A", "threads": 2, "torch": "2", "date": "today"}
    machine = {**stamp, "peak_gflops": {"fp32": 200, "bf16": 1000}}
    rows = {
        "diffusers": row(100.0),
        "ONNX Runtime": row(80.0),
        "OpenVINO f32": row(50.0, peak_gb=3.0),
        "OpenVINO bf16": row(20.0),
        "difusores accelerated": row(25.0),
        "difusores accelerated bf16": row(16.0),
        "torch.compile": {"error": "it is ill"},
    }
    results.keep("models-tiny", {"workload": "tiny", "gflop": 5.0, "machine": machine, "rows": rows})
    loop = {
        "diffusers": row(3000.0, times_base=1.0),
        "difusores accelerated": row(1000.0, times_base=3.0),
    }
    results.keep("loops-few", {"workload": "few", "machine": machine, "rows": loop})
    return tmp_path


def test_tables_are_made_of_the_results(
    kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not find_spec("matplotlib"):  # it is of the extra `bench`
        monkeypatch.setattr(results, "draw", lambda: results.PICTURE.write_bytes(b"\x89PNG"))
    results.publish()
    readme = (kept / "README.md").read_text()
    assert "| tiny | 25 | 4.00× | 2.00× (OpenVINO f32) | 16 | 1.25× (OpenVINO bf16) |" in readme
    assert "| few | 1000 | 3.00× |" in readme and "![" in readme
    assert "<!-- kernels:begin -->\nold\n<!-- kernels:end -->" in readme  # no results of those
    assert readme.startswith("before\n") and readme.endswith("after\n")
    text = (kept / "docs" / "benchmarks.md").read_text()
    assert "old" not in text and "torch.compile: it is ill" in text
    # 5 GFLOP in 25 ms are 200 GFLOP/s, which is the peak in fp32; 16 ms are 31 % of the peak in bf16
    assert "| difusores accelerated | 25 (25–25) | 4.0 | 200 | 100% |" in text
    assert "| difusores accelerated bf16 | 16 (16–16) | 6.25 | 312 | 31% |" in text
    assert "| OpenVINO f32 | 50 (50–50) | 2.0 | 100 | 50% | 1.0e-06 | 1.0 | 2.0 | 3.0 | 1.50 | 0 |" in text
    assert (kept / "docs" / "images" / "networks.png").read_bytes().startswith(b"\x89PNG")
    results.publish()
    assert (kept / "README.md").read_text() == readme
    assert "tiny" in capsys.readouterr().out


def test_rows_that_a_run_left_out_stay(kept: Path) -> None:
    results.keep("models-tiny", {"workload": "tiny", "machine": {}, "rows": {"diffusers": row(90.0)}})
    rows = json.loads((kept / "results" / "models-tiny.json").read_text())["rows"]
    assert rows["diffusers"]["ms"] == 90 and rows["OpenVINO f32"]["ms"] == 50


def test_a_missing_block_is_an_error(kept: Path) -> None:
    with pytest.raises(ValueError, match="has no block 'other'"):
        results.replace(kept / "README.md", "other", ["text"])
    assert "<!-- networks:begin -->" in (Path(__file__).parents[1] / "README.md").read_text()


def test_a_loop_is_compared_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {
        "block_out_channels": [32, 32],
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "layers_per_block": 1,
        "sample_size": 8,
    }
    monkeypatch.setitem(bench_loops.CONFIGS, "cifar10", tiny)
    for name in ("diffusers channels_last bf16", "difusores accelerated bf16"):
        monkeypatch.delitem(bench_loops.CONTESTANTS, name)

    def image(pipe: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        return pipe(generator=generator, num_inference_steps=4, output_type="np").images

    monkeypatch.setitem(bench_loops.LOOPS, "ddim-50-cifar10", (bench_loops.ddim, image))
    rows = bench_loops.measure("ddim-50-cifar10", 1)
    assert len(rows) == 3
    assert all("ms" in found and found["distance"] <= 1e-5 for found in rows.values()), rows


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_profile_counts_the_operations_of_the_plain_network(dtype: str | None) -> None:
    """Whatever computes them: each once, and their time within that of the whole."""
    torch.manual_seed(0)
    model = difusores.UNet2DModel(
        block_out_channels=[32, 64],
        down_block_types=["AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D"],
        layers_per_block=1,
        norm_num_groups=8,
    ).eval()
    case = torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter, difusores.use_backend("reference"):
            model(*case)  # plain products, which the counter knows
        difusores.accelerate(model, dtype=dtype)
        whole, rows = bench_profile.profile(lambda: model(*case), time.perf_counter, rounds=3)
    assert sum(row["operations"] for row in rows) == counter.get_total_flops()
    assert sum(row["seconds"] for row in rows) > 0 and whole > 0
    table = bench_profile.markdown(whole, rows, 100.0, 0.01)
    assert "between operations" in table and f"| {1e3 * whole:.2f} |" in table
