"""Reading a prompt of the sticker world: which things, colours, counts and places it asks for.

The inverse of `grammar` where that is possible. A prompt is read only if every word of it is
accounted for, so that nothing it asks for goes unjudged. Start reading at `read_prompt`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sana.data.stickers import backgrounds
from sana.data.stickers.grammar import pluralize
from sana.data.stickers.prompts import Expected, PromptCase
from sana.data.stickers.scene import COLORS, Relation, Task
from sana.data.stickers.world import Concept
from sana.errors import RequestError

_NUMBERS = {"one": 1, "single": 1, "1": 1, "two": 2, "2": 2, "three": 3, "3": 3, "four": 4, "4": 4}
_RELATIONS: tuple[tuple[str, Relation], ...] = (
    (
        r"(?:is |are )?(?:placed |located |stands )?(?:to|on|at)? ?(?:the )?left (?:side )?of",
        "left",
    ),
    (
        r"(?:is |are )?(?:placed |located |stands )?(?:to|on|at)? ?(?:the )?right (?:side )?of",
        "right",
    ),
    (r"(?:above|over|on top of)", "above"),
    (r"(?:below|under|underneath|beneath)", "below"),
)
_FILLERS = frozenset(
    """a an the and of with is are there photo picture image illustration drawing render icon 3d
    sticker cute please draw show me lonely nice big nothing else lovely little you can see shows
    exactly group next to beside together side by each other placed located stands style only
    them all""".split()
)
_WORD = re.compile(r"[a-z0-9'-]+|,")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Thing:
    """A noun that was found, with the words before it that belong to it."""

    concept: int
    color: str | None
    count: int
    start: int
    end: int


class Reader:
    """The nouns of a list of concepts, ready to be found in prompts."""

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.names: dict[str, int] = {}
        for index, concept in enumerate(concepts):
            for synonym in concept.synonyms:
                for name in (synonym, pluralize(synonym)):
                    self.names.setdefault(name.lower(), index)
        # Labels are what a prompt means first, whoever has them as synonyms.
        for index, concept in enumerate(concepts):
            self.names[concept.plural.lower()] = self.names[concept.label.lower()] = index
        self.labels = {name.lower() for c in concepts for name in (c.label, c.plural)}
        nouns = "|".join(map(re.escape, sorted(self.names, key=len, reverse=True)))
        colors, numbers = "|".join(COLORS), "|".join(_NUMBERS)
        self._thing = re.compile(
            rf"\b(?:(?P<count>{numbers}) )?(?:(?P<color>{colors})(?:[- ]colored)? )?"
            rf"(?P<noun>{nouns})\b(?! background| gradient)"
        )

    def read(self, prompt: str) -> PromptCase:
        """What a picture of `prompt` must show; `RequestError` where a word is not understood."""
        text = " ".join(prompt.lower().rstrip(" .!").replace(",", " , ").split())
        text = _without_place(text.replace("you can see ", ""))
        things = [self._read(match) for match in self._thing.finditer(text)]
        if not 1 <= len(things) <= 2:
            raise _unreadable(prompt, f"it names {len(things)} things of the sticker world")
        between = text[things[0].end : things[1].start] if len(things) == 2 else ""
        relation, between = _relation(between)
        tail = text[things[-1].end :]
        late = re.fullmatch(rf" (?:is|are|, all of them) ({'|'.join(COLORS)})", tail)
        if late and things[-1].color is None:
            things[-1], tail = replace(things[-1], color=late[1]), ""
        rest = " ".join((text[: things[0].start], between, tail))
        unknown = [word for word in _WORD.findall(rest) if word != "," and word not in _FILLERS]
        if unknown:
            raise _unreadable(prompt, f"the word {unknown[0]!r} is not understood")
        return _case(prompt, things, relation)

    def _read(self, match: re.Match[str]) -> _Thing:
        """A colour before a noun is its colour, unless both together are a label: "red heart"."""
        color, noun = match["color"], match["noun"]
        if color and f"{color} {noun}" in self.labels:
            color, noun = None, f"{color} {noun}"
        return _Thing(
            concept=self.names[noun],
            color=color,
            count=_NUMBERS[match["count"]] if match["count"] else 1,
            start=match.start(),
            end=match.end(),
        )


def read_prompt(prompt: str, concepts: Sequence[Concept]) -> PromptCase:
    """`Reader(concepts).read(prompt)`."""
    return Reader(concepts).read(prompt)


def _without_place(text: str) -> str:
    phrases = [p for phrases, _ in backgrounds.LANDSCAPES.values() for p in phrases]
    colors = "|".join(sorted(backgrounds.PLAIN, key=len, reverse=True))
    plain = (
        r"(?:(?:on|against|in front of|with|, )\s?(?:an? )?)?(?:plain )?"
        rf"(?:{colors})(?: gradient)? background"
    )
    for pattern in (plain, *map(re.escape, sorted(phrases, key=len, reverse=True))):
        shorter, count = re.subn(rf"(?:^|\s){pattern}\b", "", text)
        if count:
            return shorter.strip()
    return text


def _relation(between: str) -> tuple[Relation | None, str]:
    for pattern, relation in _RELATIONS:
        rest, count = re.subn(rf"\b{pattern}\b", "", between)
        if count:
            return relation, rest
    return None, between


def _case(prompt: str, things: Sequence[_Thing], relation: Relation | None) -> PromptCase:
    kind: Task
    if len(things) == 1:
        [thing] = things
        kind = "counting" if thing.count > 1 else "colors" if thing.color else "single"
    elif relation is not None:
        kind = "position"
    else:
        kind = "color_attribution" if any(thing.color for thing in things) else "two"
    expected = tuple(Expected(thing.concept, thing.color, thing.count) for thing in things)
    return PromptCase(kind=kind, prompt=prompt, expected=expected, relation=relation)


def _unreadable(prompt: str, reason: str) -> RequestError:
    return RequestError(
        f"prompt {prompt[:80]!r} cannot be judged by the sticker rules: {reason}; it must name one "
        "or two things, such as 'a photo of a red fox to the left of two apples', so reword it or "
        "take another judge"
    )
