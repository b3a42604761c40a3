"""Intervals against the binomial, the sheet's size and marks, whole files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from numerics import assert_detects
from sana.evaluation.report import (
    RIGHT,
    WRONG,
    Labelled,
    Share,
    bootstrap,
    contact_sheet,
    table,
    write_json,
)


def test_interval_is_the_binomials() -> None:
    marks = [[float(i < 150)] for i in range(200)]

    def check(share: Share) -> None:
        half = 1.96 * math.sqrt(0.75 * 0.25 / 200)
        assert share.value == 0.75
        assert abs(share.high - share.low - 2 * half) < 0.15 * half
        assert share.low < 0.75 < share.high

    check(bootstrap(marks))
    # Eight copies of each mark are no new prompts: treating them as such narrows the interval.
    check(bootstrap([row * 8 for row in marks]))
    assert_detects(check, bootstrap(marks * 8))


def test_interval_repeats() -> None:
    marks = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert bootstrap(marks) == bootstrap(marks)


def test_sheet_frames_tell_right_from_wrong() -> None:
    picture = torch.zeros(3, 16, 16)
    marks = (True, False, None)
    entries = [Labelled(picture=picture, text="a red fox " * 30, is_right=m) for m in marks]
    sheet = contact_sheet(entries, columns=2, side=64)
    assert sheet.width == 2 * 72
    assert sheet.getpixel((2, 2)) == RIGHT
    assert sheet.getpixel((74, 2)) == WRONG
    assert sheet.getpixel((36, 36)) == (128, 128, 128)


def test_table_is_markdown() -> None:
    lines = table(["kind", "model"], [["single", 0.5], ["two", 1.0]]).splitlines()
    assert lines[2] == "| single | 0.500 |"
    assert len({len(line) for line in lines}) == 1


def test_json_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]
