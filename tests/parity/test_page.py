"""docs/numerics.md is written from these tests; one that it lacks makes it stale."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from numerics import assert_detects

FOLDER = Path(__file__).parent


@pytest.mark.parity
def test_the_page_names_every_parity_test() -> None:
    page = (FOLDER.parents[1] / "docs" / "numerics.md").read_text(encoding="utf-8")

    def check(text: str) -> None:
        for path in sorted(FOLDER.glob("test_*.py")):
            source = path.read_text(encoding="utf-8")
            for name in re.findall(r"^def test_(\w+)", source, re.MULTILINE):
                label = f"{path.stem.removeprefix('test_')}: {name}".replace("_", " ")
                assert f"| {label} |" in text or path == Path(__file__), (
                    f"{label} is not in docs/numerics.md; run scripts/write_numerics.py"
                )

    check(page)
    assert_detects(check, page.replace("| networks: controlnet |", "|"))
