"""benchmarks/best_of.py: the choice against all subsets, and the whole program in miniature."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from benchmarks import best_of
from numerics import assert_detects
from sana.data.stickers.prompts import PromptCase
from sana.data.stickers.tiny import tiny_world
from sana.training.recipes import plan
from sana.training.run import make_task
from sana.training.tasks import alignment
from tests.evaluation.small import case
from tests.training.lines import CPU
from tests.training.small import SMALL


def by_subsets(marks: list[float], scores: list[float], count: int) -> float:
    """The mean mark of the best of every subset; equal best ones share."""
    total = []
    for subset in combinations(range(len(marks)), count):
        most = max(scores[i] for i in subset)
        best = [marks[i] for i in subset if scores[i] == most]
        total.append(sum(best) / len(best))
    return sum(total) / len(total)


@pytest.mark.parametrize("scores", [[3, 1, 4, 1.5, 5, 9, 2], [1, 1, 2, 2, 2, 0, 3]])
def test_the_choice_is_exact_over_all_subsets(scores: list[float]) -> None:
    marks = [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]

    def check(scores: list[float]) -> None:
        for count in range(1, 8):
            expected = by_subsets(marks, [float(s) for s in scores], count)
            assert best_of.choice(marks, scores, count) == pytest.approx(expected)

    if len(set(scores)) == 7:
        check(scores)
        assert_detects(lambda s: _same(marks, scores, s), scores[::-1])
    else:
        # Draws with equal scores share their marks, whichever of them are in the subset.
        assert best_of.choice(marks, scores, 1) == pytest.approx(3 / 7)
        assert best_of.choice(marks, scores, 7) == 0


def _same(marks: list[float], scores: list[float], others: list[float]) -> None:
    assert best_of.choice(marks, others, 3) == pytest.approx(by_subsets(marks, scores, 3))


def test_a_perfect_judge_reaches_the_bound_and_a_blind_one_gains_nothing() -> None:
    marks = [0.0, 1.0, 0.0, 0.0]
    assert best_of.choice(marks, marks, 2) == pytest.approx(1 - 3 / 6)
    assert best_of.choice(marks, [1.0] * 4, 3) == pytest.approx(0.25)


def draws(marks: list[float], scores: list[float]) -> best_of.Draws:
    made: PromptCase = case("single", (0, None, 1))
    return best_of.Draws(case=made, marks=marks, scores={"sticker": scores})


def test_agreement_counts_pairs_of_one_prompt() -> None:
    rows = [draws([1, 0, 0], [2, 1, 3]), draws([1, 1], [5, 6])]
    assert best_of.agree(rows, "sticker") == 0.5
    assert best_of.agree([rows[1]], "sticker") is None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained ones."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "MEASURE", 2)
        for name, recipe, seed in (
            ("a", "detector", 0),
            ("b", "detector", 1),
            ("c", "alignment", 0),
            ("d", "traits", 0),
        ):
            config = plan(f"sticker-{recipe}", [*SMALL, f"seed={seed}"])
            make_task(config, CPU).export(folder / name)
    return {
        "judge": folder / "a" / "detector.safetensors",
        "grader": folder / "b" / "detector.safetensors",
        "alignment": folder / "c" / "alignment.safetensors",
        "traits": folder / "d" / "traits.safetensors",
    }


def arguments(models: dict[str, Path], folder: Path) -> list[str]:
    return [
        *("--model", "tiny", "--pack", "tiny", "--prompts", "12", "--count", "2", "--steps", "1"),
        *("--grader", str(models["grader"]), "--judge", f"sticker={models['judge']}"),
        *("--judge", f"alignment={models['alignment']}", "--output", str(folder)),
        *("--device", "cpu", "--seconds", "0"),
    ]


def test_the_program_reports_what_fits_into_the_time(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best_of.main(arguments(models, tmp_path))
    record: dict[str, Any] = json.loads((tmp_path / "best-of.json").read_text())
    assert record["prompts"] == 6 and len(record["marks"]) == 6, "one group of six is drawn"
    assert set(record["curves"]) == {"sticker", "alignment", "the grader itself (bound)"}
    for curve in record["curves"].values():
        assert list(curve) == ["1", "2"]
        assert all(
            0 <= share["low"] <= share["value"] <= share["high"] <= 1 for share in curve.values()
        )
    assert (tmp_path / "best-of.png").stat().st_size > 1000
    assert "6 prompts x 2 draws" in capsys.readouterr().out


def test_a_judge_of_traits_grades_prompts_of_styles(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(models | {"grader": models["traits"]}, tmp_path)
    with pytest.raises(SystemExit, match="judge 'sticker' knows no styles"):
        best_of.main(words)
    at = words.index("--judge")
    best_of.main(words[:at] + words[at + 2 :])
    record: dict[str, Any] = json.loads((tmp_path / "best-of.json").read_text())
    assert set(record["curves"]) == {"alignment", "the grader itself (bound)"}
    styles = tiny_world().styles
    for row in record["marks"]:
        assert row["kind"] in styles and row["kind"] in row["prompt"]
        assert set(row["marks"]) <= {0.0, 1.0}
    assert list(record["grader_on_renders"]) == ["style"]
    assert "6 prompts x 2 draws" in capsys.readouterr().out


def test_a_second_run_goes_on_and_gets_what_one_run_gets(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [*arguments(models, tmp_path / "whole")[:-1], "1000"]
    best_of.main(whole)
    drawn: list[str] = []
    plain = best_of.judged

    def watch(case: PromptCase, *rest: Any) -> best_of.Draws:
        drawn.append(case.prompt)
        return plain(case, *rest)

    monkeypatch.setattr(best_of, "judged", watch)
    parts = arguments(models, tmp_path / "parts")
    best_of.main(parts)
    first = list(drawn)
    best_of.main(parts)
    one, two = (
        json.loads((tmp_path / name / "best-of.json").read_text())["marks"]
        for name in ("whole", "parts")
    )
    assert len(first) == 6 and len(drawn) == 12 and len(set(drawn)) == 12
    assert one == two
    best_of.main([*parts, "--seed", "5"])
    assert drawn[12:] == first, "another question begins anew"


def test_a_judge_may_not_grade_itself(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [*arguments(models, tmp_path), "--judge", f"sticker={models['grader']}"]
    with pytest.raises(SystemExit):
        best_of.main(same)
    assert "may not be the grader" in capsys.readouterr().err


def test_a_judge_of_nan_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match="judge 'blind' gave a score that is not finite"):
        best_of.check_scores({"blind": [1.0, float("nan")]})
