"""The sticker exam's pictures: drawn in batches, saved at once, shared out among processes.

Every process draws its share of each list; a run that was killed goes on where it stopped. Start
reading at `draw_cases`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana.data.stickers.prompts import PromptCase
from sana.distributed import Place
from sana.evaluation.draw import told
from sana.evaluation.folders import agree
from sana.evaluation.plan import Report
from sana.evaluation.prompts import Item, write_list
from sana.evaluation.rebuilt import weights_of
from sana.evaluation.sample import Draw, drawer
from sana.evaluation.sight import open_picture
from sana.evaluation.stickers import SEED_STRIDE
from sana.evaluation.traits import TraitCase, jobs_of
from sana.pipelines.images import save_png, to_pil, to_tensor
from sana.weights.load import Components

if TYPE_CHECKING:
    from sana.evaluation.exam import Exam

HANDS = 8
"""Threads that write and read picture files: a batch is drawn faster than one packs it."""


def draw_cases(
    exam: Exam,
    components: Components,
    cases: Sequence[PromptCase],
    name: str,
    place: Place,
    report: Report,
) -> list[list[Path]]:
    """Where each case's pictures are; this process has drawn its share as far as it was missing."""
    folder = exam.output / name
    items = [
        Item(key=f"{i:05}", prompt=c.prompt, facts={"kind": c.kind}) for i, c in enumerate(cases)
    ]
    head = _head(exam, components, [case.prompt for case in cases])
    with told(place):
        if place.is_main:
            agree(folder / "exam.json", head)
            write_list(items, folder / "prompts.jsonl")
    jobs = [(i, k) for k in range(exam.seeds) for i in range(len(cases))]
    mine = jobs[place.rank :: place.world]
    missing = [(i, k) for i, k in mine if not (folder / items[i].file(k)).exists()]
    report(f"drawing {name}", len(mine) - len(missing), len(mine))
    draw: Draw = drawer(components, exam.settings)
    for start in range(0, len(missing), exam.settings.batch):
        part = missing[start : start + exam.settings.batch]
        seeds = [SEED_STRIDE * i + k for i, k in part]
        pictures = draw([cases[i].prompt for i, _ in part], seeds)
        facts = [
            {"prompt": cases[i].prompt, "seed": seed, **head}
            for (i, _), seed in zip(part, seeds, strict=True)
        ]
        _save(pictures, [folder / items[i].file(k) for i, k in part], facts)
        report(f"drawing {name}", len(part), len(mine))
    return [[folder / item.file(k) for k in range(exam.seeds)] for item in items]


def draw_traits(
    exam: Exam, components: Components, cases: Sequence[TraitCase], place: Place, report: Report
) -> Draw:
    """Draws this process's share of the pictures; what it gives back draws none that is there."""
    folder = exam.output / "traits"
    with told(place):
        if place.is_main:
            agree(folder / "exam.json", _head(exam, components, [case.prompt for case in cases]))
    draw = kept(drawer(components, exam.settings), folder)
    prompts, seeds = jobs_of(cases, range(exam.seeds))
    mine = range(len(prompts))[place.rank :: place.world]
    for start in range(0, len(mine), exam.settings.batch):
        part = mine[start : start + exam.settings.batch]
        draw([prompts[n] for n in part], [seeds[n] for n in part])
        report("drawing traits", len(part), len(mine))
    return draw


def kept(draw: Draw, folder: Path) -> Draw:
    """`draw`, with every picture saved by its seed and not drawn again where it is there."""

    def path_of(seed: int) -> Path:
        return folder / f"{seed:08}.png"

    def drawn(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        missing = [(p, s) for p, s in zip(prompts, seeds, strict=True) if not path_of(s).exists()]
        if missing:
            pictures = draw([p for p, _ in missing], [s for _, s in missing])
            facts = [{"prompt": prompt, "seed": seed} for prompt, seed in missing]
            _save(pictures, [path_of(seed) for _, seed in missing], facts)
        return read_all([path_of(seed) for seed in seeds])

    return drawn


def read_all(paths: Sequence[Path]) -> Tensor:
    """Picture files as (B, 3, H, W) in -1..1."""
    return torch.cat(_by_all_hands(lambda path: to_tensor(open_picture(path)), paths))


def _save(pictures: Tensor, paths: Sequence[Path], facts: Sequence[dict[str, Any]]) -> None:
    def save(number: int) -> Path:
        about = {"drawn_in_batches": facts[number]}
        return save_png(to_pil(pictures[number]), paths[number], about)

    _by_all_hands(save, range(len(paths)))


def _by_all_hands(work: Callable[[Any], Any], things: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(HANDS) as pool:
        return list(pool.map(work, things))


def _head(exam: Exam, components: Components, prompts: Sequence[str]) -> dict[str, Any]:
    """What pictures depend on; a run goes on only where all of it is the same."""
    settings = {k: v for k, v in asdict(exam.settings).items() if k != "batch"}
    return {
        "model": components.config.name,
        "weights": f"{weights_of(components.dit)} {weights_of(components.autoencoder)}",
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "seeds": exam.seeds,
        **settings,
    }
