"""Pictures that come in: files and PIL images of any kind, made upright RGB or refused by name.

The size is read from the header before anything is decoded. Handled: EXIF rotation, palettes,
greyscale, 16-bit greyscale, CMYK, alpha (over white; in a mask, over black). Refused: animations,
truncated files, 32-bit samples, more than `PIXEL_LIMIT` pixels. Start reading at `read_pictures`.
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sana.errors import RequestError

if TYPE_CHECKING:
    from sana.request import Request

# TIFF is left out: libtiff writes to stderr itself, and is much to trust with a stranger's file.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
PIXEL_LIMIT = 8192 * 8192
ROLES = ("image", "mask", "control")
# What Pillow raises for a file that is not what it says it is.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error)


def read_pictures(request: Request) -> dict[str, Image.Image]:
    """The pictures that `request` names, by name, read from their files; raises `RequestError`."""
    names = {name: role for role in ROLES if (name := getattr(request, role)) is not None}
    return {name: read_picture(Path(name), role, name) for name, role in names.items()}


def read_picture(source: Path | BytesIO, role: str, name: str) -> Image.Image:
    """One picture, from its file or its bytes, upright and RGB (or a mask of 0 and 255)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=FORMATS) as image:
                return converted(image, role, name)
    except FileNotFoundError:
        raise RequestError(f"{role} {name} is not there; give the name of a picture file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(
            f"{role} {name} declares far more than {PIXEL_LIMIT} pixels; make it smaller first"
        ) from None
    except UnidentifiedImageError:
        raise RequestError(
            f"{role} {name} is no picture that can be read; it must be PNG, JPEG, WebP, BMP or "
            "GIF, so convert it"
        ) from None
    except RequestError:
        raise
    except _DAMAGED as error:
        raise RequestError(_damage(role, name, error)) from None


def converted(image: Image.Image, role: str, name: str) -> Image.Image:
    """An upright RGB picture, what is transparent white; in a mask, 0 and 255, transparent black.

    In a mask light grey counts as white and dark grey as black. Raises `RequestError`.
    """
    _check(image, role, name)
    try:
        image.load()
        # Some releases of Pillow open 16-bit grey PNGs in the mode of 32-bit samples.
        is_deep = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
        upright = _eight_bits(ImageOps.exif_transpose(image), role, name, is_deep=is_deep)
        if role != "mask":
            return _composited(upright, "white")
        return _composited(upright, "black").convert("L").point([0] * 128 + [255] * 128)
    except RequestError:
        raise
    except _DAMAGED as error:
        raise RequestError(_damage(role, name, error)) from None


def named(images: Mapping[str, Image.Image], request: Request, role: str) -> Image.Image | None:
    """The picture that `request` names for `role`; `RequestError` if the caller did not bring it.

    Once pictures are given by hand no file is opened, whatever a request says.
    """
    name = getattr(request, role)
    if name is None:
        return None
    if name not in images:
        brought = ", ".join(map(repr, images)) or "none"
        raise RequestError(
            f"{role} is {name!r}, and the pictures given with the request are {brought}; give it "
            "under that name, or give none to have files read"
        )
    return converted(images[name], role, name)


def digests(request: Request) -> dict[str, str]:
    """SHA-256 of every file that `request` names, for the metadata of the picture made from it."""
    names = [getattr(request, role) for role in ROLES]
    files = [Path(name) for name in (*names, *request.loras) if name is not None]
    return {str(path): digest_of(path) for path in files if path.is_file()}


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _check(image: Image.Image, role: str, name: str) -> None:
    """Raise `RequestError` for an animation, or for more pixels than are taken."""
    width, height = image.size
    if width * height > PIXEL_LIMIT:
        raise RequestError(
            f"{role} {name} is {width} x {height}, {width * height} pixels; at most {PIXEL_LIMIT} "
            "are taken, so make it smaller first"
        )
    frames = getattr(image, "n_frames", 1)
    # A phone's MPO holds a second view or a preview after the photograph itself.
    if frames > 1 and image.format != "MPO":
        raise RequestError(
            f"{role} {name} holds {frames} pictures, an animation or several pages; it must be one "
            "still picture, so save the one you mean as PNG"
        )


def _damage(role: str, name: str, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return (
        f"{role} {name} cannot be read ({reason}); if it is a picture it is damaged, cut off or of "
        "a rare kind, so save it again as PNG"
    )


def _eight_bits(image: Image.Image, role: str, name: str, *, is_deep: bool) -> Image.Image:
    """The same picture with at most 8 bits a sample; `is_deep`: it has 16."""
    if is_deep:
        samples = np.asarray(image).astype(np.int64)
        return Image.fromarray(((samples + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise RequestError(
            f"{role} {name} has 32-bit samples (mode {image.mode}), of which the range is not "
            "known; save it with 8 or 16 bits"
        )
    return image


def _composited(image: Image.Image, background: str) -> Image.Image:
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
