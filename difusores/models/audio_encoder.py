"""Sound as a context for cross-attention: a log-mel spectrogram, and a small transformer over its frames."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difusores.configuration import register_to_config
from difusores.models.embeddings import Timesteps
from difusores.models.modeling import ModelMixin
from difusores.models.transformer import BasicTransformerBlock, LayerNorm, TransformerOptions

FLOOR = 1e-5
"""Least energy in a band, whose logarithm stands for silence."""


@cache
def mel_filters(sampling_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """[n_mels, n_fft // 2 + 1], float32: triangles of height 1, evenly spaced in mel from 0 to half the rate.

    A frequency f in hertz is 2595 * log10(1 + f / 700) mel (O'Shaughnessy 1987). Band i rises from edge i to
    1 at edge i + 1 and falls to 0 at edge i + 2, edges being n_mels + 2.
    """
    frequencies = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sampling_rate / n_fft
    highest = 2595 * math.log10(1 + sampling_rate / 2 / 700)
    mels = torch.arange(n_mels + 2, dtype=torch.float64) * highest / (n_mels + 1)
    edges = 700 * (10 ** (mels / 2595) - 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel(waveform: Tensor, sampling_rate: int, n_fft: int, hop_length: int, n_mels: int) -> Tensor:
    """Natural logarithm of the energy in mel bands: [N, samples] -> [N, n_mels, 1 + samples // hop_length].

    The energy is |STFT|² with a periodic Hann window of `n_fft` samples, centred at multiples of `hop_length`
    (silence on both sides of the sound), summed with `mel_filters` and not let below `FLOOR`. In float32.
    """
    wave = waveform.float()
    window = torch.hann_window(n_fft, device=wave.device)
    spectrum = torch.stft(wave, n_fft, hop_length, window=window, pad_mode="constant", return_complex=True)
    filters = mel_filters(sampling_rate, n_fft, n_mels).to(wave.device)
    return (filters @ spectrum.abs().square()).clamp(min=FLOOR).log()


class AudioEncoder(ModelMixin):
    """Waveforms [N, samples] to tokens [N, L, d_model] for cross-attention.

    Frames of the log-mel spectrogram, `frames_per_token` at a time, become tokens; sinusoids tell places. The
    last token's frames are filled up with silence. L = ceil((1 + samples // hop_length) /
    frames_per_token), for sounds of any length.

    Args:
        sampling_rate: of the waveforms, in hertz.
        n_fft: samples in the window of the spectrogram.
        hop_length: samples from one frame to the next.
        n_mels: bands.
        frames_per_token: frames that become one token.
        d_model: width of tokens, the `cross_attention_dim` of the UNet.
        num_layers, num_heads: transformer blocks, attention heads in each.

    Raises:
        ValueError: an option is below 1, or the heads do not divide the width.
    """

    @register_to_config
    def __init__(
        self,
        sampling_rate: int = 16000,
        n_fft: int = 1024,
        hop_length: int = 256,
        n_mels: int = 64,
        frames_per_token: int = 2,
        d_model: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        for name, value in self.config.items():
            if not name.startswith("_") and value < 1:
                raise ValueError(f"{name} is {value}; needed is 1 or more")
        if d_model % num_heads:
            raise ValueError(f"num_heads is {num_heads}, which does not divide d_model {d_model}")
        self.proj_in = nn.Linear(n_mels * frames_per_token, d_model)
        self.positions = Timesteps(d_model, flip_sin_to_cos=False, downscale_freq_shift=0)
        options = TransformerOptions(heads=num_heads)
        self.layers = nn.ModuleList(BasicTransformerBlock(d_model, options) for _ in range(num_layers))
        self.norm_out = LayerNorm(d_model)

    def spectrogram(self, waveform: Tensor) -> Tensor:
        """The log-mel spectrogram of [N, samples], see `log_mel`."""
        config = self.config
        return log_mel(waveform, config.sampling_rate, config.n_fft, config.hop_length, config.n_mels)

    def forward(self, waveform: Tensor, sampling_rate: int) -> Tensor:
        """Encode.

        Args:
            waveform: [N, samples], floating point in [-1, 1], one channel.
            sampling_rate: the waveforms', in hertz.

        Raises:
            ValueError: another rate than the encoder's, another shape or dtype, no samples, or numbers that
                are not finite.
        """
        config = self.config
        if sampling_rate != config.sampling_rate:
            raise ValueError(
                f"the audio has {sampling_rate} samples a second, and the encoder was made for "
                f"{config.sampling_rate}: resample it first"
            )
        if waveform.ndim != 2 or waveform.shape[1] < 1 or not waveform.is_floating_point():
            raise ValueError(
                f"audio is {waveform.dtype} {list(waveform.shape)}; "
                "needed is floating point [N, samples] in [-1, 1], of one channel"
            )
        if not bool(torch.isfinite(waveform).all()):
            raise ValueError("the audio has NaN or infinity")
        frames = self.spectrogram(waveform)
        missing = -frames.shape[2] % config.frames_per_token
        frames = F.pad(frames, (0, missing), value=math.log(FLOOR))
        together = frames.unflatten(2, (-1, config.frames_per_token)).permute(0, 2, 3, 1).flatten(2)
        tokens: Tensor = self.proj_in(together.to(self.dtype))
        places = self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        tokens = tokens + places.to(tokens.dtype)
        for layer in self.layers:
            tokens = layer(tokens)
        out: Tensor = self.norm_out(tokens)
        return out
