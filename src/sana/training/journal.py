"""What a run writes for people: `log.jsonl`, TensorBoard scalars, and sample grids as PNG.

Only the main process writes. TensorBoard is used where it is installed (extra `train`); the JSON
lines are always there.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sana.distributed import Place

log = logging.getLogger(__name__)


class Journal:
    """Holds the open TensorBoard file of one run."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.folder = folder
        self.is_main = place.is_main
        self.writer: Any = _open_tensorboard(folder) if place.is_main else None
        self.last = (time.monotonic(), 0)

    def scalars(self, step: int, steps: int, values: dict[str, float], seconds: float) -> float:
        """Write one line of numbers, and show step, speed and the time left on stderr.

        Returns the steps a second since the last call; 0 at the first, which compiling falsifies.
        """
        now = time.monotonic()
        speed = (step - self.last[1]) / max(1e-9, now - self.last[0]) if self.last[1] else 0.0
        self.last = (now, step)
        if not self.is_main:
            return speed
        record = {"step": step, "seconds": round(seconds, 2), "steps_per_second": round(speed, 3)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record | values) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        shown = "  ".join(f"{n} {v:.4g}" for n, v in values.items())
        left = f"{(steps - step) / speed:.0f} s left" if speed else "..."
        print(f"step {step}/{steps}  {speed:.2f}/s  {left}  {shown}", file=sys.stderr, flush=True)
        return speed

    def pictures(self, step: int, pictures: Tensor) -> None:
        """Save a grid of (B, 3, H, W) pictures in -1..1."""
        if not self.is_main:
            return
        grid = make_grid(pictures)
        target = self.folder / "samples"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(target / f"{step:07d}.png")
        if self.writer is not None:
            self.writer.add_image("samples", grid, step)


def make_grid(pictures: Tensor, columns: int = 0) -> Tensor:
    """(B, 3, H, W) in -1..1 -> one uint8 picture (3, rows H, columns W) on the CPU."""
    count, _, height, width = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    grid = torch.full((3, rows * height, columns * width), 255, dtype=torch.uint8)
    for index in range(count):
        top, left = index // columns * height, index % columns * width
        grid[:, top : top + height, left : left + width] = pixels[index]
    return grid


def _open_tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("tensorboard is not installed (extra `train`): writing log.jsonl only")
        return None
    return SummaryWriter(str(folder / "tensorboard"))
