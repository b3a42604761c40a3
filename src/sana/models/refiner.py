"""A few bidirectional layers over text states, so that a noun knows its color and place.

After LiDiT (arXiv 2406.11831); why: an encoder's states do not bind attributes to nouns well enough
(`docs/log.md`). Shape letters: B batch, T text tokens, D width of the text states.

Every branch passes a per-channel gate that starts at zero, so a new refiner changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.config import RefinerConfig
from sana.models.layers import mask_bias, split_heads


class Refiner(nn.Module):
    """states (B, T, D) -> states of the same shape; attributes `positions`, `layers`."""

    def __init__(self, config: RefinerConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.positions = nn.Parameter(torch.randn(config.max_tokens, dim) * 0.02)
        self.layers = nn.ModuleList(RefinerLayer(config, dim) for _ in range(config.depth))

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """mask (B, T), true where a token counts; ValueError beyond `max_tokens` tokens."""
        tokens = states.shape[1]
        if tokens > self.config.max_tokens:
            raise ValueError(
                f"the text has {tokens} tokens; the refiner reads at most "
                f"{self.config.max_tokens}: shorten the prompt"
            )
        positions = self.positions[:tokens]
        bias = mask_bias(mask, states.dtype)
        for layer in self.layers:
            states = layer(states, positions, bias)
        return states


class RefinerLayer(nn.Module):
    """Pre-norm attention and GELU MLP; positions enter the attention's input, not the residual."""

    def __init__(self, config: RefinerConfig, dim: int) -> None:
        super().__init__()
        hidden = int(dim * config.mlp_ratio)
        self.head_dim = dim // config.heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.attention_gate = nn.Parameter(torch.zeros(dim))
        self.mlp_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.project = nn.Linear(hidden, dim)
        self.mlp_gate = nn.Parameter(torch.zeros(dim))
        for linear in (self.qkv, self.output, self.expand, self.project):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, states: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
        """states (B, T, D), positions (T, D), bias from `mask_bias`."""
        x = self.qkv(self.attention_norm(states) + positions)
        q, k, v = (split_heads(part, self.head_dim) for part in x.chunk(3, dim=-1))
        if bias is not None:
            bias = bias.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        states = states + self.attention_gate * self.output(mixed.transpose(1, 2).flatten(2))
        mlp: Tensor = self.project(F.gelu(self.expand(self.mlp_norm(states))))
        return states + self.mlp_gate * mlp
