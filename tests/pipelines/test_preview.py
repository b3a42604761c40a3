"""Previews: the least squares are right, and on the shipped autoencoder they show the picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from numerics import assert_detects, assert_matches
from sana.data.stickers.compose import draw_scene
from sana.data.stickers.render import Renderer
from sana.data.stickers.tiny import tiny_world
from sana.pipelines.pipeline import Pipeline
from sana.pipelines.preview import DETAIL, Projection, fit, smooth_picture
from sana.request import Request
from sana.weights.load import ASSETS, load_autoencoder
from standins import tiny_components


def linear_encoder(channels: int) -> Tensor:
    """An invertible mixture of the 4 x 4 colours of a cell."""
    return torch.randn(channels, 48, generator=torch.Generator().manual_seed(1)) / 7


def test_a_linear_encoder_is_undone() -> None:
    mix = linear_encoder(48)

    def encode(pixels: Tensor) -> Tensor:
        cells = F.pixel_unshuffle(F.avg_pool2d(pixels, 8), DETAIL)
        return torch.einsum("ck,bkhw->bchw", mix, cells) + 0.3

    projection = fit(encode, 32)
    pixels = smooth_picture(128, torch.Generator().manual_seed(9))

    def check(latent: Tensor) -> None:
        assert_matches(F.avg_pool2d(pixels, 8), projection(latent), 0.1)  # floor 0.077: the ridge

    check(encode(pixels))
    assert_detects(check, encode(pixels).flip(1))


def test_shapes_and_repetition() -> None:
    pipeline = Pipeline(tiny_components())
    step = next(pipeline.steps(Request(prompt="a fox", width=96, seeds=(1, 2))))
    first, second = pipeline.preview(step.clean)
    assert first.size == second.size == (12, 8)
    assert first.tobytes() != second.tobytes()
    again = Pipeline(tiny_components()).preview(step.clean)
    assert again[0].tobytes() == first.tobytes()


def test_previews_change_no_picture() -> None:
    pipeline = Pipeline(tiny_components())
    request = Request(prompt="a fox", steps=3)
    plain = pipeline.generate(request)[0]
    latent = None
    for step in pipeline.steps(request):
        pipeline.preview(step.clean)
        latent = step.latent
    assert latent is not None
    assert pipeline.finish(request, latent)[0].tobytes() == plain.tobytes()


def psnr(first: Tensor, second: Tensor) -> float:
    return float(10 * torch.log10(4 / (first - second).square().mean()))


@pytest.mark.slow
def test_the_shipped_autoencoder_shows_through() -> None:
    """Against the decoded picture, shrunk. The bounds leave room for other weights than today's."""
    autoencoder = load_autoencoder(ASSETS / "sticker-512")
    world = tiny_world()
    images = Renderer(world).render([draw_scene(world, index, seed=5) for index in range(3)], 256)
    with torch.inference_mode():
        projection = fit(lambda x: autoencoder.normalize(autoencoder.encode(x)), 32)
        latents = autoencoder.normalize(autoencoder.encode(images))
        decoded = autoencoder.decode(autoencoder.denormalize(latents)).clamp(-1, 1)
    small = F.avg_pool2d(decoded, 8)

    def check(projection: Projection) -> None:
        shown = projection(latents).clamp(-1, 1)
        likeness = torch.corrcoef(torch.stack([shown.flatten(), small.flatten()]))[0, 1]
        print(f"{psnr(shown, small):.1f} dB, correlation {likeness:.3f}")
        assert psnr(shown, small) > 15
        assert likeness > 0.8

    check(projection)
    assert_detects(check, Projection(weight=projection.weight.roll(1, dims=0)))
