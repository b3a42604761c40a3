"""The tables of docs/memory.md are what the planner says today."""

from __future__ import annotations

from pathlib import Path

from sana.kernels.proven import REPORTS
from sana.models.cutting import tilings
from sana.pipelines import footprint
from sana.pipelines.footprint import Canvas, Widths
from sana.pipelines.memory import CUDA_CONTEXT, DoesNotFit, MemoryPlan, in_tiles, plan, shown
from sana.presets import preset

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
MODELS = (
    ("sana-600m-1024", 1024),
    ("sana-1600m-1024", 1024),
    ("sana-1600m-2048", 2048),
    ("sana-1600m-4096", 4096),
    ("sana1.5-4800m-1024", 1024),
)
CARDS = (4, 6, 8, 12, 24)
LETTERS = {"stays": "stay", "visits": "visit", "streams": "stream"}


def cell(chosen: MemoryPlan) -> str:
    how = (chosen.text, chosen.dit, chosen.autoencoder)
    words = "resident"
    if chosen.offloads:
        words = "text {}, transformer {}".format(*(LETTERS[placement] + "s" for placement in how))
        words = words.replace("text visits, transformer visits", "all visit")
    tiles = "" if chosen.tile is None else f", {in_tiles(chosen.tile).removeprefix('in ')}"
    return f"{words}{tiles}: {shown(chosen.peak + CUDA_CONTEXT)}"


def table(widths: Widths | None = None) -> list[str]:
    lines = [f"| model | {' | '.join(f'{card} GiB' for card in CARDS)} |"]
    lines.append("|---|" + "---|" * len(CARDS))
    for name, side in MODELS:
        cells = []
        for card in CARDS:
            try:
                canvas = Canvas(width=side, height=side)
                config = preset(name).config
                limit = card * 2**30
                chosen = plan(config, canvas, limit, widths=widths, reserve=CUDA_CONTEXT)
                cells.append(cell(chosen))
            except DoesNotFit:
                cells.append("does not fit")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def tiles() -> list[str]:
    """Of a picture of 4096 px, while the autoencoder alone is on the device."""
    lines = ["| width x height | tiles | computed | decoding takes |", "|---|---:|---:|---:|"]
    config = preset("sana-1600m-4096").config
    weights = footprint.weights(config, Widths()).autoencoder
    for way in tilings(4096, 4096, 32):
        if way.smallness == 1 and way.count > 1:
            tall, wide = way.tile
            bands = 24 * tall * 4096
            work = footprint.decode_work(config.autoencoder, wide, tall, 2) + bands
            share = way.computed / 4096**2
            size = shown(int(1.03 * (weights + work)) + 2**26)
            lines.append(f"| {wide} x {tall} | {way.count} | {share:.2f} | {size} |")
    return lines


def test_the_tables_are_the_planners() -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    for line in [*table(), *tiles()]:
        assert line in page, f"docs/memory.md lacks {line}"


def test_no_way_that_a_card_may_prove_changes_them() -> None:
    assert table(Widths(ways=frozenset(REPORTS))) == table()
