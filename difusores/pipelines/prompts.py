"""Prompts: from texts to what a CLIP text encoder of transformers makes of them, and batches of them."""

from __future__ import annotations

import threading
import warnings
from typing import Any

from torch import Tensor

from difusores.pipelines.textual_inversion import spelt_out

# a tokenizer keeps the padding that it is told, for all threads
_TOKENIZING = threading.Lock()


def encode_texts(
    tokenizer: Any,
    text_encoder: Any,
    texts: list[str],
    clip_skip: int | None = None,
    length: int | None = None,
) -> Tensor:
    """[N, L, C] embeddings of the tokens of N texts.

    Args:
        tokenizer, text_encoder: of transformers. Texts that are too long are cut, with a warning.
        length: L; the tokenizer's longest (77) if None, and not above it.
        clip_skip: take the states of that many layers before the last one, normalised like those of the last.

    Raises:
        ValueError: the encoder has fewer layers, or a width or table that the tokenizer does not fit.
    """
    ids, mask = _inputs(tokenizer, text_encoder, texts, length)
    options: dict[str, Any] = {}
    if getattr(text_encoder.config, "use_attention_mask", False):
        options["attention_mask"] = mask
    if clip_skip is None:
        embeds: Tensor = text_encoder(ids, **options)[0]
        return embeds
    states = text_encoder(ids, output_hidden_states=True, **options).hidden_states
    _check_skip(clip_skip, clip_skip + 1, states)
    # transformers 5 has no text_model inside of CLIPTextModel any more
    inner = getattr(text_encoder, "text_model", text_encoder)
    embeds = inner.final_layer_norm(states[-1 - clip_skip])
    return embeds


def encode_texts_inside(
    tokenizer: Any,
    text_encoder: Any,
    texts: list[str],
    clip_skip: int | None = None,
    length: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(states before the encoder's last layer, as they are, [N, L, C]; projections of whole texts, [N, P]).

    An encoder without a projection gives None.

    Args:
        clip_skip: take the states of that many layers further down.

    The other arguments and Raises are those of `encode_texts`.
    """
    ids, _ = _inputs(tokenizer, text_encoder, texts, length)
    output = text_encoder(ids, output_hidden_states=True)
    place = 2 + (clip_skip or 0)
    _check_skip(clip_skip or 0, place, output.hidden_states)
    return output.hidden_states[-place], output[0] if output[0].ndim == 2 else None


def _inputs(tokenizer: Any, text_encoder: Any, texts: list[str], length: int | None) -> tuple[Tensor, Tensor]:
    """Ids and their mask on the encoder's device.

    Raises:
        ValueError: the encoder has no embedding of a token.
    """
    ids, mask = tokenize(tokenizer, texts, length)
    table = text_encoder.get_input_embeddings().weight
    if int(ids.max()) >= len(table):
        raise ValueError(
            f"the tokenizer gives token {int(ids.max())}, and the text encoder has {len(table)} embeddings: "
            "they do not belong together"
        )
    return ids.to(table.device), mask.to(table.device)


def _check_skip(clip_skip: int, place: int, states: tuple[Tensor, ...]) -> None:
    if clip_skip < 0 or place > len(states):
        raise ValueError(f"clip_skip is {clip_skip}, and the text encoder has {len(states) - 1} layers")


def tokenize(tokenizer: Any, texts: list[str], length: int | None = None) -> tuple[Tensor, Tensor]:
    """[N, L] ids, filled up to L, and their mask; what is cut of a longer text stands in a warning.

    Raises:
        ValueError: `length` is above the tokenizer's longest.
    """
    longest = tokenizer.model_max_length
    if length is not None and length > longest:
        raise ValueError(
            f"the prompt's embeddings have {length} tokens, and the text encoder reads {longest}: "
            "the negative ones have to be given too"
        )
    length = length or longest
    texts = [spelt_out(tokenizer, text) for text in texts]
    with _TOKENIZING:
        padded = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        whole = tokenizer(texts, truncation=False).input_ids
    for ids in whole:
        if len(ids) > length:
            cut = tokenizer.decode(ids[length - 1 : -1]).strip()
            warnings.warn(
                f"the text encoder reads {length} tokens, and a prompt has {len(ids)}; this is cut: {cut!r}",
                stacklevel=2,
            )
    return padded.input_ids, padded.attention_mask


def check_prompts(
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    name: str = "prompt",
    one_for_all: bool = False,
) -> int:
    """The number of prompts.

    Args:
        name: of the first argument, in messages.
        one_for_all: one negative text is allowed for a list of prompts, as a list of one is for one.

    Raises:
        TypeError: `negative_prompt` is of another type than `prompt`, and that is not allowed.
        ValueError: none or both of a text and its embedding are given, or the numbers or shapes differ.
    """
    if (prompt is None) == (prompt_embeds is None):
        found = "neither" if prompt is None else "both"
        raise ValueError(f"one of {name} and {name}_embeds is needed, and {found} of them is given")
    for label, text in ((name, prompt), (f"negative_{name}", negative_prompt)):
        check_texts(text, label)
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError(f"only one of negative_{name} and negative_{name}_embeds can be given")
    for label, embeds in (
        (f"{name}_embeds", prompt_embeds),
        (f"negative_{name}_embeds", negative_prompt_embeds),
    ):
        if embeds is not None and embeds.ndim != 3:
            raise ValueError(f"{label} has shape {list(embeds.shape)}; needed is [prompts, tokens, width]")
    given = [list(embeds.shape) for embeds in (prompt_embeds, negative_prompt_embeds) if embeds is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(
            f"{name}_embeds has shape {given[0]}, and negative_{name}_embeds has {given[1]}: "
            "they have to be the same"
        )
    mixed = None not in (prompt, negative_prompt) and type(prompt) is not type(negative_prompt)
    if mixed and not one_for_all:
        raise TypeError(
            f"negative_{name} is a {type(negative_prompt).__name__}, and {name} a {type(prompt).__name__}"
        )
    count = (
        len(prompt_embeds)
        if prompt_embeds is not None
        else 1
        if isinstance(prompt, str)
        else len(prompt or [])
    )
    negatives = (
        len(negative_prompt_embeds)
        if negative_prompt_embeds is not None
        else len(negative_prompt)
        if isinstance(negative_prompt, list)
        else None
    )
    if negatives is not None and negatives != count:
        raise ValueError(
            f"there are {negatives} negative prompts for {count} prompts: needed is one for each"
        )
    return count


def check_texts(text: str | list[str] | None, name: str) -> None:
    """Raise ValueError for what is neither texts nor None."""
    if text is not None and not isinstance(text, str):
        if not isinstance(text, list) or not all(isinstance(part, str) for part in text):
            raise ValueError(f"{name} is {text!r}; it has to be a string or a list of strings")
        if not text:
            raise ValueError(f"{name} is an empty list")


def check_width(embeds: Tensor, config: Any) -> None:
    """Raise ValueError where embeddings [..., width] are none that the UNet of that configuration reads."""
    width, needed = embeds.shape[-1], config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    if isinstance(needed, int) and width != needed:
        raise ValueError(f"the prompts' embeddings are {width} wide, and the UNet reads {needed}")


def as_list(text: str | list[str] | None, count: int) -> list[str]:
    """One text for each of `count` prompts; empty ones for None."""
    if text is None:
        return [""] * count
    return [text] * count if isinstance(text, str) else text


def repeat_each(embeds: Tensor, times: int) -> Tensor:
    """[N, ...] -> [N * times, ...], the copies of one prompt side by side."""
    return embeds.repeat_interleave(times, dim=0)
