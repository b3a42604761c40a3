"""How a benchmark was called: for its report, and what it is to try."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from sana.kernels.proven import UNPROVEN, Way

PLACES = ("--models", "--write")
"""Options that name a place of one machine."""


def command() -> str:
    """How this program was run, without where its files were put."""
    program, *given = sys.argv
    for option in PLACES:
        if option in given:
            place = given.index(option)
            del given[place : place + 2]
    return shlex.join(["python", f"benchmarks/{Path(program).name}", *given])


def named_ways(text: str) -> list[Way]:
    """Those of `UNPROVEN` that --try names, with commas between, or "all" of them."""
    return [way for way in UNPROVEN if way in text.split(",") or text == "all"]
