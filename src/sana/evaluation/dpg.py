"""DPG-Bench (Hu et al. 2024): long prompts, and yes or no questions about every detail of them.

The rules of the published program, its oddities kept: the first row of the table is never asked, a
prompt that asks for that row's answer is left out, a question is 0 where one that it depends on is,
in the order of the table, and the scores by category are those of the last picture before that.
Start reading at `score_item`; who answers is in `sana.evaluation.vqa`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sana.errors import RequestError

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
PER_PROMPT = 4
PROMPTS = 1065


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row; `parents` are the numbers of the questions it depends on."""

    number: int
    parents: tuple[int, ...]
    text: str
    category: str
    """Such as "attribute - color"; its first word is the broad one."""

    @property
    def broad(self) -> str:
        return self.category.split("-")[0].strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemScore:
    """0..1 of each picture, and the last one's answers by category, before any was zeroed."""

    pictures: tuple[float, ...]
    categories: tuple[tuple[str, float], ...]

    @property
    def mean(self) -> float:
        return sum(self.pictures) / len(self.pictures)


def read_questions(path: Path) -> dict[str, tuple[Question, ...]]:
    """The questions of each prompt in dpg_bench.csv, without its first row, as published."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            rows = [] if lacking else list(reader)[1:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{path} cannot be read ({error}); give dpg_bench.csv") from None
    if lacking or not rows:
        what = f"no column {lacking[0]}" if lacking else "no row to ask"
        raise RequestError(f"{path} has {what}; give dpg_bench.csv as it was published")
    questions: dict[str, dict[int, Question]] = {}
    previous = ""
    for line, row in enumerate(rows, start=3):
        question = _question(row, path, line)
        if row["item_id"] != previous:
            # As published: a prompt whose rows are apart keeps the last of them.
            questions[row["item_id"]] = {}
        previous = row["item_id"]
        questions[previous][question.number] = question
    return {key: tuple(asked.values()) for key, asked in questions.items()}


def is_askable(questions: Sequence[Question]) -> bool:
    """Whether every question that another depends on is there (not so where the first row was)."""
    known = {0, *(question.number for question in questions)}
    return all(parent in known for question in questions for parent in question.parents)


def score_item(questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> ItemScore:
    """Scores from the answers [picture][question]; only "yes" counts."""
    means, last = [], {}
    for picture in answers:
        last = {q.number: float(a == "yes") for q, a in zip(questions, picture, strict=True)}
        zeroed = zero_children(last, questions)
        means.append(sum(zeroed.values()) / len(zeroed))
    categories = tuple((question.category, last[question.number]) for question in questions)
    return ItemScore(pictures=tuple(means), categories=categories)


def zero_children(scores: Mapping[int, float], questions: Sequence[Question]) -> dict[int, float]:
    """0 for each question with a parent at 0, in order, so that it reaches grandchildren."""
    zeroed = dict(scores)
    for question in questions:
        if any(parent and zeroed[parent] == 0 for parent in question.parents):
            zeroed[question.number] = 0.0
    return zeroed


def split_grid(image: Image.Image, side: int, count: int = PER_PROMPT) -> list[Image.Image]:
    """The first pictures of a 2 x 2 grid without borders, row by row."""
    corners = [(0, 0), (side, 0), (0, side), (side, side)]
    return [image.crop((x, y, x + side, y + side)) for x, y in corners[:count]]


def by_category(scores: Sequence[ItemScore]) -> dict[str, list[float]]:
    """Every answer's score under its category and under its broad one."""
    found: dict[str, list[float]] = {}
    for score in scores:
        for category, value in score.categories:
            for name in dict.fromkeys((category.split("-")[0].strip(), category)):
                found.setdefault(name, []).append(value)
    return found


def _question(row: Mapping[str, str], path: Path, line: int) -> Question:
    try:
        return Question(
            number=int(row["proposition_id"]),
            parents=tuple(int(part) for part in row["dependency"].split(",")),
            text=row["question_natural_language"],
            category=row["tuple"].split("(")[0].strip(),
        )
    except (ValueError, AttributeError, TypeError):
        raise RequestError(
            f"line {line} of {path} has proposition {row.get('proposition_id')!r} and dependency "
            f"{row.get('dependency')!r}; they must be whole numbers: give the dpg_bench.csv that "
            "was published"
        ) from None
