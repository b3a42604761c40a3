"""The definition of correct for every kernel: plain PyTorch, written to be read.

ReLU linear attention of Sana (eq. 2 of the paper) in O(N) and in its quadratic form, the norms and
the modulation between the layers, and the middle of the mix-FFN; Gemma-2's norms, attention and
gate. Shape letters: B batch, H heads, N or T tokens, D head width, C channels, F mix-FFN width; in
attention K key heads, G = H / K, S tokens that are looked at.

Precision: sums over tokens run in fp32 (fp64 for fp64 inputs) whatever autocast says, because the
denominator is a sum of N non-negative terms and bf16 loses its small ones; so do those of RMSNorm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
LEAST = 1e-12
"""Of a row's largest value, so that a row of zeros has a scale."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor (..., K) as fp8 (e4m3) with a scale for each of its rows, as a product takes it."""

    values: Tensor
    """(..., K) in fp8."""
    scale: Tensor
    """(..., 1) in fp32; values times it are the tensor."""

    def __getitem__(self, samples: slice) -> Rows:
        """Some of the first dimension."""
        return Rows(self.values[samples], self.scale[samples])

    def unflatten(self, dim: int, sizes: torch.Size) -> Rows:
        """As a tensor's, of any dimension but the last."""
        return Rows(self.values.unflatten(dim, sizes), self.scale.unflatten(dim, sizes))


class Row(NamedTuple):
    """One row of adaLN-single: a block's own (C,) and the time's (B or 1, C), to be summed."""

    table: Tensor
    time: Tensor

    def sum(self) -> Tensor:
        """(B or 1, 1, C), to meet tokens (B, N, C)."""
        return (self.table + self.time)[:, None]


class Branch(NamedTuple):
    """A branch (B, N, C) on its way to the residual: times its gate, clipped to +-limit before."""

    value: Tensor
    gate: Row | None = None
    limit: float | None = None
    lone: Lone | None = None
    """Of the first samples, which have no `value` then."""

    def part(self, samples: slice) -> Branch:
        """Some of the samples of one without `lone`."""
        gate = self.gate
        if gate is not None and len(gate.time) > 1:
            gate = Row(gate.table, gate.time[samples])
        return Branch(self.value[samples], gate, self.limit)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it is made of."""
        own = (self.value, *(self.gate or ()))
        if self.lone is None:
            return own
        return (*own, self.lone.row, self.lone.seen, *self.lone.before.tensors())


class Lone(NamedTuple):
    """What the first L of B samples, whose text is one token, get instead of a value."""

    row: Tensor
    """(L, 1, C), for all of their tokens."""
    before: Branch
    """Of all samples, to be added first; to the others it has been."""
    seen: Tensor
    """(B - L, N, C): these others, with it."""


def thirds(qkv: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, N, D) as views of (B, N, 3 H D), D `width`."""
    q, k, v = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return q, k, v


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float) -> Tensor:
    """sum_j relu(q_i).relu(k_j) v_j / (sum_j relu(q_i).relu(k_j) + eps), in O(N) time and memory.

    q, k, v are (B, H, N, D), and so is the result, in v's dtype. The peer appends a row of ones to
    v for the denominator; here it is a product with the summed keys, so that matrices stay D wide.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(_autocast_kind(q), enabled=False):
        query, key, value = q.to(dtype).relu(), k.to(dtype).relu(), v.to(dtype)
        state = key.transpose(-1, -2) @ value  # (B, H, D, D)
        denominator = (query * key.sum(dim=-2, keepdim=True)).sum(dim=-1, keepdim=True)
        return ((query @ state) / (denominator + eps)).to(v.dtype)


def quadratic_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float) -> Tensor:
    """The same function by way of the (N, N) scores: cheaper when N is no larger than D."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(_autocast_kind(q), enabled=False):
        scores = q.to(dtype).relu() @ k.to(dtype).relu().transpose(-1, -2)  # (B, H, N, N)
        weights = scores / (scores.sum(dim=-1, keepdim=True) + eps)
        return (weights @ v.to(dtype)).to(v.dtype)


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """Adaptive LayerNorm without learned affine: LN(x) (1 + scale) + shift.

    It is rounded to `dtype` if that is narrower than x's; one row for all samples then goes into
    torch's norm as its affine part, one pass instead of three.
    """
    if dtype is not None and dtype.itemsize < x.dtype.itemsize:
        if len(shift) == len(scale) == 1:
            rows = (1 + scale).flatten(), shift.flatten()
            return F.layer_norm(x, x.shape[-1:], *rows, eps=eps).to(dtype)
        return modulate(x, shift, scale, eps).to(dtype)
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def add_branch(x: Tensor, branch: Branch) -> Tensor:
    """x + gate * clip(value)."""
    if branch.lone is not None:
        row, before, seen = branch.lone
        first = slice(len(row))
        return torch.cat([add_branch(x[first], before.part(first)) + row, seen + branch.value])
    value = branch.value
    if branch.limit is not None:
        value = value.clamp(-branch.limit, branch.limit)
    return x + (value if branch.gate is None else branch.gate.sum() * value)


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float) -> Tensor:
    """x / rms(x) * weight + bias over the last dimension, in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight
    return (wide if bias is None else wide + bias).to(x.dtype)


def glu_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """value * silu(gate), the halves of `silu_depthwise`: x (B, h, w, 2F) -> (B, h, w, F)."""
    return gated(silu_depthwise(x, weight, bias))


def silu_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """depthwise3x3(silu(x)) + bias, channels last; without gradients x is overwritten."""
    x = F.silu(x, inplace=not torch.is_grad_enabled())
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight))
    return x.permute(0, 2, 3, 1)


def gated(x: Tensor) -> Tensor:
    """(..., 2F) -> (..., F): the first half times the SiLU of the second."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)


def sandwich_norm(
    x: Tensor, branch: Tensor | None, after: Tensor | None, before: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Gemma-2's total = x + N(branch; after), or x, and N(total; before) if there is `before`.

    N is `whole_norm`; x and branch (B, T, C), weights (C,). Each result is rounded to x's dtype.
    """
    if branch is not None:
        assert after is not None, "a branch comes with its norm's weight"
        x = x + whole_norm(branch, after, eps=eps)
    return x, None if before is None else whole_norm(x, before, eps=eps)


def whole_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm with the factor 1 + weight, all of it in fp32 or wider, rounded once."""
    kind = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(kind)
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * (1 + weight.to(kind))).to(x.dtype)


def gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, GELU by tanh."""
    return F.gelu(gate, approximate="tanh") * up


def turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: channel i of x (..., T, D) turns with channel i + D / 2.

    `turns` are cosine and sine (T, D).
    """
    first, second = x.chunk(2, dim=-1)
    return x * turns[0] + torch.cat([-second, first], dim=-1) * turns[1]


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, *, scale: float, cap: float
) -> Tensor:
    """Grouped-query attention with logits cap * tanh(. / cap): (B, T, H D).

    query (B, H, T, D), key and value (B, K, S, D); hidden (T, S) or (B, 1, T, S) is true where a
    token is not seen.
    """
    query = torch.unflatten(query, 1, (key.shape[1], -1))  # (B, K, G, T, D)
    logits = query @ key[:, :, None].mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if cap < torch.inf:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.masked_fill(hidden if hidden.ndim == 2 else hidden[:, None], -torch.inf)
    mixed = logits.softmax(-1).to(value.dtype) @ value[:, :, None]
    return mixed.flatten(1, 2).transpose(1, 2).flatten(2)


def scaled_rows(x: Tensor) -> Rows:
    """x (..., K) with each row over its largest value, times 448, rounded to fp8.

    NaN and infinity make a row NaN.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST)
    return Rows((wide * (LARGEST / largest)).to(FP8), (largest / LARGEST).float())


def scaled_product(
    x: Rows, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x (..., K) times weight (N, K) in fp8 with its scale (1, N), plus bias (N,): (..., N).

    Products of fp8 are exact in fp32, where they are summed; the result is rounded once.
    """
    y = (x.values.flatten(0, -2).float() @ weight.float().T) * x.scale.flatten(0, -2) * scale
    y = y if bias is None else y + bias.float()
    whole: Tensor = y.to(dtype).unflatten(0, x.values.shape[:-1])
    return whole


def _autocast_kind(x: Tensor) -> str:
    """The device type that autocast knows x by; it refuses `meta`, where nothing is computed."""
    return "cpu" if x.is_meta else x.device.type
