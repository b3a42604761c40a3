"""benchmarks/generate.py at small size: what it prints, and that a wrong result prints no time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generate, rigs
from benchmarks.rigs import Check
from benchmarks.rows import ROWS, Row, chosen
from numerics import assert_detects

pytestmark = pytest.mark.parity


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> tuple[int, Any, str]:
    """Exit code, JSON and Markdown of a run."""
    line = ["generate.py", "--tiny", "--device", "cpu", "--write", str(folder), *options]
    monkeypatch.setattr("sys.argv", line)
    code = generate.main()
    [data] = folder.glob("*-generate-cpu.json")
    [page] = folder.glob("*-generate-cpu.md")
    return code, json.loads(data.read_text()), page.read_text()


def test_rows_have_their_stages_and_the_table_comes_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, data, page = run(monkeypatch, tmp_path, "--only", "sprint-0.6B,dc-ae-1024")
    assert code == 0
    assert list(data["rows"]) == ["dc-ae-1024", "sprint-0.6B-s1"]
    row = data["rows"]["sprint-0.6B-s1"]
    assert row["stated"] == {"peer": 101, "floor": 15, "target": 28, "unit": "ms"}
    for whose in ("ours", "peer"):
        assert 0 < row[whose]["median_ms"] <= row[whose]["p90_ms"]
        assert {"first_ms", "text", "steps", "decode", "runs"} <= set(row[whose])
        assert data["rows"]["dc-ae-1024"][whose]["median_ms"] > 0
    assert len(row["checks"]) == 2 and all(check.endswith("agrees") for check in row["checks"])
    assert page == capsys.readouterr().out
    assert page.splitlines()[-1].startswith("| sprint-0.6B-s1 | ")


def test_a_fast_wrong_network_reports_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both ways to be wrong: another velocity, and a run that repeats an earlier one."""
    plain = rigs.last_latent
    first: list[Any] = []

    def stale(pipeline: Any, request: Any) -> torch.Tensor:
        if pipeline._dtype == torch.bfloat16:
            first.append(plain(pipeline, request))
            return first[0]
        return plain(pipeline, request)

    monkeypatch.setattr(rigs, "last_latent", stale)
    only = ("--only", "sprint-0.6B-s1", "--peer", "none")
    code, data, page = run(monkeypatch, tmp_path, *only)
    row = data["rows"]["sprint-0.6B-s1"]
    assert code == 1 and "ours" not in row and row["disagrees"].startswith("1 step: ")
    assert "| sprint-0.6B-s1 | - | - | 101 | 15 | 28 | disagrees" in page


def test_a_row_in_fp8_is_held_to_bf16_and_drawn_in_fp8(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[str] = []
    timed = generate.time_request

    def watch(pipeline: Any, *rest: Any, **options: Any) -> Any:
        drawn.append(pipeline.dtype)
        return timed(pipeline, *rest, **options)

    monkeypatch.setattr(generate, "time_request", watch)
    _, data, _ = run(monkeypatch, tmp_path, "--only", "1.6B-b1-fp8", "--peer", "none")
    row = data["rows"]["1.6B-b1-fp8"]
    assert drawn == ["fp8"] and row["ours"]["median_ms"] > 0
    ours, peer = (float(word) for word in re.findall(r"\d\.\d+e-\d+", row["checks"][0]))
    assert 1.3 * peer < ours < rigs.FP8_BOUND * peer


def test_a_failing_row_does_not_take_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(row: Row, bench: Any) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(generate, "measure_forward", fail)
    only = ("--only", "1.6B-4096,dc-ae-1024", "--peer", "none")
    code, data, _ = run(monkeypatch, tmp_path, *only)
    assert code == 1
    assert data["rows"]["1.6B-4096"]["failed"] == "RuntimeError: no such kernel"
    assert data["rows"]["dc-ae-1024"]["ours"]["median_ms"] > 0
    code, data, _ = run(monkeypatch, tmp_path, "--only", "dc", "--seconds", "-1")
    assert code == 1 and all("skipped" in row for row in data["rows"].values())


def test_a_check_passes_near_the_peer_alone() -> None:
    def check(**changes: float | None) -> None:
        fields: dict[str, Any] = {"what": "", "ours": 0.014, "theirs": 0.01, "bound": 1.5}
        assert Check(**{**fields, "wide": 1e-6, **changes}).passes

    check()
    check(ours=0.0)
    check(wide=None)
    faults: list[dict[str, float | None]] = [{"ours": 0.016}, {"ours": float("nan")}]
    faults += [{"wide": 1e-4}, {"wide": float("nan")}, {"theirs": float("nan")}]
    # Where the peer itself is lost, nothing can be told.
    faults += [{"theirs": 1.5, "ours": 1.5}]
    for fault in faults:
        assert_detects(lambda fault: check(**fault), fault)


def test_rows_are_chosen_by_name_or_beginning() -> None:
    assert chosen(None) == list(ROWS)
    assert [row.name for row in chosen("dc-ae, 1.6B-b1")] == ["1.6B-b1", "dc-ae-1024", "dc-ae-4096"]
    with pytest.raises(SystemExit, match="no row begins with 'x'"):
        chosen("x")
    rate, time = chosen("1.6B-b16")[0], chosen("1.6B-b1")[0]
    assert rate.shown(4000) == 4.0 and not rate.meets(4000) and rate.meets(3300)
    assert time.shown(4000) == 4000 and not time.meets(226) and time.meets(225)
