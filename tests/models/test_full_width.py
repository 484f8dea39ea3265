"""Stable Diffusion 1.5 at full width against diffusers; memory of its weights, and of decoding by tiles."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from difusores import AutoencoderKL, UNet2DConditionModel

pytestmark = pytest.mark.slow

UNET = {"cross_attention_dim": 768, "sample_size": 64}
KL_F8 = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}


def relative_l2(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def pair(name: str, config: dict[str, Any], ours: type) -> tuple[Any, Any]:
    """Both libraries' models over the same tensors."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs, mine = getattr(diffusers, name)(**config).eval(), ours(**config).eval()
    theirs.to_empty(device="cpu")
    numbers = torch.rand(1 << 20) * 2 - 1  # again and again: drawing hundreds of millions takes seconds
    for parameter in theirs.parameters():
        scale = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        for part in parameter.detach().view(-1).split(len(numbers) - 1):  # a row is not the one before
            torch.mul(numbers[: len(part)], scale, out=part)
    mine.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, mine


@torch.no_grad()
def test_unet_of_stable_diffusion_1_5() -> None:
    theirs, ours = pair("UNet2DConditionModel", UNET, UNet2DConditionModel)
    assert ours.num_parameters() == 859_520_964
    given = (torch.randn(1, 4, 16, 24), 500, torch.randn(1, 77, 768))
    assert relative_l2(ours(*given).sample, theirs(*given).sample) < 2e-5


@torch.no_grad()
def test_autoencoder_of_stable_diffusion_1_5() -> None:
    theirs, ours = pair("AutoencoderKL", KL_F8, AutoencoderKL)
    assert ours.num_parameters() == 83_653_863
    x = torch.rand(1, 3, 64, 128) * 2 - 1
    z = theirs.encode(x).latent_dist.mode()
    assert relative_l2(ours.encode(x).latent_dist.mode(), z) < 2e-5
    assert relative_l2(ours.decode(z).sample, theirs.decode(z).sample) < 2e-5


def test_a_bf16_unet_holds_one_copy_of_its_weights(tmp_path: Any) -> None:
    """From a folder in float16 to a model in bfloat16: no float32 copy on the way."""
    config = {**UNET, "block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 64}
    model = UNet2DConditionModel(**config).half()
    weights = sum(p.numel() * 2 for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in loaded.parameters()}
    assert sum(held.values()) == weights
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


DECODE = """
import json, sys, torch
from difusores import AutoencoderKL

model = AutoencoderKL(**json.loads(sys.argv[1])).eval()
model.enable_tiling()
for block in model.decoder.up_blocks:
    block.resnets = block.resnets[:1]  # the others need no more memory than the first, and much time
whole, calls = model.decoder.forward, []

def decode(z, by_stripes):
    calls.append(z.shape[2:])
    # the last tile of whole size in the last row of such: most is held then
    if len(calls) == 29:
        return whole(z, by_stripes)
    return torch.ones(1, 3, *(8 * side for side in z.shape[2:]))

model.decoder.forward = decode
with torch.no_grad():
    image = model.decode(torch.randn(1, 4, 256, 256)).sample
assert image.shape == (1, 3, 2048, 2048) and len(calls) == 36 and calls[28] == (64, 64)
assert image.isfinite().all() and image[0, 0, -500:, -500:].std() > 0
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_2048_pixels_are_decoded_within_3_gb() -> None:
    """All of the process, in float32, which needs most; of 36 tiles one is computed, the others stand in."""
    command = [sys.executable, "-c", DECODE, json.dumps(KL_F8)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3e9
