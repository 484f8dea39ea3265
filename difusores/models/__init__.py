"""Models: plain torch modules that call the package's ops."""

from difusores.models.adm import ADMClassifier, ADMUNet
from difusores.models.audio_encoder import AudioEncoder
from difusores.models.auto_model import AutoModel
from difusores.models.autoencoder import AutoencoderKL, VQModel
from difusores.models.conditioning import Conditioning
from difusores.models.consistency_decoder import ConsistencyDecoderVAE
from difusores.models.controlnet import ControlNetModel, ControlNetOutput
from difusores.models.ldm_bert import LDMBertModel
from difusores.models.modeling import ModelMixin
from difusores.models.multi_controlnet import MultiControlNetModel
from difusores.models.unet_2d import UNet2DModel, UNet2DOutput
from difusores.models.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput

__all__ = [
    "ADMClassifier",
    "ADMUNet",
    "AudioEncoder",
    "AutoModel",
    "AutoencoderKL",
    "Conditioning",
    "ConsistencyDecoderVAE",
    "ControlNetModel",
    "ControlNetOutput",
    "LDMBertModel",
    "ModelMixin",
    "MultiControlNetModel",
    "UNet2DConditionModel",
    "UNet2DConditionOutput",
    "UNet2DModel",
    "UNet2DOutput",
    "VQModel",
]
