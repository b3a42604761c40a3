"""Softmax attention from image tokens to a short text, forward only, with a bias for its mask.

One pass with a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867; Dao et al.,
arXiv 2205.14135): a program holds a block of queries and walks over the text. Scores, sums and the
result are fp32 until it is rounded once; the weights of the second product are rounded to the
inputs' 16 bits, as in torch's own kernels. Any head width up to 256, so that Sana's 112 and 72 need
no padding in memory.

Shape letters: B batch, H heads, N queries, T text tokens, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import op

BLOCK_N = 64
BLOCK_T = 64
NUM_WARPS = 4
NUM_STAGES = 3
WIDEST = 256
LOG2_E = 1.4426950408889634


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, H, N, T, scale, log2_e,
    qB, qH, qN, kB, kH, kT, vB, vH, vT, bB, oB, oH, oN,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    group = tl.program_id(1).to(tl.int64)
    batch, head = group // H, group % H
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    q_ptr += batch * qB + head * qH
    k_ptr += batch * kB + head * kH
    v_ptr += batch * vB + head * vH
    q = tl.load(q_ptr + n[:, None] * qN + d[None, :], mask=inside, other=0.0)
    largest = tl.full((BLOCK_N,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    mixed = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = (t < T)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + t[:, None] * kT + d[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * (scale * log2_e)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + batch * bB + t, mask=t < T, other=0.0).to(tl.float32)
            scores += bias[None, :] * log2_e
        scores = tl.where((t < T)[None, :], scores, -1e30)
        above = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - above)
        weights = tl.exp2(scores - above[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + t[:, None] * vT + d[None, :], mask=there, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        largest = above
    out = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    at = out_ptr + batch * oB + head * oH + n[:, None] * oN + d[None, :]
    tl.store(at, out, mask=inside)


def supports(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes the inputs: 16 bits, one dtype, a bias for the text tokens alone."""
    alike = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    shape = (k.shape[0], 1, 1, k.shape[2])
    return alike and q.shape[-1] <= WIDEST and (bias is None or bias.shape == shape)


@op("cross_attention")
def cross_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """q (B, H, N, D), k and v (B, H, T, D), bias (B, 1, 1, T) -> (B, H, N, D).

    The result is a view of (B, N, H, D) memory, so that joining the heads costs nothing.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    B, H, N, D = q.shape
    T = k.shape[2]
    out = q.new_empty((B, N, H, D)).transpose(1, 2)
    own = q if bias is None else bias.contiguous()
    _attend[(triton.cdiv(N, BLOCK_N), B * H)](
        q, k, v, own, out, H, N, T, D**-0.5, LOG2_E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], own.stride(0), *out.stride()[:3],
        D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_N=BLOCK_N, BLOCK_T=BLOCK_T,
        HAS_BIAS=bias is not None, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return out


@cross_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    B, H, N, D = q.shape
    return q.new_empty((B, N, H, D)).transpose(1, 2)
