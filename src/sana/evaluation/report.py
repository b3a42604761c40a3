"""What an evaluation hands to people: shares with intervals, a labelled sheet, JSON, a table."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

RIGHT, WRONG, PLAIN = (24, 138, 60), (200, 36, 36), (90, 90, 90)
LINES = 4
FONT = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A mean with its 95 % bootstrap interval over `count` prompts."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(marks: Sequence[Sequence[float]], *, seed: int = 0, rounds: int = 2000) -> Share:
    """Mean of marks [prompts][seeds]; whole prompts are resampled, since seeds of one are alike."""
    means = np.array([float(np.mean(row)) for row in marks])
    picks = np.random.default_rng(seed).integers(0, len(means), (rounds, len(means)))
    low, high = np.quantile(means[picks].mean(1), (0.025, 0.975))
    return Share(value=float(means.mean()), low=float(low), high=float(high), count=len(means))


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A picture (3, H, W) in -1..1, the text under it, whether it is right (None: unjudged)."""

    picture: Tensor
    text: str
    is_right: bool | None = None


def contact_sheet(
    entries: Sequence[Labelled], *, columns: int = 10, side: int = 192
) -> Image.Image:
    """The pictures in rows, each over its text; a green or red frame tells right from wrong."""
    line = FONT + 3
    font = ImageFont.load_default(FONT)
    height = side + LINES * line + 8
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, entry in enumerate(entries):
        left, top = index % columns * (side + 8) + 4, index // columns * height + 4
        color = PLAIN if entry.is_right is None else RIGHT if entry.is_right else WRONG
        pen.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), fill=color)
        sheet.paste(_thumbnail(entry.picture, side), (left, top))
        for number, text in enumerate(_wrapped(entry.text, side, font)):
            pen.text((left, top + side + 4 + number * line), text, fill=color, font=font)
    return sheet


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers get three decimals."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in lines
    )


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write the record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _thumbnail(picture: Tensor, side: int) -> Image.Image:
    pixels = ((picture.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    letters = int(width / (font.getlength("abcdefghij klmnopqrst") / 21))
    return textwrap.wrap(text, letters, max_lines=LINES, placeholder="...")
