"""What the sticker exam judges besides: styles, portraits, alignment, and the autoencoder.

Each judge is a file that a recipe of `sana train` wrote, and its own accuracy on renders stands
beside its score. `sana.evaluation.exam` draws and calls these.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sana.data.stickers.prompts import PromptCase
from sana.data.stickers.scene import Kind
from sana.data.stickers.stream import Studio
from sana.evaluation.alignment import Aligner
from sana.evaluation.autoencoder import rebuilt_values
from sana.evaluation.exam_drawing import read_all
from sana.evaluation.plan import SEED
from sana.evaluation.record import Score
from sana.evaluation.report import Share, bootstrap
from sana.evaluation.sample import Draw, rebuild
from sana.evaluation.stickers import Judge, render_truth
from sana.evaluation.traits import TraitCase, TraitJudge, evaluate_traits, trait_cases
from sana.weights.load import Components

RENDER = "the judge on renders"
RESAMPLED = "interval: whole prompts resampled 2000 times"


def trait_prompts(studio: Studio, count: int, seed: int) -> list[TraitCase]:
    """`count` held-out prompts of stickers and as many of portraits."""
    kinds: tuple[Kind, ...] = ("sticker", "avatar")
    return [case for kind in kinds for case in trait_cases(studio.composer, kind, count, seed)]


def trait_scores(
    draw: Draw, cases: Sequence[TraitCase], seeds: int, judge: TraitJudge, studio: Studio
) -> list[Score]:
    """Style accuracy on unseen pairs of concept and style, and accuracy of asked-for attributes."""
    result = evaluate_traits(draw, cases, range(seeds), judge, studio)
    found = []
    for key, name in (("style", "style accuracy"), ("portrait", "portrait attributes")):
        parts = {part: share for part, share in result.model.items() if part.startswith(f"{key}: ")}
        asked = sum((key == "style") == (case.scene.kind == "sticker") for case in cases)
        found.append(
            Score(
                metric=key,
                name=name,
                share=result.model[key],
                is_better_high=True,
                pictures=asked * seeds,
                protocol=f"share of what held-out prompts ask for that a judge sees; {RESAMPLED}",
                parts={**parts, RENDER: result.judge[key]},
            )
        )
    return found


def alignment_score(
    aligner: Aligner,
    cases: Sequence[PromptCase],
    paths: Sequence[Sequence[Path]],
    judge: Judge,
) -> Score:
    """The share of pictures of which the alignment model says that their prompt holds."""
    odds = [
        aligner.score(case.prompt, read_all(files))
        for case, files in zip(cases, paths, strict=True)
    ]
    renders = render_truth(cases, judge)
    own = [
        aligner.score(case.prompt, render[None])
        for case, render in zip(cases, renders, strict=True)
    ]
    return Score(
        metric="alignment",
        name="sticker alignment",
        share=_holding(odds),
        is_better_high=True,
        pictures=sum(map(len, odds)),
        protocol=f"share of pictures whose log-odds are over 0; {RESAMPLED}",
        parts={RENDER: _holding(own), "mean_log_odds": sum(map(sum, odds)) / sum(map(len, odds))},
    )


def autoencoder_scores(components: Components, studio: Studio, count: int) -> list[Score]:
    """PSNR and SSIM of `count` held-out renders of each kind, at the model's own size."""
    size = components.config.pixels
    exactly = partial(rebuild, components, is_exact=True)
    found = rebuilt_values(exactly, studio, count=count, size=size)
    scores = []
    for place, (metric, name) in enumerate((("psnr", "PSNR dB"), ("ssim", "SSIM"))):
        values = {kind: pair[place].tolist() for kind, pair in found.items()}
        whole = [value for part in values.values() for value in part]
        scores.append(
            Score(
                metric=metric,
                name=f"autoencoder, {name}",
                share=_over(whole),
                is_better_high=True,
                pictures=len(whole),
                protocol=f"{count} held-out renders of each kind at {size} px, fp32, 8 bits; "
                "pictures resampled 2000 times",
                parts={kind: _over(part) for kind, part in values.items()} | {"worst": min(whole)},
                digits=2 if metric == "psnr" else 4,
            )
        )
    return scores


def _over(values: Sequence[float]) -> Share:
    return bootstrap([[value] for value in values], seed=SEED)


def _holding(odds: Sequence[Sequence[float]]) -> Share:
    return bootstrap([[float(value > 0) for value in row] for row in odds], seed=SEED)
