"""Does a picture show what its prompt asked for? GenEval's six questions in the sticker world.

A detector trained on renders lists what is in a picture, and fixed rules compare that list with the
prompt (Ghosh et al. 2023, section 3). The same rules on renders of the same cases give the judge's
own accuracy, which bounds what can be measured. Start reading at `evaluate_prompts`; `find_fault`
is the rule book. `python -m sana.evaluation --help` runs it on a model folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sana.data.stickers import backgrounds, layout
from sana.data.stickers.compose import Composer
from sana.data.stickers.prompts import Expected, PromptCase
from sana.data.stickers.scene import TASKS, Dice, Placed, Relation, Scene
from sana.data.stickers.stream import Studio
from sana.data.stickers.world import World
from sana.evaluation.detector import Box, Found, detect
from sana.evaluation.report import Labelled, Share, bootstrap, contact_sheet, write_json
from sana.evaluation.sample import Draw
from sana.models.detector import Detector

SLACK = 0.1
"""GenEval's margin of position: this share of both widths (or heights) does not count."""
CHUNK = 100
"""Pictures that are held at full size at once."""
THUMBNAIL = 160
_STREAM = 0x7A57E
SEED_STRIDE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A detector with the world that it knows, and a studio to test the detector itself."""

    detector: Detector
    world: World
    studio: Studio


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One judged picture; `fault` says what is wrong with it and is empty if nothing is."""

    case: PromptCase
    seed: int
    fault: str
    found: tuple[Found, ...]

    @property
    def is_right(self) -> bool:
        return not self.fault


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """Shares of right pictures by kind; "all" is the mean over the kinds, as GenEval's."""

    model: dict[str, Share]
    judge: dict[str, Share]
    """The same of renders of the ground truth: what the judge itself gets right."""
    verdicts: tuple[Verdict, ...]
    thumbnails: tuple[Tensor, ...]
    """The judged pictures, small."""


def evaluate_prompts(
    draw: Draw,
    cases: Sequence[PromptCase],
    seeds: Sequence[int],
    judge: Judge,
    folder: Path | None = None,
) -> Result:
    """Draw each case once for each seed and judge the pictures; `write` the result to `folder`."""
    verdicts: list[Verdict] = []
    thumbnails: list[Tensor] = []
    jobs = [(case, seed + SEED_STRIDE * i) for seed in seeds for i, case in enumerate(cases)]
    for start in range(0, len(jobs), CHUNK):
        part = jobs[start : start + CHUNK]
        pictures = draw([case.prompt for case, _ in part], [seed for _, seed in part])
        judged = score(pictures, [c for c, _ in part], judge, seeds=[s for _, s in part])
        small = F.adaptive_avg_pool2d(pictures.float(), THUMBNAIL).cpu()
        verdicts += judged
        thumbnails += small
    own = score(render_truth(cases, judge), cases, judge)
    result = Result(
        model=summarize(verdicts),
        judge=summarize(own),
        verdicts=tuple(verdicts),
        thumbnails=tuple(thumbnails),
    )
    if folder is not None:
        write(result, judge.world, folder)
    return result


def write(result: Result, world: World, folder: Path) -> None:
    """Write `results.json` and `sheet.png` (kind by kind, framed green or red) to `folder`."""
    pairs = zip(result.verdicts, result.thumbnails, strict=True)
    ordered = sorted(pairs, key=lambda pair: TASKS.index(pair[0].case.kind))
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_entry(*pair) for pair in ordered]
    contact_sheet(entries, side=THUMBNAIL).save(folder / "sheet.png")
    write_json(folder / "results.json", _record(result, world))


def score(
    pictures: Tensor,
    cases: Sequence[PromptCase],
    judge: Judge,
    *,
    seeds: Sequence[int] | None = None,
) -> list[Verdict]:
    """Judge pictures (B, 3, H, W) in -1..1, one for each case."""
    found = detect(judge.detector, pictures)
    return [
        Verdict(case=c, seed=s, fault=find_fault(c, f, judge.world), found=tuple(f))
        for c, f, s in zip(cases, found, seeds or [0] * len(cases), strict=True)
    ]


def summarize(verdicts: Sequence[Verdict]) -> dict[str, Share]:
    """Share of right pictures for each kind that occurs, and "all", the mean over those kinds."""
    marks: dict[str, dict[str, list[float]]] = {}
    for verdict in verdicts:
        prompts = marks.setdefault(verdict.case.kind, {})
        prompts.setdefault(verdict.case.prompt, []).append(float(verdict.is_right))
    shares = {kind: bootstrap(list(marks[kind].values())) for kind in TASKS if kind in marks}
    each = list(shares.values())
    half = sum((s.high - s.low) ** 2 for s in each) ** 0.5 / len(each) / 2
    mean = sum(s.value for s in each) / len(each)
    total = Share(
        value=mean,
        low=max(0.0, mean - half),
        high=min(1.0, mean + half),
        count=sum(s.count for s in each),
    )
    return shares | {"all": total}


def find_fault(case: PromptCase, found: Sequence[Found], world: World) -> str:
    """What is wrong with a picture of `case` in which `found` was seen; empty if nothing is.

    Counts must be exact where the prompt asks for a count, and are lower bounds elsewhere.
    """
    groups = []
    for wanted in case.expected:
        same = [f for f in found if f.concept == wanted.concept]
        right = [f for f in same if wanted.color in (None, f.color)]
        fault = _count_fault(case, wanted, len(same), len(right), world)
        if fault:
            seen = sorted({f.color or "no color" for f in same})
            return f"{fault} ({', '.join(seen)})" if same and not right else fault
        groups.append(right)
    if case.relation is None:
        return ""
    first, second = groups
    if any(stands(a.box, b.box, case.relation) for a in first for b in second):
        return ""
    return f"not {case.relation}"


def stands(first: Box, second: Box, relation: Relation) -> bool:
    """Whether `first` lies `relation` of `second`, by their centres.

    As in GenEval, an offset loses a tenth of both sizes, and must then be over half as long as the
    way between the centres: on a diagonal two relations hold.
    """
    gaps, offsets = [], []
    for low, high in ((0, 2), (1, 3)):
        gap = (first[low] + first[high] - second[low] - second[high]) / 2
        sizes = first[high] - first[low] + second[high] - second[low]
        gaps.append(gap)
        offsets.append(max(abs(gap) - SLACK * sizes, 0) * (1 if gap > 0 else -1))
    right, down = offsets
    ways = {"left": -right, "right": right, "above": -down, "below": down}
    return ways[relation] > 0.5 * math.hypot(*gaps)


def render_truth(
    cases: Sequence[PromptCase], judge: Judge, *, size: int = 256, seed: int = 0
) -> Tensor:
    """A render (B, 3, size, size) of what each case asks for, on a background of its own."""
    scenes = [
        truth_scene(case, judge.studio.composer, judge.world, Dice(seed, _STREAM, i))
        for i, case in enumerate(cases)
    ]
    parts = [
        judge.studio.renderer.render(scenes[start : start + CHUNK], size)
        for start in range(0, len(scenes), CHUNK)
    ]
    return torch.cat(parts)


def truth_scene(case: PromptCase, composer: Composer, world: World, dice: Dice) -> Scene:
    """The case as a scene: the right objects in an arrangement that `dice` choose."""
    chosen = [e for e in case.expected for _ in range(e.count)]
    hues = [e.color or world.concepts[e.concept].color for e in chosen]
    background = backgrounds.choose(dice, [hue for hue in hues if hue], is_named=dice.chance(0.5))
    boxes = [world.extents[world.sprite_of[e.concept, 0]] for e in chosen]
    squares = layout.arrange(
        dice,
        [(float(width), float(height)) for width, height in boxes],
        case.relation,
        has_ground=background.kind in backgrounds.GROUNDED,
    )
    objects: tuple[Placed, ...] = tuple(
        composer.place(e.concept, 0, e.color, square)
        for e, square in zip(chosen, squares, strict=True)
    )
    return Scene(
        kind="scene",
        background=background,
        objects=objects,
        relation=case.relation,
        avatar=None,
        caption=case.prompt,
        spans=(),
        task=case.kind,
    )


def _count_fault(case: PromptCase, wanted: Expected, same: int, right: int, world: World) -> str:
    concept = world.concepts[wanted.concept]
    if same == 0:
        return f"no {concept.label}"
    if right == 0:
        return f"no {wanted.color} {concept.label}"
    is_exact = case.kind == "counting"
    if (right != wanted.count) if is_exact else (right < wanted.count):
        return f"{right} {concept.label if right == 1 else concept.plural}"
    return ""


def _entry(verdict: Verdict, picture: Tensor) -> Labelled:
    text = f"{verdict.case.prompt} [{verdict.fault}]" if verdict.fault else verdict.case.prompt
    return Labelled(picture=picture, text=text, is_right=verdict.is_right)


def _record(result: Result, world: World) -> dict[str, Any]:
    return {
        "data": world.version,
        "model": {kind: asdict(share) for kind, share in result.model.items()},
        "judge": {kind: asdict(share) for kind, share in result.judge.items()},
        "pictures": [
            {
                "kind": verdict.case.kind,
                "prompt": verdict.case.prompt,
                "seed": verdict.seed,
                "is_right": verdict.is_right,
                "fault": verdict.fault,
                "found": [
                    asdict(found) | {"concept": world.concepts[found.concept].label}
                    for found in verdict.found
                ],
            }
            for verdict in result.verdicts
        ],
    }
