"""Paints backgrounds for a batch of pictures on any device, from six numbers each.

Shapes: B pictures, S side. Coordinates x and y run from 0 to 1, y downwards; edges are soft over
one pixel. A landscape is a function of (Brush, knobs [B, 1, 1, 6]) in `PAINTERS`. Start at `paint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sana.data.stickers.backgrounds import KINDS

Color = tuple[int, int, int]


class Palette:
    """Colours as tensors on a device, each copied there once: a copy waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[Color, Tensor] = {}

    def color(self, color: Color) -> Tensor:
        """A colour [3] in 0..1."""
        if color not in self._kept:
            self._kept[color] = torch.tensor(color, dtype=torch.float32).div(255).to(self.device)
        return self._kept[color]


class Brush:
    """A canvas [B, S, S, 3] in 0..1 with its coordinate grids x [1, 1, S] and y [1, S, 1]."""

    def __init__(self, count: int, size: int, palette: Palette) -> None:
        device = palette.device
        axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
        self.color = palette.color
        self.size = size
        self.x = axis[None, None, :]
        self.y = axis[None, :, None]
        self.canvas = torch.zeros(count, size, size, 3, device=device)

    def sky(self, top: Color, bottom: Color, end: float = 1.0) -> None:
        """Fill everything with a vertical gradient that ends at height `end`."""
        share = (self.y / end).clamp(0, 1)[..., None]
        self.canvas[:] = self.color(top).lerp(self.color(bottom), share)

    def cover(
        self, inside: Tensor, top: Color, bottom: Color | None = None, start: float = 0.0
    ) -> None:
        """Lay a colour, or a gradient from height `start` down, where `inside` (0..1) says."""
        paint = self.color(top)
        if bottom is not None:
            share = ((self.y - start) / (1 - start)).clamp(0, 1)[..., None]
            paint = paint.lerp(self.color(bottom), share)
        self.canvas.lerp_(paint.expand_as(self.canvas), inside[..., None].expand_as(self.canvas))

    def soft(self, distance: Tensor, width: float = 1.0) -> Tensor:
        """1 where the distance is positive, 0 where negative, a ramp of `width` pixels between."""
        return (distance * (self.size / width) + 0.5).clamp(0, 1)

    def below(self, line: Tensor | float) -> Tensor:
        """Inside of the region under a horizon line."""
        return self.soft(self.y - line).expand(self.canvas.shape[:3])

    def disc(self, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
        """Inside of a circle."""
        return self.soft(radius - torch.hypot(self.x - x, self.y - y))


def paint(kinds: Tensor, colors: Tensor, knobs: Tensor, size: int, palette: Palette) -> Tensor:
    """Backgrounds [B, S, S, 3] in 0..1, fp32, on the palette's device.

    kinds: int64 [B] on the CPU, index into `KINDS`. colors: uint8 [B, 2, 3]. knobs: fp32 [B, 6].
    """
    device = palette.device
    ends = send(colors, device).float() / 255
    canvas = ends[:, 0, None, None, :].repeat(1, size, size, 1)
    for kind in kinds.unique().tolist():
        if KINDS[kind] == "plain":
            continue
        rows = (kinds == kind).nonzero().flatten()
        turns = send(knobs[rows], device)[:, None, None, :]
        rows = send(rows, device)
        brush = Brush(len(rows), size, palette)
        if KINDS[kind] == "gradient":
            share = _gradient(brush, turns)[..., None]
            first, last = ends[rows][:, :, None, None, :].unbind(1)
            canvas[rows] = first.lerp(last, share)
        else:
            PAINTERS[KINDS[kind]](brush, turns)
            canvas[rows] = brush.canvas
    return canvas


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; pageable memory would make a GPU's copy wait for its stream."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _gradient(brush: Brush, knobs: Tensor) -> Tensor:
    x, y = brush.x - 0.5, brush.y - 0.5
    angle = (knobs[..., 0] - 0.5) * (math.pi / 2)
    straight = 0.5 + y * angle.cos() + x * angle.sin()
    round_ = torch.hypot(x, y) * 1.5
    return torch.where(knobs[..., 1] < 0.7, straight, round_).clamp(0, 1)


def _hill(brush: Brush, top: Tensor, knob: Tensor, bend: float = 0.5) -> Tensor:
    """A horizon that is highest, at height `top`, somewhere in the middle half."""
    return top + bend * (brush.x - 0.25 - 0.5 * knob).square()


def _clouds(brush: Brush, knobs: Tensor) -> None:
    for number in range(2):
        x = 0.12 + 0.3 * knobs[..., number] + 0.46 * number
        y = 0.08 + 0.14 * knobs[..., number + 2]
        inside = torch.zeros_like(brush.canvas[..., 0])
        for shift, lift, radius in ((-0.07, 0.0, 0.035), (0.0, 0.015, 0.055), (0.07, 0.0, 0.04)):
            inside = torch.maximum(inside, brush.disc(x + shift, y - lift, radius))
        inside = inside * brush.soft(y + 0.02 - brush.y, 3.0)
        brush.cover(inside * 0.85, (255, 255, 255))


def _stars(brush: Brush, knobs: Tensor, cells: int) -> Tensor:
    """One star in most cells of a grid, at a place and size that a hash of the cell gives."""
    x, y = brush.x * cells + 50 * knobs[..., 4], brush.y * cells + 50 * knobs[..., 5]
    column, row = x.floor(), y.floor()

    def noise(seed: float) -> Tensor:
        return (torch.sin(column * 12.9898 + row * 78.233 + seed) * 43758.5453).frac().abs()

    radius = 0.03 + 0.08 * noise(3.1) * (noise(7.7) > 0.35)
    near = torch.hypot(x - column - 0.2 - 0.6 * noise(1.3), y - row - 0.2 - 0.6 * noise(2.9))
    return brush.soft((radius - near) / cells) * (radius > 0.035)


def _meadow(brush: Brush, knobs: Tensor) -> None:
    brush.sky((112, 186, 244), (206, 234, 252), 0.6)
    _clouds(brush, knobs)
    high = 0.5 + 0.08 * knobs[..., 4]
    brush.cover(brush.below(_hill(brush, high, 1 - knobs[..., 5])), (150, 206, 110))
    front = brush.below(_hill(brush, high + 0.08, knobs[..., 5]))
    brush.cover(front, (124, 192, 84), (88, 160, 62), 0.55)


def _beach(brush: Brush, knobs: Tensor) -> None:
    brush.sky((120, 194, 246), (214, 238, 252), 0.45)
    _clouds(brush, knobs)
    sea = 0.4 + 0.06 * knobs[..., 4]
    brush.cover(brush.below(sea), (38, 132, 196), (92, 196, 214), 0.4)
    shore = sea + 0.16 + 0.015 * torch.sin((brush.x * 1.5 + knobs[..., 5]) * 2 * math.pi)
    brush.cover(brush.below(shore), (246, 250, 250))
    brush.cover(brush.below(shore + 0.018), (244, 220, 166), (228, 194, 134), 0.6)


def _snow(brush: Brush, knobs: Tensor) -> None:
    brush.sky((160, 196, 232), (222, 234, 246), 0.6)
    high = 0.5 + 0.08 * knobs[..., 0]
    brush.cover(brush.below(_hill(brush, high, 1 - knobs[..., 1])), (226, 236, 248))
    brush.cover(
        brush.below(_hill(brush, high + 0.08, knobs[..., 1])), (252, 253, 255), (226, 236, 248), 0.6
    )


def _table(brush: Brush, knobs: Tensor) -> None:
    brush.sky((244, 234, 218), (232, 216, 192), 0.6)
    edge = 0.52 + 0.06 * knobs[..., 0]
    top = brush.below(edge)
    brush.cover(top, (196, 134, 84), (158, 98, 56), 0.5)
    depth = (brush.y - edge).clamp(min=0.0) + 0.25
    plank = ((brush.x - 0.5) / depth * 1.1 + knobs[..., 1]).sub(0.5)
    seam = (plank - plank.round()).abs() * depth / 1.1
    brush.cover(top * brush.soft(0.002 - seam, 1.5) * 0.45, (104, 62, 34))
    brush.cover(top * brush.soft(edge + 0.012 - brush.y), (214, 156, 104))


def _night(brush: Brush, knobs: Tensor) -> None:
    brush.sky((12, 18, 56), (46, 62, 122), 0.85)
    brush.cover(_stars(brush, knobs, 13), (255, 250, 224))
    hill = _hill(brush, 0.72 + 0.06 * knobs[..., 0], knobs[..., 1])
    brush.cover(brush.below(hill), (26, 46, 52), (16, 30, 36), 0.7)


def _desert(brush: Brush, knobs: Tensor) -> None:
    brush.sky((142, 204, 236), (250, 232, 200), 0.55)
    wave = brush.x * 2 * math.pi
    far = 0.5 + 0.05 * torch.sin(wave * 0.8 + 6.28 * knobs[..., 0])
    near = 0.62 + 0.05 * torch.sin(wave * 0.6 + 6.28 * knobs[..., 1])
    brush.cover(brush.below(far), (226, 164, 92))
    brush.cover(brush.below(near), (240, 188, 116), (218, 156, 84), 0.6)


def _sunset(brush: Brush, knobs: Tensor) -> None:
    brush.sky((104, 84, 158), (255, 176, 96), 0.62)
    x, sea = 0.3 + 0.4 * knobs[..., 0], 0.6 + 0.06 * knobs[..., 1]
    brush.cover(brush.disc(x, sea - 0.02, 0.12), (255, 238, 170))
    brush.cover(brush.below(sea), (150, 92, 132), (58, 48, 106), 0.6)
    width = 0.1 - 0.12 * (brush.y - sea)
    glow = brush.below(sea) * ((width - (brush.x - x).abs()) * 12).clamp(0, 1)
    brush.cover(glow * (1.15 - brush.y) * 0.9, (255, 206, 140))


def _mountains(brush: Brush, knobs: Tensor) -> None:
    brush.sky((118, 188, 242), (220, 238, 250), 0.6)
    for count, high, drop, color, snow in (
        (2.4, 0.22, 0.22, (136, 152, 182), (236, 242, 250)),
        (3.4, 0.36, 0.16, (98, 118, 148), (226, 234, 244)),
    ):
        place = brush.x * count + knobs[..., 0] * 7 * count
        number = place.floor()
        peak = high + 0.08 * (torch.sin(number * 12.99 + 4.1) * 4375.85).frac().abs()
        slope = peak + 2 * drop * (place - number - 0.5).abs()
        brush.cover(brush.below(slope), color)
        line = peak + 0.065 + 0.012 * torch.sin(place * 30)
        brush.cover(brush.below(slope) * brush.soft(line - brush.y), snow)
    ground = _hill(brush, 0.54 + 0.05 * knobs[..., 2], knobs[..., 3], 0.3)
    brush.cover(brush.below(ground), (128, 186, 98), (92, 150, 72), 0.55)


def _street(brush: Brush, knobs: Tensor) -> None:
    brush.sky((150, 200, 240), (228, 240, 250), 0.6)
    road = 0.66
    for count, high, color, window in (
        (7.0, 0.12, (188, 202, 222), (188, 202, 222)),
        (5.0, 0.26, (146, 162, 190), (206, 220, 238)),
    ):
        place = brush.x * count + 9 * knobs[..., 0]
        number = place.floor()
        roof = high + 0.2 * (torch.sin(number * 12.99 + count) * 4375.85).frac().abs()
        inside = brush.below(roof) * ((place - number) > 0.04)
        brush.cover(inside, color)
        u, v = (place - number) * 4 - 0.1, (brush.y - roof) * 16
        pane = ((u - u.floor() - 0.5).abs() < 0.25) & ((v - v.floor() - 0.5).abs() < 0.28)
        edge = (u > 0) & (u < 3.9) & (v > 0.4)
        brush.cover(inside * (pane & edge), window)
    brush.cover(brush.below(road - 0.04), (206, 206, 204))
    brush.cover(brush.below(road), (104, 108, 118), (84, 88, 98), road)
    dash = (brush.x * 5 + knobs[..., 1]).frac() < 0.55
    brush.cover(dash * brush.soft(0.009 - (brush.y - 0.88).abs()), (240, 240, 236))


def _underwater(brush: Brush, knobs: Tensor) -> None:
    brush.sky((98, 206, 226), (18, 84, 150), 1.0)
    slant = brush.x + 0.35 * brush.y + knobs[..., 0]
    ray = (torch.sin(slant * 17) + torch.sin(slant * 27 + 6 * knobs[..., 1])) * 0.25
    brush.cover(ray.clamp(0, 1) * (0.75 - brush.y).clamp(0, 1), (220, 250, 255))
    floor = 0.84 + 0.03 * torch.sin(brush.x * 7 + 6.28 * knobs[..., 2])
    brush.cover(brush.below(floor), (196, 190, 150), (150, 152, 130), 0.84)


def _space(brush: Brush, knobs: Tensor) -> None:
    brush.sky((14, 10, 34), (28, 16, 58), 1.0)
    far = torch.hypot(brush.x - knobs[..., 0], brush.y - knobs[..., 1])
    brush.cover((0.5 - far).clamp(0, 0.5) * 0.9, (96, 52, 140))
    brush.cover(_stars(brush, knobs, 11), (255, 255, 255))


def _room(brush: Brush, knobs: Tensor) -> None:
    brush.sky((236, 230, 240), (220, 214, 228), 0.65)
    floor = 0.62 + 0.05 * knobs[..., 0]
    brush.cover(brush.below(floor - 0.035), (250, 250, 250))
    ground = brush.below(floor)
    brush.cover(ground, (206, 164, 122), (182, 138, 98), 0.62)
    depth = (brush.y - floor).clamp(min=0.0) + 0.15
    board = (brush.x - 0.5) / depth * 1.4 + knobs[..., 1]
    seam = (board - board.round()).abs() * depth / 1.4
    brush.cover(ground * brush.soft(0.0015 - seam, 1.5) * 0.3, (140, 100, 66))


PAINTERS: dict[str, Callable[[Brush, Tensor], None]] = {
    "meadow": _meadow,
    "beach": _beach,
    "snowy hill": _snow,
    "table": _table,
    "starry night": _night,
    "desert": _desert,
    "sunset": _sunset,
    "mountains": _mountains,
    "street": _street,
    "underwater": _underwater,
    "space": _space,
    "room": _room,
}
