"""Guidance by perturbed attention, in an interval, and Sprint, as requests to a pipeline."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from numerics import assert_detects, assert_matches
from sana.config import Reference, with_reference
from sana.errors import RequestError
from sana.pipelines.defaults import complete
from sana.pipelines.pipeline import Pipeline
from sana.presets import preset
from sana.request import Request
from standins import tiny_components

FOX = Request(prompt="a red fox", steps=3)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny_components())


@pytest.fixture(scope="module")
def sprint() -> Pipeline:
    return Pipeline(tiny_components("tiny-sprint"))


def last(pipeline: Pipeline, request: Request, **images: Image.Image) -> torch.Tensor:
    return list(pipeline.steps(request, images))[-1].latent


@pytest.mark.parametrize(
    "change",
    [
        {"pag_scale": 2.0},
        {"pag_scale": 2.0, "guidance": 1.0},
        {"pag_scale": 2.0, "pag_blocks": (0,)},
        {"guidance_interval": (0.7, 1.0)},
        {"guidance_interval": (0.7, 1.0), "pag_scale": 2.0, "guidance": 1.0},
    ],
    ids=str,
)
def test_guidance_acts_and_does_not_depend_on_the_batch(
    pipeline: Pipeline, change: dict[str, Any]
) -> None:
    request = FOX.replace(seeds=(5, 6, 9), **change)
    together = last(pipeline, request)
    alone = torch.cat([last(pipeline, single) for single in request.singles()])
    assert torch.equal(together, alone)
    without = FOX.replace(seeds=(5, 6, 9), guidance=change.get("guidance"))
    assert not torch.equal(together, last(pipeline, without))


def test_pag_0_and_a_whole_interval_change_nothing(pipeline: Pipeline) -> None:
    plain = last(pipeline, FOX)
    assert torch.equal(plain, last(pipeline, FOX.replace(pag_scale=0)))
    assert torch.equal(plain, last(pipeline, FOX.replace(guidance_interval=(0.0, 1.0))))
    assert pipeline.resolve(FOX.replace(pag_scale=2)).pag_blocks == (1,)


def test_guidance_outside_its_interval_is_off(pipeline: Pipeline) -> None:
    first = next(pipeline.steps(FOX.replace(guidance_interval=(0.0, 0.9)))).clean
    assert torch.equal(first, next(pipeline.steps(FOX.replace(guidance=1))).clean)
    assert not torch.equal(first, next(pipeline.steps(FOX)).clean)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sprint_follows_the_formulas_of_the_angles(sprint: Pipeline, steps: int) -> None:
    """family-spec 6.3, written out on the circle with sigma_data 0.5."""
    request = FOX.replace(steps=steps, guidance=3.0, seeds=7)
    dit, text = sprint.components.dit, sprint.components.text.encode([FOX.prompt])
    angles = [1.5708, 1.3, 0.0] if steps == 2 else torch.linspace(1.5708, 0, steps + 1).tolist()
    generator = torch.Generator().manual_seed(7)
    x = 0.5 * torch.randn(1, 8, 2, 2, generator=generator)
    for t, following in zip(angles, angles[1:], strict=False):
        u = math.sin(t) / (math.cos(t) + math.sin(t))
        size = math.sqrt(u**2 + (1 - u) ** 2)
        z = x / 0.5 * size
        with torch.no_grad():
            f = dit(
                z,
                torch.tensor([u]),
                text.states,
                text.mask,
                guidance=torch.tensor([3.0]),
            )
        out = 0.5 * ((1 - 2 * u) * z + (1 - 2 * u + 2 * u**2) * f) / size
        clean = math.cos(t) * x - math.sin(t) * out
        noise = torch.randn(1, 8, 2, 2, generator=generator)
        x = math.cos(following) * clean + math.sin(following) * 0.5 * noise

    def check(change: dict[str, Any]) -> None:
        assert_matches(clean / 0.5, last(sprint, request.replace(**change)), 1e-5)  # floor 2.3e-6

    check({})
    assert_detects(check, {"guidance": 3.05})


def test_sprint_together_and_alone_and_again(sprint: Pipeline) -> None:
    request = FOX.replace(steps=4, seeds=(3, 4, 5))
    together = last(sprint, request)
    alone = torch.cat([last(sprint, single) for single in request.singles()])
    assert torch.equal(together, alone)
    assert not torch.equal(together, last(sprint, request.replace(guidance=0)))
    assert sprint.resolve(FOX).guidance == 4.5
    assert sprint.resolve(FOX.replace(guidance=0)).guidance == 0


def test_sprint_from_an_image(sprint: Pipeline) -> None:
    request = FOX.replace(image="photo", strength=0.5, steps=4, seeds=(3, 4, 5))
    steps = list(sprint.steps(request, {"photo": PHOTO}))
    assert [step.count for step in steps] == [2, 2]
    alone = torch.cat([last(sprint, single, photo=PHOTO) for single in request.singles()])
    assert torch.equal(steps[-1].latent, alone)
    kept = last(sprint, request.replace(strength=0), photo=PHOTO)
    assert torch.equal(kept[:1], sprint.encode(PHOTO))
    assert torch.equal(
        last(sprint, request.replace(strength=1), photo=PHOTO),
        last(sprint, FOX.replace(steps=4, seeds=(3, 4, 5))),
    )


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "sprint",
            {"negative_prompt": "fog"},
            "negative_prompt is 'fog'; tiny-sprint is distilled",
        ),
        ("sprint", {"pag_scale": 2}, "pag_scale is 2.0; tiny-sprint is distilled"),
        ("sprint", {"guidance_interval": (0.1, 0.2)}, "guidance_interval is .*leave it out"),
        ("sprint", {"shift": 3}, "shift is 3; sampler scm takes none: leave it out, or give 1"),
        ("pipeline", {"sampler": "scm"}, "sampler is scm; tiny is not distilled .*: use dpm"),
        ("pipeline", {"guidance": 0.5}, "guidance is 0.5; tiny takes 1 .off. or more"),
        ("pipeline", {"guidance": 1, "negative_prompt": "fog"}, "guidance is 1, which is off; the"),
        ("pipeline", {"guidance": 1, "guidance_interval": (0, 0.5)}, "interval and guidance is 1"),
        ("pipeline", {"pag_scale": 2, "pag_blocks": (2,)}, "pag_blocks has 2; tiny has 2 blocks"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_a_model_cannot_honour_is_refused(
    request: pytest.FixtureRequest, name: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        request.getfixturevalue(name).steps(FOX.replace(**change))


@pytest.mark.parametrize(
    ("name", "reference", "block"),
    [
        ("sana-1600m-1024", "nvidia", 8),
        ("sana-600m-1024", "nvidia", 14),
        ("sana-600m-1024", "diffusers", 8),
        ("sana1.5-4800m-1024", "nvidia", 8),
    ],
)
def test_the_perturbed_block_is_the_references(name: str, reference: Reference, block: int) -> None:
    config = with_reference(preset(name).config, reference)
    full = complete(Request(prompt="a fox", pag_scale=2.0), config, (1024, 1024))
    assert full.pag_blocks == (block,)


def test_a_padded_text_draws_the_same(
    pipeline: Pipeline, sprint: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where prompts of many lengths share one graph."""
    plain = [last(one, FOX) for one in (pipeline, sprint)]
    monkeypatch.setattr("sana.pipelines.denoising.text_block", lambda _: 16)

    def check(request: Request) -> None:
        for expected, one in zip(plain, (pipeline, sprint), strict=True):
            assert_matches(expected, last(one, request), 2e-6)

    check(FOX)
    assert_detects(check, FOX.replace(prompt="a red dog"))
