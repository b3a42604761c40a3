"""Endless training items from the sticker world: scenes as tensors, with token ids if asked.

Every `chunk`-th item holds scenes, the others are None: drawing many scenes at once keeps a GPU
busier than drawing few often. Chunk i of rank r holds scenes number (i * world + r) * count onward,
so any number of processes and workers see each scene once, and a run can start anywhere in the
stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sana.data.stickers.compose import Composer
from sana.data.stickers.landscapes import send
from sana.data.stickers.render import Renderer, SceneTensors
from sana.data.stickers.scene import Scene, TrainingKind
from sana.data.stickers.styled import draw_styled
from sana.data.stickers.world import World


class Tokenizer(Protocol):
    """The part of a text encoder that a data worker needs."""

    def tokenize(self, prompts: Sequence[str], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """Prompts to ids [B, T] and mask [B, T]."""
        ...


@dataclass(frozen=True, slots=True)
class Studio:
    """A world ready to be drawn: who chooses scenes, who paints them, and the data's version."""

    composer: Composer
    renderer: Renderer
    version: str

    @staticmethod
    def open(world: World, device: torch.device) -> Studio:
        return Studio(Composer(world), Renderer(world, device=device), world.version)


class CaptionedScenes(NamedTuple):
    """Scenes with their captions as token ids and mask [B, T]; `number` counts the chunks."""

    scenes: SceneTensors
    ids: Tensor
    mask: Tensor
    number: int


@dataclass(eq=False, repr=False)
class SceneStream(Dataset[Any]):
    """`count` scenes a chunk; `place` is (rank, world).

    With a tokenizer, chunks are CaptionedScenes.
    """

    composer: Composer
    _: KW_ONLY
    count: int
    seed: int
    place: tuple[int, int] = (0, 1)
    chunk: int = 1
    tokenizer: Tokenizer | None = None
    tokens: int = 64
    kinds: Sequence[TrainingKind] = ()
    """Taken in turn; none: as often as the composer draws each."""

    def draw(self, number: int) -> list[Scene]:
        """The scenes of chunk `number`."""
        rank, world = self.place
        first = (number * world + rank) * self.count
        return [self._scene(first + j) for j in range(self.count)]

    def _scene(self, index: int) -> Scene:
        kind = self.kinds[index % len(self.kinds)] if self.kinds else None
        if kind == "styled":
            return draw_styled(self.composer, index, seed=self.seed)
        return self.composer.draw(index, seed=self.seed, split="train", kind=kind)

    def __getitem__(self, item: int) -> SceneTensors | CaptionedScenes | None:
        number, part = divmod(item, self.chunk)
        if part:
            return None
        scenes = self.draw(number)
        tensors = self.composer.to_tensors(scenes)
        if self.tokenizer is None:
            return tensors
        ids, mask = self.tokenizer.tokenize([s.caption for s in scenes], self.tokens)
        return CaptionedScenes(tensors, ids, mask, number)


def random_crops(images: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """`count` crops of `side` pixels, the pictures taken in turn.

    (B, 3, H, W) -> (count, 3, side, side), channels last. `generator` is on the CPU.
    """
    room = images.shape[-1] - side
    corners = torch.randint(0, room + 1, (2, count, 1), generator=generator)
    # (2, count, side)
    places = torch.arange(side, device=images.device) + send(corners, images.device)
    chosen = torch.arange(count, device=images.device)[:, None, None] % len(images)
    pixels = images.permute(0, 2, 3, 1)
    return pixels[chosen, places[0][:, :, None], places[1][:, None, :]].permute(0, 3, 1, 2)
