"""Int8 storage of frozen text weights: one scale for each 64 columns of a row, fp16 for the rest.

A group g of W is kept as round(g / s) in -127..127 with s = max|g| / 127 rounded to fp16; the
numbers are rounded against the fp16 scale, so its own rounding costs nothing. Small matrices stay
fp16: on all-MiniLM-L6-v2 the 96 positions alone cause as much error as half of the layers. Start
reading at `pack`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sana.errors import CheckpointError

SCALE_SUFFIX = ".scale"
GROUP = 64
SMALL = 65_536


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices [R, C] become int8 `name` and fp16 `name.scale` [R, groups]; other floats fp16."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.is_floating_point() and tensor.numel() >= SMALL:
            packed[name], packed[name + SCALE_SUFFIX] = _quantize(tensor)
        else:
            packed[name] = tensor.half() if tensor.is_floating_point() else tensor
    return packed


def unpack(packed: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Float32 tensors from `pack`'s result; an int8 matrix without a fitting scale is an error."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in packed:
            continue
        if tensor.dtype == torch.int8:
            scale = packed.get(name + SCALE_SUFFIX)
            if scale is None or not _fits(tensor, scale):
                shape = "missing" if scale is None else f"of shape {tuple(scale.shape)}"
                raise CheckpointError(
                    f"{source}: {name} is int8 {tuple(tensor.shape)} and its scale is {shape}; it "
                    "needs one for each row and group of columns; get the file again"
                )
            groups = tensor.float().unflatten(1, (scale.shape[1], -1))
            tensors[name] = groups.mul_(scale.float().unsqueeze(-1)).flatten(1)
        else:
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def _fits(matrix: Tensor, scale: Tensor) -> bool:
    return (
        scale.ndim == matrix.ndim == 2
        and scale.shape[0] == matrix.shape[0]
        and scale.shape[1] > 0
        and matrix.shape[1] % scale.shape[1] == 0
    )


def _quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    columns = matrix.shape[1]
    count = columns // GROUP if columns % GROUP == 0 else 1
    groups = matrix.float().unflatten(1, (count, -1))  # [R, groups, columns of a group]
    scale = (groups.abs().amax(dim=2, keepdim=True) / 127).half()
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    numbers = (groups / divisor).round_().clamp_(-127, 127).to(torch.int8)
    return numbers.flatten(1), scale.squeeze(2)
