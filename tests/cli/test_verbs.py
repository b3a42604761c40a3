"""`sana info` on models, the thin verbs, and the whole command once with nothing replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sana.cli.main import main
from sana.errors import TrainingError
from sana.presets import PRESETS, preset

SOURCE = str(Path(__file__).parents[2] / "src")


def test_info_lists_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)


def test_info_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "sana-600m-512"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["source"] == preset("sana-600m-512").source
    assert fields["config"]["dit"]["width"] == preset("sana-600m-512").config.dit.width
    assert main(["info", "sana-600m-51"]) == 2
    assert "did you mean 'sana-600m-512'" in capsys.readouterr().err


def test_info_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sana.weights.save import save
    from standins import tiny_components

    made = tiny_components()
    quality = {"psnr": 38.1}
    save(tmp_path, config=made.config, dit=made.dit, recipe="r", quality=quality)
    assert main(["info", str(tmp_path)]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert (fields["recipe"], fields["quality"]) == ("r", quality)
    assert fields["config"]["name"] == "tiny"


def test_info_of_a_folder_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"sana: {tmp_path} has no transformer")


def test_info_tables_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    from sana.presets import AUTOENCODERS

    assert main(["info", "--models"]) == 0
    out = capsys.readouterr().out
    firsts = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert {*PRESETS, *AUTOENCODERS} <= firsts
    [row] = [line for line in out.splitlines() if line.startswith("sana-600m-1024 ")]
    assert row.split()[1:4] == ["0.6B", "1024", "fp16"]
    assert "20 steps, dpm, guidance 4.5, shift 4" in row and "Sana_600M_1024px" in row
    [sprint] = [line for line in out.splitlines() if line.startswith("sana-sprint-1600m-1024 ")]
    assert "2 steps, scm, guidance 4.5" in sprint and "shift" not in sprint
    assert "NVIDIA License" in out and "Gemma Terms of Use" in out


def test_info_of_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What tensors show, for files of others; a pickle is named as one."""
    import safetensors.torch

    from sana.weights.keys import from_ours
    from weights.networks import DCAES, random_tensors

    file = tmp_path / "vae.safetensors"
    config = DCAES["sana"]
    safetensors.torch.save_file(from_ours(random_tensors(config), "original", config), file)
    assert main(["info", str(file)]) == 0
    fields = json.loads(capsys.readouterr().out)["autoencoder"]
    assert fields["layout"] == "original" and fields["config"]["latent_scale"] == [0.41407]
    file.write_bytes(b"\x80\x04\x95")
    assert main(["info", str(file)]) == 1
    assert "is a Python pickle" in capsys.readouterr().err


def test_train_passes_recipe_and_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    import sana.training.run

    seen: list[Any] = []
    monkeypatch.setattr(sana.training.run, "run", lambda *given: seen.append(given))
    assert main(["train", "sticker-512", "steps=3", "data.pack=tiny"]) == 0
    assert seen == [("sticker-512", ["steps=3", "data.pack=tiny"])]


@pytest.mark.parametrize(
    "error, code", [(TrainingError("no recipe 'x'"), 1), (KeyboardInterrupt(), 130)]
)
def test_a_failed_training_is_one_message(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sana.training.run

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(sana.training.run, "run", fail)
    assert main(["train", "x"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_data_stickers_builds_the_pack_and_its_sheets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sana.data.stickers import pack, sprites
    from sana.data.stickers.tiny import tiny_world

    def build(target: Path, *, report: Callable[[str], None]) -> None:
        report("fetching")
        target.write_text("pack")

    monkeypatch.setattr(pack, "build_pack", build)
    monkeypatch.setattr(sprites, "load_world", lambda path, avatars: tiny_world())
    path = tmp_path / "stickers.pack"
    assert main(["data", "stickers", "--output", str(path)]) == 0
    assert capsys.readouterr() == (f"{path}\n", "fetching\n")
    assert main(["data", "stickers", "--output", str(path), "--sheet", str(tmp_path / "s")]) == 0
    sheets = [tmp_path / "s" / f"{style}-1.png" for style in tiny_world().styles]
    assert capsys.readouterr().out.split() == [str(path), *map(str, sheets)]
    with Image.open(sheets[0]) as image:
        assert image.size == (16 * 96, 96 + 14)
        assert len(image.getcolors(1 << 24) or []) > 100


@pytest.mark.slow
def test_the_real_command_makes_the_same_picture_again(tmp_path: Path) -> None:
    code = (
        "from sana.cli.main import main\n"
        "assert main(['generate', 'a red fox', '--model', 'tiny', '--threads', '1']) == 0\n"
        "assert main(['generate', '--again', 'sana-a-red-fox-0.png']) == 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sana-a-red-fox-0.png", "sana-a-red-fox-0-2.png"]
    first, again = (tmp_path / name for name in done.stdout.split())
    assert first.read_bytes() == again.read_bytes()
