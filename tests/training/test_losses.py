"""The objective against closed forms."""

from __future__ import annotations

import pytest
import torch

from difusores.training.losses import PREDICTION_TYPES, add_noise, diffusion_loss, min_snr_weight, target

ALPHAS = torch.tensor([0.999, 0.8, 0.5, 0.1, 1e-4])


def images(seed: int) -> torch.Tensor:
    return torch.randn(len(ALPHAS), 2, 3, 5, generator=torch.Generator().manual_seed(seed))


def test_noise_and_targets_of_one_pixel():
    x0, noise, alpha = torch.full((1, 1), 3.0), torch.full((1, 1), 5.0), torch.tensor([0.64])
    assert add_noise(x0, noise, alpha).item() == pytest.approx(0.8 * 3 + 0.6 * 5)
    assert target("epsilon", x0, noise, alpha).item() == 5
    assert target("sample", x0, noise, alpha).item() == 3
    assert target("v_prediction", x0, noise, alpha).item() == pytest.approx(0.8 * 5 - 0.6 * 3)


def test_image_and_velocity_give_the_noise_back():
    x0, noise = images(0), images(1)
    a = ALPHAS[:, None, None, None]
    noisy, v = add_noise(x0, noise, ALPHAS), target("v_prediction", x0, noise, ALPHAS)
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, x0)
    torch.testing.assert_close((1 - a).sqrt() * noisy + a.sqrt() * v, noise)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_one_error_alike_whatever_is_predicted(gamma: float):
    """Hang et al. 2023: each weight is min(SNR, γ) times the squared error in x0, in other units."""
    x0, noise, guess = images(0), images(1), images(2)
    a = ALPHAS[:, None, None, None].double()
    noisy = add_noise(x0, noise, ALPHAS).double()
    guessed_noise = (noisy - a.sqrt() * guess) / (1 - a).sqrt()
    predictions = {
        "sample": guess.double(),
        "epsilon": guessed_noise,
        "v_prediction": a.sqrt() * guessed_noise - (1 - a).sqrt() * guess,
    }
    snr = ALPHAS / (1 - ALPHAS)
    expected = (snr.clamp(max=gamma) * (guess - x0).square().flatten(1).mean(1)).mean()
    for kind, prediction in predictions.items():
        loss = diffusion_loss(prediction, kind, x0, noise, ALPHAS, gamma)
        assert loss.item() == pytest.approx(expected.item(), rel=2e-3), kind


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_without_gamma_the_loss_is_the_mean_squared_error(kind: str):
    x0, noise, prediction = images(0), images(1), images(2)
    expected = torch.nn.functional.mse_loss(prediction, target(kind, x0, noise, ALPHAS))
    torch.testing.assert_close(diffusion_loss(prediction, kind, x0, noise, ALPHAS), expected)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_weights_are_finite_at_zero_snr(kind: str):
    expected = {"epsilon": 1.0, "sample": 0.0, "v_prediction": 0.0}[kind]
    assert min_snr_weight(kind, torch.zeros(1), 5.0).item() == expected


def test_the_loss_is_fp32_for_a_half_precision_prediction():
    loss = diffusion_loss(images(0).bfloat16(), "epsilon", images(1), images(2), ALPHAS, 5.0)
    assert loss.dtype is torch.float32


def test_unknown_prediction_type_is_named():
    with pytest.raises(ValueError, match=r"'noise'; allowed are epsilon, sample, v_prediction"):
        target("noise", images(0), images(1), ALPHAS)
    with pytest.raises(ValueError, match="'noise'"):
        min_snr_weight("noise", ALPHAS, None)
