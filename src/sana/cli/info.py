"""`sana info`: how a picture was made, what a model is, or which models there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sana.cli.flags import command_line
from sana.config import to_json
from sana.pipelines.images import read_metadata
from sana.presets import PRESETS, preset
from sana.request import Request


def info(
    target: Annotated[
        str | None, Parameter(help="a PNG that sana made, a model's folder, or a model's name")
    ] = None,
    /,
) -> None:
    """Say how a picture was made, what a model is, or which models there are."""
    if target is None:
        _print_presets()
    elif Path(target).is_dir():
        _print_fields(_header(target))
    elif Path(target).is_file() or target.lower().endswith(".png"):
        _print_picture(Path(target))
    else:
        _print_preset(target)


def _print_picture(path: Path) -> None:
    metadata = read_metadata(path)
    print(command_line(Request(**metadata.pop("request"))))
    for name, value in metadata.items():
        print(f"{name}: {value}")


def _print_presets() -> None:
    width = max(map(len, PRESETS))
    for name, row in PRESETS.items():
        origin = row.source if "/" in row.source else "ready to use"
        print(f"{name:{width}}  {row.config.pixels:4} px  {origin}")


def _print_preset(name: str) -> None:
    row = preset(name)
    if row.source == "package":
        _print_fields(_header(name))
    else:
        config = to_json(row.config)
        _print_fields({"source": row.source, "license": row.license, "config": config})


def _header(target: str) -> dict[str, Any]:
    from sana.weights.files import read_header
    from sana.weights.load import find_folder, transformer_files

    return read_header(transformer_files(find_folder(target))[0])


def _print_fields(fields: dict[str, Any]) -> None:
    print(json.dumps(fields, indent=2, ensure_ascii=False))
