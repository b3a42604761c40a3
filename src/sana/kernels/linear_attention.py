"""ReLU linear attention in Triton, forward and backward (Sana, arXiv 2410.10629, eq. 2).

Forward: S = relu(k)^T v and z = sum relu(k) in fp32, one pass over the tokens in P parts; then
out = relu(q) S / (relu(q) z + eps), a second pass. Backward is two passes of the same shape.
Nothing of size N is kept but the inputs. Sums are fp32, and in the forward pass so are products
(see `exact_products`, `wide_products`), so its result is the reference's up to the order of
summation.

Shape letters, as suffixes: B batch, H heads, N tokens, D head width, G = B x H, P parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana.kernels.launching import asks_gradient, op
from sana.kernels.reference import thirds

BLOCK_N = 64
NUM_WARPS = 2
APPLY_BLOCK = 128
APPLY_WARPS = 4
TOKENS_OF_A_PART = 256
"""At least; few enough that all parts together fill a GPU."""
MOST_PARTS = 8
"""Every program of the second pass sums them up."""
FULL = 512
"""Programs with which half as many parts are enough."""
WIDTHS = (16, 32, 64, 128)


@triton.jit
def _sum_keys(
    k_ptr, v_ptr, state_ptr, norm_ptr, H, N, P,
    kB, kH, kN, vB, vH, vN,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, EXACT: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """State (G, P, D, D) and norm (G, P, D) of each part of PART tokens."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = group // H, group % H
    d = tl.arange(0, D)
    k_ptr += batch * kB + head * kH
    v_ptr += batch * vB + head * vH
    state = tl.zeros((D, D), tl.float32)
    norm = tl.zeros((D,), tl.float32)
    for start in range(0, PART, BLOCK_N):
        n = (part * PART + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (n < N)[:, None]
        k = tl.load(k_ptr + n[:, None] * kN + d[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + n[:, None] * vN + d[None, :], mask=inside, other=0.0)
        if NARROW:  # products of 16-bit numbers are exact in fp32
            wide = tl.maximum(k.to(tl.float32), 0.0)
            state += tl.dot(tl.trans(wide.to(k.dtype)), v)
            norm += tl.sum(wide, 0)
        else:
            k = k.to(tl.float32)
            k = tl.where(k > 0, k, 0.0)
            state += tl.dot(tl.trans(k), v.to(tl.float32), input_precision=EXACT)
            norm += tl.sum(k, 0)
    place = group * P + part
    tl.store(state_ptr + place * D * D + d[:, None] * D + d[None, :], state)
    tl.store(norm_ptr + place * D + d, norm)


@triton.jit
def _apply_queries(
    q_ptr, state_ptr, norm_ptr, out_ptr, H, N, P, eps,
    qB, qH, qN, oB, oH, oN,
    D: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """out = relu(q) S / (relu(q) z + eps) for one block of tokens."""
    group, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = group // H, group % H
    d = tl.arange(0, D)
    state, norm = _whole_state(state_ptr, norm_ptr, group, P, D)
    n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = (n < N)[:, None]
    at = batch * qB + head * qH + n[:, None] * qN + d[None, :]
    narrow = tl.load(q_ptr + at, mask=inside, other=0.0)
    q = narrow.to(tl.float32)
    q = tl.where(q > 0, q, 0.0)
    total = tl.sum(q * norm[None, :], 1) + eps
    if NARROW:  # the state in two parts, of eight bits each in bf16
        narrow = q.to(narrow.dtype)
        high = state.to(narrow.dtype)
        low = (state - high.to(tl.float32)).to(narrow.dtype)
        out = (tl.dot(narrow, high) + tl.dot(narrow, low)) / total[:, None]
    else:
        out = tl.dot(q, state, input_precision=WIDE) / total[:, None]
    at = batch * oB + head * oH + n[:, None] * oN + d[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _whole_state(state_ptr, norm_ptr, group, P, D: tl.constexpr):
    """Sums over the parts: (D, D) and (D,)."""
    d = tl.arange(0, D)
    state = tl.zeros((D, D), tl.float32)
    norm = tl.zeros((D,), tl.float32)
    for part in range(P):
        place = group * P + part
        state += tl.load(state_ptr + place * D * D + d[:, None] * D + d[None, :])
        norm += tl.load(norm_ptr + place * D + d)
    return state, norm


@triton.jit
def _query_gradients(
    q_ptr, g_ptr, state_ptr, norm_ptr, dq_ptr, dstate_ptr, dnorm_ptr, H, N, P, eps,
    qB, qH, qN, gB, gH, gN, dB, dH, dN,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dq, and of each part of PART tokens the gradients of state and norm.

    With c = relu(q) z + eps and g the gradient of out: u = g / c, w = -(g . out) / c;
    dq = [q > 0] (u S^T + w z), dS = relu(q)^T u, dz = sum w relu(q).
    """
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = group // H, group % H
    d = tl.arange(0, D)
    state, norm = _whole_state(state_ptr, norm_ptr, group, P, D)
    dstate = tl.zeros((D, D), tl.float32)
    dnorm = tl.zeros((D,), tl.float32)
    for start in range(0, PART, BLOCK_N):
        n = (part * PART + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = (n < N)[:, None]
        at = batch * qB + head * qH + n[:, None] * qN + d[None, :]
        q = tl.load(q_ptr + at, mask=inside, other=0.0).to(tl.float32)
        q = tl.where(q > 0, q, 0.0)
        at = batch * gB + head * gH + n[:, None] * gN + d[None, :]
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(q * norm[None, :], 1) + eps
        out = tl.dot(q, state, input_precision=EXACT) / total[:, None]
        u = g / total[:, None]
        w = -tl.sum(g * out, 1) / total
        dq = tl.dot(u, tl.trans(state), input_precision=EXACT) + w[:, None] * norm[None, :]
        at = batch * dB + head * dH + n[:, None] * dN + d[None, :]
        dq = tl.where(q > 0, dq, 0.0)
        tl.store(dq_ptr + at, dq.to(dq_ptr.dtype.element_ty), mask=inside)
        dstate += tl.dot(tl.trans(q), u, input_precision=EXACT)
        dnorm += tl.sum(q * w[:, None], 0)
    place = group * P + part
    tl.store(dstate_ptr + place * D * D + d[:, None] * D + d[None, :], dstate)
    tl.store(dnorm_ptr + place * D + d, dnorm)


@triton.jit
def _key_gradients(
    k_ptr, v_ptr, dstate_ptr, dnorm_ptr, dk_ptr, dv_ptr, H, N, P,
    kB, kH, kN, vB, vH, vN, dB, dH, dN,
    D: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dk = [k > 0] (v dS^T + dz) and dv = relu(k) dS for one block of tokens."""
    group, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = group // H, group % H
    d = tl.arange(0, D)
    dstate, dnorm = _whole_state(dstate_ptr, dnorm_ptr, group, P, D)
    n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = (n < N)[:, None]
    at = batch * kB + head * kH + n[:, None] * kN + d[None, :]
    k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
    k = tl.where(k > 0, k, 0.0)
    at = batch * vB + head * vH + n[:, None] * vN + d[None, :]
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dk = tl.dot(v, tl.trans(dstate), input_precision=EXACT) + dnorm[None, :]
    dk = tl.where(k > 0, dk, 0.0)
    dv = tl.dot(k, dstate, input_precision=EXACT)
    at = batch * dB + head * dH + n[:, None] * dN + d[None, :]
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these kernels take the inputs: one dtype of at most 32 bits, a width they know."""
    alike = q.dtype == k.dtype == v.dtype and q.shape == k.shape == v.shape
    return alike and q.dtype.itemsize <= 4 and q.is_floating_point() and q.shape[-1] in WIDTHS


def attend(q: Tensor, k: Tensor, v: Tensor, eps: float, narrow: bool, *, whole: bool) -> Tensor:
    """`linear_attention`'s out; `whole`: by `whole_heads` where that may be faster."""
    if whole and not asks_gradient((q, k, v)):
        from sana.kernels import whole_heads

        if whole_heads.fills(q):
            return whole_heads.whole_heads(q, k, v, eps, narrow)  # type: ignore[no-any-return]
    return linear_attention(q, k, v, eps, narrow)[0]  # type: ignore[no-any-return]


@op("linear_attention")
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, eps: float, narrow: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D) -> out (B, H, N, D) in v's dtype, state (G, P, D, D), norm (G, P, D).

    `out` is a view of (B, N, H, D) memory, so that joining the heads costs nothing. `narrow` takes
    the products of 16-bit inputs in 16 bits: in bf16 the state has 16 digits then, in fp16 its
    range is fp16's too.
    """
    narrow = narrow and q.dtype.itemsize == 2
    q, k, v = (last_is_dense(x) for x in (q, k, v))
    B, H, N, D = q.shape
    parts, part = _parts(N, B * H)
    state = q.new_empty((B * H, parts, D, D), dtype=torch.float32)
    norm = q.new_empty((B * H, parts, D), dtype=torch.float32)
    _sum_keys[(B * H, parts)](
        k, v, state, norm, H, N, parts, *k.stride()[:3], *v.stride()[:3],
        D=D, BLOCK_N=BLOCK_N, PART=part, EXACT=exact_products(q), NARROW=narrow,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    out = token_major(v)
    _apply_queries[(B * H, triton.cdiv(N, APPLY_BLOCK))](
        q, state, norm, out, H, N, parts, eps, *q.stride()[:3], *out.stride()[:3],
        D=D, BLOCK_N=APPLY_BLOCK, WIDE=wide_products(q), NARROW=narrow, num_warps=APPLY_WARPS,
    )  # fmt: skip
    return out, state, norm


@linear_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, eps: float, narrow: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, D = q.shape
    parts, _ = _parts(N, B * H)
    state = q.new_empty((B * H, parts, D, D), dtype=torch.float32)
    return token_major(v), state, q.new_empty((B * H, parts, D), dtype=torch.float32)


@op("linear_attention_backward")
def linear_attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each a view of (B, N, H, D) memory."""
    results = token_major(q), token_major(k), token_major(v)
    _launch_backward(g, (q, k, v), state, norm, eps, results)
    return results


def _launch_backward(
    g: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    state: Tensor,
    norm: Tensor,
    eps: float,
    results: tuple[Tensor, Tensor, Tensor],
) -> None:
    g, q, k, v = (last_is_dense(x) for x in (g, *inputs))
    dq, dk, dv = results
    B, H, N, D = q.shape
    parts, part = _parts(N, B * H)
    dstate, dnorm = torch.empty_like(state), torch.empty_like(norm)
    _query_gradients[(B * H, parts)](
        q, g, state, norm, dq, dstate, dnorm, H, N, parts, eps,
        *q.stride()[:3], *g.stride()[:3], *dq.stride()[:3],
        D=D, BLOCK_N=BLOCK_N, PART=part, EXACT=exact_products(q), num_warps=4,
    )  # fmt: skip
    _key_gradients[(B * H, triton.cdiv(N, BLOCK_N))](
        k, v, dstate, dnorm, dk, dv, H, N, parts,
        *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3],
        D=D, BLOCK_N=BLOCK_N, EXACT=exact_products(q), num_warps=2,
    )  # fmt: skip


@linear_attention_backward.register_fake
def _(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return token_major(q), token_major(k), token_major(v)


def _keep(ctx, inputs, output) -> None:
    q, k, v, ctx.eps, _ = inputs
    _, state, norm = output
    ctx.mark_non_differentiable(state, norm)
    ctx.save_for_backward(q, k, v, state, norm)


def _differentiate(ctx, g, _state, _norm):
    return *linear_attention_backward.behind(ctx)(g, *ctx.saved_tensors, ctx.eps), None, None


linear_attention.register_autograd(_differentiate, setup_context=_keep)


@op("packed_linear_attention")
def packed_linear_attention(qkv: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, N, 3 H D), D `width`, dense -> out (B, N, H D), and state and norm as above.

    So the gradient of qkv is written where it stays, instead of being joined from three.
    """
    out, state, norm = linear_attention.launch(*thirds(qkv, width), eps)
    return out.transpose(1, 2).flatten(2), state, norm


@packed_linear_attention.register_fake
def _(qkv: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    B, N, C = qkv.shape
    G = B * C // (3 * width)
    P, _ = _parts(N, G)
    state = qkv.new_empty((G, P, width, width), dtype=torch.float32)
    norm = qkv.new_empty((G, P, width), dtype=torch.float32)
    return qkv.new_empty((B, N, C // 3)), state, norm


@op("packed_linear_attention_backward")
def packed_linear_attention_backward(
    g: Tensor, qkv: Tensor, state: Tensor, norm: Tensor, width: int, eps: float
) -> Tensor:
    """The gradient of qkv."""
    dqkv = torch.empty_like(qkv)
    heads = g.unflatten(-1, (-1, width)).transpose(1, 2)
    _launch_backward(heads, thirds(qkv, width), state, norm, eps, thirds(dqkv, width))
    return dqkv


@packed_linear_attention_backward.register_fake
def _(g: Tensor, qkv: Tensor, state: Tensor, norm: Tensor, width: int, eps: float) -> Tensor:
    return torch.empty_like(qkv)


def _keep_packed(ctx, inputs, output) -> None:
    qkv, ctx.width, ctx.eps = inputs
    _, state, norm = output
    ctx.mark_non_differentiable(state, norm)
    ctx.save_for_backward(qkv, state, norm)


def _differentiate_packed(ctx, g, _state, _norm):
    dqkv = packed_linear_attention_backward.behind(ctx)(g, *ctx.saved_tensors, ctx.width, ctx.eps)
    return dqkv, None, None


packed_linear_attention.register_autograd(_differentiate_packed, setup_context=_keep_packed)


def _parts(N: int, G: int) -> tuple[int, int]:
    """How many parts the tokens of each of G heads are summed in, and how many tokens one has."""
    most = MOST_PARTS // 2 if G * MOST_PARTS >= 2 * FULL else MOST_PARTS
    # Powers of two, since the kernels are compiled anew for every size of a part.
    part = max(TOKENS_OF_A_PART, triton.next_power_of_2(triton.cdiv(N, most)))
    part = min(part, triton.cdiv(N, BLOCK_N) * BLOCK_N)
    return triton.cdiv(N, part), part


def exact_products(x: Tensor) -> str:
    """How products are taken: tf32's ten bits hold a 16-bit float's mantissa without loss."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def wide_products(x: Tensor) -> str:
    """The same where one factor is an fp32 sum."""
    return "ieee" if x.dtype == torch.float32 else "tf32x3"


def token_major(x: Tensor) -> Tensor:
    """An empty (B, H, N, D) over (B, N, H, D) memory."""
    B, H, N, D = x.shape
    return x.new_empty((B, N, H, D)).transpose(1, 2)


def last_is_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
