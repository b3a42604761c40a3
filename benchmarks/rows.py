"""The rows of `generate.py`: what is measured, and what issue 4 says of it for one H100.

`peer` is the best that an expert gets of diffusers (compiled, where that was measured), `floor`
arithmetic at 790 TFLOP/s in bf16, `target` what ours may take at most. All three are milliseconds,
or pictures a second where `is_rate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["picture", "decode", "forward", "cold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    kind: Kind
    model: str = "sana-1600m-1024-bf16"
    batch: int = 1
    steps: int = 20
    pixels: int = 1024
    peer: float | None = None
    floor: float | None = None
    target: float | None = None
    in_fp8: bool = False
    """The transformer's large products; checked by wider bounds."""

    @property
    def is_rate(self) -> bool:
        """Whether it is pictures a second that count."""
        return self.batch > 1

    @property
    def is_large(self) -> bool:
        """Whether memory is bounded too."""
        return self.kind == "decode" and self.pixels > 1024

    def shown(self, milliseconds: float) -> float:
        """In the row's unit."""
        return 1000 * self.batch / milliseconds if self.is_rate else milliseconds

    def meets(self, milliseconds: float) -> bool:
        """Whether the target is met."""
        if self.target is None:
            return True
        value = self.shown(milliseconds)
        return value >= self.target if self.is_rate else value <= self.target


MEDIUM, SMALL = "sana-1600m-1024-bf16", "sana-600m-1024"
SPRINT, SMALL_SPRINT = "sana-sprint-1600m-1024", "sana-sprint-600m-1024"
ROWS = (
    Row(name="1.6B-b1", kind="picture", model=MEDIUM, peer=381, floor=164, target=225),
    Row(name="1.6B-b1-fp8", kind="picture", peer=381, target=155, in_fp8=True),
    Row(name="1.6B-4096", kind="forward", pixels=4096, peer=340, floor=115, target=165),
    Row(name="dc-ae-1024", kind="decode", peer=21.8, floor=10.6, target=15.5),
    Row(name="0.6B-b1", kind="picture", model=SMALL, peer=266, floor=70, target=115),
    Row(
        name="sprint-1.6B-s1",
        kind="picture",
        model=SPRINT,
        steps=1,
        peer=69.5,
        floor=17,
        target=30,
    ),
    Row(name="sprint-1.6B-s4", kind="picture", model=SPRINT, steps=4, floor=29, target=45),
    Row(
        name="sprint-0.6B-s1",
        kind="picture",
        model=SMALL_SPRINT,
        steps=1,
        peer=101,
        floor=15,
        target=28,
    ),
    Row(name="dc-ae-4096", kind="decode", pixels=4096, peer=1456, floor=170, target=320),
    Row(name="1.6B-b16", kind="picture", batch=16, peer=3.48, floor=6.7, target=4.8),
    Row(name="1.6B-b16-fp8", kind="picture", batch=16, peer=3.48, target=6.5, in_fp8=True),
    Row(name="0.6B-b16", kind="picture", model=SMALL, batch=16, peer=5.98, floor=17, target=10),
    Row(name="cold", kind="cold", peer=34_000, target=12_000),
)


def chosen(only: str | None) -> list[Row]:
    """The rows that `only` names, or whose names begin with a part of it; SystemExit if none."""
    if only is None:
        return list(ROWS)
    found = []
    for word in filter(None, (part.strip() for part in only.split(","))):
        rows = [row for row in ROWS if row.name == word]
        rows = rows or [row for row in ROWS if row.name.startswith(word)]
        if not rows:
            names = ", ".join(row.name for row in ROWS)
            raise SystemExit(f"no row begins with {word!r}; there are {names}")
        found += rows
    return [row for row in ROWS if row in found]
