"""Several captions a picture, of known quality, and how often each is trained on.

Sana (section 2.4) draws caption i of a picture with probability exp(c_i / T) / sum exp(c_j / T), c
its CLIP score. Here quality is known by construction, so the scores are given.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sana.data.stickers.compose import Composer
from sana.data.stickers.scene import Dice, Scene
from sana.data.stickers.stream import SceneStream
from sana.data.stickers.twins import draw_twins

SCORES = (30.0, 27.0, 22.0, 15.0)
"""Of the exact caption, of one of another thing's name only, of a twin's, of a stranger's."""
_STREAM = 0xCA9


def shares(temperature: float) -> tuple[float, ...]:
    """How often each caption is drawn; 0 takes the best alone, infinity all alike."""
    if temperature == 0:
        return (1.0, 0.0, 0.0, 0.0)
    weights = [math.exp((score - SCORES[0]) / temperature) for score in SCORES]
    return tuple(weight / sum(weights) for weight in weights)


class CaptionStream(SceneStream):
    """Scenes whose captions are drawn at `temperature`."""

    temperature: float = 0.0

    def draw(self, number: int) -> list[Scene]:
        """The scenes of chunk `number`."""
        rank, world = self.place
        first = (number * world + rank) * self.count
        chances = shares(self.temperature)
        return [
            choose(self.composer, first + j, seed=self.seed, chances=chances)
            for j in range(self.count)
        ]


def choose(composer: Composer, index: int, *, seed: int, chances: tuple[float, ...]) -> Scene:
    """Scene `index` with one of its four captions."""
    twins = draw_twins(composer, index, seed=seed, split="train")
    scene, dice = twins.first, Dice(seed, _STREAM, index)
    bounds = [sum(chances[: n + 1]) for n in range(len(chances))]
    number = dice.weighted((0, 1, 2, 3), bounds)
    if number == 0:
        return scene
    if number == 1:
        thing = scene.objects[0].concept if scene.objects else None
        label = composer.concepts[thing].label if thing is not None else "person"
        return replace(scene, caption=label, spans=())
    if number == 2:
        return replace(scene, caption=twins.second.caption, spans=())
    stranger = composer.draw(dice.below(1 << 30), seed=seed + 1, split="train")
    return replace(scene, caption=stranger.caption, spans=())
