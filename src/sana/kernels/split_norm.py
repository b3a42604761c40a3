"""The transformer's residual, LayerNorm and modulation in one pass, forward only.

total = x + gate * clip(branch), normed = LN(total) (1 + scale) + shift, with each row's own part
and the time's summed here (Sana, arXiv 2410.10629, section 2.2). A row of 2240 channels is held as
2048 and 192 (of 512) instead of 4096, by two warps. The first samples may have one row for all of
their tokens (`reference.Lone`), which is read here and written nowhere else. Statistics and sums
are fp32; a result is rounded once. `split_norm_rows` gives rows in fp8, with one scale over both
pieces.

Shape letters: B batch, N tokens, C channels, L samples with a lone text.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import op
from sana.kernels.norms import clipped, load_row, row_of, time_stride
from sana.kernels.rows import as_row_of_two, as_rows, empty_rows

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
            value = clipped(value, limit)
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
def _centered(x, y, total, c, e, C, eps, SECOND: tl.constexpr):
    """Both pieces, whose sum is `total`, without their mean, and one over their deviation."""
    mean = total / C
    x = tl.where(c < C, x - mean, 0.0)
    total = tl.sum(x * x, 0)
    if SECOND > 0:
        y = tl.where(e < C, y - mean, 0.0)
        total += tl.sum(y * y, 0)
    return x, y, 1 / tl.sqrt(total / C + eps)


@triton.jit
def _modulated(x, rstd, c, C, shift_table, shift_time, scale_table, scale_time):
    scale = load_row(scale_table, scale_time, c, C)
    shift = load_row(shift_table, shift_time, c, C)
    return x * rstd * (1 + scale) + shift


@triton.jit
def _store(ptr, x, c, C):
    tl.store(ptr + c, x.to(ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _store_eights(ptr, x, c, C):
    """Eight a thread, as 16 bits are read; with sixteen, sums would go through shared memory."""
    tl.store(tl.max_contiguous(ptr + c, 8), x.to(ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _store_rows(ptr, row_scale_ptr, x, y, c, e, C, SECOND: tl.constexpr, NATIVE: tl.constexpr):
    """A row in fp8 with its scale."""
    if SECOND > 0:
        x, y, row_scale = as_row_of_two(x, y, NATIVE)
        _store_eights(ptr, y, e, C)
    else:
        x, row_scale = as_rows(x, 0, NATIVE)
    _store_eights(ptr, x, c, C)
    tl.store(row_scale_ptr, row_scale)


@triton.jit
def _split_norm(
    x_ptr, branch_ptr, row_ptr, before_ptr, seen_ptr, total_ptr, normed_ptr, row_scale_ptr,
    gate_table, gate_time, shift_table, shift_time, scale_table, scale_time,
    N, C, L, eps, limit, gB, sB, cB,
    HAS_BRANCH: tl.constexpr, HAS_LONE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_LIMIT: tl.constexpr, HAS_NORM: tl.constexpr, IN_ROWS: tl.constexpr, NATIVE: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """One row in FIRST and SECOND columns; SECOND may be 0. IN_ROWS: rows are fp8."""
    at = tl.program_id(0).to(tl.int64)
    batch = at // N
    is_lone = batch < L
    row_scale_ptr += at
    at *= C
    normed_ptr += at
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
    y, other = x, branch
    if SECOND > 0:
        y, other = _loaded(x_ptr, branch_ptr, e, C, HAS_BRANCH)
    x = _summed(x, branch, *rest, c, C, limit, HAS_BRANCH, HAS_LONE, HAS_GATE, HAS_LIMIT)
    total = tl.sum(x, 0)
    if SECOND > 0:
        y = _summed(y, other, *rest, e, C, limit, HAS_BRANCH, HAS_LONE, HAS_GATE, HAS_LIMIT)
        total += tl.sum(y, 0)
    if HAS_NORM:
        x, y, rstd = _centered(x, y, total, c, e, C, eps, SECOND)
        rows = (shift_table, shift_time + batch * sB, scale_table, scale_time + batch * cB)
        x = _modulated(x, rstd, c, C, *rows)
        if not IN_ROWS:
            _store(normed_ptr, x, c, C)
        if SECOND > 0:
            y = _modulated(y, rstd, e, C, *rows)
            if not IN_ROWS:
                _store(normed_ptr, y, e, C)
    if IN_ROWS:
        _store_rows(normed_ptr, row_scale_ptr, x, y, c, e, C, SECOND, NATIVE)


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
    """x (B, N, C) -> total and normed (B, N, C); what is not asked for has no elements.

    Without `branch` there is no total, with an empty `scale` no normed, with an empty `gate` the
    branch is added as it is. Each of gate, shift and scale is a row (C,) and one of the time
    (B or 1, C). `limit` clips the branch; 0 does not.

    `lone` may be the row (L, 1, C), the value before it (B, N, C) and what others are with that
    (B - L, N, C), from `reference.Lone`; gate and limit are of the value before, and the branch
    (B - L, N, C) has none.
    """
    x = x.contiguous()
    total, normed = _asked(x, branch is not None), _asked(x, bool(scale))
    _launch(x, branch, lone, (gate, shift, scale), eps, limit, (total, normed, None))
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
    return _asked(x, branch is not None), _asked(x, bool(scale))


@op("split_norm_rows")
def split_norm_rows(
    x: Tensor,
    branch: Tensor | None,
    lone: list[Tensor],
    gate: list[Tensor],
    shift: list[Tensor],
    scale: list[Tensor],
    eps: float,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `split_norm`, but for rows in fp8 (B, N, C) and their scales (B, N, 1).

    They are of the normed, or with an empty `scale` of the total, which is there as it is too.
    """
    x = x.contiguous()
    total = _asked(x, branch is not None)
    values, scales = empty_rows(x)
    _launch(x, branch, lone, (gate, shift, scale), eps, limit, (total, values, scales))
    return total, values, scales


@split_norm_rows.register_fake
def _(x: Tensor, branch: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _asked(x, branch is not None), *empty_rows(x)


def _launch(
    x: Tensor,
    branch: Tensor | None,
    lone: list[Tensor],
    pairs: tuple[list[Tensor], list[Tensor], list[Tensor]],
    eps: float,
    limit: float,
    results: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """`pairs` are gate, shift and scale; `results` total, normed, and scales of rows if in fp8."""
    B, N, C = x.shape
    gate, _, scale = pairs
    parts = [row_of(pair, x) for pair in pairs]
    own = [part.contiguous() for part in lone] or [x, x, x]
    total, normed, scales = results
    first, second = _columns(C)
    _split_norm[(B * N,)](
        x, x if branch is None else branch.contiguous(), *own,
        total, normed, total if scales is None else scales,
        *(part for row in parts for part in row),
        N, C, len(own[0]) if lone else 0, eps, limit, *(time_stride(row) for row in parts),
        HAS_BRANCH=branch is not None, HAS_LONE=bool(lone), HAS_GATE=bool(gate),
        HAS_LIMIT=limit > 0, HAS_NORM=bool(scale), IN_ROWS=scales is not None, NATIVE=x.is_cuda,
        FIRST=first, SECOND=second, num_warps=WARPS,
    )  # fmt: skip


def _asked(x: Tensor, is_asked: bool) -> Tensor:
    """Memory for a result like x, contiguous; without elements if nobody asks for it."""
    return x.new_empty(x.shape if is_asked else 0)


def _columns(width: int) -> tuple[int, int]:
    """Two powers of two that hold `width` columns, the second 0 where one is as good."""
    whole = triton.next_power_of_2(width)
    first = whole // 2
    second = max(triton.next_power_of_2(width - first), FEWEST * WARPS)
    return (whole, 0) if second >= first else (first, second)
