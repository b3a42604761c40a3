"""The ops that networks call, and the one rule for who computes them: Triton or plain PyTorch.

Triton takes tensors on GPUs of compute capability 8 or newer, of shapes and dtypes that its kernels
know, where triton is installed; `reference` takes everything else and defines what is correct.
Tests and comparisons choose with `force`; what no card has proven (`proven`) is used only inside
`trying`. Start reading at `uses_triton`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.kernels import reference
from sana.kernels.proven import REPORTS, Way
from sana.kernels.reference import Branch, Row, Rows

OLDEST = 8
"""Compute capability: older GPUs lack the tf32 and bf16 products that the kernels use."""

NORM_EPS = 1e-6
"""Of the LayerNorms between a transformer's layers, as in every Sana."""

Activation = Literal["none", "relu", "silu"]
KINDS: dict[Activation, int] = {"none": 0, "relu": 1, "silu": 2}

Backend = Literal["auto", "triton", "reference"]

HAS_TRITON = importlib.util.find_spec("triton") is not None
# The mutable state of this package, changed by `force` and `trying` alone; torch.compile cannot
# trace a ContextVar.
_chosen: dict[str, Backend] = {"backend": "auto"}
_allowed: dict[Way, bool] = {way: report is not None for way, report in REPORTS.items()}


@contextlib.contextmanager
def force(backend: Backend) -> Iterator[None]:
    """Inside, every op is computed by `backend`; "triton" on a CPU needs triton's interpreter."""
    before = _chosen["backend"]
    _chosen["backend"] = backend
    try:
        yield
    finally:
        _chosen["backend"] = before


@contextlib.contextmanager
def trying(*ways: Way, without: Iterable[Way] = ()) -> Iterator[None]:
    """Inside, these ways are used too where `uses_triton`, and others not; graphs stay as made."""
    before = dict(_allowed)
    _allowed.update({**dict.fromkeys(ways, True), **dict.fromkeys(without, False)})
    try:
        yield
    finally:
        _allowed.update(before)


def allows(way: Way) -> bool:
    """Whether this may be used: proven on a card, or being tried; never with plain ops forced."""
    return _allowed[way] and _chosen["backend"] != "reference"


def uses_triton(x: Tensor) -> bool:
    """Whether Triton kernels are wanted for x; each op also asks whether they know its shapes."""
    backend = _chosen["backend"]
    if backend != "auto":
        return backend == "triton"
    return HAS_TRITON and x.is_cuda and torch.cuda.get_device_properties(x.device).major >= OLDEST


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float) -> Tensor:
    """See `reference.linear_attention`."""
    if uses_triton(q):
        from sana.kernels import linear_attention as fast

        if fast.supports(q, k, v):
            # fp16 has no range for the summed state, the interpreter no products in bf16; and
            # training has not been tried with it.
            is_narrow = q.dtype == torch.bfloat16 and q.is_cuda and is_inference(q, k, v)
            narrow = allows("split_attention") and is_narrow
            out: Tensor = fast.attend(q, k, v, eps, narrow, whole=allows("whole_heads"))
            return out
    return reference.linear_attention(q, k, v, eps=eps)


def packed_linear_attention(qkv: Tensor, width: int, *, eps: float) -> Tensor:
    """`linear_attention` of a product's thirds: qkv (B, N, 3 H D) -> (B, N, H D), D `width`."""
    q, k, v = reference.thirds(qkv, width)
    if not is_inference(qkv) and uses_triton(qkv) and qkv.is_contiguous():
        from sana.kernels import linear_attention as fast

        if fast.supports(q, k, v):
            out: Tensor = fast.packed_linear_attention(qkv, width, eps)[0]
            return out
    return linear_attention(q, k, v, eps=eps).transpose(1, 2).flatten(2)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of q (B, H, N, D) to k and v (B, H, T, D); bias (B, 1, 1, T) on scores."""
    if allows("cross_attention") and is_inference(q, k, v) and uses_triton(q):
        from sana.kernels import cross_attention as fast

        if fast.supports(q, k, v, bias):
            out: Tensor = fast.cross_attention(q, k, v, bias)
            return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def modulate(x: Tensor, shift: Row, scale: Row, dtype: torch.dtype | None = None) -> Tensor:
    """LN(x) (1 + scale) + shift of x (B, N, C); see `reference.modulate`."""
    if trains_norms(x, *shift, *scale):
        return _trained_norm(x, None, (shift, scale))[1]
    if not fuses(x, *shift, *scale):
        return reference.modulate(x, shift.sum(), scale.sum(), dtype=dtype)
    return _fused_norm(x, None, shift, scale)[1]


def add_branch(x: Tensor, branch: Branch) -> Tensor:
    """x + gate * clip(value); see `reference.add_branch`."""
    if _trains(x, branch):
        return _trained_norm(x, branch, None)[0]
    if not fuses(x, *branch.tensors()):
        return reference.add_branch(x, branch)
    return _fused_norm(x, branch)[0]


def add_and_modulate(
    x: Tensor, branch: Branch, shift: Row, scale: Row, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`add_branch`, and `modulate` of its result, in one pass."""
    if _trains(x, branch, *shift, *scale):
        return _trained_norm(x, branch, (shift, scale))
    if not fuses(x, *branch.tensors(), *shift, *scale):
        total = reference.add_branch(x, branch)
        return total, reference.modulate(total, shift.sum(), scale.sum(), dtype=dtype)
    return _fused_norm(x, branch, shift, scale)


def add_and_round(x: Tensor, branch: Branch) -> tuple[Tensor, Tensor]:
    """`add_branch`, and its result as a product takes it: perhaps in the branch's dtype."""
    if _trains(x, branch):
        total, rounded = _trained_norm(x, branch, None, rounds=True)
        return total, rounded if rounded.numel() else total
    total = add_branch(x, branch)
    return total, total


def scaled_rows(x: Tensor) -> Rows:
    """x (..., K) in fp8 with a scale for each row; see `reference.scaled_rows`."""
    if allows("scaled_rows") and is_inference(x) and uses_triton(x):
        from sana.kernels import rows

        if rows.supports(x):
            return Rows(*rows.scaled_rows(x))
    return reference.scaled_rows(x)


def scaled_product(
    x: Rows,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> Tensor:
    """See `reference.scaled_product`; the result (..., N) is written into `out`, contiguous.

    On GPUs that have it (capability 8.9) by torch's product for rows, whose result is bf16.
    """
    if _chosen["backend"] == "reference" or not out.is_cuda:
        return out.copy_(reference.scaled_product(x, weight, scale, bias, out.dtype))
    torch._scaled_mm(
        x.values.flatten(0, -2),
        weight.t(),
        scale_a=x.scale.flatten(0, -2),
        scale_b=scale,
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=out.flatten(0, -2),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension of (B, N, C); see `reference.rms_norm`."""
    if x.dim() != 3 or not fuses(x, weight):
        return reference.rms_norm(x, weight, eps=eps)
    from sana.kernels import norms

    normed: Tensor = norms.rms_norm(x, weight, eps)
    return normed


def rms_norm_pair_(own: Tensor, first: Tensor, second: Tensor, *, eps: float) -> bool:
    """`rms_norm` of own's first columns, as many as `first` has, and of those behind, in place.

    own (B, N, W), first and second (C,). False as in `rms_norm_`.
    """
    if not (allows("norm_pair") and own.is_contiguous() and fuses(own, first, second)):
        return False
    from sana.kernels import norms

    norms.rms_norm_pair_(own, first, second, eps)
    return True


def rms_norm_(
    own: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float,
    activation: Activation = "none",
) -> bool:
    """own (..., C) = act(own / rms(own) * weight + bias) + residual, in place.

    False where there is no kernel for it, and then nothing is done: the reference works in pieces.
    """
    others = (weight, bias) if residual is None else (weight, bias, residual)
    dense = own.is_contiguous() and (residual is None or residual.is_contiguous())
    if not dense or not fuses(own, *others):
        return False
    from sana.kernels import norms

    norms.rms_norm_(own, weight, bias, residual, eps, KINDS[activation])
    return True


def bias_act_(own: Tensor, bias: Tensor, activation: Activation) -> bool:
    """own (..., C) = act(own + bias), in place; False as in `rms_norm_`."""
    if not own.is_contiguous() or not fuses(own, bias):
        return False
    from sana.kernels import norms

    norms.bias_act_(own, bias, KINDS[activation])
    return True


def add_repeated_(own: Tensor, x: Tensor, bias: Tensor) -> bool:
    """own (B, H, W, C) += bias + x's channels (B, H/2, W/2, I), repeated and shuffled, in place.

    4 C is a multiple of I; cell (2i + a, 2j + b), channel c reads x's cell (i, j), channel
    (4 c + 2 a + b) I / 4 C. False as in `rms_norm_`.
    """
    dense = own.is_contiguous() and x.is_contiguous() and 4 * own.shape[3] % x.shape[3] == 0
    if not dense or not fuses(own, x, bias):
        return False
    from sana.kernels import resample

    resample.add_repeated_(own, x, bias)
    return True


def spread(z: Tensor, x: Tensor, bias: Tensor) -> Tensor | None:
    """The maps of `resampling.windows` put in place, plus bias and shortcut: see `add_repeated_`.

    z (B, H/2 + 1, W/2 + 1, 4 C), x (B, H/2, W/2, I) -> (B, H, W, C), or None without a kernel.
    """
    dense = z.is_contiguous() and x.is_contiguous() and z.shape[3] % x.shape[3] == 0
    if not dense or not fuses(z, x, bias):
        return None
    from sana.kernels import resample

    out: Tensor = resample.spread(z, x, bias)
    return out


def aggregate_(wide: Tensor, taps: Tensor, product: Tensor, place: int) -> bool:
    """A scale of the DC-AE's attention, from wide's first C channels into C from `place` on.

    wide (B, H, W, .) contiguous, taps (C, 1, S, S) of a depthwise convolution, product (C, D, 1, 1)
    of one by groups after it. False as in `rms_norm_`.
    """
    if not fuses(wide, taps, product) or not wide.is_contiguous():
        return False
    from sana.kernels import aggregate

    if not aggregate.supports(wide, taps, product):
        return False
    aggregate.aggregate_(wide, taps, product, place)
    return True


def glu_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `reference.glu_depthwise`; weight (2F, 1, 3, 3). Gives x away."""
    needs_gradient = not is_inference(x, weight, bias)
    if uses_triton(x) and (allows("glu_gradient") or not needs_gradient):
        from sana.kernels import glumbconv

        mix = glumbconv.glu_depthwise
        if needs_gradient:
            from sana.kernels import glumbconv_gradient

            mix = glumbconv_gradient.trained
        if glumbconv.supports(x, weight, bias):
            # The approximation is finer than bf16's digits, and coarser than those of others.
            fast = allows("tanh_silu") and x.dtype == torch.bfloat16
            out: Tensor = mix(x, weight, bias, fast)
            return out
    # One name, so that no map of 2F channels outlives its use.
    x = reference.silu_depthwise(x, weight, bias)
    return reference.gated(x)


def sandwich_norm(
    x: Tensor, branch: Tensor | None, after: Tensor | None, before: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Gemma-2's norms around the residual; see `reference.sandwich_norm`."""
    others = [part for part in (branch, after, before) if part is not None]
    if allows("gemma_norm") and is_inference(x, *others) and uses_triton(x):
        from sana.kernels import gemma

        if gemma.supports(x, *others):
            total, normed = gemma.sandwich_norm(x, branch, after, before, eps)
            return (x if branch is None else total), (None if before is None else normed)
    return reference.sandwich_norm(x, branch, after, before, eps=eps)


def gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up of (B, T, F); see `reference.gelu_gate`."""
    if allows("gemma_gate") and is_inference(gate, up) and uses_triton(gate):
        from sana.kernels import gemma

        if gemma.supports(gate, up):
            out: Tensor = gemma.gelu_gate(gate, up)
            return out
    return reference.gelu_gate(gate, up)


def knows_prompt_attention(x: Tensor, head_dim: int, cap: float) -> bool:
    """Whether `gemma.prompt_attention` may be called for x (B, T, C), such heads and a soft cap."""
    if not (allows("gemma_attention") and is_inference(x) and uses_triton(x)):
        return False
    from sana.kernels import gemma

    return bool(gemma.takes(x, head_dim, cap))


def is_inference(*tensors: Tensor) -> bool:
    """Whether no gradient can be asked of a result of these."""
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def trains_norms(x: Tensor, *others: Tensor) -> bool:
    """Whether residuals and norms of these have gradients by kernels; a compiler's are as fast."""
    if torch.compiler.is_compiling() or not allows("norm_gradient"):
        return False
    if is_inference(x, *others) or not uses_triton(x):
        return False
    from sana.kernels import norms_gradient

    return norms_gradient.supports(x, *others)


def joins_lone(x: Tensor, lone: Tensor) -> bool:
    """Whether the norm behind a branch for x (B, N, C) takes a lone text's rows: `Branch.lone`."""
    return allows("lone_rows") and fuses(x, lone)


def fuses(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels of `norms` take this: forward only, one dtype, widths they know."""
    if not (is_inference(x, *others) and uses_triton(x)):
        return False
    from sana.kernels import norms

    return norms.supports(x, *others)


def flat(branch: Branch | None) -> tuple[Tensor | None, list[Tensor], list[Tensor], float]:
    """A branch as kernels take it: value, `lone` as `split_norm` has it, gate and limit."""
    value, gate, limit, lone = branch or (None, None, None, None)
    own: list[Tensor] = []
    if lone is not None:
        own = [lone.row, lone.before.value, lone.seen]
        _, gate, limit, _ = lone.before
    return value, own, [*(gate or ())], limit or 0.0


def _trains(x: Tensor, branch: Branch, *rows: Tensor) -> bool:
    """`trains_norms` with a branch; those kernels know no lone text."""
    return branch.lone is None and trains_norms(x, *branch.tensors(), *rows)


def _trained_norm(
    x: Tensor, branch: Branch | None, modulation: tuple[Row, Row] | None, *, rounds: bool = False
) -> tuple[Tensor, Tensor]:
    from sana.kernels import norms_gradient

    value, gate, limit, _ = branch or (None, None, None, None)
    shift, scale = ([*row] for row in modulation or ((), ()))
    total, normed = norms_gradient.trained_norm(
        x, value, [*(gate or ())], shift, scale, NORM_EPS, limit or 0.0, rounds
    )
    return total, normed


def _fused_norm(
    x: Tensor, branch: Branch | None, shift: Iterable[Tensor] = (), scale: Iterable[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """x with its branch, and its norm with shift and scale, of what is asked for."""
    from sana.kernels import split_norm as split

    value, own, gate, limit = flat(branch)
    both: tuple[Tensor, Tensor] = split.split_norm(
        x, value, own, gate, [*shift], [*scale], NORM_EPS, limit
    )
    return both
