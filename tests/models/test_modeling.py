"""Reading and writing of models: files, names, dtypes, broken folders."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import difusores
from difusores import UNet2DModel

CONFIG = {
    "block_out_channels": (8,),
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "num_class_embeds": 3,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model() -> UNet2DModel:
    return UNet2DModel(**CONFIG)


@pytest.fixture
def folder(model: UNet2DModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def assert_same(one: UNet2DModel, other: UNet2DModel) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_round_trip(model: UNet2DModel, folder: Path) -> None:
    loaded = UNet2DModel.from_pretrained(str(folder))
    assert_same(loaded, model)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.dtype is torch.float32 and loaded.device.type == "cpu"
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]
    # readable by everybody who may read the configuration
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in ("config.json", WEIGHTS)}
    assert len(modes) == 1


def test_dtype_is_float32_unless_asked_for(model: UNet2DModel, tmp_path: Path) -> None:
    model.half().save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["conv_in.weight"].dtype is torch.float16
    assert UNet2DModel.from_pretrained(tmp_path).dtype is torch.float32
    for name in ("torch_dtype", "dtype"):
        assert UNet2DModel.from_pretrained(tmp_path, **{name: torch.bfloat16}).dtype is torch.bfloat16
        with pytest.raises(TypeError, match=r"'float16'.*torch\.float16"):
            UNet2DModel.from_pretrained(tmp_path, **{name: "float16"})
    both = {"dtype": torch.float16, "torch_dtype": torch.float16}
    assert UNet2DModel.from_pretrained(tmp_path, **both).dtype is torch.float16
    with pytest.raises(ValueError, match=r"dtype is .*, and torch_dtype is"):
        UNet2DModel.from_pretrained(tmp_path, **{**both, "dtype": torch.float32})


def test_what_diffusers_tells_of_the_loading(model: UNet2DModel, folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    loaded, told = UNet2DModel.from_pretrained(folder, output_loading_info=True)
    assert_same(loaded, model)
    _, expected = diffusers.UNet2DModel.from_pretrained(folder, output_loading_info=True)
    assert told == expected


NEUTRAL = {
    "device_map": None,
    "max_memory": None,
    "offload_folder": None,
    "offload_state_dict": None,
    "quantization_config": None,
    "ignore_mismatched_sizes": False,
}


def test_arguments_of_diffusers_that_ask_for_nothing(
    model: UNet2DModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same(UNet2DModel.from_pretrained(folder, **NEUTRAL), model)
    for place in ("cpu", torch.device("cpu"), {"": "cpu"}):
        assert_same(UNet2DModel.from_pretrained(folder, device_map=place), model)
    assert UNet2DModel.from_pretrained(folder, device_map="meta").device.type == "meta"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert UNet2DModel.from_pretrained(folder, device_map="auto").device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    several = {"conv_in": "cpu", "": "cpu"}
    wrong = [("device_map", "auto"), ("device_map", several), ("ignore_mismatched_sizes", True)]
    for name, value in wrong:
        with pytest.raises(NotImplementedError, match=re.escape(f"{name} is {value!r}")):
            UNet2DModel.from_pretrained(folder, **{name: value})


@pytest.mark.parametrize("size", ["10GB", "1MB", "0.5 MiB", 10**6])
def test_one_shard_is_written_where_it_is_large_enough(
    model: UNet2DModel, tmp_path: Path, size: int | str
) -> None:
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert_same(UNet2DModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("variant", [None, "fp32"])
def test_shards_are_written_as_diffusers_writes_them(
    model: UNet2DModel, tmp_path: Path, variant: str | None
) -> None:
    """The same names and index; both read them; nothing old stays beside them, and they go again."""
    size, folder = sum(t.nbytes for t in model.state_dict().values()) // 3, tmp_path / "ours"
    for most in (size, "10GB", size // 2, size):
        model.save_pretrained(folder, variant=variant, max_shard_size=most)
        assert_same(UNet2DModel.from_pretrained(folder, variant=variant), model)
    shards = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    assert len(shards) > 1 and all("-of-" in path.name for path in shards)
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel.from_pretrained(folder, variant=variant)
    theirs.save_pretrained(tmp_path / "theirs", variant=variant, max_shard_size=size)
    ours, other = ({path.name: path for path in f.iterdir()} for f in (folder, tmp_path / "theirs"))
    assert ours.keys() == other.keys()
    (index,) = (name for name in ours if ".index" in name)
    assert json.loads(ours[index].read_text()) == json.loads(other[index].read_text())
    model.save_pretrained(folder, variant=variant)
    assert len(list(folder.iterdir())) == 2


def test_a_size_that_is_none(model: UNet2DModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_size is 'large'"):
        model.save_pretrained(tmp_path / "saved", max_shard_size="large")
    assert not (tmp_path / "saved").exists()


def test_subfolder_variant_and_overrides(model: UNet2DModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "unet", variant="ema")
    loaded = UNet2DModel.from_pretrained(tmp_path, subfolder="unet", variant="ema", sample_size=5)
    assert_same(loaded, model)
    assert loaded.config.sample_size == 5
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
        UNet2DModel.from_pretrained(tmp_path, subfolder="unet")


def test_loaded_parameters_do_not_follow_the_file(model: UNet2DModel, folder: Path) -> None:
    loaded = UNet2DModel.from_pretrained(folder)
    with open(folder / WEIGHTS, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    assert_same(loaded, model)


def test_num_parameters(model: UNet2DModel) -> None:
    model.conv_in.requires_grad_(False)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == total
    assert model.num_parameters(only_trainable=True) == total - 3 * 8 * 9 - 8
    assert model.num_parameters(exclude_embeddings=True) == total - 3 * 32


def test_configuration_key_read_off_the_model_warns(model: UNet2DModel) -> None:
    with pytest.warns(FutureWarning, match="layers_per_block"):
        assert model.layers_per_block == 1
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_attention_names_of_old_checkpoints(model: UNet2DModel, folder: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for new_name, old_name in old.items():
            name = name.replace(f".{new_name}.", f".{old_name}.")
        renamed[name] = tensor
    assert "mid_block.attentions.0.query.weight" in renamed
    save_file(renamed, folder / WEIGHTS)
    assert_same(UNet2DModel.from_pretrained(folder), model)


def test_sharded_weights(model: UNet2DModel, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / WEIGHTS).unlink()
    assert_same(UNet2DModel.from_pretrained(folder), model)


def test_bin_files(model: UNet2DModel, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin")
    assert_same(UNet2DModel.from_pretrained(folder), model)
    assert_same(UNet2DModel.from_pretrained(folder, use_safetensors=False), model)
    with pytest.raises(OSError, match="safetensors"):
        UNet2DModel.from_pretrained(folder, use_safetensors=True)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_bin_files_run_no_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Malicious()}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        UNet2DModel.from_pretrained(folder)
    assert not (tmp_path / "executed").exists()


def test_everything_that_does_not_fit_is_named_at_once(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["conv_in.bias"], tensors["conv_out.bias"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["class_embedding.weight"] = torch.zeros(4, 32)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match="does not fit") as error:
        UNet2DModel.from_pretrained(folder)
    for words in (
        "missing conv_in.bias",
        "missing conv_out.bias",
        "unexpected extra.weight",
        "class_embedding.weight has shape [4, 32], and [3, 32] is needed",
    ):
        assert words in str(error.value)


def test_bad_arguments_are_named(model: UNet2DModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        UNet2DModel.from_pretrained(folder, no_such_option=1)
    with pytest.raises(OSError, match="is a file"):
        UNet2DModel.from_pretrained(folder / "config.json")
    with pytest.raises(OSError, match="bundled model 'no-such-model'"):
        UNet2DModel.from_pretrained("bundled:no-such-model")
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(TypeError, match="repo_id"):
        model.save_pretrained(tmp_path, repo_id="someone/something")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        model.save_pretrained(tmp_path / "file")


def test_other_processes_write_nothing(model: UNet2DModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_failed_write_leaves_the_old_file(
    model: UNet2DModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / WEIGHTS).read_bytes()

    replace = os.replace

    def fail(source: str, target: str) -> None:
        if str(target).endswith(".safetensors"):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]


def test_hub_id(model: UNet2DModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo: str, filename: str, subfolder: str | None = None, **options: Any) -> str:
        asked.append((repo, subfolder, filename, options["revision"], options["token"]))
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = UNet2DModel.from_pretrained("someone/something", subfolder="unet", revision="v2", token="t")
    assert_same(loaded, model)
    assert asked == [("someone/something", "unet", name, "v2", "t") for name in ("config.json", WEIGHTS)]


def test_folders_need_no_hub(folder: Path) -> None:
    script = f"""
import sys
sys.modules["huggingface_hub"] = sys.modules["diffusers"] = None
from difusores import UNet2DModel
print(UNet2DModel.from_pretrained({str(folder)!r}).num_parameters())
try:
    UNet2DModel.from_pretrained("someone/something")
except OSError as error:
    print("huggingface_hub" in str(error))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.split() == [str(UNet2DModel(**CONFIG).num_parameters()), "True"], run.stderr


@pytest.mark.parametrize("kind", ["UNet2DModel", "UNet2DConditionModel", "AutoencoderKL"])
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    """Layers run twice, and every gradient has the same bits, under dropout too."""
    prefix = {"UNet2DModel": "Attn", "UNet2DConditionModel": "CrossAttn"}.get(kind, "")
    middle = ("Encoder", "Decoder") if kind == "AutoencoderKL" else ("", "")
    options: dict[str, Any] = {
        "down_block_types": (f"{prefix}Down{middle[0]}Block2D", f"Down{middle[0]}Block2D"),
        "up_block_types": (f"Up{middle[1]}Block2D", f"{prefix}Up{middle[1]}Block2D"),
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    if kind != "AutoencoderKL":
        options["dropout"] = 0.3
    if kind == "UNet2DConditionModel":
        options |= {"cross_attention_dim": 8, "attention_head_dim": 2}
    model = getattr(difusores, kind)(**options).train()
    sample = torch.randn(2, model.config.in_channels, 8, 8)
    given = {"AutoencoderKL": (sample,), "UNet2DModel": (sample, 3)}.get(
        kind, (sample, 3, torch.randn(2, 5, 8))
    )
    calls = []
    model.register_forward_hook(lambda *_: calls.clear())
    resnet = next(module for module in model.modules() if type(module).__name__ == "ResnetBlock2D")
    gradients = []
    for wanted in (False, True):
        (model.enable_gradient_checkpointing if wanted else model.disable_gradient_checkpointing)()
        assert model.is_gradient_checkpointing is wanted
        hook = resnet.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(1)
        model(*given).sample.square().sum().backward()
        hook.remove()
        assert len(calls) == wanted  # in the backward pass
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None or b is not None)
    with pytest.raises(ValueError, match="AudioEncoder has no blocks"):
        difusores.AudioEncoder(d_model=8, num_layers=1).enable_gradient_checkpointing()
