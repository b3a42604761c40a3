"""A vision-language model as verifier: does this picture match the prompt, yes or no?

Sana-1.5 (Xie et al. 2025, section 2.4) asks of each picture alone and reads the first word of the
answer. Any image-text-to-text model of transformers can answer, from a local folder or the hub;
NVIDIA's own verifier, NVILA-Lite-2B-Verifier, runs only through code that comes with its weights,
which is not run here. Start reading at `Verifier.answer`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from sana.errors import CheckpointError
from sana.evaluation.networks import find_network, load_transformers

QUESTION = (
    "You are an AI assistant specializing in image analysis and ranking. Your task is to analyze "
    "and compare image based on how well they match the given prompt.\nThe given prompt is:"
    "{prompt}. Please consider the prompt and the image to make a decision and response directly "
    "with 'yes' or 'no'.\n"
)
"""The published question, which NVIDIA's verifier was trained on."""
SPELLINGS = {"yes": ("yes", "Yes"), "no": ("no", "No")}
SURE = 100.0
"""Between a yes and a no; log-probabilities stay below it."""

Answer = tuple[float, float]
"""Log-probabilities of yes and of no."""


class Verifier:
    """The model with its processor."""

    def __init__(self, model: Any, processor: Any, source: str) -> None:
        self.model, self.processor = model, processor
        self.device = next(model.parameters()).device
        tokenizer = processor.tokenizer
        first = {
            word: {tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in spelled}
            for word, spelled in SPELLINGS.items()
        }
        # A spelling that the tokenizer does not know is one token for both words.
        shared = first["yes"] & first["no"]
        self.words = {word: sorted(tokens - shared) for word, tokens in first.items()}
        if not all(self.words.values()):
            raise CheckpointError(
                f"{source} has one token for yes and for no; a verifier must tell them apart, so "
                "take another model"
            )

    @staticmethod
    def load(source: str, device: str = "cpu") -> Verifier:
        """From a folder or repository; raises `RequestError` or `CheckpointError`."""
        from transformers import AutoProcessor

        network = find_network("judge-model", source)
        model = load_transformers("AutoModelForImageTextToText", network, device)
        processor: Any = AutoProcessor
        try:
            made = processor.from_pretrained(str(network.path), local_files_only=True)
            if not hasattr(made, "tokenizer") or not made.chat_template:
                raise ValueError("no tokenizer or no chat template")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise CheckpointError(
                f"{source} holds no processor with a chat template that can be read ({reason}); "
                "put the files that came with the model beside its weights"
            ) from None
        return Verifier(model, made, source)

    @torch.inference_mode()
    def answer(self, prompt: str, picture: Image.Image) -> Answer:
        """How likely the first word is yes, and no; spellings of a word are summed."""
        content = [{"type": "image"}, {"type": "text", "text": QUESTION.format(prompt=prompt)}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(text=[text], images=[picture.convert("RGB")], return_tensors="pt")
        chances = self.model(**inputs.to(self.device)).logits[0, -1].float().log_softmax(-1)
        yes, no = (chances[self.words[word]].logsumexp(0).item() for word in ("yes", "no"))
        return yes, no


class VerifierJudge:
    """A yes scores 100 plus its log-probability, a no -100 less its own: `compare`'s order."""

    name = "vlm"

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    def __call__(self, prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        return [as_score(self.verifier.answer(prompt, picture)) for picture in pictures]


class VerifierTournament:
    """Compares pairs as Sana-1.5's script does; each comparison asks about both anew."""

    name = "vlm-tournament"

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    def compare(self, prompt: str, first: Image.Image, second: Image.Image) -> float:
        return compare(
            self.verifier.answer(prompt, first),
            self.verifier.answer(prompt, second),
        )


def as_score(answer: Answer) -> float:
    """One number in the order of `compare`; NaN where the model gave NaN."""
    yes, no = answer
    if math.isnan(yes) or math.isnan(no):
        return math.nan
    return SURE + yes if yes > no else -SURE - no


def compare(first: Answer, second: Answer) -> float:
    """Over 0 if the first wins: a yes beats a no, then the surer yes, or the less sure no."""
    if any(map(math.isnan, (*first, *second))):
        return math.nan
    says_yes = [yes > no for yes, no in (first, second)]
    if says_yes[0] != says_yes[1]:
        return 1.0 if says_yes[0] else -1.0
    return first[0] - second[0] if says_yes[0] else second[1] - first[1]
