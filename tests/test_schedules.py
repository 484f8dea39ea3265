"""Schedules and timestep grids against diffusers' tables, and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from difusores import schedules

RANGES = [(0.0001, 0.02), (0.00085, 0.012)]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("name", schedules.BETA_SCHEDULES)
def test_tables_have_the_bits_of_diffusers(name: str, steps: int, rescale: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    for start, end in RANGES:
        theirs = diffusers.DDPMScheduler(steps, start, end, name, rescale_betas_zero_snr=rescale)
        ours = schedules.betas(name, steps, start, end, rescale_zero_snr=rescale)
        assert ours.dtype is torch.float64
        assert torch.equal(ours, theirs.betas.double())
        assert torch.equal(schedules.alphas_cumprod(ours), theirs.alphas_cumprod.double())


def test_definitions() -> None:
    linear = schedules.betas("linear", 5, 0.1, 0.5)
    torch.testing.assert_close(linear, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).double(), rtol=1e-7, atol=0)
    expected = torch.tensor([0.9, 0.72, 0.504, 0.3024, 0.1512]).double()
    torch.testing.assert_close(schedules.alphas_cumprod(linear), expected, rtol=1e-6, atol=0)
    scaled = schedules.betas("scaled_linear", 3, 0.01, 0.09)
    torch.testing.assert_close(scaled, torch.tensor([0.01, 0.04, 0.09]).double(), rtol=1e-6, atol=0)
    cosine = schedules.alphas_cumprod(schedules.betas("squaredcos_cap_v2", 1000, 0, 0))
    t = torch.arange(1, 1001) / 1000
    squared = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    squared = squared / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    torch.testing.assert_close(cosine[:-1].float(), squared[:-1], rtol=1e-3, atol=0)
    sigmoid = schedules.betas("sigmoid", 3, 0.1, 0.3)
    assert sigmoid[1].item() == pytest.approx(0.2, abs=1e-7)


def test_zero_terminal_snr_keeps_the_first_value_and_ends_at_zero() -> None:
    plain = schedules.betas("scaled_linear", 1000, 0.00085, 0.012)
    rescaled = schedules.zero_terminal_snr(plain)
    before, after = schedules.alphas_cumprod(plain), schedules.alphas_cumprod(rescaled)
    assert after[-1] == 0 and rescaled[-1] == 1
    torch.testing.assert_close(after[0], before[0], rtol=1e-6, atol=0)
    assert (after.diff() < 0).all()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_trained_betas_are_copied_and_replace_the_schedule(kind: object) -> None:
    given = kind([0.5, 0.25])  # type: ignore[operator]
    table = schedules.betas("unknown", 2, 0, 0, trained_betas=given)
    given[0] = 0.125
    assert table.tolist() == [0.5, 0.25]
    with pytest.raises(ValueError, match="trained_betas has 2 values, and num_train_timesteps is 7"):
        schedules.betas("unknown", 7, 0, 0, trained_betas=given)


@pytest.mark.parametrize("total", [10, 1000])
@pytest.mark.parametrize("spacing", schedules.SPACINGS)
def test_every_count_of_timesteps_is_that_of_diffusers(spacing: str, total: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(total, timestep_spacing=spacing, steps_offset=1)
    longer = []
    for steps in range(1, total + 1):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.tolist()
        if len(expected) != steps:
            # for some counts the float stride of diffusers leaves one timestep too many: -1, which is none
            longer.append(steps)
            assert spacing == "trailing" and expected.pop() == -1
        assert schedules.timesteps(spacing, steps, total, offset=1) == expected
    assert (61 in longer) == (spacing == "trailing" and total == 1000)


def test_bad_requests_are_named() -> None:
    with pytest.raises(NotImplementedError, match=r"'cubic'.*linear, scaled_linear"):
        schedules.betas("cubic", 10, 0.1, 0.2)
    with pytest.raises(ValueError, match="'middle'"):
        schedules.timesteps("middle", 5, 10)
    for steps in (0, 11, -1):
        with pytest.raises(ValueError, match=f"from 1 to 10.*got {steps}"):
            schedules.timesteps("leading", steps, 10)


def test_custom_timesteps() -> None:
    assert schedules.custom_timesteps(torch.tensor([9, 4, 0]), 10) == [9, 4, 0]
    for given, words in (
        ([], "empty"),
        ([4, 4], "descending order, got 4 before 4"),
        ([10, 4], "within 0 to 9 .*got 10 to 4"),
        ([4, -1], "within 0 to 9 .*got 4 to -1"),
    ):
        with pytest.raises(ValueError, match=words):
            schedules.custom_timesteps(given, 10)
