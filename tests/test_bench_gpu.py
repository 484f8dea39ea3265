"""The logic of `python -m difusores bench gpu`, on the CPU: what is compared, what is timed, what is said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import ops
from difusores.bench import cases as bench_cases
from difusores.bench import gpu
from difusores.bench.case import Call, with_gradients
from difusores.bench.cases import OPS
from difusores.ops import dispatch

CPU = torch.device("cpu")
SMALL = {
    "ATTENTION": ((1, 2, 20, 20, 8), (1, 2, 300, 7, 64)),
    "GROUP_NORM": ((1, 32, 4, 4), (2, 64, 4, 4)),
    "TOKENS": ((2, 3, 8),),
    "LATENTS": ((2, 4, 8, 8),),
}


class Invented:
    """Every call takes a microsecond more than the one before it."""

    def medians(self, calls: Mapping[str, Call]) -> dict[str, dict[str, float]]:
        return {name: {"warm": k + 1.0, "cold": k + 2.0, "host": 5.0} for k, name in enumerate(calls)}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shapes in SMALL.items():
        monkeypatch.setattr(bench_cases, name, shapes)


def measured(op: str, monkeypatch: pytest.MonkeyPatch, dtype: str = "float32") -> list[dict[str, Any]]:
    """All kernels answered by the reference, so that their rows have times."""
    monkeypatch.setattr(gpu, "under", lambda kernel, call: call)
    everything = dict.fromkeys((*gpu.KERNELS, "wgmma", "triton_tma"))
    monkeypatch.setattr(ops, "availability", lambda: dict.fromkeys(OPS, everything))
    rows: list[dict[str, Any]] = gpu.run((op,), (dtype,), Invented(), CPU, compile_too=False)["rows"]
    return rows


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_checked_and_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(op, monkeypatch, "bfloat16" if op == "attention_wgmma" else "float32")
    ours = {"linear": ["triton"], "attention_wgmma": ["wgmma"]}.get(op, gpu.KERNELS)
    ours = ["triton_tma"] if op.endswith("triton_tma") else ours
    assert rows
    for row in rows:
        multiplies = op.startswith(("attention", "linear"))
        assert row["op"] == op and row["bytes"] > 0 and (row["flops"] > 0) == multiplies
        assert [name for name in row["ways"] if "difusores" in name] == [f"difusores {name}" for name in ours]
        for name in ("eager", *(f"difusores {name}" for name in ours)):
            way = row["ways"][name]
            assert {"warm", "cold", "host", "of ceiling"} <= set(way)
            drawn = name == "eager" and "noise" in row["case"]
            assert ("error" not in way) if drawn else way["error"] <= way["allowed"]


def libraries() -> dict[str, dict[str, Any]]:
    """What the peers' modules offer, with the signatures, layouts and defaults of their documentation."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert query.shape[1] in (20, 300) and query.shape[2] == key.shape[2] == 2, "[B, rows, H, D]"
        scores = torch.einsum("blhd,bshd->bhls", query, key) / query.shape[3] ** 0.5
        return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), value)

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0
    ) -> Tensor:
        return attend(query, key, value)

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        return attend(q, k, v)

    def fused_layer_norm_affine(
        input: Tensor, weight: Tensor, bias: Tensor, normalized_shape: torch.Size, eps: float = 1e-6
    ) -> Tensor:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    class GroupNorm(torch.nn.GroupNorm):
        def __init__(
            self,
            num_groups: int,
            num_channels: int,
            eps: float = 1e-5,
            affine: bool = True,
            device: Any = None,
            dtype: Any = None,
            act: str = "",
        ) -> None:
            super().__init__(num_groups, num_channels, eps, affine, device, dtype)
            self.act = act

        def forward(self, input: Tensor) -> Tensor:
            assert input.is_contiguous(memory_format=torch.channels_last)
            y = super().forward(input)
            return F.silu(y) if self.act == "silu" else y

    return {
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "flash_attn": {"flash_attn_func": flash_attn_func},
        "apex.contrib.group_norm": {"GroupNorm": GroupNorm},
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": fused_layer_norm_affine},
    }


def install(contents: Mapping[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    for path, content in contents.items():
        parts = path.split(".")
        for name in (".".join(parts[: k + 1]) for k in range(len(parts))):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            monkeypatch.setitem(sys.modules, name, module)
        for name, value in content.items():
            setattr(sys.modules[path], name, value)


PEERS = {
    "attention": {"xformers", "flash-attn"},
    "attention_gradients": {"xformers", "flash-attn"},
    "group_norm_silu": {"apex"},
    "group_norm_silu_backward": {"apex"},
    "layer_norm": {"apex"},
}


@pytest.mark.parametrize("op", PEERS)
def test_peers_of_other_libraries(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By modules of the same names: each is asked for what the row is about, checked and timed."""
    install(libraries(), monkeypatch)
    rows = measured(op, monkeypatch)
    for row in rows:
        # apex has its norm in channels_last, and nothing that is added to it or follows but SiLU
        there = "norm_silu" not in op or row["case"].endswith("channels_last")
        found = row["ways"].keys() & {"xformers", "flash-attn", "apex"}
        assert found == (PEERS[op] if there else set())
        for name in found:
            assert "warm" in row["ways"][name] and not gpu.wrong(row["ways"][name])
    assert any("apex" in row["ways"] or "xformers" in row["ways"] for row in rows)


def test_a_peer_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an apex whose extensions were not built: it has its reason, and the others their times."""
    install({"apex": {}, "xformers": {}}, monkeypatch)
    way = next(row["ways"] for row in measured("layer_norm", monkeypatch))
    assert "No module named 'apex.normalization" in way["apex"]["not timed"] and "warm" in way["eager"]
    way = next(row["ways"] for row in measured("attention", monkeypatch))
    assert "No module named 'xformers.ops" in way["xformers"]["not timed"] and "warm" in way["eager"]


@pytest.mark.parametrize("op", ["attention", "attention_gradients"])
def test_exact_results(op: str) -> None:
    """Those computed in parts, with what autograd finds of the formula in float64."""
    for case in bench_cases.cases(op, torch.float32, CPU):
        assert case.exact is not None
        torch.testing.assert_close(case.oracle(), replace(case, exact=None).oracle(), rtol=1e-12, atol=1e-12)


def test_every_kernel_is_among_the_ops() -> None:
    """What the CUDA module registers, and what Triton answers."""
    sources = (Path(__file__).parents[1] / "csrc" / "bindings_cuda").glob("*.cpp")
    found = set().union(*(re.findall(r'm\.impl\("(\w+)"', file.read_text()) for file in sources))
    assert len(found) > 8
    found -= {
        "attention_with_sums",
        "bias_residual_",
    }  # the gradients' forward pass; the same kernel in place
    triton = {op.name().removeprefix("difusores::").rstrip("_") for op in dispatch._LAUNCHES}
    found |= {name.removesuffix("_triton") for name in triton}
    by_descriptors = {f"{name}_triton_tma" for name in ("attention", "attention_gradients", "linear")}
    assert found | by_descriptors == set(OPS)


def test_a_way_that_cannot_run_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = gpu.run(("geglu",), ("float32",), Invented(), CPU, compile_too=False)["rows"]
    if not torch.cuda.is_available():
        for kernel in gpu.KERNELS:
            assert row["ways"][f"difusores {kernel}"]["not timed"] == ops.availability()["geglu"][kernel]
            assert "warm" not in row["ways"][f"difusores {kernel}"]


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "geglu", lambda both: both.chunk(2, -1)[0] * 1.001)
    (row,) = measured("geglu", monkeypatch)
    way = row["ways"]["difusores cuda"]
    assert way["not timed"].startswith("wrong: error") and "warm" not in way and gpu.wrong(way)
    monkeypatch.setattr(ops, "geglu", lambda both: both.chunk(2, -1)[0] * torch.nan)
    assert gpu.wrong(measured("geglu", monkeypatch)[0]["ways"]["difusores cuda"])


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any operand, also where the forward pass and the larger gradients are right."""
    right = ops.group_norm_silu

    def wrong(x: Tensor, groups: int, weight: Tensor, bias: Tensor, **more: Any) -> Any:
        return right(x, groups, weight, bias + 1e-3 * (bias - bias.detach()), **more)

    monkeypatch.setattr(ops, "group_norm_silu", wrong)
    for row in measured("group_norm_silu_backward", monkeypatch):
        assert gpu.wrong(row["ways"]["difusores cuda"]) and "warm" in row["ways"]["eager"]
    assert not any(
        gpu.wrong(row["ways"]["difusores cuda"]) for row in measured("group_norm_silu", monkeypatch)
    )
    monkeypatch.setattr(
        ops, "attention", lambda q, k, v: (q @ k.mT / 8**0.5).softmax(-1).detach() @ v + 0 * (q + k.sum())
    )
    row = measured("attention_gradients", monkeypatch)[0]
    assert gpu.wrong(row["ways"]["difusores cuda"]) and not gpu.wrong(row["ways"]["sdpa efficient"])


def test_a_backward_pass_knows_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the name that was asked for is this thread's, autograd is to stay in it on a GPU too."""
    asked = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            asked.append((dispatch.wanted(), torch._C._is_multithreading_enabled()))
            return grad

    x = torch.randn(3, requires_grad=True)
    with ops.use_backend("reference"), torch.no_grad():
        (found,) = with_gradients(lambda: Noted.apply(x), [x], [torch.ones(3)])()
    assert asked == [("reference", False)] and found.tolist() == [1.0] * 3


def test_noise_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own noise is timed beside it; other noise under the name of the kernel's is wrong."""
    right = ops.scheduler_step
    monkeypatch.setattr(
        ops,
        "scheduler_step",
        lambda *call, seeds=None, **more: right(*call, seeds=None if seeds is None else seeds + 1, **more),
    )
    plain, noisy = measured("scheduler_step", monkeypatch)
    assert not gpu.wrong(plain["ways"]["difusores cuda"])
    assert gpu.wrong(noisy["ways"]["difusores cuda"]) and "warm" in noisy["ways"]["eager"]


def test_dtypes_and_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that a kernel's fault ends leaves the rows before it."""
    monkeypatch.setattr(gpu, "under", lambda kernel, call: call)
    seen: list[list[tuple[str, str]]] = []

    def keep(result: Mapping[str, Any]) -> None:
        assert set(result["ceilings"]) == {"float16", "float32"}
        seen.append([(row["op"], row["dtype"]) for row in result["rows"]])

    gpu.run(("geglu", "layer_norm"), ("float16", "float32"), Invented(), CPU, compile_too=False, keep=keep)
    rows = [(op, dtype) for op in ("geglu", "layer_norm") for dtype in ("float16", "float32")]
    assert seen == [rows[: k + 1] for k in range(4)]


def test_a_way_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card whose shared memory is too small for a kernel; and a way that no graph can hold."""

    class OutOfResources(Exception):
        pass

    class Strict(Invented):
        def medians(self, calls: Mapping[str, Call]) -> dict[str, dict[str, Any]]:
            return super().medians(calls) | {"eager": {"not timed": "not captured: it waits"}}

    def under(kernel: str, call: Call) -> Call:
        def refuse() -> Any:
            raise OutOfResources("out of resource: shared memory\nRequired: 1, limit: 0")

        return refuse if kernel == "triton" else call

    monkeypatch.setattr(gpu, "under", under)
    monkeypatch.setattr(ops, "availability", lambda: {"geglu": dict.fromkeys(gpu.KERNELS)})
    (row,) = gpu.run(("geglu",), ("float32",), Strict(), CPU, compile_too=False)["rows"]
    assert row["ways"]["difusores triton"] == {"not timed": "out of resource: shared memory"}
    assert row["ways"]["eager"]["not timed"] == "not captured: it waits"
    assert "warm" in row["ways"]["difusores cuda"] and "warm" not in row["ways"]["eager"]


def test_captures_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(call: Call, times: int) -> Any:
        call()
        return SimpleNamespace(replay=call)

    def refuse() -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    clock = object.__new__(gpu.GraphClock)
    clock.flush = torch.empty(1)
    monkeypatch.setattr(clock, "_captured", captured)
    for name in ("_microseconds", "_host"):
        monkeypatch.setattr(clock, name, lambda call: 2.0)
    times = clock.medians({"good": lambda: None, "bad": refuse})
    assert times["good"] == {"warm": 0.2, "cold": 2.0, "host": 2.0}
    assert times["bad"] == {"not timed": "not captured: operation not permitted when stream is capturing"}


def test_rates_and_lines() -> None:
    clock = Invented()
    ceilings = gpu.measure_ceilings(clock, CPU, torch.float32)
    assert ceilings == {
        "copy GB/s": round(8 * 4096 / 1.0 / 1e3, 1),
        "matmul TFLOP/s": round(2 * 64**3 / 2.0 / 1e6, 2),
    }
    ways = {
        "eager": {"error": 0.0, "allowed": 1.0, "warm": 4.0, "cold": 8.0, "host": 9.0, "of ceiling": 0.25},
        "difusores cuda": {
            "error": 0.0,
            "allowed": 1.0,
            "warm": 2.0,
            "cold": 3.0,
            "host": 5.0,
            "of ceiling": 0.5,
        },
        "difusores triton": {"not timed": "no such thing"},
    }
    text = gpu.lines({"op": "geglu", "dtype": "float16", "case": "2x3", "ways": ways})
    assert [line.split() for line in text] == [
        ["geglu", "float16", "2x3"],
        ["difusores", "cuda", "2.00", "3.00", "5.0", "2.00x", "50%"],
        ["eager", "4.00", "8.00", "9.0", "25%"],
        ["difusores", "triton", "no", "such", "thing"],
    ]


def test_command_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "difusores", "bench", "gpu", "--json", file], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no CUDA device was found" in done.stderr and not file.exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
def test_command_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-m",
        "difusores",
        "bench",
        "gpu",
        "--quick",
        "--no-compile",
        "--op",
        "geglu",
        "--json",
    ]
    done = subprocess.run([*command, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert all(content["ceilings"][dtype]["copy GB/s"] > 10 for dtype in ("float16", "float32"))
    assert all(
        way["warm"] > 0 for row in content["rows"] for name, way in row["ways"].items() if "warm" in way
    )
