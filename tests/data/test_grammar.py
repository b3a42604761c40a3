"""Captions: articles and plurals, spans that point at nouns, words that agree with the truth."""

import re

import pytest

from numerics import assert_detects
from sana.data.stickers.compose import Composer
from sana.data.stickers.grammar import Named, finish, pluralize, scene_caption, with_article
from sana.data.stickers.portraits import trait
from sana.data.stickers.scene import Dice
from sana.data.stickers.tiny import tiny_world
from sana.data.stickers.world import Concept

WORLD = tiny_world()


def concept(label: str, plural: str, *synonyms: str) -> Concept:
    return Concept(
        key=label,
        label=label,
        plural=plural,
        synonyms=synonyms,
        tags=(),
        group="objects",
        recolorable=True,
        color=None,
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("apple", "an apple"),
        ("unicorn", "a unicorn"),
        ("onion", "an onion"),
        ("umbrella", "an umbrella"),
        ("hourglass", "an hourglass"),
        ("UFO", "a UFO"),
        ("SUV", "an SUV"),
        ("\x010egg\x02", "an \x010egg\x02"),
        ("orange \x010car\x02", "an orange \x010car\x02"),
        ("Statue of Liberty", "the Statue of Liberty"),
        ("a bob", "a bob"),
    ],
)
def test_articles(words: str, expected: str) -> None:
    assert with_article(words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("puppy", "puppies"),
        ("toy", "toys"),
        ("fox", "foxes"),
        ("sea torch", "sea torches"),
        ("snowman", "snowmen"),
        ("ear of corn", "ears of corn"),
        ("glasses", "glasses"),
    ],
)
def test_plurals(words: str, expected: str) -> None:
    assert pluralize(words) == expected


def test_spans_point_at_the_nouns() -> None:
    composer = Composer(WORLD)

    def check(shift: int) -> None:
        for index in range(600):
            scene = composer.draw(index, seed=3, split="train")
            if scene.kind == "avatar":
                continue
            assert {span[2] for span in scene.spans} == set(range(len(scene.objects)))
            for start, end, number in scene.spans:
                found = WORLD.concepts[scene.objects[number].concept]
                nouns = {found.label, found.plural, *found.synonyms}
                nouns |= {pluralize(noun) for noun in found.synonyms}
                noun = scene.caption[start + shift : end + shift].lower()
                assert noun in {noun.lower() for noun in nouns}

    check(0)
    assert_detects(check, 1)


def test_no_mark_is_left_and_every_stated_fact_is_said() -> None:
    composer = Composer(WORLD)
    for index in range(600):
        scene = composer.draw(index, seed=4, split="train")
        assert scene.caption and not re.search("[\x00-\x1f]", scene.caption)
        for placed in scene.objects:
            assert placed.color is None or placed.color in scene.caption.lower()
        if scene.task == "counting":
            count = len(scene.objects)
            number = ("zero", "one", "two", "three", "four")[count]
            assert number in scene.caption.lower() or str(count) in scene.caption


LEFT = ("to the left of", "left of", "on the left of", "on the left side of")


def place_of_first(caption: str) -> str:
    """Where the cat is as seen from the dog, read by other rules than those that wrote it."""
    text = caption.lower().rstrip(".")
    cat, dog = text.index("cat"), text.index("dog")
    assert cat < dog
    sides = {"left": "left", "right": "right", "above": "above", "over": "above"}
    sides |= {"on top of": "above", "below": "below", "under": "below", "beneath": "below"}
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    between, after = text[cat:dog], text[dog:]
    corner = re.search(r"(on the left|on the right|at the top|at the bottom)", text[:cat])
    corner = corner or re.search(
        r"(on the left|on the right|at the top|at the bottom) and", between
    )
    if corner:
        word = corner[1].split()[-1]
        return {"top": "above", "bottom": "below"}.get(word, word)
    for word, side in sides.items():
        if re.search(rf"\b{word}", between):
            return side
    for word, side in sides.items():
        if re.search(rf"\b{word}", after):
            return opposite[side]
    raise AssertionError(f"no relation in {caption!r}")


def test_every_wording_of_a_relation_says_that_relation() -> None:
    things = [
        Named(concept=concept("cat", "cats"), color=None, objects=(0,)),
        Named(concept=concept("dog", "dogs"), color=None, objects=(1,)),
    ]

    def check(swap: bool) -> None:
        for index in range(400):
            for relation in ("left", "right", "above", "below"):
                text, _ = scene_caption(Dice(1, 1, index), things, relation, None)
                wanted = {"left": "right", "right": "left"}.get(relation, relation)
                assert place_of_first(text) == (wanted if swap else relation), text

    check(False)
    assert_detects(check, True)


def test_a_colored_noun_never_takes_a_synonym_of_another_color() -> None:
    fox = Named(concept=concept("fox", "foxes", "red fox"), color="blue", objects=(0,))
    captions = [scene_caption(Dice(2, 1, index), [fox], None, None)[0] for index in range(300)]
    assert not any(re.search(r"\bred\b", caption) for caption in captions)
    assert len({caption.lower() for caption in captions}) > 20


def test_finish_gives_one_span_per_counted_object() -> None:
    caption, spans = finish(Dice(0, 1, 0), "three \x010apples\x02", ((0, 1, 2),))
    assert [caption[a:b] for a, b, _ in spans] == ["apples"] * 3
    assert [number for _, _, number in spans] == [0, 1, 2]


@pytest.mark.parametrize(
    ("hair", "expected"),
    [
        ("long wavy hair", "long wavy red hair"),
        ("a bob with bangs", "a red bob with bangs"),
        ("an afro", "a red afro"),
        ("pigtails", "red pigtails"),
        ("a few hairs", "a few red hairs"),
    ],
)
def test_portrait_words(hair: str, expected: str) -> None:
    words = {"hair": hair, "hair_color": "red", "clothing": "overalls", "clothing_color": "blue"}
    assert trait(words, "hair") == expected
    assert trait(words, "clothing") == "blue overalls"
    assert (
        trait({"clothing": "hoodie", "clothing_color": "orange"}, "clothing") == "an orange hoodie"
    )
    assert trait({"clothing": "dress"}, "clothing") == "a dress"
