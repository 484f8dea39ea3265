"""The logic of the benchmark of whole networks on a GPU, with small networks on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_gpu_models as bench
from bench_gpu_models import Workload

SMALL: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
UNET = Workload("UNet2DConditionModel", SMALL, (2, 4, 8, 8), 12)
VAE = Workload(
    "AutoencoderKL",
    {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
    },
    (1, 4, 8, 8),
)
DDPM = Workload(
    "UNet2DModel",
    {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
        "norm_num_groups": 4,
    },
    (2, 3, 8, 8),
)
ON_CPU = ("cpu", torch.float32, 0.0, False)


@pytest.mark.parametrize("workload", [UNET, VAE, DDPM])
def test_networks_agree_and_are_timed(workload: Workload) -> None:
    result = bench.measure(workload, *ON_CPU)
    rows = result["contestants"]
    for name, row in rows.items():
        if "graph" in name:
            assert "CUDA" in row["error"] or "NVIDIA" in row["error"], row
        else:
            assert row.get("ms", 0) > 0 and row["distance"] < 1e-5 and row["rounds"] >= 7, (name, row)
    assert rows["diffusers"]["times_diffusers"] == 1 and result["tflop"] >= 0
    found = dict.fromkeys(("gpu", "torch", "cuda", "cudnn", "triton", "diffusers", "date"), "one")
    lines = bench.markdown({"machine": found, "models": {"small": result}, "loops": {}}).splitlines()
    assert len(lines) == 5 and f"| {rows['diffusers']['ms']:.2f} |" in lines[4]
    assert len({line.count("|") for line in lines[2:]}) == 1
    text = bench.table("small", result)
    assert len(text.splitlines()) == len(rows) + 1 and "TFLOP/s" in text


@pytest.mark.parametrize("name", bench.LOOPS)
def test_loops_agree_and_are_timed(name: str) -> None:
    result = bench.measure_loop(UNET, bench.LOOPS[name][0], 6, *ON_CPU)
    for contestant, row in result["contestants"].items():
        if "graph" in contestant:
            assert "CUDA" in row["error"]
        else:
            assert row.get("images_per_s", 0) > 0 and row["distance"] < 1e-5, (contestant, row)
    assert "images/s" in bench.table("loop", result)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = bench.difusores.UNet2DModel.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return (forward(*args, **kwargs)[0] * 1.001,)

    monkeypatch.setattr(bench.difusores.UNet2DModel, "forward", wrong)
    rows = bench.measure(DDPM, *ON_CPU)["contestants"]
    assert "from the oracle" in rows["difusores"]["error"] and "ms" not in rows["difusores"]
    assert "ms" in rows["diffusers"] and "ms" in rows["diffusers channels_last"]


@pytest.mark.parametrize("workload", [VAE, DDPM])
def test_compiled_contestants(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in each mode, made from a module of its own; what fails between rounds leaves the others timed."""
    modes: list[str] = []

    def compiled(function: Any, *, mode: str, fullgraph: bool) -> Any:
        assert fullgraph
        modes.append(mode)

        def call(*args: Any, **kwargs: Any) -> Any:
            call.count += 1  # type: ignore[attr-defined]
            if mode == "reduce-overhead" and call.count > 4:  # type: ignore[attr-defined]
                raise ValueError("overwritten by a subsequent run")
            return function(*args, **kwargs)

        call.count = 0  # type: ignore[attr-defined]
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    rows = bench.measure(workload, *ON_CPU[:3], True)["contestants"]
    assert modes == [*bench.COMPILE_MODES, "default"]
    for mode in bench.COMPILE_MODES:
        row = rows[f"diffusers channels_last torch.compile {mode}"]
        assert row["distance"] < 1e-5 and ("ms" in row) is (mode != "reduce-overhead")
        assert mode != "reduce-overhead" or "overwritten" in row["error"]
    assert rows["diffusers"]["ms"] > 0


def test_every_workload_has_its_inputs() -> None:
    for workload in bench.MODELS.values():
        given, named = workload.inputs("cpu", torch.float32)
        assert given[0].shape == workload.sample
        assert len(given) == {"UNet2DConditionModel": 3, "UNet2DModel": 2, "AutoencoderKL": 1}[workload.kind]
        assert bool(named) == (workload.context == 2048)
