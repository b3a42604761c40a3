"""Where objects stand: squares on an 8-pixel grid of the 512-pixel canvas that never touch.

Each function returns one (x, y, side) per object, the square that a whole sprite fills. On a
landscape the objects that stand side by side share a ground line. Start reading at `arrange`.
"""

from __future__ import annotations

from collections.abc import Sequence

from sana.data.stickers.scene import CANVAS, Box, Dice, Relation

GRID = 8
MARGIN = 8

Square = tuple[int, int, int]
Extent = tuple[float, float]

_SINGLE = (240, 272, 304, 320)
_PAIR = (168, 192, 216)
_TWO = (168, 184, 200)
_ROW = (136, 144, 152)
_MANY = (136, 152, 176)
_STICKER = (304, 336, 360)


def arrange(
    dice: Dice, extents: Sequence[Extent], relation: Relation | None, *, has_ground: bool
) -> list[Square]:
    """Squares for one to four objects; `relation` is of the first object to the second.

    `extents` are the opaque (width, height) of the sprites as fractions of the square.
    """
    count = len(extents)
    if count == 1:
        return [_single(dice, extents[0], has_ground=has_ground)]
    if relation is not None:
        return _related(dice, extents, relation, has_ground=has_ground)
    if count == 2:
        return _row(dice, extents, dice.pick(_TWO), has_ground=has_ground)
    if count == 3 and dice.chance(0.4):
        return _row(dice, extents, dice.pick(_ROW), has_ground=has_ground)
    return _heap(dice, count)


def sticker(dice: Dice) -> Square:
    """One large square in the middle."""
    side = dice.pick(_STICKER)
    middle = snap((CANVAS - side) / 2)
    return middle, middle, side


def box_of(square: Square, extent: Extent) -> Box:
    """The opaque box of a sprite drawn into `square`, rounded outwards."""
    x, y, side = square
    half_width, half_height = side * extent[0] / 2, side * extent[1] / 2
    middle_x, middle_y = x + side / 2, y + side / 2
    return (
        int(middle_x - half_width),
        int(middle_y - half_height),
        -int(-(middle_x + half_width)),
        -int(-(middle_y + half_height)),
    )


def snap(value: float) -> int:
    """The nearest multiple of the grid."""
    return int(value / GRID + 0.5) * GRID


def _jitter(dice: Dice, steps: int) -> int:
    return GRID * dice.between(-steps, steps)


def _ground_y(side: int, extent: Extent, ground: int) -> int:
    lowest = CANVAS - MARGIN - side
    return min(snap(ground - side * (1 + extent[1]) / 2), lowest)


def _single(dice: Dice, extent: Extent, *, has_ground: bool) -> Square:
    side = dice.pick(_SINGLE)
    middle = (CANVAS - side) / 2
    x = snap(middle) + _jitter(dice, 3)
    if has_ground:
        return x, _ground_y(side, extent, 408 + _jitter(dice, 2)), side
    return x, snap(middle) + _jitter(dice, 3), side


def _related(
    dice: Dice, extents: Sequence[Extent], relation: Relation, *, has_ground: bool
) -> list[Square]:
    first = dice.pick(_PAIR)
    second = first if dice.chance(0.6) else dice.pick(_PAIR)
    sides = (first, second)
    is_first_low = relation in ("left", "above")
    near = (128, 384) if is_first_low else (384, 128)
    squares = []
    if relation in ("left", "right"):
        ground = 376 + _jitter(dice, 2)
        level = 256 + _jitter(dice, 3)
        for side, center, extent in zip(sides, near, extents, strict=True):
            x = snap(center - side / 2) + _jitter(dice, 1 if side > 192 else 2)
            y = snap(level - side / 2) + _jitter(dice, 1)
            squares.append((x, _ground_y(side, extent, ground) if has_ground else y, side))
    else:
        column = 256 + _jitter(dice, 6)
        for side, center in zip(sides, near, strict=True):
            x = snap(column - side / 2) + _jitter(dice, 1)
            squares.append((x, snap(center - side / 2) + _jitter(dice, 1), side))
    return squares


def _row(dice: Dice, extents: Sequence[Extent], side: int, *, has_ground: bool) -> list[Square]:
    count = len(extents)
    step = snap((CANVAS - 2 * MARGIN) / count)
    spare = min((step - side) // 32, 1)
    ground, level = 384 + _jitter(dice, 2), 256 + _jitter(dice, 3)
    squares = []
    for index, extent in enumerate(extents):
        middle = CANVAS / 2 + (index - (count - 1) / 2) * step
        x = int((middle - side / 2) / GRID) * GRID + _jitter(dice, spare)
        y = snap(level - side / 2) + _jitter(dice, 1)
        x = min(max(x, 0), CANVAS - side)
        squares.append((x, _ground_y(side, extent, ground) if has_ground else y, side))
    return squares


def _heap(dice: Dice, count: int) -> list[Square]:
    side = dice.pick(_MANY)
    near, far = 144, 368
    if count == 4:
        centers = [(near, near), (far, near), (near, far), (far, far)]
    elif dice.chance(0.7):
        centers = [(256, near), (near, far), (far, far)]
    else:
        centers = [(near, near), (far, near), (256, far)]
    return [
        (snap(x - side / 2) + _jitter(dice, 1), snap(y - side / 2) + _jitter(dice, 1), side)
        for x, y in centers
    ]
