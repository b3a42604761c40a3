"""Turns an object's main colour into another and keeps its shading, highlights and other details.

Pixels are judged in OKLab (Ottosson, 2020): those whose hue lies in the sprite's main hue family
get a new colour from a ramp of shadow, middle and light tones, looked up by their lightness
relative to the sprite's own; neutral pixels (highlights, outlines) keep their grey. Start at
`recolor`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sana.data.stickers.scene import COLORS

# Shadow, lower middle, middle, upper middle and light tone of each colour, sRGB.
_RAMPS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((104, 8, 24), (176, 18, 32), (226, 38, 44), (246, 84, 76), (255, 168, 156)),
    "orange": ((150, 58, 0), (214, 96, 4), (250, 138, 22), (255, 172, 72), (255, 216, 158)),
    "yellow": ((186, 116, 0), (234, 170, 4), (255, 208, 34), (255, 226, 92), (255, 244, 178)),
    "green": ((10, 82, 30), (24, 124, 48), (52, 168, 70), (104, 202, 104), (184, 236, 172)),
    "blue": ((8, 34, 122), (20, 66, 184), (38, 104, 232), (92, 152, 250), (176, 210, 255)),
    "purple": ((56, 16, 112), (90, 36, 162), (128, 66, 208), (166, 114, 234), (216, 186, 250)),
    "pink": ((178, 36, 104), (226, 76, 142), (250, 124, 178), (255, 164, 204), (255, 212, 232)),
    "brown": ((54, 26, 12), (90, 50, 26), (130, 78, 44), (168, 114, 74), (214, 174, 138)),
    "black": ((6, 6, 9), (20, 20, 25), (38, 38, 45), (70, 70, 80), (140, 140, 152)),
    "white": ((150, 154, 170), (198, 202, 214), (232, 235, 242), (247, 248, 251), (255, 255, 255)),
}
_TO_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
_STOPS = 5
_BINS = 36
_SOFT = 0.3


class Hues(NamedTuple):
    """A sprite's main colour family: hue, half width, tones, chroma; fp32 [S].

    Angles are in radians; `light` and `spread` are mean and deviation of its lightness.
    """

    hue: Tensor
    width: Tensor
    light: Tensor
    spread: Tensor
    chroma: Tensor

    def rows(self, index: Tensor) -> Hues:
        """The families of some sprites."""
        return Hues(*(field[index] for field in self))


class Tables(NamedTuple):
    """Constants on one device: ramps [colours, 5, 3] in 0..1 and the two matrices of OKLab."""

    ramps: Tensor
    to_cones: Tensor
    to_lab: Tensor


def make_tables(device: torch.device) -> Tables:
    """The constants, made once: copying them to a GPU for each batch would wait for it."""
    ramps = torch.tensor([_RAMPS[name] for name in COLORS]) / 255.0
    return Tables(
        *(table.to(device) for table in (ramps, torch.tensor(_TO_CONES), torch.tensor(_TO_LAB)))
    )


def measure_hues(sprites: Tensor, tables: Tables) -> Hues:
    """The main colour family of sprites uint8 [S, H, W, 4], straight alpha, from 1 in 16 pixels."""
    pixels = sprites[:, ::4, ::4].float() / 255
    lightness, a, b = _oklab(pixels[..., :3], tables).unbind(-1)
    chroma, hue = torch.hypot(a, b), torch.atan2(b, a)
    weight = pixels[..., 3] * ((chroma - 0.03) / 0.05).clamp(0, 1) * (0.05 + chroma)
    lightness, hue, weight = lightness.flatten(1), hue.flatten(1), weight.flatten(1)
    place = (hue / (2 * math.pi) * _BINS).floor().long() % _BINS
    histogram = torch.zeros(len(sprites), _BINS, device=sprites.device)
    histogram.scatter_add_(1, place, weight)
    smooth = sum(histogram.roll(shift, 1) * (3 - abs(shift)) for shift in range(-2, 3))
    assert isinstance(smooth, Tensor)
    center = (smooth.argmax(1).float() + 0.5) * (2 * math.pi / _BINS)
    for _ in range(2):
        apart = _turn(hue - center[:, None])
        near = weight * (apart.abs() < math.radians(45))
        total = near.sum(1).clamp(min=1e-6)
        center = center + (near * apart).sum(1) / total
    apart = _turn(hue - center[:, None])
    near = weight * (apart.abs() < math.radians(50))
    total = near.sum(1).clamp(min=1e-6)
    deviation = ((near * apart.square()).sum(1) / total).sqrt()
    width = (3.0 * deviation).clamp(math.radians(30), math.radians(64))
    light = (near * lightness).sum(1) / total
    spread = ((near * (lightness - light[:, None]).square()).sum(1) / total).sqrt()
    mean_chroma = (near * chroma.flatten(1)).sum(1) / total
    return Hues(center, width, light, spread, mean_chroma)


def recolor(colors: Tensor, targets: Tensor, hues: Hues, tables: Tables) -> Tensor:
    """Pictures [B, H, W, 3] in 0..1 with their main colour turned to `COLORS[targets]`."""
    lightness, a, b = _oklab(colors, tables).unbind(-1)
    hue, width, light, spread, mean_chroma = (field[:, None, None] for field in hues)
    chroma = torch.hypot(a, b)
    apart = _turn(torch.atan2(b, a) - hue).abs()
    family = ((width - apart) / _SOFT + 1).clamp(0, 1)
    low, step = (0.15 * mean_chroma).clamp(max=0.015), (0.4 * mean_chroma).clamp(1e-3, 0.05)
    vivid = _smooth((chroma - low) / step)
    family = torch.where(chroma < 0.02, torch.ones_like(family), family)
    gain = 0.25 / spread.clamp(min=0.07)
    tone = (0.5 + (lightness - light) * gain).clamp(0, 1)
    target = _look_up(tables.ramps, targets, tone)
    gray = colors.mean(-1, keepdim=True)
    vivid = vivid[..., None]
    painted = target * vivid + gray * (1 - vivid)
    return colors.lerp(painted, family[..., None])


def _look_up(ramps: Tensor, targets: Tensor, tone: Tensor) -> Tensor:
    """Ramp colours [B, H, W, 3] for tones in 0..1, linear between the stops."""
    stops = ramps[targets][:, None, None]  # [B, 1, 1, stops, 3]
    position = tone[..., None] * (_STOPS - 1)
    result = torch.zeros_like(position)
    for stop in range(_STOPS):
        result = result + stops[..., stop, :] * (1 - (position - stop).abs()).clamp(min=0)
    return result


def _smooth(share: Tensor) -> Tensor:
    share = share.clamp(0, 1)
    return share * share * (3 - 2 * share)


def _turn(angle: Tensor) -> Tensor:
    """An angle brought to -pi..pi."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def _oklab(colors: Tensor, tables: Tables) -> Tensor:
    """sRGB in 0..1 to OKLab, with a square for sRGB's curve: only the coarse hue matters here."""
    cones = (colors.square() @ tables.to_cones.T).clamp(min=1e-6)
    return cones.pow(1 / 3) @ tables.to_lab.T
