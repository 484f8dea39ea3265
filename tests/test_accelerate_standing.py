"""What a pass takes as given: the short way gives the bits of the long one, and every change is seen."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import difusores
from difusores import native
from difusores.acceleration import products
from difusores.acceleration.network import NetworkForward
from difusores.acceleration.resnet import ResnetForward
from difusores.acceleration.standing import Prepared
from difusores.acceleration.transformer import ImageAttentionForward

BOUND = 5e-5  # of a whole network, relative L2, against float64
CASE = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([5, 371]))

pytestmark = [
    pytest.mark.skipif(native.status("cpu") is not None, reason=native.status("cpu") or ""),
    pytest.mark.skipif(
        native.status("cpu") is None and native.build_info()["isa_used"] == "base",
        reason="without AVX2 and FMA oneDNN is faster",
    ),
]


def make(dtype: str | None = None) -> nn.Module:
    """Accelerated, after two passes: the second finds the weights prepared, and the network standing."""
    torch.manual_seed(1)
    model: nn.Module = difusores.UNet2DModel(
        block_out_channels=[64, 96],
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=16,
        norm_num_groups=8,
        layers_per_block=1,
    ).eval()
    difusores.accelerate(model, dtype=dtype)
    run(model), run(model)
    return model


@pytest.fixture
def model() -> nn.Module:
    return make()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(*CASE).sample
    return out


def is_right(model: nn.Module) -> bool:
    wide = copy.deepcopy(model)
    difusores.restore(wide)
    with torch.no_grad():
        wanted = wide.double()(CASE[0].double(), CASE[1]).sample
    return bool((run(model).double() - wanted).norm() <= BOUND * wanted.norm())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_short_way_has_the_bits_of_the_long_one(
    dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(NetworkForward, "_stands", lambda self: None)
        long_way = run(model)
    assert dtype or is_right(model)

    def unwanted(*args: object, **kwargs: object) -> None:
        raise AssertionError("the long way")

    monkeypatch.setattr(ResnetForward, "run", unwanted)
    if products.own_product_is_faster(torch.bfloat16 if dtype else torch.float32):
        monkeypatch.setattr(ImageAttentionForward, "run", unwanted)
    assert torch.equal(run(model), long_way)
    with torch.inference_mode(), pytest.raises(AssertionError, match="the long way"):
        model(*CASE)  # an embedding without a version is projected by each block
    with torch.no_grad(), pytest.raises(AssertionError, match="the long way"):
        model.mid_block.resnets[0](torch.ones(1, 96, 8, 8), torch.ones(1, 256))  # no pass


RESNET, ATTENTION = "up_blocks.0.resnets.0.", "up_blocks.0.attentions.0."
PARTS = [
    *(
        RESNET + part
        for part in ("norm1", "conv1", "nonlinearity", "norm2", "dropout", "conv2", "conv_shortcut")
    ),
    *(ATTENTION + part for part in ("group_norm", "to_q", "to_v", "to_out.0", "to_out.1")),
]


@pytest.mark.parametrize("part", PARTS)
def test_hooks_are_called(model: nn.Module, part: str) -> None:
    seen: list[nn.Module] = []
    module = model.get_submodule(part)
    handle = module.register_forward_hook(lambda module, args, out: seen.append(module))
    run(model)
    assert module in seen
    handle.remove()
    seen.clear()
    run(model)
    assert not seen
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        run(model)
    finally:
        handle.remove()
    assert module in seen


def _adds_to_weight(block: Any, attention: Any) -> None:
    with torch.no_grad():
        block.conv1.weight.add_(0.1)


def _through_data(block: Any, attention: Any) -> None:
    block.conv2.weight.data = block.conv2.weight.data + 0.1


def _other_parameter(block: Any, attention: Any) -> None:
    block.norm2.weight = nn.Parameter(block.norm2.weight.detach() + 1)


def _bias_in_place(block: Any, attention: Any) -> None:
    block.conv1.bias.data += 1


def _other_module(block: Any, attention: Any) -> None:
    block.conv2 = nn.Conv2d(96, 96, 3, padding=1).eval()


def _other_number(block: Any, attention: Any) -> None:
    block.norm1.eps = 0.5


def _other_divisor(block: Any, attention: Any) -> None:
    block.output_scale_factor = 2.0


def _without_bias(block: Any, attention: Any) -> None:
    block.conv1.bias = None


def _other_key(block: Any, attention: Any) -> None:
    attention.to_k = nn.Linear(96, 96).eval()


def _other_query(block: Any, attention: Any) -> None:
    attention.to_q.weight = nn.Parameter(attention.to_q.weight.detach() * 3)


def _other_values(block: Any, attention: Any) -> None:
    attention.to_v.bias.data += 1


def _other_heads(block: Any, attention: Any) -> None:
    attention.heads = 2


def _processor(block: Any, attention: Any) -> None:
    attention.set_processor(lambda layer, x, **kwargs: 2 * layer.attend(x))


CHANGES: list[Callable[[Any, Any], None]] = [
    *(_adds_to_weight, _through_data, _other_parameter, _bias_in_place, _other_module),
    *(_other_number, _other_divisor, _without_bias),
    *(_other_key, _other_query, _other_values, _other_heads, _processor),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_changes_are_seen(model: nn.Module, change: Callable[[Any, Any], None]) -> None:
    before = run(model)
    change(model.up_blocks[0].resnets[0], model.up_blocks[0].attentions[0])
    assert is_right(model) and is_right(model), "in the pass after it, and in the one after that"
    assert not torch.equal(run(model), before)


def test_training_and_gradients_are_seen(model: nn.Module) -> None:
    model(*CASE).sample.sum().backward()
    assert all(p.grad is not None for p in model.mid_block.resnets[0].parameters())
    block = model.mid_block.resnets[0].train()
    run(model)
    assert block.forward.declined["the module is in training mode"] == 1


def test_copies_stand_for_themselves(model: nn.Module) -> None:
    wanted = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), wanted)
        _other_parameter(twin.mid_block.resnets[0], None)
        assert is_right(twin) and not torch.equal(run(twin), wanted)
    assert torch.equal(run(model), wanted)


def test_what_was_prepared_goes_with_the_standing() -> None:
    """Forms of weights that changed are not held by the sizes of images that are not asked for again."""
    prepared: Prepared[object] = Prepared()
    first, second = object(), object()
    small, large = (weakref.ref(prepared.get(first, size, Form)) for size in (8, 16))
    assert prepared.get(first, 8, Form) is small()
    assert prepared.get(second, 8, Form) is not None and small() is None and large() is None
    assert copy.deepcopy(prepared)._made == (None, {})


class Form:
    """Of a weight."""
