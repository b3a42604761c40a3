"""Contact sheets: every object of a world in every style, with its name, to look at."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from sana.data.stickers.world import World

COLUMNS, ROWS = 16, 10
PICTURE, CAPTION = 96, 14


def draw_sheets(world: World, folder: Path) -> list[Path]:
    """Write `{style}-{page}.png` for every style into `folder`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for style, name in enumerate(world.styles):
        drawn = [c for c in range(len(world.concepts)) if world.sprite_of[c, style] >= 0]
        for page, start in enumerate(range(0, len(drawn), COLUMNS * ROWS), start=1):
            path = folder / f"{name}-{page}.png"
            _sheet(world, style, drawn[start : start + COLUMNS * ROWS]).save(path)
            paths.append(path)
    return paths


def _sheet(world: World, style: int, concepts: list[int]) -> Image.Image:
    rows = -(-len(concepts) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * PICTURE, rows * (PICTURE + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for position, concept in enumerate(concepts):
        row, column = divmod(position, COLUMNS)
        corner = (column * PICTURE, row * (PICTURE + CAPTION))
        sprite = Image.fromarray(world.sprites[int(world.sprite_of[concept, style])].numpy())
        sprite = sprite.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
        sheet.paste(sprite, corner, sprite)
        label = world.concepts[concept].label
        pen.text((corner[0] + 2, corner[1] + PICTURE), label[:16], fill="black")
    return sheet
