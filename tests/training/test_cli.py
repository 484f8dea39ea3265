"""The commands: mistakes are said in one sentence, before anything is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from difusores.__main__ import main
from difusores.training.config import TrainConfig
from difusores.training.fetch import MNIST_FILE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps is 0; allowed: 1 or more"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0; allowed: above 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan; allowed: above 0"),
        (["--label-dropout", "1"], "--label-dropout is 1.0; allowed: 0 to below 1"),
        (["--channels", "2"], "--channels is 2; allowed: 1 and 3"),
        (
            ["--prediction-type", "noise"],
            "--prediction-type is 'noise'; allowed: epsilon, sample, v_prediction",
        ),
        (["--precision", "fp16"], "--precision is 'fp16'; allowed: fp32, bf16"),
        (["--beta-schedule", "cosine"], "--beta-schedule is 'cosine'; allowed: linear"),
        (["--warmup-steps", "11"], "--warmup-steps is 11; allowed: at most steps, 10"),
        (["--widths", "12", "24"], "--widths is (12, 24); allowed: multiples of norm_groups, 8"),
        (["--resolution", "36"], "--resolution is 36; allowed: multiples of 8"),
        (["--attention", "7"], "--attention is (7,); allowed: among 32, 16, 8, 4"),
        (["--class-conditional", "--data", "{pictures}/above"], "--class-conditional needs classes"),
        (["--data", "nowhere"], "nowhere is no folder"),
        (["--data", "nowhere.npz"], "difusores fetch mnist"),
        (["--data", "mnist", "--channels", "3"], "--channels is 3; allowed: 1 for mnist"),
        (["--out", ""], "--out is ''; allowed: the name of a folder"),
        (["--out", "{pictures}/above/run"], "above/run lies in --data"),
        (["--train-timesteps", "10"], "--sample-steps is 25; allowed: at most train_timesteps, 10"),
        (["--seed", "2147483648"], "--seed is 2147483648; allowed: 0 to 2147483647"),
    ],
)
def test_a_bad_option_is_named(
    options: list[str],
    message: str,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    options = [option.format(pictures=pictures) for option in options]
    base = ["train", "--data", str(pictures), "--out", "run", "--steps", "10", "--warmup-steps", "0"]
    assert main([*base, *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_must_be_given(capsys: pytest.CaptureFixture[str]):
    assert main(["train"]) == 2
    assert "--data and --out must be given, or --resume" in capsys.readouterr().err


def test_resume_refuses_other_options_and_folders_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "--resume", str(tmp_path), "--steps", "5", "--flip"]) == 2
    assert "leave out --steps, --flip" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "no checkpoint in" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoints", "samples", "pipeline", "classes.json"])
def test_a_new_run_does_not_overwrite_what_is_there(
    name: str, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").touch()
    steps = ["--steps", "1", "--warmup-steps", "0"]
    assert main(["train", "--data", str(pictures), "--out", str(tmp_path), *steps]) == 2
    error = capsys.readouterr().err
    assert f"holds {name} already" in error and f"--resume {tmp_path}" in error
    assert [path.name for path in tmp_path.rglob("*")] == [name, "precious"]


def test_a_folder_that_cannot_be_made_is_said_before_the_first_step(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    steps = ["--steps", "1", "--warmup-steps", "0", "--log-every", "1"]
    assert main(["train", "--data", str(pictures), "--out", str(out), *steps]) == 2
    printed = capsys.readouterr()
    assert str(out) in printed.err and "step 1/1" not in printed.out


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in TrainConfig.__dataclass_fields__)


def test_fetch_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    digits = {"images": np.zeros((3, 28, 28), np.uint8), "labels": np.arange(3, dtype=np.uint8)}
    np.savez(tmp_path / MNIST_FILE, **digits)
    before = (tmp_path / MNIST_FILE).read_bytes()
    assert main(["fetch", "mnist", "--out", str(tmp_path)]) == 0
    assert "here already" in capsys.readouterr().out
    assert (tmp_path / MNIST_FILE).read_bytes() == before


def test_training_without_accelerate_names_it(pictures: Path, tmp_path: Path):
    program = (
        "import sys; sys.modules['accelerate'] = None; from difusores.__main__ import main; "
        f"sys.exit(main(['train', '--data', {str(pictures)!r}, '--out', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install accelerate" in done.stderr and "Traceback" not in done.stderr
