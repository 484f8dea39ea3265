"""ConsistencyDecoderVAE: against diffusers from the same folder, as a pipeline's decoder, and bad input."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import difusores
from difusores import ConsistencyDecoderVAE

fill = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "make.py"))["fill"]
CONFIG: dict[str, Any] = {
    "encoder_block_out_channels": [8, 16],
    "encoder_down_block_types": ["DownEncoderBlock2D"] * 2,
    "encoder_layers_per_block": 1,
    "encoder_norm_num_groups": 4,
    "decoder_block_out_channels": [8, 16],
    "decoder_down_block_types": ["ResnetDownsampleBlock2D"] * 2,
    "decoder_up_block_types": ["ResnetUpsampleBlock2D"] * 2,
    "decoder_layers_per_block": 1,
    "decoder_norm_num_groups": 4,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def test_same_output_from_the_same_folder(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = fill(diffusers.ConsistencyDecoderVAE(**CONFIG)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ConsistencyDecoderVAE.from_pretrained(tmp_path / "theirs")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    image = torch.randn(2, 3, 12, 20)
    expected, result = (vae.encode(image).latent_dist.parameters for vae in (theirs, ours))
    assert relative_l2(result, expected) < 2e-5
    latents = torch.randn(2, 4, 6, 10)
    expected = theirs.decode(latents, generator=seeded()).sample
    result = ours.decode(latents, generator=seeded()).sample
    assert result.shape == (2, 3, 12, 20) and relative_l2(result, expected) < 2e-5
    assert torch.equal(ours.decode(latents, seeded(), return_dict=False)[0], result)
    expected, result = (vae(image, True, generator=seeded()).sample for vae in (theirs, ours))
    assert relative_l2(result, expected) < 2e-5
    ours.save_pretrained(tmp_path / "ours")
    back = diffusers.ConsistencyDecoderVAE.from_pretrained(tmp_path / "ours")
    assert torch.equal(back.decode(latents, seeded()).sample, theirs.decode(latents, seeded()).sample)


@torch.no_grad()
def test_bfloat16_error_is_at_most_twice_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of decoding with one and the same noise, which a seed draws otherwise in another dtype."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.autoencoders import consistency_decoder_vae as theirs_vae
    from diffusers.schedulers import scheduling_consistency_decoder as theirs_scheduler

    known = torch.randn(2, 3, 12, 20).bfloat16()

    def draw(shape: Any, generator: Any, device: Any, dtype: torch.dtype, out: Any = None) -> torch.Tensor:
        return known.to(dtype) if out is None else out.copy_(known)

    for module in (theirs_vae, theirs_scheduler):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, dtype, **options: known.to(dtype))
    for module in ("difusores.sampling", "difusores.models.consistency_decoder"):
        monkeypatch.setattr(f"{module}.draw_noise", draw)
    theirs = fill(diffusers.ConsistencyDecoderVAE(**CONFIG)).eval()
    ours = ConsistencyDecoderVAE(**CONFIG).eval()
    ours.load_state_dict(theirs.state_dict())
    latents = torch.randn(2, 4, 6, 10).bfloat16()
    expected = theirs.double().decode(latents.double()).sample
    limit = relative_l2(theirs.bfloat16().decode(latents).sample, expected)
    assert relative_l2(ours.bfloat16().decode(latents).sample, expected) <= 2 * limit < 0.1


def test_a_decoder_of_pipelines(tmp_path: Path) -> None:
    shape = {"sample_size": 8, "block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = fill(difusores.UNet2DModel(in_channels=4, out_channels=4, **kinds, **shape)).eval()
    vae = fill(ConsistencyDecoderVAE(**CONFIG)).eval()
    pipeline = difusores.LDMPipeline(vae, unet, difusores.DDIMScheduler())
    pipeline.save_pretrained(tmp_path)
    result = []
    for each in (pipeline, difusores.LDMPipeline.from_pretrained(tmp_path)):
        each.set_progress_bar_config(disable=True)
        result.append(each(2, seeded(), num_inference_steps=2, output_type="np").images)
    assert result[0].shape == (2, 16, 16, 3)
    assert np.abs(result[0] - result[1]).max() < 1e-5


def test_bad_input() -> None:
    vae = ConsistencyDecoderVAE(**CONFIG)
    with pytest.raises(ValueError, match="num_inference_steps is 3; the decoder has 2"):
        vae.decode(torch.zeros(1, 4, 8, 8), num_inference_steps=3)
    with pytest.raises(ValueError, match=r"got shape \[1, 3, 8, 8\]; needed is \[N, 4"):
        vae.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="encoder_double_z False; allowed are 4, 4 and True"):
        ConsistencyDecoderVAE(**CONFIG, encoder_double_z=False)
