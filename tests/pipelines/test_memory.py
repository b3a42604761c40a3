"""The planner: what fits is chosen fast to slow, what does not fit is refused with the least."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from numerics import assert_detects
from sana.errors import RequestError
from sana.kernels.proven import REPORTS
from sana.models.cutting import Tile, tilings
from sana.pipelines import footprint
from sana.pipelines.footprint import Canvas, Widths
from sana.pipelines.memory import NAMES, WHILE, MemoryPlan, parse, plan, shown
from sana.presets import PRESETS, preset

GIB = 2**30
MEDIUM = preset("sana-1600m-1024").config
HUGE = preset("sana1.5-4800m-1024").config
FOUR_K = preset("sana-1600m-4096").config
SQUARE = Canvas(width=1024, height=1024)
LARGE = Canvas(width=4096, height=4096)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("7.5 GB", 7_500_000_000),
        ("8G", 8 * GIB),
        ("900mib", 900 * 2**20),
        ("1T", 2**40),
        ("64kB", 64_000),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse(text) == size


@pytest.mark.parametrize("text", ["", "8", "GiB", "-1GiB", "0GiB", "8 giblets", "1e3GB", "nan GB"])
def test_sizes_that_are_none_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(RequestError, match=re.escape(repr(text)) + ".*for example 8GiB"):
        parse(text)


def test_without_a_limit_everything_stays() -> None:
    chosen = plan(MEDIUM, SQUARE, None)
    assert not chosen.offloads
    assert chosen.tile is None
    assert 9 * GIB < chosen.peak < 10 * GIB
    assert str(chosen).startswith("everything stays on the device; the picture is decoded in one ")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("limit", [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 80])
def test_a_plan_keeps_its_limit_or_says_what_would_do(name: str, limit: float) -> None:
    config = preset(name).config
    canvas = Canvas(width=config.pixels, height=config.pixels)
    try:
        chosen = plan(config, canvas, int(limit * GIB))
    except RequestError as error:
        [least] = re.findall(r"needs at least ([\d.]+ [GM]iB),", str(error))
        assert plan(config, canvas, parse(least)).peak > limit * GIB
        return
    assert chosen.peak <= limit * GIB
    sentence = str(chosen)
    assert "\n" not in sentence
    assert shown(chosen.peak) in sentence
    assert WHILE[chosen.busiest] in sentence


def test_less_memory_is_never_faster_and_names_what_it_does() -> None:
    resident = plan(MEDIUM, SQUARE, 12 * GIB)
    assert not resident.offloads
    six = plan(MEDIUM, SQUARE, 6 * GIB)
    assert [six.text, six.dit, six.autoencoder] == ["visits"] * 3
    four = plan(MEDIUM, SQUARE, 4 * GIB)
    assert (four.text, four.dit) == ("streams", "visits")
    assert "the text encoder streams through block by block" in str(four)
    one = plan(MEDIUM, SQUARE, GIB)
    assert (one.text, one.dit, one.tile) == ("streams", "streams", (448, 608))
    assert "in tiles of 608 x 448 px" in str(one)
    assert plan(HUGE, SQUARE, 8 * GIB).dit == "streams"


@pytest.mark.parametrize(
    ("limit", "tile", "share"),
    [
        (4, (1024, 4096), 1.25),
        (5, (1280, 4096), 1.25),
        (7, (1664, 4096), 1.219),
        (8.5, (2368, 4096), 1.156),
        (12, (1024, 4096), 1.25),
        (14, (1664, 4096), 1.219),
        (20, (2368, 4096), 1.156),
        (80, (2368, 4096), 1.156),
    ],
)
def test_a_large_picture_is_decoded_in_the_tiles_that_compute_least(
    limit: float, tile: Tile | None, share: float
) -> None:
    """Next to who is on the device then; `offloads` changes at 12 GiB, where all has room."""
    chosen = plan(FOUR_K, LARGE, int(limit * GIB))
    assert chosen.tile == tile
    assert chosen.offloads == (limit < 12)
    by_tile = {way.tile: way for way in tilings(4096, 4096, 32)}

    def check(chosen: MemoryPlan) -> None:
        way = by_tile[chosen.tile or (4096, 4096)]
        assert way.computed / 4096**2 == pytest.approx(share, abs=1e-3)
        for cheaper in by_tile.values():
            if 1 < cheaper.count and cheaper.computed < way.computed:
                assert decoding(chosen, cheaper.tile) > limit * GIB

    check(chosen)
    assert_detects(check, replace(chosen, tile=(1024, 1024)))


def decoding(chosen: MemoryPlan, tile: Tile) -> float:
    """Bytes of decoding at 4096 px in `tile`, as docs/memory.md counts them."""
    weights = footprint.weights(FOUR_K, Widths())
    held = sum(getattr(weights, part) for part in chosen.present("decode"))
    bands = 24 * tile[0] * 4096 if tile != (4096, 4096) else 0
    work = footprint.decode_work(FOUR_K.autoencoder, tile[1], tile[0], 2) + bands
    return 1.03 * (held + work) + 64 * 2**20


def test_squares_are_left_where_no_strip_fits_and_small_tiles_where_nothing_else_does() -> None:
    assert plan(FOUR_K, LARGE, 3 * GIB).tile == (1024, 2368)
    two_k = preset("sana-1600m-2048").config
    canvas = Canvas(width=2048, height=2048)
    tiles = {limit: plan(two_k, canvas, parse(limit)).tile for limit in ("3GiB", "2GiB", "1.3GiB")}
    assert tiles == {"3GiB": (1184, 2048), "2GiB": (1184, 1184), "1.3GiB": (832, 832)}
    small = plan(MEDIUM, SQUARE, parse("1.3GiB"))
    assert small.tile == (608, 1024)
    assert "in tiles of 1024 x 608 px" in str(small)
    whole = plan(MEDIUM, SQUARE, None).peak
    assert plan(MEDIUM, SQUARE, whole).tile is None, "one piece has no bands of tiles"


@pytest.mark.parametrize("limit", [4, 6, 7, 8.5, 12, 24])
def test_what_goes_in_is_encoded_in_tiles_of_its_own(limit: float) -> None:
    canvas = Canvas(width=4096, height=4096, encodes=True)
    chosen = plan(FOUR_K, canvas, int(limit * GIB))
    assert chosen.peak <= limit * GIB
    assert chosen.encode_tile is not None
    tall, wide = chosen.encode_tile
    assert wide == 4096, "strips are cheaper than squares"
    assert footprint.encode_work(FOUR_K.autoencoder, wide, tall, 2) < chosen.peak
    assert plan(FOUR_K, LARGE, int(limit * GIB)).encode_tile is not None, "one may go in unplanned"


@pytest.mark.parametrize("limit", [None, 80 * GIB])
def test_no_map_is_too_large_for_cudnn_however_much_memory_there_is(limit: int | None) -> None:
    def check(height: int) -> None:
        canvas = Canvas(width=4096, height=height, encodes=True)
        chosen = plan(FOUR_K, canvas, limit)
        tall, wide = chosen.tile or (height, 4096)
        assert tall * wide * 128 < 2**31
        assert chosen.encode_tile == chosen.tile
        assert chosen.tile is None

    check(4064)
    assert_detects(check, 4096)
    assert plan(FOUR_K, LARGE, limit).tile == (2368, 4096)


def test_the_bars_hold_with_every_way_that_a_card_may_prove() -> None:
    """9.5 GiB for 1.6B at 1024 px with a step's graph; 7 GiB at 4096 px, offloaded and in tiles."""
    widths = Widths(ways=frozenset(REPORTS))
    weights = footprint.weights(MEDIUM, widths)
    resident = weights.text + weights.dit + weights.autoencoder
    resident += footprint.graph_bytes(MEDIUM, SQUARE, widths)
    resident += footprint.decode_work(MEDIUM.autoencoder, 1024, 1024, 2, widths.ways)
    assert resident < 9.5 * GIB
    offloaded = plan(FOUR_K, LARGE, 7 * GIB, widths=widths)
    assert offloaded.tile == (1664, 4096)
    assert offloaded.peak < 7 * GIB


def test_what_cannot_be_is_refused_with_the_least_that_can() -> None:
    with pytest.raises(RequestError) as caught:
        plan(HUGE, SQUARE, 2**29, reserve=2**29)
    message = str(caught.value)
    assert "memory is 512 MiB; sana1.5-4800m-1024 at 1024 x 1024 needs at least 1." in message
    assert "use a smaller model" in message
    with pytest.raises(RequestError, match="everything stays"):
        plan(HUGE, SQUARE, 8 * GIB, can_offload=False)


def test_a_reserve_counts_against_the_limit() -> None:
    bare = plan(MEDIUM, SQUARE, 10 * GIB)
    assert not bare.offloads
    assert plan(MEDIUM, SQUARE, 10 * GIB, reserve=GIB).offloads


def test_wider_weights_take_more() -> None:
    narrow, wide = (
        plan(MEDIUM, SQUARE, None, widths=Widths(text=width, dit=width, autoencoder=width))
        for width in (2, 4)
    )
    assert 1.9 < wide.peak / narrow.peak < 2.1


def test_visitors_are_fetched_early_only_where_both_fit() -> None:
    roomy, tight = plan(MEDIUM, SQUARE, parse("8.4GiB")), plan(MEDIUM, SQUARE, 6 * GIB)
    assert roomy.early == ("dit", "autoencoder")
    assert roomy.present("text") == ("text", "dit")
    assert roomy.present("denoise") == ("dit", "autoencoder")
    assert tight.early == ("autoencoder",)
    assert tight.present("text") == ("text",)
    assert tight.present("encode") == tight.present("decode") == ("autoencoder",)


def test_every_phase_has_the_network_that_it_needs() -> None:
    def check(chosen: MemoryPlan) -> None:
        for phase, part in {"text": "text", "denoise": "dit", "decode": "autoencoder"}.items():
            assert part in chosen.present(phase)  # type: ignore[arg-type]
        assert set(chosen.present("decode")) <= set(NAMES)
        assert chosen.present("denoise") == ("dit",), "no one else"

    check(MemoryPlan(text="visits", dit="streams", autoencoder="visits"))
    assert_detects(check, MemoryPlan(text="stays", dit="stays", autoencoder="visits"))
