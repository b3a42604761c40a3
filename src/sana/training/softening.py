"""What a diffusion model and an autoencoder do to a clean render, imitated on a batch.

Each picture gets its own small zoom, shift and warp, then its own blur, noise around edges, and a
change of brightness, contrast, saturation and hue too small to change the name of a colour.
Everything is drawn from one generator, on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ZOOM = 0.12
SHIFT = 0.05
WARP = 0.012
"""Largest displacement of a pixel, as a fraction of the picture."""
LOW, MIDDLE = 1.0, 2.0
"""Deviations of the two blurs that a picture is mixed from, in pixels."""
HUE = math.radians(6)


def soften(pictures: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Altered copies of pictures (B, 3, H, W) in -1..1, and where their boxes [B, K, 4] went."""
    pictures, boxes = _move(pictures, boxes, generator)
    return _tint(_blur(pictures, generator), generator).clamp(-1, 1), boxes


def _move(pictures: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    count, height, width = len(pictures), *pictures.shape[-2:]
    zoom = 1 + ZOOM * _spread((count, 1, 1), generator)
    shift = SHIFT * _spread((count, 1, 2), generator)
    bend = WARP * _strength(count, generator) * _spread((count, 2, 6, 6), generator)
    bend = F.interpolate(bend, (height, width), mode="bicubic", align_corners=False)
    axes = [(torch.arange(n, device=pictures.device) + 0.5) / n - 0.5 for n in (width, height)]
    plane = torch.stack(torch.meshgrid(*axes, indexing="xy"), -1)  # [H, W, 2]
    source = (plane - shift.unsqueeze(1)) / zoom.unsqueeze(1) + bend.permute(0, 2, 3, 1)
    moved = F.grid_sample(pictures, source * 2, padding_mode="border", align_corners=False)
    corners = boxes.unflatten(-1, (2, 2)) - 0.5
    corners = corners * zoom.unsqueeze(1) + shift.unsqueeze(1) + 0.5
    return moved, corners.clamp(0, 1).flatten(-2)


def _blur(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A mix of the picture with two blurred copies, and noise where it has detail."""
    count = len(pictures)
    low = _gaussian(pictures, LOW)
    middle = _gaussian(low, MIDDLE)
    amount = 2 * _strength(count, generator) ** 2
    soft = torch.where(
        amount < 1, pictures.lerp(low, amount), low.lerp(middle, (amount - 1).clamp_min(0))
    )
    detail = _gaussian((pictures - middle).abs().mean(1, keepdim=True), MIDDLE)
    noise = _normal(pictures.shape, generator)
    ringing = _gaussian(noise, LOW) * detail * 2 * _strength(count, generator)
    return soft + ringing + 0.04 * _strength(count, generator) ** 2 * noise


def _tint(pictures: Tensor, generator: torch.Generator) -> Tensor:
    count, shape = len(pictures), (len(pictures), 1, 1, 1)
    contrast = 1 + 0.12 * _spread(shape, generator)
    brightness = 0.08 * _spread(shape, generator)
    turned = torch.einsum("bij,bjhw->bihw", _hue(count, generator), pictures)
    grey = turned.mean(1, keepdim=True)
    saturation = 1 + 0.12 * _spread(shape, generator)
    return (grey + (turned - grey) * saturation) * contrast + brightness


def _hue(count: int, generator: torch.Generator) -> Tensor:
    """Rotations [B, 3, 3] about the grey axis (Rodrigues' formula)."""
    angle = HUE * _spread((count, 1, 1), generator)
    eye = torch.eye(3, device=angle.device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angle.device) / 3**0.5
    return eye * angle.cos() + cross * angle.sin() + (1 - angle.cos()) / 3


def _gaussian(images: Tensor, sigma: float) -> Tensor:
    """Images (B, C, H, W) blurred, their borders continued.

    Each axis is a product with a banded matrix: convolutions of one channel are far slower.
    """
    rows, columns = (_band(side, sigma, images) for side in images.shape[-2:])
    return rows @ images.contiguous() @ columns.mT


def _band(side: int, sigma: float, like: Tensor) -> Tensor:
    """The matrix [side, side] that blurs a line of so many pixels."""
    reach = math.ceil(2 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=like.device)
    line = torch.exp(-offsets.to(like.dtype).square() / (2 * sigma**2))
    places = torch.arange(side, device=like.device)[:, None] + offsets
    weights = (line / line.sum()).expand(side, -1)
    empty = torch.zeros(side, side, device=like.device, dtype=like.dtype)
    return empty.scatter_add(1, places.clamp(0, side - 1), weights)


def _strength(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand((count, 1, 1, 1), generator=generator, device=generator.device)


def _spread(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * 2 - 1


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
