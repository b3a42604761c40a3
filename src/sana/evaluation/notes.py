"""Results of pictures, one JSON line each as they come, so that a killed run goes on from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Notes:
    """What is known by key; notes of another `head` (networks, rules) are begun anew."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        whole = self._read(dict(head))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not whole:
            path.write_text(json.dumps(dict(head)) + "\n", encoding="utf-8")

    def get(self, key: str) -> Any:
        """The result, or None."""
        return self.known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a result, at once on the disk."""
        self.known[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, value]) + "\n")

    def _read(self, head: dict[str, Any]) -> bool:
        """Whether the file is of this head; a last line that was cut off is dropped from it."""
        if not self.path.exists():
            return False
        lines = self.path.read_bytes().split(b"\n")
        try:
            if json.loads(lines[0]) != head:
                return False
            self.known = dict(json.loads(line) for line in lines[1:-1])
        except (ValueError, TypeError):
            self.known = {}
            return False
        if lines[-1]:
            self.path.write_bytes(b"\n".join(lines[:-1]) + b"\n")
        return True
