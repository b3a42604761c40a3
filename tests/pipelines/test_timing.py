"""The stopwatch: what it counts, how often it asks, and quantiles against those of torch."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from numerics import assert_detects
from sana.pipelines.pipeline import Pipeline
from sana.pipelines.timing import LEAST, Spread, time_request, timed
from sana.request import Request
from standins import tiny_components

CPU = torch.device("cpu")
FOX = Request(prompt="a red fox", steps=3)


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_quantiles_are_torchs(count: int) -> None:
    times = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    spread = Spread(seconds=tuple(times.tolist()))
    for part in (0.0, 0.5, 0.9, 1.0):
        assert spread.quantile(part) == pytest.approx(times.quantile(part).item(), abs=1e-12)
    assert (spread.median, spread.p90) == (spread.quantile(0.5), spread.quantile(0.9))
    assert spread.as_json()["runs"] == count


# Longer than a stage takes on a machine that other programs keep busy.
DELAY = 0.1


def test_a_thing_is_timed_often_enough_and_after_its_first_time() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(len(calls))
        time.sleep(0.05 if len(calls) == 1 else 0.002)

    spread = timed(call, CPU, seconds=0.0)
    assert (len(calls), len(spread.seconds)) == (1 + LEAST, LEAST)
    assert 0.002 <= spread.median < 0.05
    assert len(timed(call, CPU, seconds=0.05, least=1).seconds) > LEAST


def test_stages_are_what_takes_the_time() -> None:
    """A delay in one stage shows in that stage and in the whole, not in the others."""

    def slowed(stage: str) -> Any:
        components = tiny_components()
        target, name = {
            "text": (components.text, "encode"),
            "steps": (components.dit, "denoise"),
            "decode": (components.autoencoder, "decode"),
        }[stage]
        plain = getattr(target, name)

        def slow(*inputs: Any, **options: Any) -> Any:
            time.sleep(DELAY)
            return plain(*inputs, **options)

        setattr(target, name, slow)
        return time_request(Pipeline(components), FOX, seconds=0.0, least=2)

    def check(stage: str, slow: str) -> None:
        timing = slowed(slow)
        assert getattr(timing, stage).median >= DELAY
        assert timing.whole.median >= DELAY
        others = {"text", "steps", "decode"} - {stage}
        assert all(getattr(timing, other).median < DELAY for other in others)
        assert timing.first > DELAY and timing.peak > 2**20
        assert set(timing.as_json()) >= {"first_ms", "peak_bytes", "whole", *others}

    for stage in ("text", "steps", "decode"):
        check(stage, stage)
    assert_detects(lambda slow: check("text", slow), "steps")
