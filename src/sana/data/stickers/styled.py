"""Pictures that teach a style by itself: several things in it, or one that the caption leaves out.

A sticker always shows one thing whose name and style its caption says, and there are only so many
such pairs: a model can learn them by heart, and then draws a thing that it has never seen in a
style in another that it has. Here things of one style stand together in thousands of ways, and in
some captions the style has to do without a thing's name. For training alone.
"""

from __future__ import annotations

from sana.data.stickers import backgrounds
from sana.data.stickers.compose import Composer, Thing
from sana.data.stickers.grammar import loose_caption, styled_caption
from sana.data.stickers.scene import RELATIONS, Dice, Scene

_STREAM = 0x57E1
_TRIES = 20
# Shares of pictures of one unnamed thing, of one, of two to four alike; the rest are of two things.
_LOOSE, _ONE, _MANY = 0.3, 0.15, 0.2


def draw_styled(composer: Composer, index: int, *, seed: int) -> Scene:
    """Picture `index` of the stream named by `seed`: one to four things in one named style.

    Of combinations that training may show; every second pair of things has a relation.
    """
    dice = Dice(seed, _STREAM, index)
    style = composer.draw_style(dice)
    form = dice.uniform()
    concepts = [dice.pick(composer.concepts_in(style))]
    if form >= _LOOSE + _ONE + _MANY:
        concepts = _pair(dice, composer, style, concepts[0])
    is_many = _LOOSE + _ONE <= form < _LOOSE + _ONE + _MANY
    count = dice.between(2, 4) if is_many else 1
    relation = dice.pick(RELATIONS) if len(concepts) == 2 and dice.chance(0.5) else None
    is_named = dice.chance(0.5)
    hues = composer.hues_in(concepts, style)
    background = backgrounds.choose(dice, hues, is_named=is_named, has_landscapes=False)
    shown = background if is_named else None
    things = [Thing(concept=concept, count=count) for concept in concepts]
    objects, named = composer.arranged(dice, things, relation, style, has_ground=False)
    name = composer.styles[style]
    if form < _LOOSE:
        caption, spans = loose_caption(dice, named[0].concept, name, shown)
    else:
        caption, spans = styled_caption(dice, named, relation, name, shown)
    return Scene(
        kind="styled",
        background=background,
        objects=objects,
        relation=relation,
        avatar=None,
        caption=caption,
        spans=spans,
    )


def _pair(dice: Dice, composer: Composer, style: int, first: int) -> list[int]:
    """`first` with another concept of the style; alone where none was found."""
    for _ in range(_TRIES):
        second = dice.pick(composer.concepts_in(style))
        if second != first and composer.allows("train", first, second):
            return [first, second]
    return [first]
