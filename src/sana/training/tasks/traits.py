"""Training the judge of styles and portraits: which style a sticker has, what a portrait shows.

Half of the pictures are stickers of both splits, since the judge must know what the drawing model
never saw; the others are portraits, of those that training may use. Pictures are softened as the
detector's are. B pictures.
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
from sana.data.stickers.scene import Kind, Scene, Split
from sana.data.stickers.stream import Studio
from sana.distributed import Place, unwrap
from sana.models.detector import fit
from sana.models.traits import Traits
from sana.training.config import TrainConfig
from sana.training.softening import soften
from sana.weights.files import to_bytes, write_whole

STREAM = 0x71A175
"""Added to the seed, so that no picture is one that another network was trained on."""
STYLE = "style"
ABSENT = ""
"""The label of a portrait that lacks a slot: no glasses, no beard."""
HELD_OUT = 3
"""Stickers of the held-out split in every ten."""


class Item(NamedTuple):
    scenes: SceneTensors
    labels: Tensor  # [B, slots] index of the label, -1 where the slot does not apply


class Batch(NamedTuple):
    pictures: Tensor  # [B, 3, 256, 256] in -1..1
    labels: Tensor


class TraitsTask:
    """Trains a classifier of everything in the studio's world; `network` is for tests."""

    def __init__(
        self, config: TrainConfig, studio: Studio, place: Place, network: Traits | None = None
    ) -> None:
        self.config, self.studio, self.place = config, studio, place
        self.slots = slots_of(studio.composer)
        self.network = network or Traits({s: len(labels) for s, labels in self.slots.items()})
        self.network.to(place.device)
        if config.compile:
            self.network.compile()
        self.phases: Sequence[TraitsPhase] = (TraitsPhase(self.network, tuple(self.slots)),)

    def dataset(self) -> Dataset[Item]:
        data = self.config.data
        return TraitScenes(
            self.studio.composer,
            count=data.batch // data.accumulate,
            seed=self.config.seed + STREAM,
            place=(self.place.rank, self.place.world),
        )

    def warm_up(self, micro: int) -> int:
        return 0

    @torch.no_grad()
    def prepare(self, item: Item, *, is_warm_up: bool, generator: torch.Generator) -> Batch:
        labels = item.labels.to(self.place.device, non_blocking=True)
        pictures = fit(self.studio.renderer.render(item.scenes, self.config.data.size))
        no_boxes = pictures.new_zeros(len(pictures), 1, 4)
        return Batch(soften(pictures, no_boxes, generator)[0], labels)

    def sample(self) -> None:
        return None

    def export(self, folder: Path) -> None:
        """Write `folder/traits.safetensors`; its header names the slots and their labels."""
        header = {
            "kind": "traits",
            "slots": self.slots,
            "data": self.studio.version,
            "recipe": to_json(self.config),
        }
        slim = {
            name: tensor.half() if tensor.dim() > 1 else tensor
            for name, tensor in unwrap(self.network).state_dict().items()
        }
        write_whole({folder / "traits.safetensors": to_bytes(slim, header)})


class TraitsPhase:
    """Cross-entropy of every slot that applies, all slots alike."""

    name = "traits"

    def __init__(self, network: Traits, slots: Sequence[str]) -> None:
        self.module: torch.nn.Module = network
        self.slots = slots

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        logits = self.module(batch.pictures)
        total = batch.pictures.new_zeros(())
        right = counted = torch.zeros((), device=batch.labels.device)
        style = total
        for number, slot in enumerate(self.slots):
            truth = batch.labels[:, number]
            applies = truth >= 0
            each = F.cross_entropy(logits[slot].float(), truth.clamp_min(0), reduction="none")
            total = total + (each * applies).sum() / applies.sum().clamp_min(1)
            hits = ((logits[slot].argmax(-1) == truth) & applies).sum()
            if slot == STYLE:
                style = hits / applies.sum().clamp_min(1)
            else:
                right, counted = right + hits, counted + applies.sum()
        return {
            "loss": total,
            "style_accuracy": style,
            "portrait_accuracy": right / counted.clamp_min(1),
        }


class TraitScenes(Dataset[Item]):
    """Item i: stickers and portraits of micro-batch i in turn."""

    def __init__(
        self, composer: Composer, *, count: int, seed: int, place: tuple[int, int] = (0, 1)
    ) -> None:
        self.composer, self.count, self.seed, self.place = composer, count, seed, place
        self.slots = slots_of(composer)

    def __getitem__(self, item: int) -> Item:
        rank, world = self.place
        first = (item * world + rank) * self.count
        scenes = [self._draw(number) for number in range(first, first + self.count)]
        labels = torch.tensor([labels_of(self.composer, self.slots, scene) for scene in scenes])
        return Item(self.composer.to_tensors(scenes), labels)

    def _draw(self, number: int) -> Scene:
        turn, is_portrait = divmod(number, 2)
        split: Split = "held_out" if not is_portrait and turn % 10 < HELD_OUT else "train"
        kind: Kind = "avatar" if is_portrait else "sticker"
        return self.composer.draw(number, seed=self.seed, split=split, kind=kind)


def slots_of(composer: Composer) -> dict[str, list[str]]:
    """Every slot and its labels: the styles, the looks, and all attributes with `ABSENT`."""
    words: dict[str, set[str]] = {}
    for avatar in composer.avatars:
        for slot, value in avatar.attributes.items():
            words.setdefault(slot, {ABSENT}).add(value)
    looks = sorted({avatar.look for avatar in composer.avatars})
    rest = {slot: sorted(words[slot]) for slot in sorted(words)}
    return {STYLE: list(composer.styles), "look": looks, **rest}


def labels_of(composer: Composer, slots: dict[str, list[str]], scene: Scene) -> list[int]:
    """The label of each slot; a sticker has a style alone, a portrait everything else."""
    if scene.avatar is None:
        return [scene.objects[0].style if slot == STYLE else -1 for slot in slots]
    avatar = composer.avatars[scene.avatar]
    values = {STYLE: None, "look": avatar.look}
    found = []
    for slot, labels in slots.items():
        value = values[slot] if slot in values else avatar.attributes.get(slot, ABSENT)
        found.append(-1 if value is None else labels.index(value))
    return found
