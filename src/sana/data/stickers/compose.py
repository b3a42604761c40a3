"""Chooses what is in a picture: a pure function from (seed, index, split) to a `Scene`.

`Composer` is the sticker world's table of allowed combinations. The training split never shows a
combination that `splits` holds out; the held-out split shows one in every scene and sticker, and
portraits that training never uses. Start reading at `Composer.draw`; `render` draws the scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from sana.data.stickers import backgrounds, layout
from sana.data.stickers.grammar import Named, names_color, scene_caption, sticker_caption
from sana.data.stickers.known import well_known
from sana.data.stickers.portraits import portrait_caption
from sana.data.stickers.render import Renderer, SceneTensors, render, to_tensors
from sana.data.stickers.scene import (
    COLORS,
    KINDS,
    RELATIONS,
    Background,
    Dice,
    Kind,
    Placed,
    Relation,
    Scene,
    Split,
    Task,
)
from sana.data.stickers.splits import is_held_out_color, is_held_out_pair, is_held_out_style
from sana.data.stickers.world import World

__all__ = [
    "COLORS",
    "Background",
    "Composer",
    "Placed",
    "Renderer",
    "Scene",
    "SceneTensors",
    "draw_scene",
    "render",
    "to_tensors",
]

_KIND_BOUNDS = tuple(accumulate((0.76, 0.11, 0.13)))
_TRAIN_TASKS: tuple[Task, ...] = (
    "single",
    "colors",
    "counting",
    "two",
    "position",
    "color_attribution",
)
_TRAIN_BOUNDS = tuple(accumulate((0.15, 0.2, 0.15, 0.12, 0.18, 0.2)))
_NEW_TASKS: tuple[Task, ...] = ("colors", "counting", "two", "position", "color_attribution")
_STREAMS: dict[Split, int] = {"train": 1, "held_out": 2}
# Every twentieth portrait is kept from training.
_AVATAR_STRIDE = 20
_TRIES = 200
# Of every two objects, one is a thing that everybody knows.
_KNOWN_SHARE = 0.5
# How often training's stickers have a style beside the others: the main one, which scenes show
# anyway, and two that no other is like and that are soon learnt.
_STYLE_SHARES = {"3D": 0.3, "outlined": 0.5, "silhouette": 0.5}

Choice = tuple[int, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """So many of a concept, in a colour if the caption says one.

    `is_recolored` tells whether the sprites are turned to the colour, or have it by nature.
    """

    concept: int
    color: str | None = None
    count: int = 1
    is_recolored: bool = False


class Composer:
    """Draws scenes of one world; holds names and tables, no pictures, so copies are cheap."""

    def __init__(self, world: World) -> None:
        self.concepts = world.concepts
        self.styles = world.styles
        self.avatars = world.avatars
        self.sprite_of: list[list[int]] = world.sprite_of.tolist()
        self._words = [frozenset(c.label.lower().split()) - {"of"} for c in world.concepts]
        self._extents: list[tuple[float, float]] = [
            (float(w), float(h)) for w, h in world.extents.tolist()
        ]
        self._colors: dict[Split, list[tuple[str, ...]]] = {"train": [], "held_out": []}
        self._styles: dict[Split, list[tuple[int, ...]]] = {"train": [], "held_out": []}
        for concept, sprites in zip(world.concepts, self.sprite_of, strict=True):
            held = [is_held_out_color(color, concept.key) for color in COLORS]
            has = [s for s, sprite in enumerate(sprites) if sprite >= 0]
            new = [is_held_out_style(concept.key, world.styles[s]) for s in has]
            for split in _STREAMS:
                wanted = split == "held_out"
                can = concept.recolorable and not names_color(concept.label)
                colors = [c for c, h in zip(COLORS, held, strict=True) if can and h == wanted]
                self._colors[split].append(tuple(colors))
                styles = [s for s, n in zip(has, new, strict=True) if n == wanted]
                self._styles[split].append(tuple(styles))
        everything = range(len(world.concepts))
        self._drawable = tuple(c for c in everything if self.sprite_of[c][0] >= 0)
        self._colorable = {
            split: tuple(c for c in self._drawable if self._colors[split][c])
            for split in self._colors
        }
        known = set(well_known(world.concepts))
        self._known = tuple(c for c in self._drawable if c in known)
        self._known_colorable = {
            split: tuple(c for c in concepts if c in known) or concepts
            for split, concepts in self._colorable.items()
        }
        self._styled = {
            split: tuple(c for c in everything if self._styles[split][c]) for split in self._styles
        }
        self._in_style = tuple(
            tuple(c for c in everything if style in self._styles["train"][c])
            for style in range(len(world.styles))
        )
        self._style_bounds = _style_bounds(
            {style: len(c) for style, c in zip(self.styles, self._in_style, strict=True)}
        )
        faces = range(len(world.avatars))
        kept = [a for a in faces if a % _AVATAR_STRIDE == _AVATAR_STRIDE - 1]
        self._faces: dict[Split, tuple[int, ...]] = {
            "train": tuple(a for a in faces if a not in set(kept)),
            "held_out": tuple(kept or faces),
        }

    def draw(
        self, index: int, *, seed: int, split: Split = "train", kind: Kind | None = None
    ) -> Scene:
        """Scene `index` of the stream named by `seed` and `split`; `kind` forces its kind."""
        dice = Dice(seed, _STREAMS[split], index)
        drawn = dice.weighted(KINDS, _KIND_BOUNDS)
        chosen = kind or drawn
        if chosen == "avatar":
            return self._draw_avatar(dice, split)
        if chosen == "sticker" and self._styled[split]:
            return self._draw_sticker(dice, split)
        return self._draw_objects(dice, split)

    def to_tensors(self, scenes: Sequence[Scene]) -> SceneTensors:
        """Scenes as tensors that a renderer draws."""
        return to_tensors(scenes)

    def allows(self, split: Split, first: int, second: int) -> bool:
        """Whether two concepts may stand together in this split; never "cat" with "cat face"."""
        keys = self.concepts[first].key, self.concepts[second].key
        if self.has_shared_word(first, second):
            return False
        return is_held_out_pair(*keys) == (split == "held_out")

    def place(
        self,
        concept: int,
        style: int,
        color: str | None,
        square: layout.Square,
        *,
        is_recolored: bool = True,
    ) -> Placed:
        """An object in a square of the canvas; without `is_recolored` the colour is its own."""
        sprite = self.sprite_of[concept][style]
        return Placed(
            concept=concept,
            style=style,
            color=color,
            box=layout.box_of(square, self._extents[sprite]),
            sprite=sprite,
            square=square,
            is_recolored=color is not None and is_recolored,
        )

    def colors_of(self, concept: int, split: Split) -> tuple[str, ...]:
        """The colours that this split may turn the concept to; empty if it cannot be recoloured."""
        return self._colors[split][concept]

    def draw_style(self, dice: Dice) -> int:
        """A style for training: between all styles alike and all pairs with a concept alike, so
        that small styles are no easier to learn, and some of them less often."""
        return dice.weighted(range(len(self.styles)), self._style_bounds)

    def concepts_in(self, style: int) -> tuple[int, ...]:
        """The concepts that training may show in a style."""
        return self._in_style[style]

    def faces_like(self, number: int) -> tuple[int, ...]:
        """The portraits of the split that avatar `number` belongs to."""
        is_kept = number in self._faces["held_out"]
        return self._faces["held_out" if is_kept else "train"]

    def has_shared_word(self, first: int, second: int) -> bool:
        """Whether two concepts cannot be told apart by name: "cat" and "cat face"."""
        return not self._words[first].isdisjoint(self._words[second])

    def scene(
        self,
        dice: Dice,
        things: Sequence[Thing],
        relation: Relation | None,
        background: Background,
        *,
        is_named: bool,
        task: Task | None = None,
    ) -> Scene:
        """Up to four objects of one or two kinds, arranged and described as the dice fall."""
        has_ground = background.kind in backgrounds.GROUNDED
        objects, named = self.arranged(dice, things, relation, 0, has_ground=has_ground)
        shown = background if is_named else None
        caption, spans = scene_caption(dice, named, relation, shown)
        return Scene(
            kind="scene",
            background=background,
            objects=objects,
            relation=relation,
            avatar=None,
            caption=caption,
            spans=spans,
            task=task,
        )

    def arranged(
        self,
        dice: Dice,
        things: Sequence[Thing],
        relation: Relation | None,
        style: int,
        *,
        has_ground: bool,
    ) -> tuple[tuple[Placed, ...], list[Named]]:
        """Things of one style where they stand, and as a caption may speak of them."""
        group = [thing for thing in things for _ in range(thing.count)]
        extents = [self._extents[self.sprite_of[thing.concept][style]] for thing in group]
        squares = layout.arrange(dice, extents, relation, has_ground=has_ground)
        objects = tuple(
            self.place(thing.concept, style, thing.color, square, is_recolored=thing.is_recolored)
            for thing, square in zip(group, squares, strict=True)
        )
        ends = list(accumulate(thing.count for thing in things))
        named = [
            Named(
                concept=self.concepts[thing.concept],
                color=thing.color,
                objects=tuple(range(end - thing.count, end)),
            )
            for thing, end in zip(things, ends, strict=True)
        ]
        return objects, named

    def hues_in(self, concepts: Sequence[int], style: int) -> list[str]:
        """The main colours that concepts have in a style, where they are known."""
        is_black = self.styles[style] == "silhouette"
        return self._hues([(concept, "black" if is_black else None) for concept in concepts])

    def sticker(
        self, dice: Dice, concept: int, style: int, background: Background, *, is_named: bool
    ) -> Scene:
        """One object in a style, which the caption always names."""
        placed = self.place(concept, style, None, layout.sticker(dice))
        thing = Named(concept=self.concepts[concept], color=None, objects=(0,))
        shown = background if is_named else None
        caption, spans = sticker_caption(dice, thing, self.styles[style], shown)
        return Scene(
            kind="sticker",
            background=background,
            objects=(placed,),
            relation=None,
            avatar=None,
            caption=caption,
            spans=spans,
        )

    def portrait(self, dice: Dice, number: int, background: Background, *, is_named: bool) -> Scene:
        """Avatar `number`; the caption says some of its attributes."""
        shown = background if is_named else None
        caption, spans = portrait_caption(dice, self.avatars[number], shown)
        return Scene(
            kind="avatar",
            background=background,
            objects=(),
            relation=None,
            avatar=number,
            caption=caption,
            spans=spans,
        )

    def _draw_objects(self, dice: Dice, split: Split) -> Scene:
        task = (
            dice.weighted(_TRAIN_TASKS, _TRAIN_BOUNDS)
            if split == "train"
            else dice.pick(_NEW_TASKS)
        )
        relation = self._relation(dice, task)
        chosen = self._choose(dice, task, split)
        if relation is not None and len(chosen) == 1:
            relation, task = None, "colors" if chosen[0][1] else "single"
        repeats = dice.between(2, 4) if task == "counting" else 1
        is_named = dice.chance(0.6)
        background = backgrounds.choose(dice, self._hues(chosen), is_named=is_named)
        things = [
            Thing(
                concept=concept,
                color=self._say_natural(dice, (concept, color)),
                count=repeats,
                is_recolored=color is not None,
            )
            for concept, color in chosen
        ]
        return self.scene(dice, things, relation, background, is_named=is_named, task=task)

    def _relation(self, dice: Dice, task: Task) -> Relation | None:
        if task == "position" or (task == "color_attribution" and dice.chance(0.35)):
            return dice.pick(RELATIONS)
        return None

    def _choose(self, dice: Dice, task: Task, split: Split) -> list[Choice]:
        """Which concepts, and which of them in a stated colour."""
        if task in ("single", "colors", "counting"):
            has_color = task == "colors" or (
                task == "counting" and (split == "held_out" or dice.chance(0.5))
            )
            return [self._pick(dice, split, has_color=has_color)]
        both = task == "color_attribution"
        colored = 2 if both else dice.weighted((0, 1), (0.6, 1.0)) if task == "position" else 0
        for _ in range(_TRIES):
            # In the held-out split one colour is new; the other may be any that training allows.
            pair = [
                self._pick(dice, split if both and n == 0 else "train", has_color=n < colored)
                for n in range(2)
            ]
            (first, first_color), (second, second_color) = pair
            differs = first != second and (not both or first_color != second_color)
            if differs and self.allows(split, first, second):
                return pair if dice.chance(0.5) else pair[::-1]
        return [self._pick(dice, split, has_color=split == "held_out")]

    def _pick(self, dice: Dice, split: Split, *, has_color: bool) -> Choice:
        is_known = dice.chance(_KNOWN_SHARE)
        if has_color and self._colorable[split]:
            table = self._known_colorable if is_known else self._colorable
            concept = dice.pick(table[split])
            return concept, dice.pick(self._colors[split][concept])
        return dice.pick(self._known if is_known else self._drawable), None

    def _say_natural(self, dice: Dice, choice: Choice) -> str | None:
        """The stated colour; without one, sometimes the natural one, unless it is held out."""
        concept, color = choice
        natural = self.concepts[concept].color
        if color is not None or natural is None or not dice.chance(0.3):
            return color
        key, label = self.concepts[concept].key, self.concepts[concept].label
        if names_color(label) or is_held_out_color(natural, key):
            return None
        return natural

    def _hues(self, chosen: Sequence[Choice]) -> list[str]:
        colors = (color or self.concepts[concept].color for concept, color in chosen)
        return [color for color in colors if color is not None]

    def _draw_sticker(self, dice: Dice, split: Split) -> Scene:
        if split == "train":
            style = self.draw_style(dice)
            concept = dice.pick(self._in_style[style])
        else:
            concept = dice.pick(self._styled[split])
            style = dice.pick(self._styles[split][concept])
        is_named = dice.chance(0.5)
        hues = self.hues_in([concept], style)
        background = backgrounds.choose(dice, hues, is_named=is_named, has_landscapes=False)
        return self.sticker(dice, concept, style, background, is_named=is_named)

    def _draw_avatar(self, dice: Dice, split: Split) -> Scene:
        number = dice.pick(self._faces[split])
        avatar = self.avatars[number]
        worn = [avatar.attributes.get(slot, "") for slot in ("clothing_color", "hair_color")]
        is_named = dice.chance(0.7)
        background = backgrounds.choose(dice, worn, is_named=is_named, has_landscapes=False)
        return self.portrait(dice, number, background, is_named=is_named)


def _style_bounds(counts: dict[str, int]) -> tuple[float, ...]:
    """Running weights of training's styles, by how many concepts each has."""
    return tuple(
        accumulate(_STYLE_SHARES.get(style, 1.0) * count**0.5 for style, count in counts.items())
    )


def draw_scene(world: World, index: int, *, seed: int, split: Split = "train") -> Scene:
    """`Composer(world).draw(...)`, with the composer kept for the next call."""
    return _composer(world).draw(index, seed=seed, split=split)


@lru_cache(maxsize=2)
def _composer(world: World) -> Composer:
    return Composer(world)
