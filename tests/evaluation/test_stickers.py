"""The rule book on hand-made pictures, planted faults, and a whole evaluation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evaluation.small import case, judge, seen, studio, world
from numerics import assert_detects
from sana.data.stickers.prompts import PromptCase, held_out_prompts
from sana.data.stickers.scene import CANVAS, TASKS, Dice, Scene
from sana.evaluation import stickers
from sana.evaluation.detector import Found
from sana.evaluation.stickers import (
    Verdict,
    evaluate_prompts,
    find_fault,
    render_truth,
    score,
    stands,
    summarize,
    truth_scene,
)

LEFT, RIGHT, TOP = (0.1, 0.4, 0.3, 0.6), (0.7, 0.4, 0.9, 0.6), (0.4, 0.0, 0.6, 0.2)


@pytest.mark.parametrize(
    ("wanted", "found", "fault"),
    [
        (case("single", (0, None, 1)), [seen(0), seen(0)], ""),
        (case("single", (0, None, 1)), [seen(1)], "no circle"),
        (case("single", (0, None, 1)), [], "no circle"),
        (case("two", (0, None, 1), (1, None, 1)), [seen(1), seen(0)], ""),
        (case("two", (0, None, 1), (1, None, 1)), [seen(1), seen(1)], "no circle"),
        (case("counting", (0, None, 3)), [seen(0)] * 3 + [seen(4)], ""),
        (case("counting", (0, None, 3)), [seen(0)] * 4, "4 circles"),
        (case("counting", (0, None, 2)), [seen(0)], "1 circle"),
        (case("colors", (0, "blue", 1)), [seen(0, "blue")], ""),
        (case("colors", (0, "blue", 1)), [seen(0, "red"), seen(1, "blue")], "no blue circle (red)"),
        (case("colors", (0, "blue", 1)), [seen(0, None)], "no blue circle (no color)"),
        (
            case("color_attribution", (0, "blue", 1), (1, "red", 1)),
            [seen(0, "red"), seen(1, "blue")],
            "no blue circle (red)",
        ),
        (
            case("color_attribution", (0, "blue", 1), (1, "red", 1)),
            [seen(0, "blue"), seen(1, "red")],
            "",
        ),
        (
            case("position", (0, None, 1), (1, None, 1), relation="left"),
            [seen(0, None, LEFT), seen(1, None, RIGHT)],
            "",
        ),
        (
            case("position", (0, None, 1), (1, None, 1), relation="left"),
            [seen(0, None, RIGHT), seen(1, None, LEFT)],
            "not left",
        ),
    ],
)
def test_rule_book(wanted: PromptCase, found: list[Found], fault: str) -> None:
    assert find_fault(wanted, found, world()) == fault


def test_relations_by_hand() -> None:
    assert stands(LEFT, RIGHT, "left") and stands(RIGHT, LEFT, "right")
    assert stands(TOP, (0.4, 0.6, 0.6, 0.8), "above")
    assert stands((0.4, 0.6, 0.6, 0.8), TOP, "below")
    assert not any(stands(LEFT, RIGHT, r) for r in ("right", "above", "below"))
    # Gap 0.03, of which both widths of 0.2 take 0.04: no relation holds.
    near = (0.13, 0.4, 0.33, 0.6)
    assert not any(stands(LEFT, near, r) for r in ("left", "right", "above", "below"))
    # On a diagonal of 0.5 both ways, each offset of 0.46 is over half of 0.707.
    corner = (0.6, 0.9, 0.8, 1.1)
    assert stands(LEFT, corner, "left") and stands(LEFT, corner, "above")


def test_truth_renders_what_the_case_asks_for() -> None:
    cases = held_out_prompts(world(), 24, seed=0)
    for number, wanted in enumerate(cases):
        scene = truth_scene(wanted, studio().composer, world(), Dice(0, 1, number))
        assert find_fault(wanted, _read(scene), world()) == ""
    pictures = render_truth(cases[:3], judge(), size=64)
    assert pictures.shape == (3, 3, 64, 64)
    assert torch.equal(pictures, render_truth(cases[:3], judge(), size=64))


def test_swapped_label_lowers_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = held_out_prompts(world(), 24, seed=0)
    truth = [_read(truth_scene(c, studio().composer, world(), Dice(0, 1, 0))) for c in cases]

    def check(found: list[list[Found]]) -> None:
        monkeypatch.setattr(stickers, "detect", lambda network, pictures: found)
        shares = summarize(score(torch.zeros(24, 3, 8, 8), cases, judge()))
        assert shares["all"].value == 1
        assert set(shares) == {*TASKS, "all"}

    check(truth)
    swapped = [[dataclasses.replace(f, concept=(f.concept + 1) % 12) for f in truth[7]]]
    assert_detects(check, truth[:7] + swapped + truth[8:])
    relabelled = [[dataclasses.replace(f, color="grey") for f in truth[3]]]
    assert cases[3].kind == "colors"
    assert_detects(check, truth[:3] + relabelled + truth[4:])
    assert_detects(check, [[], *truth[1:]])


def test_summary_by_hand() -> None:
    kinds = ["single"] * 4 + ["two"] * 2
    marks = [1, 1, 1, 0, 0, 0]
    verdicts = [
        Verdict(
            case=dataclasses.replace(case(kind, (0, None, 1)), prompt=str(i)),
            seed=0,
            fault="" if mark else "wrong",
            found=(),
        )
        for i, (kind, mark) in enumerate(zip(kinds, marks, strict=True))
    ]
    shares = summarize(verdicts)
    assert {kind: share.value for kind, share in shares.items()} == {
        "single": 0.75,
        "two": 0.0,
        "all": 0.375,
    }
    assert shares["all"].count == 6
    assert 0 < shares["all"].low < 0.375 < shares["all"].high < 1


def test_evaluation_writes_sheet_and_results(tmp_path: Path) -> None:
    cases = held_out_prompts(world(), 7, seed=0)
    asked: list[tuple[str, int]] = []

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        asked.extend(zip(prompts, seeds, strict=True))
        return torch.zeros(len(prompts), 3, 64, 64)

    result = evaluate_prompts(draw, cases, (0, 5), judge(), tmp_path)
    assert len(result.verdicts) == len(set(asked)) == 14
    assert result.model["all"].value == 0
    record = json.loads((tmp_path / "results.json").read_text())
    assert [row["prompt"] for row in record["pictures"][:7]] == [c.prompt for c in cases]
    assert record["data"] == "tiny-1"
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def _read(scene: Scene) -> list[Found]:
    """What a perfect detector finds."""
    boxes = [tuple(value / CANVAS for value in placed.box) for placed in scene.objects]
    return [
        seen(placed.concept, placed.color, box)  # type: ignore[arg-type]
        for placed, box in zip(scene.objects, boxes, strict=True)
    ]
