"""Which combinations training never sees, so that tests can ask for something new.

One in ten of the (concept, style) pairs, of the (colour, concept) pairs and of the unordered
concept pairs is held out. A pair's place is a SHA-256 of its names and of the salt in
`splits.json`: it depends on nothing else, so it stays put when concepts are added and is equal on
every machine.
"""

from __future__ import annotations

import json
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import NamedTuple

_SCALE = 1 << 64


class _Rule(NamedTuple):
    salt: str
    style: float
    color: float
    pair: float
    always_seen: frozenset[str]


@cache
def _rule() -> _Rule:
    data = json.loads(files("sana.data.stickers").joinpath("splits.json").read_text("utf-8"))
    return _Rule(
        salt=data["salt"],
        style=data["fractions"]["style"],
        color=data["fractions"]["color"],
        pair=data["fractions"]["pair"],
        always_seen=frozenset(data["always_seen_styles"]),
    )


def _share(*parts: str) -> float:
    text = "\x1f".join((_rule().salt, *parts))
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") / _SCALE


@cache
def is_held_out_style(concept_key: str, style: str) -> bool:
    """True if training must not show this concept in this style. Never for the main style "3D"."""
    rule = _rule()
    if style in rule.always_seen:
        return False
    return _share("style", concept_key, style) < rule.style


@cache
def is_held_out_color(color: str, concept_key: str) -> bool:
    """True if training must not show this concept recoloured to this colour."""
    return _share("color", color, concept_key) < _rule().color


@cache
def is_held_out_pair(key_a: str, key_b: str) -> bool:
    """True if training must not show these two concepts together; the order does not matter.

    A concept with itself (two of the same thing) is never held out.
    """
    if key_a == key_b:
        return False
    first, second = sorted((key_a, key_b))
    return _share("pair", first, second) < _rule().pair
