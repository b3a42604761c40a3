"""RMSNorms with what stands around them, each in one pass over channels-last rows, forward only.

out = act(x / rms(x) * weight + bias) + residual; and a convolution's bias with the activation after
it. Statistics and sums are fp32; a result is rounded once. What `split_norm` and `norms_gradient`
share of the adaptive LayerNorm (adaLN-single, PixArt-alpha, arXiv 2310.00426) is here too: gate,
shift and scale are each the sum of a block's row and the time's.

Shape letters: B batch, N tokens, C channels, M rows in all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels import rows
from sana.kernels.launching import op
from sana.kernels.rows import TILE, warps

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
def _activate(x, KIND: tl.constexpr):
    """NaN stays, so that a broken picture is seen to be one."""
    if KIND == 1:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if KIND == 2:
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def _normed(x, weight_ptr, c, C, eps):
    """x / rms(x) * weight of rows in fp32, columns c."""
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return x * rstd[:, None] * weight[None, :]


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
    x = _normed(x, weight_ptr, c, C, eps)
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
    x = _normed(x, weight_ptr, c, C, eps)
    tl.store(at, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_act(x_ptr, bias_ptr, count, C, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """x = act(x + bias) in place; values with the channel fastest."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + at % C, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, _activate(x, KIND).to(x_ptr.dtype.element_ty), mask=inside)


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
