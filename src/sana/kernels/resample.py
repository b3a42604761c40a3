"""Doubling a map's resolution in the DC-AE decoder (arXiv 2410.10733), forward only.

Nearest-neighbor enlargement and a 3x3 convolution see each input cell in at most 2x2 places for
every output cell, so they are a transposed convolution of 4x4 taps and stride 2: 4/9 of the
products, and no enlarged map in memory. Its bias and the shortcut, whose channels are repeated and
shuffled to places, are then added in one pass in place.

Or they are a convolution of 2x2 taps to four times the channels, one for each place of an output
cell in its 2x2, over a border of one: `spread` puts what it gives in place, with bias and shortcut.

Shape letters: B batch, C channels of the result, K of the input, H W the result's grid, M cells.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import op

TILE = 4096


@triton.jit
def _add_repeated(
    own_ptr, x_ptr, bias_ptr, M, C, K, W, REPEATS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS cells of the result; channel c at place p of a 2x2 reads channel (4 c + p) / REPEATS."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    inside = (m < M)[:, None] & (c < C)[None, :]
    column, row = m % W, m // W
    # An even height keeps the halves of one picture apart from the next.
    source = row // 2 * (W // 2) + column // 2
    place = row % 2 * 2 + column % 2
    channel = (4 * c[None, :] + place[:, None]) // REPEATS
    at = m[:, None] * C + c[None, :]
    own = tl.load(own_ptr + at, mask=inside, other=0.0).to(tl.float32)
    own += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    own += tl.load(x_ptr + source[:, None] * K + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(own_ptr + at, own.to(own_ptr.dtype.element_ty), mask=inside)


@op("add_repeated_", mutates=("own",))
def add_repeated_(own: Tensor, x: Tensor, bias: Tensor) -> None:
    """own (B, H, W, C) += bias (C,) + x (B, H/2, W/2, K) with each channel 4 C / K times."""
    W, C = own.shape[2:]
    M = own.numel() // C
    block = triton.next_power_of_2(C)
    rows = max(1, TILE // block)
    _add_repeated[(triton.cdiv(M, rows),)](
        own, x, bias, M, C, x.shape[3], W, REPEATS=4 * C // x.shape[3],
        ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip


@triton.jit
def _spread(
    z_ptr, x_ptr, bias_ptr, out_ptr, M, C, K, H, W, REPEATS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS cells of the result; (2i + a, 2j + b) reads z's cell (i + a, j + b) at place 2a + b."""
    cell = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    inside = (cell < M)[:, None] & (c < C)[None, :]
    # Fewer than 2^31 cells, but more values; division by 64 bits is slow.
    column, row, batch = cell % W, cell // W % H, cell // W // H
    place = row % 2 * 2 + column % 2
    window = (batch * (H // 2 + 1) + (row + 1) // 2) * (W // 2 + 1) + (column + 1) // 2
    source = (batch * (H // 2) + row // 2) * (W // 2) + column // 2
    channel = (4 * c[None, :] + place[:, None]) // REPEATS
    z_at = (window.to(tl.int64) * 4 * C + place * C)[:, None] + c[None, :]
    value = tl.load(z_ptr + z_at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    x_at = (source.to(tl.int64) * K)[:, None] + channel
    value += tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
    at = (cell.to(tl.int64) * C)[:, None] + c[None, :]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@op("spread")
def spread(z: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """z (B, H/2 + 1, W/2 + 1, 4 C), x (B, H/2, W/2, K), bias (C,), contiguous -> (B, H, W, C)."""
    B, H, W, K = x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]
    C = z.shape[3] // 4
    out = z.new_empty((B, H, W, C))
    block = triton.next_power_of_2(C)
    rows = max(1, TILE // 2 // block)
    _spread[(triton.cdiv(B * H * W, rows),)](
        z, x, bias, out, B * H * W, C, K, H, W, REPEATS=4 * C // K,
        ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@spread.register_fake
def _(z: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return z.new_empty((x.shape[0], 2 * x.shape[1], 2 * x.shape[2], z.shape[3] // 4))


@triton.jit
def _window_taps(
    weight_ptr, out_ptr, C, K, STRIDE_C, STRIDE_K, STRIDE_Y, STRIDE_X, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one channel of the result the 3x3 taps of BLOCK channels: four times 2x2."""
    c = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            for y in tl.static_range(2):
                for x in tl.static_range(2):
                    # Place 0 sees taps 0 and 1 + 2, place 1 sees taps 0 + 1 and 2.
                    total = tl.zeros((BLOCK,), dtype=tl.float32)
                    for row in tl.static_range(y * (1 + a), 1 + a + y * (2 - a)):
                        for column in tl.static_range(x * (1 + b), 1 + b + x * (2 - b)):
                            at = c * STRIDE_C + row * STRIDE_Y + column * STRIDE_X + k * STRIDE_K
                            tap = tl.load(weight_ptr + at, mask=k < K, other=0.0)
                            total += tap.to(tl.float32)
                    place = ((2 * a + b) * C + c) * 4 + 2 * y + x
                    value = total.to(out_ptr.dtype.element_ty)
                    tl.store(out_ptr + place * K + k, value, mask=k < K)


@op("window_taps")
def window_taps(weight: Tensor) -> Tensor:
    """weight (C, K, 3, 3) -> the taps of `resampling.windows`, (4 C, 2, 2, K), contiguous."""
    C, K = weight.shape[:2]
    out = weight.new_empty((4 * C, 2, 2, K))
    block = min(512, triton.next_power_of_2(K))
    _window_taps[(C, triton.cdiv(K, block))](
        weight, out, C, K, *weight.stride(), BLOCK=block, num_warps=4
    )
    return out


@window_taps.register_fake
def _(weight: Tensor) -> Tensor:
    return weight.new_empty((4 * weight.shape[0], 2, 2, weight.shape[1]))
