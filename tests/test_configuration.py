"""Configurations (storing, freezing, switching between classes, files, the Hub) and output classes."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from difusores.configuration import ConfigMixin, FrozenDict, register_to_config
from difusores.outputs import BaseOutput


class Sampler(ConfigMixin):
    config_name = "sampler_config.json"
    ignore_for_config: ClassVar[list[str]] = ["device"]

    @register_to_config
    def __init__(self, steps: int = 10, betas: object = None, clip: bool = True, device: str = "cpu") -> None:
        self.device = device


class Other(ConfigMixin):
    config_name = "sampler_config.json"

    @register_to_config
    def __init__(self, steps: int = 20, clip: bool = False) -> None:
        pass


class Layer(ConfigMixin, torch.nn.Module):
    config_name = "config.json"

    @register_to_config
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)


def test_every_argument_is_stored_and_unpassed_ones_are_named() -> None:
    sampler = Sampler(5, clip=False, _private="kept")
    assert dict(sampler.config) == {
        "_private": "kept",
        "steps": 5,
        "betas": None,
        "clip": False,
        "_use_default_values": ["betas"],
    }
    assert sampler.device == "cpu"
    with pytest.raises(TypeError, match="unexpected keyword"):
        Sampler(stpes=3)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("steps"),
        lambda c: c.update(steps=1),
        lambda c: c.setdefault("steps", 1),
        lambda c: c.__delitem__("steps"),
        lambda c: c.__setitem__("steps", 1),
        lambda c: setattr(c, "steps", 1),
        lambda c: c.__ior__({"steps": 1}),
        lambda c: c.clear(),
        lambda c: c.popitem(),
    ],
)
def test_a_configuration_is_frozen(change: object) -> None:
    config = Sampler().config
    with pytest.raises(TypeError, match="cannot be changed in place"):
        change(config)  # type: ignore[operator]
    assert config["steps"] == config.steps == 10


def test_a_configuration_survives_pickle_and_copy() -> None:
    config = Sampler(7).config
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config), config.copy()):
        assert type(twin) is FrozenDict and twin == config and twin.steps == 7
    with pytest.raises(AttributeError, match="no key 'stpes'"):
        _ = config.stpes


def test_a_configuration_joined_with_a_dictionary_is_a_new_one() -> None:
    config = Sampler(7).config
    for joined, steps in ((config | {"steps": 8, "new": 1}, 8), ({"steps": 8, "new": 1} | config, 7)):
        assert type(joined) is FrozenDict and joined.steps == joined["steps"] == steps and joined.new == 1
    assert config == Sampler(7).config
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = config | 3


def test_a_key_read_off_the_object_warns_and_unknown_names_raise() -> None:
    for owner, key, value in ((Sampler(7), "steps", 7), (Layer(4), "width", 4)):
        with pytest.warns(FutureWarning, match=rf"reading '{key}' off a {type(owner).__name__}"):
            assert getattr(owner, key) == value
        with pytest.raises(AttributeError, match="no attribute 'stpes'"):
            _ = owner.stpes
    assert isinstance(Layer(4).linear, torch.nn.Linear)


def test_save_and_load(tmp_path: Path) -> None:
    sampler = Sampler(betas=np.array([0.5, 0.25], dtype=np.float32), steps=np.int64(4))  # type: ignore[arg-type]
    sampler.save_config(tmp_path / "new" / "folder")
    path = tmp_path / "new" / "folder" / "sampler_config.json"
    text = path.read_text()
    assert json.loads(text) == {
        "_class_name": "Sampler",
        "_diffusers_version": "0.42.0",
        "betas": [0.5, 0.25],
        "clip": True,
        "steps": 4,
    }
    assert list(json.loads(text)) == sorted(json.loads(text)) and text.endswith("}\n")
    assert repr(sampler) == f"Sampler {text}"
    assert "Sampler object at" in repr(Sampler(betas=object())) + repr(Sampler.__new__(Sampler))  # type: ignore[arg-type]
    for source, kwargs in (
        (path, {}),
        (tmp_path / "new" / "folder", {}),
        (tmp_path / "new", {"subfolder": "folder"}),
    ):
        assert Sampler.load_config(source, **kwargs) == json.loads(text)
    config, unused, commit = Sampler.load_config(
        path, return_unused_kwargs=True, return_commit_hash=True, a=1
    )
    assert (config, unused, commit) == (json.loads(text), {"a": 1}, None)


def test_the_commit_is_read_from_a_snapshot_folder(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "0123abc"
    Sampler().save_config(folder)
    assert Sampler.load_config(folder, return_commit_hash=True)[1] == "0123abc"


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    Sampler(3).save_config(tmp_path)
    before = (tmp_path / "sampler_config.json").read_text()
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        Sampler(betas=object()).save_config(tmp_path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        Sampler().to_json_file(tmp_path / "taken")
    assert (tmp_path / "sampler_config.json").read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["sampler_config.json", "taken"]


def test_errors_name_what_was_given(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no file named sampler_config\.json in .*sub.* or "):
        Sampler.load_config(tmp_path, subfolder="sub")
    (tmp_path / "sampler_config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON"):
        Sampler.load_config(tmp_path)
    (tmp_path / "sampler_config.json").write_text("[]")
    with pytest.raises(OSError, match=r"must hold a JSON object, .* got list"):
        Sampler.load_config(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        Sampler().save_config(tmp_path / "sampler_config.json")
    with pytest.raises(ValueError, match="configuration dictionary"):
        Sampler.from_config(None)
    with pytest.raises(ValueError, match="`_class_name`"):
        Sampler.from_config({"_class_name": 3})
    with pytest.raises(NotImplementedError, match="config_name"):
        ConfigMixin().register_to_config(a=1)


def test_from_config_takes_defaults_of_the_new_class_and_loses_nothing() -> None:
    source = Sampler(clip=True, betas=[0.1])
    assert "steps" in source.config["_use_default_values"]
    other = Other.from_config(source.config)
    assert (other.config.steps, other.config.clip, other.config.betas) == (20, True, [0.1])
    back = Sampler.from_config(other.config)
    assert (back.config.steps, back.config.clip, back.config.betas) == (10, True, [0.1])


def test_from_config_overrides_unused_and_hidden_keys(caplog: pytest.LogCaptureFixture) -> None:
    source = {"_class_name": "Sampler", "_diffusers_version": "0.1", "steps": 3, "foreign": 1}
    with caplog.at_level(logging.WARNING):
        other, unused = Other.from_config(source, return_unused_kwargs=True, steps=4, extra=2)
    assert other.config.steps == 4 and other.config.foreign == 1
    assert other.config["_class_name"] == "Other" and other.config["_diffusers_version"] == "0.1"
    assert unused == {"foreign": 1, "extra": 2, "_class_name": "Other", "_diffusers_version": "0.1"}
    assert "{'foreign': 1} were passed to Other" in caplog.text
    assert source["_class_name"] == "Sampler"


def test_from_config_of_a_path_warns(tmp_path: Path) -> None:
    Sampler(3).save_config(tmp_path)
    with pytest.warns(FutureWarning, match="load_config"):
        assert Sampler.from_config(tmp_path, clip=False).config.steps == 3


def test_the_decorator_refuses_other_classes() -> None:
    class Plain:
        @register_to_config
        def __init__(self, steps: int = 1) -> None:
            pass

    with pytest.raises(RuntimeError, match="Plain"):
        Plain()


OFFLINE = """
import sys
sys.modules["huggingface_hub"] = None
from difusores.configuration import ConfigMixin
class Sampler(ConfigMixin):
    config_name = "sampler_config.json"
assert Sampler.load_config(sys.argv[1])["steps"] == 3
try:
    Sampler.load_config("someone/something")
except OSError as error:
    assert "huggingface_hub" in str(error), error
else:
    raise SystemExit("a Hub id was read without huggingface_hub")
"""


def test_folders_are_read_without_huggingface_hub(tmp_path: Path) -> None:
    Sampler(3).save_config(tmp_path)
    subprocess.run([sys.executable, "-c", OFFLINE, str(tmp_path)], check=True)


def test_hub_ids_go_through_huggingface_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    Sampler(3).save_config(tmp_path)
    asked: list[object] = []

    def download(repo: str, **kwargs: object) -> str:
        asked.append((repo, kwargs))
        if repo == "someone/empty":
            raise hub.errors.EntryNotFoundError("404")
        if repo == "someone/offline":
            raise hub.errors.LocalEntryNotFoundError("no connection")
        return str(tmp_path / "sampler_config.json")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert Sampler.load_config("someone/something", subfolder="scheduler", revision="main")["steps"] == 3
    expected = {"filename": "sampler_config.json", "subfolder": "scheduler", "revision": "main"}
    assert asked == [("someone/something", expected)]
    for repo, words in (("empty", "has no file named"), ("offline", "no connection")):
        with pytest.raises(OSError, match=words):
            Sampler.load_config(f"someone/{repo}")


def test_push_to_hub_uploads_the_saved_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    calls: list[object] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> object:
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, **kwargs: object) -> None:
            calls.append(kwargs)

    monkeypatch.setattr(hub, "HfApi", Api)
    Sampler().save_config(tmp_path / "mine", push_to_hub=True, token="t", commit_message="first")
    uploaded = {"repo_id": "me/mine", "folder_path": str(tmp_path / "mine"), "path_in_repo": None}
    assert calls == ["t", {**uploaded, "commit_message": "first"}]


@dataclass
class Output(BaseOutput):
    sample: torch.Tensor
    extra: torch.Tensor | None = None


def test_an_output_reads_as_attributes_keys_and_a_tuple() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    output = Output(one)
    assert output.sample is output["sample"] is output[0] is one
    assert output.extra is None and list(output) == ["sample"] and output.to_tuple() == (one,)
    output.extra = two
    assert output[1] is output["extra"] is two and len(output) == 2
    output["extra"] = one
    assert output.extra is one and output[0:2] == (one, one)
    output.extra = None
    assert "extra" not in output and "sample" in output
    with pytest.raises(TypeError, match="removed"):
        output.pop("sample")
    with pytest.raises(KeyError):
        _ = output["nothing"]


def test_an_output_is_rebuilt_by_pickle_pytree_and_mapping() -> None:
    output = Output(sample=torch.ones(2), extra=torch.zeros(1))
    twin = pickle.loads(pickle.dumps(output))
    assert type(twin) is Output and torch.equal(twin.extra, output.extra)
    assert type(Output({"sample": 1, "extra": 2})) is Output and Output({"sample": 1, "extra": 2}).extra == 2
    plus = torch.utils._pytree.tree_map(lambda x: x + 1, output)
    assert type(plus) is Output and torch.equal(plus.sample, torch.full((2,), 2.0))
    compiled = torch.compile(lambda x: Output(sample=x + 1), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)).sample, torch.full((2,), 2.0))
