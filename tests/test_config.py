"""The one switch between the two public implementations, and that our own models ignore it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sana.config import (
    ControlNetConfig,
    ModelConfig,
    from_json,
    to_json,
    with_reference,
)
from sana.presets import preset


def test_official_models_follow_nvidia_and_can_be_read_by_the_other_rules() -> None:
    official = preset("sana-1600m-1024").config
    assert official.reference == "nvidia" and official.borrows_mask
    assert (official.dit.attention_eps, official.dit.cross_norm_eps) == (1e-8, 1e-6)
    controlled = replace(official, controlnet=ControlNetConfig(dit=official.dit))
    other = with_reference(controlled, "diffusers")
    assert other.controlnet is not None and not other.borrows_mask
    for dit in (other.dit, other.controlnet.dit):
        assert (dit.attention_eps, dit.cross_norm_eps) == (1e-15, 1e-5)
    assert with_reference(other, "nvidia") == controlled


@pytest.mark.parametrize("name", ["sticker-512", "tiny"])
def test_our_own_models_are_the_same_by_both_rules(name: str) -> None:
    config = preset(name).config
    for reference in ("nvidia", "diffusers"):
        read = with_reference(config, reference)
        assert read.dit == config.dit and not read.borrows_mask
        assert not read.tells_integer_times(by_scheduler=True)


def test_whole_times_come_from_the_scheduler_or_from_nvidias_network() -> None:
    nvidia = preset("sana-1600m-1024").config
    diffusers = with_reference(nvidia, "diffusers")
    assert nvidia.tells_integer_times(by_scheduler=True)
    assert nvidia.tells_integer_times(by_scheduler=False)
    assert diffusers.tells_integer_times(by_scheduler=True)
    assert not diffusers.tells_integer_times(by_scheduler=False)
    sprint = preset("sana-sprint-1600m-1024").config
    assert not sprint.tells_integer_times(by_scheduler=True)


def test_the_convention_and_the_controlnet_survive_the_header() -> None:
    config = with_reference(preset("sana-1600m-1024").config, "diffusers")
    config = replace(config, controlnet=ControlNetConfig(dit=config.dit, depth=5))
    assert from_json(ModelConfig, to_json(config)) == config
