"""Draw the four pictures of the README: `python examples/first_pictures.py FOLDER`.

The model is loaded once; each picture is a `Request` to the same pipeline.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import sana

PROMPTS = (
    "a blue dog to the left of a yellow car",
    "four red apples on a peach background",
    "a smiling woman with long wavy red hair, round glasses and a green sweater, outlined cartoon",
    "a castle in a green meadow",
)


def main(folder: Path, model: str = "sticker-512", steps: int | None = None) -> None:
    """Write one PNG for each prompt into `folder`, and print its path."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    pipeline = sana.load(model)
    for number, prompt in enumerate(PROMPTS, start=1):
        request = sana.Request(prompt=prompt, model=model, steps=steps)
        [image] = pipeline.generate(request)
        path = folder / f"{number}.png"
        image.save(path)
        print(f"{path}  {prompt}  ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
