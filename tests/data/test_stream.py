"""The stream of scenes: each seen once by any number of processes, chunks, true crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from numerics import assert_detects
from sana.data.stickers.compose import Composer
from sana.data.stickers.scene import KINDS, Kind
from sana.data.stickers.stream import CaptionedScenes, SceneStream, random_crops
from sana.data.stickers.tiny import tiny_world
from sana.models.text import PromptTokenizer, small_tokenizer

COUNT, CHUNK, ITEMS = 3, 4, 20


class Numbers:
    """Stands in for a composer: a scene is its own number."""

    def draw(self, index: int, *, seed: int, split: str, kind: str | None) -> int:
        assert (seed, split, kind) == (5, "train", None)
        return index

    def to_tensors(self, scenes: Sequence[int]) -> Tensor:
        return torch.tensor(scenes)


def make_stream(rank: int, world: int) -> SceneStream:
    composer: Any = Numbers()
    return SceneStream(composer, count=COUNT, seed=5, place=(rank, world), chunk=CHUNK)


def read(stream: SceneStream, workers: int = 0) -> list[Any]:
    loader: DataLoader[Any] = DataLoader(
        stream, batch_size=None, sampler=range(ITEMS), num_workers=workers
    )
    return list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_see_every_scene_once(workers: int) -> None:
    def check(ranks: tuple[int, int]) -> None:
        seen: list[int] = []
        for rank in ranks:
            items = read(make_stream(rank, 2), workers)
            seen += [number for item in items if item is not None for number in item.tolist()]
        assert sorted(seen) == list(range(2 * COUNT * ITEMS // CHUNK))

    check((0, 1))
    assert_detects(check, (0, 0))


def test_between_chunks_there_is_nothing() -> None:
    items = read(make_stream(1, 2))
    assert [item is None for item in items] == ([False] + [True] * (CHUNK - 1)) * (ITEMS // CHUNK)
    assert items[2 * CHUNK].tolist() == [15, 16, 17]


def test_a_stream_can_start_anywhere() -> None:
    items = read(make_stream(0, 1))
    assert torch.equal(make_stream(0, 1)[12], items[12])
    assert make_stream(0, 1)[13] is None


def test_captions_are_those_of_the_scenes_drawn() -> None:
    composer, tokenizer = Composer(tiny_world()), PromptTokenizer(small_tokenizer(256), 32)
    stream = SceneStream(composer, count=5, seed=3, chunk=2, tokenizer=tokenizer, tokens=32)
    item = stream[6]
    assert isinstance(item, CaptionedScenes) and item.number == 3
    scenes = [composer.draw(index, seed=3, split="train") for index in range(15, 20)]
    ids, mask = tokenizer.tokenize([scene.caption for scene in scenes], 32)
    expected = composer.to_tensors(scenes)

    def check(item: CaptionedScenes) -> None:
        assert torch.equal(item.ids, ids) and torch.equal(item.mask, mask)
        assert all(torch.equal(a, b) for a, b in zip(item.scenes, expected, strict=True))

    check(item)
    other = stream[8]
    assert isinstance(other, CaptionedScenes)
    assert_detects(check, item._replace(ids=other.ids))
    assert_detects(check, item._replace(scenes=other.scenes))


@pytest.mark.parametrize(("pictures", "count", "side"), [(3, 7, 32), (1, 1, 1), (4, 2, 63)])
def test_a_crop_is_a_slice_of_its_picture(pictures: int, count: int, side: int) -> None:
    size = 100
    # Every pixel is different, so that a slice has one place only.
    images = torch.arange(pictures * 3 * size * size, dtype=torch.float32)
    images = images.view(pictures, 3, size, size)
    crops = random_crops(images, count, side, torch.Generator().manual_seed(0))
    assert crops.shape == (count, 3, side, side)
    assert crops.is_contiguous(memory_format=torch.channels_last)

    def check(crops: Tensor) -> None:
        for index, crop in enumerate(crops):
            picture = index % pictures
            first = int(crop[0, 0, 0].item()) - picture * 3 * size * size
            top, left = divmod(first, size)
            expected = images[picture, :, top : top + side, left : left + side]
            assert torch.equal(crop, expected)

    check(crops)
    if side > 1:
        assert_detects(check, crops.transpose(2, 3))
    if count > 1:
        assert_detects(check, crops.flip(0))


def test_crops_come_from_everywhere() -> None:
    """Corners of 64 places in each direction, both ends among them, and the whole picture."""
    rows = torch.arange(95.0)[:, None].expand(95, 95)
    images = torch.stack([rows, rows.T, rows])[None]
    crops = random_crops(images, 2000, 32, torch.Generator().manual_seed(1))
    tops, lefts = crops[:, 0, 0, 0], crops[:, 1, 0, 0]
    for corners in (tops, lefts):
        assert corners.unique().numel() == 64
        assert (corners.min(), corners.max()) == (0, 63)
    assert not torch.equal(tops, lefts)
    assert torch.equal(random_crops(images, 1, 95, torch.Generator()), images)


def test_kinds_are_taken_in_turn() -> None:
    composer = Composer(tiny_world())

    def check(kinds: Sequence[Kind]) -> None:
        drawn = SceneStream(composer, count=6, seed=5, place=(1, 2), kinds=kinds).draw(1)
        assert [scene.kind for scene in drawn] == ["scene", "sticker", "avatar"] * 2

    check(KINDS)
    assert_detects(check, ())
