"""`sana reproduce`: try one of the papers' claims, small, in the sticker world."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
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
    part: Annotated[
        str, Parameter(help="I/N: every N-th training run from I on, for N processes at once")
    ] = "0/1"
    device: Annotated[str, Parameter(help="where to compute: auto, cpu or cuda")] = "auto"


def reproduce(
    row: Annotated[
        str | None, Parameter(help="a row, several with commas, or all that train; none lists them")
    ] = None,
    /,
    *overrides: Annotated[str, Parameter(help="settings of training runs, such as steps=500")],
    **fields: Any,
) -> None:
    """Run a row of docs/reproduction.md and write its record; without a name, list the rows."""
    from sana.reproduction.rows import ROWS, SAMPLED, as_table, find, gather, run, run_rows

    if row is None:
        for name, entry in ROWS.items():
            print(f"{name}: {entry.claim} ({entry.source})")
        return
    trained = [name for name in ROWS if name not in SAMPLED]
    names = trained if row == "all" else row.split(",")
    for name in names:
        find(name)
    trial = Trial(**fields)
    from sana import distributed
    from sana.data.stickers.stream import Studio
    from sana.errors import RequestError
    from sana.reproduction.training import Bench
    from sana.training.config import DataConfig
    from sana.training.run import load_data

    if trial.seeds < 1:
        raise RequestError(f"seeds is {trial.seeds}; a row needs at least one, its spread two")
    part = _read_part(trial.part)
    with distributed.session(trial.device) as place:
        world = load_data(DataConfig(pack=trial.pack, cache=trial.cache, avatars=500))
        first = Bench(
            world=world,
            studio=Studio.open(world, place.device),
            place=place,
            folder=trial.output,
            settings=overrides,
            detector=trial.detector,
            model=trial.model,
        )
        benches = {name: replace(first, folder=trial.output / name) for name in names}
        seeds = range(trial.seeds)
        run_rows({n: b for n, b in benches.items() if n in trained}, seeds, _say, part)
        for name, bench in benches.items():
            is_trained = name in trained
            print(as_table(gather(name, bench) if is_trained else run(name, bench, seeds, _say)))
            print(bench.folder / f"{name}.json")


reproduce.__signature__ = with_flags(reproduce, Trial)  # type: ignore[attr-defined]


def _read_part(text: str) -> tuple[int, int]:
    from sana.errors import RequestError

    numbers = text.split("/")
    if len(numbers) == 2 and all(n.isdecimal() for n in numbers):
        index, count = map(int, numbers)
        if index < count:
            return index, count
    raise RequestError(f"part is {text!r}; it must be I/N with I from 0 to N - 1, such as 0/3")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
