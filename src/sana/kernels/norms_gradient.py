"""Residual, norm and modulation for training: with gradients, of mixed dtypes as under autocast.

total = x + gate * clip(branch) is as wide as the widest of its parts, normed = LN(total)
(1 + scale) + shift, or the total itself without a norm, as narrow as the product that takes it.
Backward is one pass: it takes the norm's statistics anew from the total and writes dx and dbranch;
each program sums what its tokens say of the rows gate, shift and scale, and torch adds up those
sums, so that nothing depends on the order in which programs run. Sums are fp32.

Shape letters: B batch, N tokens, C channels, P parts of the tokens.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels import rows
from sana.kernels.launching import op
from sana.kernels.norms import clipped, load_row, row_of, time_stride
from sana.kernels.rows import warps

TOKENS = 16
"""Of one program."""
NUM_WARPS = 4
GATE, SHIFT, SCALE = range(3)
"""Places in the sums."""


@triton.jit
def _residual_norm(
    x_ptr, branch_ptr, total_ptr, normed_ptr,
    gate_table, gate_time, shift_table, shift_time, scale_table, scale_time,
    N, C, eps, limit, gB, sB, cB,
    HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr, HAS_LIMIT: tl.constexpr,
    HAS_NORM: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row; ROUNDS: without a norm the total goes into `normed`, in that one's dtype."""
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
    if HAS_NORM or ROUNDS:
        normed = x.to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + row * C + c, normed, mask=inside)


@triton.jit
def _norm_gradient(g, scale, x, inside, C, eps):
    """From g for normed: the gradient of x, and what g says of the scale."""
    centered = tl.where(inside, x - tl.sum(x, 0) / C, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 0) / C + eps)
    unit = centered * rstd
    of_scale = g * unit
    g = g * scale
    return rstd * (g - tl.sum(g, 0) / C - unit * (tl.sum(g * unit, 0) / C)), of_scale


@triton.jit
def _clip(x, limit, HAS_LIMIT: tl.constexpr):
    return clipped(x, limit) if HAS_LIMIT else x


@triton.jit
def _norm_gradients(
    dtotal_ptr, dnormed_ptr, total_ptr, branch_ptr, dx_ptr, dbranch_ptr, sums_ptr,
    gate_table, gate_time, scale_table, scale_time, N, C, eps, limit, gB, cB,
    HAS_DTOTAL: tl.constexpr, HAS_DNORMED: tl.constexpr, HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_NORM: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx and dbranch of TOKENS tokens of a sample, and their sums (3, C) for the rows."""
    part, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    o = tl.zeros((BLOCK,), tl.float32)
    sum_gate, sum_shift, sum_scale = o, o, o
    # Without a gate it is 1, without a norm nobody reads the scale; either then costs nothing.
    gate = load_row(gate_table, gate_time + batch * gB, c, C) if HAS_GATE else o + 1
    scale = 1 + load_row(scale_table, scale_time + batch * cB, c, C) if HAS_NORM else o
    for index in range(TOKENS):
        n = part * TOKENS + index
        inside = c < tl.where(n < N, C, 0)
        at = (batch * N + n) * C + c
        d = o
        if HAS_DNORMED:
            d = tl.load(dnormed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_DNORMED and HAS_NORM:
            x = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sum_shift += d
            d, of_scale = _norm_gradient(d, scale, x, inside, C, eps)
            sum_scale += of_scale
        if HAS_DTOTAL:
            d += tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, d.to(dx_ptr.dtype.element_ty), mask=inside)
        if HAS_BRANCH:
            branch = o
            if HAS_GATE or HAS_LIMIT:
                branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
                sum_gate += tl.where(inside, d * _clip(branch, limit, HAS_LIMIT), 0.0)
            d = tl.where(tl.abs(branch) <= limit, d * gate, 0.0) if HAS_LIMIT else d * gate
            tl.store(dbranch_ptr + at, d.to(dbranch_ptr.dtype.element_ty), mask=inside)
    at = sums_ptr + (batch * tl.num_programs(0) + part) * 3 * C + c
    tl.store(at, sum_gate, mask=c < C)
    tl.store(at + C, sum_shift, mask=c < C)
    tl.store(at + 2 * C, sum_scale, mask=c < C)


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels take these, of whatever dtypes of at most 32 bits."""
    return all(rows.supports(tensor) for tensor in tensors)


@op("trained_norm")
def trained_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: list[Tensor],
    shift: list[Tensor],
    scale: list[Tensor],
    eps: float,
    limit: float,
    rounds: bool,
) -> tuple[Tensor, Tensor]:
    """x (B, N, C) -> total and normed (B, N, C), see above.

    Without a `scale`, and if it `rounds`, the second is the total in the branch's dtype, or
    without elements if that is the total's.
    """
    x = x.contiguous()
    total, normed = _results(x, branch, gate, scale, rounds)
    _launch_residual(x, branch, (gate, shift, scale), eps, limit, (total, normed), rounds)
    return total, normed


@trained_norm.register_fake
def _(
    x: Tensor, branch: Tensor | None, gate: Any, _shift: Any, scale: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _results(x, branch, gate, scale, rest[-1])


@op("trained_norm_backward")
def trained_norm_backward(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    x: Tensor,
    total: Tensor,
    branch: Tensor | None,
    gate: list[Tensor],
    scale: list[Tensor],
    eps: float,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, dbranch like branch, and sums (B, P, 3, C) for gate, shift and scale.

    `total` is x where there is no branch; one of dtotal and dnormed may be missing.
    """
    B, N, C = total.shape
    dx, dbranch, sums = _gradients(x, total, branch)
    pairs = [row_of(pair, total) for pair in (gate, scale)]
    block = triton.next_power_of_2(C)
    _norm_gradients[(sums.shape[1], B)](
        total if dtotal is None else dtotal.contiguous(),
        total if dnormed is None else dnormed.contiguous(),
        total.contiguous(), total if branch is None else branch.contiguous(), dx, dbranch, sums,
        *(part for pair in pairs for part in pair), N, C, eps, limit,
        *(time_stride(pair) for pair in pairs),
        HAS_DTOTAL=dtotal is not None, HAS_DNORMED=dnormed is not None,
        HAS_BRANCH=branch is not None, HAS_GATE=bool(gate), HAS_LIMIT=limit > 0,
        HAS_NORM=bool(scale), TOKENS=TOKENS, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dx, dbranch, sums


@trained_norm_backward.register_fake
def _(
    _dtotal: Any, _dnormed: Any, x: Tensor, total: Tensor, branch: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, total, branch)


def _results(
    x: Tensor, branch: Tensor | None, gate: list[Tensor], scale: list[Tensor], rounds: bool
) -> tuple[Tensor, Tensor]:
    """Memory for total and normed."""
    if branch is None:
        return x.new_empty(0), torch.empty_like(x, memory_format=torch.contiguous_format)
    wide = reduce(torch.promote_types, (part.dtype for part in (branch, *gate)), x.dtype)
    total = torch.empty(x.shape, dtype=wide, device=x.device)
    is_asked = bool(scale) or (rounds and branch.dtype != wide)
    shape = x.shape if is_asked else (0,)
    return total, torch.empty(shape, dtype=branch.dtype, device=x.device)


def _gradients(x: Tensor, total: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what `trained_norm_backward` returns."""
    B, N, C = total.shape
    dx = torch.empty(total.shape, dtype=x.dtype, device=x.device)
    shape = (0,) if branch is None else total.shape
    dbranch = torch.empty(shape, dtype=(branch if branch is not None else x).dtype, device=x.device)
    return dx, dbranch, x.new_empty((B, -(-N // TOKENS), 3, C), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, branch, gate, shift, scale, ctx.eps, ctx.limit, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.counts, ctx.has_branch = (len(gate), len(shift), len(scale)), branch is not None
    branches = [] if branch is None else [branch, output[0]]
    ctx.save_for_backward(x, *branches, *gate, *shift, *scale)


def _differentiate(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> Any:
    x, *rest = ctx.saved_tensors
    branch, total = (rest.pop(0), rest.pop(0)) if ctx.has_branch else (None, x)
    gates, shifts, _ = ctx.counts
    gate, shift, scale = rest[:gates], rest[gates : gates + shifts], rest[gates + shifts :]
    if dtotal is not None and dtotal.numel() == 0:
        dtotal = None
    if dnormed is not None and dnormed.numel() == 0:
        dnormed = None
    dx, dbranch, sums = trained_norm_backward.behind(ctx)(
        dtotal, dnormed, x, total, branch, gate, scale, ctx.eps, ctx.limit
    )
    dbranch = dbranch if ctx.has_branch else None
    if not (gate or scale):
        return dx, dbranch, [], [], [], None, None, None
    whole = sums.sum(1)
    both = whole.unbind(1), whole.sum(0).unbind(0)
    pairs = (
        [_of_row(place, both, part) for part in pair]
        for place, pair in ((GATE, gate), (SHIFT, shift), (SCALE, scale))
    )
    return dx, dbranch, *pairs, None, None, None


def _of_row(place: int, both: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], row: Tensor) -> Tensor:
    """The gradient of a row (C,), (1, C) or (B, C); `both` are sums by sample and of all."""
    samples, whole = both
    gradient = samples[place] if row.dim() > 1 and len(row) > 1 else whole[place].view(row.shape)
    return gradient.to(row.dtype)


trained_norm.register_autograd(_differentiate, setup_context=_keep)


def _launch_residual(
    x: Tensor,
    branch: Tensor | None,
    pairs: tuple[list[Tensor], list[Tensor], list[Tensor]],
    eps: float,
    limit: float,
    results: tuple[Tensor, Tensor],
    rounds: bool,
) -> None:
    """`pairs` are gate, shift and scale, each a row (C,) and one of the time (B or 1, C), or none.

    `results` are total and normed. If it `rounds` and there is no norm, the total goes into the
    memory for normed, if there is any.
    """
    B, N, C = x.shape
    gate, _, scale = pairs
    parts = [row_of(pair, x) for pair in pairs]
    total, normed = results
    block = triton.next_power_of_2(C)
    _residual_norm[(B * N,)](
        x, x if branch is None else branch.contiguous(), total, normed,
        *(part for row in parts for part in row), N, C, eps, limit,
        *(time_stride(row) for row in parts),
        HAS_BRANCH=branch is not None, HAS_GATE=bool(gate), HAS_LIMIT=limit > 0,
        HAS_NORM=bool(scale), ROUNDS=rounds and normed.numel() > 0,
        BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
