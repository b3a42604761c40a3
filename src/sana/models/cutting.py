"""How a picture is cut into equal overlapping tiles: the arithmetic of `tiling`, without torch.

`tilings` lists the ways that are worth trying, least work first. A tile may be as long as the
picture on one side: at 4096 px, two strips recompute a ninth of what squares of 1024 px do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

Tile: TypeAlias = tuple[int, int]
"""Height and width in pixels."""

LEAST_OVERLAP = 0.25
BEST_TILE = 1024
"""Smaller tiles show in skies and walls; see `docs/memory.md`."""
LEAST_TILE = 256
"""No smaller ones are tried where the picture is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Equal tiles along one side, in latent cells."""

    length: int
    tile: int
    starts: tuple[int, ...]

    @property
    def places(self) -> list[slice]:
        """The cells of each tile."""
        return [slice(start, start + self.tile) for start in self.starts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """A picture cut into `rows` x `columns` tiles; one tile is the picture in one piece."""

    tile: Tile
    rows: int = 1
    columns: int = 1

    @property
    def count(self) -> int:
        """Of tiles."""
        return self.rows * self.columns

    @property
    def area(self) -> int:
        """Pixels of one tile."""
        return self.tile[0] * self.tile[1]

    @property
    def computed(self) -> int:
        """Pixels of all tiles."""
        return self.count * self.area

    @property
    def smallness(self) -> float:
        """How many times shorter than `BEST_TILE` is the shortest side that is cut; at least 1."""
        counts = (self.rows, self.columns)
        cut_sides = [side for side, n in zip(self.tile, counts, strict=True) if n > 1]
        return max([1.0, *(BEST_TILE / side for side in cut_sides)])


def tilings(height: int, width: int, factor: int) -> list[Tiling]:
    """What a picture of so many pixels may be cut into, each smaller than those before it.

    In one piece first; then tiles of `BEST_TILE` and more on each side that is cut, by the pixels
    that they compute; then the smaller ones, the longest first.
    """
    least = LEAST_TILE if max(height, width) > LEAST_TILE else 0
    least = max(2 * factor, least)
    every = [
        Tiling(tile=(tall, wide), rows=rows, columns=columns)
        for rows, tall in _sides(height, least, factor)
        for columns, wide in _sides(width, least, factor)
    ]
    every.sort(key=lambda way: (way.smallness, way.computed, way.count, way.columns))
    front = every[:1]
    for way in every[1:]:
        if way.area < front[-1].area:
            front.append(way)
    return front


def cut(length: int, tile: int, overlap: float, factor: int) -> Axis:
    """Spread equal tiles of `tile` pixels evenly over `length` cells of `factor` pixels."""
    cells = tile // factor
    if tile % factor or (cells < 2 and cells < length):
        raise ValueError(
            f"the tile is {tile} px; tiles are multiples of {factor} px and at least {2 * factor}: "
            f"use {max(2, cells) * factor}"
        )
    if not LEAST_OVERLAP <= overlap < 1:
        raise ValueError(
            f"the overlap is {overlap}; tiles share at least {LEAST_OVERLAP} of their side and "
            f"less than all of it, or their borders show: use {LEAST_OVERLAP}"
        )
    if length <= cells:
        return Axis(length=length, tile=length, starts=(0,))
    count = math.ceil((length - cells) / _stride(cells, overlap)) + 1
    starts = tuple(round(i * (length - cells) / (count - 1)) for i in range(count))
    return Axis(length=length, tile=cells, starts=starts)


def _sides(pixels: int, least: int, factor: int) -> list[tuple[int, int]]:
    """(tiles, pixels of each) along one side: for each number the shortest that overlap enough."""
    length = pixels // factor
    sides = {pixels, BEST_TILE} if BEST_TILE < pixels and not BEST_TILE % factor else {pixels}
    for count in range(2, length):
        side = _shortest(length, count) * factor
        if side < least:
            break
        sides.add(side)
    return [(len(cut(length, side, LEAST_OVERLAP, factor).starts), side) for side in sides]


def _shortest(length: int, count: int) -> int:
    """The least cells of `count` equal tiles that cover `length` cells and overlap enough."""
    cells = 2
    while cells + (count - 1) * _stride(cells, LEAST_OVERLAP) < length:
        cells += 1
    return cells


def _stride(cells: int, overlap: float) -> int:
    """The most cells from one tile's start to the next one's."""
    return max(1, cells - math.ceil(cells * overlap))
