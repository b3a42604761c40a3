"""The two convolution blocks of the sticker world's judges (He et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Normed(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, narrow: int, wide: int, *, kernel: int, stride: int = 1) -> None:
        super().__init__()
        padding = (kernel - stride + 1) // 2
        self.conv = nn.Conv2d(narrow, wide, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(wide, momentum=0.03)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Residual(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))) (figure 2 there)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = Normed(width, width, kernel=3)
        self.second = Normed(width, width, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second.norm(self.second.conv(self.first(x)))
        return F.relu(x + y)


def stages(widths: tuple[int, ...], depths: tuple[int, ...]) -> nn.ModuleList:
    """Residual stages, each but the first at half the side of the one before."""
    narrow = (widths[0], *widths[:-1])
    return nn.ModuleList(
        nn.Sequential(
            nn.Identity() if index == 0 else Normed(narrow[index], wide, kernel=3, stride=2),
            *[Residual(wide) for _ in range(depth)],
        )
        for index, (wide, depth) in enumerate(zip(widths, depths, strict=True))
    )


def initialize(module: nn.Module) -> None:
    """He's weights; each residual block starts as the identity, kernels lie channels last."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
        if isinstance(part, Residual):
            nn.init.zeros_(part.second.norm.weight)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
