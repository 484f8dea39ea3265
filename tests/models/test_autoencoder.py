"""AutoencoderKL and VQModel: against diffusers from the same folders, tiles and slices, memory, bad input."""

from __future__ import annotations

import copy
import json
import runpy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from difusores import AutoencoderKL, VQModel
from difusores.models import striped

fill = runpy.run_path(str(Path(__file__).parents[1] / "fixtures" / "make.py"))["fill"]

BASE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}
FOUR = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 16, 16, 16],
    "layers_per_block": 2,
}


def deep(levels: int) -> dict[str, Any]:
    """One block at each of so many resolutions."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [8] * levels,
    }


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "f2": ("AutoencoderKL", {}),
    "f8, Stable Diffusion": ("AutoencoderKL", FOUR),
    "without quant_conv": (
        "AutoencoderKL",
        {
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            "act_fn": "gelu",
            "latent_channels": 16,
        },
    ),
    "attention": (
        "AutoencoderKL",
        {
            "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        },
    ),
    "f1": (
        "AutoencoderKL",
        {
            "down_block_types": ["DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D"],
            "block_out_channels": [16],
        },
    ),
    "f4": ("AutoencoderKL", deep(3)),
    "f16": ("AutoencoderKL", deep(5)),
    "f32": ("AutoencoderKL", deep(6)),
    "VQ f2": ("VQModel", {"num_vq_embeddings": 50}),
    "VQ f4": ("VQModel", {**deep(3), "num_vq_embeddings": 50}),
    "VQ f16": ("VQModel", {**deep(5), "num_vq_embeddings": 50}),
    "VQ f8": ("VQModel", {**FOUR, "num_vq_embeddings": 20, "vq_embed_dim": 5, "latent_channels": 4}),
}
CLASSES: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


def relative_l2(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def kl() -> AutoencoderKL:
    return fill(AutoencoderKL(**BASE)).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_same_output_from_the_same_folder(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    kind, options = CONFIGS[name]
    theirs = fill(getattr(diffusers, kind)(**(BASE | options))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CLASSES[kind].from_pretrained(tmp_path / "theirs")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    f = 2 ** (len(ours.config.block_out_channels) - 1)
    for batch, height, width in (
        # latents of 4x4 at least: a norm over fewer numbers multiplies rounding errors by hundreds
        (1, max(16, 4 * f), max(24, 4 * f)),
        (3, max(21, 4 * f + 9), 13 if f < 4 else 4 * f + 3),
    ):
        x = torch.randn(batch, 3, height, width)
        if kind == "VQModel":
            z, expected = ours.encode(x).latents, theirs.encode(x).latents
            for force in (False, True):
                mine, other = (m.decode(expected, force_not_quantize=force) for m in (ours, theirs))
                assert relative_l2(mine.sample, other.sample) < 2e-5
                assert torch.allclose(mine.commit_loss, other.commit_loss)
        else:
            mine, other = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
            z, expected = mine.mode(), other.mode()
            for call in (
                lambda d: d.logvar,
                lambda d: d.sample(torch.Generator().manual_seed(3)),
                lambda d: d.kl(),
                lambda d: d.kl(type(d)(d.parameters * 0.5)),
                lambda d: d.nll(torch.ones_like(d.mean)),
            ):
                assert relative_l2(call(mine), call(other)) < 2e-5
            assert relative_l2(ours.decode(expected).sample, theirs.decode(expected).sample) < 2e-5
        assert relative_l2(z, expected) < 2e-5
        nhwc = x.contiguous(memory_format=torch.channels_last)
        assert relative_l2(ours(nhwc).sample, theirs(x).sample) < 2e-5
    ours.save_pretrained(tmp_path / "ours")
    back = getattr(diffusers, kind).from_pretrained(tmp_path / "ours")
    assert torch.equal(back(x).sample, theirs(x).sample)
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == json.loads(
        json.dumps({k: v for k, v in back.config.items() if k[0] != "_"})
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", CLASSES)
def test_bfloat16_error_is_at_most_twice_theirs(kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = fill(getattr(diffusers, kind)(**BASE)).eval()
    ours = CLASSES[kind](**BASE).eval()
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(2, ours.config.latent_channels, 8, 8).bfloat16()
    plain = {"force_not_quantize": True} if kind == "VQModel" else {}
    expected = theirs.double().decode(z.double(), **plain).sample
    limit = relative_l2(theirs.bfloat16().decode(z, **plain).sample, expected)
    assert relative_l2(ours.bfloat16().decode(z, **plain).sample, expected) <= 2 * limit


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 56), (22, 34), (16, 48)])
def test_tiles_are_those_of_diffusers(kl: AutoencoderKL, height: int, width: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(**BASE).eval()
    theirs.load_state_dict(kl.state_dict())
    x, z = torch.randn(2, 3, height, width), torch.randn(2, 4, height // 2, width // 2)
    whole = kl.decode(z).sample
    kl.enable_tiling()
    theirs.enable_tiling()
    assert relative_l2(kl.encode(x).latent_dist.mean, theirs.encode(x).latent_dist.mean) < 2e-5
    assert relative_l2(kl.decode(z).sample, theirs.decode(z).sample) < 2e-5
    assert relative_l2(kl.tiled_encode(x).latent_dist.parameters, theirs._tiled_encode(x)) < 2e-5
    assert relative_l2(kl.tiled_decode(z).sample, theirs.tiled_decode(z).sample) < 2e-5
    kl.disable_tiling()
    assert torch.equal(kl.decode(z).sample, whole)


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.data_ptr():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.sizes:
                    self.sizes[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage.data_ptr())
        self.most = max(self.most, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["f8, Stable Diffusion", "attention", "without quant_conv"])
def test_stripes_give_the_same_image(
    name: str, dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of a tile row by row: the same up to rounding, for batches and odd sizes too."""
    torch.manual_seed(0)
    model = AutoencoderKL(**{**BASE, **CONFIGS[name][1]}).eval().to(dtype)
    exact = copy.deepcopy(model).double()
    channels = model.config.latent_channels
    x, z = torch.randn(2, 3, 32, 48, dtype=dtype), torch.randn(2, channels, 5, 7, dtype=dtype)
    model.encoder.to(memory_format=layout)
    model.decoder.to(memory_format=layout)
    with torch.no_grad():
        for parts in (2, 1):
            for given, work, wanted in (
                (x[:parts], model._encode_tile, exact._encode_tile),
                (z[:parts], model._decode_tile, exact._decode_tile),
            ):
                given = given.contiguous(memory_format=layout)
                want, whole = wanted(given.double(), False), work(given, False)
                monkeypatch.setattr(striped, "LARGE", 0)
                monkeypatch.setattr(striped, "STRIPE", 4096)
                kept = given.clone()
                mine = work(given)
                monkeypatch.undo()
                assert torch.equal(given, kept)
                error = [float((y - want).norm() / want.norm()) for y in (mine, whole)]
                assert error[0] <= max(2e-6, 1.2 * error[1])


def test_stripes_are_for_no_gradient(kl: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(striped, "LARGE", 0)
    kl.enable_tiling()
    z = torch.randn(1, 4, 8, 8, requires_grad=True)
    kl.decode(z).sample.sum().backward()
    assert z.grad is not None and z.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_2048_pixels_fit_with_a_tile_of_1024(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion XL's tile at an eighth of its side and of its width: what is held grows with both.

    Held are at most so many times the largest image of the decoder, of 256 channels and 1024x1024 pixels:
    1.07 GB in float32. `benchmarks/bench_memory.py` measures whole processes.
    """
    config = {**FOUR, "block_out_channels": [16, 32, 64, 64], "sample_size": 128, "norm_num_groups": 8}
    model = AutoencoderKL(**{**BASE, **config}).eval().to(dtype)
    monkeypatch.setattr(striped, "LARGE", striped.LARGE // 512)
    monkeypatch.setattr(striped, "STRIPE", striped.STRIPE // 512)
    largest = 32 * 128 * 128 * dtype.itemsize
    with torch.no_grad():
        for work, shape in ((model._decode_tile, (1, 4, 16, 16)), (model._encode_tile, (1, 3, 128, 128))):
            given = torch.randn(shape, dtype=dtype)
            held = {}
            for by_stripes in (True, False):
                with Held() as count:
                    work(given, by_stripes)
                held[by_stripes] = count.most / largest
            assert held[True] < 2.0 < held[False]


@torch.no_grad()
def test_a_tile_thinner_than_a_latent_is_left_out(kl: AutoencoderKL) -> None:
    kl.enable_tiling()  # diffusers' convolution fails here
    latents = kl.encode(torch.randn(1, 3, 21, 13)).latent_dist.mean
    assert latents.shape == (1, 4, 10, 6) and torch.isfinite(latents).all()


@torch.no_grad()
def test_slices_give_the_same_image(kl: AutoencoderKL) -> None:
    x = torch.randn(3, 3, 16, 16)
    expected = kl(x).sample
    kl.enable_slicing()
    batches = []
    kl.decoder.register_forward_hook(lambda module, given, output: batches.append(len(output)))
    assert relative_l2(kl(x).sample, expected) < 2e-5
    assert batches == [1, 1, 1]
    kl.disable_slicing()
    kl(x)
    assert batches[3:] == [3]


@torch.no_grad()
def test_codebook_entries_by_index() -> None:
    model = fill(VQModel(**BASE, num_vq_embeddings=11, lookup_from_codebook=True)).eval()
    indices = torch.randint(0, 11, (2, 4, 4))
    rows = model.quantize.embedding(indices).permute(0, 3, 1, 2)
    by_index = model.decode(indices, force_not_quantize=True, shape=(2, 4, 4, 3)).sample
    assert torch.equal(by_index, model.decode(rows.contiguous()).sample)


def test_gradients_pass_through_the_codebook() -> None:
    model = fill(VQModel(**BASE, num_vq_embeddings=11))
    result = model(torch.randn(1, 3, 16, 16))
    (result.sample.square().mean() + result.commit_loss).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_a_deterministic_distribution_is_its_mean(kl: AutoencoderKL) -> None:
    from difusores.models.autoencoder import DiagonalGaussianDistribution

    certain = DiagonalGaussianDistribution(torch.randn(2, 8, 3, 3), deterministic=True)
    assert torch.equal(certain.sample(), certain.mean)
    assert certain.kl().tolist() == certain.nll(certain.mean).tolist() == [0.0]


def test_compiles_without_a_graph_break(kl: AutoencoderKL) -> None:
    with torch.no_grad():
        x = torch.randn(1, 3, 16, 16)
        compiled = torch.compile(kl, backend="aot_eager", fullgraph=True)
        assert relative_l2(compiled(x).sample, kl(x).sample) < 1e-6


def test_bad_input_is_named(kl: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match=r"image: got shape \[1, 4, 16, 16\]; needed is \[N, 3"):
        kl.encode(torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match=r"latents: got shape \[1, 3, 8, 8\]; needed is \[N, 4"):
        kl.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="down_block_types has 'DownBlock2D'"):
        AutoencoderKL(**(BASE | {"down_block_types": ["DownBlock2D"] * 2}))
    with pytest.raises(ValueError, match="has 1 entries, and block_out_channels has 2"):
        AutoencoderKL(**(BASE | {"up_block_types": ["UpDecoderBlock2D"]}))
    with pytest.raises(ValueError, match="norm_num_groups is 5"):
        VQModel(**(BASE | {"norm_num_groups": 5}))
    with pytest.raises(ValueError, match="norm_type has 'spatial'"):
        VQModel(**BASE, norm_type="spatial")
