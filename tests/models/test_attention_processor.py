"""Processors of one's own in the place of attention, as scripts for diffusers have them."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import difusores
from difusores.graphs import decisions
from difusores.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

fill = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "make.py"))["fill"]
CROSSING: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
PIXELS: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
MASK = torch.ones(2, 5).tril(diagonal=2)


class Watching:
    """Attention by the layer's own parts, as such processors compute it, keeping the probabilities."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.seen: list[Tensor] = []

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        x, group_norm = hidden_states, attn.group_norm
        tokens = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)
        if group_norm is not None:
            tokens = group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        states = tokens if encoder_hidden_states is None else encoder_hidden_states
        attention_mask = attn.prepare_attention_mask(attention_mask, states.shape[1], len(states))
        q, k, v = map(attn.head_to_batch_dim, (attn.to_q(tokens), attn.to_k(states), attn.to_v(states)))
        self.seen.append(attn.get_attention_scores(q, k, attention_mask))
        out = attn.to_out[0](attn.batch_to_head_dim(self.seen[-1] @ v)) * self.factor
        if x.ndim == 4:
            out = out.transpose(1, 2).reshape(x.shape)
        return (out + x if attn.residual_connection else out) / attn.rescale_output_factor


def crossing(library: Any) -> tuple[Any, Callable[[Any], Tensor]]:
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    model = fill(library.UNet2DConditionModel(**CROSSING)).eval()
    return model, lambda model: model(x, 7, states, encoder_attention_mask=MASK).sample


def pixels(library: Any) -> tuple[Any, Callable[[Any], Tensor]]:
    x = torch.randn(2, 3, 8, 8)
    return fill(library.UNet2DModel(**PIXELS)).eval(), lambda model: model(x, 7).sample


def decoder(library: Any) -> tuple[Any, Callable[[Any], Tensor]]:
    z = torch.randn(2, 4, 6, 6)
    model = library.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return fill(model).eval(), lambda model: model.decode(z).sample


@torch.no_grad()
@pytest.mark.parametrize("make", [crossing, pixels, decoder])
def test_a_processor_by_hand(make: Any) -> None:
    model, call = make(difusores)
    expected, watching = call(model), Watching()
    model.set_attn_processor(watching)
    assert set(model.attn_processors.values()) == {watching}
    found = call(model)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert len(watching.seen) == (1 if make is decoder else len(model.attn_processors))
    assert all((p.sum(-1) - 1).abs().max() < 1e-5 for p in watching.seen)
    if make is crossing:
        assert sum(not bool((p[:2, :, 3:]).any()) for p in watching.seen if p.shape[-1] == 5) == 4
    model.set_attn_processor(Watching(0.5))
    assert (call(model) - expected).norm() > 1e-3 * expected.norm()
    model.set_default_attn_processor()
    assert torch.equal(call(model), expected)


@torch.no_grad()
@pytest.mark.parametrize("make", [crossing, pixels, decoder])
def test_a_processor_of_diffusers(make: Any) -> None:
    """Their code, derived from, on their layers and on ours."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor as theirs

    class Weaker(theirs):  # type: ignore[misc]
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 0.7 * super().__call__(attn, hidden_states, *args, **kwargs)

    torch.manual_seed(1)
    (model, call), (peer, _) = make(difusores), make(diffusers)
    plain = call(model)
    for layer in (*model.modules(), *peer.modules()):
        if hasattr(layer, "set_processor"):
            layer.set_processor(Weaker())
    expected = call(peer)
    assert (call(model) - expected).norm() < 2e-5 * expected.norm() < (expected - plain).norm()
    model.set_attn_processor(theirs())
    assert torch.equal(call(model), plain)  # a standard one: the layer's own computation


@torch.no_grad()
def test_where_processors_stand() -> None:
    model, call = crossing(difusores)
    expected, names = call(model), sorted(model.attn_processors)
    assert len(names) == 8 and all(name.endswith((".attn1.processor", ".attn2.processor")) for name in names)
    one = Watching(0.0)
    each = {name: one if ".attn2." in name else AttnProcessor2_0() for name in names}
    model.set_attn_processor(each)
    changed = call(model)
    assert len(one.seen) == 4 and not torch.allclose(changed, expected)
    assert model.mid_block.attentions[0].transformer_blocks[0].attn2.get_processor() is one
    assert model.mid_block.attentions[0].transformer_blocks[0].attn2.is_cross_attention
    model.set_default_attn_processor()
    for name, layer in model.named_modules():
        if name.endswith("attn2"):
            layer.processor = one
    assert torch.equal(call(model), changed)
    with pytest.raises(ValueError, match=r"processor has 1 entries.*attn_processors, which are 8"):
        model.set_attn_processor({names[0]: one})
    with pytest.raises(ValueError, match="processor is None, which cannot be called"):
        model.set_attn_processor({**each, names[-1]: None})

    class Delegating(AttnProcessor):
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().__call__(attn, hidden_states, *args, **kwargs) / 2

    model.set_attn_processor(Delegating())
    assert torch.equal(call(model), expected)


@torch.no_grad()
def test_a_processor_with_parameters() -> None:
    """It is a part of the model, moved and saved with it, until another takes its place."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.5))

        def forward(self, attn: Any, hidden_states: Tensor, **given: Any) -> Tensor:
            return self.factor * AttnProcessor()(attn, hidden_states, **given)

    model, call = pixels(difusores)
    expected, keys = call(model), list(model.state_dict())
    model.set_attn_processor({name: Scaled() for name in model.attn_processors})
    assert not torch.allclose(call(model), expected)
    assert sum(key.endswith("processor.factor") for key in model.state_dict()) == len(model.attn_processors)
    model.set_attn_processor(AttnProcessor2_0())
    assert list(model.state_dict()) == keys and torch.equal(call(model), expected)


@torch.no_grad()
def test_accelerated_layers_ask_it_too() -> None:
    model, call = crossing(difusores)
    before = decisions(model)
    model.set_attn_processor(Watching(0.5))
    assert decisions(model) != before  # what a CUDA graph takes as given
    expected = call(model)
    difusores.accelerate(model)
    watching = Watching(0.5)
    model.set_attn_processor(watching)
    assert (call(model) - expected).norm() < 5e-5 * expected.norm()
    assert len(watching.seen) == len(model.attn_processors)


def test_masks_for_other_keys_are_refused() -> None:
    layer = crossing(difusores)[0].mid_block.attentions[0].transformer_blocks[0].attn2
    assert layer.prepare_attention_mask(None, 5, 2) is None
    assert layer.prepare_attention_mask(MASK[:, None], 5, 2).shape == (4, 1, 5)
    assert layer.prepare_attention_mask(MASK[:, None], 5, 2, out_dim=4).shape == (2, 2, 1, 5)
    with pytest.raises(ValueError, match="for 5 keys, and there are 7"):
        layer.prepare_attention_mask(MASK[:, None], 7, 2)


@torch.no_grad()
def test_probabilities_in_half_precision() -> None:
    """Of pixels the softmax is in float32, of tokens where upcast_attention is set, as in diffusers."""
    q, k = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 9, 4).bfloat16()
    exact = pixels(difusores)[0].down_blocks[1].attentions[0]
    scores = exact.scale * (q @ k.transpose(1, 2))
    assert exact.scale == 0.5
    assert torch.equal(exact.get_attention_scores(q, k), scores.float().softmax(-1).bfloat16())
    tokens = crossing(difusores)[0].mid_block.attentions[0].transformer_blocks[0].attn2
    tokens.upcast_attention = True
    wide = tokens.scale * (q.float() @ k.float().transpose(1, 2))
    assert torch.equal(tokens.get_attention_scores(q, k), wide.softmax(-1).bfloat16())
