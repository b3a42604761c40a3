"""The middle of the mix-FFN in one pass (Sana, arXiv 2410.10629, section 2.2).

From the expanded map x (B, H, W, 2F): out = value * silu(gate), where value and gate are the halves
of depthwise3x3(silu(x)) + bias. A program walks along two rows of the map, a block of channels at a
time: it reads four rows of input once for two of output and keeps the three columns of a tap in
registers, so that the SiLU is taken twice per value and nothing but x and out touches memory.
Products and sums are fp32; the result is rounded once.

Shape letters: B batch, H W grid, F channels of value or gate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import op

BLOCK_F = 128
NUM_WARPS = 1
SEGMENT = 32
"""Columns that one program walks along."""
SHORTER = 16
"""The same where else there were fewer than `ENOUGH` programs."""
ENOUGH = 1024
BOTH_AHEAD = True
"""Whether gates too are read a column ahead, where SiLU is the approximated one."""
MOST_REGISTERS = 168
"""With more, fewer programs would be there at a time."""


@triton.jit
def _silu(x, FAST: tl.constexpr):
    """x / (1 + exp(-x)); FAST: x / 2 (1 + tanh(x / 2)), approximated to 5e-4 of x at worst."""
    if FAST:
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
def _silu_of_pairs(x):
    """As FAST, of bf16 in fp32: halves of bf16 are exact in bf16, and are taken two at a time."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 h, m, z;
        .reg .f32 a, b, t, u;
        mov.b32 m, 0x3F003F00;
        mov.b32 z, 0x80008000;
        fma.rn.bf16x2 h, $2, m, z;
        shl.b32 a, h, 16;
        and.b32 b, h, 0xFFFF0000U;
        tanh.approx.f32 t, a;
        tanh.approx.f32 u, b;
        fma.rn.f32 $0, a, t, a;
        fma.rn.f32 $1, b, u, b;
        }""",
        "=f,=f,r",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _tap(weight_ptr, c, is_inside, PLACE: tl.constexpr):
    return tl.load(weight_ptr + c * 9 + PLACE, mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def _activated(a, b, c, d, FAST: tl.constexpr):
    """silu of the four cells of a column, in fp32; 0 stays 0, as the convolution's border."""
    if FAST == 2:
        return _silu_of_pairs(a), _silu_of_pairs(b), _silu_of_pairs(c), _silu_of_pairs(d)
    return (
        _silu(a.to(tl.float32), FAST),
        _silu(b.to(tl.float32), FAST),
        _silu(c.to(tl.float32), FAST),
        _silu(d.to(tl.float32), FAST),
    )


@triton.jit
def _step(
    a, b, d, e, bias,
    t0, t1, t2, t3, t4, t5, t6, t7, t8, left_0, left_1, here_0, here_1, FAST: tl.constexpr,
):  # fmt: skip
    """Takes column w; returns what is done at w - 1 in both rows, and the sums for w and w + 1."""
    a, b, d, e = _activated(a, b, d, e, FAST)
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
def _rows(p0, p1, p2, p3, m0, m1, m2, m3, is_map, PLACE: tl.constexpr):
    """Cells of four rows, PLACE behind their addresses; 0 where the column is not of the map."""
    return (
        tl.load(p0 + PLACE, mask=m0 & is_map, other=0.0),
        tl.load(p1 + PLACE, mask=m1 & is_map, other=0.0),
        tl.load(p2 + PLACE, mask=m2 & is_map, other=0.0),
        tl.load(p3 + PLACE, mask=m3 & is_map, other=0.0),
    )


@triton.jit
def _glu_depthwise(
    x_ptr, weight_ptr, bias_ptr, out_ptr, H, W, SEGMENTS, F: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_F: tl.constexpr, FAST: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Two rows of SEGMENT columns of BLOCK_F channels; values of the next are read meanwhile.

    BOTH: gates too. At column w sums `l` are for the output at w - 1, `r` for w, in rows 0 and 1.
    """
    v = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_inside, g = v < F, v + F
    h, start = tl.program_id(1) // SEGMENTS * 2, tl.program_id(1) % SEGMENTS * SEGMENT
    batch = tl.program_id(2).to(tl.int64)
    m0, m1 = v < tl.where(h > 0, F, 0), is_inside
    m2, m3 = v < tl.where(h + 1 < H, F, 0), v < tl.where(h + 2 < H, F, 0)
    p0 = x_ptr + batch * H * W * 2 * F + ((h - 1) * W + start - 1) * 2 * F + v
    p1, p2, p3 = p0 + W * 2 * F, p0 + 2 * W * 2 * F, p0 + 3 * W * 2 * F
    o0 = out_ptr + batch * H * W * F + (h * W + start - 2) * F + v
    o1 = o0 + W * F
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = _taps(weight_ptr, v, is_inside)
    g0, g1, g2, g3, g4, g5, g6, g7, g8 = _taps(weight_ptr, g, is_inside)
    bv = tl.load(bias_ptr + v, mask=is_inside, other=0.0).to(tl.float32)
    bg = tl.load(bias_ptr + g, mask=is_inside, other=0.0).to(tl.float32)
    lv0, lv1, rv0, rv1 = bv, bv, bv, bv
    lg0, lg1, rg0, rg1 = bg, bg, bg, bg
    is_map = v < tl.where(start > 0, F, 0)
    va, vb, vd, ve = _rows(p0, p1, p2, p3, m0, m1, m2, m3, is_map, 0)
    if BOTH:
        ga, gb, gd, ge = _rows(p0, p1, p2, p3, m0, m1, m2, m3, is_map, F)
    for step in range(SEGMENT + 2):
        w = start + step - 1
        if not BOTH:
            is_map = v < tl.where((w >= 0) & (w < W), F, 0)
            ga, gb, gd, ge = _rows(p0, p1, p2, p3, m0, m1, m2, m3, is_map, F)
        value_0, value_1, lv0, lv1, rv0, rv1 = _step(
            va, vb, vd, ve, bv, v0, v1, v2, v3, v4, v5, v6, v7, v8, lv0, lv1, rv0, rv1, FAST
        )
        is_map = v < tl.where(w + 1 < W, F, 0)
        va, vb, vd, ve = _rows(p0, p1, p2, p3, m0, m1, m2, m3, is_map, 2 * F)
        gate_0, gate_1, lg0, lg1, rg0, rg1 = _step(
            ga, gb, gd, ge, bg, g0, g1, g2, g3, g4, g5, g6, g7, g8, lg0, lg1, rg0, rg1, FAST
        )
        if BOTH:
            ga, gb, gd, ge = _rows(p0, p1, p2, p3, m0, m1, m2, m3, is_map, 3 * F)
        is_done = v < tl.where((w > start) & (w <= W), F, 0)
        out = value_0 * _silu(gate_0, FAST)
        tl.store(o0, out.to(out_ptr.dtype.element_ty), mask=is_done)
        out = value_1 * _silu(gate_1, FAST)
        tl.store(o1, out.to(out_ptr.dtype.element_ty), mask=m2 & is_done)
        p0, p1, p2, p3 = p0 + 2 * F, p1 + 2 * F, p2 + 2 * F, p3 + 2 * F
        o0, o1 = o0 + F, o1 + F


def supports(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the kernels take these, this one and those of the gradients.

    x has at most 32 bits and a sample less than 2^31 values; weights are in its dtype or, as under
    autocast, in fp32.
    """
    alike = weight.dtype == bias.dtype and weight.dtype in (x.dtype, torch.float32)
    return alike and x.is_floating_point() and x.dtype.itemsize <= 4 and x[0].numel() < 2**31


@op("glu_depthwise")
def glu_depthwise(x: Tensor, weight: Tensor, bias: Tensor, fast: bool) -> Tensor:
    """x (B, H, W, 2F), weight (2F, 1, 3, 3), bias (2F,) -> (B, H, W, F), contiguous.

    `fast` takes SiLU by the approximated tangent, where the device is NVIDIA's.
    """
    x, weight = x.contiguous(), weight.contiguous()
    B, H, W, F = x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2
    out = x.new_empty((B, H, W, F))
    pairs = B * triton.cdiv(F, BLOCK_F) * triton.cdiv(H, 2)
    is_long = pairs * triton.cdiv(W, SEGMENT) >= ENOUGH
    segment = min(SEGMENT if is_long else SHORTER, triton.next_power_of_2(W))
    segments = triton.cdiv(W, segment)
    is_nvidia = x.is_cuda and torch.version.hip is None
    grid = (triton.cdiv(F, BLOCK_F), triton.cdiv(H, 2) * segments, B)
    _glu_depthwise[grid](
        x, weight, bias, out, H, W, segments,
        F=F, SEGMENT=segment, BLOCK_F=BLOCK_F, num_warps=NUM_WARPS,
        FAST=2 if fast and is_nvidia else 0,
        # Triton's own SiLU takes more registers: some values would go to memory.
        BOTH=BOTH_AHEAD and (fast or not is_nvidia),
        **({"maxnreg": MOST_REGISTERS} if is_nvidia else {}),
    )  # fmt: skip
    return out


@glu_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, fast: bool) -> Tensor:
    return x.new_empty((*x.shape[:3], x.shape[3] // 2))
