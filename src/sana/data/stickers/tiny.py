"""A small world drawn by code, for tests and for `tiny`: 12 shapes, 2 styles, 4 faces."""

from __future__ import annotations

import numpy as np
import torch

from sana.data.stickers.world import AVATAR_SIZE, SPRITE_SIZE, Avatar, Concept, World

_HUES = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 210, 50),
    "green": (50, 160, 70),
    "blue": (40, 90, 210),
    "purple": (130, 60, 190),
}
# key, plural, synonym, natural colour, group
_SHAPES = (
    ("circle", "circles", "disc", "red", "objects"),
    ("square", "squares", "block", "blue", "objects"),
    ("triangle", "triangles", "wedge", "green", "objects"),
    ("ring", "rings", "hoop", "yellow", "objects"),
    ("cross", "crosses", "plus sign", "orange", "objects"),
    ("diamond", "diamonds", "rhombus", "purple", "objects"),
    ("bar", "bars", "stick", "red", "objects"),
    ("pillar", "pillars", "column", "blue", "objects"),
    ("dome", "domes", "half circle", "green", "food"),
    ("moon", "moons", "crescent", "yellow", "animals"),
    ("checkerboard", "checkerboards", "checker pattern", "orange", "objects"),
    ("egg", "eggs", "oval", "purple", "food"),
)


def tiny_world() -> World:
    """The same world every time; its sprites obey the same rules as those of the real pack."""
    concepts = tuple(
        Concept(
            key=key,
            label=key,
            plural=plural,
            synonyms=(synonym,),
            tags=("shape", "simple"),
            group=group,
            recolorable=key != "checkerboard",
            color=color,
        )
        for key, plural, synonym, color, group in _SHAPES
    )
    plain = [_paint(_mask(key), _HUES[color], shaded=True) for key, _, _, color, _ in _SHAPES]
    flat = [_paint(_mask(key), _HUES[color], shaded=False) for key, _, _, color, _ in _SHAPES]
    sprites = np.stack(plain + flat)
    faces, avatars = zip(*(_face(index) for index in range(4)), strict=True)
    return World(
        concepts=concepts,
        styles=("3D", "flat"),
        sprites=torch.from_numpy(sprites),
        extents=np.stack([_extent(sprite) for sprite in sprites]),
        sprite_of=np.stack([np.arange(12), np.arange(12, 24)], axis=1),
        avatars=tuple(avatars),
        avatar_images=torch.from_numpy(np.stack(faces)),
        version="tiny-1",
    )


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


def _mask(key: str) -> np.ndarray:
    x, y = _grid(SPRITE_SIZE)
    x, y = x * 256 / 244, y * 256 / 244
    radius = np.hypot(x, y)
    inside = np.maximum(abs(x), abs(y)) <= 1
    masks = {
        "circle": radius <= 1,
        "square": inside,
        "triangle": inside & (abs(x) <= (y + 1) / 2),
        "ring": (radius <= 1) & (radius >= 0.6),
        "cross": inside & ((abs(x) < 0.3) | (abs(y) < 0.3)),
        "diamond": abs(x) + abs(y) <= 1,
        "bar": inside & (abs(y) < 0.3),
        "pillar": inside & (abs(x) < 0.3),
        "dome": (np.hypot(x, y - 0.5) <= 1) & (y < 0.5),
        "moon": (np.hypot(x - 0.195, y) <= 1) & (np.hypot(x - 0.695, y) > 0.8),
        "checkerboard": inside & ((np.floor(x * 2) + np.floor(y * 2)) % 2 == 0),
        "egg": np.hypot(x / 0.75, y) <= 1,
    }
    mask: np.ndarray = masks[key]
    return mask


def _paint(mask: np.ndarray, color: tuple[int, int, int], *, shaded: bool) -> np.ndarray:
    size = mask.shape[0]
    light = np.linspace(1.15, 0.7, size)[:, None, None] if shaded else np.ones((1, 1, 1))
    image = np.zeros((size, size, 4), np.uint8)
    image[..., :3] = np.clip(np.asarray(color) * light, 0, 255).astype(np.uint8)
    image[..., 3] = mask * 255
    return image


def _extent(sprite: np.ndarray) -> np.ndarray:
    opaque = sprite[..., 3] > 8
    columns, rows = np.flatnonzero(opaque.any(0)), np.flatnonzero(opaque.any(1))
    size = (columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    return np.asarray(size, np.float32) / SPRITE_SIZE


def _face(index: int) -> tuple[np.ndarray, Avatar]:
    names = ("red", "blue", "green", "yellow")
    clothing, hair = names[index], names[(index + 1) % 4]
    x, y = _grid(AVATAR_SIZE)
    image = np.zeros((AVATAR_SIZE, AVATAR_SIZE, 4), np.uint8)
    for mask, color in (
        (np.hypot(x / 0.8, (y - 1.0) / 0.6) <= 1, _HUES[clothing]),
        (np.hypot(x, y + 0.15) <= 0.58, _HUES[hair]),
        (np.hypot(x, y + 0.05) <= 0.45, (235, 190, 150)),
        (np.hypot(abs(x) - 0.17, y + 0.1) <= 0.06, (30, 30, 30)),
    ):
        image[mask] = (*color, 255)
    attributes = {
        "person": "person",
        "hair": "short hair",
        "hair_color": hair,
        "clothing": "shirt",
        "clothing_color": clothing,
        "expression": "smiling" if index % 2 else "serious",
    }
    return image, Avatar(look="flat cartoon", attributes=attributes)
