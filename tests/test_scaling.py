"""Best of N: replayable alone, the right ones kept, few held, and judges that give no score."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from sana import scaling
from sana.cli.choosing import Choosing
from sana.cli.main import main
from sana.errors import NumericsError, RequestError
from sana.pipelines import pipeline as pipelines
from sana.pipelines.images import read_metadata
from sana.pipelines.pipeline import Pipeline
from sana.request import SEED_LIMIT, Request
from sana.scaling import Candidate, Search, best_of, choose
from standins import tiny_components
from tests.numerics import assert_detects

REQUEST = Request(prompt="a red fox", seeds=(5,), steps=2, width=64, height=64)


class Brightness:
    """A judge of the mean level; counts its calls."""

    name = "brightness"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        self.calls += len(pictures)
        return [float(sum(picture.tobytes())) for picture in pictures]


class Brighter:
    """The same as a referee."""

    name = "brighter"

    def __init__(self) -> None:
        self.matches = 0

    def compare(self, prompt: str, first: Image.Image, second: Image.Image) -> float:
        self.matches += 1
        return float(sum(first.tobytes())) - float(sum(second.tobytes()))


class Fixed:
    name = "fixed"

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    def __call__(self, prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        return self.scores


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny_components())


@pytest.fixture(scope="module")
def pictures(pipeline: Pipeline) -> list[Image.Image]:
    return [pipeline.generate(REQUEST.replace(seeds=(5 + i,)))[0] for i in range(7)]


def light(image: Image.Image) -> int:
    return sum(image.tobytes())


def test_the_brightest_are_kept_and_each_is_drawn_again_alone(
    pipeline: Pipeline, pictures: list[Image.Image]
) -> None:
    judge = Brightness()
    kept = best_of(pipeline, REQUEST, judge, Search(count=7, keep=3))
    assert judge.calls == 7

    def check(found: list[Candidate]) -> None:
        order = sorted(range(7), key=lambda i: -light(pictures[i]))[:3]
        assert [one.number for one in found] == order
        for one in found:
            assert one.image.tobytes() == pictures[one.number].tobytes()
            assert one.request.image_seeds == (5 + one.number,)
            assert one.score == light(one.image)

    check(kept)
    assert pipeline.generate(kept[0].request)[0].tobytes() == kept[0].image.tobytes()
    assert_detects(check, kept[::-1])


def test_equal_scores_go_to_the_lower_seed(pipeline: Pipeline) -> None:
    kept = best_of(pipeline, REQUEST, Fixed([1.0]), Search(count=4, keep=2))
    assert [one.number for one in kept] == [0, 1]


@pytest.mark.parametrize("count, keep", [(4, 1), (7, 1), (6, 2), (7, 3), (3, 3)])
def test_knockout_keeps_the_best_of_each_group(
    pipeline: Pipeline, pictures: list[Image.Image], count: int, keep: int
) -> None:
    referee = Brighter()
    kept = best_of(pipeline, REQUEST, referee, Search(count=count, keep=keep))
    groups = [[i for i in range(count) if i * keep // count == g] for g in range(keep)]
    best = [max(group, key=lambda i: light(pictures[i])) for group in groups]
    assert [one.number for one in kept] == best
    assert referee.matches == count - keep
    assert {one.score for one in kept} == {None}


def test_few_pictures_are_held() -> None:
    search = Search(count=1000, keep=4)
    blank = Image.new("RGB", (1, 1))

    def most(pool: scaling._Best | scaling._Knockout) -> int:
        held = 0
        for number in range(1000):
            pool.add(Candidate(request=REQUEST, number=number, image=blank, score=None))
            parts = [pool.heap] if isinstance(pool, scaling._Best) else [pool.waiting, pool.winners]
            held = max(held, sum(map(len, parts)))
        return held

    assert most(scaling._Best(Brightness(), search)) == 4
    assert most(scaling._Knockout(Brighter(), search)) <= 4 + math.ceil(math.log2(1000)) + 2


def test_drafts_are_finished_from_the_same_seed(pipeline: Pipeline) -> None:
    request = REQUEST.replace(steps=3)
    search = Search(count=3, keep=1, drafts=1)
    stages = []
    steps = choose(pipeline, request, Brightness(), search)
    try:
        while True:
            at = next(steps)
            stages.append((at.stage, at.number, at.count, at.step.index))
    except StopIteration as end:
        [kept] = end.value
    assert stages == [
        *(("drafting", i, 3, 0) for i in range(3)),
        *(("finishing", 0, 1, i) for i in range(3)),
    ]
    drafts = [pipeline.generate(request.replace(seeds=(5 + i,), steps=1))[0] for i in range(3)]
    assert kept.number == max(range(3), key=lambda i: light(drafts[i]))
    assert kept.request == pipeline.resolve(request).replace(seeds=(5 + kept.number,))
    assert kept.image.tobytes() == pipeline.generate(kept.request)[0].tobytes()


@pytest.mark.parametrize(
    "scores, message",
    [
        ([math.nan], "'fixed' gave nan for a picture of 'a red fox'.*look at the judge's weights"),
        ([math.inf], "gave inf"),
        ([], "gave 0 scores for 1 picture"),
        ([1.0, 2.0], "gave 2 scores for 1 picture"),
    ],
)
def test_no_score_is_an_error(pipeline: Pipeline, scores: list[float], message: str) -> None:
    with pytest.raises(NumericsError, match=message):
        best_of(pipeline, REQUEST, Fixed(scores), Search(count=2))


@pytest.mark.parametrize(
    "settings, changes, message",
    [
        ({"count": 0}, {}, "best_of is 0; it must be a whole number from 1 to 4096"),
        ({"count": 2.5}, {}, "best_of is 2.5"),
        ({"count": 2, "keep": 3}, {}, "keep is 3; it must be a whole number from 1 to 2"),
        ({"count": 2, "drafts": 0}, {}, "drafts is 0"),
        ({"count": 2, "drafts": 9}, {}, "drafts is 9 and a picture takes 2 steps"),
        ({"count": 2}, {"count": 2}, "asks for 2 pictures; a search starts at one seed"),
        ({"count": 2}, {"seeds": (SEED_LIMIT,)}, "start at a smaller one"),
    ],
)
def test_what_cannot_be_searched(
    pipeline: Pipeline, settings: dict[str, int], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        best_of(pipeline, REQUEST.replace(**changes), Brightness(), Search(**settings))


@pytest.fixture
def small_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipelines, "load", lambda name, **how: Pipeline(tiny_components()))
    monkeypatch.setattr(Choosing, "load", lambda self, device: Brightness())


@pytest.mark.usefixtures("small_program")
def test_the_command_writes_the_chosen_and_makes_one_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    search = ["--best-of", "3", "--judge", "sticker", "--judge-model", "x", "--keep", "2"]
    assert main(["generate", "a fox", "-s", "5", *search, "--drafts", "1", "-o", "a.png"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 2 and set(names) < {"a-5.png", "a-6.png", "a-7.png"}
    made = read_metadata(Path(names[0]))
    seed = made["request"]["seeds"][0]
    assert names[0] == f"a-{seed}.png"
    score = made["chosen"].pop("score")
    assert score > 0
    assert made["chosen"] == {
        **{"judge": "brightness", "of": 3, "keep": 2, "number": seed - 5, "drafts": 1}
    }
    assert main(["generate", "--again", names[0], "-o", "again.png"]) == 0
    again = read_metadata(Path("again.png"))
    assert json.dumps(again["request"]) == json.dumps(made["request"]) and "chosen" not in again
    with Image.open(names[0]) as first, Image.open("again.png") as second:
        assert first.tobytes() == second.tobytes()


@pytest.mark.usefixtures("small_program")
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--keep", "2"], "--keep is 2 and there is no search"),
        (["--best-of", "2"], "best_of is 2 and there is no judge; name one with --judge"),
        (["--best-of", "2", "--judge", "stiker"], "judge is 'stiker'.*did you mean sticker?"),
        (["--best-of", "2", "--judge", "sticker"], "there is no judge_model; give the detector"),
    ],
)
def test_flags_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["generate", "a fox", *arguments]) != 0
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert re.search(message, err)
