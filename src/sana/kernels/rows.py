"""Rows as fp8 (e4m3) with a scale each, in one pass, forward only.

A row's scale is its largest value over 448. What is not finite makes its whole row NaN, as in the
reference. `norms` takes `as_rows` for rows that it has in registers; `scaled_rows` is the pass for
all others.

Shape letters: M rows, K values of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import op

WIDEST = 16384
"""Values of a row, which one program holds."""
TILE = 4096
"""Values that one program takes where rows are short."""


@triton.jit
def _larger(x, y):
    """NaN where either is, unlike `tl.max`."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x, AXIS: tl.constexpr):
    return _larger(tl.reduce(tl.abs(x), AXIS, _larger), 1e-12)


@triton.jit
def _on_steps(x, NATIVE: tl.constexpr):
    """Without NATIVE on e4m3's steps, since the cast of triton's interpreter loses a carry."""
    if not NATIVE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # 3 of 23 digits, ties to even
        small = (x + 24576.0) - 24576.0  # below 2^-6 in steps of 2^-9
        x = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return x


@triton.jit
def as_rows(x, AXIS: tl.constexpr, NATIVE: tl.constexpr):
    """x (BLOCK,) or, with AXIS 1, (ROWS, BLOCK) in fp32 -> what fp8 holds of it, and its scales.

    Nothing is clipped: the largest times its factor is 448 but for fp32's last digit, which
    rounds to 448, and a clip would hide NaN.
    """
    largest = _largest(x, AXIS)
    if AXIS == 1:
        x = x * (448.0 / largest)[:, None]
    else:
        x = x * (448.0 / largest)
    return _on_steps(x, NATIVE), largest / 448.0


@triton.jit
def as_row_of_two(x, y, NATIVE: tl.constexpr):
    """`as_rows` of one row in two pieces of any lengths: both, and their one scale."""
    largest = _larger(_largest(x, 0), _largest(y, 0))
    factor = 448.0 / largest
    return _on_steps(x * factor, NATIVE), _on_steps(y * factor, NATIVE), largest / 448.0


@triton.jit
def _scaled_rows(
    x_ptr, out_ptr, scale_ptr, M, K,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """ROWS dense rows."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    inside = (m < M)[:, None] & (k < K)[None, :]
    at = m[:, None] * K + k[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x, scale = as_rows(x, 1, NATIVE)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + m, scale, mask=m < M)


@op("scaled_rows")
def scaled_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) -> fp8 (..., K), contiguous, and scales (..., 1) in fp32."""
    x = x.contiguous()
    K = x.shape[-1]
    M = x.numel() // K
    out, scale = empty_rows(x)
    block = triton.next_power_of_2(K)
    rows = max(1, TILE // block)
    _scaled_rows[(triton.cdiv(M, rows),)](
        x, out, scale, M, K, ROWS=rows, BLOCK=block, NATIVE=x.is_cuda,
        num_warps=warps(rows * block),
    )  # fmt: skip
    return out, scale


@scaled_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows(x)


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for x (..., K) as rows."""
    shape = (*x.shape[:-1], 1)
    return (
        torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(shape, dtype=torch.float32, device=x.device),
    )


def supports(x: Tensor) -> bool:
    """Whether the kernel takes x: floats of at most 32 bits, rows that one program holds."""
    return x.is_floating_point() and x.dtype.itemsize <= 4 and x.shape[-1] <= WIDEST


def warps(values: int) -> int:
    """Of a program that holds so many values."""
    return 4 if values <= 2048 else 8 if values <= 8192 else 16
