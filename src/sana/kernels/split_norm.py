"""`norms.residual_norm` for widths far below a power of two, and for a branch of a lone text.

A row of 2240 channels is held as 2048 and 192 (of 512) instead of 4096, by two warps. The first
samples may have one row for all of their tokens (`reference.Lone`), which is read here and written
nowhere else. Statistics and sums are fp32; a result is rounded once.

Shape letters: B batch, N tokens, C channels, L samples with a lone text.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sana.kernels import order
from sana.kernels.launching import op
from sana.kernels.norms import load_row, row_of, time_stride
from sana.kernels.order import place

WARPS = 2
"""Of a program. One needs no barrier for its sums, and was no faster on an H100."""
FEWEST = 256
"""Columns for each warp, 16 bytes a thread: with fewer, memory is laid out over threads anew."""


@triton.jit
def _loaded(x_ptr, branch_ptr, c, C, HAS_BRANCH: tl.constexpr):
    """Some columns of a token and its branch, or of anything."""
    x = tl.load(x_ptr + c, mask=c < C, other=0.0)
    branch = x
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + c, mask=c < C, other=0.0)
    return x, branch


@triton.jit
def _summed(
    x, branch, total_ptr, gate_table, gate_time, row_ptr, is_lone, c, C, limit,
    HAS_BRANCH: tl.constexpr, HAS_LONE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
):  # fmt: skip
    """x and its branch in fp32, stored too if there is one; a lone text's row comes after it."""
    x = x.to(tl.float32)
    if HAS_BRANCH:
        plain = branch.to(tl.float32)
        value = plain
        if HAS_LIMIT:
            value = tl.minimum(tl.maximum(value, -limit), limit)
        if HAS_GATE:
            value = value * load_row(gate_table, gate_time, c, C)
        if HAS_LONE:
            value = tl.where(is_lone, value, plain)
        total = (x + value).to(total_ptr.dtype.element_ty)
        if HAS_LONE:
            row = tl.load(row_ptr + c, mask=c < tl.where(is_lone, C, 0), other=0.0)
            later = total.to(tl.float32) + row.to(tl.float32)
            total = tl.where(is_lone, later.to(total_ptr.dtype.element_ty), total)
        tl.store(total_ptr + c, total, mask=c < C)
        x = total.to(tl.float32)
    return x


@triton.jit
def _store_normed(
    normed_ptr, x, rstd, c, C, shift_table, shift_time, scale_table, scale_time
):  # fmt: skip
    scale = load_row(scale_table, scale_time, c, C)
    shift = load_row(shift_table, shift_time, c, C)
    normed = x * rstd * (1 + scale) + shift
    tl.store(normed_ptr + c, normed.to(normed_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _split_norm(
    x_ptr, branch_ptr, row_ptr, before_ptr, seen_ptr, total_ptr, normed_ptr,
    gate_table, gate_time, shift_table, shift_time, scale_table, scale_time,
    N, C, L, eps, limit, gB, sB, cB,
    HAS_BRANCH: tl.constexpr, HAS_LONE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_LIMIT: tl.constexpr, HAS_NORM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """One row in FIRST and SECOND columns; SECOND may be 0."""
    at = place(0, LAST_FIRST).to(tl.int64)
    batch = at // N
    is_lone = batch < L
    at *= C
    x_ptr += at
    branch_ptr += at
    if HAS_LONE:
        skipped = tl.minimum(batch, L) * N * C
        x_ptr = tl.where(is_lone, x_ptr, seen_ptr + at - skipped)
        branch_ptr = tl.where(is_lone, before_ptr + at, branch_ptr - skipped)
        row_ptr += batch * C
    rest = (total_ptr + at, gate_table, gate_time + batch * gB, row_ptr, is_lone)
    c = tl.arange(0, FIRST)
    e = FIRST + tl.arange(0, SECOND if SECOND > 0 else 1)
    # Both before the first store, for which what is read later would wait.
    x, branch = _loaded(x_ptr, branch_ptr, c, C, HAS_BRANCH)
    if SECOND > 0:
        y, other = _loaded(x_ptr, branch_ptr, e, C, HAS_BRANCH)
    x = _summed(x, branch, *rest, c, C, limit, HAS_BRANCH, HAS_LONE, HAS_GATE, HAS_LIMIT)
    total = tl.sum(x, 0)
    if SECOND > 0:
        y = _summed(y, other, *rest, e, C, limit, HAS_BRANCH, HAS_LONE, HAS_GATE, HAS_LIMIT)
        total += tl.sum(y, 0)
    if HAS_NORM:
        mean = total / C
        x = tl.where(c < C, x - mean, 0.0)
        total = tl.sum(x * x, 0)
        if SECOND > 0:
            y = tl.where(e < C, y - mean, 0.0)
            total += tl.sum(y * y, 0)
        rstd = 1 / tl.sqrt(total / C + eps)
        rows = (shift_table, shift_time + batch * sB, scale_table, scale_time + batch * cB)
        normed_ptr += at
        _store_normed(normed_ptr, x, rstd, c, C, *rows)
        if SECOND > 0:
            _store_normed(normed_ptr, y, rstd, e, C, *rows)


@op("split_norm")
def split_norm(
    x: Tensor,
    branch: Tensor | None,
    lone: list[Tensor],
    gate: list[Tensor],
    shift: list[Tensor],
    scale: list[Tensor],
    eps: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """As `norms.residual_norm`.

    `lone` may be the row (L, 1, C), the value before it (B, N, C) and what others are with that
    (B - L, N, C), from `reference.Lone`; gate and limit are of the value before, and the branch
    (B - L, N, C) has none.
    """
    x = x.contiguous()
    B, N, C = x.shape
    total = x.new_empty(x.shape if branch is not None else 0)
    normed = x.new_empty(x.shape if scale else 0)
    parts = [row_of(pair, x) for pair in (gate, shift, scale)]
    own = [part.contiguous() for part in lone] or [x, x, x]
    first, second = _columns(C)
    _split_norm[(B * N,)](
        x, x if branch is None else branch.contiguous(), *own,
        total, normed, *(part for row in parts for part in row),
        N, C, len(own[0]) if lone else 0, eps, limit, *(time_stride(row) for row in parts),
        HAS_BRANCH=branch is not None, HAS_LONE=bool(lone), HAS_GATE=bool(gate),
        HAS_LIMIT=limit > 0, HAS_NORM=bool(scale), FIRST=first, SECOND=second,
        LAST_FIRST=order.LAST_FIRST, num_warps=WARPS,
    )  # fmt: skip
    return total, normed


@split_norm.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    _lone: list[Tensor],
    _gate: list[Tensor],
    _shift: list[Tensor],
    scale: list[Tensor],
    *_: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if branch is not None else 0), x.new_empty(x.shape if scale else 0)


def _columns(width: int) -> tuple[int, int]:
    """Two powers of two that hold `width` columns, the second 0 where one is as good."""
    whole = triton.next_power_of_2(width)
    first = whole // 2
    second = max(triton.next_power_of_2(width - first), FEWEST * WARPS)
    return (whole, 0) if second >= first else (first, second)
