"""What a scoring run is refused for before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana.errors import RequestError
from sana.evaluation import measures
from sana.evaluation.plan import METRICS, Plan, check, parse_metrics


def make_plan(folder: Path, *metrics: str, **more: Any) -> Plan:
    return Plan(**{"folder": folder, "output": folder, "metrics": metrics, **more})


@pytest.mark.parametrize(
    ("metrics", "more", "message"),
    [
        ("fid", {}, "fid needs the network --features"),
        ("fid", {"sources": {"features": "f"}}, "fid needs --reference"),
        ("dpg", {"sources": {"vqa": "v"}}, "dpg needs --questions"),
        ("clip-score", {"sources": {"clip": "c", "vqa": "v"}}, "--vqa is given and none of"),
        ("clip-score", {"sources": {"clip": "c"}, "grid": 512}, "only dpg looks at grids"),
        ("clip-score", {"sources": {"clip": "c"}, "count": 0}, "count is 0"),
        (
            "kid",
            {"sources": {"features": "f"}, "reference": Path("none.npz")},
            "must be a folder of pictures, or an .npz",
        ),
    ],
)
def test_plans_are_checked(metrics: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check(make_plan(Path("x"), metrics, **more))


def test_references_are_checked(tmp_path: Path) -> None:
    more = {"sources": {"features": "f"}}
    with pytest.raises(RequestError, match="the very folder that is scored"):
        check(make_plan(tmp_path, "fid", reference=tmp_path, **more))
    statistics = tmp_path / "s.npz"
    statistics.write_bytes(b"")
    check(make_plan(tmp_path, "fid", reference=statistics, **more))
    with pytest.raises(RequestError, match="kid compares pictures"):
        check(make_plan(tmp_path, "kid", reference=statistics, **more))


def test_metrics_are_parsed() -> None:
    assert parse_metrics(["fid,kid", "fid"]) == ("fid", "kid")
    with pytest.raises(RequestError, match="did you mean clip-score"):
        parse_metrics(["clipscore"])
    with pytest.raises(RequestError, match="metrics is empty"):
        parse_metrics([","])
    assert measures.MEASURES.keys() == METRICS.keys()
