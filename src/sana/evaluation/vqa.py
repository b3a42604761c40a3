"""Who answers questions about a picture: transformers' BLIP, fine-tuned on VQA (Li et al. 2022).

DPG-Bench was published with mPLUG-large, which transformers does not have, so a score by this one
is called "DPG-Bench (NETWORK)". Answers are made as BLIP's authors do: three beams, at
most ten tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from sana.evaluation.networks import Network, find_network, load_tokenizer, load_transformers
from sana.evaluation.sight import squashed_pixels

BEAMS, LONGEST = 3, 10
QUESTION_TOKENS = 35


class Answerer:
    """`answer` gives one short text for each question about a picture."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        self.size = int(model.config.vision_config.image_size)

    @staticmethod
    def load(
        source: str, device: str = "cpu", *, is_offline: bool = False
    ) -> tuple[Answerer, Network]:
        """From a folder or a repository, such as Salesforce/blip-vqa-capfilt-large."""
        network = find_network("vqa", source, is_offline=is_offline)
        model = load_transformers("BlipForQuestionAnswering", network, device)
        return Answerer(model, load_tokenizer(network)), network

    @torch.inference_mode()
    def answer(self, picture: Image.Image, questions: Sequence[str]) -> list[str]:
        """Answers in lower case, in the order of the questions."""
        encoded = self.tokenizer(
            [question.lower() for question in questions],
            padding=True,
            truncation=True,
            max_length=QUESTION_TOKENS,
            return_tensors="pt",
        )
        pixels = squashed_pixels(picture, self.size)[None].to(self.device)
        tokens = self.model.generate(
            input_ids=encoded["input_ids"].to(self.device),
            attention_mask=encoded["attention_mask"].to(self.device),
            pixel_values=pixels.expand(len(questions), -1, -1, -1),
            num_beams=BEAMS,
            max_new_tokens=LONGEST,
            min_new_tokens=1,
        )
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip().lower() for text in texts]
