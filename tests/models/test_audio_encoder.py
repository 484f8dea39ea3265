"""AudioEncoder: its spectrogram by the formula, tokens and their places, folders, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from difusores import AudioEncoder
from difusores.models.audio_encoder import FLOOR, log_mel, mel_filters

CONFIG: dict[str, Any] = {
    "sampling_rate": 800,
    "n_fft": 64,
    "hop_length": 16,
    "n_mels": 6,
    "frames_per_token": 3,
    "d_model": 16,
    "num_layers": 1,
    "num_heads": 2,
}


def tone(frequency: float, samples: int = 400, rate: int = 800) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * frequency / rate * torch.arange(samples))[None]


def test_the_spectrogram_is_the_formula() -> None:
    wave = torch.randn(1, 100)
    result = log_mel(wave, 800, 64, 16, 6)
    assert result.shape == (1, 6, 7) and result.dtype is torch.float32
    padded = torch.zeros(100 + 64, dtype=torch.float64)
    padded[32:132] = wave[0]
    n = torch.arange(64, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / 64)
    waves = torch.exp(-2j * math.pi * torch.arange(33)[:, None] * n / 64)
    for i in range(7):
        energy = (waves @ (window * padded[16 * i : 16 * i + 64]).to(waves.dtype)).abs() ** 2
        expected = (mel_filters(800, 64, 6).double() @ energy).clamp(min=FLOOR).log()
        assert torch.allclose(result[0, :, i].double(), expected, atol=1e-4)


def test_filters() -> None:
    filters = mel_filters(16000, 1024, 64)
    assert filters.shape == (64, 513) and (filters >= 0).all() and filters.max() <= 1
    centres = (filters * torch.arange(513)).sum(1) / filters.sum(1) * 16000 / 1024
    highest = 2595 * math.log10(1 + 8000 / 700)
    expected = torch.tensor([700 * (10 ** ((i + 1) * highest / 65 / 2595) - 1) for i in range(64)])
    assert torch.allclose(centres[8:], expected[8:], rtol=0.03)
    # between the first centre and the last, neighbours add up to 1
    assert torch.allclose(filters.sum(0)[8:480], torch.ones(472), atol=1e-5)


def test_a_tone_is_in_its_band_and_silence_at_the_floor() -> None:
    encoder = AudioEncoder(**CONFIG)
    bands = [int(encoder.spectrogram(tone(f))[0, :, 10].argmax()) for f in (60, 150, 267)]
    assert bands == [0, 2, 4]
    assert (encoder.spectrogram(torch.zeros(1, 100)) == math.log(FLOOR)).all()


@torch.no_grad()
def test_tokens() -> None:
    encoder = AudioEncoder(**CONFIG).eval()
    for samples in (1, 47, 48, 400):
        tokens = encoder(torch.randn(2, samples), 800)
        assert tokens.shape == (2, math.ceil((1 + samples // 16) / 3), 16) and torch.isfinite(tokens).all()
    low, high = tone(60), tone(300)
    both = encoder(torch.cat((low, high)), 800)
    assert torch.allclose(both[1:], encoder(high, 800), atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 0.1
    # the same sound at another time: places are told
    start, end = torch.zeros(2, 1, 480).unbind()
    start[:, 48:96], end[:, 336:384] = tone(150, 48), tone(150, 48)
    assert (encoder(start, 800).sum(1) - encoder(end, 800).sum(1)).abs().max() > 1e-3


@torch.no_grad()
def test_folders_and_dtypes(tmp_path: Path) -> None:
    encoder = AudioEncoder(**CONFIG).eval()
    encoder.save_pretrained(tmp_path)
    back = AudioEncoder.from_pretrained(tmp_path)
    assert torch.equal(back(tone(60), 800), encoder(tone(60), 800))
    assert {key: back.config[key] for key in CONFIG} == CONFIG
    half = AudioEncoder.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)(tone(60), 800)
    assert half.dtype is torch.bfloat16 and (half - back(tone(60), 800)).abs().max() < 0.1


def test_gradients() -> None:
    encoder = AudioEncoder(**CONFIG)
    encoder(tone(60), 800).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("waveform", "rate", "words"),
    [
        (torch.zeros(1, 100), 16000, "16000 samples a second, and the encoder was made for 800: resample"),
        (torch.zeros(100), 800, r"audio is torch.float32 \[100\]; needed is floating point \[N, samples\]"),
        (torch.zeros(1, 100, dtype=torch.int16), 800, "audio is torch.int16"),
        (torch.zeros(1, 0), 800, "needed is floating point"),
        (torch.full((1, 100), torch.nan), 800, "NaN or infinity"),
    ],
)
def test_bad_sounds(waveform: torch.Tensor, rate: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AudioEncoder(**CONFIG)(waveform, rate)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="hop_length is 0; needed is 1 or more"):
        AudioEncoder(**CONFIG | {"hop_length": 0})
    with pytest.raises(ValueError, match="num_heads is 3, which does not divide d_model 16"):
        AudioEncoder(**CONFIG | {"num_heads": 3})
