"""Folders of drawn pictures: what is in one, and the lock that keeps two runs out of it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sana.errors import RequestError
from sana.evaluation.report import write_json

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


def agree(path: Path, head: dict[str, Any]) -> None:
    """Write what a run makes to `path`; `RequestError` where another run's is there already."""
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise RequestError(f"{path} cannot be read; choose another --output") from None
        for name, value in head.items():
            if earlier.get(name) != value:
                raise RequestError(
                    f"{path.parent} holds a run with other {name} ({earlier.get(name)}, now "
                    f"{value}); choose another --output"
                )
    write_json(path, head)


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
