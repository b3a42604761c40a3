"""Residuals and norms whose results are rows in fp8: who makes them, as `ops` decides."""

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
    if not (ops.allows("scaled_rows") and ops.fuses(x, *parts, *rows)):
        total = x if branch is None else ops.add_branch(x, branch)
        return total, ops.scaled_rows(ops.modulate(total, *modulation) if modulation else total)
    from sana.kernels import split_norm as split

    value, lone, gate, limit = ops.flat(branch)
    total, values, scales = split.split_norm_rows(
        x, value, lone, gate, rows[:2], rows[2:], ops.NORM_EPS, limit
    )
    return x if branch is None else total, Rows(values, scales)
