"""`sana doctor`: reads well, is true to what is here, and imports nothing that it need not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sana.cli import doctor
from sana.cli.main import main
from sana.pipelines import placing
from sana.pipelines.memory import parse
from sana.presets import PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
GIB = 2**30
NAMES = [name for name, preset in PRESETS.items() if preset.source != "random"]


def report(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["doctor", *flags]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def facts(capsys: pytest.CaptureFixture[str], *flags: str) -> Any:
    return json.loads(report(capsys, "--json", *flags))


def test_the_report_names_versions_devices_extras_and_every_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = report(capsys).splitlines()
    assert f"torch {torch.__version__}" in lines[0]
    assert "Devices" in lines
    assert "Extras" in lines
    for name in NAMES:
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(("fits", "in tiles", "offloaded", "does not fit"))
    assert max(map(len, lines)) <= 110, "a terminal shows it without wrapping"


def test_more_memory_never_fits_less(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = {"no": 0, "offloaded": 1, "tiled": 1, "resident": 2}
    before = dict.fromkeys(NAMES, 0)
    for size in ("500MiB", "2GiB", "6GiB", "24GiB"):
        rows = {row["name"]: row for row in facts(capsys, "--memory", size)["models"]}
        assert list(rows) == NAMES
        for name, row in rows.items():
            assert row["fits"] != "no" or row["least"] > parse(size)
            assert row["fits"] != "resident" or row["resident"] <= parse(size)
            assert ranks[row["fits"]] >= before[name]
        before = {name: ranks[row["fits"]] for name, row in rows.items()}
    assert set(before.values()) == {2}
    assert facts(capsys, "--memory", "500MiB")["models_on"] == "a card with 500MiB"


def test_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: tuple(requirement.split(">=")[0] for requirement in requirements)
        for name, requirements in project["optional-dependencies"].items()
        if name != "dev"
    }
    assert extras == doctor.EXTRAS


def test_a_missing_extra_comes_with_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "peft" else find(name))
    assert "lora    without peft: pip install 'sana-torch[lora]'" in report(capsys)
    assert facts(capsys)["extras"]["lora"]["install"] == "pip install 'sana-torch[lora]'"


def test_graphics_cards_are_listed_and_the_first_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [
        SimpleNamespace(name="Old", major=7, minor=5, total_memory=6 * GIB),
        SimpleNamespace(name="New", major=9, minor=0, total_memory=80 * GIB),
    ]
    free = {"cpu": 9 * GIB, "cuda:0": 5 * GIB, "cuda:1": 79 * GIB, "mps": 8 * GIB}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(placing, "free_memory", lambda device: free[device])
    found = facts(capsys)
    assert [device["name"] for device in found["devices"]] == ["cpu", "mps", "cuda:1", "cuda:0"]
    assert found["models_on"] == "cuda:0"
    rows = {row["name"]: row for row in found["models"]}
    assert rows["sana1.5-1600m-1024"]["dtype"] == "fp32", "no bf16 before Ampere"
    assert rows["sana1.5-1600m-1024"]["fits"] == "offloaded"
    text = report(capsys)
    assert "cuda:1  New, compute capability 9.0; 79.0 GiB of 80.0 GiB free; computes in " in text


def test_nothing_is_imported_that_only_a_graphics_card_needs() -> None:
    code = (
        "import sys; from sana.cli.main import main; code = main(['doctor', '--json']);"
        "print({'triton', 'transformers', 'diffusers', 'peft', 'h5py'} & set(sys.modules), code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"},
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "set() 0"
