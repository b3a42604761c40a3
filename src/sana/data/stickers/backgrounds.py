"""What lies behind the objects, and how captions call it: plain colours, gradients, landscapes.

`choose` draws one background; a named one may be anything, an unnamed one is mostly white or light
grey, so that a prompt without a background has a predictable one. `landscapes` paints them.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import accumulate

from sana.data.stickers.scene import RGB, Background, Dice

PLAIN: dict[str, RGB] = {
    "white": (255, 255, 255),
    "light grey": (224, 226, 230),
    "grey": (150, 154, 160),
    "black": (18, 18, 22),
    "light blue": (176, 216, 245),
    "blue": (56, 112, 220),
    "navy": (24, 34, 80),
    "teal": (26, 140, 140),
    "mint green": (190, 240, 212),
    "green": (84, 176, 92),
    "pale yellow": (253, 246, 190),
    "yellow": (252, 214, 66),
    "peach": (255, 214, 184),
    "orange": (250, 150, 54),
    "red": (216, 58, 56),
    "pink": (252, 184, 206),
    "lavender": (216, 204, 250),
    "purple": (128, 82, 190),
    "beige": (238, 224, 200),
    "brown": (134, 92, 62),
}
_PLAIN_WEIGHTS = {"white": 4.0, "light grey": 2.0, "black": 1.5, "grey": 1.5}
_DARK = frozenset({"black", "navy", "brown", "purple", "teal", "blue", "red"})

# An object of this colour would vanish on these backgrounds.
_CLASHES: dict[str, frozenset[str]] = {
    "red": frozenset({"red"}),
    "orange": frozenset({"orange", "desert", "sunset"}),
    "yellow": frozenset({"yellow", "pale yellow"}),
    "green": frozenset({"green"}),
    "blue": frozenset({"blue", "navy"}),
    "purple": frozenset({"purple"}),
    "pink": frozenset({"pink"}),
    "brown": frozenset({"brown", "table"}),
    "black": frozenset({"black", "navy", "starry night", "space"}),
    "white": frozenset({"white", "snowy hill"}),
}

# Each landscape: phrases that place something in it, and words for a tag list.
LANDSCAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "meadow": (
        ("in a green meadow", "on a grassy hill", "on green grass", "in a green field"),
        ("green meadow", "grass, blue sky"),
    ),
    "beach": (
        ("on a sandy beach", "on the beach", "at the seaside", "on a beach by the sea"),
        ("sandy beach", "beach, sea"),
    ),
    "snowy hill": (
        ("on a snowy hill", "in the snow", "in a snowy landscape", "on snow"),
        ("snowy hill", "snow, winter"),
    ),
    "table": (
        ("on a wooden table", "on a brown wooden table", "on a table"),
        ("wooden table", "wooden table background"),
    ),
    "starry night": (
        ("under a starry night sky", "at night under the stars", "under a night sky"),
        ("starry night sky", "night, stars"),
    ),
    "desert": (("in a desert", "in the desert", "among sand dunes"), ("desert", "sand dunes")),
    "sunset": (
        ("at sunset", "in front of a sunset over the sea", "at sunset by the sea"),
        ("sunset", "sunset, sea"),
    ),
    "mountains": (
        ("in front of mountains", "in the mountains", "in front of snowy mountains"),
        ("mountains", "mountain landscape"),
    ),
    "street": (
        ("on a city street", "in the city", "on a street in front of buildings"),
        ("city street", "city, buildings"),
    ),
    "underwater": (("under water", "under the sea", "at the bottom of the sea"), ("underwater",)),
    "space": (("in outer space", "in space"), ("outer space", "space, stars")),
    "room": (("in a room", "on a wooden floor in a room", "indoors"), ("room", "indoors")),
}
KINDS = ("plain", "gradient", *LANDSCAPES)
# Landscapes where things stand on a ground; in the others they float.
GROUNDED = frozenset(LANDSCAPES) - {"underwater", "space", "sunset", "starry night"}

_PLAIN_NAMES = tuple(PLAIN)
_PLAIN_BOUNDS = tuple(accumulate(_PLAIN_WEIGHTS.get(name, 1.0) for name in PLAIN))
_GRADIENT_NAMES = tuple(name for name in PLAIN if name not in ("white", "black"))
_LANDSCAPE_NAMES = tuple(LANDSCAPES)


def choose(
    dice: Dice, object_colors: Collection[str], *, is_named: bool, has_landscapes: bool = True
) -> Background:
    """A background against which objects of these colours stand out."""
    banned = _banned(object_colors)
    if not is_named and dice.chance(0.7):
        name = "light grey" if "white" in banned or dice.chance(0.25) else "white"
        return plain(name)
    for _ in range(20):
        background = _any(dice, has_landscapes=has_landscapes)
        if background.name not in banned:
            return background
    return plain("light grey")


def clashes(background: Background, object_colors: Collection[str]) -> bool:
    """Whether an object of one of these colours would vanish on it."""
    return background.name in _banned(object_colors)


def plain(name: str) -> Background:
    """A background of one colour of `PLAIN`."""
    color = PLAIN[name]
    return Background(kind="plain", name=name, top=color, bottom=color, knobs=(0.0,) * 6)


def phrase(dice: Dice, background: Background) -> str:
    """Words that put something before this background, such as "on a peach background"."""
    if background.kind in LANDSCAPES:
        return dice.pick(LANDSCAPES[background.kind][0])
    words = _words(dice, background)
    article = "an" if words[0] in "aeiou" else "a"
    form = dice.uniform()
    if form < 0.6:
        return f"on {article} {words}"
    if form < 0.75:
        return f"against {article} {words}"
    if form < 0.85:
        return f"in front of {article} {words}"
    if background.kind == "plain" and form < 0.95:
        return f"on a plain {words}"
    return f"with {article} {words}"


def tag(dice: Dice, background: Background) -> str:
    """The background as an entry of a comma list, such as "peach background"."""
    if background.kind in LANDSCAPES:
        return dice.pick(LANDSCAPES[background.kind][1])
    return _words(dice, background)


def _banned(object_colors: Collection[str]) -> frozenset[str]:
    return frozenset[str]().union(*(_CLASHES.get(color, ()) for color in object_colors))


def _words(dice: Dice, background: Background) -> str:
    if background.kind == "gradient" and dice.chance(0.85):
        return f"{background.name} gradient background"
    return f"{background.name} background"


def _any(dice: Dice, *, has_landscapes: bool) -> Background:
    kind = dice.uniform()
    knobs = tuple(dice.uniform() for _ in range(6))
    if has_landscapes and kind < 0.4:
        name = dice.pick(_LANDSCAPE_NAMES)
        return Background(kind=name, name=name, top=(0, 0, 0), bottom=(0, 0, 0), knobs=knobs)
    if kind < 0.8:
        return plain(dice.weighted(_PLAIN_NAMES, _PLAIN_BOUNDS))
    name = dice.pick(_GRADIENT_NAMES)
    color = PLAIN[name]
    share = 0.35 if name in _DARK else 0.6
    light = tuple(round(c + (255 - c) * share) for c in color)
    deep = tuple(round(c * 0.86) for c in color)
    return Background(
        kind="gradient",
        name=name,
        top=(light[0], light[1], light[2]),
        bottom=(deep[0], deep[1], deep[2]),
        knobs=knobs,
    )
