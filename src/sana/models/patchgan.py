"""PatchGAN discriminator: one realness score for each overlapping patch of an image.

After Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017),
section 3.2.2; used in the last phase of DC-AE training. Group norm replaces batch norm, so that a
score does not depend on the other pictures of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchGAN(nn.Module):
    """`depth` stride-2 convolutions, then one score map: (B, 3, H, W) in -1..1 -> (B, 1, h, w)."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for index in range(1, depth + 1):
            stride = 2 if index < depth else 1
            narrow, wide = width * min(2 ** (index - 1), 8), width * min(2**index, 8)
            layers += [
                nn.Conv2d(narrow, wide, 4, stride, 1, bias=False),
                nn.GroupNorm(min(16, wide), wide),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width * min(2**depth, 8), 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.layers(images))
