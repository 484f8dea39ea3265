"""`AutoPipelineFor...`: the pipeline of a task for the models that a folder or another pipeline holds."""

from __future__ import annotations

import os
from typing import Any, ClassVar, NoReturn

from difusores.configuration import ConfigMixin
from difusores.pipelines.stable_diffusion import StableDiffusionPipeline
from difusores.pipelines.stable_diffusion_controlnet import StableDiffusionControlNetPipeline
from difusores.pipelines.stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from difusores.pipelines.stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from difusores.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from difusores.pipelines.stable_diffusion_xl_img2img import StableDiffusionXLImg2ImgPipeline
from difusores.pipelines.stable_diffusion_xl_inpaint import StableDiffusionXLInpaintPipeline

FAMILIES: tuple[dict[str, type[Any]], ...] = (
    {
        "text": StableDiffusionPipeline,
        "image": StableDiffusionImg2ImgPipeline,
        "inpainting": StableDiffusionInpaintPipeline,
    },
    {
        "text": StableDiffusionXLPipeline,
        "image": StableDiffusionXLImg2ImgPipeline,
        "inpainting": StableDiffusionXLInpaintPipeline,
    },
    {"text": StableDiffusionControlNetPipeline},
)
"""Pipelines over the same models, by task."""
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class _AutoPipeline(ConfigMixin):
    """Base of the classes below, which have no objects: their methods return a pipeline of another class."""

    config_name = "model_index.json"
    task: ClassVar[str]

    def __init__(self) -> NoReturn:
        name = type(self).__name__
        raise OSError(f"there are no objects of {name}: use {name}.from_pretrained or {name}.from_pipe")

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """The task's pipeline, from a folder of another task's too.

        options: see `DiffusionPipeline.from_pretrained`; with `controlnet`, the pipeline has one.

        Raises:
            ValueError: this package has no pipeline of the task for the folder's models.
        """
        hub = {name: options[name] for name in HUB if name in options}
        index = cls.load_config(pretrained_model_or_path, **hub)
        chosen = cls._class_for(str(index.get("_class_name")), options.get("controlnet") is not None)
        return chosen.from_pretrained(pretrained_model_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Any:
        """The task's pipeline over the models of another one.

        options: see `DiffusionPipeline.from_pipe`. `controlnet=None` leaves one out.

        Raises:
            ValueError: this package has no pipeline of the task for these models.
        """
        controlnet = options.get("controlnet", getattr(pipeline, "controlnet", None))
        if options.get("controlnet", 0) is None:
            del options["controlnet"]
        return cls._class_for(type(pipeline).__name__, controlnet is not None).from_pipe(pipeline, **options)

    @classmethod
    def _class_for(cls, name: str, controlled: bool) -> Any:
        plain, xl, control = FAMILIES
        found = next((f for f in FAMILIES if name in {kind.__name__ for kind in f.values()}), None)
        if found is control and not controlled:
            found = plain
        elif found is plain and controlled:
            found = control
        if found is None or cls.task not in found or (found is xl and controlled):
            beside = " and a controlnet" if controlled else ""
            raise ValueError(f"{cls.__name__} knows no pipeline for the models of a {name}{beside}")
        return found[cls.task]


class AutoPipelineForText2Image(_AutoPipeline):
    """Stable Diffusion's pipeline for texts, XL's, or one with a ControlNet."""

    task = "text"


class AutoPipelineForImage2Image(_AutoPipeline):
    """Stable Diffusion's pipeline for texts and images, or XL's."""

    task = "image"


class AutoPipelineForInpainting(_AutoPipeline):
    """Stable Diffusion's pipeline for inpainting, or XL's."""

    task = "inpainting"
