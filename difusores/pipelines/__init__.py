"""Pipelines: a model, a scheduler and the loop that samples with them."""

from difusores.pipelines.adm import ADMPipeline
from difusores.pipelines.auto_pipeline import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from difusores.pipelines.conditional import AudioToImagePipeline, SemanticToImagePipeline
from difusores.pipelines.images import ImagePipelineOutput
from difusores.pipelines.latent_diffusion import (
    LDMPipeline,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
)
from difusores.pipelines.pipeline import DiffusionPipeline
from difusores.pipelines.posterior import PosteriorPipeline
from difusores.pipelines.stable_diffusion import StableDiffusionPipeline, StableDiffusionPipelineOutput
from difusores.pipelines.stable_diffusion_controlnet import StableDiffusionControlNetPipeline
from difusores.pipelines.stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from difusores.pipelines.stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from difusores.pipelines.stable_diffusion_instruct_pix2pix import StableDiffusionInstructPix2PixPipeline
from difusores.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from difusores.pipelines.stable_diffusion_xl_base import StableDiffusionXLPipelineOutput
from difusores.pipelines.stable_diffusion_xl_img2img import StableDiffusionXLImg2ImgPipeline
from difusores.pipelines.stable_diffusion_xl_inpaint import StableDiffusionXLInpaintPipeline
from difusores.pipelines.unconditional import DDIMPipeline, DDPMPipeline

__all__ = [
    "ADMPipeline",
    "AudioToImagePipeline",
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "DDIMPipeline",
    "DDPMPipeline",
    "DiffusionPipeline",
    "ImagePipelineOutput",
    "LDMPipeline",
    "LDMSuperResolutionPipeline",
    "LDMTextToImagePipeline",
    "PosteriorPipeline",
    "SemanticToImagePipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionPipelineOutput",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLPipelineOutput",
]
