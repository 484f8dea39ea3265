"""The cost model's rules, on modules small enough to count by hand, and a whole model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from difusores.models.layers import GroupNormAct
from difusores.models.transformer import CrossAttention

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("triton", reason="triton is not installed")

import diffusers
import emulated
import gpu_model

import difusores
from difusores.ops import dispatch


def counted(monkeypatch: pytest.MonkeyPatch, module: nn.Module, *shape: int) -> gpu_model.Count:
    x = gpu_model.half(*shape)
    monkeypatch.setattr(gpu_model, "build", lambda *_: (module.to("meta"), lambda m: m(x)))
    return gpu_model.trace(None, "")


def test_a_convolution_and_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    image, halved = 2 * 2 * 32 * 16 * 16, 2 * 2 * 8 * 16 * 16  # bytes
    weight = 2 * 8 * 32 * 9
    layers = nn.Sequential(GroupNormAct(4, 32, 1e-5), nn.Conv2d(32, 8, 3, padding=1))
    ours = counted(monkeypatch, layers, 2, 32, 16, 16)
    assert ours.launches == {"group_norm_silu": 1, "convolution": 1, "bias of a convolution": 1}
    norm = 2 * image + 2 * 2 * 32
    assert ours.bytes["group_norm_silu"] == norm
    assert ours.bytes["convolution"] == image + weight + halved
    assert ours.bytes["bias of a convolution"] == 2 * halved + 2 * 8
    assert ours.flops == 2 * (2 * 8 * 16 * 16) * 32 * 9
    assert ours.least_bytes == norm + image + weight + halved + 2 * 8
    eager = counted(monkeypatch, nn.Sequential(nn.GroupNorm(4, 32), nn.SiLU()), 2, 32, 16, 16)
    assert eager.launches == {"native_group_norm": 3, "silu": 1}
    assert eager.bytes["silu"] == 2 * image
    large = counted(monkeypatch, nn.Sequential(GroupNormAct(1, 4, 1e-5)), 1, 4, 512, 512)
    assert large.launches == {"group_norm_silu": 2}, "a group too large for one program"


@pytest.mark.skipif(emulated.why_not() is not None, reason=emulated.why_not() or "")
@pytest.mark.parametrize(("arch", "launches"), [("80", 2), ("89", 2), ("90", 1)])
def test_what_the_architecture_decides(arch: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that fits no block: a cluster of blocks reads it once, two launches twice."""
    monkeypatch.setitem(dispatch._OPS, "group_norm_silu", ("cuda", "reference"))
    x = gpu_model.half(2, 320, 64, 64).to(memory_format=torch.channels_last)
    norm = GroupNormAct(32, 320, 1e-5).to("meta")
    monkeypatch.setattr(gpu_model, "build", lambda *_: (norm, lambda m: m(x)))
    count = gpu_model.trace(None, "", arch=arch)
    assert count.launches == {"group_norm_silu": launches}
    assert count.bytes.total() == (1 + launches) * gpu_model.size(x) + 2 * 2 * 320


def printed(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[list[str], set[str]]:
    """Lines of a report of modules that move 300 bytes, of 200 or, accelerated, of 150; the architectures."""
    asked = set()

    def trace(library: Any, model: str, accelerated: bool = False, arch: str = "90") -> gpu_model.Count:
        asked.add(arch)
        count = gpu_model.Count(least_bytes=150 if accelerated else 200)
        count.add("mm", 300, 600)
        return count

    monkeypatch.setattr(gpu_model, "trace", trace)
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", *arguments])
    gpu_model.main()
    return capsys.readouterr().out.splitlines(), asked


def test_two_ratios(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lines, _ = printed(monkeypatch, capsys)
    for name, ratios in (
        ("eager", "(1.500 x least, 1.500 x its own)"),
        ("accelerated", "(1.500 x least, 2.000 x its own)"),
        ("diffusers_accelerated", "(1.500 x least, 2.000 x its own)"),
    ):
        assert any(line.startswith(f"{name} ") and ratios in line for line in lines), name


@pytest.mark.parametrize(
    ("arguments", "arch"),
    [
        ([], "90"),
        (["--gpu", "a100"], "80"),
        (["--gpu", "rtx4090"], "89"),
        (["--gpu", "h100", "--arch", "80"], "80"),
    ],
)
def test_the_gpu_chooses_the_architecture(
    arguments: list[str], arch: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines, asked = printed(monkeypatch, capsys, *arguments)
    assert asked == {arch} and f", sm_{arch}, " in lines[0]


def test_attention_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    count = counted(monkeypatch, CrossAttention(80, None, 2), 1, 64, 80)
    assert count.launches == {"mm": 3, "attention": 1, "addmm": 1}
    assert count.bytes["attention"] == 4 * 2 * 64 * 80
    assert count.attention_flops == 2 * 2 * 64 * 64 * 80
    assert count.attention_tiles / count.attention_flops == (32 + 16 + 32 + 8) / 80
    linear = 2 * 64 * 80 * 80
    assert count.flops == 4 * linear + count.attention_flops


def test_a_kernel_that_does_not_take_the_call_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    op = sys.modules["difusores.ops.group_norm_silu"]  # the package has a function of that name
    monkeypatch.setattr(op, "supports", lambda *_: "it does not")
    count = counted(monkeypatch, nn.Sequential(GroupNormAct(4, 32, 1e-5)), 2, 32, 16, 16)
    assert count.launches == {"native_group_norm": 3, "silu": 1}


@pytest.mark.slow
def test_a_whole_decoder() -> None:
    result: dict[str, Any] = gpu_model.report("vae", "h100")
    eager, ours = result["eager"], result["ours"]
    assert ours["teraflops"] == eager["teraflops"] > 1
    assert ours["launches"] < eager["launches"] and ours["gigabytes"] < eager["gigabytes"]
    assert 1 < result["ours_over_least"] < result["eager_over_least"]
    assert ours["floor_ms"] < eager["floor_ms"]
    for name in ("accelerated", "diffusers_accelerated"):
        assert result[name]["launches"] < ours["launches"]
        assert 1 < result[f"{name}_over_least"] < result["ours_over_least"]
        assert 1 < result[f"{name}_over_own_least"] < result["ours_over_own_least"]


@pytest.fixture(scope="module")
def least_of_sd15() -> int:
    """What diffusers' modules read and write at least."""
    return gpu_model.trace(diffusers, "sd15").least_bytes  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("library", [difusores, diffusers], ids=lambda library: str(library.__name__))
def test_an_accelerated_unet_within_its_budget(library: Any, least_of_sd15: int) -> None:
    """A step of Stable Diffusion 1.5; on sm_80, which reads some groups twice that a cluster reads once."""
    count = gpu_model.trace(library, "sd15", accelerated=True, arch="80")
    assert count.launches.total() <= 420
    assert count.bytes.total() <= 1.10 * least_of_sd15
    assert count.least_bytes < least_of_sd15, "products that read the same are one"
