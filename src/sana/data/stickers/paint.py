"""Pixels of one sprite: rasterising SVG, boxes, fitting, and which colour a picture has.

Worker processes import this module, so it does without torch.
"""

from __future__ import annotations

import colorsys
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sana.data.stickers.world import AVATAR_SIZE, SPRITE_LONGEST, SPRITE_SIZE
from sana.errors import RequestError

Pixels = npt.NDArray[np.uint8]

_ALPHA_FLOOR = 12
_HUE_WINDOW = 25


def rasterise(svg: str, width: int, height: int) -> Pixels:
    """Render to uint8 [height, width, 4], straight alpha. The view box must have that shape."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=width, height=height))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (width, height):
        canvas = Image.new("RGBA", (width, height))
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        image = canvas
    return np.asarray(image)


def opaque_box(pixels: Pixels) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (exclusive) of what is visible; the whole picture if nothing is."""
    opaque = pixels[..., 3] > _ALPHA_FLOOR
    columns, rows = np.flatnonzero(opaque.any(0)), np.flatnonzero(opaque.any(1))
    if not len(columns):
        return 0, 0, pixels.shape[1], pixels.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def sprite_size(width: float, height: float) -> tuple[int, int]:
    """The size at which a box of this shape fills a sprite: its longer side is SPRITE_LONGEST."""
    scale = SPRITE_LONGEST / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def centred(pixels: Pixels) -> Pixels:
    """Put a picture in the middle of an empty sprite, uint8 [256, 256, 4]."""
    height, width = pixels.shape[:2]
    sprite = np.zeros((SPRITE_SIZE, SPRITE_SIZE, 4), np.uint8)
    top, left = (SPRITE_SIZE - height) // 2, (SPRITE_SIZE - width) // 2
    sprite[top : top + height, left : left + width] = pixels
    return sprite


def fitted(pixels: Pixels) -> Pixels:
    """Crop a bitmap to what is visible and resize that to fill a sprite; colours do not bleed."""
    image = Image.fromarray(pixels).crop(opaque_box(pixels)).convert("RGBa")
    size = sprite_size(*image.size)
    return centred(np.asarray(image.resize(size, Image.Resampling.LANCZOS).convert("RGBA")))


def draw_sprite(source: bytes | str) -> Pixels:
    """A WebP file or a tight SVG as a sprite: uint8 [256, 256, 4], straight alpha."""
    if isinstance(source, bytes):
        return fitted(np.asarray(Image.open(io.BytesIO(source)).convert("RGBA")))
    match = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', source)
    if match is None:
        raise RequestError("a drawing in the pack has no viewBox: build the pack again.")
    return centred(rasterise(source, *sprite_size(float(match.group(1)), float(match.group(2)))))


def draw_avatar(source: str) -> Pixels:
    """A portrait as uint8 [384, 384, 4], straight alpha."""
    return rasterise(source, AVATAR_SIZE, AVATAR_SIZE)


def draw_all(draw: Callable[[Any], Pixels], items: Sequence[Any]) -> list[Pixels]:
    """Draw several; what one worker process does at a time."""
    return [draw(item) for item in items]


def _hues(pixels: Pixels) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], int]:
    """Hue in degrees of every opaque pixel, which of them are vivid, and how many there are."""
    opaque = pixels[pixels[..., 3] > 128][:, :3] / 255.0
    opaque = opaque[:: max(1, len(opaque) // 4000)]
    hsv = np.array([colorsys.rgb_to_hsv(*color) for color in opaque])
    vivid = (hsv[:, 1] > 0.22) & (hsv[:, 2] > 0.15) & (hsv[:, 1] * hsv[:, 2] > 0.15)
    return hsv[:, 0] * 360, vivid, len(hsv)


def _best_share(hues: npt.NDArray[np.float64], total: int) -> tuple[float, float]:
    histogram = np.bincount((hues.astype(int)) % 360, minlength=360)
    padded = np.concatenate([histogram[-_HUE_WINDOW:], histogram, histogram[:_HUE_WINDOW]])
    sums = np.convolve(padded, np.ones(2 * _HUE_WINDOW + 1), mode="valid")
    centre = int(sums.argmax())
    return centre, float(sums[centre]) / max(1, total)


def is_recolorable(pixels: Pixels) -> bool:
    """True if vivid pixels within 25 degrees of one hue cover 45 % of the picture."""
    hues, vivid, total = _hues(pixels)
    return _best_share(hues[vivid], total)[1] >= 0.45


def dominant_color(pixels: Pixels) -> str | None:
    """The colour word of the picture if one covers 60 % of it, else None."""
    opaque = pixels[pixels[..., 3] > 128][:, :3]
    opaque = opaque[:: max(1, len(opaque) // 2000)]
    words = [color_word(*color) for color in opaque]
    best = max(set(words), key=words.count)
    return best if words.count(best) >= 0.6 * len(words) else None


def color_word(red: int, green: int, blue: int) -> str:
    """The basic colour word for an sRGB colour (0..255)."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    degrees = hue * 360
    if value < 0.2:
        return "black"
    if saturation < 0.16:
        return "white" if value > 0.83 else "gray" if value > 0.3 else "black"
    if degrees < 50 and value < 0.68:
        return "brown"
    bands = (
        (14, "red"),
        (42, "orange"),
        (68, "yellow"),
        (168, "green"),
        (250, "blue"),
        (295, "purple"),
    )
    for limit, word in bands:
        if degrees < limit:
            return word
    return "pink" if degrees < 345 else "red"
