"""One record of a scored folder: what was measured, on what, with which networks."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana import __version__
from sana.evaluation.networks import Network
from sana.evaluation.report import Share, table, write_json
from sana.pipelines.images import free_name

PACKAGES = ("torch", "transformers", "torchmetrics", "numpy", "pillow")
NAME = "scores.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric of a folder; `share` has its 95 % interval, and how many it was resampled over."""

    metric: str
    """As asked for: "fid"."""
    name: str
    """As it may be called: "FID", or "Frechet distance (...)" in other features."""
    share: Share
    is_better_high: bool
    pictures: int
    protocol: str
    """What was done, and how the interval was made."""
    networks: tuple[Network, ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict)
    """Scores by kind or category, and counts of what was left out."""
    digits: int = 3

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "metric": self.metric,
            "name": self.name,
            "value": self.share.value,
            "interval_95": [self.share.low, self.share.high],
            "resampled": self.share.count,
            "better": "high" if self.is_better_high else "low",
            "pictures": self.pictures,
            "protocol": self.protocol,
            "networks": [network.to_json() for network in self.networks],
            "parts": _plain(self.parts),
        }


def make_record(scores: Sequence[Score], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run: `facts` about pictures and prompts, versions, date, scores."""
    return {
        "sana": __version__,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **facts,
        "versions": versions(),
        "scores": [score.to_json() for score in scores],
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that scores depend on, as far as they are here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def score_table(scores: Sequence[Score]) -> str:
    """A Markdown table of the scores, and one of the parts of each that has any."""
    rows = [
        [
            score.name,
            f"{score.share.value:.{score.digits}f}",
            f"{score.share.low:.{score.digits}f} to {score.share.high:.{score.digits}f}",
            "higher" if score.is_better_high else "lower",
            score.pictures,
        ]
        for score in scores
    ]
    tables = [table(["metric", "score", "95 % interval", "better", "pictures"], rows)]
    for score in scores:
        shares = {name: part for name, part in score.parts.items() if isinstance(part, Share)}
        if shares:
            lines = [
                [
                    name,
                    f"{part.value:.{score.digits}f}",
                    f"{part.low:.{score.digits}f} to {part.high:.{score.digits}f}",
                    part.count,
                ]
                for name, part in shares.items()
            ]
            tables.append(table([score.name, "score", "95 % interval", "of"], lines))
    return "\n\n".join(tables)


def write_record(
    scores: Sequence[Score], facts: Mapping[str, Any], output: Path
) -> tuple[Path, str]:
    """Write scores.json and scores.md (or the next free number); its path, and the table."""
    record = make_record(scores, facts)
    text = score_table(scores)
    path = free_name(output / NAME)
    write_json(path, record)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return path, text


def drawn_by(folder: Path, plan: str) -> dict[str, Any] | None:
    """What the drawing run wrote of itself, if it was one of ours."""
    path = folder / plan
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(found) if isinstance(found, dict) else None


def _plain(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "value": part.value,
            "interval_95": [part.low, part.high],
            "resampled": part.count,
        }
        if isinstance(part, Share)
        else part
        for name, part in parts.items()
    }
