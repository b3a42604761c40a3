"""CLIP: how well a picture fits a sentence (Hessel et al. 2021), and which of some words it shows.

CLIPScore is 100 cos(image, text), at least 0, as torchmetrics and Sana's tables have it (the
paper's own factor is 2.5). The network is transformers' `CLIPModel`; published is ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sana.evaluation.networks import Network, find_network, load_tokenizer, load_transformers
from sana.evaluation.sight import clip_pixels

SCALE = 100.0


class Clip:
    """Embeddings of unit length of pictures and sentences; longer sentences are cut off."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        self.size = int(model.config.vision_config.image_size)
        self.tokens = int(model.config.text_config.max_position_embeddings)

    @staticmethod
    def load(source: str, device: str = "cpu", *, is_offline: bool = False) -> tuple[Clip, Network]:
        """From a folder or a repository; raises `RequestError` or `CheckpointError`."""
        network = find_network("clip", source, is_offline=is_offline)
        return Clip(
            load_transformers("CLIPModel", network, device), load_tokenizer(network)
        ), network

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(B, D), each of length 1."""
        pixels = torch.stack([clip_pixels(picture, self.size) for picture in pictures])
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1).cpu()

    @torch.inference_mode()
    def texts(self, sentences: Sequence[str]) -> Tensor:
        """(B, D), each of length 1."""
        encoded = self.tokenizer(
            list(sentences),
            padding=True,
            truncation=True,
            max_length=self.tokens,
            return_tensors="pt",
        )
        pooled = self.model.text_model(
            input_ids=encoded["input_ids"].to(self.device),
            attention_mask=encoded["attention_mask"].to(self.device),
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1).cpu()

    def score(self, prompt: str, pictures: Sequence[Image.Image]) -> list[float]:
        """CLIPScore of each picture with the prompt, 0..100."""
        return clip_scores(self.images(pictures), self.texts([prompt]))


def clip_scores(images: Tensor, text: Tensor) -> list[float]:
    """100 max(cos, 0) of embeddings (B, D) and (1, D)."""
    cosines = F.normalize(images, dim=-1) @ F.normalize(text, dim=-1).T
    found: list[float] = (SCALE * cosines.clamp_min(0)).squeeze(1).tolist()
    return found


def classifier(clip: Clip, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One direction (D,) of length 1 for each label: the mean over templates with {c} for it.

    Zero-shot classification as in Radford et al. 2021, section 3.1.4: each sentence's embedding has
    length 1, and so has their mean.
    """
    rows = [
        clip.texts([template.replace("{c}", label) for template in templates]).mean(0)
        for label in labels
    ]
    return F.normalize(torch.stack(rows), dim=-1)
