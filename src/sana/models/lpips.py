"""LPIPS (Zhang et al. 2018, eq. 1) with VGG-16: how different two pictures look to a person.

Features after each of five stages, scaled to length 1 at every place; squared differences weighted
by channel, averaged over places, added up. The convolutions are ImageNet's of torchvision and the
channel weights those published as version 0.1, which the package torchmetrics carries.

Shape letters: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.models.hed import WIDTHS

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-8


class Lpips(nn.Module):
    """Frozen; two batches (B, 3, H, W) in -1..1 -> distances (B,), at least 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(narrow, wide, 3, padding=1)
                for narrow, wide in zip(widths, widths[1:], strict=False)
            )
            for widths in WIDTHS
        )
        self.weights = nn.ParameterList(torch.zeros(widths[-1]) for widths in WIDTHS)
        self.requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        total = first.new_zeros(len(first), dtype=torch.float32)
        pairs = zip(self.features(first), self.features(second), self.weights, strict=True)
        for a, b, weight in pairs:
            gap = (_unit(a) - _unit(b)).square()
            total = total + (gap * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Activations at the end of each stage."""
        shift, scale = (pictures.new_tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        x = (pictures - shift) / scale
        found = []
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, nn.ModuleList)
            if index:
                x = F.max_pool2d(x, 2)
            for convolution in stage:
                x = F.relu(convolution(x))
            found.append(x)
        return found


def from_published(vgg: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for torchvision's VGG-16 and version 0.1's channel weights; KeyError if lacking."""
    tensors: dict[str, Tensor] = {}
    place = 0
    for stage, widths in enumerate(WIDTHS):
        for index in range(len(widths) - 1):
            for part in ("weight", "bias"):
                tensors[f"stages.{stage}.{index}.{part}"] = vgg[f"features.{place}.{part}"]
            place += 2  # a ReLU follows each
        place += 1  # and a pooling each stage
        tensors[f"weights.{stage}"] = heads[f"lin{stage}.model.1.weight"].flatten()
    return tensors


def _unit(feature: Tensor) -> Tensor:
    return feature / (feature.square().sum(1, keepdim=True) + EPS).sqrt()
