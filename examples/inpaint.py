"""Draw a part of a picture anew: `python examples/inpaint.py PICTURE PROMPT TARGET`.

Here the part is the right half, and the mask is made in memory; `image` and `mask` are then any two
names, under which the pipeline is given the pictures. Outside the mask not one pixel changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

import sana


def main(
    picture: Path, prompt: str, target: Path, model: str = "sticker-512", steps: int | None = None
) -> None:
    """Write `picture` with its right half drawn anew to `target`."""
    image = Image.open(picture).convert("RGB")
    mask = Image.new("L", image.size, "black")
    mask.paste("white", (image.width // 2, 0, image.width, image.height))
    request = sana.Request(prompt=prompt, image="image", mask="mask", steps=steps, model=model)
    [result] = sana.load(model).generate(request, {"image": image, "mask": mask})
    result.save(target)
    print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
