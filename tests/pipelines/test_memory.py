"""The planner: what fits is chosen fast to slow, what does not fit is refused with the least."""

from __future__ import annotations

import re

import pytest

from numerics import assert_detects
from sana.errors import RequestError
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
    assert (one.text, one.dit, one.tile) == ("streams", "streams", 512)
    assert "in 512 px tiles" in str(one)
    assert plan(HUGE, SQUARE, 8 * GIB).dit == "streams"


def test_a_large_picture_is_tiled_before_anything_smaller() -> None:
    seven = plan(FOUR_K, LARGE, 7 * GIB)
    assert seven.tile == 1024
    assert seven.text == seven.dit == "visits"
    assert plan(FOUR_K, LARGE, 80 * GIB).tile is None
    encoding = plan(FOUR_K, Canvas(width=4096, height=4096, encodes=True), 7 * GIB)
    assert encoding.tile == 1024


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
