"""The judge of generated digits is kept, for the digits that it was trained on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "digits_judge.py"


def test_a_judge_is_trained_once_for_each_set_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("digits_judge", SCRIPT)
    assert spec is not None and spec.loader is not None
    judging = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judging)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there" / "yet"))
    trained = []

    def train_judge(digits: object) -> object:
        assert judging.cache_dir().is_dir(), "found out before the training, not after"
        trained.append(digits)
        return judging.Judge()

    monkeypatch.setattr(judging, "train_judge", train_judge)
    for number in (0, 1):
        images = np.full((10_000, 28, 28), number, dtype=np.uint8)
        np.savez(tmp_path / f"{number}.npz", images=images, labels=np.zeros(10_000, np.uint8))
    for number, expected in ((0, 1), (0, 1), (1, 2)):
        judging.load_judge(tmp_path / f"{number}.npz")
        assert len(trained) == expected
