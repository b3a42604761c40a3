"""Captions for portraits: any subset of a face's attributes, in any order, in several shapes.

The words come from `Avatar.attributes`; the slot "hair_color" is the colour of the slot "hair".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sana.data.stickers import backgrounds
from sana.data.stickers.grammar import Caption, finish, with_article
from sana.data.stickers.scene import Background, Dice
from sana.data.stickers.world import Avatar

_WORN = ("clothing", "headwear", "glasses", "jewelry", "mask")
_GROWN = ("hair", "beard")
_WITHOUT_ARTICLE = ("stubble", "hair", "bangs", "braids", "dreadlocks", "knots")


def portrait_caption(dice: Dice, avatar: Avatar, background: Background | None) -> Caption:
    """A caption for a portrait, such as "a smiling woman with long red hair, flat cartoon"."""
    words = avatar.attributes
    keep = dice.pick((0.35, 0.6, 0.85, 1.0))
    traits = [
        slot
        for slot in dice.shuffled([slot for slot in (*_GROWN, *_WORN) if slot in words])
        if dice.chance(keep)
    ]
    if dice.chance(0.15):
        return finish(dice, _tags(dice, avatar, traits, background), ())
    person, tail = _person(dice, words)
    text = _describe(dice, words, person, traits) + tail
    look, form = avatar.look, dice.uniform()
    if form < 0.35:
        text = f"{with_article(look)} {dice.pick(('portrait', 'avatar', 'picture'))} of {text}"
    elif form < 0.5:
        text = f"{dice.pick(('a portrait of', 'an avatar of', 'a cartoon of'))} {text}"
    if background is not None:
        if dice.chance(0.5):
            text = f"{text}, {backgrounds.tag(dice, background)}"
        else:
            text = f"{text} {backgrounds.phrase(dice, background)}"
    if 0.5 < form < 0.75:
        text = f"{text}, {look}{dice.pick((' style', ''))}"
    return finish(dice, text, ())


def said(caption: str, avatar: Avatar) -> dict[str, str]:
    """The attributes that a caption of `avatar` states, by slot; colours are slots of their own.

    "person" is not among them where the caption says no more than "person".
    """
    text, found = caption.lower(), {}
    for slot, words in avatar.attributes.items():
        if slot.endswith("_color") or words == "person":
            continue
        phrase = f"{words}-skinned" if slot == "skin" else phrase_of(avatar, slot)
        if phrase is not None and re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text):
            found[slot] = words
            if (color := avatar.attributes.get(f"{slot}_color")) is not None:
                found[f"{slot}_color"] = color
    return found


def phrase_of(avatar: Avatar, slot: str) -> str | None:
    """How captions call an attribute, in small letters; None where the portrait lacks it."""
    if slot not in avatar.attributes:
        return None
    return trait(avatar.attributes, slot, article=False).lower()


def trait(words: Mapping[str, str], slot: str, *, article: bool = True) -> str:
    """One attribute with its colour: "long red hair", "a green hoodie", "round glasses"."""
    thing = words[slot]
    color = words.get(f"{slot}_color")
    if color is not None:
        thing = _tint(thing, color)
    if not article:
        return thing.removeprefix("a ").removeprefix("an ")
    is_plural = thing.endswith("s") and not thing.endswith(("ss", "dress"))
    if is_plural or thing.startswith("a few") or " hair" in f" {thing}":
        return thing
    if thing.endswith(_WITHOUT_ARTICLE):
        return thing
    return with_article(thing)


def _tint(thing: str, color: str) -> str:
    for head in ("hairs", "hair"):
        before, found, after = f" {thing}".partition(f" {head}")
        if found:
            return f"{before} {color}{found}{after}".strip()
    for article in ("a ", "an "):
        if thing.startswith(article):
            return with_article(f"{color} {thing[len(article) :]}")
    return f"{color} {thing}"


def _person(dice: Dice, words: Mapping[str, str]) -> tuple[str, str]:
    """The person with at most an adjective or two, and what is said of the face at the end."""
    noun = words.get("person", "person")
    if noun != "person" and dice.chance(0.15):
        noun = "person"
    tail, adjectives = "", []
    mood = words.get("expression")
    if mood is not None and dice.chance(0.6):
        if " " not in mood and dice.chance(0.75):
            adjectives.append(mood)
        else:
            tail = f", {mood}" if dice.chance(0.5) else f" who is {mood}"
    elif words.get("eyes") == "winking" and dice.chance(0.6):
        adjectives.append("winking")
    skin = words.get("skin")
    if skin is not None and dice.chance(0.25):
        adjectives.append(f"{skin}-skinned")
    return with_article(" ".join([*adjectives, noun])), tail


def _describe(dice: Dice, words: Mapping[str, str], person: str, traits: list[str]) -> str:
    if not traits:
        return person
    grown = [trait(words, slot) for slot in traits if slot in _GROWN]
    worn = [trait(words, slot) for slot in traits if slot in _WORN]
    if "eyes" in words and words["eyes"] != "winking" and dice.chance(0.5):
        grown.append(words["eyes"])
    if grown and worn and dice.chance(0.5):
        verb = dice.pick(("wearing", "who wears", "in"))
        return f"{person} with {_join(grown)} {verb} {_join(worn)}"
    if worn and not grown and dice.chance(0.6):
        return f"{person} {dice.pick(('wearing', 'in'))} {_join(worn)}"
    return f"{person} with {_join(dice.shuffled(grown + worn))}"


def _join(parts: list[str]) -> str:
    if len(parts) < 3:
        return " and ".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _tags(dice: Dice, avatar: Avatar, traits: list[str], background: Background | None) -> str:
    words = avatar.attributes
    parts = [trait(words, slot, article=False) for slot in traits]
    if "expression" in words and dice.chance(0.5):
        parts.append(words["expression"])
    parts = [words.get("person", "person"), *dice.shuffled(parts)]
    if background is not None:
        parts.append(backgrounds.tag(dice, background))
    style = avatar.look if dice.chance(0.7) else "avatar"
    return ", ".join([*parts, style] if dice.chance(0.5) else [style, *parts])
