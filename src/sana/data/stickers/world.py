"""The things a sticker picture is made of: concepts with names, styles, sprites, avatars.

A `World` is plain data. `sprites.load_world` fills one from a pack file and `tiny.tiny_world`
draws a small one by code for tests. Nothing here imports torch at run time, so that caption workers
start fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

SPRITE_SIZE = 256
SPRITE_LONGEST = 244
AVATAR_SIZE = 384


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """One thing that can be drawn and named.

    `key` is stable (splits hash it). `label` is the singular noun without article ("fox"), `plural`
    its plural ("foxes"); where the two are equal and end in "s" the word takes no article
    ("scissors"). `synonyms` name the same picture and may stand for the label; `tags` are looser
    words about it. `recolorable`: one vivid hue covers most of it, so that turning that hue makes
    "a blue fox". `color` is the main colour word of its 3D picture when one is clear, else None;
    other styles may differ.
    """

    key: str
    label: str
    plural: str
    synonyms: tuple[str, ...]
    tags: tuple[str, ...]
    group: str
    recolorable: bool
    color: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Avatar:
    """A portrait. `look` is its drawing style as a person would call it.

    `attributes` maps a slot to words that fit a caption; a slot that the picture lacks is absent:
    person (man, woman, person), skin (light, tan, brown, dark), expression ("smiling"), eyes
    ("winking", "closed eyes"), hair ("long wavy hair", "pigtails", "a bob", "bald head"),
    hair_color, beard ("full beard", "stubble"), beard_color, glasses ("round glasses", "eyepatch"),
    glasses_color, clothing ("collared shirt"), clothing_color, headwear ("beanie"), headwear_color,
    jewelry ("hoop earrings"), mask ("medical mask"). Only hair words may begin with "a" or "an".
    """

    look: str
    attributes: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """Everything the composer draws with.

    sprites: uint8 [S, 256, 256, 4], straight-alpha RGBA, the opaque box centred, longer side 244.
    extents: float32 [S, 2], (width, height) of that box as a fraction of 256.
    sprite_of: int64 [concepts, styles], index into sprites, -1 where the style lacks the concept.
    avatar_images: uint8 [A, 384, 384, 4], straight alpha, transparent background.
    styles: names as used in prompts; style 0 is "3D" and exists for every concept.
    """

    concepts: tuple[Concept, ...]
    styles: tuple[str, ...]
    sprites: Tensor
    extents: npt.NDArray[np.float32]
    sprite_of: npt.NDArray[np.int64]
    avatars: tuple[Avatar, ...]
    avatar_images: Tensor
    version: str
