"""Training the judge: a detector that names, colours and places the objects of a picture.

Scenes of both splits are drawn, since the judge must know what the drawing model never saw.
Pictures are softened, warped and tinted a little, so that they are not judged by their sharpness.
B pictures, K objects at most, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from sana.config import to_json
from sana.data.stickers.compose import Composer
from sana.data.stickers.render import SceneTensors
from sana.data.stickers.scene import CANVAS, COLORS, SLOTS, Scene
from sana.data.stickers.stream import Studio
from sana.data.stickers.world import Concept
from sana.distributed import Place
from sana.models.detector import Detector, Reading, fit
from sana.training.config import TrainConfig
from sana.training.softening import soften
from sana.weights.files import to_bytes, write_whole

HELD_OUT = 3
"""Scenes of the held-out split in every ten."""
STICKER = 9
"""Of every ten scenes, the one that is a sticker, used if it is in the main style."""
STREAM = 0x0DE7EC70
"""Added to the seed, so that no picture is one that a drawing model was trained on."""
JITTER = 1.25
"""How far from its centre an object is read, in cells: heat map peaks are off by about one."""


class Targets(NamedTuple):
    """Ground truth, padded to K objects with concept -1."""

    concept: Tensor  # [B, K] index
    color: Tensor  # [B, K] index into COLORS, or len(COLORS): no clear colour
    box: Tensor  # [B, K, 4] fractions of the picture


class Item(NamedTuple):
    scenes: SceneTensors
    targets: Targets


class Batch(NamedTuple):
    pictures: Tensor  # [B, 3, 256, 256] in -1..1
    targets: Targets


class DetectorTask:
    """Trains a detector of everything in the studio's world; `network` is for tests."""

    def __init__(
        self, config: TrainConfig, studio: Studio, place: Place, network: Detector | None = None
    ) -> None:
        self.config, self.studio, self.place = config, studio, place
        self.network = network or Detector(len(studio.composer.concepts), len(COLORS) + 1)
        self.network.to(place.device)
        if config.compile:
            self.network.compile()
        self.phases: Sequence[DetectorPhase] = (DetectorPhase(self.network),)

    def dataset(self) -> Dataset[Item]:
        data = self.config.data
        return DetectorScenes(
            self.studio.composer,
            count=data.batch // data.accumulate,
            seed=self.config.seed + STREAM,
            place=(self.place.rank, self.place.world),
        )

    def warm_up(self, micro: int) -> int:
        return 0

    @torch.no_grad()
    def prepare(self, item: Item, *, is_warm_up: bool, generator: torch.Generator) -> Batch:
        device = self.place.device
        pictures = self.studio.renderer.render(item.scenes, self.config.data.size)
        targets = Targets(*(t.to(device, non_blocking=True) for t in item.targets))
        pictures, box = soften(fit(pictures), targets.box, generator)
        return Batch(pictures, targets._replace(box=box))

    def sample(self) -> None:
        return None

    def export(self, folder: Path) -> None:
        """Write `folder/detector.safetensors`; its header names the concepts and the pack."""
        header = {
            "kind": "detector",
            "concepts": [concept.key for concept in self.studio.composer.concepts],
            "colors": list(COLORS),
            "data": self.studio.version,
            "recipe": to_json(self.config),
        }
        tensors = self.network.state_dict()
        slim = {
            name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in tensors.items()
        }
        write_whole({folder / "detector.safetensors": to_bytes(slim, header)})


class DetectorPhase:
    """Heat map, concept, colour and box losses."""

    name = "detector"

    def __init__(self, network: Detector) -> None:
        self.module: torch.nn.Module = network

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        box, real = batch.targets.box, batch.targets.concept >= 0
        centers = (box[..., :2] + box[..., 2:]) / 2
        side = batch.pictures.shape[-1] // 8
        points = centers + _symmetric(centers, generator) * (JITTER / side)
        heat, reading = self.module(batch.pictures, points)
        found = {"heat": heat_loss(heat.float(), box, real)}
        found |= reading_losses(reading, batch.targets, real)
        total = found["heat"] + found["concept"] + 0.5 * found["color"] + 5 * found["box"]
        right = {
            "accuracy": _share(reading.concept, batch.targets.concept, real),
            "color_accuracy": _share(reading.color, batch.targets.color, real),
        }
        return {"loss": total, **found, **right}


class DetectorScenes(Dataset[Item]):
    """Item i: scenes and targets of micro-batch i, all of concepts in the main style."""

    def __init__(
        self, composer: Composer, *, count: int, seed: int, place: tuple[int, int] = (0, 1)
    ) -> None:
        self.composer, self.count, self.seed, self.place = composer, count, seed, place

    def __getitem__(self, item: int) -> Item:
        rank, world = self.place
        # Drawn scenes of other kinds are passed over; the numbers of an item's scenes stay its own.
        index = (item * world + rank) << 32
        scenes: list[Scene] = []
        while len(scenes) < self.count:
            scene = self.composer.draw(
                index,
                seed=self.seed,
                split="held_out" if index % 10 < HELD_OUT else "train",
                kind="sticker" if index % 10 == STICKER else "scene",
            )
            if is_judged(scene):
                scenes.append(scene)
            index += 1
        return Item(self.composer.to_tensors(scenes), to_targets(self.composer.concepts, scenes))


def is_judged(scene: Scene) -> bool:
    """Whether the detector is meant for such pictures: objects, all in the main style."""
    return bool(scene.objects) and all(placed.style == 0 for placed in scene.objects)


def to_targets(concepts: Sequence[Concept], scenes: Sequence[Scene]) -> Targets:
    """Ground truth of the scenes as CPU tensors."""
    number = {color: index for index, color in enumerate(COLORS)}
    rows: list[list[tuple[int, ...]]] = []
    for scene in scenes:
        row: list[tuple[int, ...]] = [
            (
                placed.concept,
                number.get(placed.color or concepts[placed.concept].color or "", len(COLORS)),
                *placed.box,
            )
            for placed in scene.objects
        ]
        rows.append(row + [(-1, len(COLORS), 0, 0, 0, 0)] * (SLOTS - len(row)))
    table = torch.tensor(rows)
    return Targets(table[..., 0], table[..., 1], table[..., 2:] / CANVAS)


def heat_loss(heat: Tensor, box: Tensor, real: Tensor) -> Tensor:
    """Penalty-reduced focal loss (CenterNet, eq. 1) of logits [B, h, w], for each object.

    The target is 1 in the cell of a centre and falls off as a Gaussian, an eighth of the box wide.
    """
    side = heat.shape[-1]
    cells = torch.arange(side, device=heat.device, dtype=torch.float32)
    low, high = box[..., :2] * side, box[..., 2:] * side  # [B, K, 2]
    center = ((low + high) / 2).floor()
    sigma = ((high - low) / 8).clamp_min(0.6)
    falls = [
        torch.exp(-(cells - center[..., axis, None]).square() / (2 * sigma[..., axis, None] ** 2))
        for axis in (0, 1)
    ]  # [B, K, w], [B, K, h]
    each = falls[1].unsqueeze(3) * falls[0].unsqueeze(2) * real[..., None, None]
    target = each.amax(1)
    chance = heat.sigmoid()
    hit = -((1 - chance) ** 2) * F.logsigmoid(heat)
    miss = -((1 - target) ** 4) * chance**2 * F.logsigmoid(-heat)
    return torch.where(target == 1, hit, miss).sum() / real.sum().clamp_min(1)


def reading_losses(reading: Reading, targets: Targets, real: Tensor) -> dict[str, Tensor]:
    """Cross entropies of concept and colour, mean absolute error of the box, over real objects."""
    weight = real.float() / real.sum().clamp_min(1)
    entropies = {
        name: F.cross_entropy(logits.float().transpose(1, 2), target.clamp_min(0), reduction="none")
        for name, logits, target in (
            ("concept", reading.concept, targets.concept),
            ("color", reading.color, targets.color),
        )
    }
    error = (reading.box - targets.box).abs().mean(-1)
    return {name: (values * weight).sum() for name, values in (entropies | {"box": error}).items()}


def _share(logits: Tensor, target: Tensor, real: Tensor) -> Tensor:
    return ((logits.argmax(-1) == target) & real).sum() / real.sum().clamp_min(1)


def _symmetric(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device) * 2 - 1
