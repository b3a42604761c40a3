"""Captions: the many ways to say what is in a picture of the sticker world.

Nouns carry invisible marks while a sentence is put together; `finish` takes them out and turns
them into character spans. Every caption of two things names the first object first. Start
reading at `scene_caption`; portraits are in `portraits`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sana.data.stickers import backgrounds
from sana.data.stickers.scene import COLORS, INVERSE, Background, Dice, Relation, Span
from sana.data.stickers.world import Concept

Caption = tuple[str, tuple[Span, ...]]

_MARK = re.compile("\x01(\\d)([^\x02]*)\x02")
_NUMBERS = {1: ("one", "1"), 2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
_COLOR_WORDS = frozenset((*COLORS, "gray", "grey", "golden"))
_U_AS_IN_YOU = ("uni", "use", "usa", "eu", "one", "ufo", "ukulele", "utensil")
_SILENT = ("hour", "suv", "x-ray", "mri")
_PROPER = {"statue of liberty": "the ", "santa claus": ""}

_PREPOSITIONS: dict[Relation, tuple[str, ...]] = {
    "left": ("to the left of", "left of", "on the left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right of", "on the right side of"),
    "above": ("above", "above", "over", "on top of"),
    "below": ("below", "below", "under", "underneath", "beneath"),
}
# What the second thing is to the first, said after it: "a dog with a cat {}".
_AFTER: dict[Relation, tuple[str, ...]] = {
    "left": ("on its left", "to its left", "on the left of it"),
    "right": ("on its right", "to its right", "on the right of it"),
    "above": ("above it", "on top of it", "over it"),
    "below": ("below it", "under it", "beneath it"),
}
_CORNERS: dict[Relation, tuple[str, str]] = {
    "left": ("on the left", "on the right"),
    "right": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
_MEDIA = (
    "a photo of",
    "a photo of",
    "a photo of",
    "a picture of",
    "an image of",
    "an illustration of",
    "a drawing of",
    "a 3D render of",
    "a 3D icon of",
    "a 3D illustration of",
    "a sticker of",
    "a cute picture of",
)

# What a thing of a group may be called by someone who does not say what it is.
_LOOSE: dict[str, tuple[str, ...]] = {
    "animals": ("an animal", "an animal", "something"),
    "food": ("food", "something to eat", "something"),
    "characters": ("a character", "somebody"),
    "": ("something", "an object", "a thing"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A thing as the caption speaks of it; `objects` are its indices, several if counted."""

    concept: Concept
    color: str | None
    objects: tuple[int, ...]


def scene_caption(
    dice: Dice,
    things: Sequence[Named],
    relation: Relation | None,
    background: Background | None,
) -> Caption:
    """A caption for one or two things; `background` is None where it is not to be mentioned."""
    groups = tuple(thing.objects for thing in things)
    form = dice.uniform()
    if form < 0.12 and relation is None:
        return finish(dice, _tags(dice, things, background), groups)
    if form < 0.35:
        text = _sentence(dice, things, relation)
        if background is None:
            return finish(dice, text, groups)
        place = backgrounds.phrase(dice, background)
        text = f"{place}, {text}" if dice.chance(0.5) else f"{text} {place}"
        return finish(dice, text, groups)
    has_medium = form < 0.6
    text = _phrase(dice, things, relation, is_bare=not has_medium)
    if has_medium:
        text = f"{dice.pick(_MEDIA)} {text}"
    if background is not None:
        if dice.chance(0.8):
            text = f"{text} {backgrounds.phrase(dice, background)}"
        else:
            text = f"{text}, {backgrounds.tag(dice, background)}"
    return finish(dice, text, groups)


def sticker_caption(dice: Dice, thing: Named, style: str, background: Background | None) -> Caption:
    """A caption for one object in a named style ("a flat style sticker of a fox")."""
    noun, bare = _noun_phrase(dice, thing), _bare(dice, thing)
    text = dice.pick(
        (
            f"a {style} style sticker of {noun}",
            f"a {style} style emoji of {noun}",
            f"a sticker of {noun} in {style} style",
            f"{noun} in {style} style",
            f"{noun} drawn in {style} style",
            f"{bare}, {style}",
            f"{bare}, {style} style",
            f"{bare} sticker, {style} style",
            f"{style} style {bare}",
            f"{style} {bare} sticker",
            f"an illustration of {noun} in the {style} style",
            f"{bare} emoji in {style} style",
        )
    )
    text = _before(dice, _correct_article(text), background)
    return finish(dice, text, (thing.objects,))


def styled_caption(
    dice: Dice,
    things: Sequence[Named],
    relation: Relation | None,
    style: str,
    background: Background | None,
) -> Caption:
    """A caption for one or two things in one named style ("two foxes in flat style")."""
    what = _phrase(dice, things, relation, is_bare=False)
    text = dice.pick(
        (
            f"{what} in {style} style",
            f"{what} in {style} style",
            f"{what}, {style} style",
            f"{what}, {style}",
            f"{what} drawn in {style} style",
            f"an illustration of {what} in the {style} style",
            f"a {style} style picture of {what}",
            f"{style} style stickers of {what}",
            f"in {style} style, {what}",
            f"{_sentence(dice, things, relation)}, in {style} style",
        )
    )
    text = _before(dice, _correct_article(text), background)
    return finish(dice, text, tuple(thing.objects for thing in things))


def loose_caption(
    dice: Dice, concept: Concept, style: str, background: Background | None
) -> Caption:
    """A caption for one thing that names the style and not the thing ("a flat style sticker")."""
    what = dice.pick(_LOOSE.get(concept.group, _LOOSE[""]))
    text = dice.pick(
        (
            f"a {style} style sticker",
            f"a {style} style emoji",
            f"a sticker in {style} style",
            f"an illustration in the {style} style",
            f"{style} style",
            f"{style} sticker",
            f"{what} in {style} style",
            f"{what}, {style} style",
            f"a {style} style sticker of {what}",
            f"a sticker of {what} in {style} style",
        )
    )
    return finish(dice, _before(dice, _correct_article(text), background), ())


def finish(dice: Dice, text: str, groups: Sequence[tuple[int, ...]]) -> Caption:
    """Vary capitals and full stop, take the marks out, and give each object its noun's span."""
    pieces, spans, at, end = [], [], 0, 0
    for match in _MARK.finditer(text):
        pieces.append(text[end : match.start()])
        at += len(pieces[-1])
        noun, end = match[2], match.end()
        spans += [(at, at + len(noun), index) for index in groups[int(match[1])]]
        pieces.append(noun)
        at += len(noun)
    caption = "".join(pieces) + text[end:]
    case = dice.uniform()
    if case < 0.35:
        caption = caption[:1].upper() + caption[1:]
    elif case < 0.6:
        caption = caption.lower()
    if dice.chance(0.3 if case < 0.35 else 0.08):
        caption += "."
    return caption, tuple(spans)


def with_article(words: str) -> str:
    """Put the article before a noun phrase ("an apple"); marks are looked through."""
    shown = _MARK.sub(r"\2", words)
    low = shown.lower()
    if low.startswith(("a ", "an ", "the ")):
        return words
    for name, article in _PROPER.items():
        if low.startswith(name):
            return article + words
    starts_open = low[0] in "aeiou" or low.startswith(_SILENT)
    if starts_open and not low.startswith(_U_AS_IN_YOU):
        return f"an {words}"
    return f"a {words}"


def pluralize(words: str) -> str:
    """The plural of a noun phrase, by rule; for synonyms, whose plural is not in the data."""
    head, *rest = re.split(r"( of | with | in | on )", words, maxsplit=1)
    if head.endswith(("s", "x", "z", "ch", "sh")):
        plural = head if head.endswith("s") and not head.endswith("ss") else head + "es"
    elif head.endswith("man"):
        plural = head[:-3] + "men"
    elif head.endswith("y") and head[-2:-1] not in "aeiou":
        plural = head[:-1] + "ies"
    else:
        plural = head + "s"
    return plural + "".join(rest)


def _before(dice: Dice, text: str, background: Background | None) -> str:
    if background is None:
        return text
    if text.count(",") or dice.chance(0.25):
        return f"{text}, {backgrounds.tag(dice, background)}"
    return f"{text} {backgrounds.phrase(dice, background)}"


def _correct_article(text: str) -> str:
    if text.startswith("a "):
        return with_article(text[2:])
    return text


def names_color(words: str) -> bool:
    """Whether a noun says a colour itself ("black cat"), so that another would contradict it."""
    return not _COLOR_WORDS.isdisjoint(words.lower().split())


def _name(dice: Dice, thing: Named, slot: int) -> str:
    concept, number = thing.concept, len(thing.objects)
    synonym = dice.pick(concept.synonyms) if concept.synonyms and dice.chance(0.25) else None
    if synonym is not None and not (thing.color and names_color(synonym)):
        word = synonym if number == 1 else pluralize(synonym)
    else:
        word = concept.label if number == 1 else concept.plural
    return f"\x01{slot}{word}\x02"


def _bare(dice: Dice, thing: Named, slot: int = 0) -> str:
    noun = _name(dice, thing, slot)
    return f"{thing.color} {noun}" if thing.color else noun


def _is_mass(concept: Concept) -> bool:
    """Words that take no "a": "scissors", "jeans"."""
    return concept.label == concept.plural and concept.label.endswith("s")


def _noun_phrase(dice: Dice, thing: Named, slot: int = 0) -> str:
    count = len(thing.objects)
    noun = _name(dice, thing, slot)
    color = thing.color
    if count > 1:
        number = dice.pick(_NUMBERS[count]) if dice.chance(0.3) else _NUMBERS[count][0]
        return f"{number} {color} {noun}" if color else f"{number} {noun}"
    if color and dice.chance(0.06):
        text = dice.pick((f"{color}-colored {noun}", f"{color} colored {noun}"))
    else:
        text = f"{color} {noun}" if color else noun
    if _is_mass(thing.concept):
        return text
    if dice.chance(0.04):
        return f"one {text}"
    return with_article(text)


def _phrase(
    dice: Dice, things: Sequence[Named], relation: Relation | None, *, is_bare: bool
) -> str:
    if len(things) == 2:
        return _pair_phrase(dice, things, relation)
    thing = things[0]
    count = len(thing.objects)
    form = dice.uniform()
    if count == 1:
        if form < 0.3 and is_bare:
            return _bare(dice, thing)
        if form > 0.95:
            return f"a single {_bare(dice, thing)}"
        return _noun_phrase(dice, thing)
    if thing.color and form < 0.06:
        plain = Named(concept=thing.concept, color=None, objects=thing.objects)
        return f"{_noun_phrase(dice, plain)}, all of them {thing.color}"
    if form < 0.14:
        return f"exactly {_noun_phrase(dice, thing)}"
    if form < 0.2:
        return f"a group of {_noun_phrase(dice, thing)}"
    return _noun_phrase(dice, thing)


def _pair_phrase(dice: Dice, things: Sequence[Named], relation: Relation | None) -> str:
    a, b = (_noun_phrase(dice, thing, slot) for slot, thing in enumerate(things))
    if relation is None:
        return dice.pick(
            (
                f"{a} and {b}",
                f"{a} and {b}",
                f"{a} and {b}",
                f"{a} next to {b}",
                f"{a} beside {b}",
                f"{a} with {b}",
                f"{a} and {b} side by side",
                f"{a} together with {b}",
            )
        )
    form = dice.uniform()
    if form < 0.62:
        return f"{a} {dice.pick(_PREPOSITIONS[relation])} {b}"
    first, second = _CORNERS[relation]
    opposite = INVERSE[relation]
    if form < 0.74:
        return f"{a} {first} and {b} {second}"
    if form < 0.86:
        return f"{a} with {b} {dice.pick(_AFTER[opposite])}"
    if form < 0.93:
        return f"{first} {a}, {second} {b}"
    return f"{a}, {dice.pick(_PREPOSITIONS[relation])} {b}"


def _sentence(dice: Dice, things: Sequence[Named], relation: Relation | None) -> str:
    a = _noun_phrase(dice, things[0], 0)
    is_many = len(things[0].objects) > 1
    verb = "are" if is_many or _is_mass(things[0].concept) else "is"
    if len(things) == 1:
        forms = [f"there {verb} {a}", f"the picture shows {a}", f"you can see {a}"]
        if things[0].color and not is_many:
            bare = _name(dice, things[0], 0)
            forms.append(f"the {bare} {verb} {things[0].color}")
        return dice.pick(forms)
    b = _noun_phrase(dice, things[1], 1)
    if relation is None:
        return dice.pick(
            (
                f"there {verb} {a} and {b}",
                f"{a} and {b} are next to each other",
                f"{a} {verb} next to {b}",
                f"the picture shows {a} and {b}",
            )
        )
    verb = dice.pick((verb, verb, "is placed", "stands", "is located")) if verb == "is" else verb
    form = dice.uniform()
    if form < 0.6:
        return f"{a} {verb} {dice.pick(_PREPOSITIONS[relation])} {b}"
    opposite = INVERSE[relation]
    if form < 0.8:
        return f"there is {a}, and {b} is {dice.pick(_AFTER[opposite])}"
    first, second = _CORNERS[relation]
    return f"{first} there is {a} and {second} there is {b}"


def _tags(dice: Dice, things: Sequence[Named], background: Background | None) -> str:
    parts = []
    for slot, thing in enumerate(things):
        count = len(thing.objects)
        if len(things) == 1 and dice.chance(0.5):
            parts.append(_name(dice, thing, slot))
            if thing.color:
                parts.append(thing.color)
            if count > 1:
                parts.append(dice.pick(_NUMBERS[count]))
        elif count > 1:
            parts.append(_noun_phrase(dice, thing, slot))
        else:
            parts.append(_bare(dice, thing, slot))
    if background is not None:
        parts.append(backgrounds.tag(dice, background))
    if dice.chance(0.15):
        parts.append(dice.pick(("3D", "3D style", "3D icon")))
    return ", ".join(parts)
