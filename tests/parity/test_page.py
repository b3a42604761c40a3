"""docs/numerics.md is written from these tests; one that it lacks makes it stale."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from numerics import assert_detects

FOLDER = Path(__file__).parent
WITHOUT_ROWS = {FOLDER / "test_page.py", *FOLDER.glob("test_*program.py")}


@pytest.mark.parity
def test_the_page_names_every_parity_test() -> None:
    page = (FOLDER.parents[1] / "docs" / "numerics.md").read_text(encoding="utf-8")

    def check(text: str) -> None:
        for path in sorted(set(FOLDER.glob("test_*.py")) - WITHOUT_ROWS):
            source = path.read_text(encoding="utf-8")
            for name in re.findall(r"^def test_(\w+)", source, re.MULTILINE):
                label = f"{path.stem.removeprefix('test_')}: {name}".replace("_", " ")
                assert f"| {label} |" in text, (
                    f"{label} is not in docs/numerics.md; run scripts/write_numerics.py"
                )

    check(page)
    assert_detects(check, page.replace("| networks: controlnet |", "|"))
