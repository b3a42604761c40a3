"""How the DC-AE's maps change resolution and channels (2410.10733): shuffles, averages, repeats.

Maps are (B, C, H, W) in channels-last memory, which every function here writes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sana.kernels import ops


def channels_last(x: Tensor) -> Tensor:
    """The same map in channels-last memory."""
    return x.contiguous(memory_format=torch.channels_last)


def unshuffle(x: Tensor) -> Tensor:
    """Pixel unshuffle by 2, (B, C, 2H, 2W) -> (B, 4C, H, W), written channels last."""
    x = torch.unflatten(x.permute(0, 2, 3, 1), 2, (-1, 2))
    x = torch.unflatten(x, 1, (-1, 2))  # (B, H, 2, W, 2, C)
    return x.permute(0, 1, 3, 5, 2, 4).flatten(3).permute(0, 3, 1, 2)


def shuffle(x: Tensor) -> Tensor:
    """Pixel shuffle by 2, (B, 4C, H, W) -> (B, C, 2H, 2W), written channels last."""
    x = torch.unflatten(x.permute(0, 2, 3, 1), -1, (-1, 2, 2))  # (B, H, W, C, 2, 2)
    return x.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def average_channels(x: Tensor, channels: int) -> Tensor:
    """Means over consecutive channels, so that `channels` are left."""
    groups = torch.unflatten(x.permute(0, 2, 3, 1), -1, (channels, -1))
    return groups.mean(dim=-1).permute(0, 3, 1, 2)


def repeat_channels(x: Tensor, channels: int) -> Tensor:
    """Each channel repeated in place, up to `channels`."""
    repeats = channels // x.shape[1]
    x = x.permute(0, 2, 3, 1).unsqueeze(-1).expand(-1, -1, -1, -1, repeats)
    return x.flatten(-2).permute(0, 3, 1, 2)


def transposed(weight: Tensor) -> Tensor:
    """3x3 after nearest enlargement by 2 (out, in, 3, 3) -> 4x4 at stride 2 (in, out, 4, 4).

    Along each side an output cell sees one input cell through one tap and its neighbor through the
    sum of the other two.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for dim in (2, 3):
        first, middle, last = wide.unbind(dim)
        wide = torch.stack([last, middle + last, first + middle, first], dim)
    return channels_last(wide.to(weight.dtype).transpose(0, 1))


def windows(weight: Tensor) -> Tensor:
    """3x3 after nearest enlargement by 2 (out, in, 3, 3) -> 2x2 to (4 out, in, 2, 2), border 1.

    Place 2a + b of an output cell (2i + a, 2j + b) is out channels 2a + b of the result, at window
    (i + a, j + b). Sums are taken in fp32.
    """
    if ops.fuses(weight):
        from sana.kernels import resample

        made: Tensor = resample.window_taps(weight)
        return made.permute(0, 3, 1, 2)
    taps = weight.permute(0, 2, 3, 1).flatten(1, 2)  # (out, 9, in)
    summed = _sums_of_taps(weight.device, weight.dtype) @ taps  # (out, 16, in)
    made = torch.unflatten(summed, 1, (4, 2, 2))  # (out, place, y, x, in)
    return made.transpose(0, 1).flatten(0, 1).contiguous().permute(0, 3, 1, 2)


@cache
def _sums_of_taps(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(16, 9): which of the nine taps (y, x) are summed for place (a, b) and tap (y, x) of 2x2.

    Made once, since a CUDA graph cannot copy from the host.
    """
    side = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (a, y, tap)
    both = side[:, None, :, None, :, None] * side[None, :, None, :, None, :]
    return both.flatten(4).flatten(0, 3).to(device, dtype)


def product_by_groups(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution by groups, (B, G D, H, W) with (G E, D, 1, 1) -> (B, G E, H, W).

    One batched matrix product, G times (B H W, D) by (D, E), read from and written to channels-last
    memory without a copy. For inference: the result is written in place, which has no gradient.
    """
    groups = x.shape[1] // weight.shape[1]
    kernels = torch.unflatten(weight.flatten(1), 0, (groups, -1)).mT  # (G, D, E)
    rows = channels_last(x).permute(0, 2, 3, 1)  # (B, H, W, G D)
    out = rows.new_empty((*rows.shape[:3], len(weight)))
    by_group = torch.unflatten(rows.flatten(0, 2), 1, (groups, -1)).transpose(0, 1)
    place = torch.unflatten(out.flatten(0, 2), 1, (groups, -1)).transpose(0, 1)
    torch.bmm(by_group, kernels, out=place)
    return out.permute(0, 3, 1, 2)
