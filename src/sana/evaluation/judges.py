"""Judges for best-of-N: callables of `sana.scaling.Judge`'s shape, higher is better.

Start reading at `load_judge`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from sana.data.stickers.prompts import PromptCase
from sana.data.stickers.reading import Reader
from sana.data.stickers.scene import COLORS
from sana.data.stickers.world import Concept
from sana.errors import CheckpointError, RequestError
from sana.evaluation.alignment import AlignmentJudge
from sana.evaluation.clip import Clip
from sana.evaluation.detector import Found, detect, read
from sana.evaluation.image_reward import Reward
from sana.evaluation.networks import find_network, load_tokenizer, load_transformers
from sana.evaluation.stickers import find_fault
from sana.evaluation.verifier import Verifier, VerifierJudge, VerifierTournament
from sana.models.detector import Detector
from sana.pipelines.images import to_tensor

KNOWN = ("sticker", "alignment", "clip", "image-reward", "vlm", "vlm-tournament")


def load_judge(name: str, source: str, device: str = "cpu") -> Any:
    """The judge called `name` with the weights at `source`; raises as their loaders do."""
    if name == "sticker":
        return StickerJudge.load(Path(source), device)
    if name == "alignment":
        return AlignmentJudge.load(Path(source), device)
    if name == "clip":
        network = find_network("judge-model", source)
        clip = Clip(load_transformers("CLIPModel", network, device), load_tokenizer(network))
        return ScoreJudge(name, clip.score)
    if name == "image-reward":
        return ScoreJudge(name, Reward.load(source, device)[0].score)
    if name == "vlm":
        return VerifierJudge(Verifier.load(source, device))
    if name == "vlm-tournament":
        return VerifierTournament(Verifier.load(source, device))
    raise RequestError(f"judge is {name!r}; known are {', '.join(KNOWN)}")


class ScoreJudge:
    """A published metric's score as a judge."""

    def __init__(
        self, name: str, score: Callable[[str, Sequence[Image.Image]], Sequence[float]]
    ) -> None:
        self.name, self.score = name, score

    def __call__(self, prompt: str, pictures: Sequence[Image.Image]) -> Sequence[float]:
        return self.score(prompt, pictures)


class StickerJudge:
    """1 for a picture in which the rule book finds no fault, plus how clearly things are seen.

    The second part is under 1: the mean, over the things asked for, of the surest sight of each, so
    that right pictures are ordered, and wrong ones too. The detector names main style objects only.
    """

    name = "sticker"

    def __init__(self, detector: Detector, world: Any) -> None:
        self.detector, self.world = detector, world
        self.reader = Reader(world.concepts)

    @staticmethod
    def load(path: Path, device: str = "cpu") -> StickerJudge:
        """From a detector's file alone: the words of its concepts are in the package."""
        network, header = read(path, device)
        if header["colors"] != list(COLORS):
            raise CheckpointError(
                f"{path} knows the colours {', '.join(header['colors'])}, and this version other "
                "ones; train it again with `sana train sticker-detector`"
            )
        return StickerJudge(network, _Words(_concepts(header["concepts"], path)))

    def __call__(self, prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        """Scores; `RequestError` for a prompt that the rules cannot read."""
        case = self.reader.read(prompt)
        return [self.score(case, to_tensor(picture.convert("RGB")))[0] for picture in pictures]

    def score(self, case: PromptCase, pictures: Tensor) -> list[float]:
        """Scores of pictures (B, 3, H, W) in -1..1 of a case that is known."""
        return [
            float(not find_fault(case, found, self.world)) + _clearness(case, found)
            for found in detect(self.detector, pictures)
        ]


class _Words:
    """The part of a `World` that rules read."""

    def __init__(self, concepts: tuple[Concept, ...]) -> None:
        self.concepts = concepts


def _clearness(case: PromptCase, found: Sequence[Found]) -> float:
    """Mean over the wanted things of the surest one's score; half where its colour is wrong."""
    marks = []
    for wanted in case.expected:
        same = [f for f in found if f.concept == wanted.concept]
        right = [f.score for f in same if wanted.color in (None, f.color)]
        marks.append(max(right, default=0.5 * max((f.score for f in same), default=0.0)))
    return 0.99 * sum(marks) / len(marks)


def _concepts(keys: Sequence[str], path: Path) -> tuple[Concept, ...]:
    """The package's concepts with these keys, in this order."""
    from sana.data.stickers.pack import slug

    rows = json.loads(files("sana.data.stickers").joinpath("concepts.json").read_text("utf-8"))
    known = {slug(row["source"]): row for row in rows}
    missing = [key for key in keys if key not in known]
    if missing:
        raise CheckpointError(
            f"{path} knows {missing[0]!r} and {len(missing) - 1} more things that this version has "
            "no words for; train it again with `sana train sticker-detector`"
        )
    return tuple(
        Concept(
            key=key,
            label=known[key]["label"],
            plural=known[key]["plural"],
            synonyms=tuple(known[key]["synonyms"]),
            tags=(),
            group=known[key]["group"],
            recolorable=False,
            color=known[key]["color"],
        )
        for key in keys
    )
