"""Whole runs of a tiny model: they learn, survive being killed, and leave folders that diffusers reads."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed

from difusores.__main__ import main
from difusores.models import UNet2DModel
from difusores.training import checkpoint, loop
from difusores.training.config import TrainConfig
from difusores.training.data import batch_indices
from difusores.training.loop import Trainer, build_model, build_scheduler, load_data, train
from difusores.training.progress import Progress, learning_rate

SIZE = {"resolution": 8, "widths": (8, 16), "attention": (4,), "head_dim": 8, "norm_groups": 4}
CLASSES = {**SIZE, "class_conditional": True, "batch_size": 6}


def options(config: dict[str, Any]) -> list[str]:
    """A configuration as the command line has it."""
    words = []
    for name, value in config.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [str(v) for v in (value if isinstance(value, tuple) else (value,))]
    return words


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_until(step: int | None, arguments: list[str]) -> int:
    """Run `train` and kill it when it has reported `step` (None: never). Returns the step it began from."""
    command = [sys.executable, "-m", "difusores", "train", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    began = -1
    for line in process.stdout:
        if found := re.search(r"from step (\d+)", line):
            began = int(found[1])
        if line.startswith(f"step {step}/"):
            process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == (0 if step is None else -signal.SIGKILL)
    return began


def assert_same(a: Any, b: Any, path: str = "state") -> None:
    """Equal bit for bit, in every leaf."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.mark.slow
def test_a_run_killed_twice_ends_as_an_unbroken_one(pictures: Path, tmp_path: Path):
    config = {**CLASSES, "data": pictures, "steps": 60, "warmup_steps": 10, "checkpoint_every": 4}
    config |= {"flip": True, "log_every": 1, "sample_every": 20, "sample_steps": 2, "label_dropout": 0.3}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert run_until(None, options({**config, "out": unbroken})) == 0
    chance = random.SystemRandom()  # the seeded generator would always choose the same two steps
    first, second = chance.randint(5, 20), chance.randint(30, 45)
    print(f"killed at steps {first} and {second}")  # shown where the test fails
    assert run_until(first, options({**config, "out": broken})) == 0
    assert 0 < run_until(second, ["--resume", str(broken)]) <= first + 4
    assert first < run_until(None, ["--resume", str(broken)]) <= second + 4

    states = [checkpoint.load_latest(run / "checkpoints") for run in (unbroken, broken)]
    for state in states:
        assert state["step"] == 60 and state["config"].pop("out")
    assert_same(*states)
    for name in ("samples/step-00000060.png", "pipeline/unet/diffusion_pytorch_model.safetensors"):
        assert (unbroken / name).read_bytes() == (broken / name).read_bytes()
    assert [path.name for path in checkpoint.checkpoints(broken / "checkpoints")] == [
        "step-00000056.pt",
        "step-00000060.pt",
    ]


@pytest.mark.parametrize(
    ("kind", "precision"), [("v_prediction", "bf16"), ("epsilon", "fp32"), ("sample", "fp32")]
)
def test_the_loss_falls(kind: str, precision: str, pictures: Path, tmp_path: Path):
    config = TrainConfig(
        data=str(pictures),
        out=str(tmp_path),
        steps=80,
        warmup_steps=5,
        learning_rate=3e-3,
        prediction_type=kind,
        precision=precision,
        **CLASSES,
    )
    trainer = Trainer(config)
    losses = [trainer.train_step().item() for _ in range(config.steps)]
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    weights = trainer.plain_model.state_dict()
    assert all(w.dtype is torch.float32 for w in weights.values())
    assert any(not torch.equal(w, trainer.ema.model.state_dict()[name]) for name, w in weights.items())


def test_the_exported_folder_loads_in_diffusers(pictures: Path, tmp_path: Path):
    from diffusers import DDIMPipeline, DDPMPipeline

    config = TrainConfig(
        data=str(pictures), out=str(tmp_path), steps=2, warmup_steps=0, sample_every=0, **CLASSES
    )
    folder = train(config)
    ours = UNet2DModel.from_pretrained(folder / "unet")
    assert ours.config["num_class_embeds"] == 3
    sample, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    for pipeline_class in (DDPMPipeline, DDIMPipeline):
        pipeline = pipeline_class.from_pretrained(folder)
        assert pipeline.scheduler.config.prediction_type == "v_prediction"
        assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
        with torch.no_grad():
            expected = pipeline.unet(sample, 500, class_labels=labels).sample
            torch.testing.assert_close(ours(sample, 500, class_labels=labels).sample, expected)
    state = checkpoint.load_latest(tmp_path / "checkpoints")
    assert_same(dict(ours.state_dict()), dict(state["ema"]))


def test_an_unconditional_run_writes_samples(pictures: Path, tmp_path: Path):
    config = TrainConfig(
        data=str(pictures), out=str(tmp_path), steps=2, warmup_steps=0, sample_every=1, sample_steps=2, **SIZE
    )
    train(config)
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == [
        "step-00000001.png",
        "step-00000002.png",
    ]
    assert UNet2DModel.from_pretrained(tmp_path / "pipeline" / "unet").config["num_class_embeds"] is None


def test_a_run_begins_with_the_weights_it_is_given(pictures: Path, tmp_path: Path):
    first = TrainConfig(
        data=str(pictures), out=str(tmp_path / "first"), steps=2, warmup_steps=0, sample_every=0, **CLASSES
    )
    folder = train(first)
    exported = UNet2DModel.from_pretrained(folder / "unet").state_dict()
    second = replace(first, out=str(tmp_path / "second"), init=str(folder), seed=5)
    assert_same(dict(Trainer(second).plain_model.state_dict()), dict(exported))
    with pytest.raises(ValueError, match=r"--init is .* has shape .* there, .* here"):
        Trainer(replace(second, widths=(8, 24)))
    with pytest.raises(OSError, match="nowhere"):
        Trainer(replace(second, init=str(tmp_path / "nowhere")))


def test_labels_are_dropped_to_the_null_label(pictures: Path, tmp_path: Path):
    config = TrainConfig(
        data=str(pictures), out=str(tmp_path), label_dropout=0.5, **{**CLASSES, "batch_size": 400}
    )
    trainer = Trainer(config)
    images, labels = trainer.batch()
    assert labels is not None and (0.4 < (labels == 2).float().mean() < 0.6)
    bright_above = images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))
    assert torch.equal(bright_above[labels != 2], (labels == 0)[labels != 2])


def first_step_by_hand(config: TrainConfig, processes: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The mean loss and the clipped gradients of a run's first step, the whole batch in one process."""
    data = load_data(config)
    set_seed(config.seed)
    model = build_model(config, len(data.class_names))
    parts = []
    for process, indices in enumerate(
        batch_indices(0, config.batch_size, len(data), config.seed).chunk(processes)
    ):
        set_seed(config.seed + process)  # each process draws noise of its own
        images, labels = data.batch(indices), data.labels[indices]
        if config.flip:
            mirrored = torch.rand(len(images)) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        if config.class_conditional:
            labels[torch.rand(len(images)) < config.label_dropout] = len(data.class_names)
        parts.append((images, labels, torch.randn(images.shape), torch.randint(1000, (len(images),))))
    images, labels, noise, times = map(torch.cat, zip(*parts, strict=True))
    a = build_scheduler(config).alphas_cumprod.float()[times][:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        noisy = a.sqrt() * images + (1 - a).sqrt() * noise
        prediction = model(noisy, times, class_labels=labels if config.class_conditional else None).sample
    velocity = a.sqrt() * noise - (1 - a).sqrt() * images
    wanted = {"epsilon": noise, "sample": images, "v_prediction": velocity}[config.prediction_type]
    snr = a / (1 - a)
    weight = torch.ones(())
    if config.min_snr_gamma:
        unit = {"epsilon": snr, "sample": torch.ones(()), "v_prediction": snr + 1}[config.prediction_type]
        weight = snr.clamp(max=config.min_snr_gamma) / unit
    loss = (weight * (prediction.float() - wanted) ** 2).mean()
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    return loss.detach(), [g * (config.max_grad_norm / norm).clamp(max=1) for g in gradients]


def check_first_step(trainer: Trainer, processes: int) -> None:
    """Loss, gradients, AdamW's first update and the average, against the same by hand."""
    config, step, gradients = trainer.config, trainer.optimizer.step, []
    parameters = list(trainer.plain_model.parameters())
    before = [p.detach().clone() for p in parameters]

    def recorded() -> None:
        gradients.extend(p.grad.clone() for p in parameters)
        step()

    trainer.optimizer.step = recorded
    losses = trainer.gather_object([trainer.train_step().item()])
    trainer.optimizer.step = step
    loss, expected = first_step_by_hand(config, processes)
    assert sum(losses) / processes == pytest.approx(loss.item(), rel=1e-5)
    largest = max(g.abs().max().item() for g in expected)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4 * largest)
    rate = config.learning_rate / config.warmup_steps
    for p, averaged, old, g in zip(
        parameters, trainer.ema.model.parameters(), before, gradients, strict=True
    ):
        new = old * (1 - rate * config.weight_decay) - rate * g / (g.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), new, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(averaged, 0.1 * old + 0.9 * p.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 0.01, "weight_decay": 0.3, "flip": True},
        {"prediction_type": "epsilon", "min_snr_gamma": 1.0, "max_grad_norm": 1e6, "weight_decay": 0.0},
        {"prediction_type": "sample", "min_snr_gamma": 5.0, "class_conditional": True, "label_dropout": 0.5},
        {"precision": "bf16", "class_conditional": True, "label_dropout": 0.0, "ema_decay": 0.9},
    ],
    ids=str,
)
def test_a_step_is_as_by_hand(changes: dict[str, Any], pictures: Path, tmp_path: Path):
    config = TrainConfig(
        data=str(pictures), out=str(tmp_path), warmup_steps=4, learning_rate=0.02, **SIZE, **changes
    )
    check_first_step(Trainer(config), 1)


@pytest.mark.slow
def test_three_processes_train_as_one_and_resume_bit_for_bit(pictures: Path, tmp_path: Path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command = [sys.executable, *launcher, __file__, str(pictures), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]


def in_each_process(pictures: str, out: str) -> None:
    """What the test above runs: a step as by hand, then the same two steps unbroken and resumed."""
    trainer = Trainer(TrainConfig(data=pictures, out=out, max_grad_norm=0.01, flip=True, **CLASSES))
    check_first_step(trainer, 3)
    trainer.train_step()
    middle = copy.deepcopy(trainer.state())
    for _ in range(2):
        trainer.train_step()
    resumed = Trainer(trainer.config, middle)
    for _ in range(2):
        resumed.train_step()
    assert_same(resumed.state(), trainer.state())


def test_a_grid_is_drawn_with_guidance(pictures: Path, tmp_path: Path):
    config = TrainConfig(data=str(pictures), out=str(tmp_path), sample_steps=2, **CLASSES)
    trainer = Trainer(config)
    grids = []
    for guidance in (1.0, 3.0):
        trainer.config = replace(config, guidance=guidance)
        trainer.sample_grid(tmp_path / "grid.png")
        grids.append((tmp_path / "grid.png").read_bytes())
    assert grids[0] != grids[1]


def test_two_processes_train_one_model(pictures: Path, tmp_path: Path):
    config = {**CLASSES, "data": pictures, "out": tmp_path, "steps": 3, "warmup_steps": 0, "sample_steps": 2}
    # What accelerate's launcher starts for several devices; on CPUs it needs MPI for that.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "difusores", "train"]
    done = subprocess.run([*command, *options(config)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("from step 0") == 1
    state = checkpoint.load_latest(tmp_path / "checkpoints")
    first, second = state["rng"]
    assert state["step"] == 3 and not torch.equal(first["torch"], second["torch"])
    with pytest.raises(ValueError, match="2 processes and cannot go on with 1"):
        Trainer(TrainConfig(**state["config"]), state)


def test_resuming_with_other_images_is_refused(pictures: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    config = TrainConfig(data=str(data), out=str(tmp_path / "run"), **CLASSES)
    state = Trainer(config).state()
    moved = data.rename(tmp_path / "moved")
    Trainer(replace(config, data=str(moved)), state)  # the same pictures in another place
    data = moved.rename(data)
    (data / "above" / "0.png").rename(data / "above" / "other.png")
    with pytest.raises(ValueError, match="holds files of other names than when the run was begun"):
        Trainer(config, state)
    (data / "above" / "other.png").unlink()
    with pytest.raises(ValueError, match="held 16 images when the run was begun, now 15"):
        Trainer(config, state)
    (data / "above").rename(data / "over")
    with pytest.raises(ValueError, match="class above is gone, class over is new"):
        Trainer(config, state)
    shutil.copytree(data / "over", data / "third")
    with pytest.raises(ValueError, match="class above is gone, class over is new, class third is new"):
        Trainer(config, state)


def test_the_names_of_the_classes_are_printed_and_written(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = TrainConfig(
        data=str(pictures), out=str(tmp_path), steps=1, warmup_steps=0, sample_every=0, **CLASSES
    )
    train(config)
    assert "classes: 0 above, 1 below\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "classes.json").read_text()) == {"0": "above", "1": "below"}


def test_a_failing_grid_comes_after_the_checkpoint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("difusores.training.loop.write_grid", fail)
    config = TrainConfig(data=str(pictures), out=str(tmp_path), steps=1, warmup_steps=0, **CLASSES)
    with pytest.raises(OSError, match="disk full"):
        train(config)
    assert checkpoint.load_latest(tmp_path / "checkpoints")["step"] == 1


def test_a_finished_run_says_so(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = TrainConfig(
        data=str(pictures), out=str(tmp_path), steps=1, warmup_steps=0, sample_every=0, **CLASSES
    )
    train(config)
    assert f"exported {tmp_path / 'pipeline'}" in capsys.readouterr().out
    train(config, checkpoint.load_latest(tmp_path / "checkpoints"))
    printed = capsys.readouterr().out
    assert "exported" not in printed and "all 1 steps are done already" in printed


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=1)

    def torn(state: object, file: Any) -> None:
        (file.write if hasattr(file, "write") else Path(file).write_bytes)(b"half")
        raise OSError("killed")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="killed"):
        checkpoint.save(tmp_path, 1, {"step": 1, "again": True}, keep=1)
    assert checkpoint.load_latest(tmp_path) == {"step": 1}


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(f"sync {os.fstat(fd).st_size}"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), rename(*paths)))
    path = checkpoint.save(tmp_path, 1, {"step": 1}, keep=1)
    assert done == [f"sync {path.stat().st_size}", "rename"]


@pytest.mark.parametrize("damage", ["empty", "half", "garbage"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(damage: str, tmp_path: Path):
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=2)
    newest = checkpoint.save(tmp_path, 2, {"step": 2, "weights": torch.zeros(1000)}, keep=2)
    whole = newest.read_bytes()
    newest.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "garbage": b"garbage"}[damage])
    with pytest.raises(ValueError, match=r"step-00000002\.pt is damaged .* delete it .* step-00000001\.pt"):
        checkpoint.load_latest(tmp_path)
    newest.unlink()
    assert checkpoint.load_latest(tmp_path) == {"step": 1}


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path: Path):
    folder = tmp_path / "pipeline"

    def write(target: Path) -> None:
        target.mkdir()
        (target / "model").write_text("new")

    def fail(target: Path) -> None:
        write(target)
        raise OSError("disk full")

    checkpoint.write_folder(folder, write)
    (folder / "model").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_folder(folder, fail)
    assert (folder / "model").read_text() == "old"
    checkpoint.write_folder(folder, write)
    assert (folder / "model").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_weights_that_are_not_finite_are_not_saved(
    what: str,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    real = loop.diffusion_loss
    losses = itertools.count(1)

    def spoilt(*args: Any) -> torch.Tensor:
        loss = real(*args)
        if next(losses) != 2:
            return loss
        # The square root's derivative at 0 is infinite: a finite loss with gradients that are not.
        return loss * float("nan") if what == "loss" else loss + (loss - loss.detach()).abs().sqrt()

    monkeypatch.setattr(loop, "diffusion_loss", spoilt)
    config = {**CLASSES, "data": pictures, "out": tmp_path, "steps": 4, "warmup_steps": 0}
    config |= {"checkpoint_every": 1, "sample_every": 0, "keep_checkpoints": 1}
    assert main(["train", *options(config)]) == 2
    assert f"error: the {what} is nan at step 2" in capsys.readouterr().err
    assert checkpoint.load_latest(tmp_path / "checkpoints")["step"] == 1


def test_unfinished_files_are_not_checkpoints(tmp_path: Path):
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=2)
    (tmp_path / "step-00000002.tmp").write_bytes(b"half")
    assert checkpoint.load_latest(tmp_path) == {"step": 1}
    for step in (3, 4):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003.pt", "step-00000004.pt"]


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(data="mnist", out="run", steps=110, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2
    assert rates[60] == pytest.approx(1) and rates[110] == pytest.approx(0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_a_shorter_line_of_progress_covers_a_longer_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = Progress(TrainConfig(data="mnist", out="run", log_every=1), 0)
    progress.since = (0, progress.since[1] - 1000)
    progress.report(1, torch.tensor(12345.0))
    progress.report(2, torch.tensor(1.0))
    first, second, _ = capsys.readouterr().out.split("\r")
    assert len(second) >= len(first) > len(second.rstrip())


def test_a_loss_that_is_not_finite_stops_the_run(pictures: Path, tmp_path: Path):
    progress = Progress(TrainConfig(data="mnist", out="run", log_every=2), 0)
    progress.report(1, torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        progress.report(2, torch.tensor(1.0))


if __name__ == "__main__":
    in_each_process(*sys.argv[1:])
