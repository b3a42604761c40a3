"""Our weight files: safetensors with a JSON header under the metadata key "sana".

The header holds `format`, the config, and what is known of the weights (recipe, data, quality).
A file that cannot be read, or is of a newer format, is a `CheckpointError` naming it and the way
out; a file is written whole or not at all. Start reading at `read_file`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sana.config import from_json
from sana.errors import CheckpointError

FORMAT = 1
HEADER_KEY = "sana"
Config = TypeVar("Config")
Writer: TypeAlias = Callable[[BinaryIO], None]


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Header, tensors and raw metadata of one file of ours.

    The tensors are as stored, on the CPU, and mapped from the file: copy what outlives its reading.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            header = parse_header(path, metadata)
            return header, {name: file.get_tensor(name) for name in file.keys()}, metadata
    except FileNotFoundError:
        raise _absent(path) from None
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def read_header(path: Path) -> dict[str, Any]:
    """The header alone, without touching the tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return parse_header(path, file.metadata() or {})
    except FileNotFoundError:
        raise _absent(path) from None
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def read_config(kind: type[Config], data: object, path: Path) -> Config:
    """A config from the JSON of a header; CheckpointError naming the file if it is not one."""
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path} has no {kind.__name__} in its header; the network is built from it; get the "
            "file again"
        )
    try:
        return from_json(kind, data)
    except (CheckpointError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def to_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, Any], **metadata: str) -> bytes:
    """One file's content; `metadata` are further strings to keep beside the header.

    Equal input gives equal bytes: safetensors writes the metadata in an order that changes with
    every process, so they are sorted here.
    """
    text = json.dumps({"format": FORMAT, **header}, sort_keys=True, default=str)
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(dense, {HEADER_KEY: text, **metadata})
    start = 8 + int.from_bytes(content[:8], "little")
    index = json.loads(content[8:start])
    index["__metadata__"] = dict(sorted(index["__metadata__"].items()))
    head = json.dumps(index, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + content[start:]


def write_whole(files: Mapping[Path, bytes | Writer]) -> None:
    """Write all files, then put them in place; on a failure none is left half-written.

    Each goes to a hidden temporary name in its folder first and is renamed when all are complete.
    A writer is given the open file and need not hold its content in memory. A full disk or a folder
    that cannot be written is a `CheckpointError`.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    target = next(iter(files), None)
    try:
        for target, content in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(temporary[target], content)
        for target in files:
            os.replace(temporary[target], target)
    except OSError as error:
        raise CheckpointError(_write_failure(target, files, error)) from None
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()


def require_room(folder: Path, needed: int) -> None:
    """CheckpointError unless the disk of `folder` has so many bytes; it need not be there yet."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{folder} needs {needed / 1e6:,.1f} MB and its disk has {free / 1e6:,.1f} MB free; "
            "make room or choose another folder (nothing was written)"
        )


def _write(path: Path, content: bytes | Writer) -> None:
    with path.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())


def _write_failure(
    target: Path | None, files: Mapping[Path, bytes | Writer], error: OSError
) -> str:
    message = f"cannot write {target}: {error.strerror or error}"
    sizes = [len(content) for content in files.values() if isinstance(content, bytes)]
    if len(sizes) == len(files):
        message += f"; {sum(sizes) / 1e6:.1f} MB are needed"
    if target is not None and target.parent.is_dir():
        message += f"; {shutil.disk_usage(target.parent).free / 1e6:.1f} MB are free"
    return message + "; make room or choose another folder (no file was left half-written)"


def parse_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Our own header out of a file's metadata; CheckpointError if it has none or a newer one."""
    text = metadata.get(HEADER_KEY)
    if text is None:
        found = ", ".join(sorted(metadata)) or "nothing"
        raise CheckpointError(
            f"{path} has no {HEADER_KEY!r} header (its metadata hold {found}); only files saved by "
            "this project can be loaded; save it with sana, or give another folder"
        )
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise CheckpointError(
            f"{path} has a header that is not valid ({text[:60]!r}); it must be a JSON object with "
            "a format number; get the file again"
        )
    if header["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {header['format']} and this version reads up to {FORMAT}; upgrade "
            "sana-torch"
        )
    return header


def _absent(path: Path) -> CheckpointError:
    return CheckpointError(
        f"there is no weight file {path}; a model is one folder with its transformer, autoencoder "
        "and text files; copy the missing one into it, or check the path"
    )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    size = f"{path.stat().st_size:,} bytes" if path.is_file() else "not a file"
    return CheckpointError(
        f"{path} ({size}) cannot be read as safetensors: {error}; the file is truncated or "
        "damaged; get it again"
    )
