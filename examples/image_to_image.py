"""Redraw a picture in other words: `python examples/image_to_image.py PICTURE PROMPT FOLDER`.

The higher the strength, the less of the picture is kept: 0 keeps it, 1 ignores it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sana

STRENGTHS = (0.4, 0.6, 0.8)


def main(
    picture: Path, prompt: str, folder: Path, model: str = "sticker-512", steps: int | None = None
) -> None:
    """Write the picture redrawn with each of `STRENGTHS` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = sana.load(model)
    for strength in STRENGTHS:
        request = sana.Request(
            prompt=prompt, image=str(picture), strength=strength, steps=steps, model=model
        )
        [image] = pipeline.generate(request)
        image.save(folder / f"strength-{strength}.png")
        print(folder / f"strength-{strength}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
