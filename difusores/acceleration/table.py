"""Which class is replaced by what."""

from __future__ import annotations

from torch import nn

from difusores.acceleration.cuda_blocks import CudaResnetForward
from difusores.acceleration.cuda_layers import CudaConvForward, CudaLinearForward, TimestepsForward
from difusores.acceleration.layers import ConvForward, LinearForward
from difusores.acceleration.network import NetworkForward
from difusores.acceleration.norms import GroupNormForward
from difusores.acceleration.resnet import ResnetForward, UpsampleForward
from difusores.acceleration.session import Forward
from difusores.acceleration.transformer import (
    CrossAttentionForward,
    DiffusersAttentionForward,
    DiffusersTransformerForward,
    GEGLUForward,
    ImageAttentionForward,
    TransformerForward,
)
from difusores.acceleration.transformer_blocks import (
    DiffusersTransformerBlockForward,
    LayerNormForward,
    TransformerBlockForward,
)

# Class, by module and name, -> its replacement. Names and not classes: diffusers is not imported for it.
OURS = "difusores.models."
THEIRS = "diffusers.models."
BLOCKS: dict[tuple[str, str], type[Forward]] = {
    (OURS + "layers", "ResnetBlock2D"): ResnetForward,
    (OURS + "layers", "Attention"): ImageAttentionForward,
    (OURS + "transformer", "CrossAttention"): CrossAttentionForward,
    (OURS + "transformer", "GEGLU"): GEGLUForward,
    (OURS + "transformer", "BasicTransformerBlock"): TransformerBlockForward,
    (OURS + "transformer", "Transformer2DModel"): TransformerForward,
    (OURS + "unet_2d", "UNet2DModel"): NetworkForward,
    (OURS + "unet_2d_condition", "UNet2DConditionModel"): NetworkForward,
    (OURS + "controlnet", "ControlNetModel"): NetworkForward,
    (OURS + "autoencoder", "Encoder"): NetworkForward,
    (OURS + "autoencoder", "Decoder"): NetworkForward,
    (THEIRS + "resnet", "ResnetBlock2D"): ResnetForward,
    (THEIRS + "attention_processor", "Attention"): DiffusersAttentionForward,
    (THEIRS + "activations", "GEGLU"): GEGLUForward,
    (THEIRS + "attention", "BasicTransformerBlock"): DiffusersTransformerBlockForward,
    (THEIRS + "transformers.transformer_2d", "Transformer2DModel"): DiffusersTransformerForward,
    (THEIRS + "unets.unet_2d", "UNet2DModel"): NetworkForward,
    (THEIRS + "unets.unet_2d_condition", "UNet2DConditionModel"): NetworkForward,
    (THEIRS + "controlnets.controlnet", "ControlNetModel"): NetworkForward,
    (THEIRS + "autoencoders.vae", "Encoder"): NetworkForward,
    (THEIRS + "autoencoders.vae", "Decoder"): NetworkForward,
}
LAYERS: dict[type[nn.Module], type[Forward]] = {
    nn.Linear: LinearForward,
    nn.Conv2d: ConvForward,
    nn.GroupNorm: GroupNormForward,
    nn.LayerNorm: LayerNormForward,
}
# On a GPU what stands there instead of the above; and what is listed on a CPU or on a GPU alone.
CUDA: dict[type[Forward], type[Forward]] = {
    ResnetForward: CudaResnetForward,
    LinearForward: CudaLinearForward,
    ConvForward: CudaConvForward,
}
CPU_BLOCKS: dict[tuple[str, str], type[Forward]] = {
    (OURS + "layers", "Upsample2D"): UpsampleForward,
    (THEIRS + "upsampling", "Upsample2D"): UpsampleForward,
}
CUDA_BLOCKS: dict[tuple[str, str], type[Forward]] = {
    (OURS + "embeddings", "Timesteps"): TimestepsForward,
    (THEIRS + "embeddings", "Timesteps"): TimestepsForward,
}
# Parts of a name whose layers keep the dtype of their weights: they are few rows or
# channels, and stand at a network's border.
KEEPS_DTYPE = ("time_emb", "time_proj", "add_emb", "class_emb", "quant_conv")


def replacement(module: nn.Module, cuda: bool) -> tuple[type[Forward] | None, str | None]:
    """A module's replacement, and why it cannot be put there; (None, None) where its class is not listed.

    cuda: for a GPU; else for a CPU.
    """
    name = (type(module).__module__, type(module).__name__)
    kind = LAYERS.get(type(module)) or BLOCKS.get(name)
    if kind is None:
        kind = (CUDA_BLOCKS if cuda else CPU_BLOCKS).get(name)
    elif cuda:
        kind = CUDA.get(kind, kind)
    if kind is None:
        return None, None
    if "forward" in module.__dict__:
        return kind, "it has a forward of its own already"
    return kind, kind.refuses(module)
