"""Prompts of the sticker world read back into what they ask for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from sana.data.stickers.compose import Composer
from sana.data.stickers.prompts import held_out_prompts
from sana.data.stickers.reading import Reader
from sana.data.stickers.tiny import tiny_world
from sana.errors import RequestError

WORLD = tiny_world()
READER = Reader(WORLD.concepts)


def test_graded_prompts_are_read_exactly() -> None:
    for case in held_out_prompts(WORLD, 5, 1):
        read = READER.read(case.prompt)
        assert (read.expected, read.relation) == (case.expected, case.relation), case.prompt


def test_a_caption_is_read_rightly_or_refused() -> None:
    composer, read, refused = Composer(WORLD), 0, 0
    for index in range(400):
        scene = composer.draw(index, seed=1, kind="scene")
        try:
            case = READER.read(scene.caption)
        except RequestError:
            refused += 1
            continue
        read += 1
        truth = Counter((thing.concept, thing.color) for thing in scene.objects)
        said = {(thing.concept, thing.color): thing.count for thing in case.expected}
        assert said == truth and case.relation == scene.relation, scene.caption
    assert read > 2 * refused, (read, refused)


def test_a_color_is_not_swallowed_by_a_synonym_or_taken_for_a_fruit() -> None:
    circle, square, *others = WORLD.concepts
    reader = Reader(
        [
            replace(circle, synonyms=("red circle",)),
            replace(square, key="orange", label="orange", plural="oranges"),
            replace(others[0], label="red ring", plural="red rings"),
            *others[1:],
        ]
    )

    def said(prompt: str) -> list[tuple[int, str | None, int]]:
        return [(e.concept, e.color, e.count) for e in reader.read(prompt).expected]

    assert said("four red circles") == [(0, "red", 4)]
    assert said("two orange circles") == [(0, "orange", 2)]
    assert said("an orange") == [(1, None, 1)]
    assert said("a red ring") == [(2, None, 1)]


@pytest.mark.parametrize(
    "prompt, reason",
    [
        ("a dragon", "names 0 things"),
        ("a circle riding a square", "'riding' is not understood"),
        ("a circle, a square and a ring", "names 3 things"),
    ],
)
def test_what_is_not_understood_is_said(prompt: str, reason: str) -> None:
    with pytest.raises(RequestError, match=f"cannot be judged.*{reason}.*another judge"):
        READER.read(prompt)
