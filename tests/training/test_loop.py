"""The loop: exact resume, processes equal accumulation, bad steps skipped, interruption saved."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sana.errors import TrainingError
from sana.training.loop import busy_workers, train
from tests.numerics import assert_detects, assert_matches
from tests.training.lines import CPU, Batch, LineTask, fit, fit_in_process, make_config


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("graph", [False, True])
def test_five_and_five_steps_equal_ten(tmp_path: Path, *, graph: bool) -> None:
    whole = fit(tmp_path / "whole", steps=10)
    fit(tmp_path / "halves", steps=5, graph=graph)
    resumed = fit(tmp_path / "halves", steps=10, graph=graph)
    assert_same(whole, resumed)
    assert_detects(lambda other: assert_same(whole, other), fit(tmp_path / "other", steps=9))


def fit_in_two(folder: Path, *options: bool) -> list[dict[str, Tensor]]:
    """The weights of two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(fit_in_process, (2, str(folder), port, *options), nprocs=2)
    return [torch.load(folder / f"weights{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("graph", [False, True])
def test_two_processes_equal_twice_the_accumulation(tmp_path: Path, *, graph: bool) -> None:
    two, other = fit_in_two(tmp_path / "two", graph)
    assert torch.equal(two["weight"], other["weight"])
    one = fit(tmp_path / "one", steps=6, batch=8, accumulate=2)
    for name in ("weight", "bias", "average.weight"):
        assert_matches(one[name], two[name], 1e-6)  # floor 6e-8
    half = fit(tmp_path / "half", steps=6, batch=4)
    assert_detects(lambda other: assert_matches(one["weight"], other, 1e-6), half["weight"])


def test_captured_gradients_must_be_averaged_over_processes(tmp_path: Path) -> None:
    one = fit(tmp_path / "one", steps=6, batch=8, accumulate=2)
    alone, _ = fit_in_two(tmp_path / "two", True, False)
    assert_detects(lambda other: assert_matches(one["weight"], other, 1e-6), alone["weight"])


def test_a_bad_step_is_skipped_and_counted(tmp_path: Path) -> None:
    config = make_config(tmp_path, steps=6)
    task = LineTask(config, CPU, bad_steps=(2, 3))
    progress = train(config, task, CPU)
    assert progress.skipped == 2
    assert all(torch.isfinite(p).all() for p in task.phase.module.parameters())
    record = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert record["skipped"] == 2 and record["step"] == 6


def test_too_many_bad_steps_end_the_run(tmp_path: Path) -> None:
    config = make_config(tmp_path, steps=20, stop_after_bad=3)
    with pytest.raises(TrainingError, match="3 steps in a row up to step 7.*optimizer.rate"):
        train(config, LineTask(config, CPU, bad_steps=tuple(range(4, 20))), CPU)


def test_an_interrupted_run_is_saved_and_goes_on(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", steps=6)
    config = make_config(tmp_path / "cut", steps=6)
    task = LineTask(config, CPU)
    inner = task.phase.loss

    def loss(batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        if task.phase.calls == 4:
            raise KeyboardInterrupt
        return inner(batch, generator)

    task.phase.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(config, task, CPU)
    assert not list((tmp_path / "cut").glob("*.partial"))
    assert_same(whole, fit(tmp_path / "cut", steps=6))


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, steps=2)
    with pytest.raises(TrainingError, match="holds a run with seed=0, this one has 1.*folder="):
        fit(tmp_path, steps=4, seed=1)


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    fit(tmp_path, steps=2)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match="checkpoint.pt cannot be read.*delete it"):
        fit(tmp_path, steps=4)


def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, steps=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def fail(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(TrainingError, match="No space left.*free some space"):
        fit(tmp_path, steps=4)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("workers", "chunk"), [(8, 8), (12, 8), (8, 1), (1, 8), (2, 3), (0, 8)])
def test_every_worker_gets_its_share_of_the_drawing(workers: int, chunk: int) -> None:
    """Items go to workers in turn; only every `chunk`-th is drawn."""

    def check(count: int) -> None:
        assert count <= workers
        assert {item % count for item in range(0, 1000 * chunk, chunk)} == set(range(count))

    if workers == 0:
        assert busy_workers(workers, chunk) == 0
        return
    check(busy_workers(workers, chunk))
    if workers == chunk:
        assert_detects(check, workers)
