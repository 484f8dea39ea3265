"""Textual inversion (Gal et al. 2023): words whose embeddings were learned, for a text encoder's table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from difusores.files import find_file
from difusores.models.modeling import read_tensors

STEM = "learned_embeds"
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")

Embedding = str | os.PathLike[str] | Mapping[str, Any] | Tensor


class TextualInversion:
    """Methods of pipelines that are told texts."""

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Embedding | Sequence[Embedding],
        token: str | Sequence[str | None] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        hf_token: str | bool | None = None,
        **hub: Any,
    ) -> None:
        """Give the tokenizer a word and the text encoder its embedding.

        Args:
            pretrained_model_name_or_path: a file, a folder, a Hub id, tensors by word, a tensor [width] or
                [vectors, width], or a list of these. Files are diffusers', or the pickled ones of other
                programs with "string_to_param", which are read with `weights_only=True`.
            token: the word, or one for each; None for the file's. Of several vectors the word stands for all:
                prompts have it once.
            tokenizer, text_encoder: the pipeline's first ones if None.
            weight_name: of the file in the folder; None for "learned_embeds.safetensors" or ".bin".
            use_safetensors: False reads only .bin files, True none of them.
            hf_token: of the Hub.
            hub: `cache_dir`, `force_download`, `local_files_only`, `revision` of a Hub repository.

        Raises:
            OSError: there is no such file.
            TypeError: an argument that is not one of these.
            ValueError: the word is known already, an embedding has another width, or numbers do not fit.
        """
        unknown = hub.keys() - set(HUB)
        if unknown:
            raise TypeError(f"load_textual_inversion takes no {', '.join(sorted(unknown))}")
        if hf_token is not None:
            hub["token"] = hf_token
        tokenizer, text_encoder = self._text_parts(tokenizer, text_encoder)
        given = pretrained_model_name_or_path
        sources: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        names = [weight_name] if weight_name else _names(use_safetensors)
        found = [_read(source, names, subfolder, hub) for source in sources]
        words: list[str | None] = (
            [token] * len(found) if token is None or isinstance(token, str) else list(token)
        )
        if len(found) == 1 and len(words) > 1 and isinstance(found[0], Tensor):
            found = list(found[0])  # a row for each word
        if len(words) != len(found):
            raise ValueError(f"there are {len(words)} tokens for {len(found)} embeddings")
        rows: dict[str, Tensor] = {}
        for word, source in zip(words, found, strict=True):
            for name, row in _rows(word, source).items():
                if name in rows or name in tokenizer.get_vocab():
                    raise ValueError(f"the tokenizer has a token {name!r} already")
                rows[name] = row
        self._append(tokenizer, text_encoder, rows)

    def unload_textual_inversion(
        self, tokens: str | Sequence[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Take words out of the tokenizer and their embeddings out of the text encoder.

        Args:
            tokens: the words; None for all that were added. Of several vectors the word stands for all.
            tokenizer, text_encoder: the pipeline's first ones if None.

        Raises:
            ValueError: the tokenizer has no such added word.
        """
        tokenizer, text_encoder = self._text_parts(tokenizer, text_encoder)
        special = set(tokenizer.all_special_tokens)
        added = {
            token.content: i
            for i, token in tokenizer.added_tokens_decoder.items()
            if not token.special and token.content not in special
        }
        words = [tokens] if isinstance(tokens, str) else tokens
        chosen = set(added) if words is None else {part for word in words for part in _parts(word, added)}
        unknown = chosen - set(added)
        if unknown or not chosen:
            names = ", ".join(map(repr, sorted(unknown)))
            raise ValueError(f"the tokenizer has no added token {names}; it has {', '.join(added) or 'none'}")
        gone = sorted(added[name] for name in chosen)
        _forget(tokenizer, chosen, gone)
        table: nn.Embedding = text_encoder.get_input_embeddings()
        kept = torch.ones(len(table.weight), dtype=torch.bool)
        kept[gone] = False
        with torch.no_grad():
            rows = table.weight[kept.to(table.weight.device)]
        text_encoder.resize_token_embeddings(len(rows))
        with torch.no_grad():
            text_encoder.get_input_embeddings().weight.copy_(rows)

    def _text_parts(self, tokenizer: Any, text_encoder: Any) -> tuple[Any, Any]:
        parts = {
            "tokenizer": tokenizer or getattr(self, "tokenizer", None),
            "text_encoder": text_encoder or getattr(self, "text_encoder", None),
        }
        for name, part in parts.items():
            if part is None:
                raise ValueError(f"textual inversion needs a {name}, which is None")
        return parts["tokenizer"], parts["text_encoder"]

    @staticmethod
    def _append(tokenizer: Any, text_encoder: Any, rows: Mapping[str, Tensor]) -> None:
        table: nn.Embedding = text_encoder.get_input_embeddings()
        width = table.weight.shape[1]
        for name, row in rows.items():
            if row.shape != (width,):
                raise ValueError(
                    f"the embedding of {name!r} has shape {list(row.shape)}, and the text encoder's are "
                    f"{width} wide"
                )
        count = len(tokenizer)
        tokenizer.add_tokens(list(rows))
        text_encoder.resize_token_embeddings(count + len(rows), mean_resizing=False)
        weight = text_encoder.get_input_embeddings().weight
        with torch.no_grad():
            for name, row in rows.items():
                weight[tokenizer.convert_tokens_to_ids(name)] = row.to(weight)


def _names(use_safetensors: bool | None) -> list[str]:
    kinds = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
    return [f"{STEM}.{kind}" for kind in kinds]


def _read(source: Any, names: list[str], subfolder: str | None, hub: dict[str, Any]) -> Any:
    if isinstance(source, (Mapping, Tensor)):
        return source
    return read_tensors([find_file(source, names, subfolder, **hub)])


def _rows(word: str | None, source: Mapping[str, Any] | Tensor) -> dict[str, Tensor]:
    """A row for each token; those behind the first have a number."""
    if isinstance(source, Tensor):
        vectors = source
    elif "string_to_param" in source:
        word, vectors = word or source["name"], source["string_to_param"]["*"]
    elif len(source) == 1:
        ((name, vectors),) = source.items()
        word = word or name
    else:
        raise ValueError(
            f"an embedding has the entries {', '.join(source)}; needed is one, or string_to_param"
        )
    if word is None:
        raise ValueError("the embedding is a tensor without a name: token is needed")
    vectors = vectors if vectors.ndim > 1 else vectors[None]
    return {word if i == 0 else f"{word}_{i}": row for i, row in enumerate(vectors)}


def _parts(word: str, added: Mapping[str, int]) -> list[str]:
    """The tokens that stand for a word: itself, and the numbered ones behind it."""
    count = 1
    while f"{word}_{count}" in added:
        count += 1
    return [word, *(f"{word}_{i}" for i in range(1, count))]


def _forget(tokenizer: Any, words: set[str], numbers: list[int]) -> None:
    """Take added words out of a tokenizer; those behind them move up, as the rows of the encoder's table do.

    transformers has no call for this: its tokenizers in Python hold tables of the added tokens, and the
    library under the others writes and reads itself.
    """

    def moved(number: int) -> int:
        return number - sum(gone < number for gone in numbers)

    if not hasattr(tokenizer, "_tokenizer"):
        left = {i: token for i, token in tokenizer._added_tokens_decoder.items() if i not in numbers}
        tokenizer._added_tokens_decoder = {moved(i): token for i, token in left.items()}
        tokenizer._added_tokens_encoder = {token.content: moved(i) for i, token in left.items()}
        tokenizer.tokens_trie = type(tokenizer.tokens_trie)()
        tokenizer._update_trie()
        tokenizer._update_total_vocab_size()
        return
    from tokenizers import Tokenizer

    content = json.loads(tokenizer._tokenizer.to_str())
    kept = [token for token in content["added_tokens"] if token["content"] not in words]
    content["added_tokens"] = [{**token, "id": moved(token["id"])} for token in kept]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


def spelt_out(tokenizer: Any, text: str) -> str:
    """A text in which each learned word of several vectors stands with all of its tokens."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    for word in added:
        parts = _parts(word, added)
        if len(parts) > 1 and word in text:
            text = text.replace(word, " ".join(parts))
    return text
