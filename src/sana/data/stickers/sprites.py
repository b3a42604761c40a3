"""Reads a sticker pack into a `World`: decodes 3D sprites, rasterises SVG sprites and avatars."""

from __future__ import annotations

import json
import lzma
import multiprocessing
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sana.data.stickers.pack import FORMAT, MAIN_STYLE, build_pack
from sana.data.stickers.paint import Pixels, draw_all, draw_avatar, draw_sprite, opaque_box
from sana.data.stickers.world import AVATAR_SIZE, SPRITE_SIZE, Avatar, Concept, World
from sana.errors import RequestError

__all__ = ["build_pack", "load_world"]

_CHUNK = 64


def load_world(
    path: Path | str,
    *,
    avatars: int | None = None,
    workers: int | None = None,
    cache: Path | None = None,
) -> World:
    """Load a pack (see `build_pack`).

    avatars: keep only the first so many (None: all). workers: processes that rasterise (None: one
    a core; 0 or 1: this process). Raises RequestError for a file that is not a pack of this format.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as pack:
            return _load(pack, avatars, workers, cache)
    except FileNotFoundError as error:
        raise RequestError(
            f"{path} does not exist. Build it with `sana data stickers --output {path}`."
        ) from error
    except (zipfile.BadZipFile, KeyError, lzma.LZMAError, json.JSONDecodeError) as error:
        raise RequestError(
            f"{path} is not a whole sticker pack ({error}). Build it again with "
            f"`sana data stickers --output {path}`."
        ) from error


def _load(
    pack: zipfile.ZipFile, avatars: int | None, workers: int | None, cache: Path | None
) -> World:
    manifest = json.loads(pack.read("manifest.json"))
    if manifest["format"] != FORMAT:
        raise RequestError(
            f"the sticker pack has format {manifest['format']}, this version reads {FORMAT}: "
            "build it again."
        )
    concepts = tuple(_concept(row) for row in manifest["concepts"])
    row_of = {concept.key: row for row, concept in enumerate(concepts)}
    sources: list[bytes | str] = []
    sprite_of = np.full((len(concepts), len(manifest["styles"])), -1, np.int64)
    for column, style in enumerate(manifest["styles"]):
        keys = manifest["sprites"][style]
        found: Sequence[bytes | str] = (
            [pack.read(f"3d/{key}.webp") for key in keys]
            if style == MAIN_STYLE
            else _texts(pack, f"svg/{style}.xz")
        )
        for key, source in zip(keys, found, strict=True):
            sprite_of[row_of[key], column] = len(sources)
            sources.append(source)
    looks = json.loads(lzma.decompress(pack.read("avatars.json.xz")))[:avatars]
    drawings = _texts(pack, "avatars.svg.xz")[: len(looks)] if looks else []
    version = manifest["version"]
    sprites = _kept(cache, f"{version}-sprites.npy", len(sources))
    portraits = _kept(cache, f"{version}-avatars-*.npy", len(drawings))
    if sprites is None or portraits is None:
        missing = (sources if sprites is None else []) + (drawings if portraits is None else [])
        with _mapper(workers, len(missing)) as mapped:
            if sprites is None:
                sprites = _stack(mapped(draw_sprite, sources), len(sources), SPRITE_SIZE)
                _keep(cache, f"{version}-sprites.npy", sprites)
            if portraits is None:
                portraits = _stack(mapped(draw_avatar, drawings), len(drawings), AVATAR_SIZE)
                _keep(cache, f"{version}-avatars-{len(drawings)}.npy", portraits)
    return World(
        concepts=concepts,
        styles=tuple(manifest["styles"]),
        sprites=torch.from_numpy(sprites),
        extents=np.stack([_extent(sprite) for sprite in sprites]),
        sprite_of=sprite_of,
        avatars=tuple(Avatar(look=row["look"], attributes=row["attributes"]) for row in looks),
        avatar_images=torch.from_numpy(portraits),
        version=manifest["version"],
    )


def _kept(cache: Path | None, pattern: str, count: int) -> Pixels | None:
    """The first `count` pictures of the smallest kept array that has so many, if there is one."""
    if cache is None:
        return None
    arrays: list[Pixels] = [np.load(path, mmap_mode="c") for path in sorted(cache.glob(pattern))]
    enough = [array for array in arrays if len(array) >= count]
    return min(enough, key=len)[:count] if enough else None


def _keep(cache: Path | None, name: str, pictures: Pixels) -> None:
    """Write an array that other processes may be waiting to read: it appears whole."""
    if cache is None:
        return
    path = cache / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with partial.open("wb") as file:
        np.save(file, pictures)
    os.replace(partial, path)


def _concept(row: dict[str, Any]) -> Concept:
    return Concept(
        key=row["key"],
        label=row["label"],
        plural=row["plural"],
        synonyms=tuple(row["synonyms"]),
        tags=tuple(row["tags"]),
        group=row["group"],
        recolorable=row["recolorable"],
        color=row["color"],
    )


def _texts(pack: zipfile.ZipFile, name: str) -> list[str]:
    return lzma.decompress(pack.read(name)).decode().split("\0")


def _stack(pictures: Iterator[Pixels], count: int, size: int) -> Pixels:
    stacked = np.zeros((count, size, size, 4), np.uint8)
    for index, picture in enumerate(pictures):
        stacked[index] = picture
    return stacked


def _extent(sprite: Pixels) -> np.ndarray:
    left, top, right, bottom = opaque_box(sprite)
    return np.asarray((right - left, bottom - top), np.float32) / SPRITE_SIZE


@contextmanager
def _mapper(workers: int | None, count: int) -> Iterator[Any]:
    """A `map` over worker processes; over this process where that is asked for or not worth it."""
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers <= 1 or count < 4 * _CHUNK:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield lambda draw, items: _in_chunks(pool, draw, items)


def _in_chunks(
    pool: ProcessPoolExecutor, draw: Callable[[Any], Pixels], items: Sequence[Any]
) -> Iterator[Pixels]:
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    for pictures in pool.map(draw_all, repeat(draw), chunks):
        yield from pictures
