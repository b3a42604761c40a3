"""Edges and ControlNet in the pipeline: what is found, how strongly and when it is followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from numerics import assert_detects
from sana.errors import MissingExtra, RequestError
from sana.pipelines import control
from sana.pipelines.control import canny, control_pixels
from sana.pipelines.denoising import control_interval
from sana.pipelines.pipeline import Pipeline
from sana.request import Request
from sana.samplers import flow_times
from standins import tiny_components

WORDS = Request(prompt="a red fox", steps=4, seeds=3)
EDGES = WORDS.replace(control="edges")
IMAGES = {
    "edges": Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny_components("tiny-controlnet"))


def draw(pipeline: Pipeline, request: Request) -> bytes:
    return pipeline.generate(request, IMAGES)[0].tobytes()


def disk(size: int, radius: float, x: float, y: float) -> tuple[Tensor, Tensor]:
    """A soft white disk on black [1,3,S,S], and every pixel's distance from its rim."""
    axis = torch.arange(size).float()
    distance = (axis[None, :] - x).hypot(axis[:, None] - y) - radius
    return (-distance).clamp(-1, 1).expand(1, 3, -1, -1), distance


def test_canny_is_a_closed_thin_line_on_the_rim() -> None:
    pixels, distance = disk(65, 20.3, 31.2, 33.9)

    def check(edges: Tensor) -> None:
        found = edges[0, 0].bool()
        assert distance[found].abs().max() < 1.0
        angles = torch.arange(0, 360, 5).deg2rad()
        x, y = 31.2 + 20.3 * angles.cos(), 33.9 + 20.3 * angles.sin()
        near = torch.nn.functional.max_pool2d(edges, 3, 1, 1)[0, 0]
        assert near[y.round().long(), x.round().long()].all()
        assert 0.9 < found.sum() / (2 * torch.pi * 20.3) < 1.3

    check(canny(pixels))
    assert_detects(check, canny(pixels).roll(2, dims=-1))
    thick = torch.nn.functional.max_pool2d(canny(pixels), 3, 1, 1)
    assert_detects(check, thick)


def test_canny_joins_weak_edges_to_strong_ones_alone() -> None:
    ramp = torch.linspace(0.06, 0.6, 64)[:, None].expand(64, 64).clone()
    ramp[:, :32] = 0.0
    joined = canny((2 * ramp - 1).expand(1, 3, -1, -1))[0, 0]
    faint = canny((2 * ramp[:8] - 1).expand(1, 3, -1, -1))[0, 0]
    assert joined[4:60].any(1).float().mean() > 0.85
    assert not faint.any()
    assert not canny(torch.zeros(1, 3, 16, 16)).any()


def test_detectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = disk(33, 9.0, 16.0, 16.0)[0]
    assert control_pixels(pixels, "none") is pixels
    lines = control_pixels(pixels, "canny")
    assert lines.shape == pixels.shape
    assert set(lines.unique().tolist()) == {-1.0, 1.0}
    monkeypatch.setattr(control, "load_hed", lambda: lambda x: x[:, :1] * 0 + 0.75)
    assert torch.equal(control_pixels(pixels, "hed"), torch.full_like(pixels, 0.5))


def test_hed_without_its_file_says_how_to_make_it(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(MissingExtra, match="sana/hed.safetensors is not there; .*`sana data hed`"):
        draw(pipeline, EDGES.replace(control_detector="hed"))


def test_three_together_are_three_alone_and_a_b_a(pipeline: Pipeline) -> None:
    together = EDGES.replace(seeds=(3, 9, 5), control_detector="canny")
    pictures = [picture.tobytes() for picture in pipeline.generate(together, IMAGES)]
    alone = [draw(pipeline, single) for single in together.singles()]
    assert pictures == alone
    assert_detects(lambda others: check_same(pictures, others), alone[1:] + alone[:1])
    plain = draw(pipeline, WORDS)
    assert draw(pipeline, EDGES) != plain
    assert draw(pipeline, WORDS) == plain


def check_same(first: list[bytes], second: list[bytes]) -> None:
    assert first == second


def test_scale_0_is_text_to_image_and_scale_counts(pipeline: Pipeline) -> None:
    assert draw(pipeline, EDGES.replace(control_scale=0)) == draw(pipeline, WORDS)
    assert draw(pipeline, EDGES.replace(control_scale=0.5)) != draw(pipeline, EDGES)
    both = EDGES.replace(image="edges", strength=0.5)
    assert draw(pipeline, both) != draw(pipeline, both.replace(control=None))


@pytest.mark.parametrize("sampler", ["dpm", "euler"])
@pytest.mark.parametrize(
    "start, end, active",
    [
        (0.0, 1.0, [0, 1, 2, 3]),
        (0.0, 0.5, [0, 1]),
        (0.5, 1.0, [2, 3]),
        (0.25, 0.75, [1, 2]),
        (0.3, 1.0, [2, 3]),
        (0.0, 0.49, [0]),
    ],
)
def test_start_and_end_are_parts_of_the_steps(
    sampler: str, start: float, end: float, active: list[int]
) -> None:
    components = tiny_components("tiny-controlnet")
    steps: list[int] = []
    called: list[int] = []
    residuals, denoise = components.controlnet.residuals, components.dit.denoise

    def spy_residuals(*inputs: Any, **options: Any) -> Any:
        called.append(len(steps))
        return residuals(*inputs, **options)

    def spy(*inputs: Any, **options: Any) -> Any:
        steps.append(0)
        return denoise(*inputs, **options)

    components.controlnet.residuals, components.dit.denoise = spy_residuals, spy
    request = EDGES.replace(control_start=start, control_end=end, sampler=sampler)
    list(Pipeline(components).steps(request, IMAGES))
    assert (len(steps), called) == (4, active)


def test_parts_that_hold_no_step_are_refused() -> None:
    times = flow_times(20, 3.0)
    assert control_interval(times, 0.0, 1.0) == (0.0, 1.0)
    low, high = control_interval(times, 0.5, 0.55)
    assert [bool(low <= t <= high) for t in times.tolist()] == [i == 10 for i in range(21)]
    with pytest.raises(RequestError, match="0.51 and control_end 0.54 hold none of 20 steps; .*05"):
        control_interval(times, 0.51, 0.54)


def test_a_model_without_a_controlnet_refuses_control() -> None:
    with pytest.raises(RequestError, match="control is 'edges' and tiny has no ControlNet; choose"):
        Pipeline(tiny_components()).steps(EDGES, IMAGES)


def test_fingerprint_tells_controlnets_apart(pipeline: Pipeline) -> None:
    components = tiny_components("tiny-controlnet")
    assert Pipeline(components).fingerprint == pipeline.fingerprint
    components.controlnet.control_input.weight.data[0, 0] += 1e-3
    assert Pipeline(components).fingerprint != pipeline.fingerprint
