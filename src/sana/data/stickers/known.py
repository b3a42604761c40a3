"""Which concepts everybody knows: they are drawn more often, and prompts for tests use them."""

from __future__ import annotations

from collections.abc import Sequence

from sana.data.stickers.world import Concept

_WELL_KNOWN = frozenset(
    """
    dog cat fox lion tiger horse cow pig sheep goat camel giraffe elephant mouse rabbit bear
    panda koala kangaroo chicken duck owl penguin frog turtle snake dragon whale dolphin
    fish shark octopus crab snail butterfly bee ladybug spider rose tulip sunflower tree
    cactus mushroom watermelon lemon banana pineapple apple pear peach cherry strawberry
    tomato avocado eggplant carrot broccoli hamburger pizza sandwich taco donut cookie cake
    cupcake teapot spoon jar vase globe house castle tent bus taxi car tractor motorcycle
    bicycle skateboard anchor sailboat airplane helicopter rocket suitcase hourglass
    umbrella snowman balloon gift trophy kite guitar piano violin drum trumpet camera laptop
    keyboard book envelope pencil key hammer bell crown dress t-shirt scarf handbag backpack
    boot ring diamond microphone telephone computer candle bed couch chair toilet door
    bucket broom toothbrush robot ghost clown heart star cloud sun TV clock scooter truck
    train
    """.split()
) | {"teddy bear", "cell phone", "soccer ball", "alarm clock", "light bulb", "ice cream cone"}


def well_known(concepts: Sequence[Concept]) -> tuple[int, ...]:
    """The concepts whose label everybody knows, or all of them where fewer than twelve are."""
    known = tuple(c for c, concept in enumerate(concepts) if concept.label in _WELL_KNOWN)
    return known if len(known) >= 12 else tuple(range(len(concepts)))
