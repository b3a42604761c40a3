"""Pictures and their files: tensor to PIL, PNG with the whole request inside, written atomically.

The metadata is one JSON object in the PNG text chunk `sana`; `read_metadata` is how `sana info` and
`sana generate --again` get it back. Nothing here needs torch until a tensor comes in.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sana.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = "sana"


def to_pil(pixels: Tensor) -> Image.Image:
    """An RGB picture of pixels [3,H,W] in -1..1; what lies outside is clamped."""
    return from_levels(to_levels(pixels).cpu())


def to_levels(pixels: Tensor) -> Tensor:
    """Bytes [H,W,3] of pixels [3,H,W] in -1..1, where they are; what lies outside is clamped."""
    levels = pixels.float().clamp(-1, 1).add(1).mul(127.5).round()
    return levels.byte().permute(1, 2, 0).contiguous()


def from_levels(levels: Tensor) -> Image.Image:
    """An RGB picture of bytes [H,W,3] on the CPU."""
    return Image.fromarray(levels.numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels [1,3,H,W] in -1..1 of an RGB picture, or [1,1,H,W] in 0..1 of a mask."""
    import torch

    levels = torch.from_numpy(np.array(image, dtype=np.float32))
    if image.mode == "L":
        return levels[None, None] / 255
    return levels.permute(2, 0, 1)[None] / 127.5 - 1


def save_png(image: Image.Image, path: Path, metadata: dict[str, Any]) -> Path:
    """Write `image` with `metadata` to `path`, or, if that exists, to the next free number.

    The file appears whole or not at all. Raises `OSError` with a message that says what to do.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(CHUNK, json.dumps(metadata))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            image.save(file, format="PNG", pnginfo=chunks)
            file.flush()
            os.fsync(file.fileno())
        return _move_to_free_name(temporary, path)
    except OSError as error:
        raise OSError(error.errno, _write_failure(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save_png` wrote; raises `RequestError` if `path` is no picture that sana made."""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(CHUNK)
    except FileNotFoundError:
        raise RequestError(
            f"there is no file {path}; give a PNG that `sana generate` wrote"
        ) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RequestError(
            f"{path} cannot be read as a picture ({error}); give a PNG that `sana generate` wrote"
        ) from None
    try:
        metadata = json.loads(text or "")
        if not isinstance(metadata["request"], dict):
            raise TypeError
    except (ValueError, TypeError, KeyError):
        raise RequestError(
            f"{path} does not say how it was made; only a PNG that `sana generate` wrote, and that "
            "no other program changed, carries its request"
        ) from None
    return dict(metadata)


def free_name(path: Path) -> Path:
    """`path`, or with the first of -2, -3, ... before its suffix that does not exist yet."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate


def _move_to_free_name(temporary: Path, path: Path) -> Path:
    """Link, which unlike rename never replaces a file that appeared meanwhile."""
    while True:
        target = free_name(path)
        try:
            os.link(temporary, target)
            return target
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            os.replace(temporary, target)
            return target


def _write_failure(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {path}; free some, or choose another place with --output"
    reason = error.strerror or error
    return f"cannot write {path} ({reason}); choose another place with --output"
