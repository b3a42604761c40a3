"""Inception-v3 (Szegedy et al. 2016) up to its 2048 pooled features, as Frechet distances want it.

`is_fid` is the network of 2015-12-05 that FID was published with: its last block takes the maximum
where the others average, and it sees -1..1. Names are those of its published PyTorch file; `fc` is
not run. Without it is Keras's, which averages everywhere and, as the package nsfwjs has it, sees
0..1. Pictures are resized to 299 by their neighbours, without antialiasing, as pytorch-fid does.

Shape letters: B batch, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 299
WIDTH = 2048


class Step(NamedTuple):
    """One convolution of a branch."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Branch(NamedTuple):
    """Steps in order, and at the end `fork`, whose outputs stand side by side."""

    steps: tuple[Step, ...]
    fork: tuple[Step, ...] = ()
    pools: bool = False


class Conv(nn.Module):
    """Convolution, normalization, ReLU."""

    def __init__(self, into: int, step: Step, *, is_padded: bool = True) -> None:
        super().__init__()
        high, wide = step.kernel
        pad = (high // 2, wide // 2) if is_padded and step.stride == 1 else (0, 0)
        self.conv = nn.Conv2d(into, step.width, step.kernel, step.stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(step.width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches side by side; `width` is the number of channels that come out."""

    def __init__(self, into: int, branches: tuple[Branch, ...], *, pooling: str = "mean") -> None:
        super().__init__()
        self.branches, self.pooling = branches, pooling
        self.width = 0
        for branch in branches:
            last = into
            for step in branch.steps:
                self.add_module(step.name, Conv(last, step))
                last = step.width
            for step in branch.fork:
                self.add_module(step.name, Conv(last, step))
            self.width += sum(step.width for step in branch.fork) or last

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for branch in self.branches:
            y = self._pooled(x) if branch.pools else x
            for step in branch.steps:
                y = self.get_submodule(step.name)(y)
            parts += [self.get_submodule(step.name)(y) for step in branch.fork] or [y]
        return torch.cat(parts, dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pooling == "mean":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if self.pooling == "maximum":
            return F.max_pool2d(x, 3, 1, 1)
        return F.max_pool2d(x, 3, 2)


class Inception(nn.Module):
    """`forward` of pictures (B, 3, H, W) in 0..1 gives features (B, 2048)."""

    def __init__(self, *, is_fid: bool = True) -> None:
        super().__init__()
        self.is_fid = is_fid
        self.Conv2d_1a_3x3 = Conv(3, Step("", 32, (3, 3), 2))
        self.Conv2d_2a_3x3 = Conv(32, Step("", 32, (3, 3)), is_padded=False)
        self.Conv2d_2b_3x3 = Conv(32, Step("", 64, (3, 3)))
        self.Conv2d_3b_1x1 = Conv(64, Step("", 80))
        self.Conv2d_4a_3x3 = Conv(80, Step("", 192, (3, 3)), is_padded=False)
        self.names: list[str] = []
        width = 192
        for name, branches, pooling in _blocks(is_fid=is_fid):
            block = Block(width, branches, pooling=pooling)
            self.add_module(name, block)
            self.names.append(name)
            width = block.width
        assert width == WIDTH
        if is_fid:
            self.fc = nn.Linear(WIDTH, 1008)
        self.requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self.Conv2d_1a_3x3(2 * x - 1 if self.is_fid else x)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def _blocks(*, is_fid: bool) -> list[tuple[str, tuple[Branch, ...], str]]:
    last = "maximum" if is_fid else "mean"
    return [
        ("Mixed_5b", _narrow(32), "mean"),
        ("Mixed_5c", _narrow(64), "mean"),
        ("Mixed_5d", _narrow(64), "mean"),
        ("Mixed_6a", _shrink_first(), "stride"),
        ("Mixed_6b", _long(128), "mean"),
        ("Mixed_6c", _long(160), "mean"),
        ("Mixed_6d", _long(160), "mean"),
        ("Mixed_6e", _long(192), "mean"),
        ("Mixed_7a", _shrink_second(), "stride"),
        ("Mixed_7b", _wide(), "mean"),
        ("Mixed_7c", _wide(), last),
    ]


def _narrow(pooled: int) -> tuple[Branch, ...]:
    """Figure 5 of the paper: 1x1, 5x5, two 3x3, and a pooled branch."""
    double = (
        Step("branch3x3dbl_1", 64),
        Step("branch3x3dbl_2", 96, (3, 3)),
        Step("branch3x3dbl_3", 96, (3, 3)),
    )
    return (
        Branch((Step("branch1x1", 64),)),
        Branch((Step("branch5x5_1", 48), Step("branch5x5_2", 64, (5, 5)))),
        Branch(double),
        Branch((Step("branch_pool", pooled),), pools=True),
    )


def _shrink_first() -> tuple[Branch, ...]:
    double = (
        Step("branch3x3dbl_1", 64),
        Step("branch3x3dbl_2", 96, (3, 3)),
        Step("branch3x3dbl_3", 96, (3, 3), 2),
    )
    return (
        Branch((Step("branch3x3", 384, (3, 3), 2),)),
        Branch(double),
        Branch((), pools=True),
    )


def _long(inner: int) -> tuple[Branch, ...]:
    """Figure 6: 7x7 as a row and a column."""
    double = (
        Step("branch7x7dbl_1", inner),
        Step("branch7x7dbl_2", inner, (7, 1)),
        Step("branch7x7dbl_3", inner, (1, 7)),
        Step("branch7x7dbl_4", inner, (7, 1)),
        Step("branch7x7dbl_5", 192, (1, 7)),
    )
    single = (
        Step("branch7x7_1", inner),
        Step("branch7x7_2", inner, (1, 7)),
        Step("branch7x7_3", 192, (7, 1)),
    )
    return (
        Branch((Step("branch1x1", 192),)),
        Branch(single),
        Branch(double),
        Branch((Step("branch_pool", 192),), pools=True),
    )


def _shrink_second() -> tuple[Branch, ...]:
    long = (
        Step("branch7x7x3_1", 192),
        Step("branch7x7x3_2", 192, (1, 7)),
        Step("branch7x7x3_3", 192, (7, 1)),
        Step("branch7x7x3_4", 192, (3, 3), 2),
    )
    return (
        Branch((Step("branch3x3_1", 192), Step("branch3x3_2", 320, (3, 3), 2))),
        Branch(long),
        Branch((), pools=True),
    )


def _wide() -> tuple[Branch, ...]:
    """Figure 7: a row and a column side by side at the end."""
    fork = (Step("branch3x3_2a", 384, (1, 3)), Step("branch3x3_2b", 384, (3, 1)))
    double = (Step("branch3x3dbl_1", 448), Step("branch3x3dbl_2", 384, (3, 3)))
    ends = (Step("branch3x3dbl_3a", 384, (1, 3)), Step("branch3x3dbl_3b", 384, (3, 1)))
    return (
        Branch((Step("branch1x1", 320),)),
        Branch((Step("branch3x3_1", 384),), fork),
        Branch(double, ends),
        Branch((Step("branch_pool", 192),), pools=True),
    )
