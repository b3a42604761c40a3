"""Runs the tests that compare numbers and writes what they measured to docs/numerics.md.

Each row is one test: how many comparisons it made, its worst error, the bound beside it, and how
many planted faults it caught. Run it from the repository root, after a change of any of them:
`python scripts/write_numerics.py`.
"""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest

PAGE = Path("docs/numerics.md")
FOLDERS = {
    "tests/parity": "Against diffusers and transformers, on the same weights and inputs",
    "tests/samplers": "Samplers against closed forms",
    "tests/models": "Networks against their formulas",
    "tests/kernels": "Kernels against loops",
}
LINE = re.compile(r"^(?:rel_rms|ratio) (\S+) \(bound (\S+)\)$", re.MULTILINE)


@dataclass(slots=True)
class Row:
    """What one test, with all its parameters, has measured."""

    worst: dict[float, float] = field(default_factory=dict)
    comparisons: int = 0
    faults: int = 0

    def take(self, text: str) -> None:
        """Read the lines of `assert_matches`; over its bound is a fault that a check caught."""
        for measured, bound in ((float(m), float(b)) for m, b in LINE.findall(text)):
            if measured > bound:
                self.faults += 1
                continue
            self.comparisons += 1
            self.worst[bound] = max(measured, self.worst.get(bound, 0.0))


class Recorder:
    """A pytest plugin that reads what passing tests printed."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each test."""
        if report.when == "call" and report.passed:
            name = report.nodeid.split("[")[0]
            self.rows.setdefault(name, Row()).take(report.capstdout)


def main() -> int:
    """Run, and write the page only if every test has passed."""
    recorder = Recorder()
    options = ["-q", "-p", "no:cacheprovider", "--deselect", "tests/parity/test_page.py"]
    code = pytest.main([*options, *FOLDERS], plugins=[recorder])
    if code == pytest.ExitCode.OK:
        PAGE.write_text(page(recorder.rows), encoding="utf-8")
        print(PAGE)
    return int(code)


def page(rows: dict[str, Row]) -> str:
    """The whole page in Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    parts = [
        "# Numbers",
        "",
        "Written by `scripts/write_numerics.py` from the tests; do not edit. The error is the RMS",
        "of the difference over the RMS of the reference, on random weights at small size, in fp32",
        "if nothing else is said; bf16 rows give our error over the peer's. A bound is at most ten",
        "times the error measured when it was set, and every parity test also plants faults (a",
        "weight one percent larger, a step's time shifted, the other convention) that its check",
        "must catch; those that show in the shape are not counted here. A test's name is its file",
        f"and function. This run: {versions}, {platform.machine()} CPU.",
        "",
        "Networks of full size, in fp32 and bf16 on a GPU: `benchmarks/parity.py`; reports are in",
        "`benchmarks/results/`.",
    ]
    for folder, title in FOLDERS.items():
        parts += ["", f"## {title}", "", *table(folder, rows)]
    return "\n".join(parts) + "\n"


def table(folder: str, rows: dict[str, Row]) -> list[str]:
    """One line for each test of `folder` and each bound in it."""
    lines = [
        "| test | comparisons | worst error | bound | faults caught |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        if not name.startswith(folder + "/") or not row.comparisons:
            continue
        file, function = name.removeprefix(folder + "/").split("::")
        label = f"{file.removeprefix('test_').removesuffix('.py')}: {function}"
        label = label.replace("test_", "").replace("_", " ")
        errors = "<br>".join(f"{value:.1e}" for value in row.worst.values())
        bounds = "<br>".join(f"{bound:.1e}" for bound in row.worst)
        lines.append(f"| {label} | {row.comparisons} | {errors} | {bounds} | {row.faults} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
