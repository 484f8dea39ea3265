"""LDMBertModel: against diffusers' class from the same folder, its options, and what it refuses."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from difusores import LDMBertModel

fill = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "make.py"))["fill"]
CONFIG: dict[str, Any] = {
    "vocab_size": 30,
    "max_position_embeddings": 12,
    "encoder_layers": 2,
    "encoder_ffn_dim": 24,
    "encoder_attention_heads": 3,
    "head_dim": 4,
    "d_model": 16,
}
IDS = torch.tensor([[1, 7, 29, 0, 4], [2, 2, 0, 0, 11]])
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"attention_mask": torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])},
    "positions": {"position_ids": torch.tensor([[4, 3, 2, 11, 0]])},
    "heads": {"head_mask": torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 0.0]])},
    "states": {"output_hidden_states": True},
}


def theirs(**options: Any) -> Any:
    pytest.importorskip("diffusers")
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as module

    return fill(module.LDMBertModel(module.LDMBertConfig(**CONFIG | options))).eval()


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=list(ARGUMENTS))
@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_same_output_from_the_same_folder(arguments: dict[str, Any], act: str, tmp_path: Path) -> None:
    model = theirs(activation_function=act)
    model.save_pretrained(tmp_path / "theirs")
    ours = LDMBertModel.from_pretrained(tmp_path / "theirs")
    assert list(ours.state_dict()) == list(model.state_dict())
    for given in ({"input_ids": IDS}, {"inputs_embeds": torch.randn(2, 5, 16)}):
        expected, result = model(**given, **arguments), ours(**given, **arguments)
        assert list(result) == list(expected)
        assert relative_l2(result.last_hidden_state, expected.last_hidden_state) < 2e-5
        for mine, other in zip(result.hidden_states or (), expected.hidden_states or (), strict=True):
            assert relative_l2(mine, other) < 2e-5
        assert torch.equal(ours(**given, **arguments, return_dict=False)[0], result[0])
    ours.save_pretrained(tmp_path / "ours")
    back = type(model).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(back(**given, **arguments)[0], expected[0])
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {key: written[key] for key in CONFIG} == CONFIG and written["activation_function"] == act


@torch.no_grad()
def test_bfloat16_error_is_at_most_twice_theirs(tmp_path: Path) -> None:
    model = theirs()
    exact = model(IDS)[0]
    model.save_pretrained(tmp_path)
    ours = LDMBertModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    error = relative_l2(model.to(torch.bfloat16)(IDS)[0], exact)
    assert error > 1e-4 and relative_l2(ours(IDS)[0], exact) < 2 * error


@torch.no_grad()
def test_pickled_weights_of_old_folders(tmp_path: Path) -> None:
    model = fill(LDMBertModel(**CONFIG)).eval()
    model.save_config(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(LDMBertModel.from_pretrained(tmp_path)(IDS)[0], model(IDS)[0])


def test_defaults_and_initial_weights() -> None:
    pytest.importorskip("diffusers")
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig

    with torch.device("meta"):
        config = LDMBertModel().config
    expected = LDMBertConfig()
    keys = [key for key in config if key[0] != "_"]
    assert {key: config[key] for key in keys} == {key: getattr(expected, key) for key in keys}
    model = LDMBertModel(**CONFIG | {"d_model": 64, "init_std": 0.5})
    assert abs(float(model.model.layers[0].fc1.weight.detach().std()) - 0.5) < 0.05
    assert not model.model.layers[0].fc1.bias.any()


def test_dropout_in_training_only() -> None:
    model = LDMBertModel(**CONFIG)
    assert not torch.equal(model.train()(IDS)[0], model(IDS)[0])
    assert torch.equal(model.eval()(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.randn(2, 5, 16)}, "one of the two"),
        ({"input_ids": IDS.repeat(1, 3)}, "15 tokens; the encoder takes 12"),
        ({"input_ids": IDS, "output_attentions": True}, "does not keep its weights"),
        ({"input_ids": IDS, "head_mask": torch.ones(3, 2)}, r"\[3, 2\]; needed is \[2, 3\]"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, r"\[2, 4\]; the tokens' is \[2, 5\]"),
    ],
)
def test_bad_input(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LDMBertModel(**CONFIG)(**arguments)


def test_bad_options() -> None:
    for option in ({"encoder_layerdrop": 0.1}, {"attention_dropout": 0.1}, {"scale_embedding": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is .*allows"):
            LDMBertModel(**CONFIG | option)
    with pytest.raises(ValueError, match="activation_function is 'tanh'; allowed are silu"):
        LDMBertModel(**CONFIG, activation_function="tanh")
