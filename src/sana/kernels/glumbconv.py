"""The middle of the mix-FFN in one pass, forward only (Sana, arXiv 2410.10629, section 2.2).

From the expanded map x (B, H, W, 2F): out = value * silu(gate), where value and gate are the halves
of depthwise3x3(silu(x)) + bias. A program walks along two rows of the map, a block of channels at a
time: it reads four rows of input once for two of output and keeps the three columns of a tap in
registers, so that the SiLU is taken twice per value and nothing but x and out touches memory; or
along four rows, with 1.5 SiLUs and more registers.
Products and sums are fp32; the result is rounded once.

Shape letters: B batch, H W grid, F channels of value or gate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import op

BLOCK_F = 256
NUM_WARPS = 4
SEGMENT = 32
"""Columns that one program walks along."""
BLOCK_F_4, NUM_WARPS_4, SEGMENT_4 = 128, 2, 16
"""Likewise where it walks along four rows."""


@triton.jit
def _silu(x, SILU: tl.constexpr):
    """x / (1 + exp(-x)); 1: in PTX, without the care for denormals that costs more than it.

    2: x / 2 (1 + tanh(x / 2)) by the device's tangent, off by 5e-4 of x at most.
    """
    if SILU == 1:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 t, t;
            mul.f32 $0, $1, t;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    if SILU == 2:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 h, t;
            mul.f32 h, $1, 0f3F000000;
            tanh.approx.f32 t, h;
            fma.rn.f32 $0, h, t, h;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return x * tl.sigmoid(x)


@triton.jit
def _read(x_ptr, h, w, H, W, F, c, end, SILU: tl.constexpr):
    """silu of x at row h and column w, channels c < end; 0 outside, as the convolution's border."""
    last = tl.where((h >= 0) & (h < H) & (w >= 0) & (w < W), end, 0)
    x = tl.load(x_ptr + (h * W + w) * 2 * F + c, mask=c < last, other=0.0).to(tl.float32)
    return _silu(x, SILU)


@triton.jit
def _tap(weight_ptr, c, is_inside, PLACE: tl.constexpr):
    return tl.load(weight_ptr + c * 9 + PLACE, mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def _step(
    x_ptr, bias, h, w, H, W, F, c, end,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, left_0, left_1, here_0, here_1, SILU: tl.constexpr,
):  # fmt: skip
    """Reads column w; returns what is done at w - 1 in both rows, and the sums for w and w + 1."""
    a = _read(x_ptr, h - 1, w, H, W, F, c, end, SILU)
    b = _read(x_ptr, h, w, H, W, F, c, end, SILU)
    d = _read(x_ptr, h + 1, w, H, W, F, c, end, SILU)
    e = _read(x_ptr, h + 2, w, H, W, F, c, end, SILU)
    done_0 = left_0 + t2 * a + t5 * b + t8 * d
    done_1 = left_1 + t2 * b + t5 * d + t8 * e
    left_0 = here_0 + t1 * a + t4 * b + t7 * d
    left_1 = here_1 + t1 * b + t4 * d + t7 * e
    here_0 = bias + t0 * a + t3 * b + t6 * d
    here_1 = bias + t0 * b + t3 * d + t6 * e
    return done_0, done_1, left_0, left_1, here_0, here_1


@triton.jit
def _taps(weight_ptr, c, is_inside):
    """The nine weights of each channel, row by row."""
    return (
        _tap(weight_ptr, c, is_inside, 0),
        _tap(weight_ptr, c, is_inside, 1),
        _tap(weight_ptr, c, is_inside, 2),
        _tap(weight_ptr, c, is_inside, 3),
        _tap(weight_ptr, c, is_inside, 4),
        _tap(weight_ptr, c, is_inside, 5),
        _tap(weight_ptr, c, is_inside, 6),
        _tap(weight_ptr, c, is_inside, 7),
        _tap(weight_ptr, c, is_inside, 8),
    )


@triton.jit
def _glu_depthwise(
    x_ptr, weight_ptr, bias_ptr, out_ptr, H, W, F, SEGMENTS,
    SEGMENT: tl.constexpr, BLOCK_F: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Two rows of SEGMENT columns of BLOCK_F channels.

    At input column w, `l` are the sums for the output at w - 1 and `r` those for w, of value v and
    gate g in rows 0 and 1.
    """
    v = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_inside = v < F
    g = v + F
    h = tl.program_id(1) // SEGMENTS * 2
    start = tl.program_id(1) % SEGMENTS * SEGMENT
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * H * W * 2 * F
    out_ptr += batch * H * W * F
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = _taps(weight_ptr, v, is_inside)
    g0, g1, g2, g3, g4, g5, g6, g7, g8 = _taps(weight_ptr, g, is_inside)
    bv = tl.load(bias_ptr + v, mask=is_inside, other=0.0).to(tl.float32)
    bg = tl.load(bias_ptr + g, mask=is_inside, other=0.0).to(tl.float32)
    lv0, lv1, rv0, rv1 = bv, bv, bv, bv
    lg0, lg1, rg0, rg1 = bg, bg, bg, bg
    for step in range(SEGMENT + 2):
        w = start + step - 1
        value_0, value_1, lv0, lv1, rv0, rv1 = _step(
            x_ptr, bv, h, w, H, W, F, v, F,
            v0, v1, v2, v3, v4, v5, v6, v7, v8, lv0, lv1, rv0, rv1, SILU,
        )  # fmt: skip
        gate_0, gate_1, lg0, lg1, rg0, rg1 = _step(
            x_ptr, bg, h, w, H, W, F, g, 2 * F,
            g0, g1, g2, g3, g4, g5, g6, g7, g8, lg0, lg1, rg0, rg1, SILU,
        )  # fmt: skip
        is_done = (w > start) & (w <= W)
        at = out_ptr + (h * W + w - 1) * F + v
        out = value_0 * _silu(gate_0, SILU)
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=v < tl.where(is_done, F, 0))
        at += W * F
        out = value_1 * _silu(gate_1, SILU)
        last = tl.where(is_done & (h + 1 < H), F, 0)
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=v < last)


@triton.jit
def _row(t0, t1, t2, t3, t4, t5, t6, t7, t8, bias, left, here, up, mid, down):
    """One row of output at a new column: what is done, and the sums that go on."""
    done = left + t2 * up + t5 * mid + t8 * down
    left = here + t1 * up + t4 * mid + t7 * down
    return done, left, bias + t0 * up + t3 * mid + t6 * down


@triton.jit
def _step_4(
    x_ptr, bias, h, w, H, W, F, c, end,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, l0, l1, l2, l3, r0, r1, r2, r3, SILU: tl.constexpr,
):  # fmt: skip
    """As `_step`, for four rows."""
    a = _read(x_ptr, h - 1, w, H, W, F, c, end, SILU)
    b = _read(x_ptr, h, w, H, W, F, c, end, SILU)
    d = _read(x_ptr, h + 1, w, H, W, F, c, end, SILU)
    d0, l0, r0 = _row(t0, t1, t2, t3, t4, t5, t6, t7, t8, bias, l0, r0, a, b, d)
    e = _read(x_ptr, h + 2, w, H, W, F, c, end, SILU)
    d1, l1, r1 = _row(t0, t1, t2, t3, t4, t5, t6, t7, t8, bias, l1, r1, b, d, e)
    f = _read(x_ptr, h + 3, w, H, W, F, c, end, SILU)
    d2, l2, r2 = _row(t0, t1, t2, t3, t4, t5, t6, t7, t8, bias, l2, r2, d, e, f)
    g = _read(x_ptr, h + 4, w, H, W, F, c, end, SILU)
    d3, l3, r3 = _row(t0, t1, t2, t3, t4, t5, t6, t7, t8, bias, l3, r3, e, f, g)
    return d0, d1, d2, d3, l0, l1, l2, l3, r0, r1, r2, r3


@triton.jit
def _emit(out_ptr, h, w, H, W, F, v, is_done, value, gate, SILU: tl.constexpr):
    """The output at row h and column w, where that is there."""
    last = tl.where(is_done & (h < H), F, 0)
    out = value * _silu(gate, SILU)
    tl.store(out_ptr + (h * W + w) * F + v, out.to(out_ptr.dtype.element_ty), mask=v < last)


@triton.jit
def _glu_depthwise_4(
    x_ptr, weight_ptr, bias_ptr, out_ptr, H, W, F, SEGMENTS,
    SEGMENT: tl.constexpr, BLOCK_F: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """As `_glu_depthwise`, four rows a program."""
    v = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_inside = v < F
    g = v + F
    h = tl.program_id(1) // SEGMENTS * 4
    start = tl.program_id(1) % SEGMENTS * SEGMENT
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * H * W * 2 * F
    out_ptr += batch * H * W * F
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = _taps(weight_ptr, v, is_inside)
    g0, g1, g2, g3, g4, g5, g6, g7, g8 = _taps(weight_ptr, g, is_inside)
    bv = tl.load(bias_ptr + v, mask=is_inside, other=0.0).to(tl.float32)
    bg = tl.load(bias_ptr + g, mask=is_inside, other=0.0).to(tl.float32)
    lv0, lv1, lv2, lv3, rv0, rv1, rv2, rv3 = bv, bv, bv, bv, bv, bv, bv, bv
    lg0, lg1, lg2, lg3, rg0, rg1, rg2, rg3 = bg, bg, bg, bg, bg, bg, bg, bg
    for step in range(SEGMENT + 2):
        w = start + step - 1
        a0, a1, a2, a3, lv0, lv1, lv2, lv3, rv0, rv1, rv2, rv3 = _step_4(
            x_ptr, bv, h, w, H, W, F, v, F, v0, v1, v2, v3, v4, v5, v6, v7, v8,
            lv0, lv1, lv2, lv3, rv0, rv1, rv2, rv3, SILU,
        )  # fmt: skip
        b0, b1, b2, b3, lg0, lg1, lg2, lg3, rg0, rg1, rg2, rg3 = _step_4(
            x_ptr, bg, h, w, H, W, F, g, 2 * F, g0, g1, g2, g3, g4, g5, g6, g7, g8,
            lg0, lg1, lg2, lg3, rg0, rg1, rg2, rg3, SILU,
        )  # fmt: skip
        is_done = (w > start) & (w <= W)
        _emit(out_ptr, h, w - 1, H, W, F, v, is_done, a0, b0, SILU)
        _emit(out_ptr, h + 1, w - 1, H, W, F, v, is_done, a1, b1, SILU)
        _emit(out_ptr, h + 2, w - 1, H, W, F, v, is_done, a2, b2, SILU)
        _emit(out_ptr, h + 3, w - 1, H, W, F, v, is_done, a3, b3, SILU)


def supports(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the kernel takes the inputs: one dtype of at most 32 bits, a sample within 2^31."""
    alike = x.dtype == weight.dtype == bias.dtype and x.is_floating_point()
    return alike and x.dtype.itemsize <= 4 and x[0].numel() < 2**31


@op("glu_depthwise")
def glu_depthwise(x: Tensor, weight: Tensor, bias: Tensor, silu: int, rows: int) -> Tensor:
    """x (B, H, W, 2F), weight (2F, 1, 3, 3), bias (2F,) -> (B, H, W, F), contiguous.

    A program walks along two or four `rows`. `silu` is how it is taken (`_silu`), where the device
    is NVIDIA's.
    """
    x, weight = x.contiguous(), weight.contiguous()
    B, H, W, F = x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2
    out = x.new_empty((B, H, W, F))
    width, warps, segment = (
        (BLOCK_F_4, NUM_WARPS_4, SEGMENT_4) if rows == 4 else (BLOCK_F, NUM_WARPS, SEGMENT)
    )
    segment = min(segment, triton.next_power_of_2(W))
    segments = triton.cdiv(W, segment)
    kernel = _glu_depthwise_4 if rows == 4 else _glu_depthwise
    kernel[(triton.cdiv(F, width), triton.cdiv(H, rows) * segments, B)](
        x, weight, bias, out, H, W, F, segments,
        SEGMENT=segment, BLOCK_F=width, num_warps=warps,
        SILU=silu if x.is_cuda and torch.version.hip is None else 0,
    )  # fmt: skip
    return out


@glu_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, silu: int, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:3], x.shape[3] // 2))
