"""What an import costs and what survives a broken installation; each case in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import difusores
from difusores import doctor, native
from difusores.__main__ import main

PACKAGE = Path(difusores.__file__).parent
HEAVY = ("torch", "triton", "diffusers", "transformers", "huggingface_hub", "numpy", "PIL", "accelerate")
TAG = f"{sys.implementation.cache_tag}-x86_64-linux-gnu"
ANSWER = """
import json, torch
from difusores import doctor, ops
x = torch.arange(16.0).reshape(1, 4, 2, 2)
y = ops.group_norm_silu(x, 2, torch.ones(4), torch.zeros(4), silu=False)
print(json.dumps({"mean": y.mean().item(), "std": y.std(correction=0).item(), **doctor.examine()}))
"""


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DIFUSORES_")}
    if cwd is not None:
        kept["PYTHONPATH"] = str(cwd)
    return subprocess.run(
        [sys.executable, *arguments],
        env={**kept, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has no compiled module."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_reason.txt", "assets")
    shutil.copytree(PACKAGE, tmp_path / "difusores", ignore=ignored)
    return tmp_path


def test_import_is_silent_and_light() -> None:
    code = f"import sys, difusores; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = run("-X", "importtime", "-W", "error", "-c", code)
    assert done.stdout.strip() == "[]"
    others = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert others == []


def test_imported_while_tensors_are_made_on_meta() -> None:
    """As in `with torch.device("meta"): difusores.UNet2DModel(...)`: no tensor of a module's own is there."""
    code = """
import sys, torch, difusores
with torch.device("meta"):
    for name in difusores.__all__:
        getattr(difusores, name)
held = {(module, name): value for module in list(sys.modules) if module.startswith("difusores")
        for name, value in vars(sys.modules[module]).items() if isinstance(value, torch.Tensor)}
print([key for key, value in held.items() if value.is_meta], len(held))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    found, count = done.stdout.strip().rsplit(" ", 1)
    assert found == "[]" and int(count) > 0


def test_public_names_agree_with_the_type_checkers_imports() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == difusores._PUBLIC
    for name in difusores.__all__:
        assert getattr(difusores, name) is not None
        assert name in dir(difusores)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="'difusores' has no attribute 'nonesuch'"):
        difusores.nonesuch  # noqa: B018


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (None, b"", "not built"),
        (
            "_build_reason.txt",
            b"no working C++ compiler was found\n",
            "not built: no working C++ compiler was found",
        ),
        (f"_C.{TAG}.so", b"not an ELF file", "broken: "),
        (
            "_C.cpython-39-x86_64-linux-gnu.so",
            b"",
            "built for another Python: _C.cpython-39-x86_64-linux-gnu.so",
        ),
    ],
    ids=["missing", "not-built", "garbage", "another-python"],
)
def test_without_a_usable_module_the_ops_answer_and_the_doctor_says_why(
    copy: Path, file: str | None, content: bytes, reason: str
) -> None:
    if file is not None:
        (copy / "difusores" / file).write_bytes(content)
    answer = report(run("-W", "error", "-c", ANSWER, cwd=copy))
    assert answer["modules"]["cpu"].startswith(reason)
    assert answer["ops"]["group_norm_silu"]["cpu"].startswith(reason)
    assert answer["modules"]["cuda"] == "not built: it needs nvcc and a CUDA build of torch"
    assert answer["ops"]["group_norm_silu"]["reference"] is None
    assert answer["mean"] == pytest.approx(0.0, abs=1e-6)
    assert answer["std"] == pytest.approx(1.0, abs=1e-4)
    assert answer["problems"] == []


def test_the_compiled_module_is_loaded() -> None:
    reason = native.status("cpu")
    if reason is not None:
        pytest.skip(reason)  # no compiler, or switched off; CI accepts the second alone
    assert native.build_info()["isa_used"] in native.build_info()["isa_levels"].split(",")


def test_the_doctor_says_for_which_cards_the_cuda_module_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"compiler": "NVIDIA 13.0", "architectures": "80-real 120"}
    monkeypatch.setattr(native, "_status", native.Status({"cpu": "not built", "cuda": None}, {"cuda": built}))
    found = doctor.examine()
    assert found["build"] == {} and found["cuda_build"] == built
    assert "cuda build\n  compiler          NVIDIA 13.0\n  architectures     80-real 120" in doctor.describe(
        found
    )


def test_switched_off() -> None:
    answer = report(run("-c", ANSWER, DIFUSORES_DISABLE="1"))
    assert answer["modules"] == dict.fromkeys(("cpu", "cuda"), "switched off by DIFUSORES_DISABLE=1")
    assert answer["std"] == pytest.approx(1.0, abs=1e-4)
    assert answer["environment"] == {"DIFUSORES_DISABLE": "1"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No module named 'torch'"),
        ("raise OSError('libtorch.so: too short')", "libtorch.so: too short"),
    ],
    ids=["missing", "broken"],
)
def test_doctor_without_torch(copy: Path, content: str | None, words: str) -> None:
    if content is None:
        content = "raise ModuleNotFoundError(\"No module named 'torch'\")"
    (copy / "torch.py").write_text(content, encoding="utf-8")
    (copy / "difusores" / f"_C.{TAG}.so").write_bytes(b"")
    answer = report(run("-m", "difusores", "doctor", "--json", cwd=copy))
    assert words in answer["problems"][0]
    assert answer["modules"]["cpu"] == f"torch cannot be imported: {words}"
    text = run("-m", "difusores", "doctor", cwd=copy)
    assert text.returncode == 0
    assert words in text.stdout


def test_doctor_says_which_copy_it_is_of(copy: Path) -> None:
    assert report(run("-m", "difusores", "doctor", "--json", cwd=copy))["folder"] == str(copy / "difusores")
    assert str(copy / "difusores") in run("-m", "difusores", "doctor", cwd=copy).stdout


def test_a_cuda_module_that_is_there_is_looked_at(copy: Path) -> None:
    (copy / "difusores" / f"_cuda.{TAG}.so").write_bytes(b"not an ELF file")
    answer = report(run("-m", "difusores", "doctor", "--json", cwd=copy))
    assert answer["modules"]["cuda"].startswith("broken: ")


def test_a_cuda_module_beside_a_torch_without_cuda(copy: Path, tmp_path: Path) -> None:
    compiler = shutil.which("c++") or pytest.skip("needs a C++ compiler")
    source = tmp_path / "module.cpp"
    source.write_text(
        'extern "C" { void aoti_torch_get_current_cuda_stream();'
        " void* PyInit__cuda() { aoti_torch_get_current_cuda_stream(); return 0; } }"
    )
    module = copy / "difusores" / f"_cuda.{TAG}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", module, source], check=True)
    answer = report(run("-m", "difusores", "doctor", "--json", cwd=copy))
    words = "has no CUDA, whose functions the module calls"
    assert answer["modules"]["cuda"] == f"built, but this torch ({torch.__version__}) {words}"


def test_a_run_that_diverges_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(*_: object) -> int:
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr("difusores.doctor.run_doctor", diverge)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "difusores: error: the loss is nan\n"


def test_doctor_with_senseless_variables() -> None:
    senseless = {"DIFUSORES_BACKEND": "abacus", "DIFUSORES_ISA": "mmx", "DIFUSORES_DISABLE": "perhaps"}
    answer = report(run("-m", "difusores", "doctor", "--json", **senseless))
    assert answer["environment"] == senseless
    assert len(answer["problems"]) == 3
    for value, problem in zip(("perhaps", "mmx", "abacus"), answer["problems"], strict=True):
        assert value in problem
    assert answer["ops"]["group_norm_silu"]["reference"] is None


def test_a_senseless_variable_stops_the_ops_in_words() -> None:
    done = run("-c", "import difusores; difusores.ops", DIFUSORES_ISA="mmx")
    assert done.returncode == 1
    assert (
        "ValueError: DIFUSORES_ISA='mmx' means nothing; allowed: base, avx2, avx512, avx512_bf16, amx"
        in done.stderr
    )


def test_the_benchmark_of_the_kernels_says_that_they_are_missing() -> None:
    done = run(str(PACKAGE.parent / "benchmarks" / "bench_ops.py"), DIFUSORES_DISABLE="1")
    assert done.returncode == 1
    assert (
        done.stderr == "the compiled module is needed and is not here: switched off by DIFUSORES_DISABLE=1\n"
    )


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["generate", "--model", "/nonexistent/model", "--num", "1", "--out", "x.png"]
    assert main(missing) == 2
    error = capsys.readouterr().err
    assert error.startswith("difusores: error: ")
    assert "/nonexistent/model" in error
    assert error.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object) -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr("difusores.doctor.run_doctor", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["doctor"])
