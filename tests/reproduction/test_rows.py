"""The rows run on `tiny` and leave their record; captions and samplers against their formulas."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sana.cli.main import main
from sana.data.stickers.compose import Composer
from sana.data.stickers.stream import Studio
from sana.data.stickers.tiny import tiny_world
from sana.data.stickers.twins import draw_twins
from sana.errors import RequestError, TrainingError
from sana.reproduction import rows, samplers
from sana.reproduction.captions import SCORES, choose, shares
from sana.reproduction.rows import ROWS, as_table, find, run
from sana.reproduction.samplers import Setting, measure, relative_errors
from sana.reproduction.training import Bench, Variant, run_flow
from sana.training import losses
from sana.weights.load import load
from tests.numerics import assert_detects, assert_matches
from tests.training.lines import CPU
from tests.training.small import SMALL

COMPOSER = Composer(tiny_world())


@cache
def bench(folder: Path) -> Bench:
    world = tiny_world()
    return Bench(
        world=world,
        studio=Studio.open(world, torch.device("cpu")),
        place=CPU,
        folder=folder,
        settings=(*SMALL, "steps=1", "data.reuse=1", "data.ring=0", "data.batch=2"),
        measured=4,
        model="tiny",
    )


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_runs_and_leaves_its_record(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "REFERENCE_STEPS", 6)
    few = (Setting("dpm", 3.0, 2), Setting("euler", 1.0, 2))
    monkeypatch.setattr(samplers, "SOLVERS", few)
    monkeypatch.setattr(samplers, "SHIFTS", few)
    lines: list[str] = []
    results = run(name, bench(tmp_path / name), [0], lines.append)
    record = json.loads((tmp_path / name / f"{name}.json").read_text())
    assert record["results"] == results and record["claim"] == ROWS[name].claim
    assert lines and len(results) >= 2
    for entries in results.values():
        for one in entries:
            assert one and all(math.isfinite(value) for value in one.values())
    assert (tmp_path / name / f"{name}.md").read_text().startswith("| variant")


def test_two_seeds_have_a_spread() -> None:
    text = as_table({"a": [{"x": 1.0}, {"x": 3.0}], "b": [{"x": 2.0, "y": 0.5}], "c": []})
    assert "2 ± 1.4 (n = 2)" in text and "0.5" in text and "| c" not in text


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match="did you mean 'attention'"):
        find("atention")
    assert main(["reproduce", "solvers"]) == 2
    assert "did you mean 'solver'" in capsys.readouterr().err
    assert main(["reproduce", "solver", "--pack", "tiny", "--seeds", "0"]) == 2
    assert "seeds is 0" in capsys.readouterr().err
    assert main(["reproduce"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in ROWS)


def test_captions_are_drawn_by_the_softmax_of_their_scores() -> None:
    assert shares(0) == (1, 0, 0, 0) and shares(math.inf) == (0.25,) * 4
    drawn: Counter[str] = Counter()
    for index in range(600):
        scene = choose(COMPOSER, index, seed=1, chances=shares(5.0))
        twins = draw_twins(COMPOSER, index, seed=1, split="train")
        label = scene.caption in {c.label for c in COMPOSER.concepts} | {"person"}
        kind = {twins.first.caption: 0, twins.second.caption: 2}.get(scene.caption, 3)
        drawn["1" if label else str(kind)] += 1
        assert scene.objects == twins.first.objects, "the picture stays"

    def check(temperature: float) -> None:
        weights = [math.exp(score / temperature) for score in SCORES]
        for number, weight in enumerate(weights):
            # The standard error of a share is 0.02.
            assert abs(drawn[str(number)] / 600 - weight / sum(weights)) < 0.06

    check(5.0)
    assert_detects(check, 2.0)


def test_distances_by_hand() -> None:
    exact = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 0.0]]]])
    assert relative_errors(exact, exact) == [0, 0]
    assert relative_errors(exact, exact * 1.1)[0] == pytest.approx(0.1)
    assert relative_errors(exact, exact + 1)[1] == 1


def test_more_steps_are_nearer_to_the_exact_solution() -> None:
    components = load("tiny")
    settings = [Setting("euler", 3.0, steps) for steps in (2, 8, 32)]
    found = list(measure(components, ["a circle", "a ring"], [1, 2], settings))

    def check(order: list[int]) -> None:
        for picture in range(2):
            errors = [found[n].errors[picture] for n in order]
            assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2

    check([0, 1, 2])
    assert_detects(check, [2, 1, 0])


def test_training_times() -> None:
    """Mode times against the quantiles of SD3's eq. 20; a shift moves the middle."""
    generator = torch.Generator().manual_seed(0)

    def draw(kind: str, shift: float = 1.0) -> Tensor:
        device = torch.device("cpu")
        return losses.draw_times(kind, 40_000, shift=shift, generator=generator, device=device)

    assert abs(draw("uniform").mean().item() - 0.5) < 0.01
    assert abs(draw("uniform", 3.0).median().item() - 0.75) < 0.01
    assert abs(draw("logit-normal", 3.0).median().item() - 0.75) < 0.01
    u = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    expected = 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)

    def check(times: Tensor) -> None:
        assert times.min() >= 0 and times.max() <= 1
        assert_matches(expected.sort().values, times.double().sort().values, 0.01)  # floor 0.003

    check(draw("mode"))
    assert_detects(check, draw("uniform"))


def test_a_run_that_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(bench: Bench, variant: Variant, seed: int) -> dict[str, float]:
        if variant.name == "no norm":
            raise TrainingError("50 steps in a row gave a gradient that is not finite")
        return {"velocity error": 1.0}

    monkeypatch.setattr(rows, "run_flow", measured)
    lines: list[str] = []
    results = run("text-norm", bench(tmp_path), range(2), lines.append)
    assert results["no norm"] == [{"diverged": 1.0}] * 2
    assert results["norm, scale 1"] == [{"velocity error": 1.0}] * 2
    assert "| no norm" in as_table(results) and any("not finite" in line for line in lines)


def test_variants_share_one_pool(tmp_path: Path) -> None:
    pooled = replace(
        bench(tmp_path),
        settings=(*SMALL, "steps=2", "data.reuse=2", "data.ring=8", "data.batch=2"),
        pools={},
    )
    for seed in (0, 1):
        for variant in ROWS["attention"].variants[:2]:
            assert math.isfinite(run_flow(pooled, variant, seed)["velocity error"])
    assert len(pooled.pools) == 2, "one for each seed"
    first, second = (ring.store for ring in pooled.pools.values())
    assert first is not None and second is not None
    assert first.latents.isfinite().all() and not torch.equal(first.latents, second.latents)
    with pytest.raises(AssertionError):
        assert torch.equal(first.latents[0], first.latents[-1]), "the pool holds one picture only"


def test_rows_share_runs_go_on_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []

    def measured(bench: Bench, variant: Variant, seed: int) -> dict[str, float]:
        done.append((variant.name, seed))
        return {"velocity error": float(seed)}

    monkeypatch.setattr(rows, "run_flow", measured)
    names = ("attention", "positions")
    benches = {name: replace(bench(tmp_path), folder=tmp_path / name) for name in names}
    rows.run_rows(benches, range(2), print, (0, 2))
    assert len(done) == 5, "half of five runs by two seeds; two are the same in both rows"
    rows.run_rows(benches, range(2), print, (1, 2))
    assert len(done) == len(set(done)) == 10
    assert [seed for _, seed in done[:3]] == [0, 0, 0]
    rows.run_rows(benches, range(2), print)
    assert len(done) == 10, "what is on disk is not run again"
    for name in names:
        found = json.loads((tmp_path / name / f"{name}.json").read_text())["results"]
        assert all([one["velocity error"] for one in e] == [0, 1] for e in found.values())
    other = {name: replace(b, settings=(*b.settings, "steps=9")) for name, b in benches.items()}
    rows.run_rows(other, range(1), print)
    assert len(done) == 15, "other settings are other results"
    assert main(["reproduce", "attention", "--pack", "tiny", "--part", "2/2"]) == 2
