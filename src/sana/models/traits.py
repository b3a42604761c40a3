"""Names the style of a sticker and the attributes of a portrait: one label in each of some slots.

A residual network over the whole picture, its mean, and a linear head for each slot. The slots and
their labels are data: whoever trains it says which there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sana.models.residual import Normed, initialize, stages

WIDTHS = (64, 128, 256, 256)
DEPTHS = (1, 2, 2, 2)


class Traits(nn.Module):
    """`slots` maps a slot's name to how many labels it has."""

    def __init__(
        self,
        slots: Mapping[str, int],
        *,
        widths: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
    ) -> None:
        super().__init__()
        self.stem = Normed(3, widths[0], kernel=8, stride=4)
        self.stages = stages(tuple(widths), tuple(depths))
        self.heads = nn.ModuleDict(
            {slot: nn.Linear(widths[-1], count) for slot, count in slots.items()}
        )
        initialize(self)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits [B, labels] of each slot, for pictures (B, 3, 256, 256) in -1..1."""
        x = self.stem(pictures.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
        pooled = x.mean((2, 3))
        return {slot: head(pooled) for slot, head in self.heads.items()}
