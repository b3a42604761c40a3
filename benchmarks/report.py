"""What `generate.py` says: a line as each row ends, JSON and Markdown so far, the table at last."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import command
from benchmarks.rows import Row

BAD = ("failed", "disagrees", "skipped")


class Report:
    """The results, in the order of the rows."""

    def __init__(self, *, device: torch.device, folder: Path | None, peer: str | None) -> None:
        is_cpu = device.type == "cpu"
        self.device = "CPU" if is_cpu else torch.cuda.get_device_name(device)
        self.folder, self.peer = folder, peer
        self.results: list[tuple[Row, dict[str, Any]]] = []

    @property
    def is_good(self) -> bool:
        """Every row ran, agreed and, on a GPU, met its target."""
        return all(
            not any(word in got for word in BAD)
            and (self.device == "CPU" or row.meets(got["ours"]["median_ms"]))
            for row, got in self.results
        )

    def add(self, row: Row, got: dict[str, Any]) -> None:
        """Take a row's result, print it, and write all there is."""
        self.results.append((row, got))
        print(f"{row.name}: {_said(row, got)}", file=sys.stderr, flush=True)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kind = self.device.replace(" ", "-").lower()
        stem = self.folder / f"{datetime.date.today()}-generate-{kind}"
        stem.with_suffix(".json").write_text(json.dumps(self.as_json(), indent=1) + "\n")
        stem.with_suffix(".md").write_text("\n".join(self.page()) + "\n", encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """All that was measured; `stated` is issue 4's, for one H100."""
        return {
            "device": self.device,
            "torch": torch.__version__,
            "peer": self.peer,
            "command": command(),
            "date": str(datetime.date.today()),
            "rows": {
                row.name: {
                    **got,
                    "stated": {
                        "peer": row.peer,
                        "floor": row.floor,
                        "target": row.target,
                        "unit": "pictures a second" if row.is_rate else "ms",
                    },
                }
                for row, got in self.results
            },
        }

    def page(self) -> Iterator[str]:
        """The report in Markdown; the table comes last."""
        yield f"# Speed of a picture, {datetime.date.today()}, {self.device}"
        yield ""
        yield f"torch {torch.__version__}; peer: {self.peer or 'none'}; `{command()}`."
        yield "Random weights of the official sizes in bf16; milliseconds, or pictures a second"
        yield "(/s). Peer's best, floor and target are what issue 4 says of one H100."
        yield ""
        for row, got in self.results:
            for check in got.get("checks", ()):
                yield f"- {row.name}: {check}"
        yield ""
        yield "| row | whose | first | median | p90 | runs | text | steps | decode | peak GiB |"
        yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
        for row, got in self.results:
            for whose in ("ours", "peer"):
                if whose in got:
                    yield _detail(row.name, whose, got[whose])
        for row, got in self.results:
            for way, took in got.get("ours", {}).get("ways", {}).items():
                yield (
                    f"| {row.name}, {way} | ours | "
                    + _cells(took)
                    + " | | | | "
                    + _gib(took)
                    + " |"
                )
        yield ""
        yield "| row | ours | peer, this run | peer's best | floor | target | |"
        yield "|---|---:|---:|---:|---:|---:|---|"
        for row, got in self.results:
            yield _summary(row, got, is_gpu=self.device != "CPU")


def _summary(row: Row, got: dict[str, Any], *, is_gpu: bool) -> str:
    unit = "/s" if row.is_rate else ""
    stated = " | ".join(_number(value, unit) for value in (row.peer, row.floor, row.target))
    bad = [word for word in BAD if word in got]
    if bad:
        return f"| {row.name} | - | - | {stated} | {bad[0]}: {got[bad[0]]} |"
    ours, peer = (
        None if whose not in got else row.shown(got[whose]["median_ms"])
        for whose in ("ours", "peer")
    )
    met = ""
    if is_gpu and row.target is not None:
        met = "met" if row.meets(got["ours"]["median_ms"]) else "missed"
    return f"| {row.name} | {_number(ours, unit)} | {_number(peer, unit)} | {stated} | {met} |"


def _said(row: Row, got: dict[str, Any]) -> str:
    bad = [f"{word}: {got[word]}" for word in BAD if word in got]
    if bad:
        return bad[0]
    parts = [
        f"{whose} {got[whose]['median_ms']:.1f} ms (p90 {got[whose]['p90_ms']:.1f}, "
        f"{got[whose]['runs']} runs)"
        for whose in ("ours", "peer")
        if whose in got
    ]
    return ", ".join(parts)


def _detail(name: str, whose: str, took: dict[str, Any]) -> str:
    stages = " | ".join(
        f"{took[stage]['median_ms']:.1f}" if stage in took else ""
        for stage in ("text", "steps", "decode")
    )
    return f"| {name} | {whose} | {_cells(took)} | {stages} | {_gib(took)} |"


def _cells(took: dict[str, Any]) -> str:
    first = f"{took['first_ms']:.0f}" if "first_ms" in took else ""
    return f"{first} | {took['median_ms']:.1f} | {took['p90_ms']:.1f} | {took['runs']}"


def _gib(took: dict[str, Any]) -> str:
    peak = took.get("peak_bytes")
    return "" if peak is None else f"{peak / 2**30:.2f}"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.4g}{unit}"
