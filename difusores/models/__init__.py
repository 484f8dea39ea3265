"""Models: plain torch modules that call the package's ops."""

from difusores.models.modeling import ModelMixin
from difusores.models.unet_2d import UNet2DModel, UNet2DOutput

__all__ = ["ModelMixin", "UNet2DModel", "UNet2DOutput"]
