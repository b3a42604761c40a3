"""Networks with one technique taken out or replaced: what an ablation compares.

Each function changes a freshly made network in place. Start reading at `DIT`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.config import DiTConfig
from sana.kernels.reference import Rows
from sana.models.dcae import DCAE, Down, Up
from sana.models.dit import Block, LinearDiT
from sana.models.layers import LinearSelfAttention, split_heads

TEXT_FACTOR = 100.0
"""What text states are multiplied by: a large language model's are so much larger."""

Change: TypeAlias = Callable[[DiTConfig], LinearDiT]


class SoftmaxSelfAttention(LinearSelfAttention):
    """Softmax attention with the parameters of the linear one."""

    def forward(self, x: Tensor | Rows, perturbed: int = 0, *, clips: bool = True) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        assert not perturbed, "perturbed attention is not part of any ablation"
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        q = split_heads(self.query_norm(query), self.head_dim)
        k = split_heads(self.key_norm(key), self.head_dim)
        mixed = F.scaled_dot_product_attention(q, k, split_heads(value, self.head_dim))
        return torch.as_tensor(self.output(mixed.transpose(1, 2).flatten(2)))


class PointwiseFFN(nn.Module):
    """The mix-FFN without its 3x3 convolution."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 2 * hidden)
        self.project = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        value, gate = F.silu(self.expand(x)).chunk(2, dim=-1)
        return torch.as_tensor(self.project(value * F.silu(gate)))


class Louder(nn.Module):
    """In a refiner's place: text states times `TEXT_FACTOR`."""

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return states * TEXT_FACTOR


def plain(config: DiTConfig) -> LinearDiT:
    """Linear attention with mix-FFN, no positions: as published."""
    return LinearDiT(config)


def without_convolution(config: DiTConfig) -> LinearDiT:
    """Linear attention with a pointwise FFN."""
    network = LinearDiT(config)
    for block in _blocks(network):
        block.feed_forward = PointwiseFFN(config.width, config.mlp_width)  # type: ignore[assignment]
    _initialize(network)
    return network


def softmax(config: DiTConfig) -> LinearDiT:
    """Softmax attention with a pointwise FFN: a plain transformer."""
    network = without_convolution(config)
    for block in _blocks(network):
        block.attention = SoftmaxSelfAttention(config)
    _initialize(network)
    return network


def with_positions(change: Change) -> Change:
    """The same with a sin-cos table added to the tokens."""
    return lambda config: change(replace(config, position_scale=1.0))


def loud(*, scale: float | None) -> Change:
    """Large text states, with the norm's first scale, or without the norm."""

    def change(config: DiTConfig) -> LinearDiT:
        network = LinearDiT(replace(config, text_norm_scale=0.01 if scale is None else scale))
        network.refiner = Louder()  # type: ignore[assignment]
        if scale is None:
            network.text_norm = nn.Identity()  # type: ignore[assignment]
        return network

    return change


def without_shortcuts(network: DCAE) -> None:
    """No residual shortcut around the layers that change the resolution (DC-AE, section 3.1)."""
    for module in network.modules():
        if isinstance(module, Down | Up):
            module.has_shortcut = False


DIT: Mapping[str, Mapping[str, Change]] = MappingProxyType(
    {
        "attention": {
            "linear, mix-FFN": plain,
            "linear, pointwise FFN": without_convolution,
            "softmax, pointwise FFN": softmax,
        },
        "positions": {
            "convolution, no positions": plain,
            "convolution, positions": with_positions(plain),
            "no convolution, no positions": without_convolution,
            "no convolution, positions": with_positions(without_convolution),
        },
        "text-norm": {
            "norm, scale 0.01": loud(scale=0.01),
            "norm, scale 1": loud(scale=1.0),
            "no norm": loud(scale=None),
        },
    }
)
"""The variants of each row that compares transformers; the first is the published one."""


def _blocks(network: LinearDiT) -> list[Block]:
    return [block for block in network.blocks if isinstance(block, Block)]


def _initialize(network: LinearDiT) -> None:
    """As `LinearDiT` starts, for the parts that were put in."""
    network.initialize()
    nn.init.zeros_(network.output.weight)
