"""A model with and without a LoRA: `python examples/lora.py FILE PROMPT FOLDER MODEL`.

FILE may be in PEFT, diffusers, kohya or ComfyUI naming. A LoRA belongs to a request, not to the
pipeline: the picture without it is the same before and after.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sana

SCALES = (0.5, 1.0)


def main(file: Path, prompt: str, folder: Path, model: str, steps: int | None = None) -> None:
    """Write the picture without the LoRA and with it at each of `SCALES` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = sana.load(model)
    plain = sana.Request(prompt=prompt, steps=steps, model=model)
    requests = {"without": plain}
    for scale in SCALES:
        requests[f"scale-{scale}"] = plain.replace(loras=(str(file),), lora_scales=(scale,))
    for name, request in requests.items():
        [image] = pipeline.generate(request)
        image.save(folder / f"{name}.png")
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
