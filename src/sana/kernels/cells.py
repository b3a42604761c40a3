"""Cells of channels-last maps, as kernels that walk along rows read them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_cell(ptr, h, w, H, W, stride, c, end):
    """The cell at row h and column w, `stride` values apart, channels c < end, in fp32; 0 outside.

    So a convolution's border is zero.
    """
    return raw_cell(ptr, h, w, H, W, stride, c, end).to(tl.float32)


@triton.jit
def raw_cell(ptr, h, w, H, W, stride, c, end):
    """The same in its own dtype, for those who need it later."""
    last = tl.where((h >= 0) & (h < H) & (w >= 0) & (w < W), end, 0)
    return tl.load(ptr + (h * W + w) * stride + c, mask=c < last, other=0.0)


@triton.jit
def raw_column(ptr, h, w, H, W, stride, c, end):
    """Four cells of column w, from row h - 1 on: what a 3x3 sees of two rows."""
    return (
        raw_cell(ptr, h - 1, w, H, W, stride, c, end),
        raw_cell(ptr, h, w, H, W, stride, c, end),
        raw_cell(ptr, h + 1, w, H, W, stride, c, end),
        raw_cell(ptr, h + 2, w, H, W, stride, c, end),
    )
