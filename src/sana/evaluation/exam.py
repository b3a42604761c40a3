"""The sticker world's own measures of a model, whole: `sana evaluate stickers`.

Held-out prompts are drawn with several seeds each, saved, and judged by the detector; prompts of
what training did show are drawn beside them, to compare with; renders of the held-out prompts give
the detector's own accuracy and, on demand, a reference for Frechet distances. Start reading at
`score_stickers`; the rules of judging are in `sana.evaluation.stickers`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.data.stickers.prompts import COMPARED, PromptCase, held_out_prompts, seen_prompts
from sana.data.stickers.scene import TASKS
from sana.data.stickers.sprites import load_world
from sana.data.stickers.stream import Studio
from sana.data.stickers.tiny import tiny_world
from sana.errors import RequestError
from sana.evaluation import alignment, traits
from sana.evaluation.detector import load as load_detector
from sana.evaluation.distances import ROUNDS, frechet_interval, moments
from sana.evaluation.exam_judges import (
    alignment_score,
    autoencoder_scores,
    kept,
    trait_prompts,
    trait_scores,
)
from sana.evaluation.features import BATCH, Extractor, folder_features, load_extractor
from sana.evaluation.folders import agree, one_at_a_time
from sana.evaluation.networks import Network, digest_of
from sana.evaluation.plan import SEED, Report
from sana.evaluation.prompts import Item, write_list
from sana.evaluation.rebuilt import weights_of
from sana.evaluation.record import Score, write_record
from sana.evaluation.report import Labelled, Share, contact_sheet, write_json
from sana.evaluation.sample import Draw, Settings, drawer
from sana.evaluation.sight import open_picture
from sana.evaluation.stickers import (
    SEED_STRIDE,
    Judge,
    Verdict,
    render_truth,
    score,
    summarize,
)
from sana.evaluation.traits import TraitJudge
from sana.pipelines.images import save_png, to_pil, to_tensor
from sana.weights.load import Components, load

UNSEEN, SEEN = "unseen", "seen"
SHOWN, SIDE = 20, 160
AVATARS, FEW_AVATARS = 4000, 8
"""That are loaded of the pack with and without portraits to draw; one in twenty is held out."""
RESAMPLED = "interval: whole prompts resampled 2000 times"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """What is asked for: `count` held-out prompts, `seeds` pictures of each.

    `features` are files as `sana.evaluation.features` reads them; `pack` may be "tiny".
    """

    model: str
    detector: str
    pack: str
    output: Path
    count: int = 600
    seeds: int = 4
    case_seed: int = 1
    has_seen: bool = True
    features: tuple[str, ...] = ()
    traits: str | None = None
    alignment: str | None = None
    pictures: int = 64
    """Held-out renders of each kind for the autoencoder; 0 leaves it out."""
    trait_count: int = 150
    """Held-out prompts of stickers, and as many of portraits, for the judge of traits."""
    settings: Settings = field(default_factory=Settings)
    cache: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.count < len(TASKS) or self.seeds < 1:
            raise RequestError(
                f"count is {self.count} and seeds {self.seeds}; there must be at least "
                f"{len(TASKS)} prompts, one of each kind, and a seed; 600 and 4 are the bars'"
            )


def score_stickers(exam: Exam, report: Report = lambda what, done, total: None) -> tuple[Path, str]:
    """Draw, judge and compare; the record's path and the table. Raises `RequestError`."""
    with one_at_a_time(exam.output):
        judge = _open_judge(exam)
        trait_judge = traits.read(exam.traits, exam.device) if exam.traits else None
        aligner = alignment.read(exam.alignment, exam.device)[0] if exam.alignment else None
        extractors = [_open_features(exam, source) for source in exam.features]
        sets = {UNSEEN: held_out_prompts(judge.world, exam.count, exam.case_seed)}
        if exam.has_seen:
            share = exam.count * len(COMPARED) // len(TASKS)
            sets[SEEN] = seen_prompts(judge.world, share, exam.case_seed)
        components = load(exam.model, device=exam.device, dtype=torch.float32)
        verdicts, drawn = {}, {}
        for name, cases in sets.items():
            drawn[name] = _drawn(exam, components, cases, name, report)
            verdicts[name] = _judged(cases, drawn[name], judge)
        truth = score(render_truth(sets[UNSEEN], judge), sets[UNSEEN], judge)
        scores = _scores(exam, verdicts, truth)
        if exam.pictures:
            scores += autoencoder_scores(components, judge.studio, exam.pictures)
        if aligner is not None:
            scores.append(alignment_score(aligner, sets[UNSEEN], drawn[UNSEEN], judge))
        if trait_judge is not None:
            scores += _trait_scores(exam, components, trait_judge, judge)
        for extractor, network in extractors:
            side = exam.settings.size or components.config.pixels
            renders = _render_features(extractor, sets[UNSEEN], judge, exam.seeds, side)
            scores.append(_distance(exam, extractor, network, sets[UNSEEN], renders, report))
        _write_verdicts(exam, verdicts)
        return write_record(scores, _facts(exam, judge, components, sets), exam.output)


def compare(first: dict[str, Share], second: dict[str, Share]) -> dict[str, Share]:
    """First minus second for each of `COMPARED` that both have, and "mean" of them."""
    kinds = [kind for kind in COMPARED if kind in first and kind in second]
    gaps = {kind: _minus(first[kind], second[kind]) for kind in kinds}
    half = sum((gap.high - gap.low) ** 2 for gap in gaps.values()) ** 0.5 / len(gaps) / 2
    mean = sum(gap.value for gap in gaps.values()) / len(gaps)
    count = sum(gap.count for gap in gaps.values())
    return gaps | {"mean": Share(value=mean, low=mean - half, high=mean + half, count=count)}


def _minus(first: Share, second: Share) -> Share:
    half = ((first.high - first.low) ** 2 + (second.high - second.low) ** 2) ** 0.5 / 2
    value = first.value - second.value
    return Share(
        value=value, low=value - half, high=value + half, count=min(first.count, second.count)
    )


def _open_judge(exam: Exam) -> Judge:
    device = torch.device(exam.device)
    if exam.pack == "tiny":
        world = tiny_world()
    else:
        avatars = AVATARS if exam.traits else FEW_AVATARS
        world = load_world(exam.pack, avatars=avatars, cache=exam.cache)
    detector = load_detector(exam.detector, world, device)
    return Judge(detector=detector, world=world, studio=Studio.open(world, device))


def _open_features(exam: Exam, source: str) -> tuple[Extractor, Network]:
    extractor, network = load_extractor(source, exam.device)
    least, there = extractor.width + 1, exam.count * exam.seeds
    if there < least:
        raise RequestError(
            f"{exam.count} prompts with {exam.seeds} seeds are {there} pictures and a Frechet "
            f"distance in {extractor.width} features needs at least {least}; draw more, or leave "
            f"--features {source} out"
        )
    return extractor, network


def _drawn(
    exam: Exam, components: Components, cases: Sequence[PromptCase], name: str, report: Report
) -> list[list[Path]]:
    """The pictures of each case, drawn in batches as far as they are not there."""
    folder = exam.output / name
    head = _head(exam, components, [case.prompt for case in cases])
    agree(folder / "exam.json", head)
    items = [
        Item(key=f"{i:05}", prompt=c.prompt, facts={"kind": c.kind}) for i, c in enumerate(cases)
    ]
    write_list(items, folder / "prompts.jsonl")
    jobs = [(i, k) for k in range(exam.seeds) for i in range(len(cases))]
    missing = [(i, k) for i, k in jobs if not (folder / items[i].file(k)).exists()]
    report(f"drawing {name}", len(jobs) - len(missing), len(jobs))
    draw: Draw = drawer(components, exam.settings)
    for start in range(0, len(missing), exam.settings.batch):
        part = missing[start : start + exam.settings.batch]
        seeds = [SEED_STRIDE * i + k for i, k in part]
        pictures = draw([cases[i].prompt for i, _ in part], seeds)
        for (i, k), seed, picture in zip(part, seeds, pictures, strict=True):
            facts = {"prompt": cases[i].prompt, "seed": seed, **head}
            save_png(to_pil(picture), folder / items[i].file(k), {"drawn_in_batches": facts})
        report(f"drawing {name}", len(part), len(jobs))
    return [[folder / item.file(k) for k in range(exam.seeds)] for item in items]


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


def _judged(
    cases: Sequence[PromptCase], paths: Sequence[Sequence[Path]], judge: Judge
) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for index, (case, files) in enumerate(zip(cases, paths, strict=True)):
        pictures = torch.cat([to_tensor(open_picture(path)) for path in files])
        seeds = [SEED_STRIDE * index + k for k in range(len(files))]
        verdicts += score(pictures, [case] * len(files), judge, seeds=seeds)
    return verdicts


def _scores(
    exam: Exam, verdicts: dict[str, list[Verdict]], truth: Sequence[Verdict]
) -> list[Score]:
    found = {name: summarize(judged) for name, judged in verdicts.items()}
    label = Path(exam.detector).parent.name or Path(exam.detector).name
    pictures = {name: len(judged) for name, judged in verdicts.items()}
    scores = [
        _score("stickers", "sticker score", found[UNSEEN], pictures[UNSEEN], label),
        _score("detector", "the detector on renders", summarize(truth), len(truth), label),
    ]
    if SEEN in found:
        scores.append(_score("seen", "sticker score, seen", found[SEEN], pictures[SEEN], label))
        gaps = compare(found[UNSEEN], found[SEEN])
        scores.append(_score("gap", "unseen minus seen", gaps, pictures[SEEN], label))
    return scores


def _score(metric: str, name: str, shares: dict[str, Share], pictures: int, label: str) -> Score:
    total = shares["mean" if metric == "gap" else "all"]
    kinds = {kind: share for kind, share in shares.items() if kind not in ("all", "mean")}
    return Score(
        metric=metric,
        name=name,
        share=total,
        is_better_high=True,
        pictures=pictures,
        protocol=f"mean over the kinds, judged by the detector in {label}; {RESAMPLED}",
        parts=kinds,
    )


def _trait_scores(
    exam: Exam, components: Components, trait_judge: TraitJudge, judge: Judge
) -> list[Score]:
    cases = trait_prompts(judge.studio, exam.trait_count, exam.case_seed)
    folder = exam.output / "traits"
    agree(folder / "exam.json", _head(exam, components, [case.prompt for case in cases]))
    draw = kept(drawer(components, exam.settings), folder)
    return trait_scores(draw, cases, exam.seeds, trait_judge, judge.studio)


def _render_features(
    extractor: Extractor, cases: Sequence[PromptCase], judge: Judge, seeds: int, side: int
) -> Tensor:
    """Of renders of what the same prompts ask for, as many as were drawn."""
    found = []
    for seed in range(seeds):
        for start in range(0, len(cases), BATCH):
            part = cases[start : start + BATCH]
            renders = render_truth(part, judge, size=side, seed=SEED_STRIDE * start + seed)
            found.append(extractor([to_pil(render) for render in renders]))
    return torch.cat(found)


def _distance(
    exam: Exam,
    extractor: Extractor,
    network: Network,
    cases: Sequence[PromptCase],
    renders: Tensor,
    report: Report,
) -> Score:
    paths = [
        exam.output / UNSEEN / f"{i:05}" / f"{k:04}.png"
        for i in range(len(cases))
        for k in range(exam.seeds)
    ]
    store = exam.output / ".scores" / f"features-{network.sha256[:8]}"
    drawn = folder_features(
        extractor,
        network,
        paths,
        store,
        report=lambda count: report(extractor.label, count, len(paths)),
    )
    name = "FID" if network.is_published else f"Frechet distance ({extractor.label})"
    return Score(
        metric="frechet",
        name=f"{name} to renders",
        share=frechet_interval(moments(renders), drawn, seed=SEED),
        is_better_high=False,
        pictures=len(drawn),
        protocol=(
            f"{extractor.width} features of {len(drawn)} drawn pictures and of {len(renders)} "
            f"renders of the same prompts; interval: 1.96 deviations over {ROUNDS} resamples"
        ),
        networks=(network,),
    )


def _write_verdicts(exam: Exam, verdicts: dict[str, list[Verdict]]) -> None:
    """verdicts.json says of every picture what is wrong; the sheet shows some of each kind."""
    rows = {
        name: [
            {"kind": v.case.kind, "prompt": v.case.prompt, "seed": v.seed, "fault": v.fault}
            for v in judged
        ]
        for name, judged in verdicts.items()
    }
    write_json(exam.output / "verdicts.json", rows)
    entries = []
    for kind in TASKS:
        firsts = [(i, v) for i, v in enumerate(verdicts[UNSEEN]) if v.case.kind == kind]
        for index, verdict in firsts[:: exam.seeds][:SHOWN]:
            path = exam.output / UNSEEN / f"{index // exam.seeds:05}" / "0000.png"
            text = verdict.case.prompt + (f" [{verdict.fault}]" if verdict.fault else "")
            picture = to_tensor(open_picture(path))[0]
            entries.append(Labelled(picture=picture, text=text, is_right=verdict.is_right))
    contact_sheet(entries, side=SIDE).save(exam.output / "sheet.png")


def _facts(
    exam: Exam, judge: Judge, components: Components, sets: dict[str, tuple[PromptCase, ...]]
) -> dict[str, Any]:
    return {
        "model": exam.model,
        "weights": f"{weights_of(components.dit)} {weights_of(components.autoencoder)}",
        "detector": {"file": exam.detector, "sha256": digest_of([Path(exam.detector)])},
        "pack": judge.world.version,
        "prompts": {name: len(cases) for name, cases in sets.items()},
        "pictures_of_each": exam.seeds,
        "judges": {
            name: {"file": file, "sha256": digest_of([Path(file)])}
            for name, file in (("traits", exam.traits), ("alignment", exam.alignment))
            if file
        },
        "case_seed": exam.case_seed,
        "seeds": f"{SEED_STRIDE} times the prompt's number, plus 0 to {exam.seeds - 1}",
        "sampling": asdict(exam.settings),
        "resampling_seed": SEED,
        "device": exam.device,
    }
