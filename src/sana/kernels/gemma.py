"""Gemma-2 for few tokens: what stands between its products, each in one pass, forward only.

Norms around the residual (Gemma 2, arXiv 2408.00118, section 2): total = x + N(branch), then
N(total), where N is RMSNorm with the factor 1 + weight; rounded where the plain path rounds.
Attention of new tokens to those before and to each other: rotary positions, logits under a soft
cap, a running maximum and sum (Dao et al., arXiv 2205.14135). It reads the products' rows and the
memory where they lie; sums are fp32, and turned vectors and weights are rounded to the inputs'
digits. The gated MLP's middle: gelu(gate) * up, rounded once.

Shape letters: B prompts, P tokens before, T new tokens, H query heads, K key heads, D head width,
C channels, F mlp width. A program of `_attend` has M queries of a head and walks over N keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels import norms
from sana.kernels.launching import op
from sana.kernels.norms import has_rows

BLOCK_M = 16
BLOCK_P = 64
"""Keys at a time of the tokens before."""
BLOCK_N = 32
"""New keys at a time, which are turned on the way."""
NUM_WARPS = 4
NUM_STAGES = 2
BLOCK_F = 1024
WIDEST_HEAD = 256
HIGHEST = 1000.0
"""Soft cap."""


@triton.jit
def _normed(x, weight_ptr, c, C, eps):
    """x / rms(x) * (1 + weight) of one row in fp32, zero outside."""
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * (1 + weight)


@triton.jit
def _sandwich_norm(
    x_ptr, branch_ptr, after_ptr, before_ptr, total_ptr, normed_ptr, C, eps,
    HAS_BRANCH: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `total` and `normed`."""
    row = tl.program_id(0).to(tl.int64) * C
    c = tl.arange(0, BLOCK)
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row + c, mask=c < C, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + row + c, mask=c < C, other=0.0).to(tl.float32)
        branch = _normed(branch, after_ptr, c, C, eps).to(dtype).to(tl.float32)
        total = (x + branch).to(dtype)
        tl.store(total_ptr + row + c, total, mask=c < C)
        x = total.to(tl.float32)
    if HAS_NORM:
        normed = _normed(x, before_ptr, c, C, eps).to(dtype)
        tl.store(normed_ptr + row + c, normed, mask=c < C)


@triton.jit
def _gelu_gate(gate_ptr, up_ptr, out_ptr, F, gM, uM, BLOCK_F: tl.constexpr):
    """A stretch of one row; gelu(x) = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate = tl.load(gate_ptr + row * gM + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * uM + f, mask=f < F, other=0.0).to(tl.float32)
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    out = gate * tl.sigmoid(2 * z) * up
    tl.store(out_ptr + row * F + f, out.to(out_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def _turned(at, cosine_ptr, sine_ptr, inside, HALF: tl.constexpr):
    """Both halves of the rows at `at`, turned in fp32 by the rows of cosine and sine."""
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    cosine = tl.load(cosine_ptr, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sine_ptr, mask=inside, other=0.0).to(tl.float32)
    return (
        (first * cosine - second * sine).to(dtype),
        (second * cosine + first * sine).to(dtype),
    )


@triton.jit
def _logits(q_first, q_second, k_first, k_second, scale, cap, HAS_CAP: tl.constexpr):
    """(M, N): scaled products, as cap tanh(. / cap) = cap - 2 cap / (1 + exp(2 . / cap))."""
    scores = tl.dot(q_first, tl.trans(k_first), input_precision="ieee")
    scores += tl.dot(q_second, tl.trans(k_second), input_precision="ieee")
    scores = scores * scale
    if HAS_CAP:
        scores = cap - 2 * cap / (1 + tl.exp(scores * (2 / cap)))
    return scores


@triton.jit
def _mix(scores, v, largest, total, mixed):
    """The running maximum, sum of weights and weighted sum of values, with one block more."""
    above = tl.maximum(largest, tl.max(scores, 1))
    shrink = tl.exp(largest - above)
    weights = tl.exp(scores - above[:, None])
    total = total * shrink + tl.sum(weights, 1)
    more = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return above, total, mixed * shrink[:, None] + more


@triton.jit
def _over_past(
    q_first, q_second, k_ptr, v_ptr, P, scale, cap, kP, vP, h, d, largest, total, mixed,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """All queries see all tokens before, whose keys are turned."""
    for start in range(0, P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        there = (p < P)[:, None]
        at = k_ptr + p[:, None] * kP + h[None, :]
        first = tl.load(at, mask=there & (h < HALF)[None, :], other=0.0)
        second = tl.load(at + HALF, mask=there & (h < HALF)[None, :], other=0.0)
        at = v_ptr + p[:, None] * vP + d[None, :]
        v = tl.load(at, mask=there & (d < D)[None, :], other=0.0)
        scores = _logits(q_first, q_second, first, second, scale, cap, HAS_CAP)
        scores = tl.where((p < P)[None, :], scores, -1e30)
        largest, total, mixed = _mix(scores, v, largest, total, mixed)
    return largest, total, mixed


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, past_k, past_v, mask_ptr, cosine_ptr, sine_ptr, out_ptr,
    H, GROUP, P, T, scale, cap,
    qB, qT, kB, kT, vB, vT, pkB, pkH, pkP, pvB, pvH, pvP, cT,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_PAST: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    own = head // GROUP
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (h < HALF)[None, :]
    q_at = q_ptr + batch * qB + t[:, None] * qT + head * D + h[None, :]
    turn = t[:, None] * cT + h[None, :]
    q_first, q_second = _turned(q_at, cosine_ptr + turn, sine_ptr + turn, inside, HALF)
    largest = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if HAS_PAST:
        largest, total, mixed = _over_past(
            q_first, q_second, past_k + batch * pkB + own * pkH, past_v + batch * pvB + own * pvH,
            P, scale, cap, pkP, pvP, h, d, largest, total, mixed, D, HALF, BLOCK_P, HAS_CAP,
        )  # fmt: skip
    k_ptr += batch * kB + own * D
    v_ptr += batch * vB + own * D
    end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, T)
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_at = k_ptr + n[:, None] * kT + h[None, :]
        k_turn = n[:, None] * cT + h[None, :]
        there = (n < T)[:, None] & (h < HALF)[None, :]
        first, second = _turned(k_at, cosine_ptr + k_turn, sine_ptr + k_turn, there, HALF)
        v_at = v_ptr + n[:, None] * vT + d[None, :]
        v = tl.load(v_at, mask=(n < T)[:, None] & (d < D)[None, :], other=0.0)
        scores = _logits(q_first, q_second, first, second, scale, cap, HAS_CAP)
        is_seen = (n[None, :] <= t[:, None]) & (n < T)[None, :]
        if HAS_MASK:
            is_real = tl.load(mask_ptr + batch * T + n, mask=n < T, other=0) != 0
            is_seen = is_seen & is_real[None, :]
        scores = tl.where(is_seen, scores, -1e30)
        largest, total, mixed = _mix(scores, v, largest, total, mixed)
    out_at = out_ptr + ((batch * T + t[:, None]) * H + head) * D + d[None, :]
    out = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_at, out, mask=(t < T)[:, None] & (d < D)[None, :])


@op("gemma_norm")
def sandwich_norm(
    x: Tensor, branch: Tensor | None, after: Tensor | None, before: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x, branch (B, T, C), weights `after` and `before` (C,) -> total, normed (B, T, C).

    Without a branch there is no total, without `before` no normed: they have no elements then.
    """
    x = x.contiguous()
    C = x.shape[-1]
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    normed = x.new_empty(0) if before is None else torch.empty_like(x)
    block = triton.next_power_of_2(C)
    _sandwich_norm[(x.numel() // C,)](
        x, x if branch is None else branch.contiguous(), x if after is None else after,
        x if before is None else before, total, normed, C, eps,
        HAS_BRANCH=branch is not None, HAS_NORM=before is not None, BLOCK=block,
        num_warps=4 if block <= 1024 else 8,
    )  # fmt: skip
    return total, normed


@sandwich_norm.register_fake
def _(
    x: Tensor, branch: Tensor | None, after: Tensor | None, before: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    parts = (x.new_empty(0 if part is None else x.shape) for part in (branch, before))
    total, normed = parts
    return total, normed


@op("gelu_gate")
def gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (B, T, F), perhaps slices of wider rows -> gelu(gate) * up, contiguous."""
    gate, up = (x if has_rows(x) else x.contiguous() for x in (gate, up))
    F = gate.shape[-1]
    out = gate.new_empty(gate.shape)
    grid = (gate.numel() // F, triton.cdiv(F, BLOCK_F))
    _gelu_gate[grid](gate, up, out, F, gate.stride(1), up.stride(1), BLOCK_F=BLOCK_F, num_warps=4)
    return out


@gelu_gate.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def takes(x: Tensor, head_dim: int, cap: float) -> bool:
    """Whether `prompt_attention` knows dtype, heads and cap: bf16 and fp16 on a GPU.

    Triton's interpreter has no products in bf16, and takes fp32 for tests. A logit is computed to a
    fraction of the cap, so that may not be high.
    """
    known = (torch.bfloat16, torch.float16) if x.is_cuda else (torch.float16, torch.float32)
    is_known = x.dtype in known and head_dim % 2 == 0 and head_dim <= WIDEST_HEAD
    return is_known and (cap <= HIGHEST or cap == math.inf)


@op("prompt_attention")
def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turns: list[Tensor],
    memory: list[Tensor],
    mask: Tensor | None,
    head_dim: int,
    scale: float,
    cap: float,
) -> Tensor:
    """q (B, T, H D), k and v (B, T, K D), perhaps slices of wider rows -> (B, T, H D).

    `turns` are cosine and sine (T, D) of the new tokens, `memory` is empty or turned keys and
    values (B, K, P, D); mask (B, T) is true for the new keys that count. Logits are products times
    `scale`, under `cap` unless it is infinite.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    past = [x if x.stride(-1) == 1 else x.contiguous() for x in memory]
    cosine, sine = (x.contiguous() for x in turns)
    B, T = q.shape[:2]
    H = q.shape[2] // head_dim
    out = q.new_empty(q.shape)
    marks = out if mask is None else mask.bool().contiguous().view(torch.uint8)
    strides = [x.stride()[:3] for x in past] if past else [(0, 0, 0), (0, 0, 0)]
    _attend[(triton.cdiv(T, BLOCK_M), B * H)](
        q, k, v, *(past or (k, v)), marks, cosine, sine, out,
        H, H * head_dim // k.shape[2], past[0].shape[2] if past else 0, T, scale,
        cap if math.isfinite(cap) else 1.0,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *strides[0], *strides[1],
        cosine.stride(0), D=head_dim, HALF=head_dim // 2,
        BLOCK_H=max(16, triton.next_power_of_2(head_dim // 2)),
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=BLOCK_M, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N,
        HAS_PAST=bool(past), HAS_MASK=mask is not None, HAS_CAP=math.isfinite(cap),
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return out


@prompt_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def supports(x: Tensor, *others: Tensor | None) -> bool:
    """Whether norm and gate take these: rows (B, T, C) and weights of one dtype of 32 bits."""
    return x.dim() == 3 and norms.supports(x, *others)
