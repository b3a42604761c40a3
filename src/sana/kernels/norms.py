"""Norms with what stands around them, each in one pass over channels-last rows, forward only.

Adaptive LayerNorm with the residual before it: total = x + gate * branch and
normed = LN(total) (1 + scale) + shift (adaLN-single, PixArt-alpha, arXiv 2310.00426), where gate,
shift and scale are each the sum of a block's row and the time's. RMSNorm with weight, bias,
activation and residual: out = act(x / rms(x) * weight + bias) + residual. A convolution's bias with
the activation after it. Statistics and sums are fp32; a result is rounded once.

Shape letters: B batch, N tokens, C channels, M rows in all.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels import rows
from sana.kernels.launching import op
from sana.kernels.rows import TILE, as_rows, empty_rows, warps

PLAIN, RELU, SILU = 0, 1, 2


@triton.jit
def clipped(x, limit):
    """Between -limit and limit; NaN stays."""
    x = tl.maximum(x, -limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_row(table, time, c, C):
    """A block's row and the time's, summed, in fp32."""
    own = tl.load(table + c, mask=c < C, other=0.0).to(tl.float32)
    return own + tl.load(time + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def _residual_norm(
    x_ptr, branch_ptr, total_ptr, normed_ptr, row_scale_ptr,
    gate_table, gate_time, shift_table, shift_time, scale_table, scale_time,
    N, C, eps, limit, gB, sB, cB,
    HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr, HAS_LIMIT: tl.constexpr,
    HAS_NORM: tl.constexpr, ROUNDS: tl.constexpr, IN_ROWS: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `total` and `normed`; IN_ROWS: `normed`, or the total without it, in fp8.

    ROUNDS: without a norm, the total goes into `normed` as it is, in that one's dtype.
    """
    row = tl.program_id(0).to(tl.int64)
    batch = row // N
    c = tl.arange(0, BLOCK)
    inside = c < C
    x = tl.load(x_ptr + row * C + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + row * C + c, mask=inside, other=0.0).to(tl.float32)
        if HAS_LIMIT:
            branch = clipped(branch, limit)
        if HAS_GATE:
            branch = branch * load_row(gate_table, gate_time + batch * gB, c, C)
        total = (x + branch).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * C + c, total, mask=inside)
        x = total.to(tl.float32)
    if HAS_NORM:
        mean = tl.sum(x, 0) / C
        centered = tl.where(inside, x - mean, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centered * centered, 0) / C + eps)
        scale = load_row(scale_table, scale_time + batch * cB, c, C)
        shift = load_row(shift_table, shift_time + batch * sB, c, C)
        x = centered * rstd * (1 + scale) + shift
    if IN_ROWS:
        values, row_scale = as_rows(x, 0, NATIVE)
        values = values.to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + row * C + c, values, mask=inside)
        tl.store(row_scale_ptr + row, row_scale)
    elif HAS_NORM or ROUNDS:
        normed = x.to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + row * C + c, normed, mask=inside)


@triton.jit
def _activate(x, KIND: tl.constexpr):
    """NaN stays, so that a broken picture is seen to be one."""
    if KIND == 1:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND == 2:
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, M, C, eps, xM,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows; x may be a slice of wider rows, xM values apart."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    inside = (m < M)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + m[:, None] * xM + c[None, :], mask=inside, other=0.0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    x = x * rstd[:, None] * tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        x += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    x = _activate(x, KIND)
    at = m[:, None] * C + c[None, :]
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_pair(
    x_ptr, first_ptr, second_ptr, M, C, eps, xM, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """ROWS rows of the first or the second C columns, in place."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    inside = (m < M)[:, None] & (c < C)[None, :]
    weight_ptr = tl.where(tl.program_id(1) == 0, first_ptr, second_ptr)
    at = x_ptr + tl.program_id(1) * C + m[:, None] * xM + c[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    x = x * rstd[:, None] * weight[None, :]
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_act(x_ptr, bias_ptr, count, C, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """x = act(x + bias) in place; values with the channel fastest."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + at % C, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, _activate(x, KIND).to(x_ptr.dtype.element_ty), mask=inside)


@op("residual_norm")
def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: list[Tensor],
    shift: list[Tensor],
    scale: list[Tensor],
    eps: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """x (B, N, C) -> total and normed (B, N, C); what is not asked for has no elements.

    Without `branch` there is no total, with an empty `scale` no normed, with an empty `gate` the
    branch is added as it is. Each of gate, shift and scale is a row (C,) and one of the time
    (B or 1, C), to be summed. `limit` clips the branch; 0 does not.
    """
    x = x.contiguous()
    total, normed = asked(x, branch is not None), asked(x, bool(scale))
    _launch_residual(x, branch, (gate, shift, scale), eps, limit, (total, normed, None))
    return total, normed


@residual_norm.register_fake
def _(
    x: Tensor, branch: Tensor | None, _gate: Any, _shift: Any, scale: list[Tensor], *_: float
) -> tuple[Tensor, Tensor]:
    return asked(x, branch is not None), asked(x, bool(scale))


@op("residual_norm_rows")
def residual_norm_rows(
    x: Tensor,
    branch: Tensor | None,
    gate: list[Tensor],
    shift: list[Tensor],
    scale: list[Tensor],
    eps: float,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `residual_norm`, but for rows in fp8 (B, N, C) and their scales (B, N, 1).

    They are of the normed, or with an empty `scale` of the total, which is there as it is too.
    """
    x = x.contiguous()
    total = asked(x, branch is not None)
    values, scales = empty_rows(x)
    _launch_residual(x, branch, (gate, shift, scale), eps, limit, (total, values, scales))
    return total, values, scales


@residual_norm_rows.register_fake
def _(x: Tensor, branch: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return asked(x, branch is not None), *empty_rows(x)


@op("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (B, N, C), perhaps a slice of wider rows -> x / rms(x) * weight, contiguous."""
    if not has_rows(x):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, weight, None, None, out, eps, PLAIN)
    return out


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@op("rms_norm_", mutates=("own",))
def rms_norm_(
    own: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, kind: int
) -> None:
    """own (..., C), contiguous, becomes act(own / rms(own) * weight + bias) + residual."""
    _launch(own, weight, bias, residual, own, eps, kind)


@op("rms_norm_pair_", mutates=("own",))
def rms_norm_pair_(own: Tensor, first: Tensor, second: Tensor, eps: float) -> None:
    """own (..., W), contiguous: `rms_norm` of its first C columns and of the C behind them."""
    width, C = own.shape[-1], len(first)
    M, block = own.numel() // width, triton.next_power_of_2(C)
    together = max(1, TILE // block)
    _rms_norm_pair[(triton.cdiv(M, together), 2)](
        own, first, second, M, C, eps, width,
        ROWS=together, BLOCK=block, num_warps=warps(together * block),
    )  # fmt: skip


@op("bias_act_", mutates=("own",))
def bias_act_(own: Tensor, bias: Tensor, kind: int) -> None:
    """own (..., C), contiguous, becomes act(own + bias)."""
    grid = (triton.cdiv(own.numel(), 2048),)
    _bias_act[grid](own, bias, own.numel(), len(bias), KIND=kind, BLOCK=2048, num_warps=8)


def supports(x: Tensor, *others: Tensor | None) -> bool:
    """Whether these kernels take x and what goes with it: one dtype of at most 32 bits."""
    return rows.supports(x) and all(other is None or other.dtype == x.dtype for other in others)


def has_rows(x: Tensor) -> bool:
    """Whether x (B, N, C) is made of dense rows at one distance."""
    return x.stride(-1) == 1 and (len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1))


def asked(x: Tensor, is_asked: bool) -> Tensor:
    """Memory for a result like x, contiguous; without elements if nobody asks for it."""
    return x.new_empty(x.shape if is_asked else 0)


def _launch_residual(
    x: Tensor,
    branch: Tensor | None,
    pairs: tuple[list[Tensor], list[Tensor], list[Tensor]],
    eps: float,
    limit: float,
    results: tuple[Tensor, Tensor, Tensor | None],
    rounds: bool = False,
) -> None:
    """`pairs` are gate, shift and scale; `results` total, normed, and scales of rows if in fp8.

    If it `rounds` and there is no norm, the total goes into the memory for normed, if there is any.
    """
    B, N, C = x.shape
    gate, _, scale = pairs
    parts = [row_of(pair, x) for pair in pairs]
    total, normed, scales = results
    block = triton.next_power_of_2(C)
    _residual_norm[(B * N,)](
        x, x if branch is None else branch.contiguous(), total, normed,
        total if scales is None else scales,
        *(part for row in parts for part in row), N, C, eps, limit,
        *(time_stride(row) for row in parts),
        HAS_BRANCH=branch is not None, HAS_GATE=bool(gate), HAS_LIMIT=limit > 0,
        HAS_NORM=bool(scale), ROUNDS=rounds and normed.numel() > 0, IN_ROWS=scales is not None,
        NATIVE=x.is_cuda, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    eps: float,
    kind: int,
) -> None:
    C = x.shape[-1]
    M = x.numel() // C
    block = triton.next_power_of_2(C)
    together = max(1, TILE // block)
    _rms_norm[(triton.cdiv(M, together),)](
        x, weight, weight if bias is None else bias, x if residual is None else residual, out,
        M, C, eps, x.stride(-2),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, KIND=kind,
        ROWS=together, BLOCK=block, num_warps=warps(together * block),
    )  # fmt: skip


def time_stride(row: list[Tensor]) -> int:
    """Between the time's rows of two samples; 0 where all have the same."""
    time = row[1]
    return time.stride(0) if time.dim() > 1 and len(time) > 1 else 0


def row_of(pair: list[Tensor], instead: Tensor) -> list[Tensor]:
    """Pointers for the kernel, of what is there or of anything."""
    if not pair:
        return [instead.view(-1), instead.view(-1)]
    return [part if part.stride(-1) == 1 else part.contiguous() for part in pair]
