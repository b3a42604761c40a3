"""Curves of a cost against a size: slopes fitted in the logarithms, crossings, and plots in SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT, MARGIN = 420, 300, 52
COLORS = ("#0b6e99", "#c8553d", "#6a994e", "#8d6a9f")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a size costs; no bytes where nobody counted them."""

    size: float
    seconds: float
    bytes: int | None = None


@dataclass(slots=True, kw_only=True)
class Curve:
    """The points of one thing, in the order of their sizes."""

    name: str
    panel: str
    """Curves of one panel are drawn together."""
    size: str
    """What the sizes count, such as tokens."""
    points: list[Point] = field(default_factory=list)
    stopped: str | None = None
    """Why there are no larger sizes."""

    def values(self, of: str) -> list[tuple[float, float]]:
        """(size, seconds or bytes), where known."""
        pairs = [(point.size, getattr(point, of)) for point in self.points]
        return [(size, value) for size, value in pairs if value]

    def slope(self, of: str, last: int = 3) -> float | None:
        """d log(seconds or bytes) / d log(size) over the `last` sizes, by least squares.

        The larger sizes alone: small ones cost what it takes to begin. None for fewer than two.
        """
        pairs = self.values(of)[-last:]
        if len(pairs) < 2:
            return None
        x, y = ([math.log(pair[i]) for pair in pairs] for i in range(2))
        middle = sum(x) / len(x)
        spread = sum((a - middle) ** 2 for a in x)
        return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / spread


def crossing(first: Curve, second: Curve, of: str = "seconds") -> float | None:
    """The size from which on `first` is cheaper, between the sizes where they change places.

    The last such place; None if they never do, or if `second` is cheaper at the end.
    """
    other = dict(second.values(of))
    pairs = [
        (size, math.log(value / other[size])) for size, value in first.values(of) if size in other
    ]
    found = None
    for (small, before), (large, after) in zip(pairs, pairs[1:], strict=False):
        if before > 0 >= after:
            part = before / (before - after)
            found = math.exp(math.log(small) + part * math.log(large / small))
        elif before <= 0 < after:
            found = None
    return found


def plot(curves: Sequence[Curve], title: str) -> str:
    """An SVG of small charts, both axes logarithmic: time above, memory below, a column a panel."""
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    rows = ("seconds", "bytes")
    size = (WIDTH * len(panels), HEIGHT * len(rows) + 30)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
        f'<text x="12" y="20" font-size="14">{escape(title)}</text>',
    ]
    for row, of in enumerate(rows):
        for column, panel in enumerate(panels):
            shown = [curve for curve in curves if curve.panel == panel and curve.values(of)]
            if shown:
                place = f"translate({column * WIDTH} {row * HEIGHT + 30})"
                parts.append(f'<g transform="{place}">{"".join(_chart(shown, panel, of))}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _chart(curves: Sequence[Curve], panel: str, of: str) -> Iterator[str]:
    unit = 1000.0 if of == "seconds" else 2.0**-20
    what = "milliseconds" if of == "seconds" else "MiB at work"
    sizes = [size for curve in curves for size, _ in curve.values(of)]
    costs = [value * unit for curve in curves for _, value in curve.values(of)]
    x = _axis(min(sizes), max(sizes), MARGIN, WIDTH - 16)
    y = _axis(min(costs), max(costs), HEIGHT - 44, 30)
    yield f'<text x="{MARGIN}" y="18">{escape(panel)}: {what}</text>'
    for size in sorted(set(sizes)):
        yield (
            f'<text x="{x(size):.1f}" y="{HEIGHT - 28}" text-anchor="middle" '
            f'font-size="9">{size:g}</text>'
        )
    low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))
    # Powers of ten alone where there are enough of them.
    marks = (1, 2, 5) if high - low <= 2 else (1,)
    for value in (mark * 10.0**power for power in range(low, high + 1) for mark in marks):
        height = y(value)
        if 26 <= height <= HEIGHT - 40:
            yield (
                f'<line x1="{MARGIN}" x2="{WIDTH - 16}" y1="{height:.1f}" y2="{height:.1f}" '
                f'stroke="#ddd"/><text x="{MARGIN - 6}" y="{height + 4:.1f}" '
                f'text-anchor="end" font-size="10">{value:g}</text>'
            )
    yield (
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
        f"{escape(curves[0].size)}</text>"
    )
    for index, curve in enumerate(curves):
        color = COLORS[index % len(COLORS)]
        places = [(x(size), y(value * unit)) for size, value in curve.values(of)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        yield f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>'
        for a, b in places:
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>'
        slope = curve.slope(of)
        label = curve.name if slope is None else f"{curve.name} (slope {slope:.2f})"
        yield (
            f'<text x="{MARGIN + 8}" y="{44 + 15 * index}" fill="{color}">{escape(label)}</text>'
        )


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Logarithmic, with a little room at both ends."""
    first, last = math.log(low) - 0.15, math.log(high) + 0.15
    return lambda value: start + (math.log(value) - first) / (last - first) * (end - start)
