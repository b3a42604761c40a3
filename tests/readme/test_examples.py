"""The example programs run on `tiny` and its kin, and each is short enough to read at a glance."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def main(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def levels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_every_example_is_short_and_run() -> None:
    programs = sorted(path.name for path in EXAMPLES.glob("*.py"))
    own = Path(__file__).read_text() + (Path(__file__).parent / "test_readme.py").read_text()
    for program in programs:
        assert f'"{program}"' in own
        assert len((EXAMPLES / program).read_text().splitlines()) < 60


def test_image_to_image(photo: Path, tmp_path: Path) -> None:
    main("image_to_image.py")(photo, "a fox", tmp_path / "out", model="tiny", steps=3)
    assert len(os.listdir(tmp_path / "out")) == 3


def test_inpaint(photo: Path, tmp_path: Path) -> None:
    main("inpaint.py")(photo, "a fox", tmp_path / "out.png", model="tiny", steps=2)
    before, after = levels(photo), levels(tmp_path / "out.png")
    assert np.array_equal(before[:, :32], after[:, :32])
    assert not np.array_equal(before[:, 32:], after[:, 32:])


def test_controlnet(photo: Path, tmp_path: Path) -> None:
    main("controlnet.py")(photo, "a fox", tmp_path / "out.png", "tiny-controlnet", steps=5)
    assert levels(tmp_path / "out.png").shape == (64, 64, 3)


def test_sprint(tmp_path: Path) -> None:
    main("sprint.py")("a fox", tmp_path / "out", "tiny-sprint")
    pictures = [levels(tmp_path / "out" / f"steps-{count}.png") for count in (1, 2, 4)]
    assert not np.array_equal(pictures[0], pictures[1])


def test_lora(tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    weights = {
        f"{layer}.lora_A.weight": torch.ones(2, 64),
        f"{layer}.lora_B.weight": torch.ones(64, 2),
    }
    save_file(weights, tmp_path / "a.safetensors")
    out = tmp_path / "out"
    main("lora.py")(tmp_path / "a.safetensors", "a fox", out, "tiny", steps=2)
    assert sorted(os.listdir(out)) == ["scale-0.5.png", "scale-1.0.png", "without.png"]
    assert not np.array_equal(levels(out / "without.png"), levels(out / "scale-1.0.png"))
