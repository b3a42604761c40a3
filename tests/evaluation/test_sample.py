"""Batched drawing equals the pipeline's pictures; the autoencoder's report against known errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evaluation.small import studio
from numerics import assert_detects
from sana.evaluation.autoencoder import autoencoder_quality
from sana.evaluation.sample import Settings, drawer
from sana.pipelines.images import to_pil
from sana.pipelines.pipeline import Pipeline
from sana.request import Request
from sana.weights.load import load


def test_batches_give_the_pipelines_pictures() -> None:
    components = load("tiny")
    draw = drawer(components, Settings(steps=2, guidance=3.0, size=64, batch=2))
    prompts, seeds = ["a red fox", "two apples", "a blue cat with a hat"], [0, 7, 3]
    drawn = draw(prompts, seeds)
    assert drawn.shape == (3, 3, 64, 64)
    pipeline = Pipeline(components)

    def check(pictures: Tensor) -> None:
        for picture, prompt, seed in zip(pictures, prompts, seeds, strict=True):
            request = Request(
                prompt=prompt,
                seeds=(seed,),
                steps=2,
                guidance=3.0,
                width=64,
                height=64,
                model="tiny",
            )
            expected = pipeline.generate(request)[0]
            difference = torch.tensor(list(expected.tobytes())).float() - torch.tensor(
                list(to_pil(picture).tobytes())
            )
            assert difference.abs().max() <= 1

    check(drawn)
    assert_detects(check, drawn.roll(1, 0))


@pytest.mark.parametrize(("error", "expected"), [(0.04, 33.98), (0.2, 20.0)])
def test_autoencoder_quality_of_a_known_error(error: float, expected: float) -> None:
    def shifted(images: Tensor) -> Tensor:
        return torch.where(images > 0, images - error, images + error)

    found = autoencoder_quality(shifted, studio(), count=2, size=64)
    assert set(found) == {"scene", "sticker", "avatar", "all"}
    assert found["all"].count == 6
    for quality in found.values():
        # Rounding to 8 bits moves it a little.
        assert quality.psnr == pytest.approx(expected, abs=0.7)
        assert quality.worst <= quality.psnr
        assert 0 < quality.ssim < 1


def test_worst_picture_is_named() -> None:
    def spoil(images: Tensor) -> Tensor:
        rebuilt = images.clone()
        rebuilt[1] = -rebuilt[1]
        return rebuilt

    found = autoencoder_quality(spoil, studio(), count=3, size=64)
    for kind in ("scene", "sticker", "avatar"):
        assert found[kind].worst_index == 1
