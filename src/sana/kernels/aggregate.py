"""One scale of the DC-AE's multi-scale attention in one pass (arXiv 2410.10733), forward only.

A depthwise S x S convolution of the queries, keys and values, rounded as its own result would be,
and then a product within each run of D channels. Read from, and written beside, the map that the
attention reads, so that nothing is joined afterwards. Sums are fp32.

Shape letters: B batch, H W grid, C channels, D channels of a run, S taps along a side, E channels
of a cell in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import op

BLOCK_W = 32
NUM_WARPS = 4
WIDTHS = (16, 32, 64)


@triton.jit
def _aggregate(
    wide_ptr, taps_ptr, product_ptr, H, W, E, PLACE,
    D: tl.constexpr, S: tl.constexpr, BLOCK_W: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """BLOCK_W cells of a row, one run of channels."""
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    row, run = tl.program_id(1).to(tl.int64), tl.program_id(2)
    d = tl.arange(0, D)
    c = run * D + d
    h = row % H
    total = tl.zeros((BLOCK_W, D), tl.float32)
    for y in range(S):
        there_h = h + y - S // 2
        for x in tl.static_range(S):
            there_w = w + x - S // 2
            seen = (there_w >= 0) & (there_w < tl.where((there_h >= 0) & (there_h < H), W, 0))
            at = (row + y - S // 2) * W + there_w
            value = tl.load(wide_ptr + at[:, None] * E + c[None, :], mask=seen[:, None], other=0.0)
            tap = tl.load(taps_ptr + c * (S * S) + (y * S + x)).to(tl.float32)
            total += value.to(tl.float32) * tap[None, :]
    # product[out, in] of this run, read as (in, out).
    kernel = tl.load(product_ptr + c[None, :] * D + d[:, None])
    mixed = tl.dot(total.to(kernel.dtype), kernel, input_precision=EXACT)
    at = (row * W + w)[:, None] * E + PLACE + c[None, :]
    tl.store(wide_ptr + at, mixed.to(wide_ptr.dtype.element_ty), mask=(w < W)[:, None])


def supports(wide: Tensor, taps: Tensor, product: Tensor) -> bool:
    """Whether the kernel takes the inputs: a run of a width it knows, an odd and small S."""
    channels, run = product.shape[:2]
    size = taps.shape[-1]
    alike = taps.shape == (channels, 1, size, size) and channels % run == 0
    return alike and run in WIDTHS and size % 2 == 1 and size <= 7 and channels // run < 65536


@op("aggregate_", mutates=("wide",))
def aggregate_(wide: Tensor, taps: Tensor, product: Tensor, place: int) -> None:
    """wide (B, H, W, E): channels `place` to `place` + C are made of its first C."""
    B, H, W, E = wide.shape
    channels, run = product.shape[:2]
    _aggregate[(triton.cdiv(W, BLOCK_W), B * H, channels // run)](
        wide, taps.contiguous(), product.contiguous(), H, W, E, place,
        D=run, S=taps.shape[-1], BLOCK_W=BLOCK_W, num_warps=NUM_WARPS,
        EXACT="ieee" if wide.dtype == torch.float32 else "tf32",
    )  # fmt: skip
