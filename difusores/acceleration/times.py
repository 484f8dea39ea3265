"""The time projections of all residual blocks of a network, as one product in a forward pass.

The first block that needs its projection computes those of all; the others find theirs. Where no memory may
be taken, each computes its own. There are few rows, and the time is that of reading the weights: the
package's own product, which has all threads read them, is the fastest from AVX2 on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difusores import native
from difusores.acceleration.session import Packed, Session
from difusores.ops.gemm_conv import gemm_rows, multiplies_pairs, pack_rows

TOGETHER_GAIN = 2.0  # time of the projections one by one over that of one product


@cache
def by_own_product(dtype: torch.dtype) -> bool:
    """Whether the package's own product is to multiply in this dtype."""
    if native.status("cpu") is not None or native.build_info()["isa_used"] == "base":
        return False
    return dtype is torch.float32 or multiplies_pairs()


class TimeProjections:
    """What a network's residual blocks make of the time embedding; blocks are `ResnetForward`s."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.blocks: list[Any] = []
        self.rows = Packed(session)

    def begin(self) -> Any:
        """A forward pass begins in this thread; returns what `end` takes."""
        before = getattr(self.session.here, "rows", None)
        self.session.here.rows = {}
        return before

    def end(self, before: Any) -> None:
        """It is over: nothing is kept."""
        self.session.here.rows = before

    def row(self, block: Any, temb: Tensor) -> Tensor | None:
        """[N, width] for this block; None: it computes its own."""
        rows = getattr(self.session.here, "rows", None)
        if rows is None or temb.is_inference() or (torch.is_grad_enabled() and temb.requires_grad):
            return None
        key = (id(temb), temb._version)
        if key not in rows:
            rows[key] = (temb, self._project(temb))  # the embedding is kept, so that its id is not used again
        found: Tensor | None = rows[key][1].get(block)
        return found

    def _project(self, temb: Tensor) -> Mapping[Any, Tensor]:
        blocks = [block for block in self.blocks if block.takes_part(temb)]
        layers = [block.module._modules["time_emb_proj"] for block in blocks]
        together = self.together(blocks, layers) if len(blocks) > 1 else None
        if together is None:
            return {}
        out = self.multiply(blocks[0].module.nonlinearity(temb), *together)
        return dict(zip(blocks, out.split([layer.out_features for layer in layers], dim=1), strict=True))

    def together(self, blocks: Sequence[Any], layers: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of all layers, one below the other; None where they do not fit together.

        None too where the session keeps nothing: gathering them in each pass takes longer than reading them.
        """
        if self.session.budget == 0:
            return None
        weights = tuple(layer.weight for layer in layers)
        biases = tuple(layer.bias for layer in layers)

        def gather() -> tuple[Tensor, Tensor]:
            one_below_the_other = pack_rows if by_own_product(weights[0].dtype) else torch.cat
            return one_below_the_other(weights).detach(), torch.cat([b.detach() for b in biases])

        size = sum(w.numel() * w.element_size() for w in weights)
        form = self.rows.get((*weights, *biases), gather, size, TOGETHER_GAIN)
        return gather() if form is None else form  # memory is short: the same bits, slower

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The product with what `together` returned: [N, C] to [N, all widths]."""
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        shape = weight[: len(bias) * x.shape[1]].view(len(bias), -1)  # of which the kernel reads nothing else
        return gemm_rows(x, shape, bias, packed=weight)

    def release(self) -> None:
        """Undo what was done to the parameters' memory."""
