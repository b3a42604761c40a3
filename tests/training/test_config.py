"""Training configs: overrides are checked against the types, and unknown keys name the nearest."""

import pytest

from sana.config import from_json, to_json
from sana.errors import CheckpointError, TrainingError
from sana.training.config import DataConfig, TrainConfig, difference, override
from sana.training.recipes import RECIPES, plan


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_survives_json(name: str) -> None:
    config = plan(name)
    assert config.recipe == name
    assert from_json(TrainConfig, to_json(config)) == config


def test_override_reaches_nested_settings_and_keeps_types() -> None:
    config = plan("sticker-512", ["steps=7", "optimizer.rate=2", "data.pack=tiny", "compile=False"])
    assert (config.steps, config.optimizer.rate, config.data.pack) == (7, 2.0, "tiny")
    assert config.compile is False and isinstance(config.optimizer.rate, float)
    assert set(difference(plan("sticker-512"), config)) == {
        "steps",
        "optimizer.rate",
        "data.pack",
        "compile",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optimizer.rat=1", "did you mean 'rate'"),
        ("stepz=1", "did you mean 'steps'"),
        ("steps", "not key=value"),
        ("steps=many", "takes a int"),
        ("steps=1.5", "takes a int"),
        ("data=1", "a group of"),
        ("steps.more=1", "a single value"),
        ("steps=0", "at least 1"),
        ("data.crop=100", "multiples of 32"),
        ("data.accumulate=3", "not a multiple"),
        ("optimizer.clip=0", "must be positive"),
        ("data.kinds=scene stickers", "has 'stickers'; known: scene, sticker, avatar"),
    ],
)
def test_a_bad_override_says_what_is_wrong(change: str, words: str) -> None:
    with pytest.raises((TrainingError, CheckpointError), match=words):
        plan("sticker-512", [change])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(TrainingError, match="did you mean 'sticker-512'"):
        plan("sticker-513")


def test_reuse_needs_a_ring() -> None:
    with pytest.raises(TrainingError, match="needs data.ring"):
        DataConfig(reuse=4)


def test_override_of_nothing_changes_nothing() -> None:
    assert override(plan("sticker-256"), []) == plan("sticker-256")
