"""`sana bench`: what it prints for people and machines, and what it refuses before any work."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sana.cli import bench
from sana.cli.main import main
from sana.errors import NumericsError
from sana.pipelines.pipeline import Pipeline
from sana.pipelines.precision import multiplies_in_bf16

USUAL = "mixed" if multiplies_in_bf16() else "float32"
QUICK = ("--seconds", "0.01", "--device", "cpu")


def data(capsys: pytest.CaptureFixture[str], *line: str) -> Any:
    assert main(["bench", *line, *QUICK, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_stages_add_up_and_the_request_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = data(capsys, "tiny", "--steps", "3", "-W", "96", "--batch", "2")
    [row] = found["models"]
    asked = ("model", "width", "height", "steps", "guidance", "batch", "dtype")
    assert [row[name] for name in asked] == ["tiny", 96, 64, 3, 4.5, 2, USUAL]
    stages = {stage: spread["median_ms"] for stage, spread in row["stages"].items()}
    parts = stages["text"] + stages["steps"] + stages["decode"]
    assert parts == pytest.approx(stages["whole"], rel=0.5)
    assert row["pictures_per_second"] == pytest.approx(2000 / stages["whole"], rel=0.01)
    assert row["first_ms"] > 0 and row["load_ms"] > 0 and row["peak_bytes"] > 2**20
    assert found["failed"] == [] and found["threads"] >= 1


def test_people_get_a_block_for_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tiny", "tiny-sprint", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("sana ") and "torch" in lines[0]
    for name, steps in (("tiny", 2), ("tiny-sprint", 2)):
        [place] = [i for i, line in enumerate(lines) if line.startswith(f"{name}, 64 x 64")]
        assert f"{steps} steps" in lines[place] and f"{USUAL} on cpu" in lines[place]
        stages = [line.split()[0] for line in lines[place + 2 : place + 6]]
        assert stages == ["text", "steps", "decoding", "in"]
        assert "pictures a second" in lines[place + 7]
    assert lines[-1].endswith(" a picture")
    assert max(map(len, lines)) <= 110


def test_a_process_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(words: list[str], **options: Any) -> Any:
        ran.append(words)
        return subprocess.CompletedProcess(words, 1 if len(ran) > 1 else 0, "", "sana: no\n")

    monkeypatch.setattr(bench.subprocess, "run", run)
    [row] = data(capsys, "tiny", "--cold", "--threads", "1")["models"]
    assert row["cold_ms"] > 0
    words = ran[0]
    assert words[1:4] == ["-m", "sana.cli.main", "generate"]
    assert {"--model", "tiny", "--device=cpu", "--threads=1"} <= set(words)
    assert words[-1] == bench.PROMPT
    assert main(["bench", "tiny", "--cold", *QUICK]) == 1
    assert "a process of its own failed: sana: no" in capsys.readouterr().err


def test_a_model_that_fails_does_not_take_the_others(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", str(tmp_path), "tiny", *QUICK, "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [row["model"] for row in found["models"]] == ["tiny"]
    [failure] = found["failed"]
    assert failure.startswith(f"{tmp_path}: ") and failure in err

    def fail(self: Pipeline, *inputs: Any) -> Any:
        raise NumericsError("3 of 4 values are NaN")

    monkeypatch.setattr(Pipeline, "finish", fail)
    assert main(["bench", "tiny", *QUICK]) == 1
    assert capsys.readouterr() == ("", "sana: tiny: 3 of 4 values are NaN\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["tinny"], "there is no model 'tinny'; did you mean 'tiny'?"),
        (["./nowhere"], "there is nothing at ./nowhere; give a model's name or its folder"),
        (["tiny", "--batch", "0"], "batch is 0; it must be from 1 to 64"),
        (["tiny", "--seconds", "0"], "seconds is 0; it must be over 0 and at most 3600"),
        (["tiny", "--steps", "0"], "steps is 0;"),
        (["tiny", "--width", "70000"], "width is 70000;"),
        (["tiny", "--threads", "0"], "threads is 0;"),
        (["tiny", "--memory", "lots"], "memory is 'lots';"),
        (["tiny", "--device", "tpu"], "device is 'tpu'; it must be cpu, cuda"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    line: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*inputs: Any, **options: Any) -> Any:
        raise AssertionError("it began")

    monkeypatch.setattr(bench, "load_pipeline", load)
    assert main(["bench", "tiny", *line]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sana: ") and said in err and err.count("\n") == 1
