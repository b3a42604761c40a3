"""Prompts that ask for what training never showed, with the truth to check pictures against.

The six kinds are GenEval's (Ghosh et al., 2023). Two objects, position and the pairs of coloured
objects ask for held-out pairs; colours for held-out colours of a concept; single objects use
wordings that the caption grammar does not make. Counts hold nothing out. Start at
`held_out_prompts`; `seen_prompts` are the same of what training did show, to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sana.data.stickers.compose import Composer
from sana.data.stickers.grammar import with_article
from sana.data.stickers.known import well_known
from sana.data.stickers.scene import TASKS, Dice, Relation, Split, Task
from sana.data.stickers.world import World

COMPARED: tuple[Task, ...] = ("colors", "two", "position", "color_attribution")
"""The kinds that hold something out."""
_STREAM, _SEEN_STREAM = 3, 5
_TRIES = 400
# Things that everybody can name and recognize; prompts use those that the world has.
_SINGLE_FORMS = (
    "please draw {a}",
    "one lonely {x} {place}",
    "a nice big {x}, nothing else",
    "show me {a} {place}",
    "a lovely little {x} {place}",
)
_RELATION_WORDS: dict[Relation, str] = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
_NUMBERS = ("", "one", "two", "three", "four")
_PLACES = (
    "on a pink background",
    "on a light blue background",
    "on a white background",
    "in a green meadow",
    "on a sandy beach",
    "on a snowy hill",
)


@dataclass(frozen=True, slots=True)
class Expected:
    """So many pictures of a concept, in a colour if the prompt says one."""

    concept: int
    color: str | None
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCase:
    """A prompt and what its picture must show; `relation` is of the first thing to the second."""

    kind: Task
    prompt: str
    expected: tuple[Expected, ...]
    relation: Relation | None


def held_out_prompts(world: World | Composer, count: int, seed: int) -> tuple[PromptCase, ...]:
    """`count` different prompts, the six kinds in turn; equal arguments give equal prompts.

    A world too small for so many different prompts repeats some.
    """
    return _prompts(world, count, (seed, _STREAM), TASKS, "held_out")


def seen_prompts(world: World | Composer, count: int, seed: int) -> tuple[PromptCase, ...]:
    """As `held_out_prompts`, of colours and pairs that training shows, the kinds `COMPARED`."""
    return _prompts(world, count, (seed, _SEEN_STREAM), COMPARED, "train")


def _prompts(
    world: World | Composer,
    count: int,
    stream: tuple[int, int],
    tasks: Sequence[Task],
    split: Split,
) -> tuple[PromptCase, ...]:
    composer = world if isinstance(world, Composer) else Composer(world)
    known = well_known(composer.concepts)
    cases: list[PromptCase] = []
    seen: set[tuple[Task, tuple[Expected, ...], Relation | None]] = set()
    for number in range(count):
        dice = Dice(*stream, number)
        for _ in range(_TRIES):
            case = _draw(dice, composer, known, tasks[number % len(tasks)], split)
            identity = (case.kind, case.expected, case.relation)
            if identity not in seen:
                break
        seen.add(identity)
        cases.append(case)
    return tuple(cases)


def _draw(
    dice: Dice, composer: Composer, known: Sequence[int], task: Task, split: Split
) -> PromptCase:
    if task == "single":
        return _single(dice, composer, dice.pick(known))
    if task == "counting":
        return _counting(dice, composer, dice.pick(known))
    if task == "colors":
        concept, color = _new_color(dice, composer, known, split)
        words = with_article(f"{color} {composer.concepts[concept].label}")
        return _case(task, f"a photo of {words}", (Expected(concept, color, 1),))
    first, second = _new_pair(dice, composer, known, split, colored=task == "color_attribution")
    labels = [composer.concepts[c].label for c in (first, second)]
    if task == "two":
        words = " and ".join(with_article(label) for label in labels)
        return _case(
            task, f"a photo of {words}", (Expected(first, None, 1), Expected(second, None, 1))
        )
    if task == "position":
        relation = dice.pick(tuple(_RELATION_WORDS))
        a, b = (with_article(label) for label in labels)
        expected = (Expected(first, None, 1), Expected(second, None, 1))
        return _case(task, f"a photo of {a} {_RELATION_WORDS[relation]} {b}", expected, relation)
    new = dice.pick(composer.colors_of(first, split))
    colors = new, dice.pick([c for c in composer.colors_of(second, "train") if c != new])
    expected = (Expected(first, colors[0], 1), Expected(second, colors[1], 1))
    words = " and ".join(with_article(f"{c} {n}") for c, n in zip(colors, labels, strict=True))
    return _case(task, f"a photo of {words}", expected)


def _single(dice: Dice, composer: Composer, concept: int) -> PromptCase:
    label = composer.concepts[concept].label
    form = dice.pick(_SINGLE_FORMS)
    prompt = form.format(a=with_article(label), x=label, place=dice.pick(_PLACES))
    return _case("single", prompt, (Expected(concept, None, 1),))


def _counting(dice: Dice, composer: Composer, concept: int) -> PromptCase:
    number = dice.between(2, 4)
    prompt = f"a photo of {_NUMBERS[number]} {composer.concepts[concept].plural}"
    if dice.chance(0.5):
        prompt = f"{prompt} {dice.pick(_PLACES)}"
    return _case("counting", prompt, (Expected(concept, None, number),))


def _case(
    kind: Task, prompt: str, expected: tuple[Expected, ...], relation: Relation | None = None
) -> PromptCase:
    return PromptCase(kind=kind, prompt=prompt, expected=expected, relation=relation)


def _new_color(
    dice: Dice, composer: Composer, known: Sequence[int], split: Split
) -> tuple[int, str]:
    able = [c for c in known if composer.colors_of(c, split)]
    concept = dice.pick(able)
    return concept, dice.pick(composer.colors_of(concept, split))


def _new_pair(
    dice: Dice, composer: Composer, known: Sequence[int], split: Split, *, colored: bool
) -> tuple[int, int]:
    """A pair of the split; if coloured, the first has a colour of the split, the other any."""
    if colored:
        known = [c for c in known if composer.colors_of(c, "train")]
        lead = [c for c in known if composer.colors_of(c, split)]
    else:
        lead = list(known)
    for _ in range(_TRIES):
        first, second = dice.pick(lead), dice.pick(known)
        if first != second and composer.allows(split, first, second):
            return (first, second) if colored or dice.chance(0.5) else (second, first)
    raise ValueError(
        f"no {split} pair was found among {len(known)} concepts; prompts need a world with one: "
        "take a larger pack"
    )
