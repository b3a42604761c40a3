"""The table of docs/memory.md is what the planner says today."""

from __future__ import annotations

from pathlib import Path

from sana.pipelines.footprint import Canvas
from sana.pipelines.memory import CUDA_CONTEXT, DoesNotFit, MemoryPlan, plan, shown
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
    tiles = "" if chosen.tile is None else f", {chosen.tile} px tiles"
    return f"{words}{tiles}: {shown(chosen.peak + CUDA_CONTEXT)}"


def table() -> list[str]:
    lines = [f"| model | {' | '.join(f'{card} GiB' for card in CARDS)} |"]
    lines.append("|---|" + "---|" * len(CARDS))
    for name, side in MODELS:
        cells = []
        for card in CARDS:
            try:
                canvas = Canvas(width=side, height=side)
                config = preset(name).config
                cells.append(cell(plan(config, canvas, card * 2**30, reserve=CUDA_CONTEXT)))
            except DoesNotFit:
                cells.append("does not fit")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def test_the_table_is_the_planners() -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    for line in table():
        assert line in page, f"docs/memory.md lacks {line}"
