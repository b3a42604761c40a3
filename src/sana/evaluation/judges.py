"""Judges for best-of-N: the sticker detector's rules, CLIP, and a VLM's yes or no.

Each is a callable of `sana.scaling.Judge`'s shape, higher is better; `VlmTournament` is a referee.
Start reading at `load_judge`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from sana.data.stickers.prompts import PromptCase
from sana.data.stickers.reading import Reader
from sana.data.stickers.scene import COLORS
from sana.data.stickers.world import Concept
from sana.errors import CheckpointError, RequestError
from sana.evaluation.detector import Found, detect
from sana.evaluation.stickers import find_fault
from sana.models.detector import Detector
from sana.pipelines.images import to_tensor
from sana.weights.files import read_file
from sana.weights.load import assign

QUESTION = (
    "You are an AI assistant that ranks pictures. Look at the picture and decide whether it shows "
    'everything that this prompt asks for: "{prompt}". Answer with one word, yes or no.'
)
"""What a VLM is asked: the contents of Sana-1.5's question, in our words."""


class Named(Protocol):
    """What the rule book needs of a world."""

    concepts: tuple[Concept, ...]


def load_judge(name: str, source: str, device: str = "cpu") -> Any:
    """The judge called `name` with the weights at `source`; raises as their loaders do."""
    if name == "sticker":
        return StickerJudge.load(Path(source), device)
    if name == "clip":
        return ClipJudge(source, device)
    if name in ("vlm", "vlm-tournament"):
        verifier = VlmJudge(source, device)
        return verifier if name == "vlm" else VlmTournament(verifier)
    raise RequestError(f"judge is {name!r}; known are sticker, clip, vlm and vlm-tournament")


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
        header, tensors, _ = read_file(path)
        if header.get("kind") != "detector" or header.get("colors") != list(COLORS):
            raise CheckpointError(
                f"{path} holds {header.get('kind', 'a model')!r}, not a detector of these colours; "
                "give the detector.safetensors that `sana train sticker-detector` wrote"
            )
        concepts = _concepts(header["concepts"], path)
        network = Detector(len(concepts), len(COLORS) + 1)
        wide = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
        assign(network, wide, str(path))
        return StickerJudge(network.to(device).eval(), _Words(concepts))

    def __call__(self, prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        """Scores; `RequestError` for a prompt that the rules cannot read."""
        case = self.reader.read(prompt)
        scores = []
        for picture in pictures:
            [found] = detect(self.detector, to_tensor(picture.convert("RGB")))
            scores.append(float(not find_fault(case, found, self.world)) + _clearness(case, found))
        return scores


class ClipJudge:
    """100 times the cosine of CLIP's picture and prompt embeddings (Hessel et al. 2021, unclipped).

    A prompt's tokens over the model's limit are cut.
    """

    name = "clip"

    def __init__(self, source: str, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.model = _loaded(source, CLIPModel.from_pretrained).to(device).eval()
        self.processor = _loaded(source, CLIPProcessor.from_pretrained)
        self.device = device

    @torch.inference_mode()
    def __call__(self, prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        inputs = self.processor(
            text=[prompt],
            images=list(pictures),
            return_tensors="pt",
            padding=True,
            truncation=True,
        ).to(self.device)
        found = self.model(**inputs)
        image, text = (
            torch.nn.functional.normalize(embeds.float(), dim=-1)
            for embeds in (found.image_embeds, found.text_embeds)
        )
        scores: list[float] = (100 * image @ text[0]).tolist()
        return scores


class VlmJudge:
    """log P(yes) - log P(no) of the first word that an image-text-to-text model answers."""

    name = "vlm"

    def __init__(self, source: str, device: str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = _loaded(source, AutoModelForImageTextToText.from_pretrained)
        self.model = self.model.to(device).eval()
        self.processor = _loaded(source, AutoProcessor.from_pretrained)
        self.device = device
        self.yes, self.no = (self._word(words) for words in (("yes", "Yes"), ("no", "No")))

    def __call__(self, prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        answers = [self.answer(prompt, picture) for picture in pictures]
        return [yes - no for yes, no in answers]

    @torch.inference_mode()
    def answer(self, prompt: str, picture: Image.Image) -> tuple[float, float]:
        """Log-probabilities of yes and of no; the question is asked of the picture alone."""
        content = [
            {"type": "image"},
            {"type": "text", "text": QUESTION.format(prompt=prompt)},
        ]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(text=[text], images=[picture.convert("RGB")], return_tensors="pt")
        logits: Tensor = self.model(**inputs.to(self.device)).logits
        chances = logits[0, -1].float().log_softmax(-1)
        return chances[self.yes].logsumexp(0).item(), chances[self.no].logsumexp(0).item()

    def _word(self, words: Sequence[str]) -> list[int]:
        """First tokens of a word's spellings."""
        tokenizer = self.processor.tokenizer
        return sorted({tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in words})


class VlmTournament:
    """Sana-1.5's comparison: a yes beats a no, then the surer yes or the less sure no wins.

    Each comparison asks about both pictures anew.
    """

    name = "vlm-tournament"

    def __init__(self, verifier: VlmJudge) -> None:
        self.verifier = verifier

    def compare(self, prompt: str, first: Image.Image, second: Image.Image) -> float:
        answers = [self.verifier.answer(prompt, picture) for picture in (first, second)]
        return compare_answers(*answers)


def compare_answers(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Over 0 if the first pair of log-probabilities of yes and no wins."""
    says_yes = [yes > no for yes, no in (first, second)]
    if says_yes[0] != says_yes[1]:
        return 1.0 if says_yes[0] else -1.0
    return first[0] - second[0] if says_yes[0] else second[1] - first[1]


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


def _loaded(source: str, load: Callable[[str], Any]) -> Any:
    try:
        return load(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(
            f"judge_model is {source!r}, which transformers cannot load ({reason}); give a folder "
            "with the model and its processor"
        ) from error
