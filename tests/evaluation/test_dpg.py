"""DPG-Bench's rules on recorded answers against hand-computed scores; a tiny BLIP that answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from evaluation.tinies import picture, vqa_folder
from numerics import assert_detects
from sana.errors import RequestError
from sana.evaluation.dpg import (
    Question,
    by_category,
    is_askable,
    read_questions,
    score_item,
    split_grid,
    zero_children,
)
from sana.evaluation.vqa import Answerer

HEAD = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
TABLE = f"""{HEAD},question_natural_language
first,a fox,,1,0,entity,whole,entity - whole (fox),Is there a fox?
first,a fox,,2,1,attribute,color,"attribute - color (fox, red)",Is the fox red?
42,"two apples, red",,1,0,entity,whole,entity - whole (apples),Are there apples?
42,"two apples, red",,2,1,other,count,"other - count (apples, ==2)",Are there two apples?
42,"two apples, red",,3,"1, 2",attribute,color,"attribute - color (apples, red)",Are the apples red?
42,"two apples, red",,4,0,global,,global - (photo),"Is it a photo?"
"""


def ask(*rows: tuple[int, tuple[int, ...], str]) -> list[Question]:
    return [Question(number=n, parents=p, text=str(n), category=c) for n, p, c in rows]


def test_the_table(tmp_path: Path) -> None:
    path = tmp_path / "dpg_bench.csv"
    path.write_text(TABLE)
    questions = read_questions(path)
    # The first row is never asked, and what depends on it cannot be.
    assert [q.number for q in questions["first"]] == [2]
    assert not is_askable(questions["first"]) and is_askable(questions["42"])
    assert [q.parents for q in questions["42"]] == [(0,), (1,), (1, 2), (0,)]
    assert [q.category for q in questions["42"]] == [
        *("entity - whole", "other - count", "attribute - color", "global -"),
    ]
    assert questions["42"][3].broad == "global" and questions["42"][2].text == "Are the apples red?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no column item_id"),
        (f"{HEAD},question_natural_language\n", "no row to ask"),
        (TABLE.replace(",4,0,", ",four,0,"), "line 7 .* proposition 'four'"),
    ],
)
def test_broken_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "dpg_bench.csv"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_questions(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_questions(tmp_path / "none.csv")


def test_scores_by_hand() -> None:
    questions = ask((1, (0,), "entity - whole"), (2, (1,), "other - count"), (3, (2,), "global -"))
    answers = [["yes", "yes", "yes"], ["no", "yes", "yes"], ["yes", "no", "yes"], ["yes"] * 3]

    def check(answers: list[list[str]]) -> None:
        found = score_item(questions, answers)
        # The second picture: 1 is no, so 2 is zeroed, and by it 3. The third: 2 is no, so 3.
        assert found.pictures == pytest.approx((1, 0, 1 / 3, 1))
        assert found.mean == pytest.approx(7 / 12)
        assert dict(found.categories) == {
            "entity - whole": 1,
            "other - count": 1,
            "global -": 1,
        }

    check(answers)
    assert_detects(check, [["yes", "yes", "Yes"], *answers[1:]])
    assert_detects(check, [*answers[:3], ["yes", "yes", "no"]])


def test_categories_are_of_the_last_picture_before_zeroing() -> None:
    questions = ask((1, (0,), "entity - whole"), (2, (1,), "entity - part"))
    found = score_item(questions, [["yes", "yes"], ["no", "yes"]])
    assert found.pictures == (1, 0)
    assert by_category([found]) == {
        "entity": [0, 1],
        "entity - whole": [0],
        "entity - part": [1],
    }


def test_zeroing_goes_in_the_order_of_the_table() -> None:
    # 2 stands before its parent 3, which is zeroed only later: as published, 2 keeps its score.
    questions = ask((1, (0,), "a"), (2, (3,), "a"), (3, (1,), "a"))
    assert zero_children({1: 0.0, 2: 1.0, 3: 1.0}, questions) == {1: 0, 2: 1, 3: 0}


def test_grids_are_cut_row_by_row() -> None:
    grid = Image.new("RGB", (8, 8))
    for number, corner in enumerate([(0, 0), (4, 0), (0, 4), (4, 4)]):
        grid.paste((number, 0, 0), (*corner, corner[0] + 4, corner[1] + 4))
    parts = split_grid(grid, 4)
    assert [part.size for part in parts] == [(4, 4)] * 4
    assert [part.getpixel((2, 2))[0] for part in parts] == [0, 1, 2, 3]  # type: ignore[index]


def test_a_tiny_network_answers(tmp_path: Path) -> None:
    answerer, network = Answerer.load(str(vqa_folder(tmp_path / "tiny-blip")))
    assert network.name("DPG-Bench") == "DPG-Bench (tiny-blip)"
    questions = ["Is there a red fox in the picture?", "What color is the bench?"]
    answers = answerer.answer(picture(), questions)
    assert len(answers) == 2 and all(answers) and answers == [a.lower() for a in answers]
    assert answerer.answer(picture(), questions[:1]) == answers[:1]
