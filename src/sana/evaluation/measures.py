"""The metrics of `plan.METRICS` over one folder, each a function of a `Run` that gives a `Score`.

A metric loads its networks, takes what an earlier run of the same left in the store, does the rest
and says what it did. The formulas and rules are in the modules it calls. `MEASURES` lists them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from PIL import Image
from torch import Tensor

from sana.errors import NumericsError, RequestError
from sana.evaluation import dpg, geneval
from sana.evaluation.clip import Clip
from sana.evaluation.distances import (
    ROUNDS,
    SUBSETS,
    frechet_interval,
    kernel_distance,
    load_moments,
    moments,
    save_moments,
)
from sana.evaluation.features import Extractor, fingerprint, folder_features, load_extractor
from sana.evaluation.folders import list_pictures
from sana.evaluation.image_reward import Reward
from sana.evaluation.networks import Network
from sana.evaluation.notes import Notes
from sana.evaluation.plan import SEED, Plan, Report
from sana.evaluation.prompts import Item, items_of, match
from sana.evaluation.record import Score
from sana.evaluation.report import Share, bootstrap
from sana.evaluation.segmenter import Segmenter
from sana.evaluation.sight import open_picture
from sana.evaluation.vqa import Answerer

RESAMPLED = "interval: whole prompts resampled 2000 times"
Faults: TypeAlias = dict[str, str]
"""What is wrong with each picture, empty if nothing is; of metrics that say so."""


@dataclass(eq=False)
class Run:
    """A plan at work: the folder's pictures and prompts, read once."""

    plan: Plan
    report: Report

    @cached_property
    def paths(self) -> list[Path]:
        """Every picture, sorted."""
        return list_pictures(self.plan.folder)

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The prompts that the pictures were drawn from."""
        return items_of(self.plan.folder, self.plan.prompts)

    def groups(self, count: int | None) -> list[tuple[Item, list[Path]]]:
        """Each prompt with its pictures, of which there must be `count`."""
        found = match(self.plan.folder, self.items, count=self.plan.count or count)
        return list(zip(self.items, found, strict=True))

    def notes(self, metric: str, networks: Sequence[Network], **rules: Any) -> Notes:
        """The store of a metric's results by picture."""
        head = {"metric": metric, "networks": [n.sha256 for n in networks], **rules}
        head["pictures"] = fingerprint(self.paths)
        return Notes(self.plan.store / f"{metric}.jsonl", head)

    def key(self, path: Path) -> str:
        """A picture's name in the store."""
        return str(path.relative_to(self.plan.folder))


def _fid_score(run: Run) -> tuple[Score, Faults]:
    plan = run.plan
    extractor, network = load_extractor(
        plan.sources["features"], plan.device, is_offline=plan.is_offline
    )
    assert plan.reference is not None, "checked"
    least = extractor.width + 1
    _require(run.paths, least, plan.folder, "fid")
    drawn = _folder_features(run, extractor, network, plan.folder, "fid")
    if plan.reference.is_dir():
        paths = list_pictures(plan.reference)
        _require(paths, least, plan.reference, "fid")
        reference = moments(_folder_features(run, extractor, network, plan.reference, "fid"))
        save_moments(plan.store / "reference.npz", reference)
    else:
        reference = load_moments(plan.reference, extractor.width)
    share = frechet_interval(reference, drawn, seed=SEED)
    name = "FID" if network.is_published else f"Frechet distance ({extractor.label})"
    return Score(
        metric="fid",
        name=name,
        share=share,
        is_better_high=False,
        pictures=len(drawn),
        protocol=(
            f"Frechet distance between {extractor.width} features of {len(drawn)} drawn and "
            f"{reference.count or 'an unstated number of'} reference pictures, {_seen(plan)}; "
            f"interval: 1.96 deviations over {ROUNDS} resamples of the drawn ones"
        ),
        networks=(network,),
        parts={"reference": str(plan.reference), "reference_pictures": reference.count},
    ), {}


def _kid_score(run: Run) -> tuple[Score, Faults]:
    plan = run.plan
    extractor, network = load_extractor(
        plan.sources["features"], plan.device, is_offline=plan.is_offline
    )
    assert plan.reference is not None, "checked"
    least = plan.kid_subset
    _require(run.paths, least, plan.folder, "kid")
    _require(list_pictures(plan.reference), least, plan.reference, "kid")
    drawn = _folder_features(run, extractor, network, plan.folder, "kid")
    reference = _folder_features(run, extractor, network, plan.reference, "kid")
    for features in (drawn, reference):
        moments(features[:2])
    share, deviation = kernel_distance(reference, drawn, subset=plan.kid_subset, seed=SEED)
    name = "KID" if network.is_published else f"kernel distance ({extractor.label})"
    return Score(
        metric="kid",
        name=name,
        share=share,
        is_better_high=False,
        pictures=len(drawn),
        protocol=(
            f"kernel distance, cubic, mean over {SUBSETS} subsets of {plan.kid_subset} of "
            f"{len(drawn)} drawn and {len(reference)} reference pictures, {_seen(plan)}; interval: "
            "the drawn pictures' contributions resampled 2000 times"
        ),
        networks=(network,),
        parts={"deviation_between_subsets": deviation, "reference": str(plan.reference)},
        digits=5,
    ), {}


def _clip_score(run: Run) -> tuple[Score, Faults]:
    plan = run.plan
    clip, network = Clip.load(plan.sources["clip"], plan.device, is_offline=plan.is_offline)
    share, count = _judged(run, "clip-score", network, clip.score)
    return Score(
        metric="clip-score",
        name=network.name("CLIPScore"),
        share=share,
        is_better_high=True,
        pictures=count,
        protocol=f"100 max(cos, 0) of picture and prompt, mean over pictures; {RESAMPLED}",
        networks=(network,),
        digits=2,
    ), {}


def _reward_score(run: Run) -> tuple[Score, Faults]:
    plan = run.plan
    reward, network = Reward.load(
        plan.sources["image-reward"], plan.device, is_offline=plan.is_offline
    )
    share, count = _judged(run, "image-reward", network, reward.score)
    return Score(
        metric="image-reward",
        name=network.name("ImageReward"),
        share=share,
        is_better_high=True,
        pictures=count,
        protocol=f"normalized reward, mean over pictures; {RESAMPLED}",
        networks=(network,),
    ), {}


def _geneval_score(run: Run) -> tuple[Score, Faults]:
    plan = run.plan
    for item in run.items:
        geneval.check_facts(item.facts, item.key)
    groups = run.groups(geneval.PER_PROMPT)
    segmenter, detector = Segmenter.load(
        plan.sources["detector"], plan.device, is_offline=plan.is_offline
    )
    clip, colors = Clip.load(plan.sources["clip"], plan.device, is_offline=plan.is_offline)
    namer = geneval.ColorNamer(clip)
    notes = run.notes("geneval", (detector, colors))
    marks: dict[str, list[list[float]]] = {}
    faults: Faults = {}
    for item, path in _each(run, "geneval", groups):
        found = notes.get(run.key(path))
        if found is None:
            image = open_picture(path)
            kept = geneval.keep(segmenter.find(image), item.facts["tag"])
            found = geneval.judge(item.facts, kept, partial(namer, image))
            notes.put(run.key(path), found)
        faults[run.key(path)] = "; ".join(found)
    for item, files in groups:
        rights = [float(not faults[run.key(path)]) for path in files]
        marks.setdefault(item.facts["tag"], []).append(rights)
    parts: dict[str, Any] = {
        task: bootstrap(marks[task], seed=SEED) for task in geneval.TASKS if task in marks
    }
    total = _mean_of(list(parts.values()))
    is_published = detector.is_published and colors.is_published
    label = ", ".join(network.label for network in (detector, colors) if not network.is_published)
    return Score(
        metric="geneval",
        name="GenEval" if is_published else f"GenEval ({label})",
        share=total,
        is_better_high=True,
        pictures=len(faults),
        protocol=(
            f"mean over {len(parts)} of 6 kinds, {len(groups)} of {geneval.PROMPTS} prompts; "
            f"objects over {geneval.SURE}, counted over {geneval.COUNTED}; {RESAMPLED} in each kind"
        ),
        networks=(detector, colors),
        parts=parts,
    ), faults


def _dpg_score(run: Run) -> tuple[Score, Faults]:
    plan = run.plan
    assert plan.questions is not None, "checked"
    asked = dpg.read_questions(plan.questions)
    unknown = [item.key for item in run.items if item.key not in asked]
    if unknown:
        raise RequestError(
            f"{len(unknown)} prompts have no question in {plan.questions}, the first being "
            f"{unknown[0]}; the table and the prompts must be of one release of DPG-Bench"
        )
    answerer, network = Answerer.load(plan.sources["vqa"], plan.device, is_offline=plan.is_offline)
    notes = run.notes("dpg", (network,), grid=plan.grid, questions=fingerprint([plan.questions]))
    groups = run.groups(1 if plan.grid else dpg.PER_PROMPT)
    answers: dict[str, list[list[str]]] = {}
    for item, path in _each(run, "dpg", groups):
        if not dpg.is_askable(asked[item.key]):
            continue
        found = notes.get(run.key(path))
        if found is None:
            image = open_picture(path)
            parts = [image] if plan.grid is None else dpg.split_grid(image, plan.grid)
            texts = [question.text for question in asked[item.key]]
            found = [answerer.answer(part, texts) for part in parts]
            notes.put(run.key(path), found)
        answers.setdefault(item.key, []).extend(found)
    scores = {key: dpg.score_item(asked[key], found) for key, found in answers.items()}
    if not scores:
        raise RequestError(
            f"none of {len(groups)} prompts can be asked by {plan.questions}, whose first row is "
            "left out as published; draw more of the prompts"
        )
    share = bootstrap([[100 * p for p in s.pictures] for s in scores.values()], seed=SEED)
    categories = {
        name: bootstrap([[100 * value] for value in values], seed=SEED)
        for name, values in sorted(dpg.by_category(list(scores.values())).items())
    }
    return Score(
        metric="dpg",
        name=network.name("DPG-Bench"),
        share=share,
        is_better_high=True,
        pictures=sum(len(score.pictures) for score in scores.values()),
        protocol=(
            f"{len(scores)} of {dpg.PROMPTS} prompts, a question 0 where its parent is; categories "
            f"of the last picture, before that; {RESAMPLED}"
        ),
        networks=(network,),
        parts={**categories, "prompts_left_out": len(groups) - len(scores)},
        digits=2,
    ), {}


def _folder_features(
    run: Run, extractor: Extractor, network: Network, folder: Path, metric: str
) -> Tensor:
    """Of the drawn pictures or of the reference, kept in the store for the other metric too."""
    paths = run.paths if folder == run.plan.folder else list_pictures(folder)
    which = "drawn" if folder == run.plan.folder else "reference"
    return folder_features(
        extractor,
        network,
        paths,
        run.plan.store / f"{which}-features",
        size=run.plan.size,
        report=lambda count: run.report(f"{metric}, {which}", count, len(paths)),
    )


def _judged(
    run: Run,
    metric: str,
    network: Network,
    score: Callable[[str, Sequence[Image.Image]], list[float]],
) -> tuple[Share, int]:
    """Every picture scored with its prompt: the mean with its interval, and how many pictures."""
    notes = run.notes(metric, (network,))
    groups = run.groups(None)
    marks: dict[str, list[float]] = {}
    for item, path in _each(run, metric, groups):
        value = notes.get(run.key(path))
        if value is None:
            [value] = score(item.prompt, [open_picture(path)])
            if not math.isfinite(value):
                raise NumericsError(
                    f"{metric} is {value} for {path}; a score must be a finite number, so look at "
                    f"the weights of {network.source}, or compute on the CPU"
                )
            notes.put(run.key(path), value)
        marks.setdefault(item.key, []).append(value)
    return bootstrap(list(marks.values()), seed=SEED), sum(map(len, marks.values()))


def _each(
    run: Run, metric: str, groups: Sequence[tuple[Item, list[Path]]]
) -> Iterator[tuple[Item, Path]]:
    """Every picture with its prompt; progress is told after each."""
    total = sum(len(files) for _, files in groups)
    for item, files in groups:
        for path in files:
            yield item, path
            run.report(metric, 1, total)


def _require(paths: Sequence[Path], least: int, folder: Path, metric: str) -> None:
    if len(paths) < least:
        way_out = (
            "take kid, which does with fewer" if metric == "fid" else "give a smaller --kid-subset"
        )
        raise RequestError(
            f"{folder} holds {len(paths)} pictures and {metric} needs at least {least}; draw more, "
            f"or {way_out}"
        )


def _seen(plan: Plan) -> str:
    size = "as they are" if plan.size is None else f"resized and cropped to {plan.size}"
    return f"pictures {size}"


def _mean_of(shares: Sequence[Share]) -> Share:
    """The mean of independent scores; its half-width is the root of the sum of theirs squared."""
    half = sum((s.high - s.low) ** 2 for s in shares) ** 0.5 / len(shares) / 2
    mean = sum(s.value for s in shares) / len(shares)
    return Share(
        value=mean,
        low=max(0.0, mean - half),
        high=min(1.0, mean + half),
        count=sum(s.count for s in shares),
    )


Measure: TypeAlias = Callable[[Run], tuple[Score, Faults]]
MEASURES: MappingProxyType[str, Measure] = MappingProxyType(
    {
        "fid": _fid_score,
        "kid": _kid_score,
        "clip-score": _clip_score,
        "image-reward": _reward_score,
        "geneval": _geneval_score,
        "dpg": _dpg_score,
    }
)
