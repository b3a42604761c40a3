"""Tiled DC-AE: the whole picture where one tile covers it, and no seam where many meet."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from numerics import assert_detects, assert_matches, rel_rms
from sana.config import DCAEConfig, StageConfig
from sana.models import tiling
from sana.models.cutting import Axis, Tile, cut
from sana.models.dcae import DCAE
from sana.models.tiling import decode_bands, decode_tiled, encode_tiled, windows
from sana.presets import preset
from sana.weights.load import find_folder, load_autoencoder

SHAPES = [(2, 2), (5, 3), (7, 9), (16, 4), (33, 7)]


def small(*, has_attention: bool) -> DCAE:
    """A random autoencoder of factor 8, with the official one's multi-scale global attention."""
    widths = (8, 8, 16, 32)
    kinds = ["residual", "residual", "residual", "efficientvit" if has_attention else "residual"]
    scales = [(), (), (), (5,) if has_attention else ()]
    stages = tuple(
        StageConfig(width=width, depth=1, block=kind, scales=scale)  # type: ignore[arg-type]
        for width, kind, scale in zip(widths, kinds, scales, strict=True)
    )
    config = DCAEConfig(latent_channels=8, encoder=stages, decoder=stages, head_dim=8)
    torch.manual_seed(0)
    return DCAE(config).eval()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def both_ways(network: Any, latent: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    return network.decode(latent), decode_tiled(network, latent, **how)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 100])
@pytest.mark.parametrize("tile", [64, 96, 256, 1024])
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.7])
def test_tiles_are_equal_and_share_enough_and_weights_sum_to_one(
    length: int, tile: int, overlap: float
) -> None:
    axis = cut(length, tile, overlap, 32)
    assert axis.starts[0] == 0
    assert axis.starts[-1] + axis.tile == length
    assert axis.tile == min(length, tile // 32)
    gaps = [after - before for before, after in zip(axis.starts, axis.starts[1:], strict=False)]
    assert all(0 < gap <= max(1, (1 - overlap) * axis.tile) for gap in gaps)
    weights = windows(axis, 4)

    def check(weights: Tensor) -> None:
        total = torch.zeros(length * 4)
        for start, row in zip(axis.starts, weights, strict=True):
            total[start * 4 : (start + axis.tile) * 4] += row
        assert_matches(torch.ones_like(total), total, 1e-6)  # measured 4e-8

    check(weights)
    assert (weights > 0).all()
    if len(axis.starts) > 1:
        assert weights[0, -1] < 0.2, "a tile fades out before its border"
        assert weights[0, 0] == 1.0, "the picture's own border does not fade"
        assert_detects(check, weights * torch.linspace(1, 1.01, weights.shape[1]))


@pytest.mark.parametrize(
    ("tile", "overlap", "hint"),
    [(100, 0.25, "use 96"), (8, 0.25, "use 64"), (64, 0.1, "0.25"), (64, 1.0, "0.25")],
)
def test_tiles_that_cannot_be_are_refused(tile: int, overlap: float, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        cut(9, tile, overlap, 32)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_tile_is_the_untiled_path_bit_for_bit(shape: tuple[int, int]) -> None:
    network = small(has_attention=True)
    latent = draw(2, 8, *shape)
    tile = 8 * max(2, *shape)
    whole, tiled = both_ways(network, latent, tile=tile)
    # One image at a time, as the tiled path does it.
    singles = torch.cat([network.decode(one) for one in latent.split(1)]).detach()
    assert torch.equal(singles, tiled)
    assert_matches(whole, tiled, 1e-5)
    pixels = draw(2, 3, 8 * shape[0], 8 * shape[1])
    with torch.inference_mode():
        latents = torch.cat([network.encode(one) for one in pixels.split(1)])
        assert torch.equal(latents, encode_tiled(network, pixels, tile=tile))


@pytest.mark.parametrize("overlap", [0.25, 0.6])
def test_tiles_of_a_local_network_agree_with_the_whole_away_from_borders(overlap: float) -> None:
    """Without attention a pixel sees only its surroundings, so deep inside a tile nothing changes.

    That holds every tile to its place: a shift by one pixel would show.
    """
    network = small(has_attention=False)
    latent = draw(1, 8, 40, 26)
    whole, tiled = both_ways(network, latent, tile=160, overlap=overlap)
    rows, columns = (cut(n, 160, overlap, 8) for n in (40, 26))
    inside = _inside(rows)[:, None] & _inside(columns)
    assert inside.any()

    def check(image: Tensor) -> None:
        assert_matches(whole[..., inside], image[..., inside], 2e-6)  # measured 2e-7

    check(tiled)
    assert_detects(check, tiled.roll(1, dims=-1))
    assert rel_rms(whole, tiled) < 0.05


def test_a_tile_as_wide_as_the_picture_joins_only_downwards() -> None:
    network = small(has_attention=False)
    latent = draw(1, 8, 40, 26)
    whole, tiled = both_ways(network, latent, tile=(160, 208))
    inside = _inside(cut(40, 160, 0.25, 8))

    def check(image: Tensor) -> None:
        assert_matches(whole[..., inside, :], image[..., inside, :], 2e-6)

    check(tiled)
    assert_detects(check, tiled.roll(1, dims=-2))


def _inside(axis: Axis, factor: int = 8, reach: int = 6) -> Tensor:
    """Pixels that no tile holds within `reach` cells of a border that is not the picture's."""
    inside = torch.ones(axis.length * factor, dtype=torch.bool)
    for place in axis.places:
        for border in (place.start, place.stop):
            if 0 < border < axis.length:
                low, high = max(border - reach, 0), min(border + reach, axis.length)
                inside[low * factor : high * factor] = False
    return inside


@pytest.mark.parametrize("tile", [96, (96, 224), (160, 96)], ids=str)
def test_encoding_in_tiles_is_close_and_in_place(tile: int | Tile) -> None:
    network = small(has_attention=False)
    pixels = torch.nn.functional.interpolate(draw(1, 3, 20, 28), scale_factor=8, mode="bicubic")
    with torch.inference_mode():
        whole, tiled = network.encode(pixels), encode_tiled(network, pixels, tile=tile)

    def check(latent: Tensor) -> None:
        assert_matches(whole, latent, 0.1)  # measured 0.047 in squares

    check(tiled)
    for dim in (-1, -2):
        assert_detects(check, tiled.roll(1, dims=dim))
    with pytest.raises(ValueError, match="multiples of 8"):
        encode_tiled(network, pixels[..., :-1], tile=96)


def test_bands_are_the_picture_and_only_one_row_of_tiles_is_held() -> None:
    network = small(has_attention=True)
    latent = draw(1, 8, 30, 10)
    with torch.inference_mode():
        bands = list(decode_bands(network, latent, tile=64))
        image = decode_tiled(network, latent, tile=64)
    assert torch.equal(torch.cat(bands, dim=-2), image)
    assert len(bands) == len(cut(30, 64, 0.25, 8).starts)
    assert all(band.shape[-2] <= 64 for band in bands)


def test_the_whole_picture_may_be_elsewhere_and_in_another_dtype() -> None:
    network = small(has_attention=True).to(torch.bfloat16)
    with torch.inference_mode():
        image = decode_tiled(network, draw(1, 8, 12, 12), tile=64, device="cpu")
    assert image.dtype == torch.bfloat16
    assert image.shape == (1, 3, 96, 96)


def seams(whole: Tensor, tiled: Tensor, axis: Axis, dim: int, factor: int) -> tuple[float, float]:
    """How much steeper tile borders are than their surroundings: the picture, and what changed.

    Both are means of absolute differences between neighboring lines: at the lines where a tile
    begins or ends over those of the other lines within half a cell. The first is divided by the
    untiled picture's own ratio, so that 1 means no seam; the second is of tiled - untiled, which a
    seam would step through.
    """
    ends = {edge * factor for place in axis.places for edge in (place.start, place.stop)}
    lines = [end - 1 for end in sorted(ends) if 0 < end < axis.length * factor]
    border = torch.zeros(axis.length * factor - 1, dtype=torch.bool)
    border[lines] = True
    near = torch.zeros_like(border)
    for line in lines:
        near[line - factor // 2 : line + factor // 2 + 1] = True
    near &= ~border

    def ratio(image: Tensor) -> float:
        steps = image.double().diff(dim=dim).abs().transpose(dim, -1).flatten(0, -2).mean(dim=0)
        return float(steps[border].mean() / steps[near].mean())

    return ratio(tiled) / ratio(whole), ratio(tiled - whole)


@cache
def sticker() -> DCAE:
    return load_autoencoder(find_folder("sticker-512"))


@cache
def sticker_latent() -> Tensor:
    """Of soft blobs and a flat sky, where seams show most."""
    blobs = torch.nn.functional.interpolate(draw(1, 3, 5, 4), (640, 512), mode="bicubic")
    blobs[..., :200, :] = torch.tensor([-0.2, 0.3, 0.8])[:, None, None]
    with torch.inference_mode():
        return sticker().encode(blobs.clamp(-1, 1))


def tone_shifting() -> tuple[Any, Tensor]:
    """A stand-in that paints smooth color, shifted by the mean of all that it sees.

    So does the official decoder, whose linear attention is global: tiles of one sky differ in tone.
    """
    weight = torch.zeros(1)

    def decode(latent: Tensor) -> Tensor:
        size = [32 * side for side in latent.shape[-2:]]
        smooth = torch.nn.functional.interpolate(latent, size, mode="bilinear")
        return smooth + 0.3 * latent.mean(dim=(-2, -1), keepdim=True)

    network = SimpleNamespace(
        config=SimpleNamespace(factor=32),
        decoder=SimpleNamespace(stem=SimpleNamespace(weight=weight)),
        decode=decode,
    )
    coarse = draw(1, 3, 5, 4)
    return network, torch.nn.functional.interpolate(coarse, (20, 16), mode="bicubic")


def hard(axis: Axis, scale: int) -> Tensor:
    """The planted fault: every pixel from one tile alone, the next beginning where one ends."""
    weights = torch.zeros(len(axis.starts), axis.tile * scale)
    ends = [0, *((a + axis.tile) * scale for a in axis.starts)]
    for index, start in enumerate(axis.starts):
        weights[index, ends[index] - start * scale :] = 1.0
    return weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "bounds"),  # measured 1.023, 0.9 and 0.996, 0.06; hard edges 5.0, 12
    [(lambda: (sticker(), sticker_latent()), (1.05, 1.2)), (tone_shifting, (1.02, 1.2))],
    ids=["sticker-512", "tone shifts"],
)
@pytest.mark.parametrize("tile", [(256, 256), (256, 512), (640, 256)], ids=str)
def test_tile_borders_are_no_steeper_than_the_untiled_picture(
    make: Callable[[], tuple[Any, Tensor]],
    bounds: tuple[float, float],
    tile: Tile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Squares, and strips as wide or as tall as the picture, whose two sides have no borders."""
    network, latent = make()
    whole, tiled = both_ways(network, latent, tile=tile)
    factor = network.config.factor

    def check(image: Tensor) -> None:
        axes = {dim: cut(latent.shape[dim], tile[dim], 0.25, factor) for dim in (-2, -1)}
        joined = {dim: axis for dim, axis in axes.items() if len(axis.starts) > 1}
        assert len(joined) == (2 if tile[0] == tile[1] else 1)
        for dim, axis in joined.items():
            steeper, changed = seams(whole, image, axis, dim, factor)
            print(f"borders {steeper:.3f} times as steep, change {changed:.3f}")
            assert steeper < bounds[0]
            assert changed < bounds[1]

    check(tiled)
    monkeypatch.setattr(tiling, "windows", hard)
    assert_detects(check, both_ways(network, latent, tile=tile)[1])


def test_presets_tile_by_their_own_factor() -> None:
    network = DCAE(preset("tiny").config.autoencoder).eval()
    whole, tiled = both_ways(network, draw(1, 8, 6, 4), tile=64)
    assert tiled.shape == whole.shape
    assert rel_rms(whole, tiled) < 1  # measured 0.75: random weights, two-cell tiles
