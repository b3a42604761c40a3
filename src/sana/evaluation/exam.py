"""The sticker world's own measures of a model, whole: `sana evaluate stickers`.

Held-out prompts are drawn with several seeds each, saved, and judged by the detector; prompts of
what training did show are drawn beside them, to compare with; renders of the held-out prompts give
the detector's own accuracy and, on demand, a reference for Frechet distances. Start reading at
`score_stickers`; the rules of judging are in `sana.evaluation.stickers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.data.stickers.prompts import COMPARED, PromptCase, held_out_prompts, seen_prompts
from sana.data.stickers.scene import TASKS
from sana.data.stickers.sprites import load_world
from sana.data.stickers.stream import Studio
from sana.data.stickers.tiny import tiny_world
from sana.distributed import Place, barrier, gather
from sana.errors import RequestError
from sana.evaluation import alignment, traits
from sana.evaluation.detector import load as load_detector
from sana.evaluation.distances import ROUNDS, frechet_interval, moments
from sana.evaluation.draw import held
from sana.evaluation.exam_drawing import draw_cases, draw_traits, read_all
from sana.evaluation.exam_judges import (
    alignment_score,
    autoencoder_scores,
    trait_prompts,
    trait_scores,
)
from sana.evaluation.exam_sheets import write_sheets
from sana.evaluation.features import BATCH, Extractor, folder_features, load_extractor
from sana.evaluation.networks import Network, digest_of
from sana.evaluation.plan import SEED, Report
from sana.evaluation.rebuilt import weights_of
from sana.evaluation.record import Score, write_record
from sana.evaluation.report import Share
from sana.evaluation.sample import Settings
from sana.evaluation.stickers import (
    SEED_STRIDE,
    Judge,
    Verdict,
    render_truth,
    score,
    summarize,
)
from sana.pipelines.images import to_pil
from sana.weights.load import Components, load

UNSEEN, SEEN = "unseen", "seen"
JUDGED = 16
"""Prompts whose pictures are judged at once."""
ALONE = Place(rank=0, world=1, device=torch.device("cpu"))
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Parts:
    """What has been drawn and who judges; each method is a part of the record, for one process."""

    exam: Exam
    judge: Judge
    components: Components
    sets: dict[str, tuple[PromptCase, ...]]
    drawn: dict[str, list[list[Path]]]
    report: Report

    def verdicts(self) -> list[Score]:
        """Of the detector, on what was drawn and on renders; writes them and the sheets."""
        cases, paths = self.sets, self.drawn
        found = {name: _judged(cases[name], paths[name], self.judge) for name in cases}
        truth = score(render_truth(cases[UNSEEN], self.judge), cases[UNSEEN], self.judge)
        write_sheets(self.exam.output, found, paths[UNSEEN])
        return _scores(self.exam, found, truth)

    def distance(self, extractor: Extractor, network: Network) -> list[Score]:
        """Of what was drawn to renders of the same prompts."""
        side = self.exam.settings.size or self.components.config.pixels
        cases = self.sets[UNSEEN]
        renders = _render_features(extractor, cases, self.judge, self.exam.seeds, side)
        paths = [path for files in self.drawn[UNSEEN] for path in files]
        return [_distance(self.exam, extractor, network, paths, renders, self.report)]

    def alignment(self, source: str) -> list[Score]:
        """By the alignment model."""
        aligner, _ = alignment.read(source, self.exam.device)
        return [alignment_score(aligner, self.sets[UNSEEN], self.drawn[UNSEEN], self.judge)]

    def autoencoder(self) -> list[Score]:
        """Its PSNR and SSIM."""
        return autoencoder_scores(self.components, self.judge.studio, self.exam.pictures)


def score_stickers(
    exam: Exam, report: Report = lambda what, done, total: None, place: Place = ALONE
) -> tuple[Path, str]:
    """Draw, judge and compare; the record's path and the table. Raises `RequestError`.

    Processes share the drawing, then each takes some of the judging; the first writes the record.
    """
    with held(exam.output, place):
        judge = _open_judge(exam)
        trait_judge = traits.read(exam.traits, exam.device) if exam.traits else None
        extractors = [_open_features(exam, source) for source in exam.features]
        sets = {UNSEEN: held_out_prompts(judge.world, exam.count, exam.case_seed)}
        if exam.has_seen:
            share = exam.count * len(COMPARED) // len(TASKS)
            sets[SEEN] = seen_prompts(judge.world, share, exam.case_seed)
        components = load(exam.model, device=exam.device, dtype=torch.float32)
        parts = _Parts(
            exam=exam,
            judge=judge,
            components=components,
            sets=sets,
            drawn={
                name: draw_cases(exam, components, cases, name, place, report)
                for name, cases in sets.items()
            },
            report=report,
        )
        work: list[Callable[[], list[Score]]] = [parts.verdicts]
        if exam.pictures:
            work.append(parts.autoencoder)
        if exam.alignment:
            work.append(partial(parts.alignment, exam.alignment))
        if trait_judge is not None:
            cases = trait_prompts(judge.studio, exam.trait_count, exam.case_seed)
            draw = draw_traits(exam, components, cases, place, report)
            rest = (cases, exam.seeds, trait_judge, judge.studio)
            work.append(partial(trait_scores, draw, *rest))
        work += [partial(parts.distance, *pair) for pair in extractors]
        barrier(place)
        # The last parts are the longest and those of the first processes.
        mine = {
            n: work[n]()
            for n in range(len(work))
            if (len(work) - 1 - n) % place.world == place.rank
        }
        found = {n: scores for part in gather(mine, place) for n, scores in part.items()}
        scores = [one for n in sorted(found) for one in found[n]]
        if not place.is_main:
            return exam.output, ""
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


def _judged(
    cases: Sequence[PromptCase], paths: Sequence[Sequence[Path]], judge: Judge
) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for start in range(0, len(cases), JUDGED):
        rows = range(start, min(start + JUDGED, len(cases)))
        verdicts += score(
            read_all([path for row in rows for path in paths[row]]),
            [cases[row] for row in rows for _ in paths[row]],
            judge,
            seeds=[SEED_STRIDE * row + k for row in rows for k in range(len(paths[row]))],
        )
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
    paths: Sequence[Path],
    renders: Tensor,
    report: Report,
) -> Score:
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
