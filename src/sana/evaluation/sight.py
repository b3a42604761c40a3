"""Pictures as networks want them: opened, resized, cropped and normalized as published.

Every function gives a tensor (3, H, W). Resizing is PIL's, with its antialiasing, where the
published code used torchvision on PIL pictures (CLIP, BLIP); the rest says so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sana.pipelines.reading import read_picture

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def open_picture(path: Path) -> Image.Image:
    """The picture upright in RGB; `RequestError` that names a file which cannot be read."""
    return read_picture(path, "picture", str(path))


def to_levels(image: Image.Image) -> Tensor:
    """Levels 0..255 as fp32 (3, H, W)."""
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)


def clip_pixels(image: Image.Image, size: int) -> Tensor:
    """The short side resized to `size`, bicubic; the middle cropped; CLIP's mean and deviation."""
    return _normalized(cropped(image, size, Image.Resampling.BICUBIC))


def squashed_pixels(image: Image.Image, size: int) -> Tensor:
    """Both sides resized to `size`, bicubic, whatever the shape, as BLIP's processor does."""
    return _normalized(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def cropped(image: Image.Image, size: int, how: Image.Resampling) -> Image.Image:
    """The short side resized to `size` and the middle square cut out, as torchvision does both."""
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    wide, high = int(size * width / short), int(size * height / short)
    if (wide, high) != image.size:
        image = image.resize((wide, high), how)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _normalized(image: Image.Image) -> Tensor:
    pixels = to_levels(image) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
