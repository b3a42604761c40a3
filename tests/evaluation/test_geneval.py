"""GenEval's rules on recorded detections, its colours, the segmenter, on hand-made cases."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.tinies import clip_folder, picture, segmenter_folder
from numerics import assert_detects, assert_matches
from sana.errors import CheckpointError, MissingExtra, RequestError
from sana.evaluation.clip import Clip
from sana.evaluation.geneval import (
    COLORS,
    ColorNamer,
    Seen,
    check_facts,
    crop,
    judge,
    keep,
    places,
)
from sana.evaluation.segmenter import CLASSES, Segmenter, instances, prepare

LEFT, RIGHT, TOP = (0, 40, 20, 60), (80, 40, 100, 60), (40, 0, 60, 20)


def seen(score: float = 0.8, box: Sequence[float] = LEFT) -> Seen:
    return Seen(box=tuple(map(float, box)), score=score)  # type: ignore[arg-type]


def clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def colors(*names: str) -> Any:
    return lambda _, objects: names[: len(objects)]


def test_what_is_kept() -> None:
    found = {"fox": [seen(0.31), seen(0.3), seen(0.95)], "bench": [seen(0.2)]}
    assert [s.score for s in keep(found, "colors")["fox"]] == [0.95, 0.31]
    assert [s.score for s in keep(found, "counting")["fox"]] == [0.95]
    assert list(keep(found, "colors")) == ["fox"]
    many = {"fox": [seen(0.4 + i / 100) for i in range(20)]}
    assert [s.score for s in keep(many, "colors")["fox"]][::15] == pytest.approx([0.59, 0.44])


@pytest.mark.parametrize(
    ("include", "exclude", "objects", "fault"),
    [
        ([clause("fox")], [], {"fox": [seen()]}, ""),
        ([clause("fox")], [], {"bench": [seen()]}, "expected 1 fox, found 0"),
        ([clause("fox"), clause("bench")], [], {"fox": [seen()]}, "expected 1 bench, found 0"),
        # Counting: as many, and the exclude clause says not one more.
        ([clause("fox", 2)], [clause("fox", 3)], {"fox": [seen()] * 2}, ""),
        ([clause("fox", 2)], [clause("fox", 3)], {"fox": [seen()]}, "expected 2 fox, found 1"),
        (
            [clause("fox", 2)],
            [clause("fox", 3)],
            {"fox": [seen()] * 3},
            "expected fewer than 3 fox, found 3",
        ),
        # More than asked for is right where nothing excludes it.
        ([clause("fox")], [], {"fox": [seen()] * 5}, ""),
        # Colours: here the surest fox is red, the next blue.
        ([clause("fox", color="red")], [], {"fox": [seen(), seen()]}, ""),
        (
            [clause("fox", color="blue")],
            [],
            {"fox": [seen(), seen()]},
            "expected 1 blue fox, found red",
        ),
        (
            [clause("fox", 2, color="red")],
            [],
            {"fox": [seen(), seen()]},
            "expected 2 red fox, found red, blue",
        ),
        (
            [clause("bench"), clause("fox", position=["left of", 0])],
            [],
            {"bench": [seen(box=RIGHT)], "fox": [seen(box=LEFT)]},
            "",
        ),
        (
            [clause("bench"), clause("fox", position=["right of", 0])],
            [],
            {"bench": [seen(box=RIGHT)], "fox": [seen(box=LEFT)]},
            "expected fox right of, found left of",
        ),
        # Only the surest fox is looked at.
        (
            [clause("bench"), clause("fox", position=["above", 0])],
            [],
            {"bench": [seen(box=RIGHT)], "fox": [seen(0.9, LEFT), seen(0.8, TOP)]},
            "expected fox above, found left of",
        ),
        (
            [clause("bench"), clause("fox", position=["above", 0])],
            [],
            {"fox": [seen()]},
            "expected 1 bench, found 0; nothing for fox to be above",
        ),
    ],
)
def test_rules(include: Any, exclude: Any, objects: Any, fault: str) -> None:
    facts = {"include": include, "exclude": exclude}
    assert "; ".join(judge(facts, objects, colors("red", "blue"))) == fault


def test_places_by_hand() -> None:
    assert places(LEFT, RIGHT) == {"left of"} and places(RIGHT, LEFT) == {"right of"}
    # Offset (0, -40), both heights 20: (40 - 4) / 40 = 0.9.
    assert places(TOP, (40, 40, 60, 60)) == {"above"}
    assert places((40, 40, 60, 60), TOP) == {"below"}
    # Offset 4, both widths 20, of which a tenth each is 4: nothing is left.
    assert places((4, 0, 24, 20), (0, 0, 20, 20)) == set()
    # Offset 6: (6 - 4) / 6 = 0.33, under a half.
    assert places((6, 0, 26, 20), (0, 0, 20, 20)) == set()
    # Offset 8.1: 4.1 / 8.1 = 0.506.
    assert places((8.1, 0, 28.1, 20), (0, 0, 20, 20)) == {"right of"}
    # On a diagonal both hold: (60 - 4) / 84.9 = 0.66. The sizes lost are not in the divisor.
    assert places((60, 60, 80, 80), (0, 0, 20, 20)) == {"right of", "below"}


def test_lines_are_checked() -> None:
    good = {"tag": "position", "include": [clause("a"), clause("b", position=["above", 0])]}
    check_facts(good, "00000")
    for bad in (
        {**good, "tag": "scene"},
        {**good, "include": []},
        {**good, "include": [{"class": "a"}]},
    ):
        with pytest.raises(RequestError, match="prompt 00000 is none of GenEval's"):
            check_facts(bad, "00000")
    with pytest.raises(RequestError, match="position"):
        check_facts({**good, "include": [clause("b", position=["above", 0])]}, "00000")


def test_objects_are_cut_out_on_grey() -> None:
    image = Image.new("RGB", (8, 6), "red")
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:4, 3:5] = True
    cut = crop(image, Seen(box=(2.0, 1.0, 6.0, 5.0), score=1, mask=mask))
    assert cut.size == (4, 4)
    assert cut.getpixel((0, 0)) == (0x99,) * 3 and cut.getpixel((1, 1)) == (255, 0, 0)
    assert crop(image, Seen(box=(0.0, 0.0, 2.0, 2.0), score=1)).getpixel((0, 0)) == (255, 0, 0)


def test_colors_are_the_nearest_of_ten(tmp_path: Path) -> None:
    clip, _ = Clip.load(str(clip_folder(tmp_path)))
    image, objects = picture(size=(40, 40)), [seen(box=(0, 0, 20, 20)), seen(box=(20, 0, 40, 40))]
    namer = ColorNamer(clip)
    named = namer(image, "fox", objects)
    for each, name in zip(objects, named, strict=True):
        [look] = clip.images([crop(image, each)])
        cosines = []
        for color in COLORS:
            sentences = [f"a photo of a {color} fox", f"a photo of a {color}-colored fox"]
            text = clip.texts([*sentences, f"a photo of a {color} object"]).mean(0)
            cosines.append((look @ text / text.norm()).item())
        assert name == COLORS[int(np.argmax(cosines))]
    assert namer(image, "fox", objects) == named and list(namer.known) == ["fox"]


def test_instances_by_hand() -> None:
    """Two queries on a 4 x 4 map of an 8 x 8 input, of which 8 x 6 is the picture (16 x 12)."""
    classes = torch.log(torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.05, 0.9]]))
    masks = torch.full((2, 4, 4), -4.0)
    masks[0, :, :2] = math.log(3)  # probability 0.75

    def check(logits: torch.Tensor) -> None:
        [(label, found)] = instances(classes, logits, (8, 8), (8, 6), (16, 12))
        assert label == 0 and found.mask is not None
        assert found.mask[:, :6].all() and not found.mask[:, 9:].any()
        x0, y0, x1, y1 = found.box
        assert (x0, y0, y1) == (0, 0, 16) and 6 <= x1 <= 9
        # 0.6 times nearly 0.75, less at the soft edge.
        assert 0.6 * 0.65 < found.score < 0.6 * 0.75

    check(masks)
    assert_detects(check, masks.flip(2))
    # 0.3 is not over the threshold; 0.301 of the same query is a second object.
    more = torch.log(torch.tensor([[0.55, 0.301, 0.149]]))
    assert [label for label, _ in instances(more, masks[:1], (8, 8), (8, 8), (8, 8))] == [0, 1]
    empty = torch.full((1, 4, 4), -1.0)
    assert instances(more, empty, (8, 8), (8, 8), (8, 8)) == []


def test_pictures_are_scaled_and_padded() -> None:
    pixels, inner = prepare(Image.new("RGB", (100, 50), (124, 116, 104)))
    # 800 / 50 = 16 would make the long side 1600; 1333 / 100 is the smaller scale.
    assert inner == (667, 1333) and pixels.shape == (3, 672, 1344)
    by_hand = (torch.tensor([124.0, 116, 104]) - torch.tensor([123.675, 116.28, 103.53])) / (
        torch.tensor([58.395, 57.12, 57.375])
    )
    assert_matches(by_hand, pixels[:, 600, 1300], 1e-6)
    assert (pixels[:, 667:] == 0).all() and (pixels[:, :, 1333:] == 0).all()


def test_segmenter_runs_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.evaluation.segmenter.SHORT", 96)
    folder = segmenter_folder(tmp_path / "tiny-mask2former")
    segmenter, network = Segmenter.load(str(folder))
    assert network.name("GenEval") == "GenEval (tiny-mask2former)"
    image = picture(size=(60, 40))
    found = segmenter.find(image)
    assert found and set(found) <= set(CLASSES)
    for objects in found.values():
        for each in objects:
            assert each.mask is not None and each.mask.shape == (40, 60)
            assert 0 <= each.score <= 1
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): f"thing {i}" for i in range(80)}
    config["label2id"] = {v: int(k) for k, v in config["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="knows 80 classes, the first being 'thing 0'"):
        Segmenter.load(str(folder))


def test_scipy_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtra, match=r"sana-torch\[eval\]"):
        Segmenter.load("any")


def test_classes_are_genevals() -> None:
    assert len(CLASSES) == 80
    assert (CLASSES[0], CLASSES[64], CLASSES[79]) == ("person", "computer mouse", "toothbrush")
    assert CLASSES[9] == "traffic light"
