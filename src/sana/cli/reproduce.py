"""`sana reproduce`: try one of the papers' claims, small, in the sticker world."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sana.cli.scoring import with_flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Where a row is run, and on what."""

    seeds: Annotated[int, Parameter(help="how many seeds, from 0")] = 2
    pack: Annotated[str, Parameter(help='the sticker pack, or "tiny"')] = ".data/stickers.pack"
    cache: Annotated[str, Parameter(help="folder that keeps the rasterised pack")] = ".data/cache"
    detector: Annotated[
        str, Parameter(help="detector.safetensors, to count prompts that are followed")
    ] = ""
    model: Annotated[
        str, Parameter(name=["--model", "-m"], help="a model folder or name, for solver and shift")
    ] = "sticker-512"
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="folder of the records")] = (
        Path("runs/reproduction")
    )
    device: Annotated[str, Parameter(help="where to compute: auto, cpu or cuda")] = "auto"


def reproduce(
    row: Annotated[str | None, Parameter(help="a row's name; without one they are listed")] = None,
    /,
    *overrides: Annotated[str, Parameter(help="settings of training runs, such as steps=500")],
    **fields: Any,
) -> None:
    """Run a row of docs/reproduction.md and write its record; without a name, list the rows."""
    from sana.reproduction.rows import ROWS, as_table, find, run

    if row is None:
        for name, entry in ROWS.items():
            print(f"{name}: {entry.claim} ({entry.source})")
        return
    find(row)
    trial = Trial(**fields)
    from sana import distributed
    from sana.data.stickers.stream import Studio
    from sana.errors import RequestError
    from sana.reproduction.training import Bench
    from sana.training.config import DataConfig
    from sana.training.run import load_data

    if trial.seeds < 1:
        raise RequestError(f"seeds is {trial.seeds}; a row needs at least one, its spread two")
    with distributed.session(trial.device) as place:
        world = load_data(DataConfig(pack=trial.pack, cache=trial.cache, avatars=500))
        bench = Bench(
            world=world,
            studio=Studio.open(world, place.device),
            place=place,
            folder=trial.output / row,
            settings=overrides,
            detector=trial.detector,
            model=trial.model,
        )
        results = run(row, bench, range(trial.seeds), lambda line: print(line, file=sys.stderr))
        print(as_table(results))
        print(bench.folder / f"{row}.json")


reproduce.__signature__ = with_flags(reproduce, Trial)  # type: ignore[attr-defined]
