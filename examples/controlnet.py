"""Draw along the edges of a picture: `python examples/controlnet.py PICTURE PROMPT TARGET MODEL`.

MODEL is one with a ControlNet, by name or folder. Edges are found here by Canny; `hed` finds softer
ones (`sana data hed` fetches its weights once), and `none` takes edges that are ready, white on
black. They are followed in the first 80 % of the steps, and the rest is left to the prompt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sana


def main(picture: Path, prompt: str, target: Path, model: str, steps: int | None = None) -> None:
    """Write a picture of `prompt` with the edges of `picture` to `target`."""
    request = sana.Request(
        prompt=prompt,
        control=str(picture),
        control_detector="canny",
        control_scale=0.9,
        control_end=0.8,
        steps=steps,
        model=model,
    )
    [image] = sana.load(model).generate(request)
    image.save(target)
    print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
