"""One scale of the DC-AE's multi-scale attention, forward only (arXiv 2410.10733).

A depthwise 5x5 convolution of the queries, keys and values, rounded as its own result would be, and
then a product within each run of D channels. Read from, and written beside, the map that the
attention reads, so that nothing is joined afterwards. A program walks along two rows of the map, a
block of channels at a time: of the six rows of input that they need, each value is read once, and
the columns that are not done yet stay in registers. Sums are fp32; the products are one batched
matrix product.

Shape letters: B batch, H W grid, C channels, D channels of a run, E channels of a cell in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.cells import load_cell
from sana.kernels.launching import op

SIZE = 5
"""Taps along a side."""
BLOCK_C = 64
NUM_WARPS = 1
SEGMENT = 16
"""Columns that one program walks along."""


@triton.jit
def _column(taps_ptr, c, is_inside, X: tl.constexpr):
    """The five weights of column X for each channel."""
    at = taps_ptr + c * 25 + X
    return (
        tl.load(at, mask=is_inside, other=0.0).to(tl.float32),
        tl.load(at + 5, mask=is_inside, other=0.0).to(tl.float32),
        tl.load(at + 10, mask=is_inside, other=0.0).to(tl.float32),
        tl.load(at + 15, mask=is_inside, other=0.0).to(tl.float32),
        tl.load(at + 20, mask=is_inside, other=0.0).to(tl.float32),
    )


@triton.jit
def _taken(total, t0, t1, t2, t3, t4, v0, v1, v2, v3, v4):
    """The sum with one column's share."""
    return total + t0 * v0 + t1 * v1 + t2 * v2 + t3 * v3 + t4 * v4


@triton.jit
def _depthwise(
    x_ptr, taps_ptr, out_ptr, H, W, E, C, SEGMENTS,
    SEGMENT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Two rows of SEGMENT columns of BLOCK_C channels; p are sums of the first row, q the second's.

    At input column w, p0 to p3 are the sums for the outputs at w + 1, w, w - 1 and w - 2 so far.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_inside = c < C
    h = tl.program_id(1) // SEGMENTS * 2
    start = tl.program_id(1) % SEGMENTS * SEGMENT
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * H * W * E
    out_ptr += batch * H * W * C
    a0, a1, a2, a3, a4 = _column(taps_ptr, c, is_inside, 0)
    b0, b1, b2, b3, b4 = _column(taps_ptr, c, is_inside, 1)
    d0, d1, d2, d3, d4 = _column(taps_ptr, c, is_inside, 2)
    e0, e1, e2, e3, e4 = _column(taps_ptr, c, is_inside, 3)
    f0, f1, f2, f3, f4 = _column(taps_ptr, c, is_inside, 4)
    zero = tl.zeros((BLOCK_C,), tl.float32)
    p0, p1, p2, p3 = zero, zero, zero, zero
    q0, q1, q2, q3 = zero, zero, zero, zero
    for step in range(SEGMENT + 4):
        w = start + step - 2
        u = load_cell(x_ptr, h - 2, w, H, W, E, c, C)
        v = load_cell(x_ptr, h - 1, w, H, W, E, c, C)
        x = load_cell(x_ptr, h, w, H, W, E, c, C)
        y = load_cell(x_ptr, h + 1, w, H, W, E, c, C)
        z = load_cell(x_ptr, h + 2, w, H, W, E, c, C)
        s = load_cell(x_ptr, h + 3, w, H, W, E, c, C)
        done = _taken(p3, f0, f1, f2, f3, f4, u, v, x, y, z)
        p3 = _taken(p2, e0, e1, e2, e3, e4, u, v, x, y, z)
        p2 = _taken(p1, d0, d1, d2, d3, d4, u, v, x, y, z)
        p1 = _taken(p0, b0, b1, b2, b3, b4, u, v, x, y, z)
        p0 = _taken(zero, a0, a1, a2, a3, a4, u, v, x, y, z)
        at = out_ptr + (h * W + w - 2) * C + c
        is_done = (w >= start + 2) & (w - 2 < W)
        tl.store(at, done.to(out_ptr.dtype.element_ty), mask=c < tl.where(is_done, C, 0))
        done = _taken(q3, f0, f1, f2, f3, f4, v, x, y, z, s)
        q3 = _taken(q2, e0, e1, e2, e3, e4, v, x, y, z, s)
        q2 = _taken(q1, d0, d1, d2, d3, d4, v, x, y, z, s)
        q1 = _taken(q0, b0, b1, b2, b3, b4, v, x, y, z, s)
        q0 = _taken(zero, a0, a1, a2, a3, a4, v, x, y, z, s)
        last = tl.where(is_done & (h + 1 < H), C, 0)
        tl.store(at + W * C, done.to(out_ptr.dtype.element_ty), mask=c < last)


def supports(wide: Tensor, taps: Tensor, product: Tensor) -> bool:
    """Whether the kernel takes the inputs: 5x5 taps, whole runs, a sample within 2^31 values."""
    channels, run = product.shape[:2]
    alike = taps.shape == (channels, 1, SIZE, SIZE) and channels % run == 0
    return alike and wide[0].numel() < 2**31


@op("aggregate_", mutates=("wide",))
def aggregate_(wide: Tensor, taps: Tensor, product: Tensor, place: int) -> None:
    """wide (B, H, W, E): channels `place` to `place` + C are made of its first C."""
    B, H, W, E = wide.shape
    channels, run = product.shape[:2]
    filtered = wide.new_empty((B, H, W, channels))
    segment = min(SEGMENT, triton.next_power_of_2(W))
    segments = triton.cdiv(W, segment)
    _depthwise[(triton.cdiv(channels, BLOCK_C), triton.cdiv(H, 2) * segments, B)](
        wide, taps.contiguous(), filtered, H, W, E, channels, segments,
        SEGMENT=segment, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    groups = channels // run
    kernels = torch.unflatten(product.flatten(1), 0, (groups, -1)).mT  # (G, D, D)
    by_group = torch.unflatten(filtered.flatten(0, 2), 1, (groups, -1)).transpose(0, 1)
    beside = wide.flatten(0, 2)[:, place : place + channels]
    torch.bmm(by_group, kernels, out=torch.unflatten(beside, 1, (groups, -1)).transpose(0, 1))
