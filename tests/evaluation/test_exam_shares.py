"""The sticker exam in several processes, and the six pictures that it shows."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.small import CPU, DEPTHS, WIDTHS, case, seen, small_detector, studio
from numerics import assert_detects
from sana import distributed
from sana.data.stickers.prompts import PromptCase
from sana.distributed import Place
from sana.evaluation import detector as files
from sana.evaluation.exam import Exam, score_stickers
from sana.evaluation.exam_sheets import six
from sana.evaluation.sample import Settings
from sana.evaluation.stickers import Verdict
from sana.models.detector import Detector
from sana.training.config import DataConfig, TrainConfig
from sana.training.tasks.detector import DetectorTask


def sit(place: Place, folder: str, output: str) -> None:
    """An exam of the tiny model; the first process leaves its record in `output`."""
    files.Detector = lambda concepts, colors: Detector(  # type: ignore[assignment, misc]
        concepts, colors, widths=WIDTHS, depths=DEPTHS
    )
    exam = Exam(
        model="tiny",
        detector=f"{folder}/detector.safetensors",
        pack="tiny",
        output=Path(folder) / output,
        count=6,
        seeds=2,
        pictures=2,
        settings=Settings(steps=1, guidance=1.0, size=64, batch=1),
    )
    score_stickers(exam, place=place)


def sit_in_process(rank: int, world: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with distributed.session("cpu") as place:
        sit(place, folder, "two")


def test_two_processes_make_the_record_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "Detector", Detector)
    data = DataConfig(pack="tiny", size=256, batch=4)
    plan = TrainConfig(recipe="test", task="detector", model="tiny", steps=1, data=data)
    place = Place(rank=0, world=1, device=CPU)
    DetectorTask(plan, studio(), place, small_detector()).export(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(sit_in_process, (2, str(tmp_path), port), nprocs=2)
    sit(place, str(tmp_path), "one")

    def record(name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((tmp_path / name / "scores.json").read_text())[
            "scores"
        ]
        return found

    def check(scores: list[dict[str, Any]]) -> None:
        assert scores == record("one")

    assert [score["metric"] for score in record("two")][-2:] == ["psnr", "ssim"]
    check(record("two"))
    assert_detects(check, record("two")[::-1])
    pictures = [
        sorted(
            (str(p.relative_to(tmp_path / name)), p.read_bytes())
            for p in (tmp_path / name).rglob("0*.png")
        )
        for name in ("one", "two")
    ]
    assert len(pictures[0]) == 20 and pictures[0] == pictures[1]


def test_six_pictures_are_the_best_and_the_typical_failures() -> None:
    def verdict(asked: PromptCase, score: float, fault: str = "") -> Verdict:
        found = dataclasses.replace(seen(3), score=score)
        return Verdict(case=asked, seed=0, fault=fault, found=(found,))

    single, two = case("single", (3, None, 1)), case("two", (3, None, 1))
    verdicts = [
        verdict(single, 0.9),
        verdict(single, 0.95),
        verdict(two, 0.7),
        verdict(two, 0.8),
        verdict(two, 0.9, "no fox"),
        verdict(two, 0.5, "no fox"),
        verdict(two, 0.4, "no fox"),
    ]

    def check(numbers: list[int]) -> None:
        # Of "two", which fails most, first; the failure is the one in the middle.
        assert numbers == [3, 1, 5]

    check(six(verdicts))
    assert_detects(check, six(verdicts[::-1]))
