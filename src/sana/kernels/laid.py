"""A text laid out once for all steps, and attention to it: who does it, as `ops` decides.

Only where the kernels of `laid_attention` take it: 16 bits, without gradients, on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from sana.kernels import ops

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values (B, H, T, D)."""


def lay(
    pairs: Sequence[Pair], bias: Tensor | None, mask: Tensor | None
) -> tuple[tuple[Pair, ...], Tensor] | None:
    """The pairs as `attend` reads them, wider than a head, and how many tokens count (B,).

    bias (B, 1, 1, T) on scores is `mask`'s (B, T). None where it is not done.
    """
    if not pairs or not (ops.allows("laid_text") and ops.uses_triton(pairs[0][0])):
        return None
    from sana.kernels import laid_attention as fast

    for pair in pairs:
        if not (ops.is_inference(*pair) and fast.supports(*pair, bias)):
            return None
    laid = tuple(fast.laid_text(*pair, bias) for pair in pairs)
    return laid, _counts(pairs[0][0], mask)


def is_laid(q: Tensor, keys: Tensor) -> bool:
    """Whether keys for q (B, H, N, D) are from `lay`."""
    return keys.shape[-1] != q.shape[-1]


def attend(q: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """Softmax attention of q (B, H, N, D) to what `lay` has made: (B, H, N, D)."""
    from sana.kernels import laid_attention as fast

    out: Tensor = fast.laid_attention(q, keys, values, counts)
    return out


def _counts(keys: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens there are up to the last one that counts; all if none does."""
    batch, length = keys.shape[0], keys.shape[2]
    whole = torch.full((batch,), length, dtype=torch.int32, device=keys.device)
    if mask is None:
        return whole
    places = torch.arange(1, length + 1, dtype=torch.int32, device=keys.device)
    last = (places * mask.bool()).amax(dim=1)
    return torch.where(last > 0, last, whole)
