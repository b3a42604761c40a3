"""The published aspect-ratio tables: at which size a picture is drawn, for the size asked for.

One list of shapes in sixteenths of the model's side makes all four tables (family-spec.md 5): 40
shapes from 2048 px on, 33 below. A model of another side gets the same shapes, rounded to
multiples of its step. Start reading at `nearest_bin`.
"""

from __future__ import annotations

_LANDSCAPE = (
    *((8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23)),
    *((11, 22), (11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17)),
    (15, 16),
)
_PORTRAIT = tuple((w, h) for h, w in reversed(_LANDSCAPE) if (h, w) != (11, 21))
SHAPES = (*_LANDSCAPE, (16, 16), *_PORTRAIT)
"""(height, width) in sixteenths of the side; published without (21, 11)."""
_LARGE_ONLY = frozenset({0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88})
LARGE = 2048
STEP = 32


def table(side: int, step: int = STEP) -> dict[float, tuple[int, int]]:
    """Ratio height / width, to two digits as published -> (height, width) for a model's `side`."""
    rows = {round(h / w, 2): (_pixels(h, side, step), _pixels(w, side, step)) for h, w in SHAPES}
    return {r: size for r, size in rows.items() if side >= LARGE or r not in _LARGE_ONLY}


def nearest_bin(height: int, width: int, side: int, step: int = STEP) -> tuple[int, int]:
    """The (height, width) whose published ratio is nearest to the one asked for."""
    rows = table(side, step)
    return rows[min(rows, key=lambda ratio: abs(ratio - height / width))]


def _pixels(sixteenths: int, side: int, step: int) -> int:
    return max(step, round(sixteenths * side / 16 / step) * step)
