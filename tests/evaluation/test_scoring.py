"""Folders scored whole by every metric with tiny networks: records, tables, resuming, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from evaluation.tinies import clip_folder, picture, reward_folder, segmenter_folder, vqa_folder
from numerics import assert_detects
from sana.cli.main import main
from sana.errors import NumericsError, RequestError
from sana.evaluation import measures, scoring, segmenter
from sana.evaluation.features import Extractor
from sana.evaluation.folders import one_at_a_time
from sana.evaluation.geneval import Seen
from sana.evaluation.networks import Network, find_network
from sana.evaluation.notes import Notes
from sana.evaluation.plan import Plan
from sana.evaluation.scoring import score_folder
from sana.evaluation.sight import to_levels

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {
        "tag": "colors",
        "include": [{"class": "bench", "count": 1, "color": "red"}],
        "prompt": "a red bench",
    },
]
DPG = """item_id,text,proposition_id,dependency,tuple,question_natural_language
00000,a,1,0,entity - whole (x),Is it skipped?
00001,b,1,0,entity - whole (bench),Is there a bench?
00001,b,2,1,"attribute - color (bench, red)",Is the bench red?
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nets")
    clip_folder(root / "clip"), vqa_folder(root / "blip"), reward_folder(root / "reward")
    return root


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Two of GenEval's prompts with four pictures each, as `sana evaluate draw` leaves them."""
    folder = tmp_path / "drawn"
    for number in range(len(GENEVAL)):
        samples = folder / f"{number:05}" / "samples"
        samples.mkdir(parents=True)
        for index in range(4):
            picture(4 * number + index).save(samples / f"{index:04}.png")
    lines = [json.dumps({**facts, "key": f"{n:05}"}) for n, facts in enumerate(GENEVAL)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    plan = {"pictures": 8, "model": "tiny", "first_request": {"seeds": [3]}}
    (folder / "draw.json").write_text(json.dumps(plan))
    return folder


def make_plan(folder: Path, *metrics: str, **more: Any) -> Plan:
    return Plan(**{"folder": folder, "output": folder, "metrics": metrics, **more})


def fake(name: str) -> Network:
    return Network(role=name, source=name, path=Path(name), sha256=name, is_published=False)


def record_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_clip_and_reward_of_a_folder(nets: Path, drawn: Path) -> None:
    sources = {"clip": str(nets / "clip"), "image-reward": str(nets / "reward")}
    steps: list[str] = []
    path, text = score_folder(
        make_plan(drawn, "clip-score", "image-reward", sources=sources),
        lambda metric, done, total: steps.append(f"{metric} {total}"),
    )
    assert steps == ["clip-score 8"] * 8 + ["image-reward 8"] * 8
    record = record_of(path)
    clip, _ = measures.Clip.load(sources["clip"])
    expected = [
        clip.score(facts["prompt"], [picture(4 * n + i)])[0]
        for n, facts in enumerate(GENEVAL)
        for i in range(4)
    ]
    [first, second] = record["scores"]
    assert first["value"] == pytest.approx(np.mean(expected), rel=1e-5)
    low, high = first["interval_95"]
    assert low <= first["value"] <= high
    assert (first["name"], second["name"]) == ("CLIPScore (clip)", "ImageReward (reward)")
    assert first["networks"][0]["sha256"] == find_network("clip", sources["clip"]).sha256
    assert record["seeds"] == {"first": 3, "count": 8} and record["drawn"]["model"] == "tiny"
    assert (record["pictures"], record["prompts"], first["resampled"]) == (8, 2, 2)
    assert {"torch", "transformers", "python", "numpy"} <= record["versions"].keys()
    assert "| CLIPScore (clip) " in text and path.with_suffix(".md").read_text() == text + "\n"
    assert (drawn / "sheet.png").stat().st_size > 1000
    # The record of a second run stands beside the first.
    again, _ = score_folder(make_plan(drawn, "clip-score", sources={"clip": sources["clip"]}))
    assert again.name == "scores-2.json"


class Eye:
    """A segmenter that finds what the picture's number says; it counts its pictures."""

    def __init__(self, found: Callable[[int], dict[str, list[Seen]]]) -> None:
        self.found, self.calls = found, 0

    def find(self, image: Image.Image) -> dict[str, list[Seen]]:
        number = next(n for n in range(8) if picture(n).tobytes() == image.tobytes())
        self.calls += 1
        return self.found(number)


def watch(monkeypatch: pytest.MonkeyPatch, eye: Eye) -> None:
    """GenEval with recorded detections, and a colour that is red for the odd pictures."""

    class Namer:
        def __init__(self, _: Any) -> None:
            pass

        def __call__(self, image: Image.Image, name: str, objects: list[Seen]) -> list[str]:
            number = next(n for n in range(8) if picture(n).tobytes() == image.tobytes())
            return ["red" if number % 2 else "blue"] * len(objects)

    monkeypatch.setattr(
        measures.Segmenter, "load", lambda *_, **__: (eye, fake("detector")), raising=True
    )
    monkeypatch.setattr(measures.Clip, "load", lambda *_, **__: (None, fake("clip")))
    monkeypatch.setattr(measures.geneval, "ColorNamer", Namer)


SOURCES = {"detector": "d", "clip": "c"}


def test_geneval_by_hand(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Seen(box=(0, 0, 9, 9), score=0.8)
    eye = Eye(lambda number: {} if number == 0 else {"bench": [bench]})
    watch(monkeypatch, eye)
    path, text = score_folder(make_plan(drawn, "geneval", sources=SOURCES))
    [score] = record_of(path)["scores"]
    # Three of four benches, two of four red ones; the mean of the kinds.
    parts = {name: part["value"] for name, part in score["parts"].items()}
    assert parts == {"single_object": 0.75, "colors": 0.5}
    assert score["value"] == 0.625
    assert score["name"] == "GenEval (detector, clip)" and "2 of 6 kinds" in score["protocol"]
    assert "| single_object " in text
    notes = (drawn / ".scores" / "geneval.jsonl").read_text().splitlines()
    assert json.loads(notes[1]) == ["00000/samples/0000.png", ["expected 1 bench, found 0"]]


def test_a_killed_run_goes_on(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eye = Eye(lambda number: {"bench": [Seen(box=(0, 0, 9, 9), score=0.8)]})
    watch(monkeypatch, eye)
    plan = make_plan(drawn, "geneval", sources=SOURCES)

    def kill(metric: str, done: int, total: int) -> None:
        if eye.calls == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_folder(plan, kill)
    assert not (drawn / "scores.json").exists()
    with (drawn / ".scores" / "geneval.jsonl").open("a") as file:
        file.write('["00001/samples/0003.png", ["cut o')
    path, _ = score_folder(plan)
    assert eye.calls == 8 and record_of(path)["scores"][0]["value"] == 0.75
    score_folder(plan)
    assert eye.calls == 8
    # A changed picture is a changed folder.
    (drawn / "00000" / "samples" / "0000.png").unlink()
    picture(0).save(drawn / "00000" / "samples" / "0000.png")
    score_folder(plan)
    assert eye.calls == 16


class Oracle:
    """Answers by rote."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.sizes: list[tuple[int, int]] = []

    def answer(self, image: Image.Image, questions: list[str]) -> list[str]:
        self.sizes.append(image.size)
        return [self.answers[question] for question in questions]


def test_dpg_by_hand(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "dpg_bench.csv"
    table.write_text(DPG + "00000,a,2,1,other - text (x),Asks for the skipped one?\n")
    oracle = Oracle({"Is there a bench?": "no", "Is the bench red?": "yes"})
    monkeypatch.setattr(measures.Answerer, "load", lambda *_, **__: (oracle, fake("blip")))
    plan = make_plan(drawn, "dpg", sources={"vqa": "v"}, questions=table)
    path, text = score_folder(plan)
    [score] = record_of(path)["scores"]
    # The child of a no is zeroed; by category it is not. The first prompt cannot be asked.
    assert (score["value"], score["pictures"], score["parts"]["prompts_left_out"]) == (0, 4, 1)
    values = {n: p["value"] for n, p in score["parts"].items() if isinstance(p, dict)}
    assert values == {
        "attribute": 100,
        "attribute - color": 100,
        "entity": 0,
        "entity - whole": 0,
    }
    assert score["name"] == "DPG-Bench (blip)" and oracle.sizes == [(64, 48)] * 4
    short = tmp_path / "short.csv"
    short.write_text("\n".join(DPG.splitlines()[:3]).replace("00001", "00009") + "\n")
    with pytest.raises(RequestError, match="2 prompts have no question in .*first being 00000"):
        score_folder(make_plan(drawn, "dpg", sources={"vqa": "v"}, questions=short))


def test_dpg_of_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "grids"
    folder.mkdir()
    picture(0, (64, 64)).save(folder / "00001.png")
    (folder / "prompts.jsonl").write_text('{"key": "00001", "prompt": "b"}\n')
    table = tmp_path / "dpg_bench.csv"
    table.write_text(DPG)
    oracle = Oracle({"Is there a bench?": "yes", "Is the bench red?": "no"})
    monkeypatch.setattr(measures.Answerer, "load", lambda *_, **__: (oracle, fake("blip")))
    plan = make_plan(folder, "dpg", sources={"vqa": "v"}, questions=table, grid=32)
    path, _ = score_folder(plan)
    assert record_of(path)["scores"][0]["value"] == 50
    assert oracle.sizes == [(32, 32)] * 4


def test_every_network_runs_from_its_folder(
    nets: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmenter, "SHORT", 64)
    table = tmp_path / "dpg_bench.csv"
    table.write_text(DPG.replace("00000,a", "00002,a") + "00000,a,1,0,global - (),Is it a fox?\n")
    sources = {
        "clip": str(nets / "clip"),
        "detector": str(segmenter_folder(tmp_path / "mask2former")),
        "vqa": str(nets / "blip"),
    }
    path, _ = score_folder(make_plan(drawn, "geneval", "dpg", sources=sources, questions=table))
    names = [score["name"] for score in record_of(path)["scores"]]
    assert names == ["GenEval (mask2former, clip)", "DPG-Bench (blip)"]


def means(monkeypatch: pytest.MonkeyPatch, *, is_published: bool = False) -> None:
    """Features are the mean colour; 3 of them, so that 4 pictures are enough."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) * self.weight

    extractor = Extractor(module=Mean(), label="mean colour", width=3, prepare=to_levels)
    network = Network(
        role="features", source="f", path=Path("f"), sha256="f", is_published=is_published
    )
    monkeypatch.setattr(measures, "load_extractor", lambda *_, **__: (extractor, network))


def test_distances_are_named_after_their_features(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tmp_path / "real"
    reference.mkdir()
    for number in range(6):
        picture(20 + number).save(reference / f"{number}.png")
    more = {"sources": {"features": "f"}, "reference": reference, "kid_subset": 5}
    means(monkeypatch)
    path, text = score_folder(make_plan(drawn, "fid", "kid", **more))
    fid, kid = record_of(path)["scores"]
    assert (fid["name"], kid["name"]) == (
        "Frechet distance (mean colour)",
        "kernel distance (mean colour)",
    )
    drawn_means = np.array([np.asarray(picture(n)).mean((0, 1)) for n in range(8)])
    real_means = np.array([np.asarray(picture(20 + n)).mean((0, 1)) for n in range(6)])
    gap = ((drawn_means.mean(0) - real_means.mean(0)) ** 2).sum()

    def check(value: float) -> None:
        # Covariances of noise means are small beside 1, and the distance is at least the gap.
        assert gap <= value < gap + 1

    check(fid["value"])
    assert_detects(check, fid["value"] + 1)
    assert "6 reference pictures, pictures as they are" in fid["protocol"]
    means(monkeypatch, is_published=True)
    statistics = drawn / ".scores" / "reference.npz"
    path, _ = score_folder(
        make_plan(drawn, "fid", sources={"features": "f"}, reference=statistics, size=32)
    )
    [score] = record_of(path)["scores"]
    assert score["name"] == "FID" and "cropped to 32" in score["protocol"]


def test_too_few_pictures_are_refused_with_the_number(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tmp_path / "real"
    reference.mkdir()
    picture(1).save(reference / "1.png")
    means(monkeypatch)
    more: dict[str, Any] = {"sources": {"features": "f"}, "reference": reference}
    with pytest.raises(RequestError, match="real holds 1 pictures and fid needs at least 4; draw"):
        score_folder(make_plan(drawn, "fid", **more))
    with pytest.raises(RequestError, match="holds 8 pictures and kid needs at least 1000"):
        score_folder(make_plan(drawn, "kid", **more))
    (drawn / "00001" / "samples" / "0003.png").unlink()
    watch(monkeypatch, Eye(lambda number: {}))
    with pytest.raises(RequestError, match="do not have 4 pictures.*00001 .3 there"):
        score_folder(make_plan(drawn, "geneval", sources=SOURCES))


def test_nan_is_refused(nets: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures.Clip, "score", lambda *_: [math.nan])
    plan = make_plan(drawn, "clip-score", sources={"clip": str(nets / "clip")})
    with pytest.raises(NumericsError, match="clip-score is nan for .*0000.png"):
        score_folder(plan)


def test_bad_folders_are_refused(nets: Path, drawn: Path, tmp_path: Path) -> None:
    sources = {"clip": str(nets / "clip")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="holds no picture"):
        score_folder(make_plan(tmp_path / "empty", "clip-score", sources=sources))
    plan = make_plan(drawn, "clip-score", sources=sources)
    with one_at_a_time(drawn), pytest.raises(RequestError, match="another run is at work"):
        score_folder(plan)
    broken = drawn / "00001" / "samples" / "0002.png"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(RequestError, match="0002.png cannot be read"):
        score_folder(plan)
    broken.unlink()
    picture(1).save(drawn / "stray.png")
    with pytest.raises(RequestError, match="belong to no prompt"):
        score_folder(plan)


def test_notes_of_other_rules_are_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    Notes(path, {"a": 1}).put("x", [0.5])
    assert Notes(path, {"a": 1}).get("x") == [0.5]
    assert Notes(path, {"a": 2}).get("x") is None
    assert Notes(path, {"a": 1}).get("x") is None
    path.write_text('{"a": 1}\nnonsense\n')
    assert Notes(path, {"a": 1}).known == {}


def test_the_command_scores(
    nets: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    given = ["--metrics", "clip-score", "--clip", str(nets / "clip"), "--output", str(output)]
    assert main(["evaluate", "score", str(drawn), *given, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| metric") and lines[-1] == str(output / "scores.json")
    assert sorted(p.name for p in output.iterdir() if not p.name.startswith(".")) == [
        *("scores.json", "scores.md", "sheet.png"),
    ]
    assert main(["evaluate", "score", str(drawn), "--metrics", "fid"]) == 2
    assert "fid needs the network --features" in capsys.readouterr().err
    assert main(["evaluate", "score", str(drawn), *given, "--device", "tpu"]) == 2
    assert "device is 'tpu'" in capsys.readouterr().err


def test_the_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("a red fox\ntwo apples\n")
    given = ["evaluate", "draw", str(prompts), "--output", str(output), "--count", "2"]
    given += ["--model", "tiny", "--steps", "1", "--width", "64", "--height", "64", "--seed", "5"]
    assert main([*given, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(output)]
    assert "4 of 4 drawn here" in captured.err
    assert len(list(output.rglob("*.png"))) == 4
    assert main([*given, "--device", "cpu"]) == 0
    assert "0 of 4 drawn here" in capsys.readouterr().err
    assert main([*given, "--guidance", "2", "--device", "cpu"]) == 2
    assert "holds pictures of another run" in capsys.readouterr().err


def test_sheets_show_the_first_of_each(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(
        scoring,
        "contact_sheet",
        lambda entries, side: shown.extend(entries) or Image.new("L", (1, 1)),
    )
    watch(monkeypatch, Eye(lambda number: {"bench": [Seen(box=(0, 0, 9, 9), score=0.8)]}))
    score_folder(make_plan(drawn, "geneval", sources=SOURCES))
    assert [entry.is_right for entry in shown] == [True, False]
    assert shown[1].text == "a red bench [expected 1 red bench, found blue]"
