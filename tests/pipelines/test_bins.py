"""The aspect-ratio tables: as published, at every side, and the nearest shape is found."""

from __future__ import annotations

import pytest

from numerics import assert_detects
from sana.pipelines.bins import nearest_bin, table

# family-spec.md section 5, the 4096 px table.
PUBLISHED = """
0.25:2048x8192 0.26:2048x7936 0.27:2048x7680 0.28:2048x7424 0.32:2304x7168 0.33:2304x6912
0.35:2304x6656 0.4:2560x6400 0.42:2560x6144 0.48:2816x5888 0.5:2816x5632 0.52:2816x5376
0.57:3072x5376 0.6:3072x5120 0.68:3328x4864 0.72:3328x4608 0.78:3584x4608 0.82:3584x4352
0.88:3840x4352 0.94:3840x4096 1.0:4096x4096 1.07:4096x3840 1.13:4352x3840 1.21:4352x3584
1.29:4608x3584 1.38:4608x3328 1.46:4864x3328 1.67:5120x3072 1.75:5376x3072 2.0:5632x2816
2.09:5888x2816 2.4:6144x2560 2.5:6400x2560 2.89:6656x2304 3.0:6912x2304 3.11:7168x2304
3.62:7424x2048 3.75:7680x2048 3.88:7936x2048 4.0:8192x2048
"""
SMALL_LACKS = {0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88}


def published(side: int) -> dict[float, tuple[int, int]]:
    rows = {}
    for word in PUBLISHED.split():
        ratio, size = word.split(":")
        height, width = (int(value) * side // 4096 for value in size.split("x"))
        if side >= 2048 or float(ratio) not in SMALL_LACKS:
            rows[float(ratio)] = (height, width)
    return rows


@pytest.mark.parametrize("side, count", [(4096, 40), (2048, 40), (1024, 33), (512, 33)])
def test_tables_are_the_published_ones(side: int, count: int) -> None:
    def check(rows: dict[float, tuple[int, int]]) -> None:
        assert rows == table(side)
        assert list(rows) == list(table(side))

    check(published(side))
    assert len(table(side)) == count
    assert_detects(check, {**published(side), 1.0: (side, side + 32)})


@pytest.mark.parametrize("side", [64, 96, 512, 768, 1024, 2048, 4096])
def test_every_side_is_a_multiple_of_32(side: int) -> None:
    assert all(h % 32 == w % 32 == 0 < min(h, w) for h, w in table(side).values())
    assert nearest_bin(100, 100, side) == (side, side)


@pytest.mark.parametrize(
    "asked, drawn",
    [
        ((1080, 1920), (768, 1344)),
        ((1920, 1080), (1344, 768)),
        ((768, 1024), (832, 1152)),
        ((1024, 1000), (1024, 1024)),
        ((64, 4096), (512, 2048)),
    ],
)
def test_the_nearest_ratio_wins(asked: tuple[int, int], drawn: tuple[int, int]) -> None:
    assert nearest_bin(*asked, 1024) == drawn
