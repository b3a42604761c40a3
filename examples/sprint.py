"""A picture in one step: `python examples/sprint.py PROMPT FOLDER MODEL`, MODEL a Sprint model.

A Sprint model is distilled: every step gives a finished picture, and more steps refine it. It takes
the guidance as an input, so a step is one evaluation of the network, not two.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import sana


def main(prompt: str, folder: Path, model: str, counts: tuple[int, ...] = (1, 2, 4)) -> None:
    """Write the picture in each number of steps into `folder`, and print how long it took."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = sana.load(model)
    for count in counts:
        start = time.perf_counter()
        [image] = pipeline.generate(sana.Request(prompt=prompt, steps=count, model=model))
        path = folder / f"steps-{count}.png"
        image.save(path)
        print(f"{path}  {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
