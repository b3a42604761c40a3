"""Judges that are published networks: CLIP, ImageReward and a VLM's yes or no, in miniature."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation.tinies import clip_folder, picture, reward_folder, verifier_folder
from numerics import assert_detects, assert_matches
from sana.cli.main import main
from sana.errors import CheckpointError, NumericsError, RequestError
from sana.evaluation.judges import KNOWN, load_judge
from sana.evaluation.verifier import (
    QUESTION,
    Answer,
    Verifier,
    VerifierJudge,
    VerifierTournament,
    as_score,
    compare,
)
from sana.pipelines.pipeline import Pipeline
from sana.request import Request
from sana.scaling import Judge, Referee, Search, best_of
from sana.weights.load import load

PROMPT = "a photo of a red fox"
FOLDERS = {"clip": clip_folder, "image-reward": reward_folder, "vlm": verifier_folder}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("judges")
    found = {name: make(made / name) for name, make in FOLDERS.items()}
    return found | {"vlm-tournament": found["vlm"]}


@pytest.fixture(scope="module")
def verifier(folders: dict[str, Path]) -> Verifier:
    return Verifier.load(str(folders["vlm"]))


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(load("tiny"))


ANSWERS: dict[str, tuple[Answer, Answer]] = {
    "a yes beats a no": ((-0.7, -0.8), (-5.0, -0.01)),
    "the surer yes": ((-0.1, -3.0), (-0.2, -9.0)),
    "the less sure no": ((-9.0, -0.2), (-1.0, -0.1)),
}


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_the_better_answer_wins_and_scores_more(name: str) -> None:
    better, worse = ANSWERS[name]
    assert compare(better, worse) > 0 > compare(worse, better)
    assert as_score(better) > as_score(worse)


def test_scores_have_the_order_of_comparisons() -> None:
    values = (-12.0, -2.0, -0.3, -0.01)
    answers: list[Answer] = [pair for pair in product(values, values) if pair[0] != pair[1]]

    def check(answers: list[tuple[Answer, float]]) -> None:
        for (a, score_a), (b, score_b) in product(answers, answers):
            lead = compare(a, b)
            assert (score_a > score_b) == (lead > 0) and (score_a == score_b) == (lead == 0)

    scored = [(answer, as_score(answer)) for answer in answers]
    check(scored)
    # The difference of the two, which a verifier's score is often taken for, has another order.
    assert_detects(check, [(answer, answer[0] - answer[1]) for answer in answers])


def test_the_answer_is_the_chance_of_the_first_word(verifier: Verifier) -> None:
    """Read from transformers directly, with the published question around the prompt."""
    image = picture(3)
    tokenizer, asked = verifier.processor.tokenizer, QUESTION.format(prompt=PROMPT)
    tokens = {word: tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")}
    assert verifier.words == {word: [token] for word, token in tokens.items()}
    assert "The given prompt is:a photo of a red fox. Please" in asked
    inputs = verifier.processor(
        text=["<image> " + asked.strip() + " answer :"], images=[image], return_tensors="pt"
    )
    with torch.no_grad():
        chances = verifier.model(**inputs).logits[0, -1].softmax(-1)
    expected = torch.stack([chances[tokens[word]].log() for word in ("yes", "no")])

    def check(prompt: str) -> None:
        assert_matches(expected, torch.tensor(verifier.answer(prompt, image)), 2e-6)  # floor 3e-7

    check(PROMPT)
    assert_detects(check, "a photo of a blue fox")


@pytest.mark.parametrize("name", ["clip", "image-reward", "vlm", "vlm-tournament"])
def test_a_search_from_end_to_end(name: str, folders: dict[str, Path], pipeline: Pipeline) -> None:
    judge = load_judge(name, str(folders[name]))
    request = Request(prompt=PROMPT, steps=2, model="tiny", seeds=(3,))
    kept = best_of(pipeline, request, judge, Search(count=4, keep=2))
    pictures = [pipeline.generate(request.replace(seeds=(3 + n,)))[0] for n in range(4)]
    if isinstance(judge, Judge):
        scores = [judge(PROMPT, [image])[0] for image in pictures]
        best = sorted(range(4), key=lambda n: -scores[n])[:2]
        assert [one.number for one in kept] == best
        assert [one.score for one in kept] == [scores[n] for n in best]
        assert len(set(scores)) > 1, "the judge looks at the picture"
    else:
        assert isinstance(judge, Referee)
        winners = [
            first if judge.compare(PROMPT, pictures[first], pictures[second]) >= 0 else second
            for first, second in ((0, 1), (2, 3))
        ]
        assert [one.number for one in kept] == winners


@pytest.mark.parametrize("name", ["clip", "vlm-tournament"])
def test_the_command_line_takes_a_folder(
    name: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a.png"
    code = main(
        [
            *("generate", PROMPT, "--model", "tiny", "--steps", "1", "--best-of", "2"),
            *("--judge", name, "--judge-model", str(folders[name]), "--output", str(target)),
        ]
    )
    assert code == 0, capsys.readouterr().err
    assert target.exists()


class Blank:
    """A verifier that gives NaN."""

    def answer(self, prompt: str, image: Image.Image) -> Answer:
        return math.nan, -1.0


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (VerifierJudge(Blank()), "judge 'vlm' gave nan"),  # type: ignore[arg-type]
        (VerifierTournament(Blank()), "referee 'vlm-tournament' gave nan"),  # type: ignore[arg-type]
    ],
)
def test_a_judge_that_gives_nan_is_refused_by_name(
    judge: VerifierJudge | VerifierTournament, words: str, pipeline: Pipeline
) -> None:
    request = Request(prompt=PROMPT, steps=1, model="tiny")
    with pytest.raises(NumericsError, match=words):
        best_of(pipeline, request, judge, Search(count=2))


def test_weights_of_nan_are_refused_by_the_judges_name(
    folders: dict[str, Path], pipeline: Pipeline
) -> None:
    judge = load_judge("clip", str(folders["clip"]))
    for parameter in judge.score.__self__.model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    request = Request(prompt=PROMPT, steps=1, model="tiny")
    with pytest.raises(NumericsError, match="judge 'clip' gave nan"):
        best_of(pipeline, request, judge, Search(count=2))


def test_sources_that_are_no_verifier(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no AutoModelForImageTextToText"):
        load_judge("vlm", str(folders["clip"]))
    with pytest.raises(RequestError, match="judge-model is .*nowhere"):
        load_judge("vlm", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="one token for yes and for no"):
        load_judge("vlm", str(verifier_folder(tmp_path / "deaf", knows_no=False)))
    mute = verifier_folder(tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no processor with a chat template"):
        load_judge("vlm", str(mute))
    assert set(FOLDERS) < set(KNOWN)
