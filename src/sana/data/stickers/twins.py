"""Pairs of scenes that differ in one thing, so that either caption is wrong for the other picture.

Each of the two captions is right once and wrong once, and so is each picture: who tells right pairs
from wrong ones must have looked at both. The change is of an object, a colour, colours or places
that trade, a relation, a count, a style, or a portrait. Start reading at `draw_twins`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import MappingProxyType
from typing import Literal

from sana.data.stickers import backgrounds
from sana.data.stickers.compose import Composer, Thing
from sana.data.stickers.portraits import phrase_of, said
from sana.data.stickers.scene import INVERSE, SLOTS, Dice, Kind, Relation, Scene, Split, Task
from sana.data.stickers.world import Avatar
from sana.errors import TrainingError

Change = Literal["object", "color", "swap", "relation", "count", "style", "portrait"]
CHANGES: tuple[Change, ...] = ("object", "color", "swap", "relation", "count", "style", "portrait")
HELD_OUT = 3
"""Of every ten training pairs, those that start from a held-out combination."""
_STREAM = 0x7E1A
_KINDS: tuple[Kind, ...] = ("scene", "sticker", "avatar")
_KIND_BOUNDS = (0.72, 0.86, 1.0)
_TRIES = 40
# How much likelier an applicable change of a scene is than that of an object.
_WEIGHTS: MappingProxyType[Change, int] = MappingProxyType(
    {"object": 2, "color": 2, "swap": 3, "relation": 3, "count": 3}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Twins:
    """Two scenes; `change` is what tells them apart."""

    first: Scene
    second: Scene
    change: Change


def draw_twins(composer: Composer, index: int, *, seed: int, split: Split | None = None) -> Twins:
    """Pair `index` of the stream named by `seed`; without a split, from both.

    Portraits of a pair without a split are those that training may use: the others measure. A world
    with too few portraits or styles gives scenes instead.
    """
    dice = Dice(seed, _STREAM + (split == "held_out"), index)
    drawn = dice.weighted(_KINDS, _KIND_BOUNDS)
    for attempt in range(2 * _TRIES):
        kind = drawn if attempt < _TRIES else "scene"
        held_out = kind != "avatar" and dice.below(10) < HELD_OUT
        chosen: Split = split or ("held_out" if held_out else "train")
        number = index * 2 * _TRIES + attempt
        first = composer.draw(number, seed=seed, split=chosen, kind=kind)
        twins = _CHANGES[first.kind](dice, composer, first)
        if twins is not None:
            return twins
    raise TrainingError(
        f"no change of a scene was found in {_TRIES} tries among {len(composer.concepts)} "
        "concepts; take a larger pack"
    )


def _change_scene(dice: Dice, composer: Composer, first: Scene) -> Twins | None:
    things = things_of(first)
    able = [change for change in _WEIGHTS if change in _able(composer, things, first.relation)]
    bounds, total = [], 0
    for change in able:
        total += _WEIGHTS[change]
        bounds.append(total)
    change = dice.weighted(able, bounds)
    relation = first.relation
    if change == "relation":
        relation = _other_relation(dice, first.relation)
    else:
        changed = _CHANGERS[change](dice, composer, things)
        if changed is None:
            return None
        things = changed
    background = first.background
    hues = [hue for t in things if (hue := t.color or composer.concepts[t.concept].color)]
    if dice.chance(0.3) or backgrounds.clashes(background, hues):
        background = backgrounds.choose(dice, hues, is_named=True)
    second = composer.scene(
        dice,
        things,
        relation,
        background,
        is_named=dice.chance(0.6),
        task=_task(things, relation),
    )
    return Twins(first=first, second=second, change=change)


def things_of(scene: Scene) -> list[Thing]:
    """The things of a composed scene in the caption's order, those that are alike counted."""
    alike = groupby(scene.objects, key=lambda p: (p.concept, p.color, p.is_recolored))
    return [
        Thing(concept=concept, color=color, count=len(list(group)), is_recolored=is_recolored)
        for (concept, color, is_recolored), group in alike
    ]


def _able(composer: Composer, things: Sequence[Thing], relation: Relation | None) -> set[Change]:
    found: set[Change] = {"object"}
    if any(thing.is_recolored for thing in things):
        found.add("color")
    if relation is not None:
        found.add("relation")
    if len(things) == 1:
        found.add("count")
    elif relation is not None or _can_trade(composer, things):
        found.add("swap")
    return found


def _change_object(dice: Dice, composer: Composer, things: list[Thing]) -> list[Thing] | None:
    """Another concept, half the time of the same group, that can take the stated colour."""
    number = dice.below(len(things))
    old = things[number]
    group = composer.concepts[old.concept].group
    is_near = dice.chance(0.5)
    for _ in range(_TRIES):
        concept = dice.below(len(composer.concepts))
        if is_near and composer.concepts[concept].group != group:
            continue
        if any(composer.has_shared_word(concept, thing.concept) for thing in things):
            continue
        if old.is_recolored and old.color not in _colors(composer, concept):
            continue
        color = old.color if old.is_recolored else None
        new = replace(old, concept=concept, color=color)
        return [*things[:number], new, *things[number + 1 :]]
    return None


def _change_color(dice: Dice, composer: Composer, things: list[Thing]) -> list[Thing] | None:
    number = dice.pick([n for n, thing in enumerate(things) if thing.is_recolored])
    old = things[number]
    others = {thing.color for thing in things}
    able = [color for color in _colors(composer, old.concept) if color not in others]
    if not able:
        return None
    return [*things[:number], replace(old, color=dice.pick(able)), *things[number + 1 :]]


def _swap(dice: Dice, composer: Composer, things: list[Thing]) -> list[Thing] | None:
    """The two things trade colours, or with the same relation their places."""
    first, second = things
    if _can_trade(composer, things) and dice.chance(0.7):
        return [replace(first, color=second.color), replace(second, color=first.color)]
    return [second, first]


def _change_count(dice: Dice, composer: Composer, things: list[Thing]) -> list[Thing] | None:
    [thing] = things
    counts = [count for count in range(1, SLOTS + 1) if count != thing.count]
    near = [count for count in counts if abs(count - thing.count) == 1]
    return [replace(thing, count=dice.pick(near if dice.chance(0.6) else counts))]


def _other_relation(dice: Dice, relation: Relation | None) -> Relation:
    assert relation is not None, "only a scene with a relation can change it"
    if dice.chance(0.6):
        return INVERSE[relation]
    return dice.pick([other for other in INVERSE if other != relation])


def _can_trade(composer: Composer, things: Sequence[Thing]) -> bool:
    """Whether both have colours, different ones, that the other can have."""
    first, second = things
    if not (first.is_recolored and second.is_recolored) or first.color == second.color:
        return False
    pairs = ((first, second), (second, first))
    return all(other.color in _colors(composer, thing.concept) for thing, other in pairs)


def _colors(composer: Composer, concept: int) -> tuple[str, ...]:
    return composer.colors_of(concept, "train") + composer.colors_of(concept, "held_out")


def _task(things: Sequence[Thing], relation: Relation | None) -> Task:
    if len(things) == 1:
        return "counting" if things[0].count > 1 else "colors" if things[0].color else "single"
    if relation is not None:
        return "position"
    return "color_attribution" if any(thing.color for thing in things) else "two"


def _change_sticker(dice: Dice, composer: Composer, first: Scene) -> Twins | None:
    """Another style of the same concept, or another concept in the same style."""
    [placed] = first.objects
    has = [s for s, sprite in enumerate(composer.sprite_of[placed.concept]) if sprite >= 0]
    styles = [style for style in has if style != placed.style]
    if styles and dice.chance(0.6):
        change: Change = "style"
        concept, style = placed.concept, dice.pick(styles)
    else:
        change = "object"
        concept, style = dice.below(len(composer.concepts)), placed.style
        has_style = composer.sprite_of[concept][style] >= 0
        if not has_style or composer.has_shared_word(concept, placed.concept):
            return None
    hues = composer.hues_in([concept], style)
    background = first.background
    if dice.chance(0.3) or backgrounds.clashes(background, hues):
        background = backgrounds.choose(dice, hues, is_named=True, has_landscapes=False)
    second = composer.sticker(dice, concept, style, background, is_named=dice.chance(0.5))
    return Twins(first=first, second=second, change=change)


def _change_portrait(dice: Dice, composer: Composer, first: Scene) -> Twins | None:
    """Another face of the same look, such that either caption says something untrue of the other.

    Of the faces kept from training if the first one is one of them.
    """
    assert first.avatar is not None
    avatar = composer.avatars[first.avatar]
    number = dice.pick(composer.faces_like(first.avatar))
    other = composer.avatars[number]
    if other.look != avatar.look and dice.chance(0.9):
        return None
    is_named = dice.chance(0.7)
    second = composer.portrait(dice, number, first.background, is_named=is_named)
    if not (_denies(first.caption, avatar, other) and _denies(second.caption, other, avatar)):
        return None
    return Twins(first=first, second=second, change="portrait")


def _denies(caption: str, avatar: Avatar, other: Avatar) -> bool:
    """Whether the caption of `avatar` names an attribute that `other` has not, or has otherwise."""
    for slot in said(caption, avatar):
        if slot.endswith("_color") or slot == "skin":
            continue
        # A person may be a man or a woman.
        is_open = slot == "person" and other.attributes.get(slot) == "person"
        if phrase_of(avatar, slot) != phrase_of(other, slot) and not is_open:
            return True
    return False


_CHANGERS: MappingProxyType[Change, Callable[[Dice, Composer, list[Thing]], list[Thing] | None]] = (
    MappingProxyType(
        {
            "object": _change_object,
            "color": _change_color,
            "swap": _swap,
            "count": _change_count,
        }
    )
)
_CHANGES: MappingProxyType[str, Callable[[Dice, Composer, Scene], Twins | None]] = MappingProxyType(
    {"scene": _change_scene, "sticker": _change_sticker, "avatar": _change_portrait}
)
