"""Line budgets: no file of the package over 420 lines, no function over 50.

A file or function that needs more holds two ideas. Prints each offender with its size and fails.
Run it from the repository root: `python scripts/check_budget.py [FOLDER ...]`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 420
FUNCTION_LINES = 50


def main(folders: list[str]) -> int:
    """Check every Python file under `folders`; 1 if any is over a budget."""
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    if not files:
        print(f"no Python file under {', '.join(folders)}: run this from the repository root")
        return 1
    offenders = [line for path in files for line in over_budget(path)]
    print("\n".join(offenders) if offenders else f"{len(files)} files within their budgets")
    return 1 if offenders else 0


def over_budget(path: Path) -> Iterator[str]:
    """One line for each budget that the file at `path` breaks."""
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        yield f"{path}: {lines} lines; a file has at most {FILE_LINES}"
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            yield (
                f"{path}:{node.lineno}: {node.name} has {length} lines; "
                f"a function has at most {FUNCTION_LINES}"
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["src", "tests", "scripts", "examples"]))
