"""Gemma-2's network: token numbers to last normed states, no head.

It follows the Gemma 2 report (arXiv 2408.00118) and family-spec section 4; the state dict has the
names of transformers' Gemma2Model. Between the products everything is an op of `sana.kernels.ops`
or plain PyTorch. Attention is causal, so what tokens leave behind in a memory never changes.

Shape letters: B prompts, P tokens before, T tokens, W width, H query heads, K key heads, D head
width. Precision: norms and softmax in fp32, all else in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.config import GemmaConfig
from sana.kernels import ops, reference
from sana.models.layers import split_heads

Memory: TypeAlias = list[tuple[Tensor, Tensor]]
"""Keys and values [B, K, P, D] of each layer."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where a call's tokens are, the same for all layers."""

    turns: tuple[Tensor, Tensor]
    """Cosine and sine [T, D]."""
    mask: Tensor | None
    """[B, T], true for real tokens."""
    hidden: Tensor | None
    """[T, P + T] or [B, 1, T, T], true where a token is not seen; None for the one kernel."""


class GemmaDecoder(nn.Module):
    """Token numbers to last normed states; no head."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(GemmaLayer(config) for _ in range(config.layers))
        self.norm = GemmaNorm(config)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        memory: Memory | None = None,
        *,
        keeps: bool = True,
    ) -> tuple[Tensor, Memory]:
        """ids [B, T] -> states [B, T, W], and `memory` [B, K, P + T, D] for tokens that follow.

        mask [B, T], true for real tokens, is only taken without a memory; None means all are real.
        Without `keeps` the memory for others is empty.
        """
        before = 0 if memory is None else memory[0][0].shape[2]
        length = before + ids.shape[1]
        assert length <= self.config.window, "longer than the sliding window of every other layer"
        assert mask is None or memory is None
        x = self.embed_tokens(ids)
        # Rounded to the dtype, as in the original; from the host a copy would wait for the device.
        x = x * torch.tensor(self.config.width**0.5, dtype=x.dtype).item()
        places = self._places(x, mask, before, keeps=keeps)
        following: Memory = []
        norms = [*(layer.input_layernorm for layer in self.layers), self.norm]
        normed: Tensor | None = None
        for index, layer in enumerate(self.layers):
            past = None if memory is None else memory[index]
            x, normed, kept = layer(x, normed, places, past, norms[index + 1])
            if keeps:
                following.append(kept)
        return self.norm(x) if normed is None else normed, following

    def _places(self, x: Tensor, mask: Tensor | None, before: int, *, keeps: bool) -> Places:
        config = self.config
        length = before + x.shape[1]
        turns = _turns(config, before, length, x)
        if not keeps and ops.knows_prompt_attention(x, config.head_dim, config.soft_cap):
            return Places(turns, mask, None)
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[before:]
        hidden = ~(seen if mask is None else seen & mask[:, None, None, :].bool())
        return Places(turns, mask, hidden)


class GemmaLayer(nn.Module):
    """Attention and gated MLP, each with a norm before and after."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.self_attn = GemmaAttention(config)
        self.mlp = GemmaMLP(config)
        self.input_layernorm = GemmaNorm(config)
        self.post_attention_layernorm = GemmaNorm(config)
        self.pre_feedforward_layernorm = GemmaNorm(config)
        self.post_feedforward_layernorm = GemmaNorm(config)

    def forward(
        self,
        x: Tensor,
        normed: Tensor | None,
        places: Places,
        memory: tuple[Tensor, Tensor] | None,
        following: GemmaNorm,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """x and its norm [B, T, W] -> both for the norm `following`, and this layer's memory.

        A norm that is not on the device, as when layers stream, is left to who has it there.
        """
        if normed is None:
            normed = self.input_layernorm(x)
        mixed, kept = self.self_attn(normed, places, memory)
        after, before = self.post_attention_layernorm, self.pre_feedforward_layernorm
        x, normed = _sandwich(x, mixed, after, before)
        assert normed is not None
        next_norm = following if following.weight.device == x.device else None
        branch = self.mlp(normed)
        return *_sandwich(x, branch, self.post_feedforward_layernorm, next_norm), kept


class GemmaAttention(nn.Module):
    """Grouped-query attention with rotary positions and a soft cap on its logits."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        query, key = config.heads * config.head_dim, config.key_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, query, bias=False)
        self.k_proj = nn.Linear(config.width, key, bias=False)
        self.v_proj = nn.Linear(config.width, key, bias=False)
        self.o_proj = nn.Linear(query, config.width, bias=False)

    @property
    def together(self) -> tuple[nn.Linear, ...]:
        """Products of the same rows."""
        return self.q_proj, self.k_proj, self.v_proj

    def forward(
        self, x: Tensor, places: Places, memory: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x [B, T, W] -> [B, T, W], and keys and values where there is `places.hidden`."""
        config = self.config
        scale, cap = config.query_scale**-0.5, config.soft_cap
        query, key, value = _products(x, self.together)
        if places.hidden is None:
            from sana.kernels.gemma import prompt_attention

            turns, past = list(places.turns), list(memory or ())
            projected: Tensor = self.o_proj(
                prompt_attention(
                    query, key, value, turns, past, places.mask, config.head_dim, scale, cap
                )
            )
            return projected, None
        query, key, value = (split_heads(part, config.head_dim) for part in (query, key, value))
        query, key = (reference.turned(part, places.turns) for part in (query, key))
        if memory is not None:
            key = torch.cat([memory[0], key], dim=2)
            value = torch.cat([memory[1], value], dim=2)
        mixed = reference.capped_attention(query, key, value, places.hidden, scale=scale, cap=cap)
        return self.o_proj(mixed), (key, value)


class GemmaMLP(nn.Module):
    """down(gelu(gate) * up), GELU by tanh."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    @property
    def together(self) -> tuple[nn.Linear, ...]:
        """Products of the same rows."""
        return self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = _products(x, self.together)
        projected: Tensor = self.down_proj(ops.gelu_gate(gate, up))
        return projected


class GemmaNorm(nn.Module):
    """RMSNorm with the factor 1 + weight, all of it in fp32."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.zeros(config.width))

    def forward(self, x: Tensor) -> Tensor:
        normed = ops.sandwich_norm(x, None, None, self.weight, eps=self.eps)[1]
        assert normed is not None
        return normed


def adjoin(decoder: GemmaDecoder) -> None:
    """Have the weights of products of the same rows side by side in memory, where they are not.

    Only storage changes. What `moving` brings is side by side already; in a graph nothing moves.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    home = decoder.embed_tokens.weight
    for module in decoder.modules():
        if not isinstance(module, GemmaAttention | GemmaMLP):
            continue
        weights = [linear.weight for linear in module.together]
        is_fixed = any(w.device != home.device or w.is_inference() for w in weights)
        if is_fixed or adjoined(weights) is not None:
            continue
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.cat([weight.data for weight in weights])
            parts = whole.split([len(weight) for weight in weights])
            for weight, part in zip(weights, parts, strict=True):
                weight.data = part


def adjoined(weights: Sequence[Tensor]) -> Tensor | None:
    """One view (sum of N, W) of weights (N, W) that follow each other in memory, or None."""
    first = weights[0]
    for one, other in pairwise(weights):
        is_next = one.data_ptr() + one.nbytes == other.data_ptr()
        alike = one.dtype == other.dtype and one.is_contiguous() and other.is_contiguous()
        shared = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        if not (is_next and alike and shared):
            return None
    rows = sum(len(weight) for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))


def joins(x: Tensor) -> bool:
    """Whether products of the same rows are made as one."""
    return ops.allows("gemma_joined") and ops.is_inference(x) and ops.uses_triton(x)


def _products(x: Tensor, linears: Sequence[nn.Linear]) -> list[Tensor]:
    """Each linear's product; slices of one where the weights lie side by side."""
    weights = [linear.weight for linear in linears]
    if joins(x) and ops.is_inference(*weights):
        weight = adjoined(weights)
        if weight is not None:
            joint = F.linear(x, weight)
            return list(torch.split(joint, [len(part) for part in weights], dim=-1))
    return [linear(x) for linear in linears]


def _sandwich(
    x: Tensor, branch: Tensor, after: GemmaNorm, before: GemmaNorm | None
) -> tuple[Tensor, Tensor | None]:
    weight = None if before is None else before.weight
    return ops.sandwich_norm(x, branch, after.weight, weight, eps=after.eps)


def _turns(config: GemmaConfig, start: int, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, D] for positions start to end, computed in fp32."""
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=like.device)
    places = torch.arange(start, end, dtype=torch.float32, device=like.device)
    angles = places[:, None] / config.rope_theta ** (even / config.head_dim)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
