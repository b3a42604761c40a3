"""benchmarks/cpu.py: what it says of two versions' pictures and seconds."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cpu import Run, likeness, page
from numerics import assert_detects


def test_likeness_is_of_values() -> None:
    one = np.full((2, 2, 3), 100, dtype=np.uint8)
    other = one.copy()
    other[0, 0] = (101, 90, 100)
    psnr, equal, near, largest = likeness(one, other)
    assert psnr == pytest.approx(10 * np.log10(255**2 / (101 / 12)))
    assert (equal, near, largest) == (10 / 12, 11 / 12, 10)
    assert likeness(one, one)[0] == float("inf")


def test_ratios_are_of_pairs_not_of_medians() -> None:
    picture = np.zeros((1, 1, 3), dtype=np.uint8)

    def check(fast: float) -> None:
        seconds = ((2.0, fast), (9.0, 3.0), (4.0, 1.0))
        pairs = [("fox", Run(a, 2 * a, picture), Run(b, b, picture)) for a, b in seconds]
        lines = list(page(pairs))
        assert lines[0].startswith("3 pairs")
        assert "| clock | 4.00 | 2.00 | 3.00 (1.00 to 4.00) |" in lines
        assert "| CPU time | 8.00 | 2.00 | 6.00 (2.00 to 8.00) |" in lines
        assert "| fox | inf | 100.0% | 100.0% | 0 |" in lines

    check(2.0)
    assert_detects(check, 1.0)
