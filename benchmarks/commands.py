"""How a benchmark was called, for its report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

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
