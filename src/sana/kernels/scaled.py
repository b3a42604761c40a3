"""Residuals and norms whose results are rows in fp8: who makes them, as `ops` decides.

A lone text's branch (`reference.Lone`) is known to `split_norm` alone; where that is not used, the
sum is made first, by an op that knows it too.
"""

from __future__ import annotations

from torch import Tensor

from sana.kernels import ops
from sana.kernels.reference import Branch, Row, Rows


def add_and_scale(
    x: Tensor, branch: Branch | None, modulation: tuple[Row, Row] | None
) -> tuple[Tensor, Rows]:
    """x (B, N, C) plus a branch; and the rows in fp8 that a product takes of it.

    They are of `ops.modulate` by (shift, scale), or of the sum itself.
    """
    parts = () if branch is None else branch.tensors()
    rows = [part for row in modulation or () for part in row]
    value, lone, gate, limit = ops.flat(branch)
    splits = ops.allows("split_rows")
    is_known = splits or not lone
    if not (is_known and ops.allows("scaled_rows") and ops.fuses(x, *parts, *rows)):
        total = x if branch is None else ops.add_branch(x, branch)
        return total, ops.scaled_rows(ops.modulate(total, *modulation) if modulation else total)
    others = (gate, rows[:2], rows[2:], ops.NORM_EPS, limit)
    if splits:
        from sana.kernels import split_norm as split

        total, values, scales = split.split_norm_rows(x, value, lone, *others)
    else:
        from sana.kernels import norms

        total, values, scales = norms.residual_norm_rows(x, value, *others)
    return x if branch is None else total, Rows(values, scales)


def joins_lone(x: Tensor, lone: Tensor) -> bool:
    """As `ops.joins_lone`, where the norm behind the branch gives rows."""
    return ops.allows("split_rows") and ops.joins_lone(x, lone)
