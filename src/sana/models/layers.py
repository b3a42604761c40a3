"""The parts that the networks share: norms, embeddings, modulation, mix-FFN and both attentions.

Sana (arXiv 2410.10629) section 2.2. Shape letters: B batch, N image tokens, T text tokens, C or D
channels, H heads, h w latent grid, F mix-FFN width.

Precision: norm statistics and linear attention run in fp32 under any autocast; everything else
follows the weights' dtype or autocast, and products their own weights' (`rounding`). Image tokens
stay in channels-last memory throughout, so a 1x1 convolution is a linear layer and only the
depthwise 3x3 sees a (B, C, h, w) view.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.config import DiTConfig
from sana.kernels import laid, ops
from sana.kernels.ops import linear_attention, packed_linear_attention
from sana.kernels.reference import Rows
from sana.models.rounding import Product

SINUSOIDS = 256
MASKED = -10000.0
HALF_MAX = 65504.0
"""The largest number of fp16."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; `weight` starts at `scale`."""

    def __init__(self, dim: int, eps: float = 1e-5, scale: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)


class TimeEmbedding(nn.Module):
    """A scalar per sample -> 256 sinusoids, cosines first -> two-layer MLP, width D."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.input = nn.Linear(SINUSOIDS, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, value: Tensor) -> Tensor:
        """value (B,) in fp32 -> (B, D)."""
        waves = sinusoids(value).to(self.input.weight.dtype)
        embedded: Tensor = self.output(F.silu(self.input(waves)))
        return embedded


class PatchEmbed(nn.Module):
    """Patches of p x p latent cells -> tokens: a strided convolution stored as a linear."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(channels * patch_size**2, dim)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, C, h p, w p) -> (B, h, w, D)."""
        if self.patch_size > 1:
            latent = F.pixel_unshuffle(latent, self.patch_size)
        tokens: Tensor = self.projection(latent.permute(0, 2, 3, 1))
        return tokens


class GLUMBConv(nn.Module):
    """Mix-FFN: 1x1 to 2F, SiLU, depthwise 3x3, value * SiLU(gate), 1x1 to C without bias.

    The depthwise output's first half is the value, its second the gate.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = Product(dim, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project = Product(hidden, dim, bias=False)

    def forward(self, x: Tensor | Rows) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        assert self.depthwise.bias is not None
        mixed = ops.glu_depthwise(self.expand(x), self.depthwise.weight, self.depthwise.bias)
        projected: Tensor = self.project(mixed)
        return projected


class LinearSelfAttention(nn.Module):
    """ReLU linear attention; with `qk_norm`, query and key pass RMSNorm over the full width first.

    `qkv.weight` holds query, key and value in thirds; `output` has a bias, `qkv` none. Networks
    trained in fp16 had their result clipped to its range and learnt with it: `clamps` does that in
    every dtype, and in fp16 it is done anyway.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, norm_eps, qk_norm = config.width, config.self_norm_eps, config.qk_norm
        self.head_dim = config.head_dim
        self.eps = config.attention_eps
        self.clamps = config.clamps
        self.qkv = Product(dim, 3 * dim, bias=False)
        self.query_norm = RMSNorm(dim, norm_eps) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(dim, norm_eps) if qk_norm else nn.Identity()
        self.output = Product(dim, dim)

    def limit(self, dtype: torch.dtype) -> float | None:
        """What a result in `dtype` is to be clipped to, if at all."""
        return HALF_MAX if self.clamps or dtype == torch.float16 else None

    def forward(self, x: Tensor | Rows, perturbed: int = 0, *, clips: bool = True) -> Tensor:
        """(B, N, D) -> (B, N, D); in the last `perturbed` of B each token sees itself alone.

        A caller that clips to `limit` itself says so.
        """
        qkv = self.qkv(x)
        if isinstance(self.query_norm, RMSNorm) or perturbed:
            mixed = self._mix(qkv, perturbed)
        else:
            mixed = packed_linear_attention(qkv, self.head_dim, eps=self.eps)
        attended: Tensor = self.output(mixed)
        limit = self.limit(attended.dtype)
        return attended.clamp(-limit, limit) if clips and limit is not None else attended

    def _norm_in_place(self, qkv: Tensor) -> bool:
        """Whether query and key are their norms now, in the product's own memory."""
        first, second = self.query_norm, self.key_norm
        if not (isinstance(first, RMSNorm) and isinstance(second, RMSNorm)):
            return False
        return ops.rms_norm_pair_(qkv, first.weight, second.weight, eps=first.eps)

    def _mix(self, qkv: Tensor, perturbed: int) -> Tensor:
        is_normed = self._norm_in_place(qkv)
        query, key, value = qkv.chunk(3, dim=-1)
        seeing = len(query) - perturbed
        query, key = query[:seeing], key[:seeing]
        if not is_normed:
            query, key = self.query_norm(query), self.key_norm(key)
        q, k = split_heads(query, self.head_dim), split_heads(key, self.head_dim)
        v = split_heads(value[:seeing], self.head_dim)
        mixed = linear_attention(q, k, v, eps=self.eps).transpose(1, 2).flatten(2)
        if perturbed:
            mixed = torch.cat([mixed, value[seeing:]])
        return mixed


class CrossAttention(nn.Module):
    """Softmax attention from image to text; `key_value.weight` holds both in halves."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool, norm_eps: float) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.query = Product(dim, dim)
        self.key_value = Product(dim, 2 * dim)
        self.query_norm = RMSNorm(dim, norm_eps) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(dim, norm_eps) if qk_norm else nn.Identity()
        self.output = Product(dim, dim)

    def prepare(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of text (B, T, D), each (B, H, T, D / H); the same at every step."""
        key, value = self.key_value(text).chunk(2, dim=-1)
        keys = split_heads(self.key_norm(key), self.head_dim)
        return keys, split_heads(value, self.head_dim)

    def prepare_lone(self, text: Tensor) -> Tensor:
        """What every image token gets of a text of one token (B, 1, D), whatever it asks."""
        attended: Tensor = self.output(self.key_value(text).chunk(2, dim=-1)[1])
        return attended

    def forward(
        self, x: Tensor | Rows, text: Tensor | tuple[Tensor, ...], bias: Tensor | None
    ) -> Tensor:
        """x (B, N, D), text (B, T, D) or from `prepare`, bias from `mask_bias` -> (B, N, D).

        With a third tensor (L, 1, D), from `prepare_lone`, the first L samples get that, and text
        and bias are those of the others.
        """
        k, v, *lone = self.prepare(text) if isinstance(text, Tensor) else text
        if not lone:
            attended: Tensor = self.output(self._mix(x, k, v, bias))
            return attended
        return self._beside(lone[0], self._mix(x[len(lone[0]) :], k, v, bias))

    def _mix(self, x: Tensor | Rows, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q = split_heads(self.query_norm(self.query(x)), self.head_dim)
        if laid.is_laid(q, k):
            assert bias is not None, "a laid text comes with its counts"
            return laid.attend(q, k, v, bias).transpose(1, 2).flatten(2)
        bias = bias if bias is None else bias.to(q.dtype)
        return ops.cross_attention(q, k, v, bias).transpose(1, 2).flatten(2)

    def _beside(self, lone: Tensor, mixed: Tensor) -> Tensor:
        """`lone` for its samples, and behind them the output of mixed (B - L, N, D)."""
        count, (_, length, width) = len(lone), mixed.shape
        is_plain = isinstance(self.output, Product)
        if not is_plain or not ops.is_inference(mixed, self.output.weight):
            return torch.cat([lone.expand(-1, length, -1), self.output(mixed)])
        out = mixed.new_empty((count + len(mixed), length, width))
        out[:count] = lone
        self.output.into(mixed, out[count:])
        return out


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, N, H D) -> (B, H, N, D)."""
    return torch.unflatten(x, -1, (-1, head_dim)).transpose(1, 2)


def mask_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """mask (B, T), true where a token counts -> (B, 1, 1, T), added to attention scores.

    Finite, so that a row without any token attends to all of them, as in the peer, without NaN.
    """
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask.bool(), MASKED)[:, None, None, :]


def sinusoids(value: Tensor) -> Tensor:
    """value (B,) -> (B, 256): cos and then sin of value * 10000^(-i / 128), in fp32."""
    half = SINUSOIDS // 2
    index = torch.arange(half, dtype=torch.float32, device=value.device)
    angles = value.float()[:, None] * torch.exp(-math.log(10000) * index / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(
    height: int, width: int, dim: int, *, base: int, scale: float, device: torch.device
) -> Tensor:
    """Sin-cos table (height, width, dim) in fp32: the first half of the channels encodes x.

    Coordinates run from 0 to base / scale on any grid; each axis has dim / 4 frequencies, all sines
    before all cosines, computed in fp64.
    """
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(count: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float64) / (count / base) / scale
        angles = places[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (count, dim / 2)

    x = axis(width)[None].expand(height, -1, -1)
    y = axis(height)[:, None].expand(-1, width, -1)
    return torch.cat([x, y], dim=-1).to(device=device, dtype=torch.float32)
