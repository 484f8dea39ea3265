"""The chains of 2015 where the best restoration is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from difusores import schedules
from difusores.processes import BinomialProcess, GaussianProcess, independent_pixel_bits

ONES = 0.3  # share of ones in the data


def best_bits(process: BinomialProcess) -> object:
    """Logits of p(x0 = 1 | x_t) for independent bits."""

    def model(xt: Tensor, t: Tensor) -> Tensor:
        a = process.alphas_cumprod[t].reshape(-1, 1).to(xt.dtype)
        seen = [torch.where(xt > 0.5, p, 1 - p) for p in ((1 - a) / 2, (1 + a) / 2)]
        return (seen[1] * ONES).log() - (seen[0] * (1 - ONES)).log()

    return model


@pytest.mark.parametrize("betas", [None, [0.1, 0.3, 0.5, 0.7, 0.9]])
def test_the_best_restoration_of_bits_reaches_their_entropy(betas: list[float] | None) -> None:
    process = BinomialProcess(betas, steps=20)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.bernoulli(torch.full((64, 1000), ONES), generator=generator)
    share = float(x0.mean())
    entropy = -(share * math.log2(ONES) + (1 - share) * math.log2(1 - ONES))
    if betas is not None:  # the chain does not end at fair coins, and the difference costs
        assert float(process.prior(x0).min()) > 0
    bits = process.bound(best_bits(process), x0, generator=generator)  # type: ignore[arg-type]
    assert bits.shape == (64,)
    assert float(bits.mean()) == pytest.approx(entropy, abs=0.01)
    estimates = [
        process.bound(best_bits(process), x0, generator=generator, terms=3).mean()  # type: ignore[arg-type]
        for _ in range(100)
    ]
    assert float(torch.stack(estimates).mean()) == pytest.approx(entropy, abs=0.03)


def test_bits_are_restored_with_their_share_of_ones() -> None:
    process = BinomialProcess(steps=20)
    generator = torch.Generator().manual_seed(1)
    x = process.sample(best_bits(process), (16, 4000), generator=generator)  # type: ignore[arg-type]
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert float(x.mean()) == pytest.approx(ONES, abs=0.01)


def test_the_posterior_of_bits_is_bayes_rule() -> None:
    process = BinomialProcess([0.2, 0.5, 0.4])
    a = [1.0, 0.8, 0.4, 0.24]
    for t in (1, 2, 3):
        for bit in (0.0, 1.0):
            for seen in (0.0, 1.0):
                joint = []
                for middle in (0.0, 1.0):
                    first = bit * a[t - 1] + (1 - a[t - 1]) / 2
                    keep = a[t] / a[t - 1]
                    second = middle * keep + (1 - keep) / 2
                    joint.append((first if middle else 1 - first) * (second if seen else 1 - second))
                if sum(joint) == 0:
                    continue
                xt, x0 = torch.tensor([[seen]]), torch.tensor([[bit]])
                found = process.posterior(xt, x0, torch.tensor([t]))
                assert float(found) == pytest.approx(joint[1] / sum(joint), abs=1e-6)


def best_noise(process: GaussianProcess, mean: float, deviation: float) -> object:
    """The noise in x_t for normal data."""

    def model(xt: Tensor, t: Tensor) -> Tensor:
        a = process.alphas_cumprod[t].reshape(-1, 1).to(xt.dtype)
        variance = a * deviation**2 + 1 - a
        x0 = mean + a.sqrt() * deviation**2 / variance * (xt - a.sqrt() * mean)
        return (xt - a.sqrt() * x0) / (1 - a).sqrt()

    return model


def test_gaussian_noise_is_taken_back() -> None:
    process = GaussianProcess(schedules.betas("squaredcos_cap_v2", 400, 0.0, 0.0))
    generator = torch.Generator().manual_seed(2)
    model = best_noise(process, 0.2, 0.15)
    x = process.sample(model, (16, 2000), generator=generator)  # type: ignore[arg-type]
    assert float(x.mean()) == pytest.approx(0.2, abs=0.01)
    assert float(x.std()) == pytest.approx(0.15, abs=0.01)


def test_the_gaussian_bound_is_above_the_entropy_and_near_it() -> None:
    process = GaussianProcess(schedules.betas("squaredcos_cap_v2", 1000, 0.0, 0.0))
    generator = torch.Generator().manual_seed(3)
    deviation = 0.15
    levels = (
        ((0.2 + deviation * torch.randn((8, 4000), generator=generator) + 1) * 127.5).round().clamp(0, 255)
    )
    x0 = levels / 127.5 - 1
    # differential entropy of the data in levels
    entropy = 0.5 * math.log2(2 * math.pi * math.e * (deviation * 127.5) ** 2)
    model = best_noise(process, 0.2, deviation)
    bits = float(process.bound(model, x0, generator=generator, terms=200).mean())  # type: ignore[arg-type]
    # the last step's Gaussian does not know that the data are integers, and pays for it
    assert entropy - 0.02 < bits < entropy + 1


def test_forward_has_the_moments_of_the_chain() -> None:
    process = GaussianProcess([0.1, 0.2, 0.3])
    x0 = torch.full((1, 200_000), 0.5)
    generator = torch.Generator().manual_seed(4)
    step_by_step = x0
    for beta in (0.1, 0.2, 0.3):
        noise = torch.randn(x0.shape, generator=generator)
        step_by_step = math.sqrt(1 - beta) * step_by_step + math.sqrt(beta) * noise
    at_once = process.forward(x0, torch.tensor([3]), generator=generator)
    assert float(at_once.mean()) == pytest.approx(float(step_by_step.mean()), abs=0.01)
    assert float(at_once.var()) == pytest.approx(float(step_by_step.var()), abs=0.01)


def test_independent_pixels_need_their_entropy() -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.bernoulli(torch.full((4000, 10), ONES), generator=generator)
    entropy = -(ONES * math.log2(ONES) + (1 - ONES) * math.log2(1 - ONES))
    assert independent_pixel_bits(images[:2000], images[2000:], 2) == pytest.approx(entropy, abs=0.02)


def test_bad_input_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"betas must be at least two numbers in \(0, 1\]"):
        BinomialProcess([0.5, 1.5])
    process = GaussianProcess([0.1, 0.2])
    with pytest.raises(ValueError, match=r"t must hold one step from 0 to 2 per image, got \[3\]"):
        process.forward(torch.zeros(1, 4), torch.tensor([3]))
