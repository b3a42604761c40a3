"""The trained detector as a judge: from pictures to a list of what is in each.

`load` reads the file that `DetectorTask` exports and checks that it knows the same world; `detect`
looks at pictures in batches. The network is `sana.models.detector`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.data.stickers.scene import COLORS
from sana.data.stickers.world import World
from sana.errors import CheckpointError
from sana.models.detector import Detector, Peaks
from sana.weights.files import read_file
from sana.weights.load import assign

THRESHOLD = 0.3
"""Heat from which a place counts as an object."""
PLACES = 16
"""The most objects that are looked for in a picture."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One object; `color` is None where none is clear, `box` is x0 y0 x1 y1 in fractions."""

    concept: int
    color: str | None
    score: float
    box: Box


def load(path: str | Path, world: World, device: torch.device | str = "cpu") -> Detector:
    """The detector in `path`; raises CheckpointError unless it knows the concepts of `world`."""
    network, header = read(path, device)
    known = [concept.key for concept in world.concepts]
    if header.get("concepts") != known or header.get("colors") != list(COLORS):
        raise CheckpointError(
            f"{path} was trained on pack {header.get('data')!r} with {len(header['concepts'])} "
            f"concepts, this pack is {world.version!r} with {len(known)}; the judge must know the "
            "same concepts: train it again with `sana train sticker-detector`"
        )
    return network


def read(path: str | Path, device: torch.device | str = "cpu") -> tuple[Detector, dict[str, Any]]:
    """The detector in `path`, whatever it knows, and its header, which says what that is."""
    header, tensors, _ = read_file(Path(path))
    if header.get("kind") != "detector":
        raise CheckpointError(
            f"{path} holds {header.get('kind', 'a model')!r}, not a detector; give the "
            "detector.safetensors that `sana train sticker-detector` wrote"
        )
    network = Detector(len(header["concepts"]), len(header["colors"]) + 1)
    wide = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    assign(network, wide, str(path))
    return network.to(device).eval(), header


@torch.inference_mode()
def detect(
    network: Detector, pictures: Tensor, *, threshold: float = THRESHOLD, batch: int = 64
) -> list[list[Found]]:
    """What is in each of the pictures (B, 3, H, W) in -1..1, the surest first."""
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    found: list[list[Found]] = []
    for part in pictures.split(batch):
        found += _listed(network.peaks(part.to(device, torch.float32), PLACES), threshold)
    network.train(was_training)
    return found


def _listed(peaks: Peaks, threshold: float) -> list[list[Found]]:
    scores, concepts, colors, boxes = (values.tolist() for values in peaks)
    words = (*COLORS, None)
    return [
        [
            Found(concept=concept, color=words[color], score=score, box=tuple(box))
            for score, concept, color, box in zip(*row, strict=True)
            if score >= threshold
        ]
        for row in zip(scores, concepts, colors, boxes, strict=True)
    ]
