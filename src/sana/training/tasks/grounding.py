"""Teaching the text refiner which color, place and count belong to which noun, from captions alone.

A frozen encoder's state at a noun hardly tells that noun's color or place (`docs/log.md`), and the
flow loss teaches it slowly. Here linear heads read them from the refined states at the nouns'
tokens, against the composer's ground truth; the heads are thrown away, the refiner starts the flow
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from sana.config import ModelConfig
from sana.data.stickers.scene import COLORS, INVERSE, Scene
from sana.data.stickers.stream import Studio
from sana.distributed import Place, unwrap
from sana.models.refiner import Refiner
from sana.models.text import MiniLM
from sana.training.config import TrainConfig

PLACES = ("none", "left", "right", "above", "below")
COUNTS = 5


class GroundedCaptions(NamedTuple):
    """Token ids and mask [B, T], and for each token the labels of its noun (-1: none).

    labels [B, T, 3]: color (0 is none), place, count.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor


class GroundingTask:
    """Trains `refiner` over the frozen `text` encoder's states."""

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        refiner: Refiner,
        text: MiniLM,
        studio: Studio,
        place: Place,
    ) -> None:
        self.config, self.place, self.studio, self.text = config, place, studio, text
        self.text.to(place.device)
        module = GroundingHeads(refiner, model.text.width).to(place.device)
        self.phase = GroundingPhase(module)

    @property
    def phases(self) -> Sequence[GroundingPhase]:
        return (self.phase,)

    def dataset(self) -> Dataset[Any]:
        return CaptionStream(self)

    def warm_up(self, micro: int) -> int:
        return 0

    @torch.no_grad()
    def prepare(
        self, item: GroundedCaptions, *, is_warm_up: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask, labels = (part.to(self.place.device) for part in item)
        return self.text.states(ids, mask), mask, labels

    def sample(self) -> None:
        return None

    def export(self, folder: Path) -> None:
        """Write `refiner.pt`, which the flow recipe's `init` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = unwrap(self.phases[0].module).state_dict()
        kept = {n.removeprefix("refiner."): t.cpu() for n, t in tensors.items() if "refiner." in n}
        torch.save(kept, folder / "refiner.pt")


class GroundingHeads(nn.Module):
    """The refiner with three linear readers."""

    def __init__(self, refiner: Refiner, dim: int) -> None:
        super().__init__()
        self.refiner = refiner
        sizes = (1 + len(COLORS), len(PLACES), COUNTS)
        self.readers = nn.ModuleList(nn.Linear(dim, size) for size in sizes)

    def forward(self, states: Tensor, mask: Tensor) -> list[Tensor]:
        refined = self.refiner(states, mask)
        return [reader(refined) for reader in self.readers]


class GroundingPhase:
    """Cross-entropy of color, place and count at the nouns' tokens."""

    name = "grounding"

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def loss(
        self, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        states, mask, labels = batch
        found: dict[str, Tensor] = {}
        total = states.new_zeros((), dtype=torch.float32)
        names = ("color", "place", "count")
        for index, (name, logits) in enumerate(zip(names, self.module(states, mask), strict=True)):
            truth = labels[..., index]
            total = total + F.cross_entropy(
                logits.float().flatten(0, 1), truth.flatten(), ignore_index=-1
            )
            counted = truth >= 0
            right = (logits.argmax(-1) == truth) & counted
            found[f"{name}_accuracy"] = right.sum() / counted.sum().clamp_min(1)
        return {"loss": total} | found


class CaptionStream(Dataset[GroundedCaptions]):
    """Captions of training scenes with their nouns' labels."""

    def __init__(self, task: GroundingTask) -> None:
        data = task.config.data
        self.composer, self.tokenizer = task.studio.composer, task.text.tokenizer
        self.seed = task.config.seed
        self.count, self.tokens = data.batch // data.accumulate, data.tokens
        self.rank, self.world = task.place.rank, task.place.world

    def __getitem__(self, item: int) -> GroundedCaptions:
        first = (item * self.world + self.rank) * self.count
        scenes = [
            self.composer.draw(first + j, seed=self.seed, split="train") for j in range(self.count)
        ]
        captions = [scene.caption for scene in scenes]
        ids, mask, offsets = self.tokenizer.tokenize_with_offsets(captions, self.tokens)
        labels = torch.full((self.count, self.tokens, 3), -1, dtype=torch.int64)
        for row, scene in enumerate(scenes):
            for start, end, index in scene.spans:
                inside = (offsets[row, :, 0] < end) & (offsets[row, :, 1] > start) & mask[row]
                labels[row, inside] = torch.tensor(noun_labels(scene, index))
        return GroundedCaptions(ids, mask, labels)


def noun_labels(scene: Scene, index: int) -> tuple[int, int, int]:
    """(color, place, count) of the object at `index`: what the caption says of it.

    A natural color outside the palette ("gray") has the label -1, which no loss counts.
    """
    thing = scene.objects[index]
    color = 0
    if thing.color is not None:
        color = 1 + COLORS.index(thing.color) if thing.color in COLORS else -1
    place = "none"
    if scene.relation is not None:
        place = scene.relation if index == 0 else INVERSE[scene.relation]
    same = sum(other.concept == thing.concept for other in scene.objects)
    return color, PLACES.index(place), same


def load_refiner(path: Path) -> dict[str, Tensor]:
    """The tensors that `GroundingTask.export` wrote."""
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors
