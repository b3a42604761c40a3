"""The detector learns one batch, finds what it learned, and its file refuses another world."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evaluation.small import CPU, DEPTHS, WIDTHS, case, judge, small_detector, studio, world
from numerics import assert_detects, assert_matches
from sana.data.stickers.prompts import PromptCase
from sana.data.stickers.scene import COLORS, Dice
from sana.distributed import Place
from sana.errors import CheckpointError
from sana.evaluation import detector as files
from sana.evaluation.detector import detect, load
from sana.evaluation.stickers import _STREAM, render_truth, score, truth_scene
from sana.models.detector import Detector, Peaks, _without_doubles, fit, overlap
from sana.training.config import DataConfig, TrainConfig
from sana.training.softening import _gaussian, soften
from sana.training.tasks.detector import (
    Batch,
    DetectorScenes,
    DetectorTask,
    Targets,
    heat_loss,
    to_targets,
)

CONFIG = TrainConfig(
    recipe="test",
    task="detector",
    model="tiny",
    steps=1,
    data=DataConfig(pack="tiny", size=256, batch=4),
)
PLACE = Place(rank=0, world=1, device=CPU)


def _task(network: Detector | None = None) -> DetectorTask:
    return DetectorTask(CONFIG, studio(), PLACE, network or small_detector())


@pytest.mark.slow
def test_overfits_one_batch_and_judges_it() -> None:
    torch.manual_seed(0)
    cases = [case("colors", (0, "red", 1)), case("two", (1, None, 1), (5, None, 1))]
    cases += [case("counting", (3, None, 3)), case("counting", (9, "blue", 2))]
    network = small_detector()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.3
    phase = _task(network).phases[0]
    pictures = render_truth(cases, judge(network))
    targets = _truth_targets(cases)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (50 - step) / 25)
        generator = torch.Generator().manual_seed(step)
        losses = phase.loss(Batch(pictures, targets), generator)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()

    def check(sight: Tensor) -> None:
        verdicts = score(sight, cases, judge(network))
        assert [verdict.fault for verdict in verdicts] == [""] * 4

    check(pictures)
    assert network.training
    assert_detects(check, pictures.roll(1, 0))
    found = detect(network.eval(), pictures[:1])[0][0]
    expected = targets.box[0, :1]
    shared = overlap(torch.tensor([found.box]), expected).item()
    print(f"overlap {shared:.3f}")
    assert shared > 0.6


def test_items_are_repeatable_and_judged() -> None:
    data = DetectorScenes(studio().composer, count=40, seed=0)
    first, again, other = data[3], data[3], data[4]
    assert torch.equal(first.scenes.square, again.scenes.square)
    assert not torch.equal(first.scenes.square, other.scenes.square)
    real = first.targets.concept >= 0
    assert real.any(1).all()
    assert torch.equal(real, first.scenes.sprite >= 0)
    # The main style's sprites come first in the tiny world.
    assert (first.scenes.sprite < 12).all()
    boxes = first.targets.box[real]
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= 1


def test_named_and_natural_colors_are_one_target() -> None:
    composer = studio().composer
    scenes = [composer.draw(i, seed=0, kind="scene") for i in range(50)]
    targets = to_targets(composer.concepts, scenes)
    for row, scene in enumerate(scenes):
        for column, placed in enumerate(scene.objects):
            natural = composer.concepts[placed.concept].color
            seen = placed.color or natural
            expected = COLORS.index(seen) if seen in COLORS else len(COLORS)
            assert targets.color[row, column] == expected


def test_softening_moves_boxes_with_their_pixels() -> None:
    pictures = torch.full((3, 3, 256, 256), -0.8)
    pictures[..., 64:160, 96:200] = 0.8
    boxes = torch.tensor([96.0, 64, 200, 160]).div(256).expand(3, 1, 4)

    def check(boxes: Tensor) -> None:
        moved, after = soften(pictures, boxes, torch.Generator().manual_seed(1))
        assert moved.min() >= -1 and moved.max() <= 1
        for picture, box in zip(moved.mean(1) > 0, after[:, 0], strict=True):
            rows, columns = picture.any(1).nonzero(), picture.any(0).nonzero()
            drawn = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert overlap(drawn / 256, box) > 0.9

    check(boxes)
    assert_detects(check, boxes + 0.05)


def test_blur_is_a_convolution_with_borders_continued() -> None:
    images, sigma = torch.randn(2, 3, 24, 20, generator=torch.Generator().manual_seed(0)), 2.0
    line = torch.exp(-torch.arange(-4.0, 5).square() / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2

    def convolved(mode: str) -> torch.Tensor:
        padded = torch.nn.functional.pad(images, (4,) * 4, mode=mode)
        return torch.nn.functional.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None])

    found = _gaussian(images, sigma).flatten(0, 1)[:, None]

    def check(expected: torch.Tensor) -> None:
        assert_matches(expected, found, 1e-6)

    check(convolved("replicate"))
    assert_detects(check, convolved("reflect"))


def test_heat_loss_by_hand() -> None:
    box, real = torch.tensor([[[0.25, 0.25, 0.5, 0.5]]]), torch.tensor([[True]])
    heat = torch.full((1, 8, 8), -20.0)
    heat[0, 3, 3] = 20.0
    assert heat_loss(heat, box, real) < 1e-6
    # A cold centre costs -ln p, a hot cell far away the same.
    far = heat.clone()
    far[0, 7, 7] = 4.0
    expected = torch.sigmoid(torch.tensor(4.0)) ** 2 * torch.nn.functional.softplus(
        torch.tensor(4.0)
    )
    assert_matches(expected, heat_loss(far, box, real), 1e-4)
    assert_detects(
        lambda logits: assert_matches(expected, heat_loss(logits, box, real), 1e-4), far * 1.01
    )


def test_doubles_are_struck_out() -> None:
    network = small_detector().eval()
    peaks: Peaks = network.peaks(torch.randn(2, 3, 256, 256), count=5)
    assert peaks.box.shape == (2, 5, 4)
    box = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0, 0.3, 1], [0, 0, 1, 0.8]]]).float()
    score = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    assert_matches(torch.tensor([[0.9, 0, 0.7, 0]]), _without_doubles(score, box), 0)


def test_large_pictures_are_averaged() -> None:
    pictures = torch.rand(2, 3, 512, 512)
    averaged = pictures.unflatten(2, (256, 2)).unflatten(4, (256, 2)).mean((3, 5))
    assert_matches(averaged, fit(pictures), 1e-6)


def test_file_round_trip_and_other_worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_detector()
    _task(network).export(tmp_path)
    monkeypatch.setattr(
        files,
        "Detector",
        lambda concepts, colors: Detector(concepts, colors, widths=WIDTHS, depths=DEPTHS),
    )
    path = tmp_path / "detector.safetensors"
    loaded = load(path, world())
    for name, tensor in network.state_dict().items():
        assert_matches(tensor, loaded.state_dict()[name], 1e-3)
    fewer = dataclasses.replace(world(), concepts=world().concepts[1:])
    with pytest.raises(CheckpointError, match="12 concepts.*with 11.*train it again"):
        load(path, fewer)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="detector.safetensors"):
        load(path, world())


def _truth_targets(cases: Sequence[PromptCase]) -> Targets:
    composer = studio().composer
    scenes = [truth_scene(c, composer, world(), Dice(0, _STREAM, i)) for i, c in enumerate(cases)]
    return to_targets(composer.concepts, scenes)
