"""Gradients of the middle of the mix-FFN (`glumbconv`), from its input alone.

With s = silu(x), (v, g) = depthwise3x3(s) + bias and out = v silu(g): a first pass takes v and g
anew and writes their gradients dv = dout silu(g), dg = dout v silu'(g); on its way it sums those of
the weights, dW[tap] = sum over cells of d[cell] s[cell + tap], a row of sums for each program. A
second pass makes dx = silu'(x) (d convolved with the weights turned round). Programs walk along two
rows as in the forward pass, three columns of them in registers. Products and sums are fp32, and
nothing depends on the order in which programs run.

Shape letters: B batch, H W grid, F channels of value or gate, C = 2F, P rows of sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.cells import load_cell, raw_column
from sana.kernels.glumbconv import SEGMENT, _activated, _taps, glu_depthwise
from sana.kernels.launching import op

SUMMING_F = 64
"""Channels of a program of the first pass, which has the most to keep in registers."""
BLOCK_C = 128
SUMMING_WARPS = 2
NUM_WARPS = 1
ROWS_OF_SUMS = 128
"""So many at most, where the batch is no larger."""


@triton.jit
def _zeros(BLOCK: tl.constexpr):
    """A column of zeros of its own.

    Two columns that begin as the same zeros, the one to become the other, are not carried from
    step to step by triton 3.6: it takes the assignment for none. Its interpreter carries them.
    """
    z = tl.zeros((BLOCK,), tl.float32)
    return z, z, z, z


@triton.jit
def _column(ptr, h, w, H, W, C, c, end, FAST: tl.constexpr):
    """silu of four cells of column w, from row h - 1 on."""
    t0, t1, t2, t3 = raw_column(ptr, h, w, H, W, C, c, end)
    return _activated(t0, t1, t2, t3, FAST)


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    """FAST: (1 + tanh(x / 2)) / 2, approximated as in `glumbconv`."""
    if FAST:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 h, t;
            mul.f32 h, $1, 0f3F000000;
            tanh.approx.f32 t, h;
            fma.rn.f32 $0, t, 0f3F000000, 0f3F000000;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.sigmoid(x)


@triton.jit
def _slope(x, s):
    """The derivative of silu, with the sigmoid of x."""
    return s * (1 + x * (1 - s))


@triton.jit
def _gate_gradients(out, value, gate, FAST: tl.constexpr):
    """Of value and gate, from the gradient of value * silu(gate)."""
    s = _sigmoid(gate, FAST)
    return out * gate * s, out * value * _slope(gate, s)


@triton.jit
def _convolve(start, t, a, b, c, TOP: tl.constexpr):
    """`start` plus the taps times three cells, from TOP on, of each of three columns."""
    upper = t[0] * a[TOP] + t[1] * b[TOP] + t[2] * c[TOP]
    middle = t[3] * a[TOP + 1] + t[4] * b[TOP + 1] + t[5] * c[TOP + 1]
    lower = t[6] * a[TOP + 2] + t[7] * b[TOP + 2] + t[8] * c[TOP + 2]
    return start + upper + middle + lower


@triton.jit
def _weigh(k, d_0, d_1, a, b, c):
    """Sums for nine taps and the bias, with the gradients of two cells, one above the other."""
    return (
        k[0] + d_0 * a[0] + d_1 * a[1],
        k[1] + d_0 * b[0] + d_1 * b[1],
        k[2] + d_0 * c[0] + d_1 * c[1],
        k[3] + d_0 * a[1] + d_1 * a[2],
        k[4] + d_0 * b[1] + d_1 * b[2],
        k[5] + d_0 * c[1] + d_1 * c[2],
        k[6] + d_0 * a[2] + d_1 * a[3],
        k[7] + d_0 * b[2] + d_1 * b[3],
        k[8] + d_0 * c[2] + d_1 * c[3],
        k[9] + d_0 + d_1,
    )


@triton.jit
def _store_sums(at, C, c, inside, k):
    """Of weights (C, 9), and behind them of biases (C,)."""
    for tap in tl.static_range(9):
        tl.store(at + c * 9 + tap, k[tap], mask=inside)
    tl.store(at + 9 * C + c, k[9], mask=inside)


@triton.jit
def _depthwise_gradients(
    x_ptr, weight_ptr, bias_ptr, g_ptr, d_ptr, sums_ptr, H, W, F, PAIRS, SEGMENTS,
    SEGMENT: tl.constexpr, BLOCK_F: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dv and dg in PAIRS pairs of rows of SEGMENT columns, and a row of sums for the weights."""
    v = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    g, C, inside = v + F, 2 * F, v < F
    first = tl.program_id(1) // SEGMENTS * PAIRS
    start = tl.program_id(1) % SEGMENTS * SEGMENT
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * H * W * C
    d_ptr += batch * H * W * C
    g_ptr += batch * H * W * F
    taps_v, taps_g = _taps(weight_ptr, v, inside), _taps(weight_ptr, g, inside)
    bias_v = tl.load(bias_ptr + v, mask=inside, other=0.0).to(tl.float32)
    bias_g = tl.load(bias_ptr + g, mask=inside, other=0.0).to(tl.float32)
    o = tl.zeros((BLOCK_F,), tl.float32)
    sums_v, sums_g = (o, o, o, o, o, o, o, o, o, o), (o, o, o, o, o, o, o, o, o, o)
    for pair in range(PAIRS):
        h = (first + pair) * 2
        # Three columns of value and of gate, the third just read; the middle one is done.
        av, bv, ag, bg = _zeros(BLOCK_F), (o, o, o, o), _zeros(BLOCK_F), (o, o, o, o)
        for step in range(SEGMENT + 2):
            w = start + step - 1
            cv = _column(x_ptr, h, w, H, W, C, v, F, FAST)
            cg = _column(x_ptr, h, w, H, W, C, g, C, FAST)
            last = tl.where((w > start) & (w <= W) & (h < H), F, 0)
            lower = tl.where(h + 1 < H, last, 0)
            out_0 = load_cell(g_ptr, h, w - 1, H, W, F, v, last)
            out_1 = load_cell(g_ptr, h + 1, w - 1, H, W, F, v, lower)
            gate_0 = _convolve(bias_g, taps_g, ag, bg, cg, 0)
            gate_1 = _convolve(bias_g, taps_g, ag, bg, cg, 1)
            value_0 = _convolve(bias_v, taps_v, av, bv, cv, 0)
            value_1 = _convolve(bias_v, taps_v, av, bv, cv, 1)
            dv_0, dg_0 = _gate_gradients(out_0, value_0, gate_0, FAST)
            dv_1, dg_1 = _gate_gradients(out_1, value_1, gate_1, FAST)
            at = d_ptr + (h * W + w - 1) * C + v
            tl.store(at, dv_0.to(d_ptr.dtype.element_ty), mask=v < last)
            tl.store(at + F, dg_0.to(d_ptr.dtype.element_ty), mask=v < last)
            tl.store(at + W * C, dv_1.to(d_ptr.dtype.element_ty), mask=v < lower)
            tl.store(at + W * C + F, dg_1.to(d_ptr.dtype.element_ty), mask=v < lower)
            sums_v = _weigh(sums_v, dv_0, dv_1, av, bv, cv)
            sums_g = _weigh(sums_g, dg_0, dg_1, ag, bg, cg)
            av, bv, ag, bg = bv, cv, bg, cg
    at = sums_ptr + (batch * tl.num_programs(1) + tl.program_id(1)) * 10 * C
    _store_sums(at, C, v, inside, sums_v)
    _store_sums(at, C, g, inside, sums_g)


@triton.jit
def _input_gradients(
    x_ptr, weight_ptr, d_ptr, dx_ptr, H, W, C, SEGMENTS,
    SEGMENT: tl.constexpr, BLOCK_C: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dx in two rows of SEGMENT columns."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = tl.program_id(1) // SEGMENTS * 2
    start = tl.program_id(1) % SEGMENTS * SEGMENT
    sample = tl.program_id(2).to(tl.int64) * H * W * C
    x_ptr += sample
    d_ptr += sample
    dx_ptr += sample
    t8, t7, t6, t5, t4, t3, t2, t1, t0 = _taps(weight_ptr, channel, channel < C)
    taps = (t0, t1, t2, t3, t4, t5, t6, t7, t8)
    o = tl.zeros((BLOCK_C,), tl.float32)
    a, b = _zeros(BLOCK_C), (o, o, o, o)
    for step in range(SEGMENT + 2):
        w = start + step - 1
        c = (
            load_cell(d_ptr, h - 1, w, H, W, C, channel, C),
            load_cell(d_ptr, h, w, H, W, C, channel, C),
            load_cell(d_ptr, h + 1, w, H, W, C, channel, C),
            load_cell(d_ptr, h + 2, w, H, W, C, channel, C),
        )
        last = tl.where((w > start) & (w <= W), C, 0)
        lower = tl.where(h + 1 < H, last, 0)
        x_0 = load_cell(x_ptr, h, w - 1, H, W, C, channel, last)
        x_1 = load_cell(x_ptr, h + 1, w - 1, H, W, C, channel, lower)
        dx_0 = _convolve(o, taps, a, b, c, 0) * _slope(x_0, _sigmoid(x_0, FAST))
        dx_1 = _convolve(o, taps, a, b, c, 1) * _slope(x_1, _sigmoid(x_1, FAST))
        at = dx_ptr + (h * W + w - 1) * C + channel
        tl.store(at, dx_0.to(dx_ptr.dtype.element_ty), mask=channel < last)
        tl.store(at + W * C, dx_1.to(dx_ptr.dtype.element_ty), mask=channel < lower)
        a, b = b, c


@op("glu_depthwise_backward")
def glu_depthwise_backward(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, fast: bool
) -> tuple[Tensor, Tensor]:
    """g (B, H, W, F), x (B, H, W, 2F) -> dx like x, and (20 F,) in fp32.

    The latter is the gradient of the weight, (2F, 1, 3, 3), and behind it that of the bias.
    """
    g, x, weight = g.contiguous(), x.contiguous(), weight.contiguous()
    B, H, W, C = x.shape
    fast = fast and x.is_cuda and torch.version.hip is None
    d, dx = torch.empty_like(x), torch.empty_like(x)
    segment = min(SEGMENT, triton.next_power_of_2(W))
    segments, pairs = triton.cdiv(W, segment), triton.cdiv(H, 2)
    own = triton.cdiv(pairs, max(1, min(pairs, ROWS_OF_SUMS // (B * segments))))
    rows = triton.cdiv(pairs, own) * segments
    sums = x.new_empty((B * rows, 10 * C), dtype=torch.float32)
    _depthwise_gradients[(triton.cdiv(C // 2, SUMMING_F), rows, B)](
        x, weight, bias, g, d, sums, H, W, C // 2, own, segments,
        SEGMENT=segment, BLOCK_F=SUMMING_F, FAST=fast, num_warps=SUMMING_WARPS,
    )  # fmt: skip
    _input_gradients[(triton.cdiv(C, BLOCK_C), pairs * segments, B)](
        x, weight, d, dx, H, W, C, segments, SEGMENT=segment, BLOCK_C=BLOCK_C, FAST=fast,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return dx, sums.sum(0)


@glu_depthwise_backward.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, fast: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(10 * x.shape[3], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.fast = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, sums = glu_depthwise_backward.behind(ctx)(g, x, weight, bias, ctx.fast)
    dweight, dbias = sums.split([weight.numel(), bias.numel()])
    return dx, dweight.view(weight.shape).to(weight.dtype), dbias.to(bias.dtype), None


glu_depthwise.register_autograd(_differentiate, setup_context=_keep)

trained = glu_depthwise
"""The same, which has gradients from here on."""
