"""ReLU linear attention with all tokens of a head in one program, forward only.

As `linear_attention`, where there are heads enough to fill a GPU: first the keys and values of all
tokens, whose sums stay in registers, then the queries. So no state goes through memory, which
in parts is read anew by every block of queries. Sums are fp32.

Shape letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import op
from sana.kernels.linear_attention import (
    exact_products,
    last_is_dense,
    token_major,
    wide_products,
)

BLOCK_N = 64
NUM_WARPS = 4
NUM_STAGES = 3
FEWEST = 1024
"""Heads of all samples: eight for each of a GPU's processors."""


@triton.jit
def _summed(
    k_ptr, v_ptr, N, kN, vN,
    D: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr, NARROW: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """S = relu(k)^T v and z = sum relu(k) of one head."""
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK_N)
    # Small offsets from one address that moves on, which take few registers.
    k_at = n[:, None] * kN + d[None, :]
    v_at = n[:, None] * vN + d[None, :]
    state = tl.zeros((D, D), tl.float32)
    summed = tl.zeros((BLOCK_N, D), tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=NUM_STAGES):
        inside = (start + n < N)[:, None]
        k = tl.load(k_ptr + k_at, mask=inside, other=0.0)
        v = tl.load(v_ptr + v_at, mask=inside, other=0.0)
        key = k.to(tl.float32)
        key = tl.where(key > 0, key, 0.0)
        summed += key
        if NARROW:  # products of 16-bit numbers are exact in fp32
            state += tl.dot(tl.trans(key.to(k.dtype)), v)
        else:
            state += tl.dot(tl.trans(key), v.to(tl.float32), input_precision=EXACT)
        k_ptr += BLOCK_N * kN
        v_ptr += BLOCK_N * vN
    return state, tl.sum(summed, 0)


@triton.jit
def _attend_heads(
    q_ptr, k_ptr, v_ptr, out_ptr, H, N, eps,
    qB, qH, qN, kB, kH, kN, vB, vH, vN, oB, oH, oN,
    D: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
    NARROW: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """out = relu(q) S / (relu(q) z + eps) of one head, S = relu(k)^T v, z = sum relu(k)."""
    group = tl.program_id(0)
    batch, head = (group // H).to(tl.int64), group % H
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK_N)
    q_ptr += batch * qB + head * qH
    k_ptr += batch * kB + head * kH
    v_ptr += batch * vB + head * vH
    out_ptr += batch * oB + head * oH
    state, norm = _summed(k_ptr, v_ptr, N, kN, vN, D, BLOCK_N, EXACT, NARROW, NUM_STAGES)
    # The state in two parts, of eight bits each in bf16.
    high = state.to(q_ptr.dtype.element_ty)
    low = (state - high.to(tl.float32)).to(q_ptr.dtype.element_ty)
    q_at = n[:, None] * qN + d[None, :]
    out_at = n[:, None] * oN + d[None, :]
    for start in tl.range(0, N, BLOCK_N, num_stages=NUM_STAGES):
        inside = (start + n < N)[:, None]
        given = tl.load(q_ptr + q_at, mask=inside, other=0.0)
        q = given.to(tl.float32)
        q = tl.where(q > 0, q, 0.0)
        total = tl.sum(q * norm[None, :], 1) + eps
        if NARROW:
            narrow = q.to(given.dtype)
            out = (tl.dot(narrow, high) + tl.dot(narrow, low)) / total[:, None]
        else:
            out = tl.dot(q, state, input_precision=WIDE) / total[:, None]
        out = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_at, out, mask=inside)
        q_ptr += BLOCK_N * qN
        out_ptr += BLOCK_N * oN


def fills(q: Tensor) -> bool:
    """Whether q (B, H, N, D) has heads enough that one program for each keeps a GPU busy."""
    return q.shape[0] * q.shape[1] >= FEWEST


@op("whole_heads")
def whole_heads(q: Tensor, k: Tensor, v: Tensor, eps: float, narrow: bool = False) -> Tensor:
    """q, k, v (B, H, N, D) -> (B, H, N, D), as the first of `linear_attention`'s results."""
    narrow = narrow and q.dtype.itemsize == 2
    q, k, v = (last_is_dense(x) for x in (q, k, v))
    B, H, N, D = q.shape
    out = token_major(v)
    _attend_heads[(B * H,)](
        q, k, v, out, H, N, eps,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        D=D, BLOCK_N=BLOCK_N, EXACT=exact_products(q), WIDE=wide_products(q), NARROW=narrow,
        NUM_STAGES=NUM_STAGES, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@whole_heads.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor, _eps: float, _narrow: bool = False) -> Tensor:
    return token_major(v)
