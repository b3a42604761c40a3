"""Style and attributes: what captions state, what the judge learns, how pictures are marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sana.data.stickers.compose import Composer
from sana.data.stickers.portraits import said
from sana.data.stickers.stream import Studio
from sana.data.stickers.tiny import tiny_world
from sana.data.stickers.world import Avatar
from sana.errors import CheckpointError, RequestError
from sana.evaluation.traits import (
    TraitCase,
    TraitJudge,
    evaluate_traits,
    mark,
    read,
    summarize,
    trait_cases,
)
from sana.models.traits import Traits
from sana.training.recipes import plan
from sana.training.run import make_task
from sana.training.tasks.traits import TraitScenes, TraitsPhase, TraitsTask, labels_of, slots_of
from sana.weights.files import to_bytes, write_whole
from tests.numerics import assert_detects
from tests.training.lines import CPU
from tests.training.small import SMALL

WORLD = tiny_world()
COMPOSER = Composer(WORLD)
STUDIO = Studio.open(WORLD, torch.device("cpu"))
PERSON = Avatar(
    look="flat cartoon",
    attributes={
        "person": "woman",
        "hair": "long hair",
        "hair_color": "red",
        "clothing": "shirt",
        "clothing_color": "blue",
        "expression": "sad",
        "skin": "dark",
        "beard": "beard",
    },
)


@pytest.mark.parametrize(
    ("caption", "slots"),
    [
        ("a person with long red hair", {"hair", "hair_color"}),
        ("A sad woman in a blue shirt.", {"expression", "person", "clothing", "clothing_color"}),
        ("a dark-skinned person, flat cartoon", {"skin"}),
        ("a saddler and a woman", {"person"}),
        ("a person in a red shirt with long hair", set()),
        ("a portrait, dark background", set()),
    ],
)
def test_what_a_caption_says(caption: str, slots: set[str]) -> None:
    found = said(caption, PERSON)
    assert set(found) == slots
    assert all(PERSON.attributes[slot] == words for slot, words in found.items())


def test_labels_by_hand() -> None:
    slots = slots_of(COMPOSER)
    assert slots["style"] == ["3D", "flat"] and slots["look"] == ["flat cartoon"]
    assert slots["hair"] == ["", "short hair"] and "" in slots["clothing_color"]
    sticker = COMPOSER.draw(0, seed=1, kind="sticker")
    labels = dict(zip(slots, labels_of(COMPOSER, slots, sticker), strict=True))
    assert labels.pop("style") == sticker.objects[0].style
    assert set(labels.values()) == {-1}
    face = COMPOSER.draw(0, seed=1, kind="avatar")
    assert face.avatar is not None
    labels = dict(zip(slots, labels_of(COMPOSER, slots, face), strict=True))
    assert labels.pop("style") == -1
    attributes = WORLD.avatars[face.avatar].attributes
    for slot, label in labels.items():
        assert slots[slot][label] == {"look": "flat cartoon", **attributes}.get(slot, "")
    # A portrait that lacks a slot has the empty label.
    bare = replace(WORLD.avatars[0], attributes={"person": "person"})
    composer = Composer(replace(WORLD, avatars=(bare, *WORLD.avatars[1:])))
    labels = dict(zip(slots, labels_of(composer, slots, replace(face, avatar=0)), strict=True))
    assert slots["hair"][labels["hair"]] == ""


def test_half_are_stickers_and_items_are_numbered_over_processes() -> None:
    whole = TraitScenes(COMPOSER, count=4, seed=1)
    for item in range(3):
        labels = whole[item].labels
        assert ((labels[:, 0] >= 0) == torch.tensor([True, False, True, False])).all()
    part = TraitScenes(COMPOSER, count=4, seed=1, place=(1, 2))
    assert torch.equal(part[0].scenes.sprite, whole[1].scenes.sprite)


@cache
def task() -> TraitsTask:
    made = make_task(plan("sticker-traits", [*SMALL, "data.batch=6"]), CPU)
    assert isinstance(made, TraitsTask)
    return made


def small() -> Traits:
    torch.manual_seed(0)
    slots = {slot: len(labels) for slot, labels in task().slots.items()}
    return Traits(slots, widths=(8, 16, 16, 32), depths=(1, 1, 1, 1))


def test_one_batch_is_learned_by_heart() -> None:
    item = task().dataset()[0]
    batch = task().prepare(item, is_warm_up=False, generator=torch.Generator().manual_seed(0))

    def check(turn: int) -> None:
        phase = TraitsPhase(small(), tuple(task().slots))
        optimizer = torch.optim.AdamW(phase.module.parameters(), lr=1e-2)
        for step in range(25):
            seen = batch._replace(labels=batch.labels.roll(step * turn, 0))
            losses = phase.loss(seen, torch.Generator())
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
        assert losses["style_accuracy"] == 1 and losses["portrait_accuracy"] == 1
        assert losses["loss"] < 1  # measured: 0.06 after 15 at the start

    check(0)
    assert_detects(check, 1)


def test_the_file_is_the_network(tmp_path: Path) -> None:
    task().export(tmp_path)
    judge = read(tmp_path / "traits.safetensors")
    assert judge.slots == task().slots
    for name, tensor in task().network.state_dict().items():
        rounded = tensor.half().float() if tensor.dim() > 1 else tensor
        assert torch.equal(rounded, judge.network.state_dict()[name]), name
    named = judge.name(torch.zeros(2, 3, 512, 512))
    assert len(named) == 2 and set(named[0]) == set(judge.slots)
    path = tmp_path / "x"
    write_whole({path: to_bytes({"a": torch.zeros(1)}, {"kind": "detector"})})
    with pytest.raises(CheckpointError, match="'detector', not a judge of traits"):
        read(path)


class Oracle(TraitJudge):
    """Reads 2 + the case's number from the first pixel and answers with the truth."""

    cases: Sequence[TraitCase] = ()

    def name(self, pictures: Tensor) -> list[dict[str, str]]:
        found = []
        for number in pictures[:, 0, 0, 0].tolist():
            is_known = number >= 2
            found.append(dict(self.cases[int(number) - 2].wanted) if is_known else {"style": "?"})
        return found


@pytest.mark.parametrize("kind", ["sticker", "avatar"])
def test_shares_are_of_pictures_that_show_what_was_asked_for(kind: str) -> None:
    cases = trait_cases(COMPOSER, kind, 6, seed=3)  # type: ignore[arg-type]
    for case in cases:
        assert case.scene.kind == kind and case.wanted
    judge = Oracle(network=small(), slots=task().slots)
    object.__setattr__(judge, "cases", cases)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        numbers = [seed // 1000 + 2 if seed % 1000 == 0 else 0 for seed in seeds]
        assert [cases[seed // 1000].prompt for seed in seeds] == list(prompts)
        return torch.tensor(numbers).float()[:, None, None, None].expand(-1, 3, 8, 8)

    result = evaluate_traits(draw, cases, [0, 1], judge, STUDIO)
    name = "style" if kind == "sticker" else "portrait"
    assert result.model[name].value == 0.5 and result.model[name].count == 6
    assert result.judge[name].value == 0  # a render's first pixel is at most 1


def test_marks_and_their_means() -> None:
    scene = COMPOSER.draw(0, seed=1, kind="avatar")
    case = TraitCase(prompt="x", wanted={"hair": "a bun", "glasses": "round"}, scene=scene)
    assert mark(case, {"hair": "a bun", "glasses": "", "beard": "b"}) == {
        "hair": True,
        "glasses": False,
    }
    flat, retro = (
        TraitCase(prompt="x", wanted={"style": style}, scene=scene) for style in ("flat", "retro")
    )
    marks = [[mark(case, {"hair": "a bun"})], [{"hair": False}]]
    marks += [[{"style": True}], [{"style": False}], [{"style": True}]]
    shares = summarize(marks, [case, case, flat, flat, retro])
    assert shares["style: flat"].value == 0.5 and shares["style: retro"].value == 1
    assert shares["style"].value == pytest.approx(2 / 3) and shares["portrait: hair"].value == 0.5
    assert shares["portrait"].value == pytest.approx((0.5 + 0) / 2)
    assert shares["portrait: glasses"].count == 1


def test_a_world_without_avatars_is_refused() -> None:
    plain = Composer(replace(WORLD, sprite_of=WORLD.sprite_of[:, :1], styles=("3D",)))
    with pytest.raises(RequestError, match="of 4 held-out prompts of kind sticker"):
        trait_cases(plain, "sticker", 4, seed=0)
