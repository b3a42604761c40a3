"""Styled pictures: what training may show, in one style, with captions that say the style."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest

from numerics import assert_detects
from sana.data.stickers.compose import Composer
from sana.data.stickers.grammar import pluralize
from sana.data.stickers.scene import Scene
from sana.data.stickers.splits import is_held_out_pair, is_held_out_style
from sana.data.stickers.stream import SceneStream
from sana.data.stickers.styled import draw_styled
from sana.data.stickers.tiny import tiny_world
from sana.data.stickers.world import Concept
from sana.training.recipes import plan

WORLD = tiny_world()
COMPOSER = Composer(WORLD)


def draw(count: int, seed: int = 3) -> list[Scene]:
    return [draw_styled(COMPOSER, index, seed=seed) for index in range(count)]


def says(caption: str, words: str) -> bool:
    return re.search(rf"\b{re.escape(words.lower())}\b", caption) is not None


def words_for(concept: Concept) -> list[str]:
    return [concept.label, concept.plural, *concept.synonyms, *map(pluralize, concept.synonyms)]


def test_what_is_held_out_is_not_shown() -> None:
    def check(composer: Composer) -> None:
        for index in range(2000):
            scene = draw_styled(composer, index, seed=3)
            keys = {WORLD.concepts[placed.concept].key for placed in scene.objects}
            [style] = {WORLD.styles[placed.style] for placed in scene.objects}
            assert not any(is_held_out_style(key, style) for key in keys)
            assert not any(is_held_out_pair(a, b) for a, b in combinations(keys, 2))

    class Careless(Composer):
        def concepts_in(self, style: int) -> tuple[int, ...]:
            return tuple(c for c in range(len(WORLD.concepts)) if self.sprite_of[c][style] >= 0)

    check(COMPOSER)
    assert_detects(check, Careless(WORLD))


def test_a_caption_says_the_style_and_each_thing_or_none() -> None:
    def check(is_shifted: bool) -> None:
        scenes = draw(1000)
        captions = [scene.caption.lower() for scene in scenes]
        for number, scene in enumerate(scenes):
            caption = captions[number - is_shifted]
            [style] = {WORLD.styles[placed.style] for placed in scene.objects}
            assert style.lower() in caption
            shown = Counter(placed.concept for placed in scene.objects)
            concepts = [WORLD.concepts[c] for c in shown]
            named = [any(says(caption, word) for word in words_for(c)) for c in concepts]
            if scene.spans:
                assert all(named)
                # Every object has a noun's place in the caption.
                assert {place for _, _, place in scene.spans} == set(range(len(scene.objects)))
            else:
                assert len(scene.objects) == 1 and not any(named)

    check(False)
    assert_detects(check, True)


def test_forms_come_in_their_shares() -> None:
    scenes = draw(3000)
    loose = sum(not scene.spans for scene in scenes)
    kinds = [len({placed.concept for placed in scene.objects}) for scene in scenes]
    many = sum(
        len(scene.objects) > 1 for scene, kind in zip(scenes, kinds, strict=True) if kind == 1
    )
    assert abs(loose / 3000 - 0.3) < 0.03
    assert abs(many / 3000 - 0.2) < 0.03
    assert abs(kinds.count(2) / 3000 - 0.35) < 0.03
    assert abs(sum(scene.relation is not None for scene in scenes) / kinds.count(2) - 0.5) < 0.05
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}


def test_a_picture_depends_on_its_numbers_alone() -> None:
    again = [draw_styled(Composer(WORLD), index, seed=3) for index in reversed(range(30))]
    assert draw(30) == again[::-1]
    assert draw(30) != draw(30, seed=4)


def test_a_stream_shows_them_where_its_kinds_say_so() -> None:
    stream = SceneStream(COMPOSER, count=6, seed=3, kinds=("scene", "styled", "sticker"))
    scenes = stream.draw(1)
    assert [scene.kind for scene in scenes] == ["scene", "styled", "sticker"] * 2
    assert scenes[1] == draw_styled(COMPOSER, 7, seed=3)


@pytest.mark.parametrize(("kind", "share"), [("scene", 7), ("sticker", 4), ("styled", 4)])
def test_the_recipe_takes_them(kind: str, share: int) -> None:
    assert plan("sticker-512").data.cycle().count(kind) == share  # type: ignore[arg-type]
