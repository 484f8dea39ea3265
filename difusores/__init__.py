"""Fast, exact sampling and training of diffusion models.

Importing this package is silent and cheap: a public name is imported from its module when it is first used
(PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from difusores.acceleration import accelerate as accelerate
    from difusores.acceleration import calibrate as calibrate
    from difusores.acceleration import restore as restore
    from difusores.configuration import ConfigMixin as ConfigMixin
    from difusores.cuda_graph import disable_cuda_graph as disable_cuda_graph
    from difusores.cuda_graph import enable_cuda_graph as enable_cuda_graph
    from difusores.functional import sample as sample
    from difusores.models import ADMClassifier as ADMClassifier
    from difusores.models import ADMUNet as ADMUNet
    from difusores.models import AudioEncoder as AudioEncoder
    from difusores.models import AutoencoderKL as AutoencoderKL
    from difusores.models import AutoModel as AutoModel
    from difusores.models import Conditioning as Conditioning
    from difusores.models import ConsistencyDecoderVAE as ConsistencyDecoderVAE
    from difusores.models import ControlNetModel as ControlNetModel
    from difusores.models import LDMBertModel as LDMBertModel
    from difusores.models import ModelMixin as ModelMixin
    from difusores.models import MultiControlNetModel as MultiControlNetModel
    from difusores.models import UNet2DConditionModel as UNet2DConditionModel
    from difusores.models import UNet2DModel as UNet2DModel
    from difusores.models import VQModel as VQModel
    from difusores.ops import use_backend as use_backend
    from difusores.pipelines import ADMPipeline as ADMPipeline
    from difusores.pipelines import AudioToImagePipeline as AudioToImagePipeline
    from difusores.pipelines import AutoPipelineForImage2Image as AutoPipelineForImage2Image
    from difusores.pipelines import AutoPipelineForInpainting as AutoPipelineForInpainting
    from difusores.pipelines import AutoPipelineForText2Image as AutoPipelineForText2Image
    from difusores.pipelines import DDIMPipeline as DDIMPipeline
    from difusores.pipelines import DDPMPipeline as DDPMPipeline
    from difusores.pipelines import DiffusionPipeline as DiffusionPipeline
    from difusores.pipelines import ImagePipelineOutput as ImagePipelineOutput
    from difusores.pipelines import LDMPipeline as LDMPipeline
    from difusores.pipelines import LDMSuperResolutionPipeline as LDMSuperResolutionPipeline
    from difusores.pipelines import LDMTextToImagePipeline as LDMTextToImagePipeline
    from difusores.pipelines import PosteriorPipeline as PosteriorPipeline
    from difusores.pipelines import SemanticToImagePipeline as SemanticToImagePipeline
    from difusores.pipelines import StableDiffusionControlNetPipeline as StableDiffusionControlNetPipeline
    from difusores.pipelines import StableDiffusionImg2ImgPipeline as StableDiffusionImg2ImgPipeline
    from difusores.pipelines import StableDiffusionInpaintPipeline as StableDiffusionInpaintPipeline
    from difusores.pipelines import (
        StableDiffusionInstructPix2PixPipeline as StableDiffusionInstructPix2PixPipeline,
    )
    from difusores.pipelines import StableDiffusionPipeline as StableDiffusionPipeline
    from difusores.pipelines import StableDiffusionXLImg2ImgPipeline as StableDiffusionXLImg2ImgPipeline
    from difusores.pipelines import StableDiffusionXLInpaintPipeline as StableDiffusionXLInpaintPipeline
    from difusores.pipelines import StableDiffusionXLPipeline as StableDiffusionXLPipeline
    from difusores.schedulers import CMStochasticIterativeScheduler as CMStochasticIterativeScheduler
    from difusores.schedulers import CosineDPMSolverMultistepScheduler as CosineDPMSolverMultistepScheduler
    from difusores.schedulers import DDIMInverseScheduler as DDIMInverseScheduler
    from difusores.schedulers import DDIMParallelScheduler as DDIMParallelScheduler
    from difusores.schedulers import DDIMScheduler as DDIMScheduler
    from difusores.schedulers import DDPMParallelScheduler as DDPMParallelScheduler
    from difusores.schedulers import DDPMScheduler as DDPMScheduler
    from difusores.schedulers import DEISMultistepScheduler as DEISMultistepScheduler
    from difusores.schedulers import DPMSolverMultistepInverseScheduler as DPMSolverMultistepInverseScheduler
    from difusores.schedulers import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler
    from difusores.schedulers import DPMSolverSDEScheduler as DPMSolverSDEScheduler
    from difusores.schedulers import DPMSolverSinglestepScheduler as DPMSolverSinglestepScheduler
    from difusores.schedulers import EDMDPMSolverMultistepScheduler as EDMDPMSolverMultistepScheduler
    from difusores.schedulers import EDMEulerScheduler as EDMEulerScheduler
    from difusores.schedulers import EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler
    from difusores.schedulers import EulerDiscreteScheduler as EulerDiscreteScheduler
    from difusores.schedulers import FlowMatchEulerDiscreteScheduler as FlowMatchEulerDiscreteScheduler
    from difusores.schedulers import FlowMatchHeunDiscreteScheduler as FlowMatchHeunDiscreteScheduler
    from difusores.schedulers import HeunDiscreteScheduler as HeunDiscreteScheduler
    from difusores.schedulers import IPNDMScheduler as IPNDMScheduler
    from difusores.schedulers import KarrasVeScheduler as KarrasVeScheduler
    from difusores.schedulers import KDPM2AncestralDiscreteScheduler as KDPM2AncestralDiscreteScheduler
    from difusores.schedulers import KDPM2DiscreteScheduler as KDPM2DiscreteScheduler
    from difusores.schedulers import LCMScheduler as LCMScheduler
    from difusores.schedulers import LMSDiscreteScheduler as LMSDiscreteScheduler
    from difusores.schedulers import PNDMScheduler as PNDMScheduler
    from difusores.schedulers import RePaintScheduler as RePaintScheduler
    from difusores.schedulers import SASolverScheduler as SASolverScheduler
    from difusores.schedulers import SchedulerMixin as SchedulerMixin
    from difusores.schedulers import ScoreSdeVeScheduler as ScoreSdeVeScheduler
    from difusores.schedulers import ScoreSdeVpScheduler as ScoreSdeVpScheduler
    from difusores.schedulers import TCDScheduler as TCDScheduler
    from difusores.schedulers import UnCLIPScheduler as UnCLIPScheduler
    from difusores.schedulers import UniPCMultistepScheduler as UniPCMultistepScheduler

# Public name -> the module that defines it. The imports above tell type checkers the same (tested).
_PUBLIC = {
    "ADMClassifier": "difusores.models",
    "ADMPipeline": "difusores.pipelines",
    "ADMUNet": "difusores.models",
    "AudioEncoder": "difusores.models",
    "AudioToImagePipeline": "difusores.pipelines",
    "AutoModel": "difusores.models",
    "AutoPipelineForImage2Image": "difusores.pipelines",
    "AutoPipelineForInpainting": "difusores.pipelines",
    "AutoPipelineForText2Image": "difusores.pipelines",
    "AutoencoderKL": "difusores.models",
    "CMStochasticIterativeScheduler": "difusores.schedulers",
    "Conditioning": "difusores.models",
    "ConfigMixin": "difusores.configuration",
    "ConsistencyDecoderVAE": "difusores.models",
    "ControlNetModel": "difusores.models",
    "CosineDPMSolverMultistepScheduler": "difusores.schedulers",
    "DDIMInverseScheduler": "difusores.schedulers",
    "DDIMParallelScheduler": "difusores.schedulers",
    "DDIMPipeline": "difusores.pipelines",
    "DDIMScheduler": "difusores.schedulers",
    "DDPMParallelScheduler": "difusores.schedulers",
    "DDPMPipeline": "difusores.pipelines",
    "DDPMScheduler": "difusores.schedulers",
    "DEISMultistepScheduler": "difusores.schedulers",
    "DPMSolverMultistepInverseScheduler": "difusores.schedulers",
    "DPMSolverMultistepScheduler": "difusores.schedulers",
    "DPMSolverSDEScheduler": "difusores.schedulers",
    "DPMSolverSinglestepScheduler": "difusores.schedulers",
    "DiffusionPipeline": "difusores.pipelines",
    "EDMDPMSolverMultistepScheduler": "difusores.schedulers",
    "EDMEulerScheduler": "difusores.schedulers",
    "EulerAncestralDiscreteScheduler": "difusores.schedulers",
    "EulerDiscreteScheduler": "difusores.schedulers",
    "FlowMatchEulerDiscreteScheduler": "difusores.schedulers",
    "FlowMatchHeunDiscreteScheduler": "difusores.schedulers",
    "HeunDiscreteScheduler": "difusores.schedulers",
    "IPNDMScheduler": "difusores.schedulers",
    "ImagePipelineOutput": "difusores.pipelines",
    "KDPM2AncestralDiscreteScheduler": "difusores.schedulers",
    "KDPM2DiscreteScheduler": "difusores.schedulers",
    "KarrasVeScheduler": "difusores.schedulers",
    "LCMScheduler": "difusores.schedulers",
    "LDMBertModel": "difusores.models",
    "LDMPipeline": "difusores.pipelines",
    "LDMSuperResolutionPipeline": "difusores.pipelines",
    "LDMTextToImagePipeline": "difusores.pipelines",
    "LMSDiscreteScheduler": "difusores.schedulers",
    "ModelMixin": "difusores.models",
    "MultiControlNetModel": "difusores.models",
    "PNDMScheduler": "difusores.schedulers",
    "PosteriorPipeline": "difusores.pipelines",
    "RePaintScheduler": "difusores.schedulers",
    "SASolverScheduler": "difusores.schedulers",
    "SchedulerMixin": "difusores.schedulers",
    "ScoreSdeVeScheduler": "difusores.schedulers",
    "ScoreSdeVpScheduler": "difusores.schedulers",
    "SemanticToImagePipeline": "difusores.pipelines",
    "StableDiffusionControlNetPipeline": "difusores.pipelines",
    "StableDiffusionImg2ImgPipeline": "difusores.pipelines",
    "StableDiffusionInpaintPipeline": "difusores.pipelines",
    "StableDiffusionInstructPix2PixPipeline": "difusores.pipelines",
    "StableDiffusionPipeline": "difusores.pipelines",
    "StableDiffusionXLImg2ImgPipeline": "difusores.pipelines",
    "StableDiffusionXLInpaintPipeline": "difusores.pipelines",
    "StableDiffusionXLPipeline": "difusores.pipelines",
    "TCDScheduler": "difusores.schedulers",
    "UNet2DConditionModel": "difusores.models",
    "UNet2DModel": "difusores.models",
    "UnCLIPScheduler": "difusores.schedulers",
    "UniPCMultistepScheduler": "difusores.schedulers",
    "VQModel": "difusores.models",
    "accelerate": "difusores.acceleration",
    "calibrate": "difusores.acceleration",
    "disable_cuda_graph": "difusores.cuda_graph",
    "enable_cuda_graph": "difusores.cuda_graph",
    "restore": "difusores.acceleration",
    "sample": "difusores.functional",
    "use_backend": "difusores.ops",
}
_SUBMODULES = (
    "acceleration",
    "callbacks",
    "functional",
    "image_processor",
    "models",
    "ops",
    "pipelines",
    "processes",
    "schedulers",
    "schedules",
    "solvers",
    "training",
    "utils",
)

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name]), name)
    elif name in _SUBMODULES:
        value = import_module(f"difusores.{name}")
    else:
        raise AttributeError(f"module 'difusores' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_SUBMODULES})
