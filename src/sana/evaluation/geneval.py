"""GenEval (Ghosh et al. 2023): does a picture show the things it was asked for?

The rules of the published program, on what a segmenter found: `keep` is its choice of objects,
`judge` its comparison with a line of evaluation_metadata.jsonl, `summarize` its six scores. The
networks are in `sana.evaluation.segmenter` and `sana.evaluation.clip`; start reading at `judge`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from sana.errors import RequestError
from sana.evaluation.clip import Clip, classifier

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
TEMPLATES = ("a photo of a {c} %s", "a photo of a {c}-colored %s", "a photo of a {c} object")
SURE, COUNTED = 0.3, 0.9
"""How sure the segmenter must be of an object, and of one that is counted."""
MOST = 16
"""Objects of one class that are looked at."""
SLACK = 0.1
"""The share of both sizes that an offset loses."""
BACKGROUND = "#999"
PER_PROMPT = 4
PROMPTS = 553

Box: TypeAlias = tuple[float, float, float, float]
Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """One object: x0 y0 x1 y1 in pixels, how sure it is, and its pixels (None: its whole box)."""

    box: Box
    score: float
    mask: Mask | None = None


Objects: TypeAlias = Mapping[str, Sequence[Seen]]
"""By GenEval's class names, the surest first."""
NameColors: TypeAlias = Callable[[str, Sequence[Seen]], Sequence[str]]
"""(class, objects of it) -> the colour of each."""


def keep(found: Mapping[str, Sequence[Seen]], tag: str) -> dict[str, list[Seen]]:
    """The objects that count for a prompt of this kind: sure enough, the surest 16 of a class."""
    threshold = COUNTED if tag == "counting" else SURE
    kept = {
        name: sorted((s for s in same if s.score > threshold), key=lambda s: -s.score)[:MOST]
        for name, same in found.items()
    }
    return {name: same for name, same in kept.items() if same}


def judge(facts: Mapping[str, Any], objects: Objects, name_colors: NameColors) -> list[str]:
    """What is wrong with a picture, by the clauses of its prompt; empty if nothing is.

    Of the objects of a class only the surest, as many as are asked for, are looked at for colour
    and place. "include" clauses must all hold, and no "exclude" clause may.
    """
    faults: list[str] = []
    groups: list[Sequence[Seen] | None] = []
    for clause in facts.get("include", ()):
        name, count = clause["class"], clause["count"]
        surest = list(objects.get(name, ()))[:count]
        wrong = _include_faults(clause, surest, groups, name_colors)
        groups.append(None if wrong else surest)
        faults += wrong
    for clause in facts.get("exclude", ()):
        name, count = clause["class"], clause["count"]
        there = len(objects.get(name, ()))
        if there >= count:
            faults.append(f"expected fewer than {count} {name}, found {there}")
    return faults


def places(first: Box, second: Box) -> set[str]:
    """Where `first` lies of `second`, by their centres; none where they are too near.

    Each offset loses a tenth of both sizes, and must then be over half as long as the whole way
    between the centres. "Above" is up in the picture.
    """
    gaps, offsets = [], []
    for low, high in ((0, 2), (1, 3)):
        gap = (first[low] + first[high] - second[low] - second[high]) / 2
        sizes = abs(first[high] - first[low]) + abs(second[high] - second[low])
        gaps.append(gap)
        offsets.append(math.copysign(max(abs(gap) - SLACK * sizes, 0), gap))
    if all(abs(offset) < 1e-3 for offset in offsets):
        return set()
    right, down = (offset / math.hypot(*gaps) for offset in offsets)
    ways = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {name for name, share in ways.items() if share > 0.5}


def crop(image: Image.Image, seen: Seen) -> Image.Image:
    """The object alone, on grey, cut to its box."""
    picture = image.convert("RGB")
    if seen.mask is not None:
        blank = Image.new("RGB", picture.size, BACKGROUND)
        picture = Image.composite(picture, blank, Image.fromarray(seen.mask))
    x0, y0, x1, y1 = (round(value) for value in seen.box)
    return picture.crop((x0, y0, x1, y1))


class ColorNamer:
    """The colour of an object, by CLIP: the nearest of ten, each described in three sentences."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.known: dict[str, Tensor] = {}

    def __call__(self, image: Image.Image, name: str, objects: Sequence[Seen]) -> list[str]:
        if name not in self.known:
            templates = [t % name if "%s" in t else t for t in TEMPLATES]
            self.known[name] = classifier(self.clip, COLORS, templates)
        seen = self.clip.images([crop(image, each) for each in objects])
        nearest: list[int] = (seen @ self.known[name].T).argmax(1).tolist()
        return [COLORS[index] for index in nearest]


def check_facts(facts: Mapping[str, Any], key: str) -> None:
    """Raise `RequestError` unless a line of the metadata says what `judge` needs."""
    clauses = [*facts.get("include", ()), *facts.get("exclude", ())]
    is_whole = all(
        isinstance(c, dict) and isinstance(c.get("class"), str) and isinstance(c.get("count"), int)
        for c in clauses
    )
    if facts.get("tag") not in TASKS or not facts.get("include") or not is_whole:
        raise RequestError(
            f"prompt {key} is none of GenEval's (tag {facts.get('tag')!r}); each line of "
            "evaluation_metadata.jsonl has a tag of the six, and include clauses with class and "
            "count, so draw from that file or leave geneval out"
        )
    for number, clause in enumerate(facts["include"]):
        place = clause.get("position")
        if place is not None and not (len(place) == 2 and 0 <= place[1] < number):
            raise RequestError(
                f"prompt {key} has position {place!r}; it must be [relation, number of an earlier "
                "include clause], so get evaluation_metadata.jsonl again"
            )


def _include_faults(
    clause: Mapping[str, Any],
    surest: Sequence[Seen],
    groups: Sequence[Sequence[Seen] | None],
    name_colors: NameColors,
) -> list[str]:
    name, count = clause["class"], clause["count"]
    if len(surest) < count:
        return [f"expected {count} {name}, found {len(surest)}"]
    faults = []
    if "color" in clause:
        named = list(name_colors(name, surest))
        if named.count(clause["color"]) < count:
            faults.append(f"expected {count} {clause['color']} {name}, found {', '.join(named)}")
    if "position" in clause and not faults:
        relation, target = clause["position"]
        if groups[target] is None:
            return [f"nothing for {name} to be {relation}"]
        pairs = [(a, b) for a in surest for b in groups[target] or ()]
        for a, b in pairs:
            found = places(a.box, b.box)
            if relation not in found:
                return [
                    f"expected {name} {relation}, found {' and '.join(sorted(found)) or 'none'}"
                ]
    return faults
