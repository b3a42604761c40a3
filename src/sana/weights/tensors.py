"""Tensors in safetensors files, read without trust: the header is checked before anything else.

A file is told by its first bytes, never by its name; a pickle is refused here under any extension
(`sana convert` alone reads them, see `pickles`). Tensors are read straight into the memory they
stay in, in pieces: nothing is mapped, so a file that is replaced while a model is in use cannot
crash it, and loading needs the size of the weights and a few pieces. Start reading at `open_index`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sana.errors import CheckpointError

Content = Literal["safetensors", "zip", "pickle", "gguf", "pointer", "page", "unknown"]
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
MAX_HEADER = 100_000_000
PIECE = 4_000_000
"""Bytes that are read at once where they are cast or go to another device."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file: where its bytes are and what they mean."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def open_index(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor's place, and the file's metadata; nothing of the tensors is read.

    Raises `CheckpointError` for what is not safetensors, and for a header that contradicts itself
    or the file: its length, an unknown dtype, offsets that leave the file, overlap or have gaps.
    """
    require_safetensors(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            raise _broken(path, f"its header says {length:,} bytes and the file has {size:,}")
        text = file.read(length)
    table = _parse(path, text)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "its metadata are not strings")
    stored = {name: _entry(path, name, entry, 8 + length) for name, entry in table.items()}
    _require_tiling(path, stored, 8 + length, size)
    return stored, metadata


def read(stored: Stored) -> Tensor:
    """The tensor as it is in the file, in memory of its own."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    read_into(stored, tensor.reshape(-1))
    return tensor


def read_into(stored: Stored, target: Tensor, buffer: Tensor | None = None) -> None:
    """Fill the flat `target`, of any dtype and on any device, with the tensor's values in order.

    `buffer` is PIECE bytes to read through; many tensors can share one.
    """
    if not target.numel():
        return
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        if target.dtype == stored.dtype and target.device.type == "cpu":
            _fill(file, target, stored.path)
            return
        count = PIECE // stored.dtype.itemsize
        room = torch.empty(PIECE, dtype=torch.uint8) if buffer is None else buffer
        pieces = room.view(stored.dtype)
        for begin in range(0, target.numel(), count):
            part = target[begin : begin + count]
            piece = pieces[: part.numel()]
            _fill(file, piece, stored.path)
            part.copy_(piece)


def find_content(path: Path) -> Content:
    """What a file holds, by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"there is no weight file {path}; check the path") from None
    starts: dict[Content, tuple[bytes, ...]] = {
        "zip": (b"PK\x03\x04", b"PK\x05\x06"),
        "gguf": (b"GGUF",),
        "pointer": (b"version https://git-lfs",),
        "page": (b"<!", b"<html", b"<HTML"),
        "pickle": (*(b"\x80" + bytes([number]) for number in range(2, 6)), b"(", b"]", b"}", b"c"),
    }
    # First, since the length before a header may have any byte.
    if head[8:].lstrip()[:1] == b"{":
        return "safetensors"
    found = [content for content, firsts in starts.items() if head.startswith(firsts)]
    return found[0] if found else "unknown"


def require_safetensors(path: Path) -> None:
    """CheckpointError that says what the file is instead and what can be done."""
    content = find_content(path)
    if content in ("zip", "pickle"):
        raise CheckpointError(
            f"{path} is a Python pickle, whatever its name says, and opening one can run any code; "
            "sana reads weights from safetensors only: turn it into that with `sana convert "
            f"{path} TARGET --to ours`, which refuses everything but tensors"
        )
    reasons = {
        "gguf": "is a GGUF file, which is for other programs; get the safetensors file",
        "pointer": "is a Git LFS pointer, not the weights; fetch the file itself",
        "page": "is a web page, not weights; the download went wrong: get it again",
    }
    if content in reasons:
        raise CheckpointError(f"{path} {reasons[content]}")
    if content != "safetensors":
        raise _broken(path, "it does not begin with a header")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError("a name stands twice")
        return table

    try:
        table = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON ({error})") from None
    if not isinstance(table, dict):
        raise _broken(path, "its header is not a JSON object")
    return table


def _entry(path: Path, name: str, entry: object, base: int) -> Stored:
    """Checks one row of the header by itself."""
    fields = entry if isinstance(entry, dict) else {}
    label = fields.get("dtype")
    dtype = DTYPES.get(label) if isinstance(label, str) else None
    if dtype is None:
        raise _broken(
            path, f"{name} has dtype {label!r}, which is none of {', '.join(DTYPES)}", damaged=False
        )
    shape, offsets = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise _broken(
            path,
            f"{name} has shape {fields.get('shape')!r} and offsets {fields.get('data_offsets')!r}",
        )
    size, span = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if span != size:
        raise _broken(
            path,
            f"{name} is {label} {list(shape)}, which takes {size:,} bytes, and its offsets span "
            f"{span:,}",
        )
    return Stored(path, dtype, shape, base + offsets[0], size)


def _sizes(values: object) -> tuple[int, ...] | None:
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**62 for v in values):
        return None
    return tuple(values)


def _require_tiling(path: Path, stored: Mapping[str, Stored], start: int, end: int) -> None:
    """The tensors must fill the file from the header to its end, each byte once."""
    place, before = start, "the header"
    for name, entry in sorted(stored.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != place:
            fault = "overlaps" if entry.start < place else "leaves a gap after"
            raise _broken(path, f"{name} {fault} {before}")
        place, before = entry.start + entry.size, name
    if place != end:
        raise _broken(path, f"its tensors end at byte {place:,} and the file has {end:,} bytes")


def _fill(file: Any, target: Tensor, path: Path) -> None:
    """Exactly the bytes of a flat CPU tensor; a file that shrank meanwhile is an error."""
    array: Any = target.view(torch.uint8).numpy()
    view = memoryview(array)
    while view:
        count = file.readinto(view)
        if not count:
            raise _broken(path, f"it ended {len(view):,} bytes early while it was read")
        view = view[count:]


def _broken(path: Path, fault: str, *, damaged: bool = True) -> CheckpointError:
    size = f"{path.stat().st_size:,} bytes" if path.is_file() else "not a file"
    way_out = (
        "the file is truncated or damaged; get it again"
        if damaged
        else "convert it with the program that wrote it"
    )
    return CheckpointError(f"{path} ({size}) cannot be read as safetensors: {fault}; {way_out}")


def blank(stored: Mapping[str, Stored], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The same tensors on the meta device, for whatever needs names and shapes alone."""
    chosen = stored if names is None else {name: stored[name] for name in names}
    return {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in chosen.items()
    }
