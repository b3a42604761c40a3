"""Prompt lists of every format; folders drawn, resumed, locked, shared between processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from numerics import assert_detects
from sana.distributed import Place
from sana.errors import RequestError
from sana.evaluation.draw import PLAN, Job, draw_folder, plan_jobs
from sana.evaluation.folders import list_pictures, one_at_a_time
from sana.evaluation.prompts import Item, items_of, match, read_prompts
from sana.pipelines.images import read_metadata
from sana.pipelines.pipeline import Pipeline, load
from sana.request import Request

GENEVAL = {
    "tag": "counting",
    "include": [{"class": "fox", "count": 2}],
    "exclude": [{"class": "fox", "count": 3}],
    "prompt": "a photo of two foxes",
}
LIKE = Request(prompt="any", model="tiny", steps=1, guidance=1, width=64, height=64)


@cache
def tiny() -> Pipeline:
    return load("tiny", device="cpu")


def place(rank: int = 0, world: int = 1) -> Place:
    return Place(rank=rank, world=world, device=torch.device("cpu"))


def draw(folder: Path, items: tuple[Item, ...], count: int = 1, like: Request = LIKE) -> int:
    jobs = plan_jobs(tiny(), items, folder, count=count, like=like)
    return draw_folder(tiny(), jobs, folder, items, place=place())


def write_formats(folder: Path) -> dict[str, Path]:
    (folder / "dpg").mkdir()
    (folder / "dpg" / "10.txt").write_text("ten foxes")
    (folder / "dpg" / "9.txt").write_text("nine foxes\n")
    files = {
        "a.txt": "a red fox\n\n  two apples \n",
        "a.jsonl": '{"prompt": "a red fox", "key": "fox"}\n{"prompt": "two apples", "more": 1}\n',
        "geneval.jsonl": json.dumps(GENEVAL),
        "mjhq.json": json.dumps({"1f": {"category": "animals", "prompt": "a fox"}}),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return {name: folder / name for name in (*files, "dpg")}


def test_formats(tmp_path: Path) -> None:
    paths = write_formats(tmp_path)
    read = {name: read_prompts(path) for name, path in paths.items()}
    assert [(i.key, i.prompt) for i in read["a.txt"]] == [
        *(("00000", "a red fox"), ("00001", "two apples"))
    ]
    assert [i.key for i in read["a.jsonl"]] == ["fox", "00001"]
    assert read["a.jsonl"][1].facts == {"more": 1}
    assert [i.prompt for i in read["dpg"]] == ["nine foxes", "ten foxes"]
    assert read["mjhq.json"][0].facts == {"category": "animals"}
    [geneval] = read["geneval.jsonl"]
    assert geneval.is_geneval and str(geneval.file(3)) == "00000/samples/0003.png"
    assert str(read["dpg"][0].file(0)) == "9/0000.png"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "holds no prompt; it must be a .txt"),
        ("a.csv", "x", "prompts is .*a.csv; it must be"),
        ("a.jsonl", '{"prompt": 3}', 'line 1 of .* has no "prompt"'),
        ("a.jsonl", "{", "line 1 of .* is no JSON"),
        ("a.jsonl", '{"prompt": "a", "key": "../b"}', "'../b', which cannot name"),
        ("a.jsonl", '{"prompt": "a", "key": "b"}\n' * 2, "'b', twice"),
        ("a.json", '{"x": 1}', "is not"),
    ],
)
def test_broken_lists(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(RequestError, match="is not there"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RequestError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_draws_what_each_picture_says(tmp_path: Path) -> None:
    [item] = read_prompts(write_formats(tmp_path)["geneval.jsonl"])
    items = (Item(key="fox", prompt="a red fox"), item)
    folder = tmp_path / "out"
    assert draw(folder, items, count=2) == 4
    files = [path.relative_to(folder) for path in list_pictures(folder)]
    assert list(map(str, files)) == [
        *("00000/samples/0000.png", "00000/samples/0001.png", "fox/0000.png", "fox/0001.png"),
    ]
    assert json.loads((folder / "00000" / "metadata.jsonl").read_text()) == GENEVAL
    seeds = set()
    for path in list_pictures(folder):
        request = Request(**read_metadata(path)["request"])
        seeds.update(request.seeds)

        def check(request: Request, path: Path = path) -> None:
            [again] = tiny().generate(request)
            assert again.tobytes() == Image.open(path).tobytes()

        check(request)
        assert_detects(check, request.replace(seeds=(request.seeds[0] + 1,)))
    assert seeds == {0, 1, 2, 3}
    assert items_of(folder, None) == items


def test_killed_run_goes_on(tmp_path: Path) -> None:
    items = tuple(Item(key=str(i), prompt="a red fox") for i in range(3))
    jobs = plan_jobs(tiny(), items, tmp_path, count=1, like=LIKE)

    def kill(job: Job) -> None:
        if job is jobs[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_folder(tiny(), jobs, tmp_path, items, place=place(), report=kill)
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / ".0000.png.99.part").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in list_pictures(tmp_path)}
    assert len(before) == 2
    assert draw(tmp_path, items) == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(tmp_path.rglob("*.part"))
    assert draw(tmp_path, items) == 0
    assert len(match(tmp_path, items, count=1)) == 3


def test_ranks_share_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("barrier", "any_process"):
        alone: Callable[..., bool] = lambda *_, holds=False, place=None: holds  # noqa: E731
        monkeypatch.setattr(f"sana.evaluation.draw.{name}", alone)
    items = tuple(Item(key=str(i), prompt="a red fox") for i in range(5))
    jobs = plan_jobs(tiny(), items, tmp_path, count=1, like=LIKE)
    drawn = [draw_folder(tiny(), jobs, tmp_path, items, place=place(r, 2)) for r in range(2)]
    assert drawn == [3, 2]
    assert len(list_pictures(tmp_path)) == 5


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    items = (Item(key="fox", prompt="a red fox"),)
    with one_at_a_time(tmp_path), pytest.raises(RequestError, match="another run is at work"):
        draw(tmp_path, items)
    assert draw(tmp_path, items) == 1
    other = (Item(key="fox", prompt="a blue fox"),)
    with pytest.raises(RequestError, match="prompt is a red fox, and now a blue fox"):
        draw(tmp_path, other)
    with pytest.raises(RequestError, match="pictures is 1, and now 2"):
        draw(tmp_path, items, count=2)
    (tmp_path / PLAN).write_text("{")
    with pytest.raises(RequestError, match="cannot be read"):
        draw(tmp_path, items)
    (tmp_path / PLAN).unlink()
    with pytest.raises(RequestError, match="holds 1 pictures that no run here made"):
        draw(tmp_path, items)


def test_another_requests_picture_is_refused(tmp_path: Path) -> None:
    items = (Item(key="a", prompt="a red fox"), Item(key="b", prompt="a red fox"))
    draw(tmp_path, items)
    (tmp_path / "a" / "0000.png").replace(tmp_path / "b" / "0000.png")
    with pytest.raises(RequestError, match="made by another request"):
        draw(tmp_path, items)


@pytest.mark.parametrize("count", [0, 10_001])
def test_counts(tmp_path: Path, count: int) -> None:
    items = (Item(key="fox", prompt="a red fox"),)
    with pytest.raises(RequestError, match=f"count is {count}"):
        plan_jobs(tiny(), items, tmp_path, count=count, like=LIKE)
    with pytest.raises(RequestError, match="seed is 1, 2"):
        plan_jobs(tiny(), items, tmp_path, count=1, like=LIKE.replace(seeds=(1, 2)))


def test_pictures_and_prompts_must_match(tmp_path: Path) -> None:
    items = (Item(key="fox", prompt="a"), Item(key="cat", prompt="b"))
    picture = Image.new("RGB", (8, 8))
    for name in ("fox/0000.png", "fox/0001.png", "cat_0.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / name)
    picture.save(tmp_path / "sheet.png")
    assert [len(files) for files in match(tmp_path, items)] == [2, 1]
    with pytest.raises(RequestError, match="1 of 2 prompts do not have 2 .*first being cat"):
        match(tmp_path, items, count=2)
    with pytest.raises(RequestError, match="1 pictures in .* belong to no prompt.*cat_0.jpg"):
        match(tmp_path, items[:1])
    with pytest.raises(RequestError, match="at least one picture.*first being dog"):
        match(tmp_path, (*items, Item(key="dog", prompt="c")))
    with pytest.raises(RequestError, match="has no prompts.jsonl"):
        items_of(tmp_path, None)


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no picture"):
        list_pictures(tmp_path)
    with pytest.raises(RequestError, match="is no folder"):
        list_pictures(tmp_path / "none")
