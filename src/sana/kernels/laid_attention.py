"""Softmax attention from image tokens to a text that was laid out for it once, forward only.

As `cross_attention`, in one pass with a running maximum. Keys and values stand in tiles WIDE
columns wide, more than a head has: a key's column D holds its mask's bias over the scale, which a
query's 1 there adds to the score; a value's column D holds 1, whose sum is the softmax's
denominator. So nothing in the loop is masked, loaded beside the tiles or summed across threads.
The loop ends after the last token that counts. Memory for tokens behind the text is never looked
at: its bias is the lowest there is.

Shape letters: B batch, H heads, N queries, T text tokens, P places for them, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import op

BLOCK_N = 64
BLOCK_T = 32
"""With so few, three programs fit on a processor: all of a picture's 1024 tokens at a time."""
NUM_WARPS = 4
NUM_STAGES = 3
PLACES = 64
"""There are a multiple of so many, and so of BLOCK_T."""
WIDEST = 255
LOWEST = {torch.float16: -65504.0, torch.bfloat16: -1e30}
"""The bias of places without a token; that of tokens stays a tenth above it."""
LOG2_E = 1.4426950408889634


@triton.jit
def _lay(
    k_ptr, v_ptr, bias_ptr, keys_ptr, values_ptr, H, T, P, tilt, lowest,
    kB, kH, kT, vB, vH, vT, bB,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK_T: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """BLOCK_T places of one head; `tilt` is one over the scale."""
    group = tl.program_id(1).to(tl.int64)
    batch, head = group // H, group % H
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, WIDE)
    inside = (t < T)[:, None] & (d < D)[None, :]
    k_ptr += batch * kB + tl.multiple_of(head * kH, 8)
    v_ptr += batch * vB + tl.multiple_of(head * vH, 8)
    k = tl.load(k_ptr + t[:, None] * kT + d[None, :], mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + t[:, None] * vT + d[None, :], mask=inside, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_T,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + batch * bB + t, mask=t < T, other=0.0).to(tl.float32) * tilt
    bias = tl.where(t < T, tl.maximum(bias, 0.9 * lowest), lowest)
    is_extra = (d == D)[None, :]
    k = tl.where(is_extra, bias[:, None], k)
    v = tl.where(is_extra, 1.0, v)
    at = (group * P + t[:, None]) * WIDE + d[None, :]
    tl.store(keys_ptr + at, k.to(keys_ptr.dtype.element_ty))
    tl.store(values_ptr + at, v.to(values_ptr.dtype.element_ty))


@triton.jit
def _attend(
    q_ptr, keys_ptr, values_ptr, count_ptr, out_ptr, H, N, P, steep,
    qB, qH, qN, oB, oH, oN,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head; `steep` is the scale for powers of two."""
    group = tl.program_id(1).to(tl.int64)
    batch, head = group // H, group % H
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, WIDE)
    t = tl.arange(0, BLOCK_T)
    # Heads begin at multiples of 16 bytes, also where they are 72 wide.
    q_ptr += batch * qB + tl.multiple_of(head * qH, 8)
    out_ptr += batch * oB + tl.multiple_of(head * oH, 8)
    inside = (n < N)[:, None] & (d < D)[None, :]
    # So that it is as it was loaded: what was computed would be read for each product anew.
    one = tl.where((d == D)[None, :], 1.0, tl.zeros((BLOCK_N, WIDE), tl.float32))
    one = one.to(q_ptr.dtype.element_ty)
    q = tl.load(q_ptr + n[:, None] * qN + d[None, :], mask=inside, other=one)
    keys_ptr += (group * P + t[:, None]) * WIDE + d[None, :]
    values_ptr += (group * P + t[:, None]) * WIDE + d[None, :]
    count = tl.load(count_ptr + batch)
    largest = tl.full((BLOCK_N,), -1e30, tl.float32)
    mixed = tl.zeros((BLOCK_N, WIDE), tl.float32)
    for start in range(0, count, BLOCK_T):
        k = tl.load(keys_ptr + start * WIDE)
        scores = tl.dot(q, tl.trans(k))
        above = tl.maximum(largest, tl.max(scores, 1) * steep)
        weights = tl.exp2(scores * steep - above[:, None])
        v = tl.load(values_ptr + start * WIDE)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * tl.exp2(largest - above)[:, None])
        largest = above
    total = tl.sum(tl.where((d == D)[None, :], mixed, 0.0), 1)
    out = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + n[:, None] * oN + d[None, :], out, mask=inside)


def supports(k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels take keys and values (B, H, T, D) and a bias (B, 1, 1, T) for them."""
    if k.dtype != v.dtype or k.dtype not in LOWEST or bias is not None and bias.dtype != k.dtype:
        return False
    shape = (k.shape[0], 1, 1, k.shape[2])
    return _is_whole(k.shape[-1]) and (bias is None or bias.shape == shape)


@op("laid_text")
def laid_text(k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v (B, H, T, D), bias (B, 1, 1, T) on scores -> both as tiles (B, H, P, WIDE)."""
    k, v = (_aligned(x) for x in (k, v))
    B, H, T, D = k.shape
    keys, values = _tiles(k), _tiles(k)
    places, wide = keys.shape[2:]
    own = k if bias is None else bias.contiguous()
    _lay[(places // PLACES, B * H)](
        k, v, own, keys, values, H, T, places, D**0.5, LOWEST[k.dtype],
        *k.stride()[:3], *v.stride()[:3], own.stride(0),
        D=D, WIDE=wide, BLOCK_T=PLACES, HAS_BIAS=bias is not None, num_warps=4,
    )  # fmt: skip
    return keys, values


@laid_text.register_fake
def _(k: Tensor, _v: Tensor, _bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _tiles(k), _tiles(k)


@op("laid_attention")
def laid_attention(q: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """q (B, H, N, D), a text from `laid_text`, how many tokens of it to look at (B,) in int32.

    (B, H, N, D) comes out, a view of (B, N, H, D) memory: joining the heads costs nothing.
    """
    q = _aligned(q)
    B, H, N, D = q.shape
    out = q.new_empty((B, N, H, D)).transpose(1, 2)
    _attend[(triton.cdiv(N, BLOCK_N), B * H)](
        q, keys, values, counts, out, H, N, keys.shape[2], D**-0.5 * LOG2_E,
        *q.stride()[:3], *out.stride()[:3],
        D=D, WIDE=keys.shape[3], BLOCK_N=BLOCK_N, BLOCK_T=BLOCK_T,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return out


@laid_attention.register_fake
def _(q: Tensor, _keys: Tensor, _values: Tensor, _counts: Tensor) -> Tensor:
    B, H, N, D = q.shape
    return q.new_empty((B, N, H, D)).transpose(1, 2)


def _is_whole(width: int) -> bool:
    """Whether heads so wide begin at multiples of 16 bytes and leave a column free."""
    return width % 8 == 0 and width <= WIDEST


def _aligned(x: Tensor) -> Tensor:
    """x (B, H, ., D), with heads and rows at multiples of 16 bytes."""
    *strides, last = x.stride()
    return x.contiguous() if last != 1 or any(stride % 8 for stride in strides) else x


def _tiles(k: Tensor) -> Tensor:
    """Memory for keys or values like k (B, H, T, D)."""
    B, H, T, D = k.shape
    wide = max(16, triton.next_power_of_2(D + 1))
    return k.new_empty((B, H, triton.cdiv(T, PLACES) * PLACES, wide))
