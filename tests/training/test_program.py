"""benchmarks/training.py in miniature: what it says of ways, and that other gradients show."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks import training
from tests.numerics import assert_detects
from tests.training.small import SMALL

WAYS = "eager,eager+precision=bf16,eager+flow.shift=1.5"


def test_ways_are_timed_and_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "SPAN", 2)
    monkeypatch.setattr(training, "PROFILED", 2)
    small = [change for change in SMALL if not change.startswith(("compile", "save", "log"))]

    given = ["sticker-512", "--ways", WAYS, "--seconds", "600", "--top", "3"]
    changes = ["init=", "data.reuse=2", "data.ring=16"]
    monkeypatch.setattr(sys, "argv", ["training.py", *given, *small, *changes])
    assert training.main() == 0
    out = capsys.readouterr().out
    summary = out[out.rindex("\n\n") :].strip().splitlines()
    assert len(summary) == 5 and re.fullmatch(r"\d+ s in all", summary[-1])
    apart = []
    for way, line in zip(WAYS.split(","), summary[1:-1], strict=True):
        pattern = rf"{re.escape(way)}: [\d.]+ ms a step, [\d.]+ steps/s, .*gradient_norm .*"
        assert re.fullmatch(pattern, line), line
        apart.append([float(word) for word in re.findall(r"\(([-\d.e+]+) apart\)", line)])
        assert len(apart[-1]) == 8  # of each of four reports, loss and norm
    assert apart[0] == [0.0] * 8

    def check(values: list[float]) -> None:
        assert 0 < max(values) < 5e-3

    check(apart[1])
    assert_detects(check, apart[2])
    assert out.count(" x ") == 3 * 3 + 1  # ops of each way, and the processes
