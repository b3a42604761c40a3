"""Folders of pictures as metrics read them: listed, opened upright in RGB, resized and cropped.

What cannot be measured is refused before a network is loaded: an empty folder, a file that is no
picture, too few pictures. `one_at_a_time` is the lock that keeps two runs out of one folder.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sana.errors import NumericsError, RequestError
from sana.pipelines.reading import read_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LOCK = ".sana-lock"


def list_pictures(folder: Path) -> list[Path]:
    """Every picture in `folder` and the folders in it, sorted; `RequestError` if there is none.

    Hidden files and what stands for a whole run (`sheet.png`, GenEval's `grid.png`) do not count.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder; give a folder of pictures")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.stem not in ("sheet", "grid")
    )
    if not paths:
        raise RequestError(
            f"{folder} holds no picture; it must hold {', '.join(SUFFIXES)} files, in it or in its "
            "folders"
        )
    return paths


def open_picture(path: Path) -> Image.Image:
    """The picture in a file, upright and RGB; raises `RequestError` if it cannot be read."""
    return read_picture(path, "picture", str(path))


def require(paths: Sequence[Path], least: int, what: str, folder: Path, why: str) -> None:
    """Refuse fewer than `least` pictures, with both numbers."""
    if len(paths) < least:
        raise RequestError(
            f"{folder} holds {len(paths)} pictures, and {what} needs at least {least} ({why}); "
            "draw more, or choose a metric that needs fewer"
        )


def centered(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """The shorter side resized to `size`, then the middle square, as torchvision's pair does."""
    width, height = image.size
    short = min(width, height)
    # torchvision truncates the longer side, and rounds the crop's corner.
    wide = size if width == short else int(size * width / height)
    high = size if height == short else int(size * height / width)
    if (wide, high) != image.size:
        image = image.resize((wide, high), resample)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return image.crop((left, top, left + size, top + size))


def to_bytes_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pixels [B, 3, H, W] in uint8 of RGB pictures of one size."""
    levels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(levels).permute(0, 3, 1, 2).contiguous()


def in_batches(
    paths: Sequence[Path], batch: int, prepare: Callable[[Image.Image], Image.Image]
) -> Iterator[Tensor]:
    """Prepared pictures [B, 3, H, W] in uint8, `batch` at a time."""
    for start in range(0, len(paths), batch):
        part = [prepare(open_picture(path)) for path in paths[start : start + batch]]
        sizes = {image.size for image in part}
        if len(sizes) > 1:
            raise RequestError(
                f"pictures beside {paths[start]} have the sizes {sorted(sizes)}; all must have "
                "one here, so give --size to resize and crop them"
            )
        yield to_bytes_tensor(part)


def check_finite(values: Tensor, names: Sequence[object], what: str) -> Tensor:
    """`values` [B, ...] as they are; `NumericsError` naming the first picture with NaN."""
    fine = torch.isfinite(values.float()).flatten(1 if values.ndim > 1 else 0)
    rows = fine.all(1) if values.ndim > 1 else fine
    if not bool(rows.all()):
        first = int((~rows).nonzero()[0])
        raise NumericsError(
            f"{what} gave NaN or infinity for {int((~rows).sum())} of {len(rows)} pictures, the "
            f"first being {names[first]}; a judge must give a number, so nothing was written: look "
            "at its weights, or run it in float32"
        )
    return values


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; `RequestError` if another run has it. It ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            _lock(file)
        except OSError:
            raise RequestError(
                f"another run is at work in {folder}; two may not share a folder, so wait for it "
                "to end or choose another --output"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _lock(file: Any) -> None:
    """Locks of the system go when their process does, so a killed run leaves none behind."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
