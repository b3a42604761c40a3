"""`norms.residual_norm` for widths far below a power of two, and for a branch of a lone text.

A row of 2240 channels is held as 2048 and 192 (of 256) instead of 4096, by one warp. The first
samples may have one row of a branch for all of their tokens (`reference.Branch.lone`), which
is read here and written nowhere else. Statistics and sums are fp32; a result is rounded once.

Shape letters: B batch, N tokens, C channels, L samples with a lone text.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import op
from sana.kernels.norms import load_row, row_of, time_stride

WARPS = 1
"""Of a program. With one, sums need no barrier."""
FEWEST = 256
"""Columns for each warp, 16 bytes a thread: with fewer, memory is laid out over threads anew."""


@triton.jit
def _loaded(
    x_ptr, branch_ptr, lone_ptr, c, C, L, batch,
    HAS_BRANCH: tl.constexpr, HAS_LONE: tl.constexpr,
):  # fmt: skip
    """Some columns of a row, and of its branch or anything."""
    x = tl.load(x_ptr + c, mask=c < C, other=0.0)
    branch = x
    if HAS_BRANCH:
        if HAS_LONE:
            alone = tl.where(batch < L, C, 0)
            own = tl.load(lone_ptr + batch * C + c, mask=c < alone, other=0.0)
            branch = tl.load(branch_ptr + c, mask=c < C - alone, other=0.0)
            branch = tl.where(batch < L, own, branch)
        else:
            branch = tl.load(branch_ptr + c, mask=c < C, other=0.0)
    return x, branch


@triton.jit
def _summed(
    x, branch, total_ptr, gate_table, gate_time, c, C, limit,
    HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr, HAS_LIMIT: tl.constexpr,
):  # fmt: skip
    """x and its branch in fp32, stored too if there is one."""
    x = x.to(tl.float32)
    if HAS_BRANCH:
        branch = branch.to(tl.float32)
        if HAS_LIMIT:
            branch = tl.minimum(tl.maximum(branch, -limit), limit)
        if HAS_GATE:
            branch = branch * load_row(gate_table, gate_time, c, C)
        total = (x + branch).to(total_ptr.dtype.element_ty)
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
    x_ptr, branch_ptr, lone_ptr, total_ptr, normed_ptr,
    gate_table, gate_time, shift_table, shift_time, scale_table, scale_time,
    N, C, L, eps, limit, gB, sB, cB,
    HAS_BRANCH: tl.constexpr, HAS_LONE: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_LIMIT: tl.constexpr, HAS_NORM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """One row in FIRST and SECOND columns; SECOND may be 0."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // N
    at = row * C
    x_ptr += at
    total_ptr += at
    normed_ptr += at
    branch_ptr += at
    if HAS_LONE:
        branch_ptr -= tl.minimum(batch, L) * N * C
    gate_time += batch * gB
    shift_time += batch * sB
    scale_time += batch * cB
    c = tl.arange(0, FIRST)
    e = FIRST + tl.arange(0, SECOND if SECOND > 0 else 1)
    # All that is read before the first store: what follows one waits for it.
    x, branch = _loaded(x_ptr, branch_ptr, lone_ptr, c, C, L, batch, HAS_BRANCH, HAS_LONE)
    if SECOND > 0:
        y, other = _loaded(x_ptr, branch_ptr, lone_ptr, e, C, L, batch, HAS_BRANCH, HAS_LONE)
    gates = (gate_table, gate_time)
    x = _summed(x, branch, total_ptr, *gates, c, C, limit, HAS_BRANCH, HAS_GATE, HAS_LIMIT)
    total = tl.sum(x, 0)
    if SECOND > 0:
        y = _summed(y, other, total_ptr, *gates, e, C, limit, HAS_BRANCH, HAS_GATE, HAS_LIMIT)
        total += tl.sum(y, 0)
    if HAS_NORM:
        mean = total / C
        x = tl.where(c < C, x - mean, 0.0)
        total = tl.sum(x * x, 0)
        if SECOND > 0:
            y = tl.where(e < C, y - mean, 0.0)
            total += tl.sum(y * y, 0)
        rstd = 1 / tl.sqrt(total / C + eps)
        rows = (shift_table, shift_time, scale_table, scale_time)
        _store_normed(normed_ptr, x, rstd, c, C, *rows)
        if SECOND > 0:
            _store_normed(normed_ptr, y, rstd, e, C, *rows)


@op("split_norm")
def split_norm(
    x: Tensor,
    branch: Tensor | None,
    lone: Tensor | None,
    gate: list[Tensor],
    shift: list[Tensor],
    scale: list[Tensor],
    eps: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """As `norms.residual_norm`; with `lone` (L, 1, C) the branch is (B - L, N, C)."""
    x = x.contiguous()
    B, N, C = x.shape
    total = x.new_empty(x.shape if branch is not None else 0)
    normed = x.new_empty(x.shape if scale else 0)
    parts = [row_of(pair, x) for pair in (gate, shift, scale)]
    first, second = _columns(C)
    _split_norm[(B * N,)](
        x, x if branch is None else branch.contiguous(), x if lone is None else lone.contiguous(),
        total, normed, *(part for row in parts for part in row),
        N, C, 0 if lone is None else len(lone), eps, limit, *(time_stride(row) for row in parts),
        HAS_BRANCH=branch is not None, HAS_LONE=lone is not None, HAS_GATE=bool(gate),
        HAS_LIMIT=limit > 0, HAS_NORM=bool(scale), FIRST=first, SECOND=second, num_warps=WARPS,
    )  # fmt: skip
    return total, normed


@split_norm.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    _lone: Tensor | None,
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
