"""benchmarks/scaling.py at small size, and the arithmetic of its curves on known powers."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import scaling
from benchmarks.curves import Curve, Point, crossing, plot
from numerics import assert_detects


def power(name: str, factor: float, exponent: float, *, start: float = 0.0) -> Curve:
    """start + factor * size^exponent."""
    sizes = [4.0**i for i in range(1, 7)]
    points = [Point(size=x, seconds=start + factor * x**exponent, bytes=int(x)) for x in sizes]
    return Curve(name=name, panel="p", size="tokens", points=points)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_slopes_are_exponents(exponent: float) -> None:
    assert power("a", 3.0, exponent).slope("seconds") == pytest.approx(exponent, abs=1e-9)
    assert power("a", 3.0, exponent).slope("bytes") == pytest.approx(1.0)
    assert power("a", 1.0, 1.0, start=99.0).slope("seconds", last=6) < 0.9
    assert (
        Curve(name="", panel="", size="", points=[Point(size=1, seconds=1)]).slope("seconds")
        is None
    )


def test_crossings_are_where_powers_meet() -> None:
    linear, square = power("l", 20.0, 1.0), power("s", 1.0, 2.0)
    assert crossing(linear, square) == pytest.approx(20.0)
    assert crossing(square, linear) is None  # ahead at first, and then no more
    assert crossing(power("l", 0.1, 1.0), square) is None  # always ahead


def test_the_plot_is_an_svg_with_every_curve() -> None:
    curves = [power("one <&>", 1.0, 1.0), power("two", 2.0, 2.0)]
    root = ET.fromstring(plot(curves, "title"))
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 4
    ends = [line.attrib["points"].split()[-1] for line in lines]
    assert len(set(ends)) >= 3
    texts = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any("one <&> (slope 1.00)" in text for text in texts)


def test_the_program_has_slopes_and_a_crossing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["scaling.py", "--tiny", "--write", str(tmp_path)])
    assert scaling.main() == 0
    [data] = tmp_path.glob("*-scaling-cpu.json")
    curves: list[dict[str, Any]] = json.loads(data.read_text())
    slopes = {f"{c['panel']}, {c['name']}": c["slopes"]["bytes"] for c in curves}
    # Bytes are counted, so these hold on every machine.
    assert slopes["One attention, linear"] == pytest.approx(1.0, abs=0.05)
    assert slopes["One attention, softmax, scores kept"] == pytest.approx(2.0, abs=0.01)
    assert slopes["Pictures, forward"] == pytest.approx(1.0, abs=0.05)
    assert slopes["Depth, forward"] == pytest.approx(0.0, abs=0.01)
    assert slopes["Pixels, decoding"] == pytest.approx(1.0, abs=0.05)
    said = capsys.readouterr().out
    assert "- Against softmax, flash, linear attention" in said
    [page] = tmp_path.glob("*.md")
    assert page.read_text() == said
    ET.fromstring(next(tmp_path.glob("*.svg")).read_text())


def test_a_wrong_attention_is_not_timed() -> None:
    cpu = torch.device("cpu")
    kinds = scaling.attentions(cpu)

    def check(name: str) -> None:
        attend = kinds[name]
        try:
            scaling.check_attention(attend, scaling.LINEAR, 64, 32, torch.float32, cpu)
        except SystemExit as error:
            raise AssertionError(str(error)) from None

    check(scaling.LINEAR)
    assert_detects(check, scaling.FLASH)
