"""Do stickers have the style asked for, and portraits the attributes? A trained judge says.

The prompts are captions of held-out (concept, style) pairs and of portraits that training never
showed. The judge's own accuracy, on renders of the same scenes, stands beside every share. Start
reading at `evaluate_traits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana.data.stickers.compose import Composer
from sana.data.stickers.portraits import said
from sana.data.stickers.scene import Kind, Scene
from sana.data.stickers.stream import Studio
from sana.errors import CheckpointError, RequestError
from sana.evaluation.report import Share, bootstrap
from sana.evaluation.sample import Draw
from sana.models.detector import fit
from sana.models.traits import Traits
from sana.weights.files import read_file
from sana.weights.load import assign

BATCH = 64
STYLE, LOOK = "style", "look"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraitJudge:
    """The network and the labels of its slots."""

    network: Traits
    slots: dict[str, list[str]]

    @torch.inference_mode()
    def name(self, pictures: Tensor) -> list[dict[str, str]]:
        """The label of every slot for each of the pictures (B, 3, H, W) in -1..1."""
        device = next(self.network.parameters()).device
        found: list[dict[str, str]] = []
        for part in pictures.split(BATCH):
            logits = self.network(fit(part.to(device, torch.float32)))
            best = {slot: values.argmax(-1).tolist() for slot, values in logits.items()}
            found += [
                {slot: self.slots[slot][numbers[row]] for slot, numbers in best.items()}
                for row in range(len(part))
            ]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TraitCase:
    """A prompt and what its picture must show, by slot; `scene` is a picture that does."""

    prompt: str
    wanted: dict[str, str]
    scene: Scene


@dataclass(frozen=True, slots=True, kw_only=True)
class TraitResult:
    """Shares of right attributes: of the model's pictures, and of renders of the same cases.

    Keys are "style", "portrait" (all attributes asked for), "style: flat", "portrait: hair" and so
    on.
    """

    model: dict[str, Share]
    judge: dict[str, Share]


def read(path: str | Path, device: torch.device | str = "cpu") -> TraitJudge:
    """The judge in `path`; raises CheckpointError."""
    header, tensors, _ = read_file(Path(path))
    if header.get("kind") != "traits":
        raise CheckpointError(
            f"{path} holds {header.get('kind', 'a model')!r}, not a judge of traits; give the "
            "traits.safetensors that `sana train sticker-traits` wrote"
        )
    slots: dict[str, list[str]] = header["slots"]
    network = Traits({slot: len(labels) for slot, labels in slots.items()})
    wide = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    assign(network, wide, str(path))
    return TraitJudge(network=network.to(device).eval(), slots=slots)


def trait_cases(composer: Composer, kind: Kind, count: int, seed: int) -> list[TraitCase]:
    """`count` held-out stickers or avatars whose prompt asks for something."""
    cases: list[TraitCase] = []
    for index in range(20 * count):
        scene = composer.draw(index, seed=seed, split="held_out", kind=kind)
        wanted = wanted_of(composer, scene)
        if scene.kind == kind and wanted:
            cases.append(TraitCase(prompt=scene.caption, wanted=wanted, scene=scene))
        if len(cases) == count:
            return cases
    raise RequestError(
        f"{len(cases)} of {count} held-out prompts of kind {kind} were found; the pack has too few "
        "styles or avatars, so load more of it"
    )


def wanted_of(composer: Composer, scene: Scene) -> dict[str, str]:
    """What the caption asks for, by slot."""
    if scene.kind == "sticker":
        return {STYLE: composer.styles[scene.objects[0].style]}
    if scene.avatar is None:
        return {}
    avatar = composer.avatars[scene.avatar]
    wanted = said(scene.caption, avatar)
    if avatar.look in scene.caption.lower():
        wanted[LOOK] = avatar.look
    return wanted


def jobs_of(cases: Sequence[TraitCase], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """The prompts and the seeds of all pictures, those of a case one after another."""
    prompts = [case.prompt for case in cases for _ in seeds]
    return prompts, [seed + 1000 * index for index in range(len(cases)) for seed in seeds]


def evaluate_traits(
    draw: Draw, cases: Sequence[TraitCase], seeds: Sequence[int], judge: TraitJudge, studio: Studio
) -> TraitResult:
    """Draw each case once for each seed and compare what is asked for with what is seen."""
    prompts, numbers = jobs_of(cases, seeds)
    marks: list[dict[str, bool]] = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        seen = judge.name(draw(prompts[part], numbers[part]))
        asked = [cases[index // len(seeds)] for index in range(len(prompts))[part]]
        marks += [mark(case, found) for case, found in zip(asked, seen, strict=True)]
    rendered = [
        found
        for start in range(0, len(cases), BATCH)
        for found in judge.name(
            studio.renderer.render([c.scene for c in cases[start : start + BATCH]], 256)
        )
    ]
    own = [mark(case, found) for case, found in zip(cases, rendered, strict=True)]
    return TraitResult(
        model=summarize(
            [marks[i : i + len(seeds)] for i in range(0, len(marks), len(seeds))], cases
        ),
        judge=summarize([[one] for one in own], cases),
    )


def mark(case: TraitCase, found: dict[str, Any]) -> dict[str, bool]:
    """Which of the attributes that the prompt asks for were seen.

    Attributes that the judge has no word for, since none of its portraits had them, are wrong.
    """
    return {slot: found.get(slot) == words for slot, words in case.wanted.items()}


def summarize(
    marks: Sequence[Sequence[dict[str, bool]]], cases: Sequence[TraitCase]
) -> dict[str, Share]:
    """Shares over prompts; marks are [prompts][seeds] with slots, each slot of a prompt alike."""
    shares: dict[str, Share] = {}
    slots = sorted({slot for row in marks for one in row for slot in one})
    if STYLE in slots:
        shares[STYLE] = bootstrap([[one[STYLE] for one in row] for row in marks if STYLE in row[0]])
        by_style: dict[str, list[list[bool]]] = {}
        for row, case in zip(marks, cases, strict=True):
            if STYLE in row[0]:
                by_style.setdefault(case.wanted[STYLE], []).append([one[STYLE] for one in row])
        shares |= {f"style: {name}": bootstrap(by_style[name]) for name in sorted(by_style)}
    portraits = [slot for slot in slots if slot != STYLE]
    if portraits:
        rows = [
            [hit for one in row for hit in one.values()] for row in marks if STYLE not in row[0]
        ]
        shares["portrait"] = bootstrap(rows)
    for slot in portraits:
        shares[f"portrait: {slot}"] = bootstrap(
            [[one[slot] for one in row] for row in marks if slot in row[0]]
        )
    return shares
