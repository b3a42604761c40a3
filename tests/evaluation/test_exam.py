"""The sticker exam on the tiny world: drawn, judged, compared, gone on with, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.small import CPU, DEPTHS, WIDTHS, small_detector, studio, world
from evaluation.test_features import lite_file
from numerics import assert_detects
from sana.cli.main import main
from sana.data.stickers.compose import Composer
from sana.data.stickers.prompts import COMPARED, PromptCase, held_out_prompts, seen_prompts
from sana.distributed import Place
from sana.errors import RequestError
from sana.evaluation import detector as files
from sana.evaluation import exam as exams
from sana.evaluation import exam_drawing, exam_judges
from sana.evaluation.exam import Exam, compare, score_stickers
from sana.evaluation.report import Share
from sana.evaluation.sample import Settings
from sana.evaluation.traits import TraitCase, TraitJudge
from sana.models.detector import Detector
from sana.training.config import DataConfig, TrainConfig
from sana.training.tasks.detector import DetectorTask


@pytest.fixture
def detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    plan = TrainConfig(
        recipe="test",
        task="detector",
        model="tiny",
        steps=1,
        data=DataConfig(pack="tiny", size=256, batch=4),
    )
    folder = tmp_path / "detector"
    place = Place(rank=0, world=1, device=CPU)
    DetectorTask(plan, studio(), place, small_detector()).export(folder)
    monkeypatch.setattr(
        files,
        "Detector",
        lambda concepts, colors: Detector(concepts, colors, widths=WIDTHS, depths=DEPTHS),
    )
    return folder / "detector.safetensors"


def exam(detector: Path, **more: Any) -> Exam:
    settings = Settings(steps=1, guidance=1.0, size=64, batch=5)
    given = {"count": 6, "seeds": 2, "settings": settings, "pack": "tiny", "model": "tiny"}
    given["pictures"] = 0
    output = detector.parent.parent / "exam"
    return Exam(**{"detector": str(detector), "output": output, **given, **more})


def test_seen_prompts_are_of_what_training_shows() -> None:
    composer = Composer(world())

    def is_seen(case: PromptCase) -> bool:
        first, *rest = case.expected
        if case.kind == "colors":
            return first.color in composer.colors_of(first.concept, "train")
        [second] = rest
        colors_are = all(
            e.color is None or e.color in composer.colors_of(e.concept, "train")
            for e in case.expected
        )
        return colors_are and composer.allows("train", first.concept, second.concept)

    cases = seen_prompts(world(), 16, seed=1)
    assert [case.kind for case in cases[:4]] == list(COMPARED)
    assert all(map(is_seen, cases))
    held_out = [c for c in held_out_prompts(world(), 24, seed=1) if c.kind in COMPARED]
    assert not any(map(is_seen, held_out))


def test_the_gap_by_hand() -> None:
    def share(value: float, half: float) -> Share:
        return Share(value=value, low=value - half, high=value + half, count=10)

    unseen = {"colors": share(0.8, 0.03), "two": share(0.5, 0.06), "single": share(0.9, 0.1)}
    gaps = compare(unseen, {"colors": share(0.9, 0.04), "two": share(0.5, 0.08)})

    def check(gap: Share) -> None:
        assert gap.value == pytest.approx(-0.1)
        assert (gap.low, gap.high) == pytest.approx((-0.15, -0.05))

    check(gaps["colors"])
    assert_detects(check, gaps["two"])
    # Half of the root of 0.05^2 + 0.1^2, around the mean of -0.1 and 0.
    half = (0.05**2 + 0.1**2) ** 0.5 / 2
    assert gaps["mean"].high == pytest.approx(-0.05 + half)
    assert list(gaps) == ["colors", "two", "mean"]


def test_an_exam_writes_its_record(detector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lite = lite_file(detector.parent.parent, monkeypatch)
    steps: dict[str, int] = {}

    def report(what: str, done: int, total: int) -> None:
        steps[what] = steps.get(what, 0) + done

    path, text = score_stickers(exam(detector, features=(str(lite),)), report)
    record = json.loads(path.read_text())
    names = [score["name"] for score in record["scores"]]
    assert names == [
        "sticker score",
        "the detector on renders",
        "sticker score, seen",
        "unseen minus seen",
        "Frechet distance (EfficientNet-Lite0) to renders",
    ]
    assert [score["pictures"] for score in record["scores"]] == [12, 6, 8, 8, 12]
    assert steps == {"drawing unseen": 12, "drawing seen": 8, "EfficientNet-Lite0": 12}
    assert record["prompts"] == {"unseen": 6, "seen": 4} and record["case_seed"] == 1
    assert "| unseen minus seen " in text and "| color_attribution " in text
    verdicts = json.loads((path.parent / "verdicts.json").read_text())
    assert [len(rows) for rows in verdicts.values()] == [12, 8]
    assert [row["seed"] for row in verdicts["unseen"][:4]] == [0, 1, 1000, 1001]
    assert (path.parent / "sheet.png").exists()


class Truth(TraitJudge):
    """Sees what every second picture was asked for; of a render, always."""

    turn = 0

    def name(self, pictures: torch.Tensor) -> list[dict[str, str]]:
        found = []
        for picture in pictures:
            number = Truth.turn % 8
            is_render = picture.shape[-1] == 256
            is_right = is_render or number % 2 == 0
            found.append(dict(CASES[number // 2 if not is_render else number % 4].wanted))
            if not is_right:
                found[-1] = {}
            Truth.turn += 1
        return found


CASES: list[TraitCase] = []


def test_further_judges_stand_beside(detector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CASES[:] = exam_judges.trait_prompts(studio(), 2, 1)
    Truth.turn = 0
    judge = Truth(network=torch.nn.Module(), slots={})  # type: ignore[arg-type]
    monkeypatch.setattr(exams.traits, "read", lambda *_: judge)

    class Sure:
        """Log-odds of 1 for renders, of -1 for what was drawn."""

        def score(self, prompt: str, pictures: torch.Tensor) -> list[float]:
            return [1.0 if pictures.shape[-1] == 256 else -1.0] * len(pictures)

    monkeypatch.setattr(exams.alignment, "read", lambda *_: (Sure(), {}))
    asked: list[int] = []
    draw = exam_drawing.drawer

    def counting(*given: Any) -> Any:
        inner = draw(*given)

        def drawn(prompts: list[str], seeds: list[int]) -> torch.Tensor:
            asked.extend(seeds)
            return inner(prompts, seeds)

        return drawn

    monkeypatch.setattr(exam_drawing, "drawer", counting)
    given = {"traits": str(detector), "alignment": str(detector), "trait_count": 2}
    path, text = score_stickers(exam(detector, has_seen=False, **given))
    record = json.loads(path.read_text())
    scores = {score["metric"]: score for score in record["scores"]}
    assert scores["style"]["value"] == 0.5 and scores["portrait"]["value"] == 0.5
    assert scores["style"]["parts"]["the judge on renders"]["value"] == 1
    assert scores["style"]["pictures"] == 4
    assert scores["alignment"]["value"] == 0
    assert scores["alignment"]["parts"]["the judge on renders"]["value"] == 1
    assert scores["alignment"]["parts"]["mean_log_odds"] == -1
    assert record["judges"].keys() == {"traits", "alignment"}
    assert "| style accuracy " in text
    # What was drawn is not drawn again.
    assert len(asked) == 12 + 8
    Truth.turn = 0
    score_stickers(exam(detector, has_seen=False, **given))
    assert len(asked) == 20


def test_a_stopped_exam_goes_on(detector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    draw = exam_drawing.drawer

    def counting(*given: Any) -> Any:
        inner = draw(*given)

        def drawn(prompts: list[str], seeds: list[int]) -> torch.Tensor:
            asked.extend(seeds)
            return inner(prompts, seeds)

        return drawn

    monkeypatch.setattr(exam_drawing, "drawer", counting)

    def kill(what: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    plan = exam(detector, has_seen=False)
    with pytest.raises(KeyboardInterrupt):
        score_stickers(plan, kill)
    assert len(asked) == 5
    path, _ = score_stickers(plan)
    assert len(asked) == len(set(asked)) == 12
    assert [s["metric"] for s in json.loads(path.read_text())["scores"]] == ["stickers", "detector"]
    settings = Settings(steps=2, guidance=1.0, size=64)
    with pytest.raises(RequestError, match=r"holds a run with other steps \(1, now 2\)"):
        score_stickers(exam(detector, has_seen=False, settings=settings))


def test_small_exams_are_refused(detector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="count is 5 and seeds 2"):
        exam(detector, count=5)
    lite = lite_file(detector.parent.parent, monkeypatch)
    with pytest.raises(RequestError, match="6 prompts with 1 seeds are 6 pictures.*at least 7"):
        score_stickers(exam(detector, seeds=1, features=(str(lite),)))


def test_the_autoencoder_is_in_it(detector: Path) -> None:
    from sana.evaluation.autoencoder import autoencoder_quality
    from sana.evaluation.sample import rebuild
    from sana.weights.load import load

    path, _ = score_stickers(exam(detector, has_seen=False, pictures=2))
    scores = {score["metric"]: score for score in json.loads(path.read_text())["scores"]}
    components = load("tiny")
    size = components.config.pixels
    expected = autoencoder_quality(
        lambda images: rebuild(components, images), studio(), count=2, size=size
    )
    for metric in ("psnr", "ssim"):
        assert scores[metric]["value"] == pytest.approx(getattr(expected["all"], metric), rel=1e-5)
        assert scores[metric]["parts"]["avatar"]["value"] == pytest.approx(
            getattr(expected["avatar"], metric), rel=1e-5
        )
    assert scores["psnr"]["pictures"] == 6


def test_the_command(detector: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = detector.parent.parent / "out"
    given = ["--detector", str(detector), "--pack", "tiny", "--output", str(output)]
    given += [
        "--count",
        "6",
        "--seeds",
        "1",
        "--no-seen",
        "--pictures",
        "0",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    assert main(["evaluate", "stickers", "tiny", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "sticker score" in lines[2] and lines[-1] == str(output / "scores.json")
