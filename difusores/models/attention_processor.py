"""diffusers' interface to attention. There is one implementation here, and it is never sliced: whatever
computes `difusores.ops.attention` holds no table of scores that grows with the square of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


class AttnProcessor:
    """Stands for `difusores.ops.attention`."""


class AttnProcessor2_0(AttnProcessor):
    """The same, under its newer name."""


STANDARD = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
"""Processors that compute plain attention: nothing is to be done for them."""


class AttentionInterface(nn.Module):
    """What callers of diffusers' models ask of attention layers; none of it changes a number."""

    @property
    def attn_processors(self) -> dict[str, AttnProcessor]:
        """A processor for each attention layer, by its name and ".processor"."""
        layers = (name for name, module in self.named_modules() if hasattr(module, "to_q"))
        return {f"{name}.processor": AttnProcessor2_0() for name in layers}

    def set_attn_processor(self, processor: Any) -> None:
        """Take a processor, or one by name for each layer, that computes plain attention; see `STANDARD`.

        Raises:
            NotImplementedError: another one.
            ValueError: a dictionary has other names than `attn_processors`.
        """
        given = processor if isinstance(processor, Mapping) else {"": processor}
        if isinstance(processor, Mapping) and processor.keys() != self.attn_processors.keys():
            raise ValueError(
                f"processor has {len(processor)} entries; needed is one for each of the names in "
                f"attn_processors, which are {len(self.attn_processors)}"
            )
        for one in given.values():
            if type(one).__name__ not in STANDARD:
                raise NotImplementedError(
                    f"processor is a {type(one).__name__}: attention is difusores.ops.attention alone; "
                    f"allowed, without effect, are {', '.join(STANDARD)}"
                )

    def set_default_attn_processor(self) -> None:
        """Nothing: there is no other."""

    def set_attention_slice(self, slice_size: str | int | list[int] | None = "auto") -> None:
        """Nothing: attention holds no table of scores that slices could make smaller."""

    def enable_xformers_memory_efficient_attention(
        self, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """Nothing: attention takes no more memory than xFormers' already, and xFormers is not asked for."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Nothing, see `enable_xformers_memory_efficient_attention`."""
