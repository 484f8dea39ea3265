"""What the pipelines of Stable Diffusion XL share: two text encoders, sizes that the UNet is told."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difusores.models.lora import lora_strength
from difusores.outputs import BaseOutput
from difusores.pipelines.call_state import CallState
from difusores.pipelines.checks import check_count, is_pair
from difusores.pipelines.images import to_images
from difusores.pipelines.latent import Conditions
from difusores.pipelines.prompted import PromptedPipeline, Texts
from difusores.pipelines.prompts import as_list, check_prompts, check_texts, encode_texts_inside
from difusores.sampling import Generators

Size = tuple[int, int]


@dataclass
class StableDiffusionXLPipelineOutput(BaseOutput):
    """images: as the pipeline's `output_type` says."""

    images: Any


class StableDiffusionXLBase(PromptedPipeline[StableDiffusionXLPipelineOutput | tuple[Any]]):
    """What the pipelines of Stable Diffusion XL have in common (Podell et al. 2023, "SDXL").

    Args:
        vae: an `AutoencoderKL`, or anything with `decode(latents)`. Where its configuration says
            `force_upcast`, a copy in float32 decodes for one in float16, and encodes for one of half
            precision.
        text_encoder, tokenizer: transformers' CLIP; None where the second one is alone, as in refiners.
        text_encoder_2, tokenizer_2: CLIP with a projection; None where only embeddings of prompts are given.
        unet: a `UNet2DConditionModel` of `addition_embed_type` "text_time".
        scheduler: any of this package that the model was trained for, or one of diffusers.
        image_encoder, feature_extractor: kept for folders that have them; not used.
        force_zeros_for_empty_prompt: the negative embeddings are zeros where there is no negative prompt, in
            place of those of an empty text.
        add_watermarker: no watermark is put into images; True is refused.

    Raises:
        NotImplementedError: a watermark is asked for.
    """

    text_encoder: Any
    text_encoder_2: Any
    tokenizer: Any
    tokenizer_2: Any
    single_file_families = ("XL", "XL refiner")
    _callback_tensor_inputs: tuple[str, ...] = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")
    _denoising_start = CallState[float | None](None)
    _denoising_end = CallState[float | None](None)

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        if add_watermarker:
            raise NotImplementedError(
                "add_watermarker is True, and no watermark can be put into images: give False or None"
            )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)

    @property
    def denoising_start(self) -> float | None:
        """Of the call."""
        return self._denoising_start

    @property
    def denoising_end(self) -> float | None:
        """Of the call."""
        return self._denoising_end

    def encode_prompt(
        self,
        prompt: Texts,
        prompt_2: Texts = None,
        device: str | torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Texts = None,
        negative_prompt_2: Texts = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The model's conditions: (states of the prompts, of negative ones; projections of both).

        The negative ones are None without guidance.

        Args:
            prompt, negative_prompt: texts, for both encoders; one negative text serves all prompts.
            prompt_2, negative_prompt_2: other texts for the second encoder; None or "" for the same.
            prompt_embeds, negative_prompt_embeds: [N, tokens, width], the states of both encoders side by
                side, in place of texts; then pooled ones are needed too.
            pooled_prompt_embeds, negative_pooled_prompt_embeds: [N, width], in place of the projections.
            device: where they are put; None for the UNet's.
            num_images_per_prompt: each is repeated that often.
            do_classifier_free_guidance: make negative ones too.
            lora_scale: strength of LoRA layers in the text encoders; None for their own.
            clip_skip: take the prompts' states of that many layers below the last but one.

        Raises:
            ValueError: see `check_prompts` and `encode_texts_inside`; or a text that no encoder would read.
        """
        count = self._check_texts(
            prompt,
            prompt_2,
            negative_prompt,
            negative_prompt_2,
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
        )
        if prompt_embeds is None:
            texts = as_list(prompt, count), as_list(prompt_2 or prompt, count)
            prompt_embeds, pooled = self._encode_texts(texts, clip_skip, lora_scale)
            pooled_prompt_embeds = pooled if pooled_prompt_embeds is None else pooled_prompt_embeds
        place = device, num_images_per_prompt
        positive = self._placed(prompt_embeds, *place)
        pooled_positive = self._placed_pooled(pooled_prompt_embeds, count, *place)
        if not do_classifier_free_guidance:
            return positive, None, pooled_positive, None
        if negative_prompt_embeds is None:
            if negative_prompt is None and self.config["force_zeros_for_empty_prompt"]:
                return (
                    positive,
                    torch.zeros_like(positive),
                    pooled_positive,
                    torch.zeros_like(pooled_positive),
                )
            negative = negative_prompt or ""
            texts = as_list(negative, count), as_list(negative_prompt_2 or negative, count)
            negative_prompt_embeds, pooled = self._encode_texts(texts, None, lora_scale, positive.shape[1])
            if negative_pooled_prompt_embeds is None:
                negative_pooled_prompt_embeds = pooled
        return (
            positive,
            self._placed(negative_prompt_embeds, *place),
            pooled_positive,
            self._placed_pooled(negative_pooled_prompt_embeds, count, *place, "negative_"),
        )

    def _check_texts(
        self,
        prompt: Texts,
        prompt_2: Texts,
        negative_prompt: Texts,
        negative_prompt_2: Texts,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        pooled_prompt_embeds: Tensor | None,
        negative_pooled_prompt_embeds: Tensor | None,
    ) -> int:
        """The number of prompts. What diffusers takes and then leaves out raises ValueError."""
        count = check_prompts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, one_for_all=True
        )
        zeros = self.config["force_zeros_for_empty_prompt"] and negative_prompt is None
        for sign, second, embeds, pooled in (
            ("", prompt_2, prompt_embeds, pooled_prompt_embeds),
            ("negative_", negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds),
        ):
            check_texts(second, f"{sign}prompt_2")
            if isinstance(second, list) and len(second) != count:
                raise ValueError(f"{sign}prompt_2 has {len(second)} texts for {count} prompts")
            if second is not None and embeds is not None:
                raise ValueError(f"only one of {sign}prompt_2 and {sign}prompt_embeds can be given")
            if second is not None and self.text_encoder is None and self.text_encoder_2 is not None:
                raise ValueError(
                    f"{sign}prompt_2 is given, and there is one text encoder alone, which reads {sign}prompt"
                )
            if embeds is not None and pooled is None:
                raise ValueError(f"{sign}prompt_embeds are given: {sign}pooled_prompt_embeds are needed too")
            if sign and zeros and embeds is None and (second or pooled is not None):
                raise ValueError(
                    "without a negative_prompt the negative embeddings are zeros "
                    "(force_zeros_for_empty_prompt), and negative_prompt_2 or negative_pooled_prompt_embeds "
                    'would not be read: give negative_prompt too, "" for an empty one'
                )
        return count

    def _encode_texts(
        self,
        texts: tuple[list[str], list[str]],
        clip_skip: int | None,
        lora_scale: float | None,
        length: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """([N, L, width] of all encoders side by side, [N, P] of the one that projects)."""
        pairs = [(self.tokenizer_2, self.text_encoder_2)]
        if self.text_encoder is not None:
            pairs.insert(0, (self.tokenizer, self.text_encoder))
        if any(None in pair for pair in pairs):
            raise ValueError(
                "without text_encoder_2, tokenizer_2 and a tokenizer for each encoder, embeddings of prompts "
                "are needed"
            )
        states, pooled = [], None
        for (tokenizer, encoder), own in zip(pairs, texts, strict=False):
            with lora_strength(encoder, lora_scale):
                state, projected = encode_texts_inside(tokenizer, encoder, own, clip_skip, length)
            states.append(state)
            pooled = projected if pooled is None else pooled
        return torch.cat(states, dim=-1), pooled

    def _placed_pooled(
        self,
        pooled: Tensor | None,
        count: int,
        device: str | torch.device | None,
        times: int,
        sign: str = "",
    ) -> Tensor:
        if pooled is None:
            raise ValueError(f"no text encoder has a projection: {sign}pooled_prompt_embeds are needed")
        if pooled.ndim != 2 or len(pooled) != count:
            raise ValueError(
                f"{sign}pooled_prompt_embeds has shape {list(pooled.shape)}; needed is [{count}, width]"
            )
        return pooled.to(device or self.device, self.unet.dtype).repeat_interleave(times, dim=0)

    def _conditions(
        self, num_images_per_prompt: int | None, prompt: Texts, prompt_2: Texts, **others: Any
    ) -> tuple[int, Conditions]:
        """(number of images, the embeddings as callbacks see them: [negative, positive] with guidance).

        others: of `encode_prompt`.
        """
        guided = self.do_classifier_free_guidance
        positive, negative, pooled, negative_pooled = self.encode_prompt(
            prompt,
            prompt_2,
            None,
            check_count(num_images_per_prompt, "num_images_per_prompt"),
            guided,
            lora_scale=(self._cross_attention_kwargs or {}).get("scale"),
            clip_skip=self._clip_skip,
            **others,
        )
        count = len(positive)
        if negative is not None and negative_pooled is not None:
            positive, pooled = torch.cat((negative, positive)), torch.cat((negative_pooled, pooled))
        return count, Conditions({"prompt_embeds": positive, "add_text_embeds": pooled})

    def _tell_sizes(
        self,
        conditions: Conditions,
        count: int,
        sizes: tuple[Sequence[float], ...],
        negative_sizes: tuple[Sequence[float], ...],
        reason: str = "",
    ) -> None:
        """Put the time ids among the conditions: the numbers of `sizes` one behind the other, for each image.

        Raises:
            ValueError: there are more or fewer of them than the UNet reads; `reason` stands behind it.
        """
        rows = [[number for part in parts for number in part] for parts in (negative_sizes, sizes)]
        config, width = self.unet.config, conditions.tensors["add_text_embeds"].shape[-1]
        each, needed = config.get("addition_time_embed_dim"), config["projection_class_embeddings_input_dim"]
        if config.get("addition_embed_type") != "text_time":
            raise ValueError("the UNet is not told sizes: its addition_embed_type has to be 'text_time'")
        if any(each * len(row) + width != needed for row in rows):
            raise ValueError(
                f"the UNet reads {needed} numbers of added conditions; {len(rows[1])} time ids and a pooled "
                f"embedding of {width} have {each * len(rows[1]) + width}{reason}"
            )
        ids = [rows[0]] * count + [rows[1]] * count if self.do_classifier_free_guidance else [rows[1]] * count
        # float32 in any model: half precision does not tell 1023 from 1024
        conditions.tensors["add_time_ids"] = torch.tensor(ids, dtype=torch.float32, device=self.device)

    def _encoder(self) -> Any:
        return _upcast(self.vae, torch.float16, torch.bfloat16)

    def _decoder(self) -> Any:
        return _upcast(self.vae, torch.float16)

    def _output(
        self, latents: Tensor, output_type: str, return_dict: bool, generator: Generators
    ) -> StableDiffusionXLPipelineOutput | tuple[Any]:
        images: Any = latents
        if output_type != "latent":
            images = to_images(self._decode(latents, generator), output_type)
        return StableDiffusionXLPipelineOutput(images=images) if return_dict else (images,)


def _upcast(vae: Any, *dtypes: torch.dtype) -> Any:
    """The VAE, or a copy in float32 of one that has one of these dtypes and overflows in it."""
    config = getattr(vae, "config", None)
    if config is None or not config.get("force_upcast") or vae.dtype not in dtypes:
        return vae
    # a copy, because other threads may use the VAE meanwhile
    return copy.deepcopy(getattr(vae, "_orig_mod", vae)).float()


def sizes(
    original: Sequence[float] | None,
    crops: Sequence[float],
    target: Sequence[float] | None,
    default: Size,
) -> tuple[Sequence[float], ...]:
    """(original size, top and left of the crop, target size), the default for None.

    Raises:
        ValueError: one is not two numbers.
    """
    told = default if original is None else original, crops, default if target is None else target
    for pair in told:
        if not is_pair(pair):
            raise ValueError(f"a size or the coordinates of a crop are two numbers, got {pair!r}")
    return told
