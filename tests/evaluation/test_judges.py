"""The judges: right before wrong, prompts that cannot be read, and sources that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from sana.errors import CheckpointError, RequestError
from sana.evaluation import judges
from sana.evaluation.detector import Found
from sana.evaluation.judges import StickerJudge, load_judge
from sana.scaling import Judge
from sana.weights.files import to_bytes, write_whole
from tests.evaluation.small import seen, small_detector, world

PICTURE = Image.new("RGB", (64, 64))


def scored(monkeypatch: pytest.MonkeyPatch, prompt: str, *found: Found) -> float:
    monkeypatch.setattr(judges, "detect", lambda network, pictures: [list(found)])
    [score] = StickerJudge(small_detector(), world())(prompt, [PICTURE])
    return score


def test_right_beats_half_right_beats_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "a photo of a red circle"
    right = scored(monkeypatch, prompt, seen(0, "red"))
    other_color = scored(monkeypatch, prompt, seen(0, "blue"))
    other_thing = scored(monkeypatch, prompt, seen(1, "red"))
    assert right == pytest.approx(1 + 0.99 * 0.9)
    assert other_color == pytest.approx(0.99 * 0.45)
    assert other_thing == 0
    two = scored(monkeypatch, "two circles", seen(0, "red"))
    assert two < 1, "one is not two"


def test_a_prompt_outside_the_grammar_is_refused() -> None:
    with pytest.raises(RequestError, match="cannot be judged by the sticker rules"):
        StickerJudge(small_detector(), world())("an oil painting of Paris", [PICTURE])


def test_only_a_detector_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_whole({path: to_bytes({"a": torch.zeros(1)}, {"kind": "other"})})
    with pytest.raises(CheckpointError, match="'other', not a detector"):
        load_judge("sticker", str(path))
    with pytest.raises(RequestError, match="judge is 'clap'; known are sticker"):
        load_judge("clap", str(path))


def test_a_judge_has_the_shape_of_one() -> None:
    assert isinstance(StickerJudge(small_detector(), world()), Judge)
