"""How a picture is cut: equal tiles that overlap enough, and no cheaper ones of their size."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from numerics import assert_detects
from sana.models.cutting import BEST_TILE, LEAST_OVERLAP, Tiling, cut, tilings

PICTURES = [
    (4096, 4096, 32),
    (2048, 4096, 32),
    (4096, 1024, 32),
    (2816, 1504, 32),
    (1024, 1024, 32),
    (4096, 4096, 128),
    (640, 96, 32),
    (128, 128, 32),
    (32, 32, 32),
]


def pixels(height: int, width: int, tile: tuple[int, int], factor: int) -> int:
    """What all tiles of a size compute, as `decode_tiled` cuts."""
    total = 1
    for length, side in zip((height, width), tile, strict=True):
        axis = cut(length // factor, side, LEAST_OVERLAP, factor)
        total *= len(axis.starts) * axis.tile * factor
    return total


@pytest.mark.parametrize(("height", "width", "factor"), PICTURES)
def test_tiles_are_as_tiling_cuts_them_and_overlap_where_they_are_cut(
    height: int, width: int, factor: int
) -> None:
    ways = tilings(height, width, factor)
    assert ways[0] == Tiling(tile=(height, width))

    def check(way: Tiling) -> None:
        counts = (way.rows, way.columns)
        for length, side, count in zip((height, width), way.tile, counts, strict=True):
            axis = cut(length // factor, side, LEAST_OVERLAP, factor)
            assert len(axis.starts) == count
            assert axis.tile * factor == side
            shared = [a.stop - b.start for a, b in itertools.pairwise(axis.places)]
            # A tile of two cells shares one.
            assert all(cells >= LEAST_OVERLAP * axis.tile for cells in shared)
        assert way.computed == pixels(height, width, way.tile, factor)

    for way in ways:
        check(way)
    if len(ways) > 1:
        assert_detects(check, replace(ways[1], rows=ways[1].rows + 1))


@pytest.mark.parametrize(("height", "width", "factor"), PICTURES)
def test_each_is_smaller_and_large_tiles_come_first_by_what_they_compute(
    height: int, width: int, factor: int
) -> None:
    ways = tilings(height, width, factor)
    assert all(later.area < way.area for way, later in itertools.pairwise(ways))
    ranks = [(way.smallness, way.computed) for way in ways]
    assert ranks == sorted(ranks)
    least = 256 if max(height, width) > 256 else 2 * factor
    assert ways[-1].tile == (min(height, least), min(width, least))


@pytest.mark.parametrize(("height", "width", "factor"), PICTURES)
def test_no_large_tile_of_any_shape_computes_less_in_less(
    height: int, width: int, factor: int
) -> None:
    """Against every tile there is of at least 1024 px, or as long as the picture."""
    lengths = [{side, *range(BEST_TILE, side, factor)} for side in (height, width)]
    every = [
        (tall * wide, pixels(height, width, (tall, wide), factor))
        for tall, wide in itertools.product(*lengths)
    ]

    def check(ways: list[Tiling]) -> None:
        for area, computed in every:
            best = min(way.computed for way in ways if way.smallness == 1 and way.area <= area)
            assert best <= computed

    ways = tilings(height, width, factor)
    check(ways)
    cut_ways = [way for way in ways if way.smallness == 1 and way.count > 1]
    if len(cut_ways) > 1:
        assert_detects(check, [ways[0], *cut_ways[1:]])


def test_strips_recompute_a_quarter_of_what_squares_do() -> None:
    shares = {way.tile: way.computed / 4096**2 for way in tilings(4096, 4096, 32)}
    assert shares[2368, 4096] == pytest.approx(1.156, abs=1e-3)
    assert shares[1664, 4096] == pytest.approx(1.219, abs=1e-3)
    assert shares[1024, 4096] == 1.25
    assert shares[1024, 1024] == 1.5625
