"""The averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from difusores.training.ema import EMA


def test_the_average_follows_the_recurrence_with_warm_up():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema = EMA(model, 0.5)
    expected = 0.0
    for update in range(20):
        with torch.no_grad():
            model.weight.fill_(float(update + 1))
        ema.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * (update + 1)
        assert ema.model.weight.item() == pytest.approx(expected)
    assert ema.updates == 20


def test_the_average_is_apart_from_the_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, 0.9)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert model[0].weight.requires_grad and not ema.model.training
    before = ema.model[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(ema.model[0].weight, before)
    model[1].running_mean.fill_(7)
    ema.update(model)
    assert torch.equal(ema.model[1].running_mean, torch.full((2,), 7.0))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay: float):
    with pytest.raises(ValueError, match="0 to below 1"):
        EMA(nn.Linear(1, 1), decay)
