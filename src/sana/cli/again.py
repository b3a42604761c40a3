"""Making a picture again: its request, the files it named, and what has changed since.

A file is looked for where the metadata says and then beside the picture; one that is no longer the
same, by its hash, is refused. Start reading at `earlier_request`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from sana.cli.flags import flag
from sana.errors import RequestError
from sana.pipelines.images import read_metadata
from sana.pipelines.reading import digest_of

Dtype: TypeAlias = Literal["float32", "mixed", "bfloat16", "float16", "fp8"]
"""How `--dtype` and the metadata name number formats."""
NAMED = ("image", "mask", "control", "loras")


def earlier_request(
    picture: Path | None, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata of `picture` and its request's fields, files found again; `given` changes it."""
    if picture is None:
        return {}, given
    made = read_metadata(picture)
    hashes = made.get("files")
    fields = dict(made["request"])
    for name in NAMED:
        if name in given or not fields.get(name):
            continue
        value = fields[name]
        files = value if isinstance(value, list) else [value]
        found = [_found(str(file), name, picture, hashes) for file in files]
        fields[name] = found if isinstance(value, list) else found[0]
    return made, {**fields, **given}


def earlier_threads(made: dict[str, Any]) -> int | None:
    """As many threads as the picture was made with: sums depend on it."""
    earlier = made.get("threads")
    return earlier if isinstance(earlier, int) and 0 < earlier <= (os.cpu_count() or 1) else None


def earlier_dtype(made: dict[str, Any]) -> Dtype | None:
    """The number format that the picture was made in; None if that is not known."""
    earlier = made.get("dtype")
    return next((dtype for dtype in get_args(Dtype) if dtype == earlier), None)


def warn_of_changes(made: dict[str, Any], origin: dict[str, Any]) -> None:
    """Say on stderr in what this run differs from the one that made the picture."""
    for name, now in origin.items():
        if made and name != "files" and made.get(name) != now:
            print(
                f"sana: the picture was made with {name} {made.get(name)}, and this is {now}; "
                "pixels may differ",
                file=sys.stderr,
            )


def _found(file: str, name: str, picture: Path, hashes: Any) -> str:
    """The file itself, or one of its name beside the picture; refused if its content is another."""
    known = hashes.get(file) if isinstance(hashes, dict) else None
    places = [path for path in (Path(file), picture.parent / Path(file).name) if path.exists()]
    for path in places:
        # A LoRA may be a folder, of which no hash is kept.
        if known is None or (path.is_file() and digest_of(path) == known):
            return str(path)
    what = f"{picture} was made with {name} {file}"
    way_out = f"put it back, or name another with {flag(name)}"
    if not places:
        raise RequestError(f"{what}, which is not there; {way_out}")
    raise RequestError(f"{what}, and {places[0]} has changed since (another SHA-256); {way_out}")
