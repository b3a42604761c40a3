"""The papers' claims that can be tried in the sticker world, each as a row that can be run again.

`ROWS` is the list; `run` carries one out, seed by seed, and `write` leaves what came as JSON and as
a Markdown table. Which of them hold is in docs/reproduction.md. Start reading at `run`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from types import MappingProxyType

import torch

from sana.errors import RequestError, TrainingError
from sana.evaluation.report import table, write_json
from sana.reproduction import samplers
from sana.reproduction.training import Bench, Variant, run_autoencoder, run_flow
from sana.reproduction.variants import DIT
from sana.weights.load import load

Results = dict[str, list[dict[str, float]]]
"""For each variant, what was measured: one entry a seed, or a picture where nothing is trained."""
Report = Callable[[str], None]
SAMPLED = ("solver", "shift")
"""Rows that draw with a trained model; all others train."""
SEEDS = 64
"""Seeds from 0 that a record looks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A claim, where it is from, and what is run for it."""

    claim: str
    source: str
    expected: str
    variants: tuple[Variant, ...] = ()


def _transformers(row: str) -> tuple[Variant, ...]:
    return tuple(Variant(name=name, change=change) for name, change in DIT[row].items())


ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "attention": Row(
            claim="linear attention alone loses quality; the mix-FFN's convolution wins it back",
            source="Sana",
            expected="linear with a pointwise FFN worst; with mix-FFN about as good as softmax",
            variants=_transformers("attention"),
        ),
        "positions": Row(
            claim="no position embedding is needed, because of the 3x3 convolution",
            source="Sana",
            expected="without positions the pointwise FFN fails, the mix-FFN does not",
            variants=_transformers("positions"),
        ),
        "solver": Row(
            claim="Flow-DPM-Solver needs half the steps of Euler",
            source="Sana",
            expected="at equal steps dpm is nearer to the exact solution, most with shift 1",
        ),
        "shift": Row(
            claim="a shift of the times towards noise helps at few steps",
            source="Sana; Stable Diffusion 3",
            expected="an optimum above 1",
        ),
        "times": Row(
            claim="logit-normal training times are better than uniform ones, most at few steps",
            source="Stable Diffusion 3",
            expected="at 5 steps logit-normal first",
            variants=tuple(
                Variant(name=name, settings=(f"flow.times={name}",), steps=(5, 50))
                for name in ("logit-normal", "uniform", "mode")
            ),
        ),
        "text-norm": Row(
            claim="RMSNorm with a small first scale on the text keeps training stable",
            source="Sana",
            expected="without it the loss is higher, or not finite",
            variants=_transformers("text-norm"),
        ),
        "shortcuts": Row(
            claim="residual shortcuts make strongly compressing autoencoders trainable",
            source="DC-AE",
            expected="a higher PSNR with them at a factor of 32",
        ),
        "captions": Row(
            claim="drawing captions by their score, at a low temperature, helps following prompts",
            source="Sana",
            expected="the lower the temperature the better; all alike is worst",
            variants=tuple(
                Variant(name=f"T = {temperature:g}", temperature=temperature)
                for temperature in (0.0, 1.0, 5.0, math.inf)
            ),
        ),
    }
)


def find(name: str) -> Row:
    """The row called `name`; `RequestError` with the nearest name otherwise."""
    if name not in ROWS:
        near = difflib.get_close_matches(name, ROWS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "known are " + ", ".join(ROWS)
        raise RequestError(f"there is no row {name!r}; {hint}")
    return ROWS[name]


def run(name: str, bench: Bench, seeds: Sequence[int], report: Report) -> Results:
    """Carry out a row and leave its record after every part; see `write`."""
    find(name)
    if name in SAMPLED:
        return _run_samplers(name, bench, seeds, report)
    run_rows({name: bench}, seeds, report)
    return gather(name, bench)


def run_rows(
    benches: Mapping[str, Bench],
    seeds: Sequence[int],
    report: Report,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Carry out the rows that train, each on its bench; `part` (i, n) takes every n-th run from i.

    Seeds are outside, so that a run that is cut off has compared every variant of every row once.
    What is on disk with the same settings is not run again, and what two rows share is run once.
    """
    work: dict[tuple[int, object], list[tuple[str, str]]] = {}
    runs: dict[object, Callable[[Bench, int], dict[str, float]]] = {}
    for seed in seeds:
        for name in benches:
            for label, key, measure in _parts(name):
                work.setdefault((seed, key), []).append((name, label))
                runs[key] = measure
    for number, ((seed, key), places) in enumerate(work.items()):
        if number % part[1] != part[0]:
            continue
        known = {place: _kept(benches[place[0]], place[1], seed) for place in places}
        missing = [place for place, kept in known.items() if kept is None]
        if not missing:
            continue
        found = next((kept for kept in known.values() if kept is not None), None)
        found = found or _measured(runs[key], benches[missing[0][0]], seed, report)
        shown = ", ".join(f"{what} {value:.4g}" for what, value in found.items())
        for name, label in missing:
            bench = benches[name]
            entry = {"label": label, "seed": seed, "results": found, **_conditions(bench)}
            write_json(_place(bench, label, seed), entry)
            report(f"{name}: {label}, seed {seed}: {shown}")
            write(name, gather(name, bench), bench)


def _parts(name: str) -> list[tuple[str, object, Callable[[Bench, int], dict[str, float]]]]:
    """A row's runs: label, what is equal where two rows run the same, and how to run it."""
    if name == "shortcuts":
        return [
            (f"{word} shortcuts", (name, has), partial(_autoencoder, has))
            for word, has in (("with", True), ("without", False))
        ]
    return [
        (one.name, (one.change, one.settings, one.temperature, one.steps), partial(_flow, one))
        for one in find(name).variants
    ]


def _flow(variant: Variant, bench: Bench, seed: int) -> dict[str, float]:
    return run_flow(bench, variant, seed)


def _autoencoder(has_shortcuts: bool, bench: Bench, seed: int) -> dict[str, float]:
    return run_autoencoder(bench, has_shortcuts, seed)


def _conditions(bench: Bench) -> dict[str, object]:
    """What a kept result must agree in."""
    return {
        "settings": list(bench.settings),
        "data": bench.world.version,
        "judged": bool(bench.detector),
        "prompts": bench.prompts,
        "measured": bench.measured,
    }


def _place(bench: Bench, label: str, seed: int) -> Path:
    return bench.folder / "runs" / f"{label.replace(', ', '-').replace(' ', '_')}-{seed}.json"


def _kept(bench: Bench, label: str, seed: int) -> dict[str, float] | None:
    """The result that is on disk, if it was made under the same conditions."""
    path = _place(bench, label, seed)
    if not path.exists():
        return None
    entry = json.loads(path.read_text(encoding="utf-8"))
    if any(entry.get(key) != value for key, value in _conditions(bench).items()):
        return None
    results: dict[str, float] = entry["results"]
    return results


def gather(name: str, bench: Bench) -> Results:
    """All results of a row that are on disk, by whichever process, seeds in order."""
    results: Results = {}
    for label, _, _ in _parts(name):
        kept = (_kept(bench, label, seed) for seed in range(SEEDS))
        results[label] = [one for one in kept if one is not None]
    return results


def _measured(
    measure: Callable[[Bench, int], dict[str, float]], bench: Bench, seed: int, report: Report
) -> dict[str, float]:
    """What a run gave; one whose gradients were no longer finite is a result as well."""
    try:
        return measure(bench, seed)
    except TrainingError as error:
        report(str(error))
        return {"diverged": 1.0}


def _run_samplers(name: str, bench: Bench, seeds: Sequence[int], report: Report) -> Results:
    """Two prompts for each seed, drawn by every setting."""
    components = load(bench.model, device=str(bench.place.device), dtype=torch.float32)
    prompts = samplers.prompts_of(bench.world, 2 * len(seeds))
    starts = [100 * seed + number for seed in seeds for number in range(2)]
    settings = samplers.SOLVERS if name == "solver" else samplers.SHIFTS
    results: Results = {}
    for distance in samplers.measure(components, prompts, starts, settings, report):
        sampler, shift, steps = distance.setting
        part = f"{sampler}, shift {shift:g}, {steps} steps"
        results[part] = [{"distance": error} for error in distance.errors]
        write(name, results, bench)
    return results


def write(name: str, results: Results, bench: Bench) -> None:
    """`NAME.json` and `NAME.md` in the bench's folder."""
    row = ROWS[name]
    record = {
        "row": name,
        "claim": row.claim,
        "source": row.source,
        "expected": row.expected,
        "device": str(bench.place.device),
        "torch": torch.__version__,
        "data": bench.world.version,
        "settings": list(bench.settings),
        "results": results,
    }
    write_json(bench.folder / f"{name}.json", record)
    (bench.folder / f"{name}.md").write_text(as_table(results) + "\n", encoding="utf-8")


def as_table(results: Results) -> str:
    """Mean, and deviation where there are several, of each measure for each variant."""
    measured = {part: entries for part, entries in results.items() if entries}
    names = list(dict.fromkeys(key for part in measured.values() for one in part for key in one))
    rows = [
        [part, *(_spread([one[key] for one in entries if key in one]) for key in names)]
        for part, entries in measured.items()
    ]
    return table(["variant", *names], rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{fmean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ± {stdev(values):.2g} (n = {len(values)})"
