"""What a picture of the sticker world holds: its truth, its caption, and the dice that chose it.

A `Scene` is everything that is known about one picture before it is drawn; `compose` makes scenes,
`render` draws them. Coordinates are integers on a canvas of 512 pixels. Nothing here imports torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

CANVAS = 512
SLOTS = 4
COLORS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)

Kind = Literal["scene", "sticker", "avatar"]
KINDS: tuple[Kind, ...] = ("scene", "sticker", "avatar")
TrainingKind = Literal["scene", "sticker", "avatar", "styled"]
"""Of these the last is shown in training alone (`styled`)."""
TRAINING_KINDS: tuple[TrainingKind, ...] = (*KINDS, "styled")
Task = Literal["single", "two", "counting", "colors", "position", "color_attribution"]
Relation = Literal["left", "right", "above", "below"]
Split = Literal["train", "held_out"]
RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]
Span = tuple[int, int, int]

TASKS: tuple[Task, ...] = (
    "single",
    "two",
    "counting",
    "colors",
    "position",
    "color_attribution",
)
RELATIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
INVERSE: dict[Relation, Relation] = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
}

T = TypeVar("T")
_WORD = (1 << 64) - 1
_BLOCK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """What lies behind the objects: "plain" and "gradient" use both colours, a landscape its knobs.

    `name` is the colour's or the landscape's name; `knobs` are six numbers in [0, 1).
    """

    kind: str
    name: str
    top: RGB
    bottom: RGB
    knobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One object in the picture.

    `box` bounds its opaque pixels, (x0, y0, x1, y1) with x1 and y1 exclusive. `square` is
    (x, y, side) of the whole sprite. `color` is its colour if the caption says one; `is_recolored`
    tells whether the sprite is turned to it (False where the natural colour is named).
    """

    concept: int
    style: int
    color: str | None
    box: Box
    sprite: int
    square: tuple[int, int, int]
    is_recolored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture's ground truth and caption.

    `relation` is where the first object lies as seen from the second, if the caption says so.
    `spans` are (start, end, object) characters of `caption` with each object's noun; objects that
    share a noun ("three apples") share its span. `task` is None for all but scenes.
    """

    kind: TrainingKind
    background: Background
    objects: tuple[Placed, ...]
    relation: Relation | None
    avatar: int | None
    caption: str
    spans: tuple[Span, ...]
    task: Task | None = None


class Dice:
    """A stream of choices that depends on its three numbers alone (Philox, counter-based)."""

    __slots__ = ("_at", "_random", "_values")

    def __init__(self, seed: int, stream: int, index: int) -> None:
        key = (seed & _WORD) | (stream & _WORD) << 64
        self._random = np.random.Generator(np.random.Philox(key=key, counter=(index & _WORD) << 64))
        self._values: list[float] = []
        self._at = 0

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if self._at == len(self._values):
            self._values = self._random.random(_BLOCK).tolist()
            self._at = 0
        self._at += 1
        return self._values[self._at - 1]

    def chance(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.uniform() < share

    def below(self, count: int) -> int:
        """A whole number in [0, count)."""
        return int(self.uniform() * count)

    def between(self, low: int, high: int) -> int:
        """A whole number in [low, high], both included."""
        return low + self.below(high - low + 1)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, all alike."""
        return options[int(self.uniform() * len(options))]

    def weighted(self, options: Sequence[T], bounds: Sequence[float]) -> T:
        """One of the options; `bounds` are the running sums of their weights."""
        return options[min(bisect_right(bounds, self.uniform() * bounds[-1]), len(options) - 1)]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """The options in random order."""
        pool = list(options)
        return [pool.pop(self.below(len(pool))) for _ in options]
